"""The .pdparams reader and writer against Python's own pickles, and against damage and malice."""

from __future__ import annotations

import base64
import io
import os
import pickle
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

CODES = [code for code in NUMPY_DTYPES if code not in UNKNOWN_TO_PADDLE]
READ_PROTOCOLS = (2, 3, 4, 5)
WRITE_PROTOCOLS = (2, 3, 4)
FUZZ_INPUTS = 5000
FUZZ_SECONDS = 8

Tensors = dict[str, tuple[str, np.ndarray]]
"""name -> (dtype code, array; bfloat16 as uint16)"""


def random_array(rng: np.random.Generator, code: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(NUMPY_DTYPES[code])
    size = int(np.prod(shape)) * dtype.itemsize
    raw = rng.integers(0, 2 if code == "BOOL" else 256, size, np.uint8)
    return np.frombuffer(raw.tobytes(), dtype).reshape(shape)


def write(path: Path, tensors: Tensors, **options: Any) -> None:
    table = {name: (code, array.shape) for name, (code, array) in tensors.items()}
    write_file(path, table, ((name, array) for name, (_, array) in tensors.items()), **options)


def pickle_as_numpy_1(value: Any, protocol: int) -> bytes:
    """What Python writes to a file; NumPy 2 would name its modules otherwise."""
    file = io.BytesIO()
    reconstruct = np.zeros(1).__reduce__()[0]
    with mock.patch.object(reconstruct, "__module__", "numpy.core.multiarray"):
        pickle.dump(value, file, protocol)
    return file.getvalue()


def dump(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def check_equal(read: Any, expected: Tensors) -> None:
    assert list(read) == list(expected)
    for name, (code, array) in expected.items():
        assert (read[name].dtype, read[name].shape) == (code, array.shape), name
        got = read[name].read()
        assert (got.dtype, got.shape) == (np.dtype(NUMPY_DTYPES[code]), array.shape), name
        assert got.flags.c_contiguous and got.flags.aligned and got.flags.writeable, name
        assert got.tobytes() == array.tobytes(), name


@st.composite
def tensor_tables(draw: Any) -> Tensors:
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=2, max_size=12)
    sizes = st.sampled_from([0, 1, 2, 3, 5, 40])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return {
        name: (code, random_array(rng, code, tuple(shape)))
        for name, code, shape in draw(
            st.lists(
                st.tuples(names, st.sampled_from(CODES), st.lists(sizes, max_size=3)),
                max_size=8,
                unique_by=lambda entry: entry[0],
            )
        )
    }


# --- round trips -----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(tensors=tensor_tables(), protocol=st.sampled_from(WRITE_PROTOCOLS))
def test_files_are_byte_for_byte_pythons(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, protocol: int
) -> None:
    path = tmp_path_factory.mktemp("pd") / "a.pdparams"
    inner = {name: f"linear_{number}.w_0" for number, name in enumerate(tensors)}
    write(path, tensors, protocol=protocol, parameter_names=inner)
    state = {name: array for name, (_, array) in tensors.items()}
    assert path.read_bytes() == pickle_as_numpy_1({**state, PARAMETER_NAMES: inner}, protocol)
    check_equal(open_file(path), tensors)
    assert read_parameter_names(path) == inner


@pytest.mark.parametrize("protocol", WRITE_PROTOCOLS)
@pytest.mark.parametrize("count", [998, 999, 1000, 1999, 2500])
def test_many_tensors_are_byte_for_byte_pythons(tmp_path: Path, count: int, protocol: int) -> None:
    """Batches of 1000 entries, frames of 64 KiB, more than 256 things to remember."""
    rng = np.random.default_rng(count)
    tensors = {
        f"layers.{number}.gewöhnliches_gewicht": (code, random_array(rng, code, (size,)))
        for number in range(count)
        for code in [CODES[number % len(CODES)]]
        for size in [70_000 if number % 241 == 7 else number % 31]
    }
    path = tmp_path / "a.pdparams"
    write(path, tensors, protocol=protocol)
    inner = {name: "".join(list(name)) for name in tensors}
    state = {name: array for name, (_, array) in tensors.items()}
    assert path.read_bytes() == pickle_as_numpy_1({**state, PARAMETER_NAMES: inner}, protocol)
    check_equal(open_file(path), tensors)


@settings(max_examples=150, deadline=None)
@given(tensors=tensor_tables(), protocol=st.sampled_from(READ_PROTOCOLS), data=st.data())
def test_pythons_pickles_are_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, protocol: int, data: st.DataObject
) -> None:
    """Also arrays in Fortran order, scalars, pairs with a name, one array under two names."""
    state: dict[str, Any] = {}
    for name, (_, array) in tensors.items():
        forms = [array, np.array(array, order="F"), Call(tuple, ("generated_tensor_0", array))]
        forms += [array[()]] if not array.shape else []
        state[name] = data.draw(st.sampled_from(forms))
    if tensors:
        first = next(iter(tensors))
        state["the same again"], tensors["the same again"] = state[first], tensors[first]
    path = dump(tmp_path_factory.mktemp("pd") / "a.pdparams", state, protocol)
    check_equal(open_file(path), tensors)
    assert read_parameter_names(path) == {}


