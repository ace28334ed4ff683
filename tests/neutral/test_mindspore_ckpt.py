"""MindSpore's `.ckpt` without MindSpore: round trips, the format's corners, damage, fuzzing.

What MindSpore itself writes and reads is compared in tests/mindspore/test_mindspore_ckpt.py.
"""

from __future__ import annotations

import os
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_convert.errors import CheckpointError
from weight_convert.storage.mindspore_ckpt import (
    TENSOR_TYPES,
    open_file,
    read_strings,
    verify_crc,
    write_file,
)
from weight_convert.storage.protobuf import (
    WireError,
    collect_fields,
    encode_varint,
    read_fields,
    read_numbers,
    to_signed,
)
from weight_convert.storage.tensor import NUMPY_DTYPES

Tensors = dict[str, tuple[str, np.ndarray]]
"""name -> (dtype code, array; bfloat16 as uint16)"""

GOLDEN = bytes.fromhex(
    "0a140a0162120f1207466c6f617433321a0400004040"  # b: float32 3.0
    "0a100a0163120b08011204496e74381a0101"  # c: int8 [1]
    "0a160a016912111205496e7436341a080500000000000000"  # append_dict: i = 5
    "0a140a0166120f1207466c6f617433321a040000c03f"  # f = 1.5
    "0a0e0a017412091204426f6f6c1a0101"  # t = True
    "0a160a01731211080012037374721a0868000000e9000000"  # s = "hé"
    "0a180a036e656712111205496e7436341a08ffffffffffffffff"  # neg = -1
)
"""What `save_checkpoint` of MindSpore 2.10 wrote."""


