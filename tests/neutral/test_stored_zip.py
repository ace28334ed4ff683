"""Archives of stored entries, with Python's zipfile as the judge, and what is wrong with others."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_convert.errors import CheckpointError
from weight_convert.storage import stored_zip
from weight_convert.storage.stored_zip import ALIGNMENT, Entry, ZipWriter, read_bytes, read_entries

CONTENTS = {"data.pkl": b"program", "data/0": bytes(range(100)), "data/1": b"", "version": b"3\n"}


def build(contents: dict[str, bytes] = CONTENTS, folder: str = "model") -> bytes:
    file = io.BytesIO()
    writer = ZipWriter(file, folder)
    for name, data in contents.items():
        writer.add(name, data)
    writer.finish()
    return file.getvalue()


def build_with_zipfile(contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], dict[str, Entry]]:
    def read(data: bytes) -> dict[str, Entry]:
        path = tmp_path / "x.zip"
        path.write_bytes(data)
        return read_entries(path)

    return read


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\\/\0."), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(contents=st.dictionaries(NAMES, st.binary(max_size=200), max_size=6))
def test_zipfile_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]
) -> None:
    data = build(contents)
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.testzip() is None
    assert {name: archive.read(name) for name in archive.namelist()} == {
        f"model/{name}": content for name, content in contents.items()
    }
    path = tmp_path_factory.mktemp("zip") / "x.zip"
    path.write_bytes(data)
    for name, entry in read_entries(path).items():
        assert entry.offset % ALIGNMENT == 0
        assert read_bytes(path, entry, 1000) == contents[name.removeprefix("model/")]


@settings(max_examples=60, deadline=None)
@given(contents=st.dictionaries(NAMES, st.binary(max_size=200), max_size=6))
def test_what_zipfile_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]
) -> None:
    path = tmp_path_factory.mktemp("zip") / "x.zip"
    path.write_bytes(build_with_zipfile(contents))
    entries = read_entries(path)
    assert {name: read_bytes(path, entry, 1000) for name, entry in entries.items()} == contents


def test_large_entries_are_summed_too(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3 * 2**20)
    data = build({"data/0": content})
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


class SparseFile:
    """A file in which large runs of zeros take no room."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: bytes | memoryview) -> None:
        if len(data) > 2**24:
            self.file.seek(len(data), 1)
        else:
            self.file.write(data)


@pytest.mark.parametrize("size", [2**32 - 2, 2**32 - 1, 2**32, 2**32 + 12345])
def test_beyond_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(zlib, "crc32", lambda data: 0)  # 4 GiB take seconds
    path = tmp_path / "x.zip"
    sparse = SparseFile(path)
    writer = ZipWriter(sparse, "model")
    writer.add("large", np.zeros(size, np.uint8).data)
    writer.add("behind", b"abcdef")
    writer.finish()
    sparse.file.close()
    entries = read_entries(path)
    assert {name: entry.size for name, entry in entries.items()} == {
        "model/large": size,
        "model/behind": 6,
    }
    place = entries["model/behind"].offset
    assert place > size and place % ALIGNMENT == 0
    assert read_bytes(path, entries["model/behind"], 6) == b"abcdef"
    monkeypatch.undo()
    archive = zipfile.ZipFile(path)
    assert archive.getinfo("model/large").file_size == size
    with archive.open("model/large") as large:
        assert large.read(10) == bytes(10)


# --- what is refused -------------------------------------------------------------------------


