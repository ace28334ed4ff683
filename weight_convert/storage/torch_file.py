"""Reading the weight files of torch.save lazily and writing them in a stream, without PyTorch.

There are two formats. Since 1.6 a file is a ZIP archive: `<name>/data.pkl` is a pickle in which
every storage (a flat run of numbers) is only named, `<name>/data/<key>` are the storages. Before
that it was five pickles, the fourth being the object, and the storages behind them, each with its
number of elements as int64. Both are always little-endian, unless an archive says otherwise.

A tensor is a view of a storage: an offset, a shape and strides. Tied weights are two views of one
storage. What is contiguous is mapped; other views are copied when they are read.

A state dict is a dict, name -> tensor. Files of training tools hold it under a key beside other
things: if no value of the outermost dict is a tensor, `WRAPPERS` are looked for.

Source: PyTorch 2.13, torch/serialization.py and torch/_utils.py; torch_npu, utils/storage.py.
"""

from __future__ import annotations

import math
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from weight_convert.errors import CheckpointError
from weight_convert.storage.pickling import Global, Pickler
from weight_convert.storage.stored_zip import (
    ALIGNMENT,
    Entry,
    ZipWriter,
    read_bytes,
    read_entries,
)
from weight_convert.storage.tensor import (
    NUMPY_DTYPES,
    Place,
    Table,
    Tensor,
    count_bytes,
    few,
    mapped,
    raw_bytes,
    write_checked,
    write_file_synced,
)
from weight_convert.storage.unpickling import (
    MAX_LOADED_BYTES,
    PLAIN,
    damaged,
    describe,
    load,
)

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training tools keep the state dict (Lightning, timm, DeepSpeed and others)."""
MAX_REUSE = 4
"""Tied weights make a file's tensors larger than the file; more than so many times is a trick."""
_SPARE_BYTES = 64 * 2**20
"""Small tensors that repeat a few numbers (`expand`) are no trick."""
_MAX_AXES = 32
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class _Dtype:
    """A dtype of torch: its name there, the bytes of an element, its code of NUMPY_DTYPES."""

    name: str
    size: int
    code: str | None = None
    storage: str = "UntypedStorage"
    """The class of its storages in pickles. Newer dtypes have none of their own."""


_DTYPES = {
    dtype.name: dtype
    for dtype in (
        _Dtype("float64", 8, "F64", "DoubleStorage"),
        _Dtype("float32", 4, "F32", "FloatStorage"),
        _Dtype("float16", 2, "F16", "HalfStorage"),
        _Dtype("bfloat16", 2, "BF16", "BFloat16Storage"),
        _Dtype("int64", 8, "I64", "LongStorage"),
        _Dtype("int32", 4, "I32", "IntStorage"),
        _Dtype("int16", 2, "I16", "ShortStorage"),
        _Dtype("int8", 1, "I8", "CharStorage"),
        _Dtype("uint64", 8, "U64"),
        _Dtype("uint32", 4, "U32"),
        _Dtype("uint16", 2, "U16"),
        _Dtype("uint8", 1, "U8", "ByteStorage"),
        _Dtype("bool", 1, "BOOL", "BoolStorage"),
        # Not carried: these are here to be named in the error.
        _Dtype("complex32", 4, None, "ComplexHalfStorage"),
        _Dtype("complex64", 8, None, "ComplexFloatStorage"),
        _Dtype("complex128", 16, None, "ComplexDoubleStorage"),
        _Dtype("qint8", 1, None, "QInt8Storage"),
        _Dtype("quint8", 1, None, "QUInt8Storage"),
        _Dtype("qint32", 4, None, "QInt32Storage"),
        _Dtype("quint4x2", 1, None, "QUInt4x2Storage"),
        _Dtype("quint2x4", 1, None, "QUInt2x4Storage"),
        _Dtype("float8_e4m3fn", 1),
        _Dtype("float8_e4m3fnuz", 1),
        _Dtype("float8_e5m2", 1),
        _Dtype("float8_e5m2fnuz", 1),
        _Dtype("float8_e8m0fnu", 1),
        _Dtype("float4_e2m1fn_x2", 1),
    )
}
_UNTYPED = _Dtype("bytes", 1)
_BY_CODE = {dtype.code: dtype for dtype in _DTYPES.values() if dtype.code}