# --- an encoder of its own, so that reader and writer do not share a mistake ------------------


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def block(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def record(
    tag: bytes | str,
    tensor_type: str = "Float32",
    dims: Iterable[int] = (),
    content: bytes = b"\0\0\0\0",
    extra: bytes = b"",
) -> bytes:
    name = tag if isinstance(tag, bytes) else tag.encode()
    sizes = b"".join(b"\x08" + varint(dim % 2**64) for dim in dims)
    tensor = sizes + block(2, tensor_type.encode()) + block(3, content) + extra
    return block(1, block(1, name) + block(2, tensor) + extra)


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def save(path: Path, tensors: Tensors, **options: Any) -> Path:
    table = {name: (code, array.shape) for name, (code, array) in tensors.items()}
    write_file(path, table, ((name, array) for name, (_, array) in tensors.items()), **options)
    return path


def assert_holds(path: Path, tensors: Tensors) -> None:
    opened = open_file(path)
    assert list(opened) == list(tensors)
    for name, (code, array) in tensors.items():
        read = opened[name].read()
        assert (opened[name].dtype, opened[name].shape) == (code, array.shape)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()
        assert read.flags.c_contiguous and read.flags.aligned
        assert all(place.path == path and place.name == name for place in opened[name].places)


@st.composite
def arrays(draw: Any) -> tuple[str, np.ndarray]:
    code = draw(st.sampled_from(list(NUMPY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    seed = draw(st.integers(0, 2**32 - 1))
    dtype = np.dtype(NUMPY_DTYPES[code])
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, size, np.uint8)
    return code, np.frombuffer(raw.tobytes(), dtype).reshape(shape)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)


# --- round trips ------------------------------------------------------------------------------


def test_golden_file(tmp_path: Path) -> None:
    tensors: Tensors = {
        "b": ("F32", np.array(3, "<f4")),
        "c": ("I8", np.array([1], "|i1")),
    }
    append = {"i": 5, "f": 1.5, "t": True, "s": "hé", "neg": -1}
    assert save(tmp_path / "a.ckpt", tensors, append=append).read_bytes() == GOLDEN
    path = put(tmp_path / "b.ckpt", GOLDEN)
    numbers = {name: tensor.read() for name, tensor in open_file(path).items()}
    assert numbers == {"b": 3, "c": [1], "i": 5, "f": 1.5, "t": True, "neg": -1}
    assert {name: array.dtype.str for name, array in numbers.items()} == {
        "b": "<f4", "c": "|i1", "i": "<i8", "f": "<f4", "t": "|b1", "neg": "<i8",
    }  # fmt: skip
    assert {array.shape for name, array in numbers.items() if name != "c"} == {()}
    assert read_strings(path) == {"s": "hé"}
    assert open_file(path)["c"].places[0].offset == GOLDEN.index(b"\x1a\x01\x01") + 2


@settings(max_examples=200, deadline=None)
@given(
    tensors=st.dictionaries(NAMES, arrays(), max_size=6),
    append=st.dictionaries(NAMES, VALUES, max_size=4),
    chunk_bytes=st.integers(1, 40),
    crc=st.booleans(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: Tensors,
    append: dict[str, Any],
    chunk_bytes: int,
    crc: bool,
) -> None:
    path = tmp_path_factory.mktemp("ms") / "x.ckpt"
    append = {name: value for name, value in append.items() if name not in tensors}
    save(path, tensors, append=append, chunk_bytes=chunk_bytes, crc=crc)
    if not tensors and not append:
        with pytest.raises(CheckpointError, match="no MindSpore" if crc else "is empty"):
            open_file(path)
        return
    texts = {name: value for name, value in append.items() if isinstance(value, str)}
    codes = {bool: "BOOL", int: "I64", float: "F32"}
    scalars = {
        name: (codes[type(value)], np.array(value, NUMPY_DTYPES[codes[type(value)]]))
        for name, value in append.items()
        if name not in texts
    }
    assert_holds(path, tensors | scalars)
    assert read_strings(path) == texts
    assert verify_crc(path) == crc


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 5), parts=st.integers(1, 12), last=st.booleans()
)
def test_chunks_along_axis_0(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, parts: int, last: bool
) -> None:
    """As `async_save` cuts: np.array_split, which also makes empty parts, with all dims in each."""
    array = np.arange(rows * columns, dtype="<i4").reshape(rows, columns)
    path = tmp_path_factory.mktemp("ms") / "x.ckpt"
    chunks = [record("w", "Int32", array.shape, c.tobytes()) for c in np.array_split(array, parts)]
    other = record("v", content=b"\0\0\x80\x3f")
    path.write_bytes(b"".join([*chunks, other] if last else [other, *chunks]))
    tensors: Tensors = {"w": ("I32", array), "v": ("F32", np.array(1, "<f4"))}
    assert_holds(path, dict(sorted(tensors.items(), reverse=last)))


def test_chunks_are_cut_and_repeat_the_dims(tmp_path: Path) -> None:
    array = np.arange(5, dtype="<i4")
    path = save(tmp_path / "x.ckpt", {"w": ("I32", array)}, chunk_bytes=8)
    raw = array.tobytes()
    chunks = [raw[0:8], raw[8:16], raw[16:20]]
    assert path.read_bytes() == b"".join(record("w", "Int32", [5], chunk) for chunk in chunks)
    assert len(open_file(path)["w"].places) == 3


def test_changes_never_reach_the_file(tmp_path: Path) -> None:
    array = np.arange(6, dtype="<i8")
    for name, chunk_bytes in {"one": 1000, "several": 16}.items():
        path = save(tmp_path / name, {"w": ("I64", array)}, chunk_bytes=chunk_bytes)
        before = path.read_bytes()
        open_file(path)["w"].read()[:] = 0
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("dims", "content", "shape"),
    [
        ([], b"\0\0\x80\x3f", ()),
        ([0], b"\0\0\x80\x3f", ()),  # a scalar of older MindSpore
        ([0], b"", (0,)),
        ([1], b"\0\0\x80\x3f", (1,)),
        ([0, 3], b"", (0, 3)),
    ],
)
def test_scalars_and_tensors_without_elements(
    tmp_path: Path, dims: list[int], content: bytes, shape: tuple[int, ...]
) -> None:
    path = put(tmp_path / "x.ckpt", record("w", "Float32", dims, content))
    assert_holds(path, {"w": ("F32", np.ones(shape, "<f4"))})