@pytest.mark.parametrize("protocol", READ_PROTOCOLS)
@pytest.mark.parametrize("order", "CF")
def test_large_contents_stay_on_the_disk(tmp_path: Path, protocol: int, order: str) -> None:
    """Unaligned, and (protocol 2) with every byte, so that half of them take two."""
    array = np.arange(40_000, dtype="<u4").reshape(200, 200) * np.uint32(2654435761)
    state = {"name" * size: np.array(array, order=order) for size in range(1, 6)}
    path = dump(tmp_path / "a.pdparams", state, protocol)
    read = open_file(path)
    check_equal(read, {name: ("U32", array) for name in state})
    for tensor in read.values():
        (place,) = tensor.places
        assert place.path == path and 0 < place.offset < path.stat().st_size
        tensor.read()[:] = 0
    check_equal(read, {name: ("U32", array) for name in state})


NUMPY_2_FILES = {
    2: "gAJ9cQAoWAEAAAB3cQFjbnVtcHkuX2NvcmUubXVsdGlhcnJheQpfcmVjb25zdHJ1Y3QKcQJjbnVtcHkKbmRhcnJheQ"
    "pxA0sAhXEEY19jb2RlY3MKZW5jb2RlCnEFWAEAAABicQZYBgAAAGxhdGluMXEHhnEIUnEJh3EKUnELKEsBSwJLA4ZxDG"
    "NudW1weQpkdHlwZQpxDVgCAAAAZjJxDomIh3EPUnEQKEsDWAEAAAA8cRFOTk5K/////0r/////SwB0cRJiiWgFWAwAAA"
    "AAAAA8AEAAQgBEAEVxE2gHhnEUUnEVdHEWYlgBAAAARnEXaAJoA0sAhXEYaAmHcRlScRooSwFLA0sChnEbaA1YAgAAAG"
    "k0cRyJiIdxHVJxHihLA2gRTk5OSv////9K/////0sAdHEfYohoBVgYAAAAAAAAAAIAAAAEAAAAAQAAAAMAAAAFAAAAcS"
    "BoB4ZxIVJxInRxI2JYAQAAAHNxJGNudW1weS5fY29yZS5tdWx0aWFycmF5CnNjYWxhcgpxJWgNWAIAAABmNHEmiYiHcS"
    "dScSgoSwNoEU5OTkr/////Sv////9LAHRxKWJoBVgEAAAAAAAgQHEqaAeGcStScSyGcS1ScS51Lg==",
    4: "gASVPQEAAAAAAAB9lCiMAXeUjBZudW1weS5fY29yZS5tdWx0aWFycmF5lIwMX3JlY29uc3RydWN0lJOUjAVudW1weZ"
    "SMB25kYXJyYXmUk5RLAIWUQwFilIeUUpQoSwFLAksDhpRoBYwFZHR5cGWUk5SMAmYylImIh5RSlChLA4wBPJROTk5K//"
    "///0r/////SwB0lGKJQwwAAAA8AEAAQgBEAEWUdJRijAFGlGgEaAdLAIWUaAmHlFKUKEsBSwNLAoaUaA6MAmk0lImIh5"
    "RSlChLA2gSTk5OSv////9K/////0sAdJRiiEMYAAAAAAIAAAAEAAAAAQAAAAMAAAAFAAAAlHSUYowBc5RoAowGc2NhbG"
    "FylJOUaA6MAmY0lImIh5RSlChLA2gSTk5OSv////9K/////0sAdJRiQwQAACBAlIaUUpR1Lg==",
    5: "gAWVOgEAAAAAAAB9lCiMAXeUjBNudW1weS5fY29yZS5udW1lcmljlIwLX2Zyb21idWZmZXKUk5QolgwAAAAAAAAAAA"
    "AAPABAAEIARABFlIwFbnVtcHmUjAVkdHlwZZSTlIwCZjKUiYiHlFKUKEsDjAE8lE5OTkr/////Sv////9LAHSUYksCSw"
    "OGlIwBQ5R0lFKUjAFGlGgEKJYYAAAAAAAAAAAAAAACAAAABAAAAAEAAAADAAAABQAAAJRoCIwCaTSUiYiHlFKUKEsDaA"
    "xOTk5K/////0r/////SwB0lGJLA0sChpRoEnSUUpSMAXOUjBZudW1weS5fY29yZS5tdWx0aWFycmF5lIwGc2NhbGFylJ"
    "OUaAiMAmY0lImIh5RSlChLA2gMTk5OSv////9K/////0sAdJRiQwQAACBAlIaUUpR1Lg==",
}
"""protocol -> what NumPy 2.4.6 pickled."""


