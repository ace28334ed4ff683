"""Where the records of a JSON file lie: one pass over a file of any size, in constant memory.

A file is one JSON array, or JSON objects one after another (JSON lines; objects may also be
written over several lines). The text is handed to Python's own JSON decoder record by record, as
Latin-1, in which a character is a byte: so its places are byte offsets, and a record of pure ASCII
is decoded once only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

CHUNK = 1 << 22
"""Bytes read at a time."""
LARGEST = 1 << 28
"""Bytes of the largest record. What seems longer is a string that never ends."""
NEAR_THE_END = 16
"""What is cut off at the end of a chunk (a number, `nul`, `\\u12`) fails this near to it."""

LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FOREIGN = (
    (b"\xff\xfe", "the file is UTF-16 text, not UTF-8"),
    (b"\xfe\xff", "the file is UTF-16 text, not UTF-8"),
    (b"\x1f\x8b", "the file is compressed: unpack it first"),
    (b"PK\x03\x04", "the file is a zip archive: unpack it first"),
    (b"PAR1", "the file is Parquet, not JSON"),
    (b"version https://git-lfs", "the file is a Git LFS pointer: fetch the file itself"),
    (b"<", "the file is a web page: a download that failed"),
)
"""(first bytes, what the file is): what people take for a JSON file."""

ENDS_INSIDE = "the file ends inside {}: a download that was cut off?"
ENDS_INSIDE_LINE = "the line ends inside a record"
BLANK = re.compile(r"[ \t\n\r]*")
BLANK_IN_LINE = re.compile(r"[ \t\r]*")


@dataclass(frozen=True)
class Found:
    """A record."""

    start: int
    """Offset of its first byte."""
    end: int
    value: Any


@dataclass(frozen=True)
class Damage:
    """A place where the file is no JSON."""

    offset: int
    """Of the byte that the decoder stumbled over."""
    start: int
    """Where the record that it belongs to begins."""
    records: int
    """Whole records before it: the number that the broken one would have, counted from 0."""
    problem: str


class _Broken(Exception):
    """Here the file is no JSON."""

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(problem)
        self.offset, self.problem = offset, problem


class _NotText(_Broken):
    """A record whose ends are known, but that is not UTF-8."""


def scan(file: BinaryIO, *, chunk: int = CHUNK, largest: int = LARGEST) -> Iterator[Found | Damage]:
    """The records of a file in order, and where it is damaged.

    JSON lines go on behind a damage, at the next line that begins with `{`; an array ends there.
    A record that is not UTF-8 is a damage of its own.

    Args:
        file: open at its beginning.
        chunk: bytes read at a time.
        largest: bytes of the largest record.
    """
    window = _Window(file, chunk, largest)
    counted = 0
    for item in _walk(window):
        if isinstance(item, _Broken):
            yield Damage(item.offset, window.record, counted, item.problem)
        else:
            counted += 1
            yield item


def line_and_column(file: BinaryIO, offset: int) -> tuple[int, int]:
    """Both counted from 1, in lines and in characters of UTF-8."""
    file.seek(0)
    line, column, left = 1, 1, offset
    if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
        left -= len(BYTE_ORDER_MARK)
    else:
        file.seek(0)
    while left > 0 and (data := file.read(min(left, CHUNK))):
        left -= len(data)
        lines = data.count(b"\n")
        if lines:
            line, column = line + lines, 1
            data = data[data.rindex(b"\n") + 1 :]
        # Every byte begins a character but those of the form 10xxxxxx.
        column += int(((np.frombuffer(data, np.uint8) & 0xC0) != 0x80).sum())
    return line, column


def lines_of(file: BinaryIO, offsets: Sequence[int]) -> list[int]:
    """The line of each of these offsets, counted from 1; the offsets ascend."""
    file.seek(0)
    lines, line, place = [], 1, 0
    for offset in offsets:
        while place < offset and (data := file.read(min(offset - place, CHUNK))):
            line, place = line + data.count(b"\n"), place + len(data)
        lines.append(line)
    return lines


def _walk(window: _Window) -> Iterator[Found | _Broken]:
    """The records, and `_Broken` where there is a damage."""
    try:
        is_array = window.begin() == "["
        yield from _elements(window) if is_array else _objects(window)
    except _Broken as broken:
        yield broken


def _elements(window: _Window) -> Iterator[Found | _Broken]:
    """Of the array that begins here."""
    window.place += 1
    if window.after_blank() == "]":
        window.place += 1
    else:
        while True:
            if not window.after_blank():
                raise _Broken(window.offset, ENDS_INSIDE.format("the array"))
            try:
                found = window.record_here()
            except _NotText as broken:
                yield broken
            else:
                yield found
            mark = window.after_blank()
            if mark not in (",", "]"):
                what = "Expecting ',' or ']' after a record"
                raise _Broken(window.offset, what if mark else ENDS_INSIDE.format("the array"))
            window.place += 1
            if mark == "]":
                break
    if window.after_blank():
        raise _Broken(window.offset, "there is text behind the end of the array")


def _objects(window: _Window) -> Iterator[Found | _Broken]:
    """Objects one after another."""
    by_line = False
    while window.after_blank():
        try:
            found = window.record_here()
            by_line = window.is_one_line(found)
            if window.after_blank(BLANK_IN_LINE) not in ("", "\n", "{"):
                raise _Broken(window.offset, "there is text behind a record, on its line")
        except _Broken as broken:
            yield (window.broken_line() if by_line else None) or broken
            window.to_next_line_with_object()
        else:
            yield found


class _Window:
    """A stretch of the file, and a place in it."""

    def __init__(self, file: BinaryIO, chunk: int, largest: int) -> None:
        self._file, self._chunk, self._largest = file, chunk, largest
        self._data, self._text = b"", ""
        self._base = 0
        """Offset of the first byte of the stretch."""
        self._ended = False
        self._decode = json.JSONDecoder().raw_decode
        self.place = 0
        """In the stretch."""
        self.record = 0
        """Offset at which the latest record begins."""

    @property
    def offset(self) -> int:
        """Of the place, in the file."""
        return self._base + self.place

    def begin(self) -> str:
        """Go to the first mark of the file and return it: `[` or `{`.

        Raises _Broken if the file cannot be JSON.
        """
        while len(self._data) < max(len(beginning) for beginning, _ in FOREIGN):
            if not self._read_on():
                break
        for beginning, what in FOREIGN:
            if self._data.startswith(beginning):
                raise _Broken(0, what)
        if self._data.startswith(BYTE_ORDER_MARK):
            self.place = len(BYTE_ORDER_MARK)
        first = self.after_blank()
        if not first:
            raise _Broken(self.offset, "the file is empty")
        if first not in "[{":
            shown = self._data[self.place : self.place + 4].decode(errors="replace")[0]
            what = f"the file begins with {shown!r}: neither '[' (a JSON array) nor '{{' (records)"
            raise _Broken(self.offset, what)
        return first

    def after_blank(self, blank: re.Pattern[str] = BLANK) -> str:
        """Go behind white space; the character that stands there, "" at the end of the file."""
        while True:
            self.place = blank.match(self._text, self.place).end()
            if self.place < len(self._text):
                return self._text[self.place]
            if not self._read_on():
                return ""

    def record_here(self) -> Found:
        """The JSON value that begins at the place, behind which the place is afterwards."""
        self.record = self.offset
        while True:
            try:
                value, end = self._decode(self._text, self.place)
                # A number may go on in the next chunk: of "1e+5" there may be "1e+" as yet.
                is_whole = end + NEAR_THE_END <= len(self._text) or self._ended
            except json.JSONDecodeError as error:
                if not self._may_go_on(error):
                    raise self._broken(error) from None
                is_whole = False
            except RecursionError:
                raise _Broken(self.offset, "brackets are nested too deeply") from None
            except ValueError as error:  # for example a number of thousands of digits
                raise _Broken(self.offset, str(error)) from None
            if is_whole:
                break
            if len(self._text) - self.place > self._largest:
                what = f"a record of more than {self._largest} bytes: a string that never ends?"
                raise _Broken(self.record, what)
            self._read_on()
        data = self._data[self.place : end]
        self.place = end
        return Found(self.record, self.offset, value if data.isascii() else self._utf8(data))

    def is_one_line(self, found: Found) -> bool:
        """Whether the latest record is written in one line."""
        return self._text.find("\n", found.start - self._base, found.end - self._base) < 0

    def broken_line(self) -> _Broken | None:
        """What is wrong with the line in which the latest record begins, taken by itself.

        A record that is cut off may seem to go on in the next line.
        """
        while (end := self._text.find("\n", self.record - self._base)) < 0:
            if len(self._text) - self.place > self._largest or not self._read_on():
                return None
        line = self._text[self.record - self._base : end]
        try:
            self._decode(line)
        except json.JSONDecodeError as error:
            inside = ENDS_INSIDE_LINE if _is_unfinished(line, error) else error.msg
            return _Broken(self.record + error.pos, inside)
        except (ValueError, RecursionError):
            pass
        return None

    def to_next_line_with_object(self) -> None:
        """From the beginning of the latest record to the next line that begins with `{`."""
        self.place = self.record - self._base
        while True:
            found = self._text.find("\n{", self.place)
            if found >= 0:
                self.place = found + 1
                return
            self.place = max(len(self._text) - 1, self.place)
            self.record = self.offset  # what lies before is not needed any more
            if not self._read_on():
                self.place = len(self._text)
                return

    def _read_on(self) -> bool:
        """Drop what lies before the record or the place, and read more behind; False at the end."""
        kept = max(min(self.place, self.record - self._base), 0)
        # As much again as there is: a large record is then decoded a few times only.
        data = self._file.read(max(self._chunk, len(self._data) - kept))
        self._ended = not data
        if data:
            self._data = self._data[kept:] + data
            self._text = self._data.decode("latin-1")
            self._base, self.place = self._base + kept, self.place - kept
        return bool(data)

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the decoder failed only because the chunk ends."""
        near = len(self._text) - error.pos <= NEAR_THE_END
        return not self._ended and (near or error.msg.startswith("Unterminated string"))

    def _broken(self, error: json.JSONDecodeError) -> _Broken:
        if self._ended and _is_unfinished(self._text, error):
            return _Broken(self._base + len(self._text), ENDS_INSIDE.format("a record"))
        if self._text[error.pos : error.pos + 1] == "\0":
            what = "there are null bytes: a download that did not finish?"
            return _Broken(self._base + error.pos, what)
        return _Broken(self._base + error.pos, error.msg)

    def _utf8(self, data: bytes) -> Any:
        """Decode a record anew, now that its end is known."""
        try:
            return json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            what = f"the text is not UTF-8 ({error.reason}, byte 0x{data[error.start]:02x})"
            raise _NotText(self.record + error.start, what) from None


def _is_unfinished(text: str, error: json.JSONDecodeError) -> bool:
    """Whether what the decoder saw last may be the beginning of something whole."""
    rest = text[error.pos :]
    return (
        error.msg.startswith("Unterminated string")
        or (error.msg.startswith("Invalid \\u") and len(rest) <= NEAR_THE_END)
        or any(literal.startswith(rest) for literal in LITERALS)
    )
