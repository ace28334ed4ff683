"""Low-rank adapters: names of every model, both layouts, merging, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from unillava.config import read_spec
from weight_convert import blocks, lora
from weight_convert.canonical import expected_names
from weight_convert.convert import convert
from weight_convert.dialects import hf, peft, registry
from weight_convert.dialects.vocabulary import mean_row
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Options, Source, Vocabulary
from weight_convert.storage import pdparams, torch_file
from weight_convert.storage.tensor import Place, Tensor
from weight_convert.verify import compare, verify

RANK, ALPHA = 3, 7
Arrays = Mapping[str, np.ndarray]

# --- adapters made by hand ---------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_torch(path: Path, tensors: Arrays) -> None:
    codes = {"float32": "F32", "float16": "F16"}
    table = {name: (codes[str(a.dtype)], a.shape) for name, a in tensors.items()}
    torch_file.write_file(path, table, tensors.items())


def peft_directory(path: Path, tensors: Arrays, beside: Arrays | None = None, **changes) -> Path:
    """As PEFT and LLaVA leave it; names without `base_model.model.`."""
    path.mkdir(parents=True)
    fields = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"],
        "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM", "fan_in_fan_out": False,
        "base_model_name_or_path": "somebody/something", "modules_to_save": None,
    }  # fmt: skip
    write_json(path / "adapter_config.json", {**fields, **changes})
    named = {f"base_model.model.{name}": array for name, array in tensors.items()}
    save_file(named, path / "adapter_model.safetensors")
    if beside:
        named = {f"base_model.model.{name}": array for name, array in beside.items()}
        write_torch(path / "non_lora_trainables.bin", named)
    return path


def paddle_directory(path: Path, tensors: Arrays, **changes) -> Path:
    path.mkdir(parents=True)
    fields = {"r": RANK, "lora_alpha": ALPHA, "scaling": ALPHA / RANK, "rslora": False}
    write_json(path / "lora_config.json", {**fields, **changes})
    write_pdparams(path / "lora_model_state.pdparams", tensors)
    return path


def write_pdparams(path: Path, tensors: Arrays) -> None:
    table = {name: ("F32", array.shape) for name, array in tensors.items()}
    pdparams.write_file(path, table, tensors.items())


class Numbers:
    """Random matrices, float32."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return (self._random.standard_normal(shape) * 0.3).astype(np.float32)

    def pair(self, out: int, inner: int, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
        """A [r, in], B [out, r]."""
        return self(rank, inner), self(out, rank)


def in_peft(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return tensors


def opened(directory: Path, **options) -> Source:
    return open_source(directory, Options(**options))


def values(source: Source) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in source.tensors.items()}


def is_equal(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[n].dtype and x.shape == b[n].shape and x.tobytes() == b[n].tobytes()
        for n, x in a.items()
    )


# --- names -------------------------------------------------------------------------------------

MODULES = {
    "language_model.model.layers.0.self_attn.q_proj": (64, 64),
    "language_model.model.layers.2.mlp.down_proj": (64, 128),
    "language_model.lm_head": (576, 64),
    "vision_tower.vision_model.encoder.layers.1.self_attn.k_proj": (32, 32),
    "vision_tower.vision_model.encoder.layers.1.mlp.fc1": (64, 32),
    "multi_modal_projector.linear_2": (64, 64),
}
IN = {
    "hub": list(MODULES),
    "in memory, transformers 4.52 to 4.57": [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.2.mlp.down_proj",
        "lm_head",
        "model.vision_tower.vision_model.encoder.layers.1.self_attn.k_proj",
        "model.vision_tower.vision_model.encoder.layers.1.mlp.fc1",
        "model.multi_modal_projector.linear_2",
    ],
    "in memory, transformers 5": [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.2.mlp.down_proj",
        "lm_head",
        "model.vision_tower.encoder.layers.1.self_attn.k_proj",
        "model.vision_tower.encoder.layers.1.mlp.fc1",
        "model.multi_modal_projector.linear_2",
    ],
    "original": [
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
        "lm_head",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.k_proj",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1",
        "model.mm_projector.2",
    ],
}
"""Written by hand from the models' own `named_modules`."""
IN_PADDLE = [
    "llama.layers.0.self_attn.q_proj",
    "llama.layers.2.mlp.down_proj",
    "llama.vision_tower.vision_tower.vision_model.transformer.layers.1.self_attn.k_proj",
    "llama.vision_tower.vision_tower.vision_model.transformer.layers.1.linear1",
    "llama.mm_projector.2",
]


def some_pairs(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    numbers = Numbers(seed)
    return {module: numbers.pair(*shape) for module, shape in MODULES.items()}


def check_pairs(source: Source, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    assert source.adapter.pairs.keys() == pairs.keys()
    for module, (a, b) in pairs.items():
        for tensor, array in zip(source.adapter.pairs[module], (a, b), strict=True):
            assert tensor.read().tobytes() == array.tobytes()


@pytest.mark.parametrize("spelling", IN)
def test_the_names_of_every_model_are_known(tmp_path, spelling):
    pairs = some_pairs()
    named = dict(zip(IN[spelling], pairs.values(), strict=True))
    directory = peft_directory(tmp_path / "adapter", in_peft(named))
    source = opened(directory)
    assert (source.dialect, source.memory["peft"]["spelling"]) == ("peft", spelling)
    check_pairs(source, pairs)
    for other, names in IN.items():
        target = tmp_path / re.sub(r"\W", "-", other)
        convert(directory, target, "peft", Options(spelling=other))
        stored = load_file(target / "adapter_model.safetensors")
        expected = in_peft(dict(zip(names, pairs.values(), strict=True)))
        assert is_equal(stored, {f"base_model.model.{n}": a for n, a in expected.items()})


def test_paddle_names_and_orientation(tmp_path):
    pairs = some_pairs()
    head = {"language_model.lm_head": pairs.pop("language_model.lm_head")}
    directory = peft_directory(tmp_path / "peft", in_peft(pairs))
    convert(directory, tmp_path / "paddle", "paddle-lora")
    stored = {
        name: tensor.read()
        for name, tensor in pdparams.open_file(
            tmp_path / "paddle/lora_model_state.pdparams"
        ).items()
    }
    expected = {}
    for name, (a, b) in zip(IN_PADDLE, pairs.values(), strict=True):
        expected |= {f"{name}.lora_A": a.T.copy(), f"{name}.lora_B": b.T.copy()}
    assert is_equal(stored, expected)
    source = opened(tmp_path / "paddle")
    assert source.dialect == "paddle-lora"
    check_pairs(source, pairs)
    with pytest.raises(CheckpointError, match="output head"):
        convert(peft_directory(tmp_path / "head", in_peft(head)), tmp_path / "x", "paddle-lora")


def test_every_parameter_has_one_name_in_every_spelling(tiny):
    for family, vision in (("llava", "clip"), ("llava_next", "siglip")):
        config = json.loads((tiny(family, vision=vision) / "config.json").read_text())
        names = expected_names(config)
        for table in peft.SPELLINGS.values():
            spelled = [hf.spelled_name(name, table) for name in names]
            assert len(set(spelled)) == len(names)
            assert [peft.canonical_name(name) for name in spelled] == names


def test_the_joined_matrix_of_moss2(tmp_path):
    """B's rows are cut as those of wqkv, and A is shared: the same update, matrix by matrix."""
    numbers = Numbers()
    heads, kv_heads, size, width = 4, 2, 8, 32
    a, b = numbers.pair((heads + 2 * kv_heads) * size, width)
    directory = peft_directory(
        tmp_path / "adapter",
        in_peft({
            "model.layers.0.attention.wqkv": (a, b),
            "model.layers.0.feed_forward.w2": numbers.pair(32, 48),
            "output": numbers.pair(96, 32),
        }),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="wqkv"):
        opened(directory)
    write_json(
        directory / "config.json",
        {"model_type": "llava_moss2", "num_attention_heads": heads, "hidden_size": width,
         "num_key_value_heads": kv_heads, "mm_vision_tower": "openai/clip"},
    )  # fmt: skip
    source = opened(directory)
    found = {m.rsplit(".", 1)[1]: pair for m, pair in source.adapter.pairs.items()}
    assert found.keys() == {"q_proj", "k_proj", "v_proj", "down_proj", "lm_head"}
    update = (b @ a).reshape(kv_heads, heads // kv_heads + 2, size, width)
    expected = {
        "q_proj": update[:, :2].reshape(-1, width),
        "k_proj": update[:, 2].reshape(-1, width),
        "v_proj": update[:, 3].reshape(-1, width),
    }
    for name, array in expected.items():
        low, high = (tensor.read() for tensor in found[name])
        np.testing.assert_allclose(high @ low, array, rtol=1e-5, atol=1e-6)


# --- there and back ----------------------------------------------------------------------------


def llava_adapter(path: Path, saved: Arrays | None = None, **changes) -> Path:
    """As LLaVA's LoRA training leaves it."""
    numbers = Numbers()
    leaves = {"self_attn.q_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.down_proj": (64, 128)}
    pairs = {
        f"model.layers.{n}.{leaf}": numbers.pair(*shape)
        for n in range(3)
        for leaf, shape in leaves.items()
    }
    beside = {
        "model.mm_projector.0.weight": numbers(64, 32),
        "model.mm_projector.0.bias": numbers(64),
        "model.mm_projector.2.weight": numbers(64, 64),
        "model.mm_projector.2.bias": numbers(64),
        "model.image_newline": numbers(64),
        **(saved or {}),
    }
    return peft_directory(path, in_peft(pairs), beside, **changes)


def contents_of(directory: Path) -> dict[str, Any]:
    """Every file but the manifest: JSON parsed, weights as arrays."""
    found: dict[str, Any] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json" and path.name != "unillava_manifest.json":
            found[path.name] = json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            found[path.name] = {n: a.tobytes() for n, a in load_file(path).items()}
        elif path.suffix in (".bin", ".pdparams"):
            reader = torch_file if path.suffix == ".bin" else pdparams
            tensors = reader.open_file(path).items()
            found[path.name] = {n: (t.shape, t.read().tobytes()) for n, t in tensors}
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"bias": "lora_only"}, {"lora_alpha": 2.5, "lora_dropout": 0.0}],
)
def test_from_peft_to_paddle_and_back(tmp_path, changes):
    directory = llava_adapter(tmp_path / "a", **changes)
    write_json(directory / "config.json", {"model_type": "llava_llama", "num_hidden_layers": 3})
    convert(directory, tmp_path / "b", "paddle-lora")
    convert(tmp_path / "b", tmp_path / "c", "peft")
    assert contents_of(tmp_path / "c") == contents_of(directory)
    for place in ("b", "c"):
        assert verify(tmp_path / place).equal
    assert compare(directory, tmp_path / "b").equal
    config = json.loads((tmp_path / "b/lora_config.json").read_text())
    alpha = changes.get("lora_alpha", ALPHA)
    root = math.sqrt(RANK) if changes.get("use_rslora") else RANK
    assert (config["r"], config["lora_alpha"], config["scaling"]) == (RANK, alpha, alpha / root)
    assert config["rslora"] == bool(changes.get("use_rslora"))
    assert config["trainable_bias"] == ("lora" if changes.get("bias") else None)
    assert config["lora_dropout"] == changes.get("lora_dropout", 0.05)
    assert config["base_model_name_or_path"] == "somebody/something"
    (pattern,) = config["target_modules"]
    assert pattern.startswith(r"llama\.layers\.\d+\.(?:")
    assert re.fullmatch(pattern, "llama.layers.2.mlp.down_proj")
    tower = "llama.vision_tower.vision_tower.vision_model.transformer.layers.0.self_attn.q_proj"
    assert not re.fullmatch(pattern, tower)
    assert all(
        any(re.fullmatch(pattern, name) for pattern in config["trainable_modules"])
        for name in ("llama.mm_projector.0.weight", "llama.mm_projector.2.bias")
    )


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"trainable_bias": "all"}])
@pytest.mark.parametrize("weights", ["pdparams", "safetensors"])
def test_from_paddle_to_peft_and_back(tmp_path, changes, weights):
    convert(llava_adapter(tmp_path / "0"), tmp_path / "1", "paddle-lora", Options(weights=weights))
    (tmp_path / "1/unillava_manifest.json").unlink()
    path = tmp_path / "1/lora_config.json"
    own = {"target_modules": ["llama.layer.*q_proj.*"], "merge_weights": True, "new_field": [1]}
    write_json(path, {**json.loads(path.read_text()), **own, **changes})
    convert(tmp_path / "1", tmp_path / "2", "peft", Options(spelling="original"))
    convert(tmp_path / "2", tmp_path / "3", "paddle-lora")
    assert contents_of(tmp_path / "3") == contents_of(tmp_path / "1")
    config = json.loads((tmp_path / "2/adapter_config.json").read_text())
    assert config.get("use_rslora", False) == bool(changes.get("rslora"))
    assert config["bias"] == ("all" if changes.get("trainable_bias") else "none")
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (RANK, ALPHA, "CAUSAL_LM")
    modules = {f"model.layers.{n}.{leaf}" for n in range(3) for leaf in
               ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")}  # fmt: skip
    assert all(re.fullmatch(config["target_modules"], name) for name in modules)
    tower = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    assert not re.fullmatch(config["target_modules"], tower)
    assert (tmp_path / "2/non_lora_trainables.bin").exists()


def test_an_edited_configuration_counts_more_than_what_is_remembered(tmp_path):
    convert(llava_adapter(tmp_path / "a"), tmp_path / "b", "paddle-lora")
    path = tmp_path / "b/lora_config.json"
    write_json(path, {**json.loads(path.read_text()), "lora_alpha": 48, "rslora": True})
    convert(tmp_path / "b", tmp_path / "c", "peft")
    config = json.loads((tmp_path / "c/adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (48, True)


@pytest.mark.parametrize(
    "memory",
    [{}, {"adapter_config": []}, {"beside": "x"}, {"beside": [[]]}, {"config": 3},
     {"spelling": {}}, {"weights": ["bin"]}],
)  # fmt: skip
def test_a_manifest_that_somebody_changed_is_not_believed(tmp_path, memory):
    convert(llava_adapter(tmp_path / "a"), tmp_path / "b", "paddle-lora")
    path = tmp_path / "b/unillava_manifest.json"
    manifest = json.loads(path.read_text())
    kept = {**manifest["memory"]["peft"], **memory} if memory else {}
    write_json(path, {**manifest, "memory": {"peft": kept, "other": {"config": memory}}})
    convert(tmp_path / "b", tmp_path / "c", "peft", Options(spelling="original"))
    assert compare(tmp_path / "a", tmp_path / "c").equal
    settings = json.loads((tmp_path / "c/adapter_config.json").read_text())
    assert isinstance(settings["target_modules"], str)


def test_paddle_scaling_with_pissa_is_one(tmp_path):
    a, b = Numbers().pair(64, 64)
    tensors = {"llama.layers.0.self_attn.q_proj.lora_A": a.T.copy()}
    tensors["llama.layers.0.self_attn.q_proj.lora_B"] = b.T.copy()
    directory = paddle_directory(tmp_path / "a", tensors, pissa=True, rslora=True)
    source = opened(directory)
    assert source.adapter.scaling("language_model.model.layers.0.self_attn.q_proj") == 1
    assert "pissa" in source.notes[0]
    convert(directory, tmp_path / "b", "peft")
    again = opened(tmp_path / "b").adapter
    assert again.scaling("language_model.model.layers.0.self_attn.q_proj") == 1
    convert(tmp_path / "b", tmp_path / "c", "paddle-lora")
    assert json.loads((tmp_path / "c/lora_config.json").read_text())["pissa"] is True


def test_ranks_of_tensor_parallelism_are_put_together(tmp_path):
    numbers = Numbers()
    column, row = numbers.pair(64, 64), numbers.pair(64, 128)
    whole = {"llama.mm_projector.0.weight": numbers(32, 64)}
    q, down = "llama.layers.0.self_attn.q_proj", "llama.layers.0.mlp.down_proj"
    (tmp_path / "a").mkdir()
    for rank in range(2):
        tensors = {
            f"{q}.lora_A": column[0].T.copy(),
            f"{q}.lora_B": np.split(column[1].T, 2, 1)[rank].copy(),
            f"{down}.lora_A": np.split(row[0].T, 2, 0)[rank].copy(),
            f"{down}.lora_B": row[1].T.copy(),
            **whole,
        }
        write_pdparams(tmp_path / f"a/lora_model_state.tp0{rank}.pdparams", tensors)
    fields = {"r": RANK, "lora_alpha": ALPHA, "tensor_parallel_degree": 2}
    write_json(tmp_path / "a/lora_config.json", fields)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    write_json(tmp_path / "a/config.json", {**sizes, "vocab_size": 96})
    source = opened(tmp_path / "a")
    names = [f"language_model.model.layers.0.{n}" for n in ("self_attn.q_proj", "mlp.down_proj")]
    check_pairs(source, dict(zip(names, (column, row), strict=True)))
    convert(tmp_path / "a", tmp_path / "b", "paddle-lora")
    config = json.loads((tmp_path / "b/lora_config.json").read_text())
    assert config["tensor_parallel_degree"] == -1
    assert (tmp_path / "b/lora_model_state.pdparams").exists()


def test_dtype(tmp_path):
    convert(llava_adapter(tmp_path / "a"), tmp_path / "b", "peft", Options(dtype="float16"))
    source = opened(tmp_path / "b")
    tensors = [*source.tensors.values(), *source.adapter.tensors().values()]
    assert {tensor.dtype for tensor in tensors} == {"F16"}


# --- merging -----------------------------------------------------------------------------------


def merged_by_hand(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scaling: float) -> np.ndarray:
    exact = weight.astype(np.float64) + scaling * (b.astype(np.float64) @ a.astype(np.float64))
    return exact.astype(np.float32).astype(weight.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merging(tiny, tmp_path, dtype, rslora):
    base = tiny("llava_next", dtype=dtype)
    before = values(opened(base))
    numbers = Numbers()
    modules = [
        name.removesuffix(".weight") for name in before if re.search("proj.weight|fc1.w", name)
    ]
    pairs = {module: numbers.pair(*before[f"{module}.weight"].shape) for module in modules}
    saved = {"multi_modal_projector.linear_1.bias": numbers(64)}
    directory = peft_directory(tmp_path / "a", {**in_peft(pairs), **saved}, use_rslora=rslora)
    source = opened(directory, base=base)
    assert source.adapter is None and source.path == directory
    assert f"{len(modules)} modules" in source.notes[0] and "1 tensors replaced" in source.notes[0]
    assert source.config == opened(base).config and source.files == opened(base).files
    scaling = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    expected = dict(before)
    for module, (a, b) in pairs.items():
        expected[f"{module}.weight"] = merged_by_hand(before[f"{module}.weight"], a, b, scaling)
    expected["multi_modal_projector.linear_1.bias"] = saved[
        "multi_modal_projector.linear_1.bias"
    ].astype(dtype)
    assert is_equal(values(source), expected)
    manifest = convert(directory, tmp_path / "whole", "hf", Options(base=base))
    assert manifest["source"]["dialect"] == "peft"
    assert is_equal(values(opened(tmp_path / "whole")), expected)
    assert verify(tmp_path / "whole").equal


def test_merging_in_another_dtype_rounds_once(tiny, tmp_path):
    base = tiny("llava_next", dtype="float16")
    name = "language_model.model.layers.0.self_attn.q_proj"
    a, b = Numbers().pair(64, 64)
    directory = peft_directory(tmp_path / "a", in_peft({name: (a, b)}))
    convert(directory, tmp_path / "b", "hf", Options(base=base, dtype="float32"))
    weight = values(opened(base))[f"{name}.weight"].astype(np.float32)
    found = values(opened(tmp_path / "b"))
    assert found[f"{name}.weight"].tobytes() == merged_by_hand(weight, a, b, ALPHA / RANK).tobytes()
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def test_blocks_of_rows_do_not_matter(monkeypatch):
    numbers = Numbers()
    weight, a, b = numbers(37, 20), *numbers.pair(37, 20)
    lengths = numbers(37)
    tensors = [in_memory(array) for array in (weight, a, b, lengths)]
    whole = lora.merged(tensors[0], tuple(tensors[1:3]), 1.25, tensors[3]).read()
    monkeypatch.setattr(blocks, "VALUES", 60)
    assert lora.merged(tensors[0], tuple(tensors[1:3]), 1.25, tensors[3]).read().tobytes() == (
        whole.tobytes()
    )


def in_memory(array: np.ndarray) -> Tensor:
    return Tensor("F32", array.shape, lambda: array, (Place(Path("memory"), 0, "x"),))


def llava_parts(tiny, tmp_path: Path) -> dict[str, Path]:
    """Original LLaVA (its tower inside) from a tiny one, a LLaMA and a CLIP of other values."""
    made = {"target": tmp_path / "target", "language": tmp_path / "language"}
    convert(tiny("llava_next"), made["target"], "original")
    convert(tiny("llava_next", seed=5), made["language"], "llama")
    convert(tiny("llava_next"), tmp_path / "clip", "clip")
    return {**made, "clip": tmp_path / "clip"}


def test_llavas_adapter_on_the_language_model_alone(tiny, tmp_path):
    """As `liuhaotian/llava-v1.5-7b-lora` on Vicuna: projector and configuration come with it."""
    parts = llava_parts(tiny, tmp_path)
    adapter = llava_adapter(tmp_path / "adapter")
    config = json.loads((parts["target"] / "config.json").read_text())
    write_json(adapter / "config.json", {**config, "torch_dtype": "bfloat16"})
    with pytest.raises(CheckpointError, match="--vision"):
        opened(adapter, base=parts["language"])
    source = opened(adapter, base=parts["language"], vision=parts["clip"])
    read_spec(source.config)
    language = values(opened(parts["language"]))
    low = opened(adapter).adapter
    expected = values(opened(tiny("llava_next")))
    rows = len(language["language_model.model.embed_tokens.weight"])
    for name, array in language.items():
        module = name.removesuffix(".weight")
        if module in low.pairs:
            a, b = (tensor.read() for tensor in low.pairs[module])
            array = merged_by_hand(array, a, b, ALPHA / RANK)
        expected[name] = array
    for name, tensor in opened(adapter).tensors.items():
        expected[name] = tensor.read()
    found = values(source)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        found[name] = found[name][:rows]
    assert is_equal(found, expected)
    assert source.config["torch_dtype"] == "float32"
    assert source.config["model_type"] == "llava_next"
    assert source.files["tokenizer.json"]
    convert(adapter, tmp_path / "whole", "original",
            Options(base=parts["language"], vision=parts["clip"]))  # fmt: skip
    again = opened(tmp_path / "whole")
    assert is_equal(values(again), values(source))
    assert again.config == source.config


def test_llavas_adapter_on_a_whole_model_of_another_layout(tiny, tmp_path):
    """The rows that llava-hf has for its tokens are no part of what was trained."""
    parts = llava_parts(tiny, tmp_path)
    adapter = llava_adapter(tmp_path / "adapter")
    config = json.loads((parts["target"] / "config.json").read_text())
    write_json(adapter / "config.json", {**config, "rope_theta": 12345.0})
    on_original = opened(adapter, base=parts["target"])
    on_hf = opened(adapter, base=tiny("llava_next"))
    assert is_equal(values(on_original), values(on_hf))
    before = opened(tiny("llava_next")).config
    text = {**before["text_config"], "rope_theta": 12345.0}
    assert {**on_hf.config["text_config"], "rope_scaling": None} == {**text, "rope_scaling": None}
    assert {**on_hf.config, "text_config": text} == {**before, "text_config": text}


def test_rows_that_a_conversion_added_are_no_part_of_what_was_trained(tiny, tmp_path):
    """An update of the head of the 500 rows that there were; then the rows are added anew."""
    head, words = "language_model.lm_head", 500
    base = replace(opened(tiny("llava_next")), vocabulary=Vocabulary(words, {}))
    a, b = Numbers().pair(words, 64)
    directory = peft_directory(tmp_path / "a", in_peft({"lm_head": (a, b)}))
    source = lora.merge(opened(directory), base, Options())
    weight = base.tensors[f"{head}.weight"].read()[:words]
    merged = merged_by_hand(weight, a, b, ALPHA / RANK)
    found = source.tensors[f"{head}.weight"].read()
    assert found.shape == base.tensors[f"{head}.weight"].shape
    assert found[:words].tobytes() == merged.tobytes()
    rows = np.tile(mean_row(merged, "F32"), (len(found) - words, 1))
    assert len(rows) > 0 and found[words:].tobytes() == rows.tobytes()
    assert source.vocabulary == base.vocabulary and source.config == base.config
    whole = {name: numbers for name, numbers in values(source).items() if name != f"{head}.weight"}
    embedding = "language_model.model.embed_tokens.weight"
    assert whole[embedding][:words].tobytes() == base.tensors[embedding].read()[:words].tobytes()


def test_tokens_that_were_added_before_training(tiny, tmp_path):
    """Embedding and head come with the adapter then, and have more rows than the base's."""
    parts = llava_parts(tiny, tmp_path)
    numbers, words = Numbers(), 643
    saved = {"model.embed_tokens.weight": numbers(words, 64), "lm_head.weight": numbers(words, 64)}
    adapter = llava_adapter(tmp_path / "adapter", saved=saved)
    config = json.loads((parts["target"] / "config.json").read_text())
    write_json(adapter / "config.json", {**config, "vocab_size": words})
    source = opened(adapter, base=parts["language"], vision=parts["clip"])
    assert source.config["text_config"]["vocab_size"] == words
    for name, array in saved.items():
        found = source.tensors[f"language_model.{name}"].read()
        assert found.tobytes() == array.tobytes()
    one = {"lm_head.weight": saved["lm_head.weight"]}
    lone = llava_adapter(tmp_path / "lone", saved=one)
    write_json(lone / "config.json", {**config, "vocab_size": words})
    with pytest.raises(CheckpointError, match="different numbers of rows"):
        opened(lone, base=parts["language"], vision=parts["clip"])


def test_merging_into_moss2(tiny, tmp_path):
    """The update of the joined matrix, computed on the joined matrix."""
    convert(tiny("llava"), tmp_path / "base", "moss2")
    stored = {
        n: t.read() for n, t in torch_file.open_file(tmp_path / "base/pytorch_model.bin").items()
    }
    name = "model.layers.1.attention.wqkv"
    a, b = Numbers().pair(*stored[f"{name}.weight"].shape)
    directory = peft_directory(tmp_path / "a", in_peft({name: (a, b)}))
    (directory / "config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    convert(directory, tmp_path / "merged", "moss2", Options(base=tmp_path / "base"))
    merged = torch_file.open_file(tmp_path / "merged/pytorch_model.bin")
    expected = merged_by_hand(stored[f"{name}.weight"], a, b, ALPHA / RANK)
    stored[f"{name}.weight"] = expected
    assert is_equal({n: t.read() for n, t in merged.items()}, stored)


# --- what is refused ---------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def broken(tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], **changes) -> Path:
    tensors = in_peft({Q: Numbers().pair(64, 64)})
    change(tensors)
    return peft_directory(tmp_path / "adapter", tensors, **changes)


def _drop_b(tensors: dict[str, np.ndarray]) -> None:
    del tensors[f"{Q}.lora_B.weight"]


def _empty(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{Q}.lora_A.weight"] = np.empty((0,), np.float32)


def _other_rank(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{Q}.lora_B.weight"] = np.ones((64, 5), np.float32)


def _convolution(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{Q}.lora_A.weight"] = np.ones((3, 64, 1, 1), np.float32)


def _norm(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.0.input_layernorm"
    tensors |= in_peft({name: Numbers().pair(64, 64)})


def _two_adapters(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{Q}.lora_A.other.weight"] = np.ones((3, 64), np.float32)


def _bias_of_b(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{Q}.lora_B.bias"] = np.ones(64, np.float32)


def _unknown_whole(tensors: dict[str, np.ndarray]) -> None:
    tensors["score.weight"] = np.ones((2, 64), np.float32)


def _twice(tensors: dict[str, np.ndarray]) -> None:
    tensors |= in_peft({"language_model." + Q: Numbers().pair(64, 64)})


def _nothing(tensors: dict[str, np.ndarray]) -> None:
    tensors.clear()
    tensors["model.mm_projector.0.bias"] = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_b, "incomplete"),
        (_empty, "gathered"),
        (_other_rank, "do not belong together"),
        (_convolution, "do not belong together"),
        (_norm, "no low-rank matrix can be added"),
        (_two_adapters, "several adapters"),
        (_bias_of_b, "unknown kind"),
        (_unknown_whole, "no place for"),
        (_twice, "two updates"),
        (_nothing, "no low-rank matrices"),
    ],
)
def test_broken_weights(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        opened(broken(tmp_path, change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 4}, "contradicts"),
        ({"r": 0}, "r is not a rank"),
        ({"r": True}, "r is not a rank"),
        ({"lora_alpha": "7"}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 8}}, "contradicts"),
        ({"rank_pattern": {"q_proj(": 3}}, "cannot be read"),
        ({"alpha_pattern": [1]}, "no object"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "lora_ga"}, "part of the base"),
        *(({field: {"a": 1}}, field) for field in peft.REFUSED),
    ],
)
def test_refused_settings(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        opened(broken(tmp_path, lambda tensors: None, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"loraga": True}, "LoRA-GA"), ({"use_mora": True}, "MoRA"), ({"r": 2}, "contradicts"),
     ({"trainable_bias": "some"}, "trainable_bias"), ({"trainable_bias": []}, "trainable_bias")],
)  # fmt: skip
def test_refused_paddle_settings(tmp_path, changes, message):
    tensors = {f"llama.layers.0.mlp.up_proj.lora_{side}": np.ones(shape, np.float32)
               for side, shape in (("A", (64, RANK)), ("B", (RANK, 128)))}  # fmt: skip
    directory = paddle_directory(tmp_path / "a", tensors)
    opened(directory)
    write_json(directory / "lora_config.json", {"r": RANK, "lora_alpha": ALPHA, **changes})
    with pytest.raises(CheckpointError, match=message):
        opened(directory)


def test_what_paddle_cannot_hold(tmp_path):
    pairs = {Q: Numbers().pair(64, 64), Q.replace("0", "1"): Numbers().pair(64, 64, 5)}
    several = peft_directory(tmp_path / "a", in_peft(pairs), rank_pattern={r"layers\.1\..*": 5})
    with pytest.raises(CheckpointError, match="several ranks"):
        convert(several, tmp_path / "b", "paddle-lora")
    one = {Q: Numbers().pair(64, 64)}
    alphas = peft_directory(tmp_path / "c", in_peft(one), alpha_pattern={"q_proj": 2})
    with pytest.raises(CheckpointError, match="several alphas"):
        convert(alphas, tmp_path / "b", "paddle-lora")
    vector = {f"{Q}.lora_magnitude_vector": np.ones(64, np.float32)}
    dora = peft_directory(tmp_path / "d", {**in_peft(one), **vector}, use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA"):
        convert(dora, tmp_path / "b", "paddle-lora")
    a, b = Numbers().pair(96, 64)
    embedded = {"model.embed_tokens.lora_embedding_A": b.T.copy(),
                "model.embed_tokens.lora_embedding_B": a.T.copy()}  # fmt: skip
    words = peft_directory(tmp_path / "e", embedded)
    check_pairs(opened(words), {"language_model.model.embed_tokens": (a, b)})
    with pytest.raises(CheckpointError, match="embeddings"):
        convert(words, tmp_path / "b", "paddle-lora")
    assert not (tmp_path / "b").exists()


def test_a_merge_in_which_nothing_fits_is_an_error(tiny, tmp_path):
    """The old tool goes on, and saves the base."""
    base = tiny("llava_next")
    deep = peft_directory(tmp_path / "a", in_peft({Q.replace("0", "7"): Numbers().pair(64, 64)}))
    with pytest.raises(CheckpointError, match="1 of the adapter's 1 modules are not in"):
        opened(deep, base=base)
    wide = peft_directory(tmp_path / "b", in_peft({Q: Numbers().pair(96, 96)}))
    with pytest.raises(CheckpointError, match="does not fit"):
        opened(wide, base=base)
    other = tiny("llava_next", text="qwen2")
    head = peft_directory(tmp_path / "c", in_peft({"lm_head": Numbers().pair(64, 64)}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        opened(head, base=other)
    right = llava_adapter(tmp_path / "d")
    with pytest.raises(CheckpointError, match="whole model"):
        opened(right, base=right)


def test_adapters_and_models_are_not_mixed_up(tiny, tmp_path):
    base, adapter = tiny("llava_next"), llava_adapter(tmp_path / "a")
    for name, dialect in registry.dialects().items():
        if dialect.write is None:
            continue
        with pytest.raises(CheckpointError, match="adapter"):
            convert(base if dialect.adapters else adapter, tmp_path / "b", name)
    with pytest.raises(CheckpointError, match="--base"):
        convert(adapter, tmp_path / "b", "hf")
    with pytest.raises(CheckpointError, match="no --base"):
        convert(adapter, tmp_path / "b", "paddle-lora", Options(base=base))


def test_an_intermediate_checkpoint_lacks_the_projector(tiny, tmp_path):
    parts = llava_parts(tiny, tmp_path)
    adapter = llava_adapter(tmp_path / "adapter")
    (adapter / "non_lora_trainables.bin").unlink()
    (adapter / "config.json").write_bytes((parts["target"] / "config.json").read_bytes())
    options = {"base": parts["language"], "vision": parts["clip"]}
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin"):
        opened(adapter, **options)
    with pytest.raises(CheckpointError, match="copy the config"):
        opened(llava_adapter(tmp_path / "bare"), **options)


# --- properties --------------------------------------------------------------------------------

LEAVES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
UNIVERSE = [
    *(f"model.layers.{n}.{leaf}" for n in range(12) for leaf in LEAVES),
    *(f"model.vision.layers.{n}.self_attn.q_proj" for n in range(4)),
    "lm_head", "model.embed_tokens", "model.mm_projector.0", "model.mm_projector.2",
]  # fmt: skip


@given(st.sets(st.sampled_from(UNIVERSE), min_size=1), st.booleans())
def test_patterns_match_exactly(modules, is_known):
    depth = {"model.layers.": 12, "model.vision.layers.": 4} if is_known else {}
    patterns = lora.patterns_of(sorted(modules), depth)
    matched = {name for name in UNIVERSE if any(re.fullmatch(p, name) for p in patterns)}
    assert matched == modules
    assert len(patterns) <= 2 * len(LEAVES) + 8


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
FIELDS = ["r", "lora_alpha", "peft_type", "rank_pattern", "alpha_pattern", "init_lora_weights",
          "use_rslora", "bias", "lora_dropout", "target_modules", "base_model_name_or_path",
          "modules_to_save", *peft.REFUSED]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return llava_adapter(tmp_path_factory.mktemp("fuzz") / "adapter")


@pytest.fixture(scope="module")
def paddle_adapter(adapter, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("fuzz") / "paddle"
    convert(adapter, target, "paddle-lora")
    return target


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_settings_are_read_or_refused(adapter, tmp_path_factory, changes):
    _survives(adapter, "adapter_config.json", changes, tmp_path_factory, "paddle-lora")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "rslora", "pissa", "trainable_bias", "lora_dropout",
                         "tensor_parallel_degree", "target_modules", "loraga", "do_qat"]),
        JSON, min_size=1, max_size=3,
    )
)  # fmt: skip
def test_any_paddle_settings_are_read_or_refused(paddle_adapter, tmp_path_factory, changes):
    _survives(paddle_adapter, "lora_config.json", changes, tmp_path_factory, "peft")


def _survives(
    directory: Path, name: str, changes: Mapping[str, Any], factory: Any, to: str
) -> None:
    copy = factory.mktemp("fuzz")
    for path in directory.iterdir():
        if path.name != "unillava_manifest.json":
            (copy / path.name).symlink_to(path)
    config = {**json.loads((directory / name).read_text()), **changes}
    (copy / name).unlink()
    write_json(copy / name, config)
    try:
        source = open_source(copy)
        registry.named(to).write(replace(source), Options())
    except CheckpointError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([
    "base_model", "model", "language_model", "layers", "0", "self_attn", "q_proj", "lora_A",
    "lora_B", "default", "weight", "bias", "lora_embedding_A", "lora_magnitude_vector",
    "base_layer", "modules_to_save", "original_module", "wqkv", "attention", "output",
]), min_size=1, max_size=9))  # fmt: skip
def test_any_names_are_placed_or_refused(tmp_path_factory, words):
    directory = factory_adapter(tmp_path_factory, ".".join(words))
    try:
        source = open_source(directory)
    except CheckpointError:
        return
    assert Q.replace("model.", "language_model.model.") in source.adapter.pairs


def factory_adapter(factory: Any, extra: str) -> Path:
    tensors = in_peft({Q: Numbers().pair(64, 64)})
    directory = peft_directory(factory.mktemp("names") / "a", tensors)
    named = {f"base_model.model.{name}": array for name, array in tensors.items()}
    save_file(
        {**named, extra: np.ones((3, 64), np.float32)}, directory / "adapter_model.safetensors"
    )
    return directory
