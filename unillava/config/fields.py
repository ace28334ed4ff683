"""Strict reading of one JSON object: typed values, defaults from a table, dotted field names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from unillava.errors import ConfigError


class Fields:
    """The fields of one object of config.json.

    Args:
        values: the object as parsed from JSON.
        name: where it stands, `""` for the whole file or `"text_config"`; prefixed in errors.
        defaults: what an absent field means; a field without default must be present.
    """

    def __init__(
        self, values: Any, name: str = "", defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.name = name
        self.defaults = defaults or {}
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"config.json: {name or 'the file'} is not an object",
                given=repr(values),
                expected="a JSON object {…}",
            )
        self.values = values

    def dotted(self, key: str) -> str:
        """The field's full name, as in `text_config.hidden_size`."""
        return f"{self.name}.{key}" if self.name else key

    def error(self, key: str, expected: str, fix: str | None = None) -> ConfigError:
        """A ConfigError about `key`, giving its present value; to be raised by the caller."""
        given = repr(self.get(key)) + ("" if key in self.values else " (the default)")
        return ConfigError(
            f"config.json: {self.dotted(key)} cannot be used",
            given=given,
            expected=expected,
            fix=fix,
        )

    def get(self, key: str) -> Any:
        """The value as it stands, or its default."""
        return self.values.get(key, self.defaults.get(key))

    def required(self, key: str) -> Any:
        """The value as it stands or its default; an error if there is neither."""
        if key not in self.values and key not in self.defaults:
            raise ConfigError(f"config.json: {self.dotted(key)} is missing")
        return self.get(key)

    def integer(self, key: str, minimum: int = 1, maximum: int = 2**48) -> int:
        """A whole number of at least `minimum` and at most `maximum`."""
        value = self.required(key)
        if type(value) is not int or value < minimum:
            raise self.error(key, f"a whole number of at least {minimum}")
        if value > maximum:
            raise self.error(key, f"a whole number of at most {maximum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A whole number of at least 1, or null."""
        return None if self.required(key) is None else self.integer(key)

    def number(self, key: str, minimum: float = 0.0) -> float:
        """A finite number above zero and at least `minimum`."""
        value = self.required(key)
        sound = type(value) in (int, float) and math.isfinite(value)
        if not sound or value <= 0 or value < minimum:
            above = f"a number of at least {minimum}" if minimum else "a number above 0"
            raise self.error(key, above)
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.required(key)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: Collection[str]) -> str:
        """One of the allowed strings."""
        value = self.required(key)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}")
        return value

    def only(self, known: Collection[str]) -> None:
        """Refuse fields outside `known`, naming the nearest known one."""
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise ConfigError(
                    f"config.json: {self.dotted(key)} is not known",
                    expected=f"one of {', '.join(known)}",
                    fix=f"did you mean {self.dotted(near[0])}?" if near else None,
                )

    def unset(self, meanings: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
        """Refuse fields that would change the computation in a way that is not supported.

        `meanings`: key -> (values that change nothing, what any other value asks for).
        """
        for key, (harmless, meaning) in meanings.items():
            if key in self.values and self.values[key] not in harmless:
                raise self.error(
                    key,
                    f"absent or {' or '.join(map(repr, harmless))}",
                    f"{meaning} is not supported",
                )
