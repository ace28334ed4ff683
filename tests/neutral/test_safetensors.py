"""The safetensors reader and writer against the safetensors library, and against damage."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_convert.errors import CheckpointError
from weight_convert.storage.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    ShardWriter,
    open_directory,
    open_file,
    write_shards,
)
from weight_convert.storage.tensor import NUMPY_DTYPES

LIBRARY_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

Tensors = dict[str, tuple[str, np.ndarray]]
"""name -> (dtype code, array; bfloat16 as uint16)"""


def library_bytes(tensors: Tensors) -> bytes:
    """What the library writes; its low-level function takes bfloat16 too."""
    described = {
        name: safetensors.TensorSpec(
            dtype=LIBRARY_DTYPES.get(code, array.dtype.name),
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, (code, array) in tensors.items()
    }
    return safetensors.serialize(described, {"format": "pt"})


def write(directory: Path, tensors: Tensors, **options: Any) -> None:
    table = {name: (code, array.shape) for name, (code, array) in tensors.items()}
    arrays = ((name, array) for name, (_, array) in tensors.items())
    write_shards(directory, table, arrays, **options)


@st.composite
def arrays(draw: Any) -> tuple[str, np.ndarray]:
    code = draw(st.sampled_from(list(NUMPY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    seed = draw(st.integers(0, 2**32 - 1))
    dtype = np.dtype(NUMPY_DTYPES[code])
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, size, np.uint8)
    return code, np.frombuffer(raw.tobytes(), dtype).reshape(shape)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=150, deadline=None)
@given(tensors=st.dictionaries(NAMES, arrays(), max_size=8), data=st.data())
def test_files_are_byte_for_byte_the_librarys(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("st")
    order = data.draw(st.permutations(list(tensors)))
    with ShardWriter(directory, {n: (c, a.shape) for n, (c, a) in tensors.items()}) as writer:
        for name in order:
            writer.write(name, tensors[name][1])
    assert (directory / SINGLE_FILE).read_bytes() == library_bytes(tensors)
    assert [path.name for path in directory.iterdir()] == [SINGLE_FILE]


@settings(max_examples=100, deadline=None)
@given(tensors=st.dictionaries(NAMES, arrays(), max_size=8))
def test_the_librarys_files_are_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors
) -> None:
    path = tmp_path_factory.mktemp("st") / SINGLE_FILE
    path.write_bytes(library_bytes(tensors))
    file = open_file(path)
    assert file.metadata == {"format": "pt"}
    assert file.entries.keys() == tensors.keys()
    for name, (code, array) in tensors.items():
        assert file.entries[name].dtype == code
        read = file.tensor(name).read()
        assert read.dtype == array.dtype and read.shape == array.shape
        assert read.tobytes() == array.tobytes()


def test_the_library_reads_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"layer.{n}": ("F32", np.full((10, 10), n, np.float32)) for n in range(7)}
    write(tmp_path, tensors, max_shard_bytes=800)
    names = sorted(path.name for path in tmp_path.iterdir())
    shards = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    assert names == [*shards, INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 2800}
    for name, (_, array) in tensors.items():
        with safetensors.safe_open(tmp_path / index["weight_map"][name], "np") as file:
            assert np.array_equal(file.get_tensor(name), array)
    assert {n: s.read().tobytes() for n, s in open_directory(tmp_path).items()} == {
        name: array.tobytes() for name, (_, array) in tensors.items()
    }


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    sizes = {"a": 1, "b": 100, "c": 1, "d": 1}
    write(tmp_path, {n: ("U8", np.zeros(s, np.uint8)) for n, s in sizes.items()}, max_shard_bytes=3)
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    assert len({weight_map["a"], weight_map["b"], weight_map["c"]}) == 3
    assert weight_map["c"] == weight_map["d"]


def test_bfloat16_is_carried_as_uint16(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)  # 1, -2
    write(tmp_path, {"x": ("BF16", bits)})
    assert open_file(tmp_path / SINGLE_FILE).tensor("x").read().tolist() == bits.tolist()
    entries = safetensors.deserialize((tmp_path / SINGLE_FILE).read_bytes())
    assert [(name, entry["dtype"]) for name, entry in entries] == [("x", "BF16")]


def test_arrays_are_private_and_need_no_order(tmp_path: Path) -> None:
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write(tmp_path, {"x": ("F32", transposed)})
    before = (tmp_path / SINGLE_FILE).read_bytes()
    array = open_file(tmp_path / SINGLE_FILE).tensor("x").read()
    assert array.tolist() == transposed.tolist()
    array[:] = 0
    assert (tmp_path / SINGLE_FILE).read_bytes() == before


def test_unaligned_tensors_come_aligned(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
    assert (8 + len(header)) % 8
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<d", 2.5))
    array = open_file(path).tensor("x").read()
    assert array.flags.aligned and array.tolist() == [2.5]


# --- an interrupted or wrong writer --------------------------------------------------------------

TABLE = {"a": ("F32", (2,)), "b": ("F32", (2,))}
PAIR = np.zeros(2, np.float32)


def test_an_unfinished_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, TABLE) as writer:
        writer.write("a", PAIR)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_must_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="1 of 2 tensors were not written"):
        write_shards(tmp_path, TABLE, [("a", PAIR)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("c", PAIR)], "not in the table"),
        ([("a", PAIR), ("a", PAIR)], "was written before"),
        ([("a", np.zeros(3, np.float32))], r"float32 \(2,\)"),
        ([("a", np.zeros(2, np.float16))], "float16"),
    ],
)
def test_only_what_was_announced_is_written(
    tmp_path: Path, tensors: list[tuple[str, np.ndarray]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_shards(tmp_path, TABLE, tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{call}", refuse)
    with pytest.raises(CheckpointError, match=r"(?s)cannot be written.*No space left"):
        write_shards(tmp_path, TABLE, [("a", PAIR), ("b", PAIR)])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/below cannot be written"):
        write_shards(tmp_path / "file" / "below", TABLE, [])


def test_weights_are_not_overwritten(tmp_path: Path) -> None:
    write_shards(tmp_path, TABLE, [("a", PAIR), ("b", PAIR)])
    with pytest.raises(CheckpointError, match="already holds weights"):
        write_shards(tmp_path, TABLE, [("a", PAIR), ("b", PAIR)])


# --- damage --------------------------------------------------------------------------------------


def a_file(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    """A file with any header; `length` in place of the true one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list | None = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


