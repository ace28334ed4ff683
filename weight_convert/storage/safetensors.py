"""Reading safetensors lazily and writing them in a stream, with NumPy alone.

A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, offsets
relative to the end of the header) and the tensors' bytes without gaps. bfloat16, which NumPy
lacks, is carried as uint16: moving, renaming, transposing and cutting need no arithmetic.

The reader maps one tensor at a time, so memory stays at the tensors in use. It trusts nothing:
every length and offset is checked when the file is opened. The writer knows all names, dtypes
and shapes beforehand, so tensors may arrive in any order; nothing carries its final name before
everything is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from weight_convert.errors import CheckpointError
from weight_convert.storage.index import open_shards
from weight_convert.storage.tensor import (
    NUMPY_DTYPES,
    Table,
    Tensor,
    count_bytes,
    few,
    mapped,
    raw_bytes,
    write_checked,
    write_file_synced,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger number means that the file is something else."""
MOST_VALUES = 2**56
"""No array can be larger; NumPy refuses the shape."""

_LAYOUT_RANK = {code: rank for rank, code in enumerate(NUMPY_DTYPES)}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype code, shape, and first and last + 1 byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """An opened file: the checked header."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def tensor(self, name: str) -> Tensor:
        """The tensor, not read yet."""
        entry = self.entries[name]
        return mapped(self.path, name, entry.dtype, entry.shape, entry.begin)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the file, in the order of its bytes."""
        order = sorted(self.entries, key=lambda name: (self.entries[name].begin, name))
        return {name: self.tensor(name) for name in order}


# --- reading ---------------------------------------------------------------------------------


