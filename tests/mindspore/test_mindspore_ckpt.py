"""`.ckpt` files against MindSpore's own: byte for byte, both directions, and against protobuf."""

from __future__ import annotations

import filecmp
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore.train import serialization
from mindspore.train.checkpoint_pb2 import Checkpoint

from weight_convert.errors import CheckpointError
from weight_convert.storage.mindspore_ckpt import (
    CHUNK_BYTES,
    TENSOR_TYPES,
    open_file,
    read_strings,
    verify_crc,
    write_file,
)
from weight_convert.storage.tensor import NUMPY_DTYPES, Tensor

Tensors = dict[str, tuple[str, np.ndarray]]
"""name -> (dtype code, array; bfloat16 as uint16)"""


def to_mindspore(code: str, array: np.ndarray) -> ms.Tensor:
    if code != "BF16":
        return ms.Tensor(array)
    wide = np.left_shift(array, 16, dtype=np.uint32).reshape(-1).view(np.float32)
    return ms.Tensor(wide.reshape(array.shape), ms.bfloat16)


def theirs(path: Path, tensors: Tensors, **options: Any) -> Path:
    """Saved by MindSpore."""
    named = [{"name": n, "data": to_mindspore(*tensor)} for n, tensor in tensors.items()]
    ms.save_checkpoint(named, str(path), **options)
    serialization._wait_async_thread_save_ckpt()
    return path


def ours(path: Path, tensors: Tensors, **options: Any) -> Path:
    table = {name: (code, array.shape) for name, (code, array) in tensors.items()}
    write_file(path, table, ((name, array) for name, (_, array) in tensors.items()), **options)
    return path


def assert_equal(opened: Mapping[str, Tensor], tensors: Tensors) -> None:
    assert list(opened) == list(tensors)
    for name, (code, array) in tensors.items():
        assert (opened[name].dtype, opened[name].shape) == (code, array.shape)
        assert opened[name].read().tobytes() == array.tobytes()


def assert_mindspore_loads(path: Path, tensors: Tensors) -> None:
    loaded = ms.load_checkpoint(str(path))
    assert list(loaded) == list(tensors)
    for name, (code, array) in tensors.items():
        assert loaded[name].shape == array.shape
        assert TENSOR_TYPES[str(loaded[name].dtype)] == code
        assert loaded[name].get_bytes() == array.tobytes()


