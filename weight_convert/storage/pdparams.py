"""Reading Paddle's `.pdparams` lazily and writing them in a stream, without Paddle.

A file is a pickle of a dict, name -> NumPy array, with at most two further entries: a table of the
names that parameters have inside of Paddle, and, in protocols 2 and 3, a table of the arrays that
were cut because they have more than 2^30 - 1 bytes. bfloat16, which NumPy lacks, is stored as
uint16, and nothing says so: Paddle itself takes every uint16 for bfloat16, and so does this module.
(float8 is stored as int8, and stays int8 when Paddle reads it.)

Other things that `paddle.save` can pickle are refused by name: optimizer states (nested dicts with
numbers in them), single tensors, tensors of static graphs (their pickles call `eval`).

Source: Paddle 3.3.1, python/paddle/framework/io.py and io_utils.py.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from weight_convert.errors import CheckpointError
from weight_convert.storage.pickling import Pickler
from weight_convert.storage.tensor import (
    NUMPY_DTYPES,
    Place,
    Table,
    Tensor,
    count_bytes,
    few,
    mapped,
    write_checked,
    write_file_synced,
)
from weight_convert.storage.unpickling import (
    PLAIN,
    Buildable,
    LazyBytes,
    damaged,
    describe,
    load,
)

PARAMETER_NAMES = "StructuredToParameterName@@"
"""Key of {name: name inside of Paddle}."""
SLICES = "UnpackBigParamInfor@@"
"""Key of {name: {"OriginShape": shape, "slices": [keys]}}, of the arrays that were cut."""
MAX_SLICE_BYTES = 2**30 - 1
"""Larger arrays are cut in protocols 2 and 3."""
PROTOCOLS = (2, 3, 4)
"""What `paddle.save` writes. Protocol 5 is read too."""
MAX_REUSE = 4
"""A file whose tensors have more bytes than so many times its own size is a trick: a pickle may
refer to the same array any number of times."""

UNKNOWN_TO_PADDLE = ("U16", "U32", "U64")
"""`paddle.load` fails for the wide ones and takes U16 for bfloat16."""

_CODES = {code: name for name, code in NUMPY_DTYPES.items() if name != "U16"}
"""NumPy dtype, as in NUMPY_DTYPES, -> dtype code; uint16 is bfloat16."""
_MAX_AXES = 32
_NDARRAY = object()
"""Stands for the class numpy.ndarray, which is named in pickles and never called."""


# --- reading ---------------------------------------------------------------------------------


def open_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of a file, not read yet, in the order of the file.

    Memory stays at the tensors in use for every protocol. What protocols 3 to 5 hold is mapped;
    protocol 2 holds bytes as text, so a tensor is decoded into memory when it is read.

    Raises:
        CheckpointError: the file is absent, truncated or damaged; it is not a dict of arrays (the
            first entry that is none is named); a dtype is not one of NUMPY_DTYPES, or big-endian;
            or its pickle wants anything else than arrays. Nothing was executed.
    """
    path = Path(path)
    table = _load_table(path)
    table.pop(PARAMETER_NAMES, None)
    slices = table.pop(SLICES, {})
    tensors = {name: _make_tensor(path, name, value) for name, value in table.items()}
    tensors = _join_slices(path, tensors, slices)
    _check_reuse(path, tensors)
    return tensors


def read_parameter_names(path: str | os.PathLike[str]) -> dict[str, str]:
    """{tensor name: the name that it has inside of Paddle}, empty if the file does not say.

    Raises CheckpointError as `open_file` does, and if the table holds anything but names.
    """
    path = Path(path)
    names = _load_table(path).get(PARAMETER_NAMES, {})
    if not isinstance(names, dict) or not _all_text([*names, *names.values()]):
        raise damaged(path, f"its {PARAMETER_NAMES} is not a table of names", describe(names))
    return names


def _load_table(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = load(file, path, _ALLOWED)
            left = path.stat().st_size - file.tell()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", given=error.strerror) from None
    if left:
        raise damaged(path, f"{left} bytes are left over behind its pickle")
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} does not hold a table of tensors",
            given=describe(value),
            expected="a dict of tensors, as in `paddle.save(layer.state_dict(), path)`",
        )
    if not _all_text(value):
        raise damaged(path, "it has a tensor whose name is not text")
    return value