def test_every_dtype_has_a_type_name() -> None:
    assert sorted(TENSOR_TYPES.values()) == sorted(NUMPY_DTYPES)


# --- laziness and memory ----------------------------------------------------------------------


def test_opening_reads_no_contents(tmp_path: Path) -> None:
    """24 GiB in 48 records of a sparse file: opening takes the time of 48 heads."""
    size = 512 * 2**20
    path = tmp_path / "big.ckpt"
    with path.open("wb") as file:
        for index in range(48):
            tensor = b"\x08" + varint(6 * size) + block(2, b"UInt8") + b"\x1a" + varint(size)
            value = block(1, b"w%d" % (index // 6)) + b"\x12" + varint(len(tensor) + size) + tensor
            file.write(b"\x0a" + varint(len(value) + size) + value)
            file.seek(size, os.SEEK_CUR)
        file.write(record("last", content=b"\0\0\x80\x3f"))
    begin = time.perf_counter()
    tracemalloc.start()
    opened = open_file(path)
    assert opened["last"].read() == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - begin < 1
    assert peak < 2**20
    assert {tensor.shape for tensor in opened.values()} == {(6 * size,), ()}


def test_reading_chunks_takes_the_tensor_alone(tmp_path: Path) -> None:
    array = np.arange(1 << 20, dtype="<i8")
    path = save(tmp_path / "x.ckpt", {"w": ("I64", array)}, chunk_bytes=1 << 20)
    tensor = open_file(path)["w"]
    tracemalloc.start()
    read = tensor.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(read, array)
    assert peak < array.nbytes + (1 << 18)


# --- the checksum -----------------------------------------------------------------------------


def test_checksum(tmp_path: Path) -> None:
    body = record("w", content=b"\0\0\x80\x3f")
    crc = zlib.crc32(body).to_bytes(10, "big")
    path = put(tmp_path / "x.ckpt", body + b"crc_num" + crc)
    assert verify_crc(path)
    assert_holds(path, {"w": ("F32", np.array(1, "<f4"))})
    assert not verify_crc(put(path, body))
    assert not verify_crc(put(path, b""))
    assert not verify_crc(put(path, b"crc_num"))
    for position in range(len(body)):
        damaged = bytearray(body + b"crc_num" + crc)
        damaged[position] ^= 1
        with pytest.raises(CheckpointError, match="checksum is wrong"):
            verify_crc(put(path, bytes(damaged)))
    with pytest.raises(CheckpointError, match="checksum is wrong"):
        verify_crc(put(path, body + b"crc_num" + b"\xff" * 10))


# --- Protocol Buffers' rules ------------------------------------------------------------------

UNKNOWN = (
    varint(9 * 8) + varint(2**64 - 1),
    varint(9 * 8 + 1) + bytes(8),
    varint(9 * 8 + 5) + bytes(4),
    block(9, b"anything"),
    varint(9 * 8 + 3) + varint(1 * 8 + 3) + block(7, b"x") + varint(1 * 8 + 4) + varint(9 * 8 + 4),
    varint((2**29 - 1) * 8 + 5) + bytes(4),
)


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_unknown_fields_are_skipped(tmp_path: Path, unknown: bytes) -> None:
    whole = record("w", "Int8", [2], b"\1\2", extra=unknown) + unknown + record("v", extra=unknown)
    path = put(tmp_path / "x.ckpt", whole + unknown)
    assert_holds(
        path, {"w": ("I8", np.array([1, 2], "|i1")), "v": ("F32", np.array(0, "<f4"))}
    )  # fmt: skip


def test_fields_in_another_order_and_packed_dims(tmp_path: Path) -> None:
    tensor = block(3, b"\1\2\3\4\5\6") + block(2, b"Int8") + block(1, b"\2") + b"\x08\x03"
    path = put(tmp_path / "x.ckpt", block(1, block(2, tensor) + block(1, b"w")))
    assert_holds(path, {"w": ("I8", np.array([[1, 2, 3], [4, 5, 6]], "|i1"))})


@given(st.integers(0, 2**64 - 1))
def test_varints(number: int) -> None:
    assert encode_varint(number) == varint(number)
    content = b"\x08" + varint(number)
    (field,) = read_fields(content, 0, len(content))
    assert (field.number, field.value, field.end) == (1, number, len(content))


@given(st.integers(-(2**63), 2**63 - 1))
def test_signed_numbers(number: int) -> None:
    assert to_signed(number % 2**64) == number
    assert to_signed(number % 2**64, 32) == int(np.int64(number).astype(np.int32))


@given(st.lists(st.one_of(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 300))), max_size=8))
def test_packed_and_single_numbers_mix(items: list[int | list[int]]) -> None:
    message, numbers = b"", []
    for item in items:
        if isinstance(item, int):
            message += b"\x08" + varint(item)
            numbers.append(item)
        else:
            message += block(1, b"".join(map(varint, item)))
            numbers += item
    fields = collect_fields(message, 0, len(message), 100).get(1, ())
    assert read_numbers(message, fields, 10_000) == tuple(numbers)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (b"\x08" + b"\x80" * 10 + b"\x01", "more than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08\x80", "does not end before byte 2"),
        (b"\x02\x00", "means nothing"),
        (b"\x0e\x00", "means nothing"),
        (varint(2**29 * 8) + b"\0", "means nothing"),
        (b"\x0a\x05abc", "reaches to byte 7"),
        (b"\x09\0\0\0", "reaches to byte 9"),
        (b"\x0b\x08\x01", "group 1 is not closed"),
        (b"\x0b\x14", "did not begin"),
        (b"\x0c", "did not begin"),
        (b"\x0b" * 200, "nest deeper"),
    ],
)
def test_messages_that_are_none(message: bytes, problem: str) -> None:
    with pytest.raises(WireError, match=problem):
        list(read_fields(message, 0, len(message)))


