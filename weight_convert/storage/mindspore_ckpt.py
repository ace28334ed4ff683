"""MindSpore `.ckpt` files, read lazily and written in a stream, without MindSpore.

A file has no header and no index: it is a sequence of records, each a Protocol Buffers message
(MindSpore 2.10, `train/checkpoint_pb2` and `train/serialization.py`):

    Checkpoint { repeated Value value = 1 }
    Value { string tag = 1; TensorProto tensor = 2 | MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

Contents are little-endian and in C order, bfloat16 included. A tensor of more than 512 MiB has
several records, one after the other, with the same tag and the whole tensor's dims in each;
`save_checkpoint` cuts its bytes every 512 MiB, with `async_save` it cuts along axis 0. A scalar has
no dims; older files gave it dims [0]. `append_dict` becomes records at the end: Int64, Float32,
Bool scalars, and strings, which have the type `str`, dims [0] and UTF-32 contents. With
`crc_check` the file ends in `crc_num` and 10 bytes, the CRC-32 of everything before.

Opening a file reads the records' heads through a memory map and none of the contents.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from weight_convert.errors import CheckpointError
from weight_convert.storage.protobuf import (
    BYTES,
    MAX_TEXT_BYTES,
    VARINT,
    Buffer,
    Field,
    WireError,
    collect_fields,
    encode_bytes,
    encode_key,
    encode_varint,
    read_fields,
    read_numbers,
    read_text,
    to_signed,
)
from weight_convert.storage.tensor import (
    NUMPY_DTYPES,
    Place,
    Table,
    Tensor,
    count_bytes,
    mapped,
    raw_bytes,
    write_checked,
    write_file_synced,
)

CHUNK_BYTES = 512 * 1024 * 1024
"""Where `mindspore.save_checkpoint` cuts a tensor's bytes."""
TENSOR_TYPES = {
    "Float64": "F64",
    "Float32": "F32",
    "Float16": "F16",
    "BFloat16": "BF16",
    "Int64": "I64",
    "Int32": "I32",
    "Int16": "I16",
    "Int8": "I8",
    "UInt64": "U64",
    "UInt32": "U32",
    "UInt16": "U16",
    "UInt8": "U8",
    "Bool": "BOOL",
}
"""The format's `tensor_type` -> dtype code."""

_TYPE_NAMES = {code: name for name, code in TENSOR_TYPES.items()}
_STRING_TYPE = "str"
_APPENDED = {bool: "BOOL", int: "I64", float: "F32"}
_CRC_MARK = b"crc_num"
_CRC_BYTES = len(_CRC_MARK) + 10
_CIPHERS = {0xD8: "AES-GCM", 0xD9: "AES-CBC", 0xDA: "SM4-CBC"}
_CIPHER_MARK = bytes.fromhex("5e3a7f")
"""An encrypted file begins with a byte of `_CIPHERS` and these three."""
_MAX_AXES = 32
"""NumPy's own limit."""
_MAX_ELEMENTS = 1 << 59
_MAX_FIELDS = 1000
_MAX_RECORDS = 1_000_000
_MAX_STRING_BYTES = 1 << 26
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class _Record:
    """One record: a tensor, a chunk of one, or a string."""

    tag: str
    tensor_type: str
    dims: tuple[int, ...]
    offset: int
    """First byte of the record."""
    begin: int
    end: int
    """First and last + 1 byte of the contents."""


# --- reading ---------------------------------------------------------------------------------


def open_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of a file, in its order; appended numbers are tensors of shape ().

    Strings are not tensors: `read_strings` returns them. A tensor of one record is mapped; one of
    several is read into an array of its own, so reading costs its size once in either case.

    Raises CheckpointError, naming the file and the byte, if the file is absent, empty, encrypted,
    truncated or otherwise damaged, holds tensors of a type that NumPy lacks (Int4, Complex64, …)
    or hash tables (MapParameter), names a tensor twice, or has contents that do not fill the dims.
    """
    path = Path(path)
    return {
        chunks[0].tag: _describe(path, chunks)
        for chunks in _scan(path)
        if chunks[0].tensor_type != _STRING_TYPE
    }


def read_strings(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings of a file: values of `append_dict` that are text.

    Raises CheckpointError as `open_file` does, and if the contents are not text.
    """
    path = Path(path)
    strings = [chunks for chunks in _scan(path) if chunks[0].tensor_type == _STRING_TYPE]
    return {chunks[0].tag: _read_string(path, chunks) for chunks in strings}


