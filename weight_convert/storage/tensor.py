"""A tensor that lies on a disk: what is known before it is read, and how to read it.

Every reader of this package returns `{name: Tensor}`. Nothing is in memory until `read` is called,
and operations on tensors (`weight_convert.mapping`) are lazy in the same way, so a conversion
holds one tensor at a time. bfloat16, which NumPy lacks, is carried as uint16.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from weight_convert.errors import CheckpointError

NUMPY_DTYPES = {
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "F32": "<f4",
    "U32": "<u4",
    "I32": "<i4",
    "BF16": "<u2",
    "F16": "<f2",
    "U16": "<u2",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
"""dtype code (that of safetensors) -> NumPy dtype, in the order in which the safetensors library
lays tensors out."""
FLOATS = ("F64", "F32", "F16", "BF16")

Table = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype code of NUMPY_DTYPES, shape): what a writer is told beforehand."""


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor begin: a file, an offset in it, and the name it has there."""

    path: Path
    offset: int
    name: str


@dataclass(frozen=True)
class Tensor:
    """One tensor, not read yet."""

    dtype: str
    """A code of NUMPY_DTYPES."""
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Returns the array: dtype `NUMPY_DTYPES[self.dtype]`, shape `self.shape`, C order. It may be
    a private mapping of the file: drop it before reading the next one to stay at one tensor of
    memory. Changes to it never reach the file."""
    places: tuple[Place, ...]
    """Where it is read from; several if it is put together."""
    how: tuple[str, ...] = ()
    """The operations since then, in order, for people to read."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return count_bytes(self.dtype, self.shape)


def count_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of that dtype code and shape."""
    return np.dtype(NUMPY_DTYPES[dtype]).itemsize * math.prod(shape)


def mapped(path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> Tensor:
    """A tensor whose bytes lie in `path` from `offset` on, little-endian and in C order.

    The caller has checked that they lie within the file.
    """

    def read() -> np.ndarray:
        code = np.dtype(NUMPY_DTYPES[dtype])
        if not math.prod(shape):
            return np.empty(shape, code)
        # Mapped as bytes: a scalar has no shape to map, and memmap wants one.
        try:
            raw = np.memmap(path, np.uint8, "c", offset, (count_bytes(dtype, shape),))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} changed since it was opened: tensor {name!r} cannot be read", given=error
            ) from error
        array = np.asarray(raw).view(code).reshape(shape)
        # Writers do not always align; frameworks want aligned memory.
        return array if array.flags.aligned else array.copy()

    return Tensor(dtype, shape, read, (Place(path, offset, name),))


def write_checked(
    write: Callable[[str, np.ndarray], Any],
    table: Table,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Pass a stream on to `write(name, array)`, holding it to its announcement.

    Args:
        write: puts one contiguous little-endian array down.
        table: what was announced; tensors must come in its order.
        tensors: (name, array) for every entry of `table`.

    Raises:
        CheckpointError: another name, dtype or shape than announced, or the stream ends early.
    """
    announced = iter(table.items())
    for name, array in tensors:
        expected, (code, shape) = next(announced, (None, ("", ())))
        if name != expected:
            raise CheckpointError(f"tensor {name!r} comes out of turn", expected=expected)
        dtype = np.dtype(NUMPY_DTYPES[code])
        if array.shape != tuple(shape) or array.dtype != dtype:
            raise CheckpointError(
                f"tensor {name!r} is not what was announced",
                given=f"{array.dtype} {array.shape}",
                expected=f"{dtype} {tuple(shape)}",
            )
        write(name, np.ascontiguousarray(array, dtype).reshape(shape))
    absent = [name for name, _ in announced]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(table)} tensors were not written", given=few(absent)
        )


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def write_file_synced(path: Path) -> _SyncedFile:
    """`path` open for writing, on the disk when the block ends; OSErrors become CheckpointError."""
    return _SyncedFile(path)


class _SyncedFile:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> BinaryIO:
        try:
            self._file = self._path.open("wb")
        except OSError as error:
            raise _unwritable(self._path, error) from error
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as fault:
            raise _unwritable(self._path, fault) from fault
        if isinstance(error, OSError):
            raise _unwritable(self._path, error) from error


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written", given=error.strerror or error)


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more)