def test_no_list_fills_the_memory() -> None:
    with pytest.raises(WireError, match="more than 10 fields"):
        collect_fields(b"\x08\x01" * 11, 0, 22, 10)
    with pytest.raises(WireError, match="more than 10 numbers"):
        read_numbers(block(1, b"\x01" * 11), read_fields(block(1, b"\x01" * 11), 0, 13), 10)


# --- damage -----------------------------------------------------------------------------------

DAMAGED = {
    "empty": (b"", "is empty"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{}", "begins with the bytes 40 00 00 00"),
    "zip": (b"PK\3\4", "no MindSpore checkpoint"),
    "strategy": (b"\x08\x01", "strategy file"),
    "encrypted": (bytes.fromhex("d85e3a7f00000000"), "AES-GCM"),
    "encrypted sm4": (bytes.fromhex("da5e3a7f00000000"), "SM4-CBC"),
    "absurd length": (b"\x0a" + varint(2**60), "byte 0, field 1 reaches to byte"),
    "no tag": (record("w") + block(1, block(2, block(2, b"Int8"))), "byte 22, a record has 0 fi"),
    "two tags": (block(1, block(1, b"a") + block(1, b"b")), "2 fields tag"),
    "no tensor": (block(1, block(1, b"w")), "0 fields tensor"),
    "no type": (block(1, block(1, b"w") + block(2, block(3, b""))), "0 fields tensor_type"),
    "no content": (block(1, block(1, b"w") + block(2, block(2, b"Int8"))), "0 fields tensor_cont"),
    "map": (block(1, block(1, b"w") + block(3, b"")), "'w' at byte 0 is a hash table"),
    "tag is no text": (record(b"\xff\xfe"), "byte 4, a name is not UTF-8"),
    "long tag": (record(b"w" * 70000), "a name has 70000 bytes"),
    "short content": (record("w", "Float32", [2], b"1234567"), r"\[2\], 8 bytes, but its 1 rec"),
    "long content": (record("w", "Float32", [1], b"12345678"), "hold 8"),
    "negative dims": (record("w", "Float32", [-1, -1]), r"dims \[-1, -1\]"),
    "absurd dims": (record("w", "Float32", [2**62, 2**62]), "dims"),
    "absurd dims of nothing": (record("w", "Float32", [0, 2**62], b""), "dims"),
    "many dims": (record("w", "Float32", [1] * 33), "more than 32 numbers"),
    "int4": (record("w", "Int4", [2], b"\1\1"), "given: Int4"),
    "complex": (record("w", "Complex64", [], bytes(8)), "given: Complex64"),
    "second type": (
        record("w", "Int8", [2], b"1") + record("w", "UInt8", [2], b"1"),
        r"byte 18, 'w' is Int8 \[2\] and then UInt8 \[2\]",
    ),
    "second dims": (
        record("w", "Int8", [1], b"1") + record("w", "Int8", [2], b"12"),
        r"Int8 \[1\] and then Int8 \[2\]",
    ),
    "twice the same": (record("w", "Int8", [2], b"12") * 2, "its 2 records hold 4"),
    "chunk missing": (record("w", "Int8", [3], b"1") * 2, "its 2 records hold 2"),
    "comes again": (record("w") + record("v") + record("w"), "byte 44, 'w' comes again"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    content, problem = DAMAGED[kind]
    path = put(tmp_path / "x.ckpt", content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_file(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_seen_but_at_a_record(tmp_path: Path) -> None:
    """The format has no length: a file that ends behind a record of another tensor is sound."""
    path = tmp_path / "x.ckpt"
    first, second = record("v"), record("w", "Int8", [4], b"12") * 2
    for length in range(1, len(first + second)):
        put(path, (first + second)[:length])
        if length == len(first):
            assert list(open_file(path)) == ["v"]
            continue
        with pytest.raises(CheckpointError):
            open_file(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.ckpt", tmp_path):
        for reader in (open_file, read_strings, verify_crc):
            with pytest.raises(CheckpointError, match="cannot be read"):
                reader(path)


def test_strings_that_are_none(tmp_path: Path) -> None:
    path = put(tmp_path / "x.ckpt", record("s", "str", [0], b"\xff" * 4))
    assert open_file(path) == {}
    with pytest.raises(CheckpointError, match="'s' is not text"):
        read_strings(path)
    assert read_strings(put(path, record("s", "str", [0], bytes(4)))) == {"s": ""}


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", {"w": ("I8", np.zeros(8, "|i1"))}, chunk_bytes=4)
    tensor = open_file(path)["w"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="has changed"):
        tensor.read()


# --- the writer -------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", {"w": ("F32", np.ones(3, "<f4"))})
    path.chmod(0o400)  # as MindSpore leaves it
    before = path.read_bytes()
    table = {"a": ("F32", (2,)), "b": ("F32", (2,))}
    streams: dict[str, list[tuple[str, np.ndarray]]] = {
        "out of turn": [("b", np.ones(2, "<f4"))],
        "not what was announced": [("a", np.ones(3, "<f4"))],
        "1 of 2 tensors were not written": [("a", np.ones(2, "<f4"))],
    }
    for problem, stream in streams.items():
        with pytest.raises(CheckpointError, match=problem):
            write_file(path, table, stream)
        assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]
        assert path.read_bytes() == before
    save(path, {"w": ("F32", np.zeros(3, "<f4"))})
    assert open_file(path)["w"].read().tolist() == [0, 0, 0]
    assert path.stat().st_mode & 0o600 == 0o600


@pytest.mark.parametrize(
    "value", [2**63, -(2**63) - 1, None, [1], 1e300, "\ud800", np.float32(1)], ids=repr
)
def test_values_that_cannot_be_appended(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="'v' cannot be appended"):
        write_file(tmp_path / "x.ckpt", {}, [], append={"v": value})
    assert not list(tmp_path.iterdir())


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    tensors: Tensors = {"w": ("F32", np.ones(3, "<f4"))}
    with pytest.raises(CheckpointError, match="share a name"):
        save(tmp_path / "x.ckpt", tensors, append={"w": 1})
    with pytest.raises(CheckpointError, match="no UTF-8 form"):
        save(tmp_path / "x.ckpt", {"\ud800": tensors["w"]})
    with pytest.raises(CheckpointError, match="has 70000 bytes"):
        save(tmp_path / "x.ckpt", {"w" * 70000: tensors["w"]})
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "absent" / "x.ckpt", tensors)
    assert not list(tmp_path.iterdir())


# --- fuzzing ----------------------------------------------------------------------------------

FUZZ_INPUTS = 6000
FUZZ_SECONDS = 15

Mutation = Callable[[random.Random, bytearray], None]


def change_byte(chance: random.Random, content: bytearray) -> None:
    content[chance.randrange(len(content))] = chance.randrange(256)


def change_to_extreme(chance: random.Random, content: bytearray) -> None:
    content[chance.randrange(len(content))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])


def insert_bytes(chance: random.Random, content: bytearray) -> None:
    position = chance.randrange(len(content) + 1)
    content[position:position] = chance.choice(
        [b"\xff" * chance.randrange(1, 11), chance.randbytes(3), *UNKNOWN]
    )


def remove_bytes(chance: random.Random, content: bytearray) -> None:
    begin = chance.randrange(len(content))
    del content[begin : begin + chance.randrange(1, 8)]


def repeat_bytes(chance: random.Random, content: bytearray) -> None:
    begin = chance.randrange(len(content))
    content[begin:begin] = content[begin : begin + chance.randrange(1, 60)]


def truncate(chance: random.Random, content: bytearray) -> None:
    del content[chance.randrange(1, len(content) + 1) :]


MUTATIONS: tuple[Mutation, ...] = (
    change_byte, change_to_extreme, insert_bytes, remove_bytes, repeat_bytes, truncate,
)  # fmt: skip


def test_fuzz(tmp_path: Path) -> None:
    """Damage gives a CheckpointError or tensors that can be read and are what they say."""
    chance = random.Random(3)
    seeds = [
        GOLDEN,
        GOLDEN + b"crc_num" + zlib.crc32(GOLDEN).to_bytes(10, "big"),
        record("w", "Int16", [3, 2], b"123456") * 2 + record("s", "str", [0], b"a\0\0\0"),
        record("x", "BFloat16", [2, 300], bytes(600)) * 2 + record("y", "Bool", [3], b"\0\1\0"),
    ]
    path, outcomes, begin = tmp_path / "x.ckpt", {"sound": 0, "refused": 0}, time.monotonic()
    for _ in range(FUZZ_INPUTS):
        content = bytearray(chance.choice(seeds))
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            chance.choice(MUTATIONS)(chance, content)
            content = content or bytearray(b"\0")
        path.write_bytes(content)
        try:
            for tensor in open_file(path).values():
                array = tensor.read()
                assert (array.dtype.str, array.shape) == (
                    np.dtype(NUMPY_DTYPES[tensor.dtype]).str,
                    tensor.shape,
                )
                assert array.nbytes == tensor.nbytes <= len(content)
            assert all(isinstance(text, str) for text in read_strings(path).values())
            verify_crc(path)
            outcomes["sound"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
        if time.monotonic() - begin > FUZZ_SECONDS:
            break
    assert min(outcomes.values()) > 100, outcomes
