"""Protocol Buffers' wire format: enough to read messages of a known schema, trusting nothing.

A message is a sequence of fields. A field is a varint key (field number * 8 + wire type) and a
value: a varint, 4 or 8 bytes, or a varint length and that many bytes, which hold a string, a
message or packed numbers (https://protobuf.dev/programming-guides/encoding). MindSpore's
checkpoints and strategy files are such messages. Fields that a schema does not know are skipped,
as the format wants; contents are located, not copied, so a message may lie in a memory map.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

VARINT, FIXED64, BYTES, GROUP, GROUP_END, FIXED32 = range(6)
"""Wire types."""
MAX_TEXT_BYTES = 1 << 16
"""More than any name or type needs; a longer one is damage."""

_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10
_MAX_DEPTH = 100
"""Google's own limit."""

Buffer = bytes | bytearray | memoryview | mmap.mmap


class WireError(Exception):
    """The bytes are not a sound message: what is wrong, and at which byte of the buffer."""

    def __init__(self, problem: str, offset: int) -> None:
        super().__init__(f"{problem} at byte {offset}")
        self.problem, self.offset = problem, offset


@dataclass(frozen=True, slots=True)
class Field:
    """One field: where it stands, and its value, or where its bytes lie."""

    number: int
    wire_type: int
    value: int
    """The number, unsigned; 0 for BYTES and groups."""
    offset: int
    """Its first byte, that of its key."""
    begin: int
    end: int
    """First and last + 1 byte of the value; for BYTES of the content, behind the length."""


def read_fields(data: Buffer, begin: int, end: int) -> Iterator[Field]:
    """The fields of the message in `data[begin:end]`, in order; groups are skipped.

    Raises WireError if the message ends inside a field, a varint has more than 64 bits, a key is
    not one, or a group is not closed.
    """
    position = begin
    while position < end:
        field = _read_field(data, position, end)
        if field.wire_type == GROUP_END:
            raise WireError("a group ends that did not begin", field.offset)
        if field.wire_type == GROUP:
            position = _skip_group(data, field, end)
            continue
        yield field
        position = field.end


def collect_fields(data: Buffer, begin: int, end: int, most: int) -> dict[int, list[Field]]:
    """The fields of the message in `data[begin:end]` by their number.

    Raises WireError also if there are more than `most`: their list would fill the memory.
    """
    collected: dict[int, list[Field]] = {}
    for count, field in enumerate(read_fields(data, begin, end), 1):
        if count > most:
            raise WireError(f"a message has more than {most} fields", field.offset)
        collected.setdefault(field.number, []).append(field)
    return collected


def read_text(data: Buffer, field: Field) -> str:
    """The string in a BYTES field; WireError if it is not UTF-8 or absurdly long."""
    if field.end - field.begin > MAX_TEXT_BYTES:
        raise WireError(f"a name has {field.end - field.begin} bytes", field.offset)
    try:
        return bytes(data[field.begin : field.end]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise WireError("a name is not UTF-8", field.begin + error.start) from None


def read_numbers(data: Buffer, fields: Iterable[Field], most: int) -> tuple[int, ...]:
    """The numbers of a repeated integer field, packed or not, unsigned.

    Raises WireError if there are more than `most`.
    """
    numbers: list[int] = []
    for field in fields:
        position = field.begin
        while position < field.end:
            if len(numbers) == most:
                raise WireError(f"a list has more than {most} numbers", field.offset)
            number, position = _read_varint(data, position, field.end)
            numbers.append(number)
    return tuple(numbers)


def to_signed(number: int, bits: int = 64) -> int:
    """An unsigned number as the int32 or int64 that was written: two's complement."""
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


def encode_varint(number: int) -> bytes:
    """A number of at least 0, seven bits to a byte, the low ones first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def encode_key(number: int, wire_type: int) -> bytes:
    """What a field begins with."""
    return encode_varint(number << 3 | wire_type)


def encode_bytes(number: int, content: bytes) -> bytes:
    """A BYTES field."""
    return encode_key(number, BYTES) + encode_varint(len(content)) + content


def _read_field(data: Buffer, offset: int, end: int) -> Field:
    key, begin = _read_varint(data, offset, end)
    number, wire_type = key >> 3, key & 7
    if not 0 < number < 1 << 29 or wire_type > FIXED32:
        raise WireError(f"a field begins with the key {key}, which means nothing", offset)
    value = 0
    if wire_type == VARINT:
        value, stop = _read_varint(data, begin, end)
    elif wire_type == BYTES:
        length, begin = _read_varint(data, begin, end)
        stop = begin + length
    else:
        stop = begin + _FIXED_SIZES.get(wire_type, 0)
    if stop > end:
        raise WireError(
            f"field {number} reaches to byte {stop}, and what holds it ends at byte {end}", offset
        )
    if wire_type in _FIXED_SIZES:
        value = int.from_bytes(data[begin:stop], "little")
    return Field(number, wire_type, value, offset, begin, stop)


def _read_varint(data: Buffer, offset: int, end: int) -> tuple[int, int]:
    """(number, position behind it)."""
    number = 0
    for count, position in enumerate(range(offset, min(end, offset + _MAX_VARINT_BYTES))):
        byte = data[position]
        number |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            if number >> 64:
                break
            return number, position + 1
    if end - offset < _MAX_VARINT_BYTES:
        raise WireError(f"a number does not end before byte {end}", offset)
    raise WireError("a number has more than 64 bits", offset)


def _skip_group(data: Buffer, start: Field, end: int) -> int:
    """Position behind the group that `start` opens; groups nest."""
    opened, position = [start.number], start.end
    while opened:
        if position >= end:
            raise WireError(f"group {opened[-1]} is not closed", start.offset)
        field = _read_field(data, position, end)
        position = field.end
        if len(opened) > _MAX_DEPTH:
            raise WireError(f"groups nest deeper than {_MAX_DEPTH}", start.offset)
        if field.wire_type == GROUP:
            opened.append(field.number)
        elif field.wire_type == GROUP_END and field.number != opened.pop():
            raise WireError("a group ends that did not begin", field.offset)
    return position
