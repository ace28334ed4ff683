"""PEFT is the judge: its own merging, and its own loading of the adapters that we write."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from weight_convert.cast import to_float
from weight_convert.convert import convert
from weight_convert.dialects import delta, hf
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Options
from weight_convert.storage.tensor import NUMPY_DTYPES, Place, Tensor

LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
EVERYWHERE = ["q_proj", "v_proj", "fc1", "down_proj", "linear_1", "lm_head", "embed_tokens"]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    return transformers.LlavaNextForConditionalGeneration.from_pretrained(directory, dtype=dtype)


def train(model: torch.nn.Module, seed: int = 0, **settings) -> PeftModel:
    """An adapter as after some training: nothing in it is zero any more."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LANGUAGE, **settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.rand(parameter.shape) + 0.5
        elif "lora_" in name or "modules_to_save" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    return adapted


def arrays(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {hf.canonical_name(name): value for name, value in model.state_dict().items()}


def read(directory: Path, **options) -> dict[str, torch.Tensor]:
    """What we hold at a directory, as float64 torch tensors."""
    tensors = open_source(directory, Options(**options)).tensors
    return {
        name: torch.from_numpy(to_float(tensor.read(), tensor.dtype).astype(np.float64))
        for name, tensor in tensors.items()
    }


KINDS = {
    "plain": {},
    "everywhere": {"target_modules": EVERYWHERE},
    "rslora": {"use_rslora": True, "r": 5},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 7},
        "alpha_pattern": {r"language_model\.layers\.0\.mlp\.up_proj": 32, "o_proj": 1},
    },
    "projector": {"modules_to_save": ["multi_modal_projector"]},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_pefts_in_exact_arithmetic(tiny, tmp_path, kind, dtype):
    """PEFT in float64 and we agree on every bit, once both are rounded to the dtype stored."""
    base = tiny("llava_next", dtype=dtype)
    train(load(base, torch.float32), **KINDS[kind]).save_pretrained(tmp_path / "adapter")
    reference = PeftModel.from_pretrained(load(base, torch.float64), tmp_path / "adapter")
    merged = arrays(reference.double().merge_and_unload())
    ours = read(tmp_path / "adapter", base=base)
    assert ours.keys() == merged.keys()
    stored, before = getattr(torch, dtype), read(base)
    changed = 0
    for name, value in merged.items():
        assert torch.equal(ours[name], value.float().to(stored).double()), name
        changed += not torch.equal(ours[name], before[name])
    assert changed >= {"projector": 25, "everywhere": 9 + 3 + 3 + 2}.get(kind, 21)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merging_is_pefts_up_to_its_own_rounding(tiny, tmp_path, dtype):
    """As PEFT is used: float32 products, which differ from ours by the order of addition."""
    stored, base = getattr(torch, dtype), tiny("llava_next", dtype=dtype)
    adapted = train(load(base, stored))
    adapted.save_pretrained(tmp_path / "adapter")
    low = open_source(tmp_path / "adapter").adapter
    before, ours = read(base), read(tmp_path / "adapter", base=base)
    merged = arrays(adapted.merge_and_unload())
    different = total = 0
    for module, (a, b) in low.pairs.items():
        name = f"{module}.weight"
        product = np.abs(b.read().astype(np.float64)) @ np.abs(a.read().astype(np.float64))
        size = before[name].abs() + 1.5 * torch.from_numpy(product)
        # r products and additions, the scaling and the sum, each rounded to float32.
        bound = (4 + 2) * 2.0**-24 * size
        difference = (ours[name] - merged[name].double()).abs()
        if stored != torch.float32:  # at worst both are on two sides of a rounding border
            bound = bound + torch.finfo(stored).eps * ours[name].abs() + 2.0**-24
        assert (difference <= bound).all(), name
        different += int((difference > 0).sum())
        total += difference.numel()
    assert total > 50_000
    if stored != torch.float32:
        assert different / total < 3e-4


