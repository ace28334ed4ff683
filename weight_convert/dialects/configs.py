"""What dialects do with configuration files: check them, and give them back as they were.

A dialect writes its configuration anew from the canonical one: complete, in its own spelling. The
file that was read once may be sparse, or say more. It is therefore kept, and only what became
different since is replaced in it. The same holds the other way: a manifest keeps the canonical
configuration that a checkpoint was written from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from weight_convert.canonical import Config, stored_dtype
from weight_convert.cast import CODES
from weight_convert.contents import Contents
from weight_convert.errors import CheckpointError
from weight_convert.storage.tensor import Tensor

_ABSENT = object()


def restored(kept: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> Config:
    """`kept`, with what became different since.

    Args:
        kept: a configuration as it once was.
        before: what writing (or reading) anew would make of `kept`.
        now: what writing (or reading) anew makes today.
    """
    result = {key: value for key, value in kept.items() if key in now or key not in before}
    for key, value in now.items():
        old = before.get(key, _ABSENT)
        if old == value:
            continue
        nested = all(isinstance(side, Mapping) for side in (kept.get(key), old, value))
        result[key] = restored(kept[key], old, value) if nested else value
    return result


def as_it_was(
    contents: Contents,
    now: Config,
    there_and_back: Callable[[Config], Config],
    keys: Collection[str] | None = None,
) -> Config:
    """The canonical configuration as it was when the manifest's conversion wrote this checkpoint.

    Args:
        contents: the checkpoint that is read.
        now: the canonical configuration that its own files say.
        there_and_back: what a canonical configuration becomes when this dialect writes and reads
            it.
        keys: those of the top level that this dialect has a say in; all of them if absent.
    """
    kept = contents.manifest.get("config")
    if not isinstance(kept, dict):
        return now
    kept = {key: value for key, value in kept.items() if keys is None or key in keys}
    try:
        before = there_and_back(kept)
    except (CheckpointError, AttributeError, ArithmeticError, LookupError, TypeError, ValueError):
        return now  # the manifest belongs to something else, or is damaged: what is there counts
    return restored(kept, before, now)


def dtype_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], otherwise: str = "float32"
) -> str:
    """The dtype that a configuration states, else that of the first floating-point tensor.

    Args:
        config: any config.json.
        tensors: the weights.
        otherwise: if neither says.
    """
    if any(config.get(key) for key in ("torch_dtype", "dtype")):
        return stored_dtype(config)
    names = {code: name for name, code in CODES.items()}
    return next((names[t.dtype] for t in tensors.values() if t.dtype in names), otherwise)


def check_types(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Refuse fields whose values have another type than their defaults, and sizes below 1.

    Args:
        given: what a file says.
        defaults: field -> default; None stands for a size that may be null.
        where: names the file, and the object in it.

    Raises:
        CheckpointError: names the field.
    """
    for key in given.keys() & defaults.keys():
        value, default = given[key], defaults[key]
        if value is None and (default is None or key in _MAY_BE_NULL):
            continue
        kind = int if default is None else type(default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is int and value < (key not in _MAY_BE_ZERO)):
            raise CheckpointError(
                f"{where}: {key} has a value that cannot be",
                given=repr(value),
                expected=_KINDS.get(kind, kind.__name__),
            )


_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
_MAY_BE_ZERO = ("max_window_layers",)
_KINDS = {int: "a whole number above 0", float: "a number", bool: "true or false", str: "a text"}
