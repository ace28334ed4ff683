"""YAML settings: read with PyYAML if it is there, written without it.

Nothing else in weight_convert needs PyYAML, so it is imported when a YAML file is read. What is
written is the part of YAML 1.1 that every reader understands: block mappings, flow lists,
scalars, with whatever could be taken for something else in double quotes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from weight_convert.canonical import Config
from weight_convert.errors import CheckpointError

MAX_CHARACTERS = 1_000_000
MAX_VALUES = 20_000
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_KEYWORDS = frozenset("y n yes no on off true false null".split())


def can_parse() -> bool:
    """Whether PyYAML is installed."""
    try:
        import yaml  # noqa: F401
    except ImportError:
        return False
    return True


def parse(text: str, where: str) -> Config:
    """The mapping that a YAML text is, in types that JSON has too.

    Args:
        text: of the file.
        where: names it in errors.

    Raises:
        CheckpointError: PyYAML is not installed; or the text is no YAML mapping, too large, or
            repeats its aliases without end.
    """
    if len(text) > MAX_CHARACTERS:
        raise CheckpointError(f"{where} is too large for settings", given=f"{len(text)} characters")
    if not can_parse():
        raise CheckpointError(
            f"{where} cannot be read: PyYAML is not installed",
            fix="pip install pyyaml, or name a checkpoint of the same model with a config.json: "
            "--base DIR",
        )
    import yaml

    try:
        value = _simple(yaml.safe_load(text), [MAX_VALUES])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).strip().splitlines()
        raise CheckpointError(
            f"{where} is not readable YAML", given=line[0] if line else type(error).__name__
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a YAML mapping", given=type(value).__name__)
    return value


def _simple(value: Any, left: list[int]) -> Any:
    """Plain values alone; counts them, because aliases can make much of little."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    if isinstance(value, dict):
        return {str(key): _simple(item, left) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_simple(item, left) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def dump(settings: Mapping[str, Any]) -> str:
    """A mapping as YAML text.

    Args:
        settings: mappings, lists, strings, numbers, booleans and None.
    """
    return "".join(f"{line}\n" for line in _mapping(settings, ""))


def _mapping(settings: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for key, value in settings.items():
        head = f"{indent}{_text(str(key))}:"
        if isinstance(value, Mapping) and value:
            lines += [head, *_mapping(value, indent + "  ")]
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            lines += [head, *_items(value, indent + "  ")]
        else:
            lines.append(f"{head} {_flow(value)}")
    return lines


def _items(values: list[Any], indent: str) -> list[str]:
    lines: list[str] = []
    for value in values:
        if isinstance(value, Mapping) and value:
            first, *rest = _mapping(value, indent + "  ")
            lines += [f"{indent}- {first.lstrip()}", *rest]
        else:
            lines.append(f"{indent}- {_flow(value)}")
    return lines


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_text(str(key))}: {_flow(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value)
    return _number(value) if isinstance(value, int | float) else _text(value)


def _number(value: int | float) -> str:
    if isinstance(value, int) or math.isfinite(value):
        # YAML 1.1 takes 1e-05 for a text.
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"


def _text(value: str) -> str:
    if _PLAIN.fullmatch(value) and value.lower() not in _KEYWORDS:
        return value
    # The escapes of this codec are those of YAML's double quotes.
    return '"' + value.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