DAMAGE: dict[str, tuple[Any, bytes, str]] = {
    "not UTF-8": (b'{"\xff', b"", "not UTF-8 at byte 10"),
    "not JSON": (b"{x", b"", "bytes 8 to 10"),
    "not an object": ([], b"", "not a JSON object"),
    "nested without end": (b"[" * 100_000, b"", "nested without end"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", "'a' appears twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "table of strings"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x", "dtype"),
    "an entry that is no object": ({"a": 3}, b"", "not described"),
    "negative shape": ({"a": entry(0, 1, shape=[-1])}, b"x", "not described"),
    "shape of booleans": ({"a": entry(0, 1, shape=[True])}, b"x", "not described"),
    "three offsets": ({"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"x", "not described"),
    "unknown dtype": ({"a": entry(0, 1, "F8_E4M3")}, b"x", "F8_E4M3"),
    "shape and size": ({"a": entry(0, 4, "F32", [2])}, b"abcd", "8 bytes, but its offsets 0 to 4"),
    "offsets backwards": ({"a": entry(0, 1) | {"data_offsets": [1, 0]}}, b"x", "hold -1"),
    "empty, and endless": ({"a": entry(0, 0, "F32", [0, 2**62])}, b"", "cannot be"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, b"abc", "overlap"),
    "gap": ({"a": entry(0, 1), "b": entry(2, 3)}, b"abc", "leave a gap"),
    "gap at the start": ({"a": entry(1, 2)}, b"ab", "the header and tensor 'a' leave a gap"),
    "bytes left over": ({"a": entry(0, 1)}, b"abc", "end at byte"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_headers_are_named(tmp_path: Path, name: str) -> None:
    header, data, message = DAMAGE[name]
    path = a_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        open_file(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"abc", "it has 3 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", f"the header has {2**63} bytes"),
        (struct.pack("<Q", 100) + b"{}", "reaches to byte 108, the file has 10 bytes"),
    ],
)
def test_absurd_lengths_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_file(path)


def test_a_truncated_file_says_what_is_lost(tmp_path: Path) -> None:
    write(tmp_path, {n: ("U8", np.zeros(100, np.uint8)) for n in ("a", "b", "c")})
    path = tmp_path / SINGLE_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-150])
    with pytest.raises(CheckpointError) as caught:
        open_file(path)
    text = str(caught.value)
    assert f"{path} is truncated" in text and "b, c" in text
    assert f"{len(whole) - 150} bytes" in text and f"{len(whole)} bytes" in text


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read"):
        open_file(tmp_path / "none.safetensors")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Flipped bits, cuts and insertions never give another exception, nor a read out of bounds."""
    tensors = {"a": ("F32", np.ones((3, 2), np.float32)), "b": ("BF16", np.ones(5, np.uint16))}
    content = bytearray(library_bytes(tensors))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                content[position] = data.draw(st.integers(0, 255))
            case "cut":
                del content[position : position + data.draw(st.integers(1, 20))]
            case "insert":
                content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
        if not content:
            break
    path = tmp_path_factory.mktemp("st") / SINGLE_FILE
    path.write_bytes(content)
    try:
        file = open_file(path)
    except CheckpointError:
        return
    for name, place in file.entries.items():
        assert place.end <= len(content)
        assert file.tensor(name).read().nbytes == place.end - place.begin


# --- directories ---------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = {name: ("U8", np.zeros(10, np.uint8)) for name in "abcd"}
    write(tmp_path, tensors, max_shard_bytes=20)
    return tmp_path


def edit_index(directory: Path, **changes: Any) -> None:
    path = directory / INDEX_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 files .*: model-00002-of-00002"):
        open_directory(sharded)


def test_an_index_that_disagrees_is_refused(sharded: Path) -> None:
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    edit_index(sharded, weight_map={"a": first, "b": first, "c": second, "e": second})
    with pytest.raises(CheckpointError, match=rf"not in the shard it names: e \(in {second}\)"):
        open_directory(sharded)
    edit_index(sharded, weight_map={"a": first, "b": first, "c": second})
    with pytest.raises(CheckpointError, match=rf"1 tensors are in a shard .*: d \(in {second}\)"):
        open_directory(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
def test_an_unusable_index_is_refused(sharded: Path, weight_map: Any) -> None:
    edit_index(sharded, weight_map=weight_map)
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        open_directory(sharded)


def test_an_index_cannot_reach_outside(sharded: Path) -> None:
    edit_index(sharded, weight_map={"a": "../secret.safetensors"})
    with pytest.raises(CheckpointError, match="outside its directory"):
        open_directory(sharded)


def test_an_index_that_is_no_json_is_refused(sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        open_directory(sharded)


def test_two_sets_of_weights_are_refused(sharded: Path) -> None:
    (sharded / SINGLE_FILE).write_bytes(library_bytes({}))
    with pytest.raises(CheckpointError, match="two sets of weights"):
        open_directory(sharded)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        open_directory(tmp_path)


# --- memory --------------------------------------------------------------------------------------


def test_copying_a_large_checkpoint_stays_small(tmp_path: Path) -> None:
    """Peak memory below 3 * largest tensor + 200 MiB, in a process of its own."""
    script = """
        import sys
        import numpy as np
        from backends.process import peak_resident_bytes
        from weight_convert.storage.safetensors import open_directory, write_shards

        source, target = sys.argv[1:]
        table = {f"t{n}": ("U16", (4 * 2**20,)) for n in range(48)}
        zeros = np.zeros(4 * 2**20, np.uint16)
        write_shards(source, table, ((name, zeros) for name in table), max_shard_bytes=2**27)
        stored = open_directory(source)
        write_shards(target, table, ((n, place.read()) for n, place in stored.items()))
        print(peak_resident_bytes() // 2**20)
    """
    arguments = [str(tmp_path / "source"), str(tmp_path / "target")]
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(output.stdout) < 3 * 8 + 200
