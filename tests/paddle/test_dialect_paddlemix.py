"""PaddleMIX and PaddleNLP checkpoints against Paddle itself: its files, and layers of its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import paddle
from paddle import nn

from tests import paddle_layout as layout
from weight_convert.convert import convert, open_source
from weight_convert.source import Options

Tiny = Callable[..., Path]
FILE = "model_state.pdparams"


def expected_arrays(source: Path) -> layout.Arrays:
    """A tiny LLaVA in Paddle's layout, by the tests' own functions."""
    arrays = layout.read_all_safetensors(source)
    text = json.loads((source / "config.json").read_text())["text_config"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    return {
        **layout.language(arrays, heads, kv_heads),
        **layout.vision(arrays),
        **layout.projector(arrays),
        **layout.newline(arrays),
    }


def bits(tensor: paddle.Tensor) -> np.ndarray:
    """A tensor's values; bfloat16 as uint16."""
    if tensor.dtype == paddle.bfloat16:
        return tensor.view("uint16").numpy()
    return tensor.numpy()


def as_tensor(array: np.ndarray) -> paddle.Tensor:
    """uint16 holds bfloat16."""
    tensor = paddle.to_tensor(np.ascontiguousarray(array))
    return tensor.view("bfloat16") if array.dtype == np.uint16 else tensor


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_paddle_loads_what_is_written(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    source = tiny("llava_next", "llama3", dtype=dtype)
    convert(source, tmp_path / "p", "paddlemix")
    state, expected = paddle.load(str(tmp_path / "p" / FILE)), expected_arrays(source)
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert state[name].dtype == getattr(paddle, dtype), name
        assert np.array_equal(bits(state[name]), array), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_paddle_saves_is_read(tiny: Tiny, tmp_path: Path, dtype: str, protocol: int) -> None:
    source = tiny("llava_next", "llama3", dtype=dtype)
    state = {name: as_tensor(array) for name, array in expected_arrays(source).items()}
    path = str(tmp_path / "checkpoint.pdparams")
    paddle.save(state, path, protocol=protocol)
    opened = open_source(path, Options(base=source))
    canonical = layout.read_all_safetensors(source)
    assert opened.dialect == "paddlemix" and opened.tensors.keys() == canonical.keys()
    for name, array in canonical.items():
        assert np.array_equal(opened.tensors[name].read(), array), name


def test_safetensors_of_paddle_are_read(tiny: Tiny, tmp_path: Path) -> None:
    """paddle.save writes no metadata, and the tag BF16; PaddleNLP writes U16."""
    source = tiny("llava", dtype="bfloat16")
    convert(source, tmp_path / "p", "paddlenlp")
    (tmp_path / "p" / FILE).unlink()
    canonical = layout.read_all_safetensors(source)
    state = {name: as_tensor(array) for name, array in layout.language(canonical, 4, 4).items()}
    paddle.save(state, str(tmp_path / "p" / "model.safetensors"), safetensors=True)
    opened = open_source(tmp_path / "p")
    assert opened.parts == {"language"} and opened.dialect == "paddlenlp"
    for name, tensor in opened.tensors.items():
        assert tensor.dtype == "BF16" and np.array_equal(tensor.read(), canonical[name]), name


class Tower(nn.Layer):
    """The parameters of PaddleNLP's CLIPVisionModel."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        width, patch = vision["hidden_size"], vision["patch_size"]
        inner = nn.Layer()
        inner.class_embedding = inner.create_parameter([width])
        inner.conv1 = nn.Conv2D(3, width, patch, patch, bias_attr=False)
        patches = (vision["image_size"] // patch) ** 2
        inner.positional_embedding = nn.Embedding(patches + 1, width)
        inner.ln_pre, inner.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        block = nn.TransformerEncoderLayer(
            width, vision["num_attention_heads"], vision["intermediate_size"]
        )
        inner.transformer = nn.TransformerEncoder(block, vision["num_hidden_layers"])
        self.vision_model = inner


def test_layers_of_paddle_take_what_is_written(tiny: Tiny, tmp_path: Path) -> None:
    """CLIP and the projector as PaddleMIX builds them: every name, every shape."""
    source = tiny("llava_next")
    convert(source, tmp_path / "p", "paddlemix")
    state = paddle.load(str(tmp_path / "p" / FILE))
    config = json.loads((source / "config.json").read_text())
    width, hidden = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    for prefix, layer in (
        ("llama.vision_tower.vision_tower.", Tower(config["vision_config"])),
        ("llama.mm_projector.", projector),
    ):
        own = {n[len(prefix) :]: tensor for n, tensor in state.items() if n.startswith(prefix)}
        wanted = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        assert {name: tuple(tensor.shape) for name, tensor in own.items()} == wanted
        assert layer.set_state_dict(own) == ([], [])
