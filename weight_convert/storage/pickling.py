"""Writing pickles in a stream: the bytes of `pickle.dump`, with one array in memory at a time.

Python's pickler remembers every object it has written, so it holds a whole checkpoint. This one
remembers names and dtypes alone, and passes the bytes of an array on to the file. It makes the same
decisions (which instruction, what is remembered, where a frame ends), so files are byte for byte
those of CPython 3.11 with NumPy 1. NumPy 2 names its modules otherwise, and reads these names too.

Source: CPython, Modules/_pickle.c; NumPy's `ndarray.__reduce__`.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from weight_convert.storage.tensor import NUMPY_DTYPES, raw_bytes

_FRAME_BYTES = 64 * 2**10
"""A frame is closed when it has so many bytes; so large a string is written outside of frames."""
_SMALLEST_FRAME = 4
_BATCH = 1000
"""Items of a dict or a list for each instruction that adds them."""
_CHUNK = 2**20


@dataclass(frozen=True)
class Global:
    """A function or class, which is pickled by name."""

    module: str
    name: str


RECONSTRUCT = Global("numpy.core.multiarray", "_reconstruct")
NDARRAY = Global("numpy", "ndarray")
DTYPE = Global("numpy", "dtype")
ENCODE = Global("_codecs", "encode")
EMPTY_BYTES = Global("__builtin__", "bytes")
"""`bytes` by the name that Python 2 would know it by: only protocol 2 needs it."""


class Pickler:
    """Writes one pickle: `begin`, values with `save` or `save_items`, `end`.

    Args:
        file: takes the bytes.
        protocol: 2, 3 or 4.
    """

    def __init__(self, file: BinaryIO, protocol: int) -> None:
        self._file = file
        self._protocol = protocol
        self._frame: bytearray | None = None
        """What the open frame holds; None while there are no frames."""
        self._memo: dict[int, tuple[int, object]] = {}
        """id -> (index, the object itself, so that no other gets its id)"""
        self._memo_size = 0

    def begin(self) -> None:
        """Write the protocol."""
        self._write(pickle.PROTO + bytes([self._protocol]))
        if self._protocol >= 4:
            self._frame = bytearray()

    def end(self) -> None:
        """Write the instruction that ends a pickle."""
        self._write(pickle.STOP)
        self._close_frame()

    # values

    def save(self, value: Any) -> None:
        """Write None, a bool, int, str, bytes, tuple, list, dict, Global, dtype or array.

        Arrays are contiguous. The same str object (bytes, Global, dtype) is written once and
        referred to from then on.
        """
        self._close_full_frame()
        if id(value) in self._memo:
            self._refer(self._memo[id(value)][0])
        else:
            _SAVERS[type(value)](self, value)

    @contextlib.contextmanager
    def save_items(self, count: int) -> Iterator[Callable[[Any, Any], None]]:
        """Write a dict of `count` entries; the block calls what it gets with each key and value."""
        self._close_full_frame()
        self._write(pickle.EMPTY_DICT)
        self._memoize()
        if count > 1:
            self._write(pickle.MARK)
        numbers = itertools.count(1)

        def add(key: Any, value: Any) -> None:
            self.save(key)
            self.save(value)
            if next(numbers) % _BATCH == 0:  # also behind the last entry, as in C
                self._write(pickle.SETITEMS + pickle.MARK)

        yield add
        if count:
            self._write(pickle.SETITEMS if count > 1 else pickle.SETITEM)

    def _save_constant(self, value: bool | None) -> None:
        self._write({None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value])

    def _save_integer(self, value: int) -> None:
        if 0 <= value < 2**8:
            self._write(pickle.BININT1 + value.to_bytes(1, "little"))
        elif 0 <= value < 2**16:
            self._write(pickle.BININT2 + value.to_bytes(2, "little"))
        elif -(2**31) <= value < 2**31:
            self._write(pickle.BININT + struct.pack("<i", value))
        else:
            raw = pickle.encode_long(value)
            self._write(pickle.LONG1 + bytes([len(raw)]) + raw)

    def _save_text(self, value: str) -> None:
        raw = value.encode("utf-8", "surrogatepass")
        self._write_string(self._text_header(len(raw)), len(raw), [raw])
        self._memoize(value)

    def _save_bytes(self, value: bytes) -> None:
        if self._protocol >= 3:
            self._write_string(self._bytes_header(len(value)), len(value), [value])
        elif value:
            self._save_call(ENCODE, (value.decode("latin-1"), "latin1"))
        else:
            self._save_call(EMPTY_BYTES, ())
        self._memoize(value)

    def _save_tuple(self, values: tuple[Any, ...]) -> None:
        if not values:
            self._write(pickle.EMPTY_TUPLE)
            return
        short = {1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}.get(len(values))
        if not short:
            self._write(pickle.MARK)
        for value in values:
            self.save(value)
        self._write(short or pickle.TUPLE)
        self._memoize()

    def _save_list(self, values: list[Any]) -> None:
        self._write(pickle.EMPTY_LIST)
        self._memoize()
        if len(values) == 1:
            self.save(values[0])
            self._write(pickle.APPEND)
            return
        for begin in range(0, len(values), _BATCH):
            self._write(pickle.MARK)
            for value in values[begin : begin + _BATCH]:
                self.save(value)
            self._write(pickle.APPENDS)

    def _save_dict(self, table: dict[Any, Any]) -> None:
        with self.save_items(len(table)) as add:
            for key, value in table.items():
                add(key, value)

    def _save_global(self, value: Global) -> None:
        if self._protocol >= 4:
            self.save(value.module)
            self.save(value.name)
            self._write(pickle.STACK_GLOBAL)
        else:
            self._write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self._memoize(value)

    def _save_dtype(self, dtype: np.dtype) -> None:
        order, code = dtype.str[0], dtype.str[1:]
        self._save_call(DTYPE, (code, False, True))
        self._memoize(dtype)
        self.save((3, order, None, None, None, -1, -1, 0))
        self._write(pickle.BUILD)

    def _save_array(self, array: np.ndarray) -> None:
        self._save_call(RECONSTRUCT, (NDARRAY, (0,), b"b"))
        self._memoize()
        self._close_full_frame()
        self._write(pickle.MARK)
        for value in (1, array.shape, array.dtype, False):
            self.save(value)
        self._save_contents(array)
        self._write(pickle.TUPLE)
        self._memoize()
        self._write(pickle.BUILD)

    def _save_contents(self, array: np.ndarray) -> None:
        """The bytes of an array, as `_save_bytes` would write them."""
        raw = raw_bytes(array)
        if len(raw) < 2:
            self.save(array.tobytes())  # Python has one object for each of these: it is shared
        elif self._protocol >= 3:
            self._close_full_frame()
            self._write_string(self._bytes_header(len(raw)), len(raw), [raw])
            self._memoize()
        else:
            self._save_contents_as_text(raw)

    def _save_contents_as_text(self, raw: memoryview) -> None:
        """Protocol 2 has no bytes: a character for each, in UTF-8."""
        self.save(ENCODE)
        length = len(raw) + sum(np.count_nonzero(part & 0x80) for part in _chunks(raw))
        parts = (bytes(part).decode("latin-1").encode() for part in _chunks(raw))
        self._write_string(self._text_header(length), length, parts)
        self._memoize()
        self.save("latin1")
        self._write(pickle.TUPLE2)
        self._memoize()
        self._write(pickle.REDUCE)
        self._memoize()

    def _save_call(self, function: Global, arguments: tuple[Any, ...]) -> None:
        self.save(function)
        self.save(arguments)
        self._write(pickle.REDUCE)

    # what has been written before

    def _memoize(self, value: object = None) -> None:
        """Count what was just written; remember it if it may be referred to."""
        index = self._memo_size
        self._memo_size += 1
        if value is not None:
            self._memo[id(value)] = index, value
        if self._protocol >= 4:
            self._write(pickle.MEMOIZE)
        elif index < 2**8:
            self._write(pickle.BINPUT + bytes([index]))
        else:
            self._write(pickle.LONG_BINPUT + struct.pack("<I", index))

    def _refer(self, index: int) -> None:
        if index < 2**8:
            self._write(pickle.BINGET + bytes([index]))
        else:
            self._write(pickle.LONG_BINGET + struct.pack("<I", index))

    # bytes

    def _text_header(self, length: int) -> bytes:
        if length < 2**8 and self._protocol >= 4:
            return pickle.SHORT_BINUNICODE + bytes([length])
        return pickle.BINUNICODE + struct.pack("<I", length)

    def _bytes_header(self, length: int) -> bytes:
        if length < 2**8:
            return pickle.SHORT_BINBYTES + bytes([length])
        if length < 2**32:
            return pickle.BINBYTES + struct.pack("<I", length)
        return pickle.BINBYTES8 + struct.pack("<Q", length)

    def _write_string(
        self, header: bytes, length: int, parts: Iterable[bytes | memoryview]
    ) -> None:
        """A string of `length` bytes; a large one goes to the file at once, outside of frames."""
        framed = self._frame
        if framed is not None and length >= _FRAME_BYTES:
            self._close_frame()
            self._frame = None
        self._write(header)
        for part in parts:
            self._write(part)
        self._frame = framed

    def _write(self, data: bytes | memoryview) -> None:
        if self._frame is None:
            self._file.write(data)
        else:
            self._frame += data

    def _close_full_frame(self) -> None:
        if self._frame is not None and len(self._frame) >= _FRAME_BYTES:
            self._close_frame()

    def _close_frame(self) -> None:
        if not self._frame:
            return
        if len(self._frame) >= _SMALLEST_FRAME:
            self._file.write(pickle.FRAME + struct.pack("<Q", len(self._frame)))
        self._file.write(self._frame)
        self._frame.clear()


def _chunks(raw: memoryview) -> Iterable[np.ndarray]:
    array = np.frombuffer(raw, np.uint8)
    return (array[begin : begin + _CHUNK] for begin in range(0, len(array), _CHUNK))


_SAVERS: dict[type, Callable[[Pickler, Any], None]] = {
    type(None): Pickler._save_constant,
    bool: Pickler._save_constant,
    int: Pickler._save_integer,
    str: Pickler._save_text,
    bytes: Pickler._save_bytes,
    tuple: Pickler._save_tuple,
    list: Pickler._save_list,
    dict: Pickler._save_dict,
    Global: Pickler._save_global,
    np.ndarray: Pickler._save_array,
    **{type(np.dtype(code)): Pickler._save_dtype for code in NUMPY_DTYPES.values()},
}