def open_file(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Read and check the header of one file.

    Raises CheckpointError, naming the file and the bytes, if the file is absent, truncated, has
    bytes left over, or if its header is damaged, absurdly long, or describes tensors that
    overlap, leave gaps or do not have the size of their shape.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(path, file.read(8), size)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", given=error.strerror) from None
    header = _parse_header(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not _all_strings(metadata.values()):
        raise _damaged(path, "its __metadata__ is not a table of strings", metadata)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return SafetensorsFile(path, entries, metadata)


def open_directory(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of a directory in the Hugging Face layout: one file, or shards and an index.

    Raises CheckpointError if there is neither, if there are both (which one is meant?), if a
    shard of the index is absent, or if the index and the shards disagree about a tensor.
    """
    directory = Path(directory)
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{directory} holds two sets of weights",
            given=f"{SINGLE_FILE} and {INDEX_FILE}",
            fix="remove the one that is out of date",
        )
    if single.exists():
        return open_file(single).tensors()
    if index.exists():
        return open_shards(index, lambda path: open_file(path).tensors())
    raise CheckpointError(
        f"{directory} holds no safetensors weights", expected=f"{SINGLE_FILE} or {INDEX_FILE}"
    )


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise _damaged(path, f"it has {size} bytes, and a header length alone takes 8")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(
            path,
            f"its first 8 bytes say that the header has {length} bytes, "
            f"and the format allows {MAX_HEADER_BYTES}",
        )
    if 8 + length > size:
        raise _damaged(path, f"its header reaches to byte {8 + length}, the file has {size} bytes")
    return length


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _damaged(path, f"its header is not UTF-8 at byte {8 + error.start}") from None
    except ValueError as error:
        raise _damaged(
            path, f"its header (bytes 8 to {8 + len(text)}) is not JSON", error
        ) from None
    except RecursionError:
        raise _damaged(path, "its header is nested without end") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object", type(header).__name__)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return table


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    """One tensor's description, with its offsets turned into bytes of the file."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _all_counts(shape) or not _all_counts(offsets) or len(offsets) != 2:
        raise _damaged(
            path, f"tensor {name!r} is not described by dtype, shape, data_offsets", value
        )
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has a dtype that is not supported",
            given=dtype,
            expected=f"one of {', '.join(NUMPY_DTYPES)}",
        )
    if math.prod(size for size in shape if size) >= MOST_VALUES:
        # Only with a size of 0 beside it; no array has such a shape, however empty.
        raise _damaged(path, f"tensor {name!r} has a shape that cannot be", shape)
    begin, end = offsets
    needed = count_bytes(dtype, shape)
    if end - begin != needed:
        raise _damaged(
            path,
            f"tensor {name!r} is {dtype} {shape}, {needed} bytes, "
            f"but its offsets {begin} to {end} hold {end - begin}",
        )
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _check_layout(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """The tensors must fill the bytes from the end of the header to the end of the file."""
    position, previous = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlap" if entry.begin < position else "leave a gap"
            raise _damaged(
                path,
                f"{previous} and tensor {name!r} {fault}: "
                f"one ends at byte {position}, the other begins at byte {entry.begin}",
            )
        position, previous = entry.end, f"tensor {name!r}"
    if position > size:
        lost = [name for name, entry in entries.items() if entry.end > size]
        raise CheckpointError(
            f"{path} is truncated",
            given=f"{size} bytes; incomplete or absent: {few(lost)}",
            expected=f"{position} bytes, as its header says",
            fix="download or copy it again",
        )
    if position < size:
        raise _damaged(path, f"its tensors end at byte {position}, the file has {size} bytes")


def _damaged(path: Path, what: str, given: object = None) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound safetensors file: {what}",
        given=given,
        fix="download or copy it again",
    )


def _all_strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _all_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


# --- writing ---------------------------------------------------------------------------------


class ShardWriter:
    """Writes the tensors of a table, in any order, as `model.safetensors` or shards and index.

    Use as a context manager: `with ShardWriter(directory, table) as writer: writer.write(…)`.
    The files get their final names when the block ends well and every tensor was written;
    otherwise nothing is left behind. Each file is byte for byte what the safetensors library
    would write for the same tensors.

    Args:
        directory: made if absent; must not hold weights yet.
        table: every tensor that will be written. Shards are cut in this order.
        max_shard_bytes: a shard is closed before the tensor that would exceed it; a single
            larger tensor gets a shard to itself.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        table: Table,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.directory = Path(directory)
        self.table = dict(table)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._written: set[str] = set()
        self._shards = _name_shards(_plan_shards(self.table, max_shard_bytes))

    def __enter__(self) -> ShardWriter:
        with self._naming_faults():
            self.directory.mkdir(parents=True, exist_ok=True)
        held = [f for f in (SINGLE_FILE, INDEX_FILE) if (self.directory / f).exists()]
        if held:
            raise CheckpointError(
                f"{self.directory} already holds weights",
                given=", ".join(held),
                fix="name another directory, or remove them first",
            )
        try:
            with self._naming_faults():
                self._begin()
        except BaseException:
            self._discard()
            raise
        return self

    def _begin(self) -> None:
        """Write the headers: from now on every tensor has its place."""
        for shard, names in self._shards.items():
            file = self._temporary(shard).open("wb")
            self._files[shard] = file
            header, offsets = _build_header({name: self.table[name] for name in names})
            file.write(header)
            for name, offset in offsets.items():
                self._places[name] = (file, len(header) + offset)

    def write(self, name: str, array: np.ndarray) -> None:
        """Put one tensor where the table says; bfloat16 comes as uint16.

        Raises CheckpointError if the name is not in the table or was written before, if the
        array's dtype or shape is not the table's, or if the disk refuses (full, read-only).
        """
        if name not in self.table or name in self._written:
            fault = "was written before" if name in self._written else "is not in the table"
            raise CheckpointError(f"tensor {name!r} {fault}")
        code, shape = self.table[name]
        dtype = np.dtype(NUMPY_DTYPES[code])
        if array.shape != tuple(shape) or array.dtype != dtype:
            raise CheckpointError(
                f"tensor {name!r} is not what was announced",
                given=f"{array.dtype} {array.shape}",
                expected=f"{dtype} {tuple(shape)}",
            )
        file, position = self._places[name]
        with self._naming_faults():
            file.seek(position)
            file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
        self._written.add(name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._naming_faults():
                    self._finish()
        finally:
            self._discard()

    def _discard(self) -> None:
        """Close everything and remove what has no final name."""
        for shard, file in self._files.items():
            with contextlib.suppress(OSError):  # the disk may be full: nothing is to be kept
                file.close()
            self._temporary(shard).unlink(missing_ok=True)
        self._temporary(INDEX_FILE).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _naming_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.directory} cannot be written", given=error.strerror
            ) from error

    def _finish(self) -> None:
        absent = [name for name in self.table if name not in self._written]
        if absent:
            raise CheckpointError(
                f"{len(absent)} of {len(self.table)} tensors were not written", given=few(absent)
            )
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        for shard in self._shards:
            os.replace(self._temporary(shard), self.directory / shard)
        if len(self._shards) > 1:
            self._write_index()
        _sync_directory(self.directory)

    def _write_index(self) -> None:
        """The index comes last: without it the shards are not a checkpoint yet."""
        index = {
            "metadata": {"total_size": sum(count_bytes(*entry) for entry in self.table.values())},
            "weight_map": {name: file for file, names in self._shards.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        temporary = self._temporary(INDEX_FILE)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / INDEX_FILE)

    def _temporary(self, name: str) -> Path:
        return self.directory / f".{name}.{os.getpid()}.tmp"


def write_shards(
    directory: str | os.PathLike[str],
    table: Table,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write every tensor of `table` from a stream of (name, array); see `ShardWriter`."""
    with ShardWriter(directory, table, max_shard_bytes=max_shard_bytes) as writer:
        for name, array in tensors:
            writer.write(name, array)


def layout_order(table: Table) -> list[str]:
    """The order of the tensors in a file: wide dtypes first, then by name, as the library's."""
    return sorted(table, key=lambda name: (_LAYOUT_RANK[table[name][0]], name))


def write_file(
    path: Path,
    table: Table,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file from a stream of tensors; byte for byte what the library would write.

    Args:
        path: written as it is; the caller sees to a temporary name.
        table: every tensor, in `layout_order`.
        tensors: (name, array) in that order; bfloat16 as uint16.
        metadata: strings for `__metadata__`; `{"format": "pt"}` if absent.

    Raises:
        CheckpointError: the stream is not what the table says, or the disk refuses.
    """
    if list(table) != layout_order(table):
        raise CheckpointError("safetensors: the table is not in the order of the file")
    with write_file_synced(path) as file:
        file.write(_build_header(table, metadata)[0])
        write_checked(lambda _, array: file.write(raw_bytes(array)), table, tensors)


def _plan_shards(table: Table, max_bytes: int) -> Iterator[list[str]]:
    """Names of each shard; at least one shard, also for an empty table."""
    names: list[str] = []
    size = 0
    for name, entry in table.items():
        needed = count_bytes(*entry)
        if names and size + needed > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += needed
    yield names


def _name_shards(shards: Iterable[list[str]]) -> dict[str, list[str]]:
    groups = list(shards)
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    count = len(groups)
    return {f"model-{n:05d}-of-{count:05d}.safetensors": g for n, g in enumerate(groups, 1)}


def _build_header(
    table: Table, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Header bytes, and each tensor's offset behind them.

    The layout order keeps every tensor aligned to its own item size.
    """
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets, position = {}, 0
    for name in layout_order(table):
        dtype, shape = table[name]
        offsets[name] = position
        position += count_bytes(dtype, shape)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offsets[name], position],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _sync_directory(directory: Path) -> None:
    """Make the renames durable, where the system lets a directory be opened."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
