"""The .pdparams reader and writer against paddle.save and paddle.load, both ways."""

from __future__ import annotations

import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import paddle
from paddle.framework import io, io_utils

from weight_convert.errors import CheckpointError
from weight_convert.storage import pdparams
from weight_convert.storage.pdparams import (
    PARAMETER_NAMES,
    SLICES,
    UNKNOWN_TO_PADDLE,
    open_file,
    read_parameter_names,
    write_file,
)
from weight_convert.storage.tensor import NUMPY_DTYPES

PROTOCOLS = (2, 3, 4)
DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}
SHAPES = [(), (0,), (1,), (5,), (3, 0), (3, 4), (2, 3, 4), (70, 300)]


def random_array(code: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    dtype = np.dtype(NUMPY_DTYPES[code])
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, size, np.uint8)
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape)


def all_arrays() -> dict[str, tuple[str, np.ndarray]]:
    """name -> (dtype code, array): every dtype in every shape, under names in several scripts."""
    return {
        f"层.{code}.poids_{number}": (code, random_array(code, shape, number))
        for code in DTYPES
        for number, shape in enumerate(SHAPES)
    }


def tensor_of(code: str, array: np.ndarray) -> paddle.Tensor:
    tensor = paddle.to_tensor(array)
    assert str(tensor.dtype) == f"paddle.{DTYPES[code]}"
    return tensor


