"""ZIP archives whose entries are stored, not compressed: where each lies, and writing them.

torch.save makes such archives, so that a tensor can be mapped right out of the file. Python's own
`zipfile` neither says where an entry's bytes begin nor minds entries that overlap; this reader
takes nothing for granted. What it does not need it refuses: compression (and with it bombs),
encryption, comments, several disks, bytes before the first entry.

Source: PKWARE's APPNOTE.TXT 6.3; for what torch writes (alignment in a field "FB", descriptors
behind the entries, ZIP64 tables in every archive): PyTorch, caffe2/serialize/inline_container.cc
and the miniz that it carries.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from weight_convert.errors import CheckpointError

ALIGNMENT = 64
"""torch begins every entry at a multiple of it."""
MAX_ENTRIES = 1_000_000
MAX_TABLE_BYTES = 256 * 2**20

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_LOCAL_MARK, _CENTRAL_MARK, _END_MARK = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64_MARK, _LOCATOR_MARK, _DESCRIPTOR_MARK = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"
_LARGE = 2**20
"""Bytes from which on a second thread is worth its while."""
_FULL = 0xFFFFFFFF
"""A 32-bit field with this value refers to the ZIP64 field (id 1)."""
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 1 << 0, 1 << 3, 1 << 11


@dataclass(frozen=True)
class Entry:
    """One file of an archive: its bytes in the archive, and their CRC-32 (0: not computed)."""

    offset: int
    size: int
    crc: int


# --- reading ---------------------------------------------------------------------------------


def read_entries(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Name -> place of every entry, in the order of the archive's table.

    Raises CheckpointError if the file is absent, no ZIP archive, truncated, or damaged: entries
    that are compressed, encrypted, outside of the file or over one another, or names that appear
    twice or lead out of a directory.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Reader(file, path).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", given=error.strerror) from None


def read_bytes(path: Path, entry: Entry, most: int) -> bytes:
    """The contents of a small entry, checked against its CRC.

    Raises CheckpointError if it has more than `most` bytes or another CRC.
    """
    if entry.size > most:
        raise _damaged(path, f"an entry has {entry.size} bytes where {most} are plenty")
    try:
        with path.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", given=error.strerror) from None
    if len(data) != entry.size or (entry.crc and zlib.crc32(data) != entry.crc):
        raise _damaged(path, f"the bytes from {entry.offset} on do not have their CRC")
    return data


@dataclass(frozen=True)
class _Record:
    """An entry as the table describes it."""

    name: str
    header: int
    """Where its local header begins."""
    size: int
    crc: int


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = file.seek(0, os.SEEK_END)

    def read(self) -> dict[str, Entry]:
        count, start, end = self.find_table()
        records = self.read_table(count, start, end)
        entries: dict[str, Entry] = {}
        for record in records:
            self.check_name(record.name, entries)
            entries[record.name] = self.locate(record, start)
        self.check_overlaps(records, entries)
        return entries

    def at(self, offset: int, size: int) -> bytes:
        """`size` bytes, fewer if the file ends before; none for an offset outside of it."""
        if not 0 <= offset <= self.size:
            return b""
        self.file.seek(offset)
        return self.file.read(size)

    def unpack(self, layout: struct.Struct, mark: bytes, offset: int) -> tuple[int, ...] | None:
        """The fields behind a mark; None if they are not there."""
        data = self.at(offset, layout.size)
        if len(data) < layout.size or not data.startswith(mark):
            return None
        return layout.unpack(data)[1:]

    def find_table(self) -> tuple[int, int, int]:
        """Number of entries, and the bytes from which to which they are described."""
        end = self.size - _END.size
        fields = self.unpack(_END, _END_MARK, end)
        if fields is None:
            raise CheckpointError(
                f"{self.path} is truncated",
                given=f"{self.size} bytes, without a ZIP archive's end",
                expected="a table of entries at the end of the file, and nothing behind it",
                fix="download or copy it again",
            )
        disk, first_disk, here, count, size, start, comment = fields
        locator = self.unpack(_LOCATOR, _LOCATOR_MARK, end - _LOCATOR.size)
        if locator is not None:
            disk, end, disks = locator
            fields = self.unpack(_END64, _END64_MARK, end)
            if fields is None or end + _END64.size + _LOCATOR.size + _END.size != self.size:
                raise self.damaged("its ZIP64 table is not where it should be")
            _, _, _, disk, first_disk, here, count, size, start = fields
        if disk or first_disk or here != count or comment:
            raise self.damaged("it is one of several volumes, or has a comment")
        if start + size != end:
            raise self.damaged(
                f"its table should fill the bytes {start} to {end}, and has {size} bytes"
            )
        if count > MAX_ENTRIES or size > MAX_TABLE_BYTES:
            raise self.damaged(f"its table has {count} entries in {size} bytes")
        return count, start, end

    def read_table(self, count: int, start: int, end: int) -> list[_Record]:
        table = self.at(start, end - start)
        records, position = [], 0
        for _ in range(count):
            record, position = self.read_record(table, position)
            records.append(record)
        if position != len(table):
            raise self.damaged(f"its table has {len(table) - position} bytes left over")
        return records

    def read_record(self, table: bytes, position: int) -> tuple[_Record, int]:
        head = table[position : position + _CENTRAL.size]
        if len(head) < _CENTRAL.size or not head.startswith(_CENTRAL_MARK):
            raise self.damaged(f"its table ends early, at byte {position} of {len(table)}")
        fields = _CENTRAL.unpack(head)
        _, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, header = fields
        position += _CENTRAL.size
        parts = []
        for length in lengths:
            parts.append(table[position : position + length])
            position += length
        if position > len(table):
            raise self.damaged("its table ends early")
        name = self.decode(parts[0])
        size, packed, header = self.widen(name, parts[1], [size, packed, header])
        if flags & _ENCRYPTED or disk:
            raise self.damaged(f"entry {name!r} is encrypted, or on another disk")
        if method or packed != size:
            raise CheckpointError(
                f"{self.path}: entry {name!r} is compressed",
                given=f"method {method}, {packed} bytes for {size}",
                expected="stored entries, as torch.save writes them (TorchScript compresses some)",
                fix="save the state dict with torch.save",
            )
        return _Record(name, header, size, crc), position

    def widen(self, name: str, extra: bytes, values: list[int]) -> list[int]:
        """Put in what the ZIP64 field holds: one number for each that did not fit."""
        wide = self.find_field(name, extra, 1) if _FULL in values else b""
        missing = values.count(_FULL)
        if len(wide) < 8 * missing:
            raise self.damaged(f"entry {name!r} has no ZIP64 sizes")
        numbers = iter(struct.unpack_from(f"<{missing}Q", wide))
        return [next(numbers) if value == _FULL else value for value in values]

    def find_field(self, name: str, extra: bytes, wanted: int) -> bytes:
        while len(extra) >= 4:
            kind, length = struct.unpack_from("<2H", extra)
            if len(extra) < 4 + length:
                raise self.damaged(f"entry {name!r} has a field that reaches out of it")
            if kind == wanted:
                return extra[4 : 4 + length]
            extra = extra[4 + length :]
        return b""

    def decode(self, name: bytes) -> str:
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"the name {name!r} is not UTF-8") from None

    def check_name(self, name: str, entries: Mapping[str, Entry]) -> None:
        if name in entries:
            raise self.damaged(f"entry {name!r} appears twice")
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise self.damaged(f"entry {name!r} leads out of its directory")

    def locate(self, record: _Record, table: int) -> Entry:
        """Where the bytes of an entry begin: behind its local header, which must agree."""
        fields = self.unpack(_LOCAL, _LOCAL_MARK, record.header)
        if fields is None:
            raise self.damaged(f"entry {record.name!r} does not begin at byte {record.header}")
        _, _, method, _, _, _, packed, size, length, extra = fields
        name = self.at(record.header + _LOCAL.size, length)
        sizes = {0, _FULL, record.size}
        if method or name != record.name.encode() or not {packed, size} <= sizes:
            raise self.damaged(f"entry {record.name!r} and its header contradict each other")
        offset = record.header + _LOCAL.size + length + extra
        if offset + record.size > table:
            raise self.damaged(
                f"entry {record.name!r} should end at byte {offset + record.size}, "
                f"and the entries end at byte {table}"
            )
        return Entry(offset, record.size, record.crc)

    def check_overlaps(self, records: list[_Record], entries: Mapping[str, Entry]) -> None:
        position = 0
        for record in sorted(records, key=lambda record: record.header):
            if record.header < position:
                raise self.damaged(f"entry {record.name!r} lies over another one")
            entry = entries[record.name]
            position = entry.offset + entry.size

    def damaged(self, what: str) -> CheckpointError:
        return _damaged(self.path, what)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound ZIP archive: {what}", fix="download or copy it again"
    )


# --- writing ---------------------------------------------------------------------------------


class ZipWriter:
    """Writes entries one after the other, byte for byte as torch's own writer does.

    Args:
        file: takes the bytes, from its beginning.
        folder: goes before every name.
    """

    def __init__(self, file: BinaryIO, folder: str) -> None:
        self._file, self._folder = file, folder
        self._position = 0
        self._count = 0
        self._table = bytearray()

    def add(self, name: str, data: bytes | memoryview) -> int:
        """Write one entry, aligned to `ALIGNMENT`; returns its CRC-32."""
        raw_name = f"{self._folder}/{name}".encode()
        size, header = len(data), self._position
        sizes = [size, size] if size >= _FULL else []
        offsets = [header] if header >= _FULL else []
        # torch has not written the data yet and leaves the second size 0.
        wide = _wide_field([*sizes[:1], *(0 for _ in sizes[1:]), *offsets])
        extra = wide + self._padding(len(raw_name) + len(wide))
        flags = _UTF8 | (_DESCRIPTOR if size else 0)
        self._write(_LOCAL.pack(_LOCAL_MARK, 0, flags, 0, 0, 0, 0, 0, 0, len(raw_name), len(extra)))
        self._write(raw_name + extra)
        crc = self._write_summed(data)
        if size:
            self._write(_DESCRIPTOR_MARK + struct.pack("<I2Q" if wide else "<3I", crc, size, size))
        self._describe(raw_name, flags, crc, size, header, _wide_field([*sizes, *offsets]))
        return crc

    def finish(self) -> None:
        """Write the table of entries, without which nobody takes the file for an archive."""
        start, size, count = self._position, len(self._table), self._count
        self._write(self._table)
        end = self._position
        self._write(
            _END64.pack(_END64_MARK, _END64.size - 12, 798, 45, 0, 0, count, count, size, start)
        )
        self._write(_LOCATOR.pack(_LOCATOR_MARK, 0, end, 1))
        narrow = min(count, 0xFFFF)
        self._write(
            _END.pack(_END_MARK, 0, 0, narrow, narrow, min(size, _FULL), min(start, _FULL), 0)
        )

    def _padding(self, before: int) -> bytes:
        """A field "FB" of so many Z that the data behind it is aligned."""
        begin = self._position + _LOCAL.size + before + 4
        count = -begin % ALIGNMENT
        return b"FB" + struct.pack("<H", count) + b"Z" * count

    def _describe(
        self, name: bytes, flags: int, crc: int, size: int, header: int, wide: bytes
    ) -> None:
        narrow_size, narrow_header = min(size, _FULL), min(header, _FULL)
        numbers = (0, 0, flags, 0, 0, 0, crc, narrow_size, narrow_size)
        lengths = (len(name), len(wide), 0, 0, 0)
        self._table += _CENTRAL.pack(_CENTRAL_MARK, *numbers, *lengths, 0, narrow_header)
        self._table += name + wide
        self._count += 1

    def _write_summed(self, data: bytes | memoryview) -> int:
        """Write, and compute the CRC meanwhile: neither holds the interpreter's lock."""
        if len(data) < _LARGE:
            self._write(data)
            return zlib.crc32(data)
        with ThreadPoolExecutor(1) as pool:
            crc = pool.submit(zlib.crc32, data)
            self._write(data)
        return crc.result()

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        self._file.write(data)
        self._position += len(data)


def _wide_field(numbers: list[int]) -> bytes:
    """A ZIP64 field, if there is anything that needs it."""
    if not numbers:
        return b""
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)