@dataclass(frozen=True)
class _Storage:
    """A run of `size` bytes in the file that the pickle calls `key`."""

    key: str
    size: int
    dtype: _Dtype


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it. Checked for types; not yet for its bounds."""

    storage: _Storage
    dtype: _Dtype
    offset: int
    """In elements, as the strides."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def reach(self) -> int:
        """Elements from the first one to the last one that is read."""
        if not self.count:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps. Strides of axes of 1 mean nothing."""
        expected = 1
        for n, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and step != expected:
                return False
            expected *= n
        return True


@dataclass(frozen=True)
class _Foreign:
    """A tensor of a kind that is not carried."""

    kind: str


# --- reading ---------------------------------------------------------------------------------


def open_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of the state dict in a file of either format, in its order, not read yet.

    What stands beside a wrapped state dict (optimizer, epoch) is left out; what stands in the
    state dict itself must be a tensor, see `open_file_with_rest`.

    Raises:
        CheckpointError: the file is absent, truncated or damaged; its pickle wants anything else
            than tensors (nothing was executed); it holds no state dict; an entry of the state dict
            is not a tensor, or one of a dtype that NUMPY_DTYPES lacks (complex, quantized, float8)
            or of another kind (sparse, nested, meta).
    """
    tensors, rest = open_file_with_rest(path)
    if rest:
        raise CheckpointError(
            f"{path} holds more than tensors in its state dict",
            given=few(f"{name!r}: {describe(value)}" for name, value in rest.items()),
            expected="a tensor for every name",
            fix="save the tensors alone, or read it with open_file_with_rest",
        )
    return tensors


