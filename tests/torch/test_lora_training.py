"""Adapters against real PEFT: the same training, and PEFT loads what a run leaves."""

from __future__ import annotations

import json
import re
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from backends.contract import AdamW, Group
from backends.quantised import LEVELS, dequantise, quantise
from backends.torch import fused_4bit, ops, training
from backends.torch.reference import canonical
from tests.torch.test_training import CONFIG, for_engine, for_transformers, sample
from unillava.config import read_spec
from unillava.models.llava import LlavaForTraining
from unillava.training import state
from unillava.training.lora import LOW, adapter_spec
from unillava.training.recipe import Lora, read_recipe
from unillava.training.session import run_recipe
from weight_convert.convert import convert
from weight_convert.opening import open_source
from weight_convert.source import Options

TARGETS = r".*language_model.*\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj)"


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain_name(name: str) -> str:
    """A parameter of a PEFT model by our name."""
    name = name.removeprefix("base_model.model.")
    return canonical(re.sub(r"\.base_layer|\.default|\.modules_to_save", "", name))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_loss_of_every_step_is_pefts(runtime, rslora):
    """LoRA at one rate and the whole projector at another, as LLaVA's finetune_lora."""
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(CONFIG)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": rslora, "lora_dropout": 0.0}
    peft = get_peft_model(model, LoraConfig(target_modules=TARGETS, **settings))
    for name, parameter in peft.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    trained = {plain_name(n): p for n, p in peft.named_parameters() if p.requires_grad}
    spec = read_spec(CONFIG.to_dict())
    low = adapter_spec(spec, Lora(rank=4, alpha=8, rslora=rslora))
    module = runtime.build(lambda: LlavaForTraining(spec, low))
    runtime.set_trained(module, trained)
    for name, parameter in peft.named_parameters():
        runtime.assign(module, plain_name(name), parameter.detach().numpy().copy())
    groups = (
        Group("language", tuple(n for n in trained if n.endswith(LOW)), 0.1),
        Group("projector", tuple(n for n in trained if not n.endswith(LOW))),
    )
    assert len(groups[0].parameters) == 2 * 7 * 3 and len(groups[1].parameters) == 4
    rates = {"language": 5e-3, "projector": 5e-4}
    engine = training.Engine(module, groups, AdamW(clip_norm=1.0))
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [trained[n] for n in group.parameters],
                "weight_decay": group.weight_decay,
                "lr": rates[group.name],
            }
            for group in groups
        ]
    )
    rng, losses = np.random.default_rng(0), []
    for step in range(12):
        samples = [sample(rng) for _ in range(3)]
        loss = peft(**for_transformers(samples)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        inputs = for_engine(spec, samples)
        found = engine.accumulate(inputs, 1 / len(inputs[7]))
        assert found == pytest.approx(loss.item(), rel=1e-5), step
        assert engine.update(rates).total == pytest.approx(norm.item(), rel=1e-4), step
        losses.append(found)
    assert losses[-1] < losses[0] - 0.3


# --- what a run leaves -----------------------------------------------------------------------


def run(base, folder, photo, **parts):
    """A few steps; the folder of the run."""
    folder.mkdir()
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A coast.")]
    record = {
        "id": "one",
        "image": str(photo),
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }
    (folder / "data.json").write_text(json.dumps([record] * 4))
    content = {
        "model": {"path": str(base)},
        "data": {"files": [{"path": str(folder / "data.json")}], "workers": 0, "pad_to": 1},
        "rates": {"language": 2e-2, "projector": 2e-3},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.05},
        "steps": {"batch": 1, "max_steps": 3},
        "optimizer": {"warmup_ratio": 0},
        "output": str(folder / "out"),
        **parts,
    }
    assert run_recipe(read_recipe(content), backend="torch", device="cpu")
    return folder / "out"


@pytest.fixture(scope="module")
def base(tiny):
    return tiny("llava")


def inputs_of(config) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    image = [config.image_token_index] * (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[3, 4, *image, 5, 6, 7]])
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    return {"input_ids": ids, "pixel_values": pixels}


def load(path) -> torch.nn.Module:
    return transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)


def test_peft_loads_the_result_and_its_logits_are_the_merged_ones(base, photo, tmp_path):
    output = run(base, tmp_path / "run", photo)
    final = output / "final"
    convert(final, tmp_path / "merged", "hf", Options(base=base))
    model = load(base)
    inputs = inputs_of(model.config)
    with torch.no_grad():
        before = model(**inputs).logits
        adapted = PeftModel.from_pretrained(model, final).eval()
        expected = adapted(**inputs).logits
        found = load(tmp_path / "merged")(**inputs).logits
    assert len([n for n, _ in adapted.named_parameters() if "lora_B" in n]) == 21
    size = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * size
    assert (before - expected).abs().max() > 1e-2 * size
    saved = state.find_latest(output)
    name = "multi_modal_projector.linear_1.weight"
    held = {plain_name(n): p for n, p in adapted.named_parameters() if "original" not in n}
    np.testing.assert_array_equal(held[name].detach().numpy(), saved.read(name, "parameter"))