def test_compression_is_refused(read: Callable[[bytes], dict[str, Entry]]) -> None:
    """So an archive can be no bomb: its contents are never larger than itself."""
    bomb = build_with_zipfile({"data.pkl": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        read(bomb)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a\\b", "..", "a/.."])
def test_names_that_lead_out(read: Callable[[bytes], dict[str, Entry]], name: str) -> None:
    with pytest.raises(CheckpointError, match="leads out"):
        read(build_with_zipfile({name: b""}))


def test_the_same_name_twice(read: Callable[[bytes], dict[str, Entry]]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, pytest.warns(UserWarning):
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    with pytest.raises(CheckpointError, match="twice"):
        read(file.getvalue())


def test_absent_and_foreign_files(tmp_path: Path, read: Callable[..., object]) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_entries(tmp_path / "absent")
    for data in (b"", b"PK\x03\x04", b"x" * 1000):
        with pytest.raises(CheckpointError, match="truncated"):
            read(data)


def test_comments_and_bytes_before_or_behind(read: Callable[..., object]) -> None:
    """They are ways to make one reader see another archive than the next one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = b"hello"
        archive.writestr("a", b"1")
    for data in (file.getvalue(), build() + b"x", b"x" + build(), build() + build()):
        with pytest.raises(CheckpointError):
            read(data)


CENTRAL, LOCAL, END, END64 = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06"


def patched(mark: bytes, offset: int, layout: str, value: int, *, number: int = 0) -> bytes:
    """A sound archive with one field changed, `offset` bytes behind the given mark."""
    data = bytearray(build())
    place = -1
    for _ in range(number + 1):
        place = data.index(mark, place + 1)
    struct.pack_into(layout, data, place + offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    "mark, offset, layout, value",
    [
        (CENTRAL, 8, "<H", 1),  # encrypted
        (CENTRAL, 10, "<H", 8),  # deflated
        (CENTRAL, 20, "<I", 8),  # sizes
        (CENTRAL, 24, "<I", 8),
        (CENTRAL, 28, "<H", 0),  # lengths of the name, of fields, of a comment
        (CENTRAL, 28, "<H", 60_000),
        (CENTRAL, 30, "<H", 50),
        (CENTRAL, 32, "<H", 60_000),
        (CENTRAL, 34, "<H", 1),  # disk
        (CENTRAL, 42, "<I", 1),  # place
        (CENTRAL, 42, "<I", 0xFFFFFFF0),
        (CENTRAL, 42, "<I", 0xFFFFFFFF),
        (CENTRAL, 46, "<B", 0xFF),  # the name
        (LOCAL, 8, "<H", 8),
        (LOCAL, 18, "<I", 3),
        (LOCAL, 22, "<I", 3),
        (LOCAL, 26, "<H", 3),
        (LOCAL, 28, "<H", 60_000),
        (LOCAL, 30, "<B", 65),
        (END64, 16, "<I", 1),
        (END64, 24, "<Q", 3),
        (END64, 32, "<Q", 5),
        (END64, 32, "<Q", 2**63),
        (END64, 40, "<Q", 1),
        (END64, 48, "<Q", 2**64 - 1),
        (b"PK\x06\x07", 8, "<Q", 2**63),
        (END, 20, "<H", 1),
    ],
)
def test_lies_are_found(
    read: Callable[[bytes], object], mark: bytes, offset: int, layout: str, value: int
) -> None:
    with pytest.raises(CheckpointError):
        read(patched(mark, offset, layout, value))


def test_entries_over_one_another(read: Callable[[bytes], object]) -> None:
    """The header of the second entry lies in the bytes of the first."""
    inner = LOCAL + bytes(22) + struct.pack("<HH", 7, 0) + b"model/b"
    data = bytearray(build({"a": inner + b"contents", "b": b""}))
    second = data.index(CENTRAL, data.index(CENTRAL) + 1)
    struct.pack_into("<I", data, second + 42, data.index(inner))
    with pytest.raises(CheckpointError, match="over another"):
        read(bytes(data))


def test_absurd_numbers_of_entries(
    read: Callable[[bytes], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_zip, "MAX_ENTRIES", 3)
    with pytest.raises(CheckpointError, match="4 entries"):
        read(build())


def test_crcs_and_sizes_of_what_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(build().replace(b"program", b"PROGRAM"))
    entry = read_entries(path)["model/data.pkl"]
    with pytest.raises(CheckpointError, match="CRC"):
        read_bytes(path, entry, 100)
    with pytest.raises(CheckpointError, match="plenty"):
        read_bytes(path, entry, 3)
    # torch can be told to compute none.
    assert read_bytes(path, Entry(entry.offset, entry.size, 0), 100) == b"PROGRAM"


SEED, FUZZ_INPUTS = 21, 6000


def test_every_truncation_is_noticed(read: Callable[[bytes], object]) -> None:
    data = build()
    for cut in range(len(data)):
        with pytest.raises(CheckpointError):
            read(data[:cut])


def test_fuzzed_archives(tmp_path: Path) -> None:
    """An error of ours, or entries that lie within the file and beside one another."""
    chance, path = random.Random(SEED), tmp_path / "x.zip"
    sources = [build(), build_with_zipfile(CONTENTS)]
    results = 0
    for number in range(FUZZ_INPUTS):
        data = bytearray(sources[number % 2])
        table = data.index(CENTRAL)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(table if chance.random() < 0.7 else 0, len(data))
            data[place] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        path.write_bytes(data)
        try:
            entries = read_entries(path)
        except CheckpointError:
            continue
        results += 1
        position = 0
        for entry in sorted(entries.values(), key=lambda entry: entry.offset):
            assert position <= entry.offset and entry.offset + entry.size <= table
            position = entry.offset + entry.size
    assert 0 < results < FUZZ_INPUTS
