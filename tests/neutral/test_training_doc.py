"""docs/training.md names every key of a recipe with its default."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from unillava.training.recipe import Recipe

DOC = Path(__file__).resolve().parents[2] / "docs/training.md"
ROW = re.compile(r"^\| `([a-z_0-9.\[\]]+)` \| (?:`(.*?)`|—) \| (.+) \|$", re.MULTILINE)


def keys(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, default in JSON, or "" without one) of a dataclass of settings."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        name, kind_of_item = prefix + item.name, hints[item.name]
        choices = typing.get_args(kind_of_item) or (kind_of_item,)
        nested = next((each for each in choices if dataclasses.is_dataclass(each)), None)
        if nested is not None:
            listed = typing.get_origin(kind_of_item) is tuple
            yield from keys(nested, name + ("[]." if listed else "."))
            continue
        yield name, "" if item.default is dataclasses.MISSING else json.dumps(item.default)


def test_every_key_is_documented_with_its_default():
    rows = ROW.findall(DOC.read_text(encoding="utf-8"))
    written = [(key, default) for key, default, _ in rows]
    assert written == list(keys(Recipe))
    assert len(written) > 50