@pytest.mark.parametrize("protocol", NUMPY_2_FILES)
def test_files_of_numpy_2_are_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pdparams"
    path.write_bytes(base64.b64decode(NUMPY_2_FILES[protocol]))
    expected = {
        "w": ("F16", np.arange(6, dtype="<f2").reshape(2, 3)),
        "F": ("I32", np.arange(6, dtype="<i4").reshape(3, 2)),
        "s": ("F32", np.array(2.5, "<f4")),
    }
    check_equal(open_file(path), expected)


@pytest.mark.parametrize("protocol", (2, 3))
def test_cut_arrays_are_put_together(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(pdparams, "MAX_SLICE_BYTES", 63)
    shapes = {"F32": (4, 9), "BF16": (3, 3, 5), "I64": (2, 9), "F64": (7,), "BOOL": (64,)}
    tensors = {code: (code, random_array(rng, code, shape)) for code, shape in shapes.items()}
    path = tmp_path / "a.pdparams"
    write(path, tensors, protocol=protocol)
    raw = pickle.loads(path.read_bytes())
    assert raw[SLICES] == {
        "F32": {"OriginShape": (4, 9), "slices": ["F32@@.0", "F32@@.1", "F32@@.2"]},
        "BF16": {"OriginShape": (3, 3, 5), "slices": ["BF16@@.0", "BF16@@.1"]},
        "I64": {"OriginShape": (2, 9), "slices": ["I64@@.0", "I64@@.1", "I64@@.2"]},
        "BOOL": {"OriginShape": (64,), "slices": ["BOOL@@.0", "BOOL@@.1"]},
    }
    assert max(array.nbytes for array in raw.values() if isinstance(array, np.ndarray)) <= 63
    read = open_file(path)
    assert len(read["F32"].places) == 3
    check_equal({name: read[name] for name in tensors}, tensors)


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", WRITE_PROTOCOLS)
def test_one_tensor_is_in_memory(tmp_path: Path, protocol: int) -> None:
    size, count = 8 * 2**20, 6
    path = tmp_path / "a.pdparams"
    table = {f"weight.{number}": ("U8", (size,)) for number in range(count)}
    made = ((name, np.full(size, number + 250, np.uint8)) for number, name in enumerate(table))

    def peak(work: Callable[[], Any]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(lambda: write_file(path, table, made, protocol=protocol)) < 2.5 * size
    assert path.stat().st_size > count * size
    assert peak(lambda: open_file(path)) < size / 8
    read = open_file(path)
    assert peak(lambda: [tensor.read().max() for tensor in read.values()]) < 2.5 * size
    assert [int(tensor.read().min()) for tensor in read.values()] == [250, 251, 252, 253, 254, 255]


# --- what is refused -------------------------------------------------------------------------


def check_refused(path: Path, *words: str) -> None:
    """Opening or reading names the file and says `words`."""
    with pytest.raises(CheckpointError) as caught:
        for tensor in open_file(path).values():
            tensor.read()
    for word in (path.name, *words):
        assert word in str(caught.value)


def malicious(target: str) -> dict[str, bytes]:
    """name -> a pickle that would make the file `target` if it were believed."""
    command = f"open({target!r}, 'w')"
    array = np.zeros(2, "<f4")
    calls = {
        "system": Call(os.system, f"touch {target}"),
        "eval": Call(eval, command),
        "exec": Call(exec, command),
        "lod tensor": Call(eval, f"[data, {command}][0]", {"data": array}),
        "open": Call(io.open, target, "w"),
        "getattr": Call(getattr, array, "tofile"),
        "numpy load": Call(np.load, target),
        "numpy fromfile": Call(np.memmap, target, "u1", "w+", 0, (3,)),
        "array method": Call(np.ndarray.tofile, array, target),
        "path": Call(Path.touch, Path(target)),
    }
    files = {
        f"{name}, protocol {protocol}": pickle.dumps({"weight": array, "x": call}, protocol)
        for name, call in calls.items()
        for protocol in READ_PROTOCOLS
    }
    files["instance"] = b"(S'touch " + target.encode() + b"'\nios\nsystem\n."
    files["object"] = b"\x80\x04(cos\nsystem\nX\x01\0\0\0ao."
    files["as a shape"] = pickle.dumps({"w": (np.zeros, calls["eval"])}, 4)
    files["extension"] = b"\x80\x02\x82\x01."
    files["state of a class"] = b"\x80\x04cnumpy\nndarray\n}X\x07\0\0\0__doc__K\x01sb."
    files["call of a class"] = b"\x80\x04cnumpy\nndarray\nK\x05\x85R."
    files["call of an array"] = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n)RK\x05\x85R."
    files["unhashable name"] = b"\x80\x04}]K\x01s."
    return files


def test_malicious_pickles_are_refused_and_nothing_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    for name, content in malicious(str(target)).items():
        path = tmp_path / "evil.pdparams"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"evil\.pdparams"):
            open_file(path)
        with pytest.raises(CheckpointError, match=r"evil\.pdparams"):
            read_parameter_names(path)
        assert not target.exists(), name


