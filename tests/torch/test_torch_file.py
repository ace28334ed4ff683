"""torch's weight files against torch itself: torch.save is read, torch.load reads ours."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weight_convert.errors import CheckpointError
from weight_convert.storage.tensor import NUMPY_DTYPES, Tensor
from weight_convert.storage.torch_file import open_file, open_file_with_rest, write_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SHAPES = [(), (1,), (0,), (3, 4), (2, 0, 3), (2, 3, 4), (2, 1, 2, 3, 1)]


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """`save(value)`: the path of a file that torch has written, in either format."""

    def save(value: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
        path = tmp_path / name
        torch.save(value, path, _use_new_zipfile_serialization=request.param, **options)
        return path

    return save


def random_tensor(code: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits, also NaNs with payloads."""
    array = np.random.default_rng(seed).integers(
        0, 2 if code == "BOOL" else 256, np.dtype(NUMPY_DTYPES[code]).itemsize * int(np.prod(shape))
    )
    return bytes_to_tensor(array.astype(np.uint8).tobytes(), code, shape)


def bytes_to_tensor(raw: bytes, code: str, shape: tuple[int, ...]) -> torch.Tensor:
    if not raw:
        return torch.empty(shape, dtype=DTYPES[code])
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[code]).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in C order."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def check(found: dict[str, Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, their order, dtypes, shapes and bits are the same."""
    assert list(found) == list(expected)
    for name, tensor in found.items():
        array = tensor.read()
        assert tensor.dtype == CODES[expected[name].dtype]
        assert tensor.shape == array.shape == tuple(expected[name].shape)
        assert array.dtype == np.dtype(NUMPY_DTYPES[tensor.dtype])
        assert array.tobytes() == bits(expected[name])


# --- torch.save is read ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_shape(save: Callable[..., Path], protocol: int) -> None:
    tensors = {
        f"{code}.{len(shape)}.{n}": random_tensor(code, shape, n)
        for code in DTYPES
        for n, shape in enumerate(SHAPES)
    }
    check(open_file(save(tensors, pickle_protocol=protocol)), tensors)


def test_views(save: Callable[..., Path]) -> None:
    base = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    half = base.to(torch.bfloat16)
    views = {
        "whole": base,
        "offset": base[1, 2],
        "transposed": base.transpose(0, 3),
        "permuted": base.permute(2, 0, 3, 1),
        "steps": base.reshape(-1)[7::11],
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "expanded": base[:1, :1, :1, :1].expand(2, 3, 4, 5),
        "number": base[1, 2, 3, 4],
        "nothing": base[:0],
        "flat": base.view(-1),
        "windows": base.reshape(-1).unfold(0, 10, 3),
        "half": half.mT,
        "odd bytes": torch.arange(100, dtype=torch.uint8)[3:],
        "diagonal": base[0, 0].T.diagonal(),
    }
    check(open_file(save(views)), views)


def test_tied_weights_share_a_place(save: Callable[..., Path]) -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    path = save(model.state_dict())
    found = open_file(path)
    check(found, model.state_dict())
    assert found["0.weight"].places[0].offset == found["1.weight"].places[0].offset
    assert path.stat().st_size < 2 * 160 + 2000


