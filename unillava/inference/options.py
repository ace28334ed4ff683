"""How a reply is chosen: one frozen, checked record of sampling options."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unillava.errors import RequestError


@dataclass(frozen=True)
class Options:
    """Sampling options of one request. Wrong values raise RequestError that names the field.

    The order in which they act is that of transformers: repetition penalty, temperature,
    top-k, top-p.
    """

    max_new_tokens: int = 512
    """The reply ends after this many tokens at the latest."""
    temperature: float = 0.0
    """Logits are divided by it before sampling; 0 takes the best token (greedy)."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities reach this sum; 1 keeps all."""
    top_k: int = 0
    """Keep the k most probable tokens (and those that tie with the last of them); 0 keeps all."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen in prompt or reply are divided (negative: multiplied) by it."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these strings."""
    seed: int = 0
    """Of this request's own random stream."""

    def __post_init__(self) -> None:
        # A single string is a tuple of one, not one stop string per character.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("top_k", self.top_k, 0)
        _whole("seed", self.seed, 0)
        _real("temperature", self.temperature, 0.0, math.inf)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        if self.repetition_penalty == 0:
            raise _wrong("repetition_penalty", 0, "a number above 0; 1 changes nothing")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise _wrong("stop", text, "non-empty strings")

    def replace(self, **changes: Any) -> Options:
        """These options with some fields changed; None leaves a field as it is.

        Raises:
            RequestError: an unknown name (the nearest known one is suggested) or a wrong value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, 1)
                raise RequestError(
                    f"unknown sampling option {name!r}",
                    expected=f"one of {', '.join(known)}",
                    fix=f"did you mean {nearest[0]}?" if nearest else None,
                )
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self, **given)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Options:
        """What a checkpoint's generation_config.json states; the rest are the defaults above.

        Temperature, top-p and top-k count only with `do_sample`, as in transformers; sampling
        without a stated temperature is sampling at 1.
        """
        named = ["max_new_tokens", "repetition_penalty"]
        stated: dict[str, Any] = {}
        if config.get("do_sample"):
            named += ["temperature", "top_p", "top_k"]
            stated["temperature"] = 1.0
        stated |= {name: config[name] for name in named if config.get(name) is not None}
        return cls(**stated)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(name, value, f"a whole number, {least} or more")


def _real(name: str, value: Any, least: float, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:
        limit = "" if math.isinf(most) else f", at most {most:g}"
        raise _wrong(name, value, f"a number, {least:g} or more{limit}")


def _wrong(name: str, value: Any, expected: str) -> RequestError:
    return RequestError(f"sampling option {name} has a wrong value", given=value, expected=expected)