OTHER_THINGS = {
    "a list": ([np.zeros(2)], "list of 1"),
    "one array": (np.zeros(2), "does not hold a table"),
    "a number": ({"w": np.zeros(2), "epoch": 3}, "'epoch' is not a tensor"),
    "nothing": ({"w": None}, "'w' is not a tensor"),
    "a nested dict": ({"model": {"w": np.zeros(2)}}, "'model' is not a tensor"),
    "optimizer": ({"LR_Scheduler": {"last_epoch": 3, "last_lr": 1e-4}}, "'LR_Scheduler'"),
    "three in a tuple": ({"w": ("name", np.zeros(2), 1)}, "'w' is not a tensor"),
    "a number as name": ({3: np.zeros(2)}, "whose name is not text"),
    "complex": ({"w": np.zeros(2, "c8")}, "'w' has a dtype that is not supported"),
    "text": ({"w": np.array(["a"])}, "'w' has a dtype"),
    "big-endian": ({"w": np.zeros(2, ">f4")}, "'>f4'"),
    "objects": ({"w": np.array([{}, []], object)}, "makes no sense"),
    "records": ({"w": np.zeros(2, "f4,i4")}, "'w' has a dtype"),
    "dates": ({"w": np.zeros(2, "M8[s]")}, "'w' has a dtype"),
    "a table that is none": ({"w": np.zeros(2), SLICES: 3}, f"its {SLICES} is not a table"),
    "a part that is not there": (
        {"w@@.0": np.zeros(2), SLICES: {"w": {"OriginShape": (3,), "slices": ["w@@.0", "w@@.1"]}}},
        "parts of tensor 'w' are absent",
    ),
    "parts of another size": (
        {"w@@.0": np.zeros(2), SLICES: {"w": {"OriginShape": (3,), "slices": ["w@@.0"]}}},
        "do not make F64 (3,)",
    ),
    "parts of two dtypes": (
        {
            "w@@.0": np.zeros(1, "f8"),
            "w@@.1": np.zeros(2, "f4"),
            SLICES: {"w": {"OriginShape": (2,), "slices": ["w@@.0", "w@@.1"]}},
        },
        "do not make F64 (2,)",
    ),
    "a part twice": (
        {
            "w@@.0": np.zeros(2),
            SLICES: {"w": {"OriginShape": (4,), "slices": ["w@@.0", "w@@.0"]}},
        },
        "absent or used twice",
    ),
    "parts of two tensors": (
        {
            "w@@.0": np.zeros(2),
            SLICES: {n: {"OriginShape": (2,), "slices": ["w@@.0"]} for n in ("w", "v")},
        },
        "parts of tensor 'v' are absent",
    ),
    "a whole and its parts": (
        {
            "w": np.zeros(2),
            "w@@.0": np.zeros(2),
            SLICES: {"w": {"OriginShape": (2,), "slices": ["w@@.0"]}},
        },
        "does not describe 'w'",
    ),
    "a shape of text": (
        {"w@@.0": np.zeros(2), SLICES: {"w": {"OriginShape": "ab", "slices": ["w@@.0"]}}},
        "a shape that cannot be",
    ),
    "the same array a thousand times": (
        dict.fromkeys(map(str, range(1000)), np.zeros(1000)),
        "and its tensors 8000000",
    ),
}


