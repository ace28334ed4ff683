"""Paddle is the judge: it reads the adapters that we write, and multiplies for itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from weight_convert.convert import convert
from weight_convert.opening import open_source
from weight_convert.source import Options

RANK, ALPHA = 4, 6
LEAVES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def adapter(tiny, tmp_path) -> Path:
    """A PEFT adapter of a tiny LLaVA, with its projector."""
    shapes = {n: t.shape for n, t in open_source(tiny("llava_next")).tensors.items()}
    numbers = np.random.default_rng(0)
    tensors = {}
    for n in range(3):
        for leaf in LEAVES:
            out, inner = shapes[f"language_model.model.layers.{n}.{leaf}.weight"]
            name = f"base_model.model.model.layers.{n}.{leaf}"
            tensors[f"{name}.lora_A.weight"] = numbers.normal(0, 0.3, (RANK, inner))
            tensors[f"{name}.lora_B.weight"] = numbers.normal(0, 0.3, (out, RANK))
    for k in (1, 2):
        for kind in ("weight", "bias"):
            shape = shapes[f"multi_modal_projector.linear_{k}.{kind}"]
            name = f"base_model.model.model.mm_projector.{2 * k - 2}.{kind}"
            tensors[name] = numbers.normal(0, 0.3, shape)
    directory = tmp_path / "peft"
    directory.mkdir()
    save_file(
        {name: array.astype(np.float32) for name, array in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def load(directory: Path, name: str) -> dict[str, paddle.Tensor]:
    return paddle.load(str(directory / name))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_paddle_reads_what_we_write(adapter, tmp_path, dtype):
    target = tmp_path / "paddle"
    convert(adapter, target, "paddle-lora", Options(dtype=dtype))
    loaded = load(target, "lora_model_state.pdparams")
    config = json.loads((target / "lora_config.json").read_text())
    assert config["dtype"] == dtype
    source = open_source(adapter)
    for module, pair in source.adapter.pairs.items():
        name = module.replace("language_model.model.", "llama.")
        for side, tensor in zip("AB", pair, strict=True):
            expected = paddle.to_tensor(tensor.read().T.copy()).astype(dtype)
            found = loaded.pop(f"{name}.lora_{side}")
            assert found.dtype == expected.dtype
            assert paddle.equal_all(found.astype("float32"), expected.astype("float32"))
    assert {tuple(v.shape) for n, v in loaded.items() if n.endswith("weight")} == {
        (32, 64), (64, 64)
    }  # fmt: skip
    assert len(loaded) == 4


@pytest.mark.parametrize("rslora", [False, True])
def test_the_sum_is_paddles(tiny, adapter, tmp_path, rslora):
    """The adapter as PaddleNLP's layers hold it, multiplied by Paddle in float64."""
    convert(tiny("llava_next"), tmp_path / "base", "paddlemix")
    convert(adapter, tmp_path / "lora", "paddle-lora")
    path = tmp_path / "lora/lora_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rslora": rslora}))
    options = Options(base=tmp_path / "base")
    manifest = convert(tmp_path / "lora", tmp_path / "merged", "paddlemix", options)
    assert manifest["source"]["dialect"] == "paddle-lora"
    low = load(tmp_path / "lora", "lora_model_state.pdparams")
    base, merged = (load(tmp_path / n, "model_state.pdparams") for n in ("base", "merged"))
    assert base.keys() == merged.keys()
    scaling = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    changed = 0
    for name, weight in base.items():
        module, expected = name.removesuffix(".weight"), low.get(name, weight)
        if f"{module}.lora_A" in low:
            a, b = (low[f"{module}.lora_{side}"].astype("float64") for side in "AB")
            expected = (weight.astype("float64") + scaling * (a @ b)).astype("float32")
            changed += 1
        assert paddle.equal_all(merged[name], expected), name
    assert changed == 3 * len(LEAVES)