def bytes_of(tensor: paddle.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def check_equal(path: Path, expected: dict[str, tuple[str, np.ndarray]]) -> None:
    read = open_file(path)
    assert list(read) == list(expected)
    for name, (code, array) in expected.items():
        assert (read[name].dtype, read[name].shape) == (code, array.shape), name
        assert read[name].read().tobytes() == array.tobytes(), name


def test_every_dtype_of_ours_is_paddles() -> None:
    assert set(DTYPES) == set(NUMPY_DTYPES) - set(UNKNOWN_TO_PADDLE)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_both_directions_and_byte_for_byte(tmp_path: Path, protocol: int) -> None:
    arrays = all_arrays()
    state = {name: tensor_of(code, array) for name, (code, array) in arrays.items()}
    theirs, ours = tmp_path / "theirs.pdparams", tmp_path / "ours.pdparams"
    paddle.save(state, str(theirs), protocol=protocol)
    check_equal(theirs, arrays)
    names = read_parameter_names(theirs)
    assert names == {name: tensor.name for name, tensor in state.items()}

    table = {name: (code, array.shape) for name, (code, array) in arrays.items()}
    stream = ((name, tensor.read()) for name, tensor in open_file(theirs).items())
    write_file(ours, table, stream, protocol=protocol, parameter_names=names)
    assert ours.read_bytes() == theirs.read_bytes()

    tensors, raw = paddle.load(str(ours)), paddle.load(str(ours), return_numpy=True)
    assert list(tensors) == list(raw) == list(arrays)
    for name, (code, array) in arrays.items():
        assert str(tensors[name].dtype) == f"paddle.{DTYPES[code]}"
        assert tensors[name].name == names[name]
        assert tuple(tensors[name].shape) == raw[name].shape == array.shape
        assert bytes_of(tensors[name]) == raw[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_layer_takes_what_we_write(tmp_path: Path, protocol: int) -> None:
    def build() -> paddle.nn.Layer:
        return paddle.nn.Sequential(
            paddle.nn.Embedding(7, 4), paddle.nn.Linear(4, 6), paddle.nn.LayerNorm(6)
        )

    layer, other = build(), build()
    arrays = {name: ("F32", value.numpy()) for name, value in layer.state_dict().items()}
    path = tmp_path / "model_state.pdparams"
    table = {name: (code, array.shape) for name, (code, array) in arrays.items()}
    write_file(path, table, ((n, a) for n, (_, a) in arrays.items()), protocol=protocol)
    assert other.set_state_dict(paddle.load(str(path))) == ([], [])
    ids = paddle.to_tensor([[1, 5, 6]])
    assert bytes_of(other(ids)) == bytes_of(layer(ids))
    paddle.save(layer.state_dict(), str(path), protocol=protocol)
    check_equal(path, arrays)


def test_tens_of_thousands_of_bytes_and_entries(tmp_path: Path) -> None:
    """More than one batch of entries and many frames."""
    state = {
        f"blocks.{number}.weight": paddle.full([number % 40 * 20], number, "int32")
        for number in range(2001)
    }
    theirs, ours = tmp_path / "theirs.pdparams", tmp_path / "ours.pdparams"
    paddle.save(state, str(theirs))
    read = open_file(theirs)
    table = {name: (tensor.dtype, tensor.shape) for name, tensor in read.items()}
    names = read_parameter_names(theirs)
    stream = ((name, tensor.read()) for name, tensor in read.items())
    write_file(ours, table, stream, parameter_names=names)
    assert ours.read_bytes() == theirs.read_bytes()


def cut_by_paddle(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Let Paddle's own code, and ours, cut arrays of more than `limit` bytes."""
    source = inspect.getsource(io_utils._unpack_saved_dict)
    assert source.count("(2**30 - 1)") == 1
    scope = dict(vars(io_utils))
    exec(source.replace("(2**30 - 1)", f"({limit})"), scope)
    monkeypatch.setattr(io, "_unpack_saved_dict", scope["_unpack_saved_dict"])
    monkeypatch.setattr(pdparams, "MAX_SLICE_BYTES", limit)


@pytest.mark.parametrize("protocol", (2, 3))
@pytest.mark.parametrize("limit", (63, 5000))
def test_arrays_that_paddle_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, limit: int
) -> None:
    cut_by_paddle(monkeypatch, limit)
    arrays = all_arrays()
    state = {name: tensor_of(code, array) for name, (code, array) in arrays.items()}
    theirs, ours = tmp_path / "theirs.pdparams", tmp_path / "ours.pdparams"
    paddle.save(state, str(theirs), protocol=protocol)
    big = {name for name, (_, array) in arrays.items() if array.nbytes > limit}
    read = open_file(theirs)
    assert {name for name, tensor in read.items() if len(tensor.places) > 1} == big and big
    # Paddle puts them last.
    check_equal(theirs, {n: arrays[n] for n in sorted(arrays, key=lambda n: n in big)})

    table = {name: (code, array.shape) for name, (code, array) in arrays.items()}
    stream = ((name, read[name].read()) for name in arrays)
    write_file(ours, table, stream, protocol=protocol)
    raw, tensors = paddle.load(str(ours), return_numpy=True), paddle.load(str(ours))
    assert set(raw) == set(tensors) == set(arrays)
    for name, (_, array) in arrays.items():
        assert raw[name].shape == array.shape
        assert raw[name].tobytes() == bytes_of(tensors[name]) == array.tobytes()
    parts = [name for name in _stored(ours) if "@@." in name]
    assert sorted(parts) == sorted(name for name in _stored(theirs) if "@@." in name)


def _stored(path: Path) -> dict[str, Any]:
    stored = pickle.loads(path.read_bytes(), encoding="latin1")
    assert stored[SLICES] and stored[PARAMETER_NAMES]
    return stored


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_no_plain_state_dict(tmp_path: Path, protocol: int) -> None:
    """`paddle.save` pickles other objects as (name, array), and arrays as they are."""
    path = tmp_path / "a.pdparams"
    tensor, array = paddle.rand([3, 2]), np.arange(3, dtype="<i8")
    paddle.save({"t": tensor, "a": array}, str(path), protocol=protocol)
    check_equal(path, {"t": ("F32", tensor.numpy()), "a": ("I64", array)})
    refused = {
        "'epoch' is not a tensor": {"t": tensor, "epoch": 3},
        "'model' is not a tensor": {"model": {"t": tensor}},
        "does not hold a table": tensor,
        "list of 1": [tensor],
        # The tensor of a static graph is pickled as a call of eval.
        "eval": {"t": tensor.value().get_tensor(), "epoch": 3},
    }
    for words, value in refused.items():
        paddle.save(value, str(path), protocol=protocol)
        with pytest.raises(CheckpointError, match=words):
            open_file(path)


def test_optimizers_and_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pdopt"
    layer = paddle.nn.Linear(2, 2)
    schedule = paddle.optimizer.lr.NoamDecay(16, 10)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=layer.parameters())
    layer(paddle.rand([1, 2])).sum().backward()
    optimizer.step()
    paddle.save(optimizer.state_dict(), str(path))
    with pytest.raises(CheckpointError, match="'LR_Scheduler' is not a tensor"):
        open_file(path)
    tensor = paddle.rand([4, 4])
    paddle.save(tensor.value().get_tensor(), str(path), use_binary_format=True)
    with pytest.raises(CheckpointError):
        open_file(path)


def test_float8_is_int8_as_paddle_itself_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    tensor = paddle.to_tensor([1.0, -2.0, 0.5]).astype("float8_e4m3fn")
    paddle.save({"w": tensor}, str(path))
    check_equal(path, {"w": ("I8", paddle.load(str(path))["w"].numpy())})