def test_a_merged_model_gives_the_logits_of_base_and_adapter(tiny, tmp_path):
    base = tiny("llava_next")
    adapted = train(load(base, torch.float32), **KINDS["everywhere"]).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "merged", "hf", Options(base=base))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        logits = load(tmp_path / "merged", torch.float32)(input_ids=ids).logits
        unmerged = load(base, torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (logits - unmerged).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_write_anew(tiny, tmp_path, kind):
    """Names of other transformers and a new adapter_config.json, and still the same updates."""
    base = tiny("llava_next")
    train(load(base, torch.float32), **KINDS[kind]).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "old", "peft", Options(spelling="hub"))
    newest = Options(spelling="in memory, transformers 5")
    convert(tmp_path / "old", tmp_path / "new", "peft", newest)
    settings = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert settings["target_modules"] != KINDS[kind].get("target_modules", LANGUAGE)
    models = [
        PeftModel.from_pretrained(load(base, torch.float32), tmp_path / name)
        for name in ("saved", "new")
    ]
    adapted = [
        {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        for model in models
    ]
    assert adapted[0] == adapted[1]
    expected, found = (model.merge_and_unload().state_dict() for model in models)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_old_names_are_those_of_old_transformers(tiny, tmp_path):
    base = tiny("llava_next")
    train(load(base, torch.float32), **KINDS["everywhere"]).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "old", "peft", Options(spelling="hub"))
    names = safetensors_names(tmp_path / "old/adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.").rsplit(".lora_")[0] for name in names}
    assert {
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.model.embed_tokens",
        "language_model.lm_head",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1",
        "multi_modal_projector.linear_1",
    } <= modules


def safetensors_names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return set(file.keys())


def test_a_plain_language_model(tiny, tmp_path):
    """An adapter of a LLaMA alone, whose names are also those of original LLaVA."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    adapted = train(model, target_modules=["q_proj", "gate_proj", "lm_head"])
    adapted.save_pretrained(tmp_path / "adapter")
    source = open_source(tmp_path / "adapter")
    assert source.memory["peft"]["spelling"] == "original"
    convert(tmp_path / "adapter", tmp_path / "again", "peft", Options(spelling="original"))
    reference = PeftModel.from_pretrained(model_at(tmp_path / "base"), tmp_path / "again")
    expected = reference.double().merge_and_unload().state_dict()
    ours = read(tmp_path / "adapter", base=tmp_path / "base")
    assert {f"language_model.{name}" for name in expected} == ours.keys()
    for name, value in expected.items():
        assert torch.equal(ours[f"language_model.{name}"], value.float().double()), name


def model_at(directory: Path) -> torch.nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_began_as_a_part_of_the_base_is_refused(tiny, tmp_path, start):
    base = tiny("llava_next")
    adapted = train(load(base, torch.float32), init_lora_weights=start)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=start):
        open_source(tmp_path / "adapter", Options(base=base))


# --- deltas --------------------------------------------------------------------------------------


def stored(array: np.ndarray, code: str) -> Tensor:
    return Tensor(code, array.shape, lambda: array, (Place(Path("memory"), 0, "x"),))


@pytest.mark.parametrize(
    ("code", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)]
)
def test_deltas_are_torchs(code, dtype):
    """LLaVA's make_delta and apply_delta, in torch, on a million random bit patterns."""
    random = np.random.default_rng(0)
    integer, size = (np.int32, 4) if code == "F32" else (np.int16, 2)
    bits = [random.integers(0, 256, (*shape, size), np.uint8).view(integer)[..., 0]
            for shape in ((1003, 1024), (1000, 1000))]  # fmt: skip
    target, base = (torch.from_numpy(array).view(dtype) for array in bits)
    arrays = [array.view(NUMPY_DTYPES[code]) for array in bits]
    for ours, sign in ((delta.subtracted, -1), (delta.added, 1)):
        expected = target.clone()
        expected[:1000, :1000] += sign * base
        found = ours(*(stored(array, code) for array in arrays)).read()
        numbers = ~torch.isnan(expected).numpy()
        assert numbers.mean() > 0.9
        same = found.view(integer) == expected.view(getattr(torch, f"int{8 * size}")).numpy()
        assert same[numbers].all()
        assert np.isnan(to_float(found, code))[~numbers].all()


def test_a_base_of_another_dtype_is_cast_first():
    random = torch.Generator().manual_seed(0)
    target = torch.randn(64, 64, generator=random).half()
    base = torch.randn(64, 64, generator=random)
    found = delta.subtracted(stored(target.numpy(), "F16"), stored(base.numpy(), "F32")).read()
    assert np.array_equal(found, (target - base.half()).numpy())
