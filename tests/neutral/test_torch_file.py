"""torch's weight files without torch: structure, views, damage and malice.

Files come from our writer, or are put together here with Python's own pickler and zipfile, so that
they can say what torch would never write. tests/torch compares with torch itself.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_convert.errors import CheckpointError
from weight_convert.storage.tensor import NUMPY_DTYPES, Tensor
from weight_convert.storage.torch_file import open_file, open_file_with_rest, write_file
from weight_convert.storage.unpickling import LazyBytes, describe

# --- files that torch would not write --------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """Pickles as a global."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    function: Name
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Stored:
    """Pickles as the persistent id of a storage; `data` is what the file holds."""

    key: str
    data: bytes = b""
    kind: Name = Name("torch", "FloatStorage")
    count: Any = None
    device: str = "cpu"
    extra: tuple[Any, ...] = ()

    @property
    def size(self) -> int:
        return {"DoubleStorage": 8, "HalfStorage": 2, "ByteStorage": 1}.get(self.kind.name, 4)

    def name(self, legacy: bool) -> tuple[Any, ...]:
        count = len(self.data) // self.size if self.count is None else self.count
        extra = self.extra or ((None,) if legacy else ())
        return ("storage", self.kind, self.key, self.device, count, *extra)


class TorchPickler(pickle._Pickler):
    """Python's pickler, for the stand-ins above."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)
    legacy = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stored: dict[str, Stored] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Stored):
            return None
        self.stored.setdefault(value.key, value)
        return value.name(self.legacy)

    def save_name(self, value: Name) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    def save_call(self, value: Call) -> None:
        self.save(value.function)
        self.save(value.arguments)
        self.write(pickle.REDUCE)

    dispatch[Name] = save_name
    dispatch[Call] = save_call


def archive(value: Any, *, more: Mapping[str, bytes] = {}, program: bytes | None = None) -> bytes:
    """A file in the ZIP format."""
    file, buffer = io.BytesIO(), io.BytesIO()
    pickler = TorchPickler(buffer, 2)
    pickler.dump(value)
    contents = {"data.pkl": buffer.getvalue() if program is None else program, "version": b"3\n"}
    contents |= {f"data/{key}": stored.data for key, stored in pickler.stored.items()}
    with zipfile.ZipFile(file, "w") as target:
        for name, data in (contents | more).items():
            target.writestr(f"x/{name}", data)
    return file.getvalue()


def legacy(
    value: Any,
    *,
    magic: Any = 0x1950A86A20F9469CFC6C,
    version: Any = 1001,
    keys: Any = None,
    program: bytes | None = None,
) -> bytes:
    """A file in the format of before 1.6."""
    buffer = io.BytesIO()
    pickler = TorchPickler(buffer, 2)
    pickler.legacy = True
    pickler.dump(value)
    stored = dict(sorted(pickler.stored.items()))
    keys = list(stored) if keys is None else keys
    head = [pickle.dumps(item, 2) for item in (magic, version, {"little_endian": True})]
    parts = [*head, buffer.getvalue() if program is None else program, pickle.dumps(keys, 2)]
    for item in stored.values():
        parts += [struct.pack("<q", len(item.data) // item.size), item.data]
    return b"".join(parts)


FORMATS = {"archive": archive, "legacy": legacy}
FLOATS = np.arange(24, dtype="<f4")
STORED = Stored("0", FLOATS.tobytes())
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")


def view(
    offset: Any = 0, shape: Any = (24,), strides: Any = (1,), stored: Any = STORED, **options: Any
) -> Call:
    function = options.get("function", REBUILD)
    tail = options.get("tail", (False, OrderedDict()))
    return Call(function, (stored, offset, shape, strides, *tail))


@pytest.fixture(params=FORMATS)
def build(request: pytest.FixtureRequest) -> Callable[..., bytes]:
    return FORMATS[request.param]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.bin"


def read(path: Path, data: bytes) -> dict[str, np.ndarray]:
    path.write_bytes(data)
    return {name: tensor.read() for name, tensor in open_file(path).items()}


# --- what is written is read -----------------------------------------------------------------

Arrays = dict[str, tuple[str, np.ndarray]]


@st.composite
def arrays(draw: Any) -> tuple[str, np.ndarray]:
    code = draw(st.sampled_from(list(NUMPY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=5)))
    dtype = np.dtype(NUMPY_DTYPES[code])
    size = int(np.prod(shape)) * dtype.itemsize
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = chance.integers(0, 2 if code == "BOOL" else 256, size, np.uint8)
    return code, raw.view(dtype).reshape(shape)


def write(path: Path, tensors: Arrays) -> None:
    table = {name: (code, array.shape) for name, (code, array) in tensors.items()}
    write_file(path, table, ((name, array) for name, (_, array) in tensors.items()))


def same(tensor: Tensor, code: str, array: np.ndarray) -> bool:
    found = tensor.read()
    return (
        (tensor.dtype, tensor.shape) == (code, array.shape)
        and (found.dtype, found.shape) == (array.dtype, array.shape)
        and found.tobytes() == array.tobytes()
        and found.flags.c_contiguous
        and found.flags.aligned
    )


@settings(max_examples=100, deadline=None)
@given(tensors=st.dictionaries(st.text(max_size=12), arrays(), max_size=8))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, tensors: Arrays) -> None:
    path = tmp_path_factory.mktemp("torch") / "pytorch_model.bin"
    write(path, tensors)
    found = open_file(path)
    assert list(found) == list(tensors)
    assert all(same(found[name], *tensors[name]) for name in tensors)
    assert zipfile.ZipFile(path).testzip() is None
    assert all(place.offset % 64 == 0 for tensor in found.values() for place in tensor.places)


def test_the_announcement_is_kept(path: Path) -> None:
    table = {"a": ("F32", (2,)), "b": ("BF16", (1,))}
    a, b = np.zeros(2, np.float32), np.zeros(1, np.uint16)
    for stream in (
        [("b", b), ("a", a)],
        [("a", a)],
        [("a", b), ("b", b)],
        [("a", a), ("b", b), ("c", b)],
    ):
        with pytest.raises(CheckpointError):
            write_file(path, table, stream)
        with pytest.raises(CheckpointError):  # what is left is no file of torch's
            open_file(path)


def test_only_one_tensor_is_asked_for_at_a_time(path: Path) -> None:
    alive: list[str] = []

    def stream() -> Any:
        for name in "abc":
            assert path.exists() and not alive
            alive.append(name)
            yield name, np.full(10, 1, np.float32)
            alive.remove(name)

    write_file(path, {name: ("F32", (10,)) for name in "abc"}, stream())
    assert list(open_file(path)) == ["a", "b", "c"]


def test_changes_never_reach_the_file(path: Path, build: Callable[..., bytes]) -> None:
    data = build({"x": view(), "y": view(0, (2, 3), (1, 2))})
    path.write_bytes(data)
    for tensor in open_file(path).values():
        tensor.read()[...] = 7
    assert path.read_bytes() == data


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_file(tmp_path / "absent" / "x.bin", {}, ())


# --- views -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (24,), (1,)),
        (3, (4, 5), (5, 1)),
        (0, (4, 6), (1, 4)),
        (1, (3, 2, 2), (4, 2, 1)),
        (5, (), ()),
        (0, (0,), (1,)),
        (24, (0, 3), (3, 1)),
        (30, (2, 0), (1, 1)),
        (0, (5,), (4,)),
        (2, (3, 4), (0, 1)),
        (23, (1, 1), (7, 9)),
        (0, (2, 1, 3), (3, 2**40, 1)),
        (0, (2, 1, 3), (5, 2**61, 1)),
        (0, (2, 3), (1, 1)),
        (4, (7,), (0,)),
    ],
)
def test_views(
    path: Path, build: Callable[..., bytes], offset: int, shape: tuple, strides: tuple
) -> None:
    found = read(path, build({"x": view(offset, shape, strides), "all": view()}))
    steps = [4 * step if n > 1 else 0 for n, step in zip(shape, strides, strict=True)]
    expected = np.lib.stride_tricks.as_strided(FLOATS[offset:], shape, steps)
    assert found["x"].shape == shape and found["x"].flags.c_contiguous
    assert found["x"].tobytes() == expected.tobytes()
    assert np.array_equal(found["all"], FLOATS)


def test_tied_tensors_lie_in_one_place(path: Path, build: Callable[..., bytes]) -> None:
    path.write_bytes(build({"a": view(), "b": view(), "c": view(12, (12,))}))
    found = open_file(path)
    first, second, third = (found[name].places[0].offset for name in "abc")
    assert first == second == third - 48
    assert np.array_equal(found["b"].read(), FLOATS)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (25,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**61},
        {"offset": True},
        {"offset": None},
        {"shape": (-1,)},
        {"shape": (2.0,)},
        {"shape": ("2",)},
        {"shape": None},
        {"shape": "ab", "strides": (1, 1)},
        {"strides": (-1,)},
        {"strides": (2,)},
        {"strides": (2**61,)},
        {"strides": (1, 1)},
        {"strides": ()},
        {"shape": (2,) * 70, "strides": (0,) * 70},
        {"shape": (2**40, 2**40), "strides": (0, 0)},
        {"shape": (2**61, 0), "strides": (1, 1)},
        {"shape": (2**15, 2**15), "strides": (0, 0)},  # 4 GiB out of 96 bytes
        {"stored": None},
        {"stored": (1, 2)},
        {"stored": Stored("0", STORED.data, count=25)},
        {"stored": Stored("0", STORED.data, count=-1)},
        {"stored": Stored("0", STORED.data, count=2**62)},
        {"stored": Stored("0", STORED.data, count="24")},
        {"stored": Stored("0", STORED.data, kind=Name("torch", "Size"))},
        {"stored": Stored("0", STORED.data, kind=Name("torch", "FloatTensor"))},
        {"stored": Stored("0", STORED.data, extra=(("0", 0, 24),))},
        {"stored": Stored("0", STORED.data, extra=(None, None))},
        {"tail": ()},
        {"tail": (False, OrderedDict(), None, None)},
        {"function": Name("torch._utils", "_rebuild_tensor_v3")},
        {"function": Name("torch._utils", "_rebuild_tensor")},
        {"function": Name("torch._utils", "_rebuild_parameter")},
        {"function": Name("torch._utils", "_rebuild_tensor_v9")},
    ],
)
def test_views_that_lie(path: Path, build: Callable[..., bytes], changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        read(path, build({"x": view(**changes)}))


def test_one_key_for_two_storages(path: Path, build: Callable[..., bytes]) -> None:
    other = Stored("0", STORED.data, count=3)
    with pytest.raises(CheckpointError, match="two different ones"):
        read(path, build({"x": view(), "y": view(0, (3,), stored=other)}))


def test_the_same_bytes_over_and_over(path: Path, build: Callable[..., bytes]) -> None:
    """A small file must not become a huge one: here 256 tensors of 1 MiB out of one number."""
    tensors = {str(n): view(0, (2**18,), (0,)) for n in range(256)}
    with pytest.raises(CheckpointError, match="over and over"):
        read(path, build(tensors))
    assert len(read(path, build(dict(list(tensors.items())[:4])))) == 4


def test_older_and_other_ways_to_name_a_tensor(path: Path, build: Callable[..., bytes]) -> None:
    oldest = Name("torch._utils", "_rebuild_tensor")
    npu, layout = (
        Name("torch_npu.utils.storage", "_rebuild_npu_tensor"),
        Name("torch_npu.npu._format", "Format"),
    )
    attributes = Name("torch._tensor", "_rebuild_from_type_v2")
    parameter = Name("torch._utils", "_rebuild_parameter")
    tail = (True, OrderedDict())
    device = Stored("1", FLOATS.tobytes(), device="cuda:3")
    found = read(
        path,
        build(
            {
                "oldest": view(function=oldest, tail=()),
                "npu": view(function=npu, tail=(*tail, Call(layout, (29,)))),
                "attributes": Call(
                    attributes,
                    (REBUILD, Name("torch", "Tensor"), view().arguments, {"tag": 1}),
                ),
                "parameter": Call(parameter, (view(), *tail)),
                "bits": view(tail=(*tail, {})),
                "device": view(stored=device),
            }
        ),
    )
    assert len(found) == 6
    assert all(np.array_equal(array, FLOATS) for array in found.values())
    with pytest.raises(CheckpointError, match="negated"):
        read(path, build({"x": view(tail=(*tail, {"neg": True}))}))
    wrong = Call(attributes, (Name("collections", "OrderedDict"), Name("torch", "Tensor"), (), {}))
    with pytest.raises(CheckpointError, match="unknown class"):
        read(path, build({"x": wrong}))


# --- state dicts -----------------------------------------------------------------------------


def test_wrapped_state_dicts(path: Path, build: Callable[..., bytes]) -> None:
    for wrapper in ("state_dict", "model_state_dict", "model", "module"):
        beside = {"epoch": 3, "optimizer": {"state": {0: {"m": view()}}}, "list": [view()]}
        assert list(read(path, build({wrapper: {"x": view()}, **beside}))) == ["x"]
    # A tensor outside makes it an ordinary state dict, of which "model" is an odd entry.
    with pytest.raises(CheckpointError, match="more than tensors"):
        read(path, build({"model": {"x": view()}, "y": view()}))


@pytest.mark.parametrize(
    "value",
    [
        [view()],
        view(),
        "text",
        None,
        5,
        {"model": {"x": view()}, "module": {"x": view()}},
        {"deep": {"model": {"x": view()}}},
        {"x": 1},
        {5: view()},
        {"model": {("a",): view()}},
    ],
)
def test_no_state_dict(path: Path, build: Callable[..., bytes], value: Any) -> None:
    with pytest.raises(CheckpointError):
        read(path, build(value))


def test_an_empty_state_dict(path: Path, build: Callable[..., bytes]) -> None:
    assert read(path, build({})) == {}


def test_entries_that_are_no_tensors(path: Path, build: Callable[..., bytes]) -> None:
    path.write_bytes(build({"x": view(), "steps": 7, "note": "hi", "inner": {"y": view()}}))
    with pytest.raises(CheckpointError, match=r"'steps': 7, 'note': 'hi', 'inner': dict of 1"):
        open_file(path)
    tensors, rest = open_file_with_rest(path)
    assert list(tensors) == ["x"] and np.array_equal(tensors["x"].read(), FLOATS)
    assert {name: describe(value) for name, value in rest.items()} == {
        "steps": "7",
        "note": "'hi'",
        "inner": "dict of 1",
    }


def test_a_state_dict_that_contains_itself(path: Path, build: Callable[..., bytes]) -> None:
    value: dict[str, Any] = {"x": view()}
    value["model"] = value
    with pytest.raises(CheckpointError, match="'model': dict of 2"):
        read(path, build(value))


def test_other_kinds_of_tensors_are_named(path: Path, build: Callable[..., bytes]) -> None:
    complex64 = Stored("1", bytes(8), kind=Name("torch", "ComplexFloatStorage"), count=1)
    if build is legacy:
        complex64 = Stored("1", kind=complex64.kind, count=0)
    odd = {
        "complex64": view(0, (0,), stored=complex64),
        "sparse": Call(Name("torch._utils", "_rebuild_sparse_tensor"), (None, (1, 2))),
        "quantized": Call(Name("torch._utils", "_rebuild_qtensor"), ()),
        "meta": Call(Name("torch._utils", "_rebuild_meta_tensor_no_storage"), ()),
        "nested": Call(Name("torch._utils", "_rebuild_nested_tensor"), (view(),)),
    }
    for kind, value in odd.items():
        with pytest.raises(CheckpointError, match=rf"'layer.w'(.|\n)*given: {kind}"):
            read(path, build({"fine": view(), "layer.w": value}))


# --- other files, damage ---------------------------------------------------------------------


def test_other_archives(path: Path) -> None:
    sound = {"x": view()}
    for more, message in (
        ({"byteorder": b"big"}, "another kind of machine"),
        ({"byteorder": b"little" * 100}, "plenty"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(path, archive(sound, more=more))
    assert list(read(path, archive(sound, more={"byteorder": b"little"}))) == ["x"]
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("word/document.xml", b"")
    with pytest.raises(CheckpointError, match="not one of torch"):
        open_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as other:
        other.writestr("x/data.pkl", bytes(1000))
    with pytest.raises(CheckpointError, match="compressed"):
        open_file(path)


def test_storages_that_are_absent_or_short(path: Path) -> None:
    for data in (b"", STORED.data[:-1]):
        with pytest.raises(CheckpointError, match=r"storage 0 should have 96 bytes"):
            read(path, archive({"x": view(stored=Stored("0", data, count=24))}))
    with pytest.raises(CheckpointError, match=r"storage \.\./data\.pkl"):
        bad = archive({"x": view()}).replace(b"X\x01\x00\x00\x000", b"X\x0b\x00\x00\x00../data.pkl")
        path.write_bytes(rezip(bad))
        open_file(path)


def rezip(data: bytes) -> bytes:
    """Repair the table of an archive whose program has grown."""
    program = data[data.index(b"\x80\x02") : data.index(b".PK") + 1]
    return archive({"x": view()}, program=program)


def test_other_pickles(path: Path) -> None:
    sound = {"x": view()}
    for data, message in (
        (b"", "not a file of torch.save"),
        (b"hello", "not a file of torch.save"),
        (pickle.dumps({"x": 1}, 4), "a pickle of dict of 1"),
        (legacy(sound, magic=5), "a pickle of 5"),
        (legacy(sound, version=1002), "version 1002"),
        (legacy(sound, version="1001"), "version '1001'"),
        (legacy(sound, keys=[]), "contradict"),
        (legacy(sound, keys=["0", "0"]), "contradict"),
        (legacy(sound, keys=["1"]), "contradict"),
        (legacy(sound, keys=[0]), "no list of names"),
        (legacy(sound, keys={"0": 1}), "no list of names"),
        (legacy(sound) + b"\0", "left over"),
        (legacy(sound)[:-1], "truncated"),
        (legacy(sound)[:-104] + struct.pack("<q", 23) + STORED.data, "23 elements"),
        (legacy(sound)[:-104] + struct.pack("<q", -1) + STORED.data, "elements"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(path, data)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_file(path.with_name("absent"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_file(path.parent)


TINY = {
    "a.weight": view(0, (4, 6), (6, 1)),
    "b.weight": view(0, (6, 4), (1, 6)),
    "c.bias": view(
        3, (5,), (1,), stored=Stored("1", bytes(range(64)), Name("torch", "HalfStorage"))
    ),
    "d": view(0, (), (), stored=Stored("2", bytes(8), Name("torch", "DoubleStorage"))),
    "e": view(0, (0, 3), (3, 1), stored=Stored("3")),
}
SEED, FUZZ_INPUTS = 22, 8000


def test_every_truncation_is_noticed(path: Path, build: Callable[..., bytes]) -> None:
    data = build(TINY)
    assert len(read(path, data)) == 5
    for cut in range(len(data)):
        with pytest.raises(CheckpointError):
            read(path, data[:cut])


def sound(tensor: Tensor) -> bool:
    array = tensor.read()
    return (
        isinstance(tensor.dtype, str)
        and array.dtype == np.dtype(NUMPY_DTYPES[tensor.dtype])
        and array.shape == tensor.shape
        and array.flags.c_contiguous
        and array.tobytes() is not None
    )


def test_fuzzed_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits, bytes and pieces changed: an error of ours, or tensors that can be read in full.

    For archives the CRC of the program is set to 0 ("not computed"), or hardly a change would get
    any further.
    """

    def execute(*_: Any, **__: Any) -> None:
        raise AssertionError("executed")

    monkeypatch.setattr(os, "system", execute)
    monkeypatch.setattr(subprocess, "Popen", execute)
    chance, start = random.Random(SEED), time.monotonic()
    ours = path.with_name("ours.bin")
    write(ours, {"x": ("BF16", np.arange(6, dtype="<u2")), "y": ("I64", np.arange(3))})
    sources = [without_crcs(archive(TINY)), without_crcs(ours.read_bytes()), legacy(TINY)]
    results = 0
    for number in range(FUZZ_INPUTS):
        data = bytearray(sources[number % 3])
        for _ in range(chance.randint(1, 4)):
            place, kind = chance.randrange(len(data)), chance.randrange(5)
            if kind < 2:
                data[place] ^= 1 << chance.randrange(8)
            elif kind < 4:
                data[place] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
            else:
                target = chance.randrange(len(data) - 8)
                data[target : target + 8] = data[place : place + 8].ljust(8, b"\0")
        try:
            path.write_bytes(data)
            tensors, _ = open_file_with_rest(path)
        except CheckpointError:
            continue
        assert all(sound(tensor) for tensor in tensors.values())
        results += 1
    assert 0.02 * FUZZ_INPUTS < results < 0.9 * FUZZ_INPUTS
    assert time.monotonic() - start < 60