@pytest.mark.parametrize("what", OTHER_THINGS)
def test_other_things_are_refused_by_name(tmp_path: Path, what: str) -> None:
    value, words = OTHER_THINGS[what]
    for protocol in READ_PROTOCOLS:
        check_refused(dump(tmp_path / "a.pdparams", value, protocol), words)


class State:
    """Pickled as an array with any state."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        reconstruct = np.zeros(1).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), self.state


F4 = np.dtype("<f4")
LIES = {
    "too few bytes": (1, (3,), F4, False, bytes(8)),
    "too many bytes": (1, (3,), F4, False, bytes(16)),
    "too many bytes on the disk": (1, (1024,), F4, False, bytes(8192)),
    "negative": (1, (-2, -1), F4, False, bytes(8)),
    "fractions": (1, (2.0,), F4, False, bytes(8)),
    "truths": (1, (True,), F4, False, bytes(4)),
    "huge": (1, (2**62, 2**62), F4, False, bytes(8)),
    "huge and empty": (1, (2**40, 0, 2**40), F4, False, b""),
    "many axes": (1, (1,) * 65, F4, False, bytes(4)),
    "a list as shape": (1, [2], F4, False, bytes(8)),
    "text as dtype": (1, (2,), "<f4", False, bytes(8)),
    "text as contents": (1, (2,), F4, False, "abcdefgh"),
    "long text as contents": (1, (2048,), F4, False, "a" * 8192),
    "a list as contents": (1, (2,), F4, False, [1, 2]),
    "short state": (1, (2,), F4, False),
}


@pytest.mark.parametrize("lie", LIES)
def test_arrays_that_lie_are_refused(tmp_path: Path, lie: str) -> None:
    for protocol in READ_PROTOCOLS:
        check_refused(dump(tmp_path / "a.pdparams", {"w": State(*LIES[lie])}, protocol))


def test_bytes_that_are_no_latin_1_are_refused(tmp_path: Path) -> None:
    """The number of characters of a long text is only known when it is read."""
    for text in ("\u0100" * 4096, "\u00ff" * 4095 + "aa", "a" * 8191 + "\u00ff", "\ud800" * 4096):
        raw = pickle.dumps({"w": np.zeros(1024, F4)}, 2)
        begin = raw.index(b"X\x00\x10\x00\x00") + 5
        utf8 = text.encode("utf-8", "surrogatepass")
        path = tmp_path / "a.pdparams"
        length = len(utf8).to_bytes(4, "little")
        path.write_bytes(raw[: begin - 4] + length + utf8 + raw[begin + 4096 :])
        check_refused(path)


def test_what_is_no_file_of_paddle_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path / "absent.pdparams", "cannot be read")
    check_refused(tmp_path, "cannot be read")
    for content in (
        b"",
        b"\0" * 64,
        b"PK\x03\x04" + bytes(60),
        b"hello",
        b"\x80\x04",
        b"\x80\x63.",
    ):
        path = tmp_path / "a.pdparams"
        path.write_bytes(content)
        check_refused(path)
    path.write_bytes(pickle.dumps({"w": np.zeros(2)}) + b"more")
    check_refused(path, "4 bytes are left over")


@pytest.mark.parametrize("names", [3, {"w": 3}, {"w": np.zeros(2)}])
def test_parameter_names_that_are_none_are_refused(tmp_path: Path, names: Any) -> None:
    path = dump(tmp_path / "a.pdparams", {"w": np.zeros(2), PARAMETER_NAMES: names})
    with pytest.raises(CheckpointError, match="not a table of names"):
        read_parameter_names(path)


# --- damage ----------------------------------------------------------------------------------


def tiny_files(**more: np.ndarray) -> list[bytes]:
    """Every protocol, with names of parameters, parts, all orders and sizes."""
    rng = np.random.default_rng(0)
    state = {
        "weight": random_array(rng, "F32", (3, 4)),
        "fortran": np.asfortranarray(random_array(rng, "F16", (3, 2))),
        "bf16": random_array(rng, "BF16", (5,)),
        "scalar": np.float64(3.5),
        "empty": np.zeros((0, 3), "i8"),
        "pair": Call(tuple, ("generated_0", random_array(rng, "BOOL", (2, 2)))),
        "cut@@.0": random_array(rng, "I8", (3,)),
        "cut@@.1": random_array(rng, "I8", (1,)),
        **more,
        PARAMETER_NAMES: {"weight": "linear_0.w_0"},
        SLICES: {"cut": {"OriginShape": (2, 2), "slices": ["cut@@.0", "cut@@.1"]}},
    }
    return [pickle.dumps(state, protocol) for protocol in READ_PROTOCOLS]


@pytest.mark.parametrize("protocol", READ_PROTOCOLS)
def test_truncation_at_every_byte_is_noticed(tmp_path: Path, protocol: int) -> None:
    whole = tiny_files()[protocol - 2]
    path = tmp_path / "a.pdparams"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            open_file(path)
    path.write_bytes(whole)
    assert len(open_file(path)) == 7


def test_damaged_files_are_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    """Thousands of damaged files: an array or a CheckpointError, in little time and memory."""
    source = random.Random(20240607)
    wholes = tiny_files(large=np.zeros(5000, np.uint8))
    path = tmp_path / "a.pdparams"
    began, refused, done = time.monotonic(), 0, 0
    while done < FUZZ_INPUTS and time.monotonic() < began + FUZZ_SECONDS:
        data = bytearray(source.choice(wholes))
        # The contents of the large tensor fill the file; damage elsewhere tells more.
        begin = data.index(b"large")
        for _ in range(source.choice((1, 1, 2, 5, 20))):
            place = source.choice((source.randrange(begin), source.randrange(-600, 0)))
            change = source.randrange(4)
            if change == 0:
                data[place] = source.randrange(256)
            elif change == 1:
                data[place] ^= 1 << source.randrange(8)
            elif change == 2:
                del data[place]
            else:
                other = source.randrange(begin)
                data[place:place] = data[other : other + source.randrange(1, 9)]
        path.write_bytes(data)
        done += 1
        try:
            for tensor in open_file(path).values():
                assert tensor.read().shape == tensor.shape
            read_parameter_names(path)
        except CheckpointError:
            refused += 1
    assert done >= 1000, "too slow to mean anything"
    assert 0.3 * done < refused < done


# --- writing ---------------------------------------------------------------------------------


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    write(path, {"w": ("F32", np.ones(2, "<f4"))})
    before = path.read_bytes()
    table = {"w": ("F32", (2,)), "v": ("F32", (2,))}
    ones = np.ones(2, "<f4")
    for stream, words in [
        ([("w", ones)], "1 of 2 tensors were not written"),
        ([("v", ones), ("w", ones)], "out of turn"),
        ([("w", ones), ("v", ones[:1])], "not what was announced"),
        ([("w", ones), ("v", ones.astype("<f8"))], "not what was announced"),
        ([("w", ones), ("v", ones), ("u", ones)], "out of turn"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            write_file(path, table, stream)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pdparams"
    for code in UNKNOWN_TO_PADDLE:
        with pytest.raises(CheckpointError, match=f"weight \\({code}\\)"):
            write(path, {"weight": (code, np.zeros(2, NUMPY_DTYPES[code]))})
    for name in (PARAMETER_NAMES, SLICES):
        with pytest.raises(CheckpointError, match=name):
            write(path, {name: ("I8", np.zeros(2, np.int8))})
    for protocol in (0, 1, 5, True):
        with pytest.raises(CheckpointError, match="protocol"):
            write(path, {}, protocol=protocol)
    (tmp_path / "file").touch()
    (tmp_path / "directory.pdparams").mkdir()
    for place in ("absent/a.pdparams", "file/a.pdparams", "directory.pdparams"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write(tmp_path / place, {})
    monkeypatch.setattr(pdparams, "MAX_SLICE_BYTES", 1)
    with pytest.raises(CheckpointError, match=r"w@@\.0"):
        write(
            path,
            {"w": ("I8", np.zeros(2, np.int8)), "w@@.0": ("I8", np.zeros(1, np.int8))},
            protocol=2,
        )
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "directory.pdparams"}