def verify_crc(path: str | os.PathLike[str]) -> bool:
    """Read the whole file and compare it with its checksum: True if right, False if it has none.

    Raises CheckpointError if the checksum is wrong or the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _CRC_BYTES))
            trailer = file.read()
            if not trailer.startswith(_CRC_MARK) or len(trailer) < _CRC_BYTES:
                return False
            actual = _checksum(file, size - _CRC_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from None
    stored = int.from_bytes(trailer[len(_CRC_MARK) :], "big")
    if actual != stored:
        raise CheckpointError(
            f"{path} is damaged: its checksum is wrong",
            given=f"CRC-32 {actual:08x}",
            expected=f"{stored:08x}, as its last 10 bytes say",
            fix="download or copy it again",
        )
    return True


def _checksum(file: BinaryIO, size: int) -> int:
    """CRC-32 of the first `size` bytes."""
    file.seek(0)
    crc = 0
    while size > 0 and (block := file.read(min(size, _BLOCK_BYTES))):
        crc = zlib.crc32(block, crc)
        size -= len(block)
    return crc


def _scan(path: Path) -> list[list[_Record]]:
    """The records of each tag, in the file's order, checked against one another."""
    with _map_file(path) as data:
        _check_beginning(path, data)
        try:
            records = list(_read_records(path, data, _end_of_records(data)))
        except WireError as error:
            raise _damaged(path, error.problem, error.offset) from None
    groups = [list(group) for _, group in itertools.groupby(records, lambda record: record.tag)]
    seen: set[str] = set()
    for chunks in groups:
        _check_chunks(path, chunks)
        if chunks[0].tag in seen:
            raise _damaged(
                path, f"{chunks[0].tag!r} comes again after other tensors", chunks[0].offset
            )
        seen.add(chunks[0].tag)
    return groups