def test_state_dicts_of_modules(save: Callable[..., Path]) -> None:
    """An OrderedDict with an attribute, parameters, buffers, integers among them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.LayerNorm(4)).to(torch.bfloat16)
    check(open_file(save(model.state_dict())), model.state_dict())
    check(open_file(save(dict(model.named_parameters()))), dict(model.named_parameters()))


def test_parameters_and_tensors_with_attributes(save: Callable[..., Path]) -> None:
    plain = torch.arange(3.0)
    plain.tag = "something"
    parameter = nn.Parameter(torch.arange(4.0))
    parameter.tensor_model_parallel = True
    wanted = torch.arange(5.0, requires_grad=True)
    unsigned = torch.arange(6).to(torch.uint16)
    unsigned.tag = [1]
    tensors = {"plain": plain, "parameter": parameter, "wanted": wanted, "unsigned": unsigned}
    check(open_file(save(tensors)), tensors)


def test_wrapped_state_dicts(save: Callable[..., Path]) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = save(
        {
            "module": OrderedDict(model.state_dict()),
            "optimizer": optimizer.state_dict(),
            "epoch": 3,
            "shapes": [torch.Size([3, 2]), torch.device("cpu"), torch.float32],
        }
    )
    check(open_file(path), model.state_dict())


def test_entries_that_are_no_tensors(save: Callable[..., Path]) -> None:
    path = save({"x": torch.ones(2), "size": torch.Size([1, 2]), "step": 5})
    with pytest.raises(CheckpointError, match=r"'size': tuple of 2, 'step': 5"):
        open_file(path)
    tensors, rest = open_file_with_rest(path)
    check(tensors, {"x": torch.ones(2)})
    assert rest == {"size": (1, 2), "step": 5}


def test_names_of_files(tmp_path: Path) -> None:
    """torch names the folder in the archive after the file, or `archive`."""
    tensors = {"x": torch.arange(3)}
    for name in ("a.bin", "a.b.c.pth", "plain", "größe.bin"):
        torch.save(tensors, tmp_path / name)
        check(open_file(tmp_path / name), tensors)
    with (tmp_path / "stream").open("wb") as file:
        torch.save(tensors, file)
    check(open_file(tmp_path / "stream"), tensors)


def test_files_without_crcs(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(3)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    check(open_file(tmp_path / "x.bin"), tensors)


def test_kinds_that_are_not_carried_are_named(save: Callable[..., Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = {
            "complex64": torch.ones(2, dtype=torch.complex64),
            "float8_e4m3fn": torch.ones(2).to(torch.float8_e4m3fn),
            "sparse": torch.eye(3).to_sparse(),
            "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "meta": torch.empty(2, device="meta"),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "a conjugated or negated view": torch.ones(2, dtype=torch.complex64).conj().imag,
        }
    for kind, tensor in odd.items():
        path = save({"fine": torch.ones(1), "layer.weight": tensor})
        with pytest.raises(CheckpointError, match=rf"'layer.weight'(.|\n)*given: {kind}"):
            open_file(path)


def test_programs_and_whole_modules_are_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"wants to use torch\.nn\.modules\.linear\.Linear"):
        open_file(save(model))
    torch.jit.script(model).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"code/.* is compressed"):
        open_file(tmp_path / "script.pt")


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_nothing_is_executed(save: Callable[..., Path], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = save({"x": torch.ones(2), "y": Evil(marker)})
    with pytest.raises(CheckpointError, match="nothing was executed"):
        open_file(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


# --- torch.load reads ours -------------------------------------------------------------------


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    code = draw(st.sampled_from(list(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=5)))
    return random_tensor(code, shape, draw(st.integers(0, 2**32 - 1)))


def write(path: Path, state: dict[str, torch.Tensor]) -> None:
    table = {name: (CODES[t.dtype], tuple(t.shape)) for name, t in state.items()}
    arrays = (
        (name, np.frombuffer(bits(t), NUMPY_DTYPES[CODES[t.dtype]]).reshape(t.shape))
        for name, t in state.items()
    )
    write_file(path, table, arrays)


# Texts of one character are shared with the keys of storages in CPython; the names "cpu" and
# "storage" would be shared, or not, by chance.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name not in ("cpu", "storage")
)


@settings(max_examples=80, deadline=None)
@given(state=st.dictionaries(NAMES, tensors(), max_size=8))
def test_torch_loads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("torch") / "pytorch_model.bin"
    write(path, state)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(state)
        for name, tensor in loaded.items():
            assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)
            assert bits(tensor) == bits(state[name])


FINGERPRINT = ".data/serialization_id"


def without_fingerprint(path: Path) -> bytes:
    """A file without what depends on the C++ library that torch was built with: the first half of
    the fingerprint, and its CRC behind it and in the table."""
    data = bytearray(path.read_bytes())
    entry = zipfile.ZipFile(path).infolist()[-1]
    assert entry.filename.endswith(FINGERPRINT)
    text = data.index(b"PK\x07\x08", entry.header_offset) - 40
    assert data[text : text + 40].isdigit()
    table = data.rindex(b"PK\x01\x02")
    for begin, end in ((text, text + 20), (text + 44, text + 48), (table + 16, table + 20)):
        data[begin:end] = bytes(end - begin)
    return bytes(data)


def assert_same_files(tmp_path: Path, state: dict[str, torch.Tensor], name: str) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir(exist_ok=True)
    torch.save(state, theirs / name)
    write(ours / name, state)
    assert without_fingerprint(ours / name) == without_fingerprint(theirs / name)


@settings(max_examples=80, deadline=None)
@given(state=st.dictionaries(NAMES, tensors(), max_size=8))
def test_files_are_byte_for_byte_torchs(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]
) -> None:
    assert_same_files(tmp_path_factory.mktemp("torch"), state, "pytorch_model.bin")


@pytest.mark.parametrize("count", [0, 1, 2, 255, 999, 1000, 1001, 2000, 2001])
def test_also_with_many_tensors(tmp_path: Path, count: int) -> None:
    state = {f"layers.{n}.weight": torch.full((n % 3,), n % 100) for n in range(count)}
    assert_same_files(tmp_path, state, "pytorch_model-00001-of-00002.bin")


@pytest.mark.parametrize("name", ["a.b.pth", "plain", "größe.bin"])
def test_also_with_other_file_names(tmp_path: Path, name: str) -> None:
    assert_same_files(tmp_path, {"x": torch.ones(70_000), "y": torch.ones(300, 300)}, name)


def test_damage_to_a_file_of_torchs_is_noticed(save: Callable[..., Path], tmp_path: Path) -> None:
    data = save({"x": torch.arange(3.0), "y": torch.ones(2, 2).T}).read_bytes()
    path = tmp_path / "cut.bin"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            open_file(path)


def test_old_and_new_formats_say_the_same(tmp_path: Path) -> None:
    """The same object, three times: both formats of torch, and ours."""
    state = {"w": torch.randn(5, 4).mT, "b": torch.randn(3).to(torch.bfloat16)}
    torch.save(state, tmp_path / "new.bin")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    write(tmp_path / "ours.bin", state)
    for name in ("new.bin", "old.bin", "ours.bin"):
        check(open_file(tmp_path / name), state)
    buffer = io.BytesIO((tmp_path / "ours.bin").read_bytes())
    assert torch.equal(torch.load(buffer, weights_only=True)["w"], state["w"])