def test_beside_original_llava_the_result_is_original_llavas(base, photo, tmp_path):
    """Its loader wants its names, its config.json, and the projector in a file of its own."""
    convert(base, tmp_path / "original", "original")
    output = run(tmp_path / "original", tmp_path / "run", photo)
    final = output / "final"
    low = open_names(final / "adapter_model.safetensors")
    whole = torch.load(final / "non_lora_trainables.bin", weights_only=True)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in low
    assert all(".lora_" in name for name in low)
    assert set(whole) == {
        f"base_model.model.model.mm_projector.{n}.{leaf}"
        for n in (0, 2)
        for leaf in ("weight", "bias")
    }
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["mm_projector_type"] == "mlp2x_gelu"
    merged = open_source(final, Options(base=tmp_path / "original")).tensors
    start, saved = open_source(tmp_path / "original").tensors, state.find_latest(output)
    module = "language_model.model.layers.1.mlp.up_proj"
    a, b = (saved.read(module + end, "parameter") for end in LOW)
    wanted = start[f"{module}.weight"].read() + 2 * b @ a
    np.testing.assert_allclose(merged[f"{module}.weight"].read(), wanted, atol=1e-6)


def open_names(path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return set(file.keys())


def test_a_stage_one_projector_travels_with_the_adapter(base, photo, tmp_path):
    """The base on the disk has another one: frozen as it is here, it must be saved too."""
    from weight_convert.storage import safetensors

    projector = tmp_path / "mm_projector.safetensors"
    source = open_source(base)
    names = {f"{k}.{leaf}": f"linear_{k // 2 + 1}.{leaf}" for k in (0, 2) for leaf in LEAVES}
    values = {
        f"model.mm_projector.{stored}": source.tensors[f"multi_modal_projector.{own}"].read() * 0.5
        for stored, own in names.items()
    }
    table = {name: ("F32", value.shape) for name, value in values.items()}
    order = safetensors.layout_order(table)
    safetensors.write_file(projector, {n: table[n] for n in order}, ((n, values[n]) for n in order))
    model = {"path": str(base), "pretrain_mm_mlp_adapter": str(projector)}
    output = run(base, tmp_path / "run", photo, model=model, rates={"language": 1e-2})
    merged = open_source(output / "final", Options(base=base)).tensors
    for stored, own in names.items():
        found = merged[f"multi_modal_projector.{own}"].read()
        np.testing.assert_array_equal(found, values[f"model.mm_projector.{stored}"])


LEAVES = ("weight", "bias")

# --- bitsandbytes ----------------------------------------------------------------------------


def fake_bitsandbytes(calls: list) -> types.ModuleType:
    """Its two names that are used, as its documentation describes them, in NumPy."""

    class QuantState:
        def __init__(self, absmax, shape=None, code=None, blocksize=None, quant_type=None,
                     dtype=None, offset=None, state2=None):  # fmt: skip
            self.absmax, self.shape, self.code, self.dtype = absmax, shape, code, dtype
            self.blocksize, self.quant_type, self.nested = blocksize, quant_type, state2

    def dequantize_4bit(A, quant_state=None):
        assert A.dtype == torch.uint8 and A.shape[1] == 1 and not quant_state.nested
        assert quant_state.quant_type == "nf4" and quant_state.absmax.ndim == 1
        calls.append(quant_state.blocksize)
        codes = torch.stack([A[:, 0] >> 4, A[:, 0] & 15], 1).reshape(-1).long()
        blocks = quant_state.code[codes].reshape(-1, quant_state.blocksize)
        whole = blocks * quant_state.absmax[:, None]
        return whole.reshape(quant_state.shape).to(quant_state.dtype)

    module = types.ModuleType("bitsandbytes")
    module.functional = types.SimpleNamespace(
        QuantState=QuantState, dequantize_4bit=dequantize_4bit
    )
    return module


def test_bitsandbytes_reads_nf4_where_it_is_there(monkeypatch):
    """Called as its documentation says. No GPU, and not the library itself, takes part here."""
    calls: list[int] = []
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake_bitsandbytes(calls))
    monkeypatch.setattr(fused_4bit, "DEVICES", ("cpu",))
    fused_4bit._functional.cache_clear()
    try:
        weight = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
        codes, scale = quantise(weight, "nf4")
        x = torch.randn(3, 128, requires_grad=True)
        y = ops.quantised_linear(x, torch.from_numpy(codes), torch.from_numpy(scale), "nf4")
        y.sum().backward()
        known = torch.from_numpy(dequantise(codes, scale, "nf4"))
        torch.testing.assert_close(y.detach(), x.detach() @ known.T)
        torch.testing.assert_close(x.grad, torch.ones(3, 6) @ known)
        assert calls == [64, 64]
        rows = quantise(weight[:, :48], "nf4")  # blocks of 16, which it does not know
        assert fused_4bit.dequantised(*map(torch.from_numpy, rows), "nf4", torch.float32) is None
        assert len(LEVELS["nf4"]) == 16
    finally:
        fused_4bit._functional.cache_clear()