def without_crcs(data: bytes) -> bytes:
    changed, place = bytearray(data), -1
    while (place := changed.find(b"PK\x01\x02", place + 1)) >= 0:
        changed[place + 16 : place + 20] = bytes(4)
    return bytes(changed)


# --- malice ----------------------------------------------------------------------------------


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_is_executed(
    path: Path, build: Callable[..., bytes], protocol: int, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    for value in (
        {"x": Evil(os.system, f"echo > {marker}")},
        {"x": Evil(eval, f"open({str(marker)!r}, 'w')")},
        {"state_dict": {}, "args": Evil(os.mkdir, str(marker))},
    ):
        program = pickle.dumps(value, protocol)
        with pytest.raises(CheckpointError, match="nothing was executed"):
            read(path, build({}, program=program))
        assert not marker.exists()
        pickle.loads(program)
        assert marker.exists()
        marker.rmdir() if marker.is_dir() else marker.unlink()


@pytest.mark.parametrize(
    "item",
    [
        Evil(os.getcwd),
        ("magic", Evil(os.getcwd)),
    ],
)
def test_nor_in_the_small_pickles_of_the_old_format(path: Path, item: Any) -> None:
    for part in ("magic", "version", "keys"):
        with pytest.raises(CheckpointError, match=r"wants to use posix\.getcwd"):
            read(path, legacy({"x": view()}, **{part: item}))


def test_long_names_stay_in_the_file(path: Path, build: Callable[..., bytes]) -> None:
    _, rest = open_file_with_rest_of(path, build({"x": view(), "note": "n" * 10_000}))
    assert isinstance(rest["note"], LazyBytes)
    with pytest.raises(CheckpointError, match="key of type LazyBytes"):
        read(path, build({"n" * 10_000: view()}))


def open_file_with_rest_of(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path.write_bytes(data)
    return open_file_with_rest(path)
