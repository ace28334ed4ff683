"""MindSpore judges MindFormers' layout and our own: it reads what we write, we read what it saves.

Names and arrays come from tests/mindformers_layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from tests import mindformers_layout as layout
from tests.mindformers_layout import Arrays, assert_equal
from unillava.checkpoint import open_checkpoint
from unillava.loading import load_network
from weight_convert.convert import convert, open_source
from weight_convert.source import Options
from weight_convert.verify import compare

Tiny = Callable[..., Path]
DTYPES = {"float32": ms.float32, "float16": ms.float16, "uint16": ms.bfloat16}


def hub_arrays(directory: Path, options: Options | None = None) -> Arrays:
    return {n: np.asarray(t.read()) for n, t in open_source(directory, options).tensors.items()}


def to_mindspore(array: np.ndarray) -> ms.Tensor:
    """uint16 is bfloat16, which NumPy lacks."""
    if array.dtype != np.uint16:
        return ms.Tensor(array)
    return ms.Tensor((array.astype(np.uint32) << 16).view(np.float32), ms.bfloat16)


def from_mindspore(parameters: Mapping[str, ms.Parameter]) -> Arrays:
    found = {}
    for name, parameter in parameters.items():
        bits = np.frombuffer(parameter.data.get_bytes(), np.uint8)
        code = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: np.uint16}
        found[name] = bits.view(code[parameter.dtype]).reshape(parameter.shape)
    return found


def save(path: Path, arrays: Arrays, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    named = [{"name": n, "data": to_mindspore(array)} for n, array in arrays.items()]
    ms.save_checkpoint(named, str(path), **options)
    return path


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mindspore_loads_what_we_write(tiny: Tiny, tmp_path: Path, family: str, dtype: str) -> None:
    source = tiny(family, dtype=dtype)
    expected = layout.llava(hub_arrays(source))
    assert "vision_encoder.ln_post.gamma" in expected  # unused, and there all the same
    assert "vision_encoder.transformer.resblocks.2.ln_1.beta" in expected
    for form in ("ckpt", "safetensors"):
        file = tmp_path / f"m.{form}"
        convert(source, file, "mindformers")
        assert_equal(from_mindspore(ms.load_checkpoint(str(file), format=form)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_read_what_mindspore_saves(tiny: Tiny, tmp_path: Path, dtype: str) -> None:
    source = tiny("llava_next", dtype=dtype)
    hub = hub_arrays(source)
    arrays = layout.llava(hub)
    state = {f"adam_m.{name}": array for name, array in arrays.items()}
    counters = {"epoch_num": 1, "step_num": 7, "loss_scale": 1.0, "global_batch_size": 8}
    save(tmp_path / "m.ckpt", arrays | state, append_dict=counters, crc_check=True)
    opened = open_source(tmp_path / "m.ckpt", Options(base=source))
    assert set(opened.dropped) == {*state, *counters}
    assert_equal({n: t.read() for n, t in opened.tensors.items()}, hub)
    save(tmp_path / "m.safetensors", arrays, format="safetensors")
    assert_equal(hub_arrays(tmp_path / "m.safetensors", Options(base=source)), hub)


def test_partial_files_that_mindspore_saved(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava")
    hub = {n: a for n, a in hub_arrays(source).items() if not n.startswith("multi_modal")}
    arrays = layout.llava(hub)
    for prefix in ("vision_encoder", "language_model"):
        part = {n: a for n, a in arrays.items() if n.startswith(prefix)}
        save(tmp_path / "m" / f"{prefix}.ckpt", part)
    assert_equal(hub_arrays(tmp_path / "m", Options(base=source)), hub)


def test_fused_language_model(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava", "llama3")
    hub = {n: a for n, a in hub_arrays(source).items() if n.startswith("language_model.")}
    arrays = layout.fused(layout.llama(hub), 4, 2)
    save(tmp_path / "llama.ckpt", arrays)
    assert_equal(hub_arrays(tmp_path / "llama.ckpt", Options(base=source)), hub)
    convert(source, tmp_path / "out.ckpt", "mindformers-llama", Options(qkv_concat=True))
    assert_equal(from_mindspore(ms.load_checkpoint(str(tmp_path / "out.ckpt"))), arrays)


# --- ranks ---------------------------------------------------------------------------------------


def save_strategy(path: Path, arrays: Arrays) -> str:
    """Four ranks, 2 x 2: matrices are cut by rows and columns, the optimizer shards vectors."""
    strategy = ParallelStrategyMap(current_stage=0)
    for name, array in arrays.items():
        layouts = strategy.parallel_layout_item.add(param_name=name).parallel_layouts
        even = array.ndim == 2 and not any(size % 2 for size in array.shape)
        axes = [1, 0] if even else [-1] * array.ndim
        sharded = array.ndim == 1
        layouts.dev_matrix.add(dim=[2, 2])
        layouts.tensor_map.add(dim=axes)
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = 0
        layouts.opt_weight_shard_step = 1 if sharded else 0
        layouts.opt_weight_shard_size = 4 if sharded else 0
    path.parent.mkdir(parents=True)
    path.write_bytes(strategy.SerializeToString())
    return str(path)


def test_ranks_that_mindspore_cut(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next", dtype="bfloat16")
    arrays = layout.llava(hub_arrays(source))
    output = tmp_path / "output"
    strategy = save_strategy(output / "strategy" / "ckpt_strategy_rank_0.ckpt", arrays)
    save(tmp_path / "src" / "rank_0" / "m.ckpt", arrays)
    network = output / "checkpoint_network"
    ms.transform_checkpoints(str(tmp_path / "src"), str(network), "llava_", None, strategy)
    assert len(list(network.iterdir())) == 4
    convert(output, tmp_path / "hub", "hf", Options(base=source))
    assert compare(tmp_path / "hub", source).equal


# --- our own names -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["safetensors", "ckpt"])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_native_cells_load_it(
    tiny: Tiny, tmp_path: Path, weights: str, text: str, runtime: object
) -> None:
    source = tiny("llava_next", text)
    convert(source, tmp_path / "m", "mindspore", Options(weights=weights))
    cell = load_network(open_checkpoint(tmp_path / "m"))
    names = [parameter.name for parameter in cell.get_parameters()]
    file = str(tmp_path / "m" / f"model.{weights}")
    loaded = ms.load_checkpoint(file, format=weights)
    assert_equal(from_mindspore(loaded), hub_arrays(source))
    for parameter in cell.get_parameters():
        parameter.set_data(ms.ops.zeros_like(parameter))
    unused = ms.load_param_into_net(cell, loaded, strict_load=True)
    assert unused == ([], []) and set(names) == set(loaded)
    assert_equal(from_mindspore({p.name: p for p in cell.get_parameters()}), hub_arrays(source))


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_what_a_native_cell_saves(tiny: Tiny, tmp_path: Path, form: str, runtime: object) -> None:
    source = tiny("llava")
    cell = load_network(open_checkpoint(source))
    file = tmp_path / f"m.{form}"
    ms.save_checkpoint(cell, str(file), format=form)
    opened = open_source(file, Options(base=source))
    assert opened.dialect == "mindspore"
    assert compare(source, file, Options(base=source)).equal


def test_files_are_those_of_mindspore(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava", dtype="bfloat16")
    hub = hub_arrays(source)
    convert(source, tmp_path / "ours.safetensors", "mindspore")
    save(tmp_path / "theirs.safetensors", hub, format="safetensors")
    ours, theirs = (tmp_path / f"{n}.safetensors" for n in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    convert(source, tmp_path / "ours.ckpt", "mindspore")
    order = open_source(tmp_path / "ours.ckpt").tensors
    save(tmp_path / "theirs.ckpt", {name: hub[name] for name in order})
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()