def _all_text(names: Iterable[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


class _Dtype(Buildable):
    """A NumPy dtype of a pickle: first its kind and size, then, as its state, its byte order."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if not isinstance(kind, str):
            raise TypeError(f"{describe(kind)} as a dtype")
        self.kind = kind
        self.order = ""

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[1], str):
            raise ValueError(f"{describe(state)} as the state of a dtype")
        if self.order:
            raise ValueError("a dtype with two states")
        self.order = state[1]

    @property
    def code(self) -> str:
        """In the spelling of NUMPY_DTYPES, where it has one."""
        return self.order + self.kind


@dataclass(frozen=True)
class _Contents:
    """What a pickle says of an array. Nothing of it has been checked but the types."""

    dtype: _Dtype
    shape: tuple[Any, ...]
    fortran: bool
    data: bytes | LazyBytes


class _Array(Buildable):
    """A NumPy array of a pickle: empty first, then, as its state, what it contains."""

    def __init__(self, *_: Any) -> None:
        self.contents: _Contents | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError(f"{describe(state)} as the state of an array")
        if self.contents:
            raise ValueError("an array with two states")
        _, shape, dtype, fortran, data = state
        self.contents = _make_contents(data, dtype, shape, bool(fortran))


def _make_contents(data: Any, dtype: Any, shape: Any, fortran: bool) -> _Contents:
    bytes_given = isinstance(data, bytes) or (isinstance(data, LazyBytes) and data.kind != "text")
    if not bytes_given or not isinstance(dtype, _Dtype):  # arrays of objects have a list here
        raise TypeError(f"an array of {describe(data)}")
    if not isinstance(shape, tuple):
        raise TypeError(f"{describe(shape)} as a shape")
    return _Contents(dtype, shape, fortran, data)


def _make_scalar(dtype: Any, data: Any) -> _Array:
    array = _Array()
    array.contents = _make_contents(data, dtype, (), fortran=False)
    return array


def _make_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """What protocol 5 calls to make an array."""
    if order not in ("C", "F"):
        raise ValueError(f"an array in order {describe(order)}")
    array = _Array()
    array.contents = _make_contents(data, dtype, shape, order == "F")
    return array


def _make_pair(items: Any) -> tuple[Any, ...]:
    """`tuple((name, array))`, which is how Paddle pickles a tensor among other things."""
    if not isinstance(items, tuple):
        raise TypeError(f"a tuple of {describe(items)}")
    return items


_ALLOWED = {
    **PLAIN,
    ("__builtin__", "tuple"): _make_pair,
    ("builtins", "tuple"): _make_pair,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Dtype,
    # NumPy 1, then NumPy 2.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _make_scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _make_from_buffer for core in ("core", "_core")},
}


def _make_tensor(path: Path, name: str, value: Any) -> Tensor:
    """The tensor of one entry: an array, or (name inside of Paddle, array).

    `paddle.save` writes such pairs where a dict holds other things beside tensors.
    """
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    contents = value.contents if isinstance(value, _Array) else None
    if contents is None:
        raise CheckpointError(
            f"{path}: entry {name!r} is not a tensor",
            given=describe(value),
            expected="a dict of tensors, as in `paddle.save(layer.state_dict(), path)`; "
            "states of optimizers are not read",
        )
    code, shape = _check_contents(path, name, contents)
    data = contents.data
    if isinstance(data, LazyBytes) and data.kind == "bytes" and not contents.fortran:
        return mapped(path, name, code, shape, data.offset)

    def read() -> np.ndarray:
        flat = _read_bytes(data, count_bytes(code, shape)).view(NUMPY_DTYPES[code])
        if contents.fortran:
            return np.array(flat.reshape(shape[::-1]).T, order="C")
        return flat.reshape(shape)

    # Short contents were read with the pickle, from somewhere in it.
    offset = data.offset if isinstance(data, LazyBytes) else 0
    return Tensor(code, shape, read, (Place(path, offset, name),))


def _read_bytes(data: bytes | LazyBytes, count: int) -> np.ndarray:
    """uint8 [count], which the caller may change."""
    if isinstance(data, LazyBytes):
        return np.asarray(data.read(count))
    return np.frombuffer(data, np.uint8).copy()


def _check_contents(path: Path, name: str, contents: _Contents) -> tuple[str, tuple[int, ...]]:
    """Dtype code and shape of an array whose bytes are as many as these say."""
    code = _CODES.get(contents.dtype.code)
    if code is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} has a dtype that is not supported",
            given=repr(contents.dtype.code[:80]),
            expected=f"one of {' '.join(_CODES)} (uint16, u2, is bfloat16)",
        )
    _check_shape(path, name, contents.shape)
    needed, held = count_bytes(code, contents.shape), _possible_sizes(contents.data)
    if needed not in held:
        raise damaged(
            path, f"tensor {name!r} is {code} {contents.shape}, {needed} bytes", f"{held[-1]} bytes"
        )
    return code, contents.shape


def _check_shape(path: Path, name: str, shape: Any) -> None:
    """Axes are few and not absurd: NumPy refuses others, even where there is no element."""
    fits = (
        isinstance(shape, tuple)
        and len(shape) <= _MAX_AXES
        and all(type(size) is int and size >= 0 for size in shape)
        and math.prod(size or 1 for size in shape) < 2**60
    )
    if not fits:
        raise damaged(path, f"tensor {name!r} has a shape that cannot be", describe(shape))


def _possible_sizes(data: bytes | LazyBytes) -> range:
    """How many bytes the contents may be; more than one number only if they are not read yet."""
    if isinstance(data, bytes):
        return range(len(data), len(data) + 1)
    least = data.length if data.kind == "bytes" else (data.length + 1) // 2
    return range(least, data.length + 1)


def _join_slices(path: Path, tensors: dict[str, Tensor], table: Any) -> dict[str, Tensor]:
    """Put arrays together that were cut; they come last, as Paddle puts them."""
    if not isinstance(table, dict) or not _all_text(table):
        raise damaged(path, f"its {SLICES} is not a table", describe(table))
    joined = dict(tensors)
    for name, value in table.items():
        entry = value if isinstance(value, dict) else {}
        shape, keys = entry.get("OriginShape"), entry.get("slices")
        if not isinstance(keys, list) or not _all_text(keys) or not keys or name in joined:
            raise damaged(path, f"its {SLICES} does not describe {name!r}", describe(value))
        _check_shape(path, name, shape)
        parts = [joined.pop(key, None) for key in keys]
        absent = [key for key, part in zip(keys, parts, strict=True) if part is None]
        if absent:
            raise damaged(path, f"parts of tensor {name!r} are absent or used twice", few(absent))
        joined[name] = _join(path, name, parts, shape)
    return joined


def _join(path: Path, name: str, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    code = parts[0].dtype
    flat = all(part.dtype == code and len(part.shape) == 1 for part in parts)
    if not flat or sum(part.nbytes for part in parts) != count_bytes(code, shape):
        raise damaged(
            path,
            f"the parts of tensor {name!r} do not make {code} {shape}",
            few(f"{part.dtype} {part.shape}" for part in parts),
        )

    def read() -> np.ndarray:
        whole = np.empty(math.prod(shape), NUMPY_DTYPES[code])
        begin = 0
        for part in parts:
            end = begin + part.shape[0]
            whole[begin:end] = part.read()
            begin = end
        return whole.reshape(shape)

    places = tuple(replace(place, name=name) for part in parts for place in part.places)
    return Tensor(code, shape, read, places)


def _check_reuse(path: Path, tensors: Mapping[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MAX_REUSE * path.stat().st_size:
        raise damaged(path, f"it has {path.stat().st_size} bytes, and its tensors {size}")


# --- writing ---------------------------------------------------------------------------------


def write_file(
    path: str | os.PathLike[str],
    table: Table,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    protocol: int = 4,
    parameter_names: Mapping[str, str] | None = None,
) -> None:
    """Write a file from a stream of tensors, with one of them in memory.

    It is byte for byte what `paddle.save(state_dict, path, protocol)` writes with NumPy 1 for
    tensors of these names, dtypes and contents, if `parameter_names` says what Paddle calls them;
    but for one case: protocols 2 and 3 cut arrays of more than 2^30 - 1 bytes, and Paddle puts the
    parts behind all other tensors, where this function leaves them in their turn.

    Args:
        path: gets its name when the file is complete; an older one is replaced.
        table: every tensor, in the order of the file.
        tensors: (name, array) for every entry of `table` and in its order; bfloat16 as uint16.
        protocol: 2, 3 or 4.
        parameter_names: tensor name -> name inside of Paddle, which `paddle.load` gives to the
            tensor. By default a tensor's own name.

    Raises:
        CheckpointError: the stream is not what `table` says; a dtype is one that Paddle does not
            have; a name has a meaning of its own in these files; or the disk refuses.
    """
    path = Path(path)
    if protocol not in PROTOCOLS:
        raise CheckpointError("Paddle has no such protocol", given=protocol, expected=PROTOCOLS)
    parts = _plan_slices(table) if protocol < 4 else {}
    _check_table(path, table, parts)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with write_file_synced(temporary) as file:
            pickler = Pickler(file, protocol)
            pickler.begin()
            _write_entries(pickler, table, tensors, parts, parameter_names or {})
            pickler.end()
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written", given=error.strerror) from error
    finally:
        with contextlib.suppress(OSError):  # it has its name by now, or could not be made
            temporary.unlink()


def _plan_slices(table: Table) -> dict[str, list[str]]:
    """Tensor name -> keys of its parts, of those that protocols 2 and 3 cut."""
    return {
        name: [f"{name}@@.{number}" for number in range(-(-math.prod(shape) // _elements(code)))]
        for name, (code, shape) in table.items()
        if math.prod(shape) > _elements(code)
    }


def _elements(code: str) -> int:
    """Elements of each part but the last."""
    return MAX_SLICE_BYTES // np.dtype(NUMPY_DTYPES[code]).itemsize


def _check_table(path: Path, table: Table, parts: Mapping[str, list[str]]) -> None:
    unknown = [f"{name} ({code})" for name, (code, _) in table.items() if code in UNKNOWN_TO_PADDLE]
    if unknown:
        raise CheckpointError(
            f"{path} cannot hold dtypes that Paddle does not have",
            given=few(unknown),
            expected=f"another dtype than {', '.join(UNKNOWN_TO_PADDLE)}",
            fix="convert the tensors first; U16 that holds bfloat16 is to be named BF16",
        )
    taken = {PARAMETER_NAMES, SLICES, *(key for keys in parts.values() for key in keys)}
    if taken & set(table):
        raise CheckpointError(
            f"{path} cannot hold tensors of these names, which mean something else there",
            given=few(sorted(taken & set(table))),
        )


def _write_entries(
    pickler: Pickler,
    table: Table,
    tensors: Iterable[tuple[str, np.ndarray]],
    parts: Mapping[str, list[str]],
    parameter_names: Mapping[str, str],
) -> None:
    count = sum(len(parts.get(name, [name])) for name in table)
    with pickler.save_items(count + 1 + bool(parts)) as add:

        def write(name: str, array: np.ndarray) -> None:
            if name not in parts:
                add(keys[name], array)
                return
            flat, step = array.reshape(-1), _elements(table[name][0])
            for number, key in enumerate(parts[name]):
                add(key, flat[number * step : (number + 1) * step])

        # The pickler knows a name again if it is the same object.
        keys = {name: name for name in table}
        write_checked(write, table, tensors)
        add(PARAMETER_NAMES, {name: _copy(parameter_names.get(name, name)) for name in table})
        if parts:
            add(SLICES, {name: _describe_parts(table[name], keys) for name, keys in parts.items()})


def _describe_parts(entry: tuple[str, tuple[int, ...]], keys: list[str]) -> dict[str, Any]:
    return {"OriginShape": tuple(entry[1]), "slices": keys}


def _copy(text: str) -> str:
    """Another object of the same text: Paddle's names of tensors are no names of parameters."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