@contextlib.contextmanager
def _map_file(path: Path) -> Iterator[mmap.mmap]:
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise CheckpointError(f"{path} is empty", fix="download or copy it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _unreadable(path, error) from None
    with data:
        if hasattr(mmap, "MADV_RANDOM"):
            # Heads lie far apart: what the system would read ahead is contents.
            data.madvise(mmap.MADV_RANDOM)
        yield data


def _check_beginning(path: Path, data: Buffer) -> None:
    """Name the files that are easily taken for a checkpoint."""
    if data[1:4] == _CIPHER_MARK and data[0] in _CIPHERS:
        raise CheckpointError(
            f"{path} is encrypted",
            given=_CIPHERS[data[0]],
            fix="decrypt it with MindSpore: load_checkpoint(…, dec_key=…), then save_checkpoint",
        )
    if data[0] == encode_key(1, VARINT)[0]:
        raise CheckpointError(
            f"{path} is no MindSpore checkpoint",
            given="a file that begins like a strategy file, which says how tensors are cut",
            expected="a checkpoint of one rank or of the whole model",
        )
    if data[0] != encode_key(1, BYTES)[0]:
        raise CheckpointError(
            f"{path} is no MindSpore checkpoint",
            given=f"a file that begins with the bytes {bytes(data[:4]).hex(' ')}",
            expected="0a, with which the first record begins",
        )


def _end_of_records(data: mmap.mmap) -> int:
    """The trailer is no message: it must be cut off, as MindSpore does."""
    has_crc = data[-_CRC_BYTES : len(_CRC_MARK) - _CRC_BYTES] == _CRC_MARK
    return len(data) - _CRC_BYTES * has_crc


def _read_records(path: Path, data: mmap.mmap, end: int) -> Iterator[_Record]:
    for count, field in enumerate(read_fields(data, 0, end)):
        if count == _MAX_RECORDS:
            raise WireError(f"there are more than {_MAX_RECORDS} records", field.offset)
        if (field.number, field.wire_type) == (1, BYTES):
            yield _read_record(path, data, field)


def _read_record(path: Path, data: Buffer, record: Field) -> _Record:
    value = collect_fields(data, record.begin, record.end, _MAX_FIELDS)
    tag = read_text(data, _only(value, 1, "tag", record))
    if 3 in value:
        raise CheckpointError(
            f"{path}: {tag!r} at byte {record.offset} is a hash table (MapParameter)",
            expected="a tensor",
            fix="save the model without it",
        )
    tensor = _only(value, 2, "tensor", record)
    fields = collect_fields(data, tensor.begin, tensor.end, _MAX_FIELDS)
    content = _only(fields, 3, "tensor_content", tensor)
    dims = tuple(map(to_signed, read_numbers(data, fields.get(1, ()), _MAX_AXES)))
    tensor_type = read_text(data, _only(fields, 2, "tensor_type", tensor))
    return _Record(tag, tensor_type, dims, record.offset, content.begin, content.end)


def _only(fields: Mapping[int, list[Field]], number: int, name: str, message: Field) -> Field:
    """The one BYTES field of that number, which the schema requires."""
    found = [field for field in fields.get(number, ()) if field.wire_type == BYTES]
    if len(found) != 1:
        raise WireError(f"a record has {len(found)} fields {name} instead of one", message.offset)
    return found[0]


def _check_chunks(path: Path, chunks: list[_Record]) -> None:
    """Hold the records of one tensor against its type and dims."""
    first, size = chunks[0], _content_bytes(chunks)
    for chunk in chunks[1:]:
        if (chunk.tensor_type, chunk.dims) != (first.tensor_type, first.dims):
            raise _damaged(
                path,
                f"{first.tag!r} is {first.tensor_type} {list(first.dims)} and then "
                f"{chunk.tensor_type} {list(chunk.dims)}",
                chunk.offset,
            )
    if first.tensor_type == _STRING_TYPE:
        return
    if first.tensor_type not in TENSOR_TYPES:
        raise CheckpointError(
            f"{path}: tensor {first.tag!r} at byte {first.offset} has a type that is not supported",
            given=first.tensor_type,
            expected=f"one of {', '.join(TENSOR_TYPES)}",
        )
    # Zeros aside: NumPy makes no array of shape [0, 2**62] either.
    if min(first.dims, default=0) < 0 or math.prod(filter(None, first.dims)) > _MAX_ELEMENTS:
        raise _damaged(path, f"{first.tag!r} has the dims {list(first.dims)}", first.offset)
    needed = count_bytes(TENSOR_TYPES[first.tensor_type], _shape(chunks))
    if size != needed:
        raise _damaged(
            path,
            f"{first.tag!r} is {first.tensor_type} {list(first.dims)}, {needed} bytes, "
            f"but its {len(chunks)} records hold {size}",
            first.offset,
        )


def _content_bytes(chunks: list[_Record]) -> int:
    return sum(chunk.end - chunk.begin for chunk in chunks)


def _shape(chunks: list[_Record]) -> tuple[int, ...]:
    """The tensor's shape: dims [0] with contents is a scalar, as older MindSpore wrote it."""
    dims = chunks[0].dims
    return () if dims == (0,) and _content_bytes(chunks) else dims


def _describe(path: Path, chunks: list[_Record]) -> Tensor:
    first = chunks[0]
    code, shape = TENSOR_TYPES[first.tensor_type], _shape(chunks)
    if len(chunks) == 1:
        return mapped(path, first.tag, code, shape, first.begin)

    def read() -> np.ndarray:
        array = np.empty(shape, NUMPY_DTYPES[code])
        _read_contents(path, chunks, raw_bytes(array))
        return array

    return Tensor(code, shape, read, tuple(Place(path, c.begin, c.tag) for c in chunks))


def _read_contents(path: Path, chunks: list[_Record], target: memoryview) -> None:
    """The contents of the records, one after the other."""
    try:
        with path.open("rb") as file:
            for chunk in chunks:
                size = chunk.end - chunk.begin
                file.seek(chunk.begin)
                if file.readinto(target[:size]) != size:
                    raise CheckpointError(
                        f"{path} has changed since it was opened",
                        given=f"it ends before byte {chunk.end}",
                    )
                target = target[size:]
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_string(path: Path, chunks: list[_Record]) -> str:
    size = _content_bytes(chunks)
    if size > _MAX_STRING_BYTES:
        raise _damaged(path, f"{chunks[0].tag!r} is a text of {size} bytes", chunks[0].offset)
    content = bytearray(size)
    _read_contents(path, chunks, memoryview(content))
    try:
        # NumPy's fixed-width text: zeros at the end are padding, and an empty text is one zero.
        return content.decode("utf-32-le").rstrip("\0")
    except UnicodeDecodeError:
        raise _damaged(path, f"{chunks[0].tag!r} is not text", chunks[0].begin) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read", given=error.strerror or error)


def _damaged(path: Path, what: str, offset: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound MindSpore checkpoint: at byte {offset}, {what}",
        fix="download or copy it again",
    )


# --- writing ---------------------------------------------------------------------------------


def write_file(
    path: str | os.PathLike[str],
    table: Table,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    crc: bool = False,
    append: Mapping[str, int | float | bool | str] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Write a stream of tensors, byte for byte what `mindspore.save_checkpoint` writes.

    Two things differ. MindSpore leaves tensors without elements out; here they get a record with
    empty contents, as from its `async_save`, so nothing is lost (MindSpore reads one of shape (0,)
    back as a scalar). And the file keeps the usual permissions, where MindSpore takes all but
    the owner's right to read away. An existing file is replaced, at the end and at once.

    Args:
        path: of the file; its directory must exist.
        table: what will be written, in this order.
        tensors: (name, array) for every entry of `table`, in its order; bfloat16 as uint16.
        crc: end with a checksum, as `crc_check=True` does.
        append: numbers and texts to put at the end, as `append_dict` does; MindSpore keeps a
            float in 32 bits.
        chunk_bytes: a tensor with more bytes gets several records.

    Raises CheckpointError if a tensor is not what was announced, an appended value cannot be
    stored or has a tensor's name, or the disk refuses; then `path` is as it was.
    """
    path = Path(path)
    appended = dict(append or {})
    clash = appended.keys() & table.keys()
    if clash:
        raise CheckpointError("a tensor and an appended value share a name", given=sorted(clash))
    tails = [_encode_appended(name, value) for name, value in appended.items()]
    names = {name: _encode_name(name) for name in table}
    with _replace(path) as file:
        summed = _Checksummed(file)
        write = summed.write if crc else file.write

        def put(name: str, array: np.ndarray) -> None:
            content, (code, shape) = raw_bytes(array), table[name]
            # A tensor without elements has one record all the same.
            for begin in range(0, content.nbytes or 1, chunk_bytes):
                chunk = content[begin : begin + chunk_bytes]
                write(_record_head(names[name], _TYPE_NAMES[code], shape, chunk.nbytes))
                write(chunk)

        write_checked(put, table, tensors)
        for tail in tails:
            write(tail)
        if crc:
            file.write(_CRC_MARK + summed.crc.to_bytes(10, "big"))


class _Checksummed:
    """Writes to a file and keeps the CRC-32 of everything written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.crc = file, 0

    def write(self, content: bytes | memoryview) -> None:
        self.crc = zlib.crc32(content, self.crc)
        self._file.write(content)


@contextlib.contextmanager
def _replace(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path` when the block ends well, and else leaves nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with write_file_synced(temporary) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written", given=error.strerror) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _record_head(tag: bytes, tensor_type: str, dims: Iterable[int], content_bytes: int) -> bytes:
    """Everything of a record but its contents, which end it."""
    sizes = b"".join(encode_key(1, VARINT) + encode_varint(dim) for dim in dims)
    tensor = sizes + encode_bytes(2, tensor_type.encode()) + _open_bytes(3, content_bytes)
    value = encode_bytes(1, tag) + _open_bytes(2, len(tensor) + content_bytes) + tensor
    return _open_bytes(1, len(value) + content_bytes) + value


def _open_bytes(number: int, size: int) -> bytes:
    """The beginning of a BYTES field whose content follows."""
    return encode_key(number, BYTES) + encode_varint(size)


def _encode_appended(name: str, value: object) -> bytes:
    """The record of a number or a text."""
    tag = _encode_name(name)
    try:
        if isinstance(value, str):
            content = (value or "\0").encode("utf-32-le")
            return _record_head(tag, _STRING_TYPE, (0,), len(content)) + content
        code = _APPENDED[type(value)]
        with np.errstate(over="raise"):
            content = np.array(value, NUMPY_DTYPES[code]).tobytes()
    except (KeyError, ArithmeticError, UnicodeEncodeError):
        raise CheckpointError(
            f"{name!r} cannot be appended",
            given=f"{value!r} ({type(value).__name__})",
            expected="an int of 64 bits, a float of 32, a bool or a text",
        ) from None
    return _record_head(tag, _TYPE_NAMES[code], (), len(content)) + content


def _encode_name(name: str) -> bytes:
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"the name {name!r} has no UTF-8 form") from None
    if len(encoded) > MAX_TEXT_BYTES:
        raise CheckpointError(f"the name {name[:50]!r}… has {len(encoded)} bytes")
    return encoded