@st.composite
def arrays(draw: Any) -> tuple[str, np.ndarray]:
    """Not empty: MindSpore leaves such tensors out."""
    code = draw(st.sampled_from(list(NUMPY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if code == "BF16":  # without NaN: MindSpore would make them all the same
        return code, np.asarray(chance.integers(0, 0x7F80, shape), np.uint16)
    dtype = np.dtype(NUMPY_DTYPES[code])
    size = int(np.prod(shape)) * dtype.itemsize
    raw = chance.integers(0, 2 if code == "BOOL" else 256, size, np.uint8)
    return code, np.frombuffer(raw.tobytes(), dtype).reshape(shape)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
NAMES = TEXT.filter(bool)
TENSORS = st.dictionaries(NAMES, arrays(), min_size=1, max_size=5)
VALUES = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(width=32), TEXT)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """MindSpore cuts at 1 KiB instead of 512 MiB; the number of bytes."""
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    return 1024


@settings(max_examples=40, deadline=None)
@given(tensors=TENSORS, append=st.dictionaries(NAMES, VALUES, max_size=4), crc=st.booleans())
def test_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, append: dict[str, Any], crc: bool
) -> None:
    directory = tmp_path_factory.mktemp("ms")
    append = {name: value for name, value in append.items() if name not in tensors}
    their = theirs(directory / "their.ckpt", tensors, append_dict=append, crc_check=crc)
    our = ours(directory / "our.ckpt", tensors, append=append, crc=crc)
    assert our.read_bytes() == their.read_bytes()
    assert verify_crc(their) == crc
    opened = open_file(their)
    assert list(opened) == [*tensors, *(n for n, v in append.items() if not isinstance(v, str))]
    assert_equal({name: opened[name] for name in tensors}, tensors)
    assert read_strings(their) == {n: v for n, v in append.items() if isinstance(v, str)}


@settings(max_examples=40, deadline=None)
@given(tensors=TENSORS)
def test_mindspore_loads_ours(tmp_path_factory: pytest.TempPathFactory, tensors: Tensors) -> None:
    directory = tmp_path_factory.mktemp("ms")
    assert_mindspore_loads(ours(directory / "a.ckpt", tensors, crc=True), tensors)
    assert_mindspore_loads(ours(directory / "b.ckpt", tensors, chunk_bytes=7), tensors)


def chunked() -> Tensors:
    chance = np.random.default_rng(5)
    return {
        "small": ("F32", np.ones(256, "<f4")),
        "exact": ("I8", chance.integers(-9, 9, 2048, np.int8)),
        "rows": ("F32", chance.standard_normal((37, 29)).astype("<f4")),
        "one row": ("F16", chance.standard_normal((1, 3000)).astype("<f2")),
        "bf16": ("BF16", chance.integers(0, 0x7000, (600, 7), np.uint16)),
    }


@pytest.mark.parametrize("crc", [False, True])
def test_the_same_chunks(tmp_path: Path, small_chunks: int, crc: bool) -> None:
    their = theirs(tmp_path / "their.ckpt", chunked(), crc_check=crc)
    our = ours(tmp_path / "our.ckpt", chunked(), crc=crc, chunk_bytes=small_chunks)
    assert our.read_bytes() == their.read_bytes()
    assert {name: len(t.places) for name, t in open_file(their).items()} == {
        "small": 1, "exact": 2, "rows": 5, "one row": 6, "bf16": 9,
    }  # fmt: skip
    assert_equal(open_file(their), chunked())
    assert_mindspore_loads(our, chunked())


def test_chunks_of_async_save(tmp_path: Path, small_chunks: int) -> None:
    """Along axis 0, unequal, even empty; each with the dims of the whole tensor."""
    tensors = chunked()
    their = theirs(tmp_path / "their.ckpt", tensors, async_save="thread")
    assert_equal(open_file(their), tensors)
    records = Checkpoint.FromString(their.read_bytes()).value
    rows = [record.tensor for record in records if record.tag == "rows"]
    assert [len(tensor.tensor_content) for tensor in rows] == [928, 928, 812, 812, 812]
    assert {tuple(tensor.dims) for tensor in rows} == {(37, 29)}
    single = [record.tensor for record in records if record.tag == "one row"]
    assert [len(tensor.tensor_content) for tensor in single] == [6000, 0, 0, 0, 0, 0]


def test_more_than_512_mib(tmp_path: Path) -> None:
    """One real tensor of two chunks, at MindSpore's own size."""
    big = np.zeros((CHUNK_BYTES // 4096 + 1, 4096), "|i1")
    big[-1] = 7
    tensors: Tensors = {"big": ("I8", big), "small": ("F32", np.ones(1, "<f4"))}
    their = theirs(tmp_path / "their.ckpt", tensors)
    our = ours(tmp_path / "our.ckpt", tensors)
    try:
        assert filecmp.cmp(their, our, shallow=False)
        opened = open_file(their)
        assert len(opened["big"].places) == 2
        assert np.array_equal(opened["big"].read(), big)
    finally:
        shutil.rmtree(tmp_path)


def test_tensors_without_elements(tmp_path: Path) -> None:
    """`async_save` writes a record as we do; `save_checkpoint` alone leaves the tensor out."""
    tensors: Tensors = {"e": ("F32", np.ones((0, 3), "<f4")), "w": ("F32", np.ones(1, "<f4"))}
    our = ours(tmp_path / "our.ckpt", tensors)
    their = theirs(tmp_path / "async.ckpt", tensors, async_save="thread")
    assert our.read_bytes() == their.read_bytes()
    assert list(open_file(theirs(tmp_path / "their.ckpt", tensors))) == ["w"]
    loaded = ms.load_checkpoint(str(our))
    assert loaded["e"].shape == (0, 3)


def test_a_network_there_and_back(tmp_path: Path) -> None:
    """Cell -> their file -> our reader and writer -> their strict loading into another Cell."""
    first, second = (ms.nn.SequentialCell(ms.nn.Dense(4, 3), ms.nn.LayerNorm((3,))) for _ in "ab")
    append = {"epoch_num": 2, "loss_scale": 1024.0, "note": "half way"}
    ms.save_checkpoint(first, str(tmp_path / "a.ckpt"), append_dict=append)
    opened = open_file(tmp_path / "a.ckpt")
    table = {name: (tensor.dtype, tensor.shape) for name, tensor in opened.items()}
    texts = read_strings(tmp_path / "a.ckpt")
    assert (int(opened["epoch_num"].read()), texts) == (2, {"note": "half way"})
    write_file(tmp_path / "b.ckpt", table, ((n, t.read()) for n, t in opened.items()), append=texts)
    assert filecmp.cmp(tmp_path / "a.ckpt", tmp_path / "b.ckpt", shallow=False)
    loaded = ms.load_checkpoint(str(tmp_path / "b.ckpt"), net=None, crc_check=False)
    weights = {name: value for name, value in loaded.items() if name not in append}
    assert ms.load_param_into_net(second, weights, strict_load=True) == ([], [])
    x = ms.Tensor(np.ones((2, 4), np.float32))
    assert np.array_equal(first(x).asnumpy(), second(x).asnumpy())


def test_a_wrong_checksum_is_wrong_for_both(tmp_path: Path) -> None:
    path = ours(tmp_path / "x.ckpt", {"w": ("F32", np.ones(8, "<f4"))}, crc=True)
    ms.load_checkpoint(str(path), crc_check=True)
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum is wrong"):
        verify_crc(path)
    ms.load_checkpoint(str(path), crc_check=False)
    with pytest.raises(ValueError, match="Failed to read the checkpoint file"):
        ms.load_checkpoint(str(path), crc_check=True)


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encrypted_files_are_recognised(tmp_path: Path, mode: str) -> None:
    tensors: Tensors = {"w": ("F32", np.ones(1000, "<f4"))}
    path = theirs(tmp_path / "x.ckpt", tensors, enc_key=b"0123456789ABCDEF", enc_mode=mode)
    with pytest.raises(CheckpointError, match=f"encrypted\n.*{mode}"):
        open_file(path)


@pytest.mark.parametrize(("dtype", "name"), [("qint4x2", "Int4"), ("complex64", "Complex64")])
def test_types_without_numpy_are_refused_by_name(tmp_path: Path, dtype: str, name: str) -> None:
    if dtype == "qint4x2":
        data = ms.Tensor(np.ones((2, 2), np.int8), dtype=ms.qint4x2)
    else:
        data = ms.Tensor(np.ones((2, 2), np.complex64))
    ms.save_checkpoint([{"name": "w", "data": data}], str(tmp_path / "x.ckpt"))
    with pytest.raises(CheckpointError, match=f"'w' at byte 0 .*\n.*given: {name}"):
        open_file(tmp_path / "x.ckpt")


def mutated(chance: random.Random, seed: bytes) -> bytes:
    content = bytearray(seed)
    for _ in range(chance.choice([1, 1, 2])):
        position = chance.randrange(len(content))
        if chance.random() < 0.7:
            content[position] = chance.choice(
                [0, 1, 2, 10, 18, 26, 0x7F, 0x80, chance.randrange(256)]
            )
        elif chance.random() < 0.5:
            del content[position : position + chance.randrange(1, 5)]
        else:
            content[position:position] = chance.randbytes(chance.randrange(1, 4))
    return bytes(content or b"\0")


def message_tensors(content: bytes) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """What MindSpore's loader takes from a message: it joins neighbours and keeps the last dims."""
    values = Checkpoint.FromString(content).value
    for index, value in enumerate(values):
        if index and values[index - 1].tag == value.tag:
            continue
        run = [value]
        while index + len(run) < len(values) and values[index + len(run)].tag == value.tag:
            run.append(values[index + len(run)])
        content = b"".join(record.tensor.tensor_content for record in run)
        dims = () if list(run[-1].tensor.dims) == [0] and content else tuple(run[-1].tensor.dims)
        yield value.tag, value.tensor.tensor_type, dims, content


def test_what_we_accept_protobuf_reads_alike(tmp_path: Path) -> None:
    """Thousands of damaged files: none that we take for sound means something else to MindSpore."""
    tensors: Tensors = {
        "weight": ("F32", np.arange(6, dtype="<f4").reshape(2, 3)),
        "bias": ("I16", np.arange(4, dtype="<i2")),
    }
    append = {"step": 3, "note": "text"}
    seed = ours(tmp_path / "x.ckpt", tensors, append=append, chunk_bytes=12).read_bytes()
    chance, path, accepted = random.Random(8), tmp_path / "y.ckpt", 0
    for _ in range(4000):
        content = mutated(chance, seed)
        path.write_bytes(content)
        try:
            opened, texts = open_file(path), read_strings(path)
        except CheckpointError:
            continue
        accepted += 1
        try:
            expected = list(message_tensors(content))
        except DecodeError as error:
            pytest.fail(f"protobuf refuses what we accept: {content.hex()} {error}")
        assert [tag for tag, *_ in expected if tag in opened or tag in texts] == [
            tag for tag, *_ in expected
        ]
        assert len(opened) + len(texts) == len(expected)
        for tag, tensor_type, dims, raw in expected:
            if tensor_type == "str":
                assert texts[tag] == raw.decode("utf-32-le").rstrip("\0")
                continue
            assert (opened[tag].dtype, opened[tag].shape) == (TENSOR_TYPES[tensor_type], dims)
            assert opened[tag].read().tobytes() == raw
    assert accepted > 100