def open_file_with_rest(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `open_file`, and the entries of the state dict that are no tensors: numbers, text, ...

    Print those with `unpickling.describe`: they may contain themselves.
    """
    path = Path(path)
    value, places = _read(path)
    state = _find_state_dict(path, value)
    views = {name: entry for name, entry in state.items() if isinstance(entry, (_View, _Foreign))}
    tensors = {name: _make_tensor(path, name, view, places) for name, view in views.items()}
    _check_reuse(path, tensors.values(), places.values())
    return tensors, {name: entry for name, entry in state.items() if name not in views}


def _read(path: Path) -> tuple[Any, Mapping[str, Entry]]:
    """The object of a file, and where the storages are that it names."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(0)
            if head == b"PK\x03\x04":
                return _read_archive(path, file)
            return _read_legacy(path, file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", given=error.strerror) from None


def _read_archive(path: Path, file: BinaryIO) -> tuple[Any, Mapping[str, Entry]]:
    entries = read_entries(path)
    names = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise CheckpointError(
            f"{path} is a ZIP archive, but not one of torch.save",
            given=few(entries),
            expected="one entry <name>/data.pkl",
        )
    folder = names[0].removesuffix("data.pkl")
    _check_byte_order(path, entries.get(folder + "byteorder"))
    program = entries[names[0]]
    read_bytes(path, program, MAX_LOADED_BYTES)
    file.seek(program.offset)
    storages: dict[str, _Storage] = {}
    value = load(file, path, _ALLOWED, _Storages(storages).find, end=program.offset + program.size)
    nothing = Entry(program.offset, 0, 0)
    return value, {key: entries.get(f"{folder}data/{key}", nothing) for key in storages}


def _check_byte_order(path: Path, entry: Entry | None) -> None:
    """Archives of before 2.0 do not say; big-endian machines are the rare exception."""
    order = b"little" if entry is None else read_bytes(path, entry, 16)
    if order != b"little":
        raise CheckpointError(
            f"{path} was written on another kind of machine",
            given=f"byte order {describe(order)}",
            expected="little",
            fix="load it with PyTorch and save it again",
        )


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, Mapping[str, Entry]]:
    if file.read(1) != pickle.PROTO:
        raise _unknown(path, "neither a ZIP archive nor a pickle")
    file.seek(0)
    magic = load(file, path, _ALLOWED)
    if magic != _MAGIC:
        raise _unknown(path, f"a pickle of {describe(magic)}")
    version = load(file, path, _ALLOWED)
    if version != _LEGACY_PROTOCOL:
        raise _unknown(path, f"the old format of torch.save, version {describe(version)}")
    load(file, path, _ALLOWED)  # what the machine was like; the numbers are the same everywhere
    storages: dict[str, _Storage] = {}
    value = load(file, path, _ALLOWED, _Storages(storages).find)
    keys = load(file, path, _ALLOWED)
    return value, _find_legacy_storages(path, file, keys, storages)


def _find_legacy_storages(
    path: Path, file: BinaryIO, keys: Any, storages: Mapping[str, _Storage]
) -> dict[str, Entry]:
    """They lie behind one another to the end of the file, in the order of `keys`."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise damaged(path, "the list of its storages is no list of names", describe(keys))
    if set(keys) != storages.keys() or len(keys) != len(storages):
        raise damaged(path, "its tensors and the list of its storages contradict each other")
    places = {}
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    for key in keys:
        storage = storages[key]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        position += 8
        if position + storage.size > size:
            raise _truncated(path, size, f"storage {key} to byte {position + storage.size}")
        if count * storage.dtype.size != storage.size:
            raise damaged(
                path, f"storage {key} should have {storage.size} bytes", f"{count} elements"
            )
        places[key] = Entry(position, storage.size, 0)
        position += storage.size
    if position != size:
        raise damaged(path, f"{size - position} bytes are left over behind its storages")
    return places


def _truncated(path: Path, size: int, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated",
        given=f"{size} bytes",
        expected=expected,
        fix="download or copy it again",
    )


def _unknown(path: Path, given: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a file of torch.save",
        given=given,
        expected="a ZIP archive, or the format of before PyTorch 1.6",
    )


def _find_state_dict(path: Path, value: Any) -> dict[str, Any]:
    """The dict of tensors: the object itself, or what it holds under one of WRAPPERS."""
    found = [value] if _holds_tensors(value) else []
    if isinstance(value, dict) and not found:
        found = [value[key] for key in WRAPPERS if _holds_tensors(value.get(key))]
    if not found and value == {}:
        found = [value]
    if len(found) != 1:
        inside = few(map(describe, value)) if isinstance(value, dict) else ""
        raise CheckpointError(
            f"{path} holds {'several state dicts' if found else 'no state dict'}",
            given=f"{describe(value)}{': ' if inside else ''}{inside}",
            expected="a dict of tensors, or one under one of the keys " + ", ".join(WRAPPERS),
            fix="save the state dict alone",
        )
    names = [name for name in found[0] if not isinstance(name, str)]
    if names:
        raise damaged(path, "it has a tensor whose name is not text", few(map(describe, names)))
    return found[0]


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(entry, (_View, _Foreign)) for entry in value.values()
    )


# --- tensors ---------------------------------------------------------------------------------


def _make_tensor(
    path: Path, name: str, view: _View | _Foreign, places: Mapping[str, Entry]
) -> Tensor:
    kind = view.kind if isinstance(view, _Foreign) else view.dtype.name
    if isinstance(view, _Foreign) or view.dtype.code is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} is of a kind that is not carried",
            given=kind,
            expected=f"a dense tensor of one of {', '.join(d.name for d in _BY_CODE.values())}",
        )
    place, size = places[view.storage.key], view.dtype.size
    first, last = view.offset * size, (view.offset + view.reach) * size
    if view.storage.size > place.size:
        raise damaged(
            path,
            f"storage {view.storage.key} should have {view.storage.size} bytes",
            f"{place.size} bytes",
        )
    if view.count and last > view.storage.size:
        raise damaged(
            path,
            f"tensor {name!r} reaches to byte {last} of a storage of {view.storage.size} bytes",
            f"shape {view.shape}, strides {view.strides}, offset {view.offset}",
        )
    if view.contiguous:
        return mapped(path, name, view.dtype.code, view.shape, place.offset + first)
    return _strided(path, name, view, view.dtype.code, place.offset + first)


def _strided(path: Path, name: str, view: _View, code: str, offset: int) -> Tensor:
    """A tensor whose elements do not lie in C order: a copy is made when it is read."""
    dtype = np.dtype(NUMPY_DTYPES[code])

    def read() -> np.ndarray:
        if not view.count:
            return np.empty(view.shape, dtype)
        raw = np.memmap(path, np.uint8, "c", offset, (view.reach * dtype.itemsize,))
        axes = zip(view.shape, view.strides, strict=True)
        strides = [step * dtype.itemsize if n > 1 else 0 for n, step in axes]
        return np.ndarray(view.shape, dtype, raw, 0, strides).copy()

    return Tensor(code, view.shape, read, (Place(path, offset, name),))


def _check_reuse(path: Path, tensors: Iterable[Tensor], places: Iterable[Entry]) -> None:
    total, held = sum(t.nbytes for t in tensors), sum(place.size for place in places)
    if total > MAX_REUSE * held + _SPARE_BYTES:
        raise damaged(
            path,
            "its tensors refer to the same bytes over and over",
            f"{total} bytes of tensors in {held} bytes of storages",
        )


# --- what the pickle may say -----------------------------------------------------------------


class _Storages:
    """Persistent ids: ("storage", class, key, device, number of elements[, view])."""

    def __init__(self, found: dict[str, _Storage]) -> None:
        self.found = found

    def find(self, name: Any) -> _Storage:
        if not isinstance(name, tuple) or len(name) not in (5, 6) or name[0] != "storage":
            raise ValueError(f"{describe(name)} as the name of a storage")
        _, dtype, key, _, count, *view = name
        if not isinstance(dtype, _Dtype) or not isinstance(key, str) or view not in ([], [None]):
            raise ValueError(f"storage {describe(key)} of {describe(dtype)}")
        storage = _Storage(key, _count(count) * dtype.size, dtype)
        if self.found.setdefault(key, storage) != storage:
            raise ValueError(f"storage {describe(key)} is two different ones")
        return storage


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{describe(value)} as a size")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_AXES:
        raise ValueError(f"{describe(values)} as a shape or strides")
    return tuple(map(_count, values))


def _make_view(storage: Any, offset: Any, shape: Any, strides: Any) -> _View:
    """`_rebuild_tensor`, of before 0.4, and the beginning of its successors."""
    if not isinstance(storage, _Storage):
        raise TypeError(f"{describe(storage)} as a storage")
    view = _View(storage, storage.dtype, _count(offset), _counts(shape), _counts(strides))
    if len(view.shape) != len(view.strides):
        raise ValueError(f"shape {view.shape} with strides {view.strides}")
    if math.prod(max(n, 1) for n in view.shape) >= 2**59:
        raise ValueError(f"a tensor of shape {view.shape}")
    return view


def _rebuild(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, bits: Any = None
) -> _View | _Foreign:
    """`_rebuild_tensor_v2`. The last argument says that a tensor is to be conjugated or negated."""
    view = _make_view(storage, offset, shape, strides)
    return _Foreign("a conjugated or negated view") if bits else view


def _rebuild_any_dtype(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    gradient: Any,
    hooks: Any,
    dtype: Any,
    bits: Any = None,
) -> _View | _Foreign:
    """`_rebuild_tensor_v3`: of dtypes without a storage class."""
    if not isinstance(dtype, _Dtype):
        raise TypeError(f"{describe(dtype)} as a dtype")
    view = _rebuild(storage, offset, shape, strides, gradient, hooks, bits)
    return replace(view, dtype=dtype) if isinstance(view, _View) else view


def _rebuild_npu(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, layout: Any
) -> _View | _Foreign:
    """Of torch_npu. `layout` is the one in the device's memory; files are always plain."""
    return _rebuild(storage, offset, shape, strides, gradient, hooks)


def _unwrap(data: Any, *_: Any) -> _View | _Foreign:
    """`_rebuild_parameter`: a parameter is its tensor; gradients, hooks, attributes are dropped."""
    if not isinstance(data, (_View, _Foreign)):
        raise TypeError(f"{describe(data)} as a parameter")
    return data


def _rebuild_with_attributes(
    function: Any, kind: Any, arguments: Any, state: Any
) -> _View | _Foreign:
    """`_rebuild_from_type_v2`: a tensor that somebody has set attributes on."""
    if kind is not _TENSOR or function not in (_rebuild, _rebuild_any_dtype):
        raise ValueError("a tensor of an unknown class")
    return function(*arguments)


def _make_size(values: Any = ()) -> tuple[int, ...]:
    """`torch.Size`."""
    return _counts(values)


def _make_nothing(*_: Any) -> None:
    """Of what only says where or how a tensor lay in memory."""


def _refuse_kind(kind: str) -> Callable[..., _Foreign]:
    return lambda *_: _Foreign(kind)


_TENSOR = object()
"""Stands for the classes torch.Tensor and torch.nn.Parameter."""

_ALLOWED: dict[tuple[str, str], Any] = {
    **PLAIN,
    **{("torch", dtype.name): dtype for dtype in _DTYPES.values()},
    **{("torch", dtype.storage): dtype for dtype in _DTYPES.values()},
    ("torch", "UntypedStorage"): _UNTYPED,
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    ("torch._utils", "_rebuild_tensor"): _make_view,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_any_dtype,
    ("torch._utils", "_rebuild_parameter"): _unwrap,
    ("torch._utils", "_rebuild_parameter_with_state"): _unwrap,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
    ("torch_npu.utils.storage", "_rebuild_npu_tensor"): _rebuild_npu,
    ("torch_npu.npu._format", "Format"): _make_nothing,
    ("torch", "Tensor"): _TENSOR,
    ("torch.nn.parameter", "Parameter"): _TENSOR,
    ("torch", "Size"): _make_size,
    ("torch", "device"): _make_nothing,
    ("torch._utils", "_rebuild_sparse_tensor"): _refuse_kind("sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _refuse_kind("nested"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _refuse_kind("meta (without values)"),
    ("torch._utils", "_rebuild_qtensor"): _refuse_kind("quantized"),
    ("torch.serialization", "_get_layout"): _make_nothing,
    ("torch", "per_tensor_affine"): None,
    ("torch", "per_channel_affine"): None,
}


# --- writing ---------------------------------------------------------------------------------


def write_file(
    path: str | os.PathLike[str], table: Table, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write a state dict that `torch.load(path, weights_only=True, mmap=True)` reads.

    One tensor is in memory at a time. Each tensor has a storage of its own, in the order of the
    table. The file is byte for byte what `torch.save` of PyTorch 2.13 makes of a dict of contiguous
    CPU tensors, except for the first half of `.data/serialization_id`: there it has a hash of the
    entries' names that depends on the C++ library. Until the last byte is written the file has no
    table of entries, so nothing takes it for a whole one.

    Args:
        table: every tensor, in the order of the state dict.
        tensors: (name, array) in the order of the table; bfloat16 as uint16.

    Raises:
        CheckpointError: a tensor is not what was announced, or the disk refuses.
    """
    path = Path(path)
    with write_file_synced(path) as file:
        archive = _Archive(file, _folder_name(path))
        archive.add("data.pkl", _build_program(table))
        archive.add(".format_version", b"1")
        archive.add(".storage_alignment", str(ALIGNMENT).encode())
        archive.add("byteorder", b"little")
        write_checked(archive.add_storage, table, tensors)
        archive.finish()


class _Archive:
    """The entries of a file, with the fingerprint that comes last."""

    def __init__(self, file: BinaryIO, folder: str) -> None:
        self._zip = ZipWriter(file, folder)
        self._names, self._contents = 0, 0
        self._storages = 0

    def add(self, name: str, data: bytes | memoryview) -> None:
        crc = self._zip.add(name, data)
        self._names = _combine(self._names, zlib.crc32(name.encode()))
        if len(data):
            self._contents = _combine(self._contents, crc)

    def add_storage(self, name: str, array: np.ndarray) -> None:
        self.add(f"data/{self._storages}", raw_bytes(array))
        self._storages += 1

    def finish(self) -> None:
        self.add("version", b"3\n")
        self._zip.add(".data/serialization_id", f"{self._names:020}{self._contents:020}".encode())
        self._zip.finish()


def _combine(seed: int, value: int) -> int:
    """As c10::hash_combine."""
    mixed = value + 0x9E3779B9 + (seed << 6) + (seed >> 2)
    return (seed ^ mixed) & 0xFFFFFFFFFFFFFFFF


def _folder_name(path: Path) -> str:
    """The folder of the entries: the file's name without its last suffix.

    torch writes to a path with other than ASCII characters as to a stream, which has no name.
    """
    stem = path.name.rpartition(".")[0] or path.name
    return stem if str(path).isascii() else "archive"


@dataclass(frozen=True)
class _Call:
    function: Global
    arguments: Sequence[Any]


@dataclass(frozen=True)
class _PersistentId:
    name: tuple[Any, ...]


class _Program(Pickler):
    """A pickler that also writes calls and persistent ids."""

    def save(self, value: Any) -> None:
        if isinstance(value, _Call):
            self._save_call(value.function, tuple(value.arguments))
            self._memoize()
        elif isinstance(value, _PersistentId):
            super().save(value.name)
            self._write(pickle.BINPERSID)
        else:
            super().save(value)


def _build_program(table: Table) -> bytes:
    """data.pkl, as the pickler of Python makes it of a dict of tensors."""
    file = BytesIO()
    program = _Program(file, protocol=2)
    program.begin()
    program.save({name: _build_call(n, *entry) for n, (name, entry) in enumerate(table.items())})
    program.end()
    return file.getvalue()


def _build_call(number: int, code: str, shape: Sequence[int]) -> _Call:
    dtype = _BY_CODE[code]
    strides = tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))
    typed = dtype.storage != _UNTYPED_CLASS.name
    size = math.prod(shape) if typed else count_bytes(code, shape)
    storage = _PersistentId(("storage", _STORAGE_CLASSES[dtype.name], str(number), "cpu", size))
    view = (storage, 0, tuple(shape), strides, False, _Call(_ORDERED_DICT, ()))
    if typed:
        return _Call(_REBUILD, view)
    return _Call(_REBUILD_ANY_DTYPE, (*view, _DTYPE_GLOBALS[dtype.name]))


_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_ANY_DTYPE = Global("torch._utils", "_rebuild_tensor_v3")
_ORDERED_DICT = Global("collections", "OrderedDict")
_UNTYPED_CLASS = Global("torch.storage", "UntypedStorage")
_DTYPE_GLOBALS = {name: Global("torch", name) for name in _DTYPES}
_STORAGE_CLASSES = {
    dtype.name: _UNTYPED_CLASS
    if dtype.storage == _UNTYPED_CLASS.name
    else Global("torch", dtype.storage)
    for dtype in _BY_CODE.values()
}
