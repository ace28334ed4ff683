"""When a run has gone wrong, and what a person needs to know about it then.

A single hard sample is no failure: what is watched is whether the loss can still be that of a
model that learns. The scale for it is ln(vocabulary), the loss of blind guessing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unillava.data.files import as_json, written

WATCHED = 50
"""Updates whose loss is remembered."""
ENOUGH = 10
"""Remembered updates from which their median means something."""
TIMES = 5.0
"""The loss is high if it is that many times the median, and near that of blind guessing."""
PATIENCE = 5
"""High losses in a row that make an explosion."""
SKIPS = 20
"""Skipped updates in a row that end a run: from 65536, float16's loss scale is at 1 after 16."""
SHOWN = 8
"""Samples that a message names; the file names all."""


@dataclass
class Watch:
    """Judges one update after another."""

    vocabulary: int
    """Rows of the head."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WATCHED))
    """Losses that were ordinary."""
    high: int = 0
    """High losses in a row."""
    skipped: int = 0
    """Skipped updates in a row."""

    @property
    def usual(self) -> float:
        """The median of the ordinary losses; infinite while there are few."""
        return statistics.median(self.recent) if len(self.recent) >= ENOUGH else math.inf

    @property
    def calm(self) -> bool:
        """Whether the state is worth keeping: no explosion is under way."""
        return self.high == 0

    def judge(self, loss: float, skipped: bool) -> str | None:
        """What is wrong after this update; None: nothing.

        Args:
            loss: mean over tokens, of all ranks.
            skipped: a gradient was not finite, so that nothing was changed. With float16 this is
                how the loss scale is found; only many in a row are wrong.
        """
        if not math.isfinite(loss):
            return "the loss is no number"
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped >= SKIPS:
            return f"{SKIPS} updates in a row have gradients that are no numbers"
        blind = math.log(self.vocabulary)
        if loss <= TIMES * self.usual or loss <= blind / 2:
            self.high = 0
            self.recent.append(loss)
            return None
        self.high += 1
        # Nothing but an explosion is far worse than blind guessing.
        return "the loss explodes" if self.high >= PATIENCE or loss > 3 * blind else None


@dataclass(frozen=True)
class Pass:
    """One micro-batch of one rank, as it went."""

    samples: Sequence[str]
    learnt: int
    positions: int
    loss: float
    """Mean over its learnt tokens."""

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {**vars(self), "samples": list(self.samples), "loss": number(self.loss)}


def rank_report(rank: int, passes: Sequence[Pass]) -> str:
    """What one rank tells the others, as JSON."""
    return json.dumps({"rank": rank, "passes": [one.as_json() for one in passes]})


def suspects(ranks: Sequence[Mapping[str, Any]]) -> str:
    """The samples to look at first, in words: those of the passes whose loss is no number, else
    of the pass with the highest loss."""
    passes = [(rank["rank"], one) for rank in ranks for one in rank["passes"] if one["samples"]]
    if not passes:
        return "none were left in this batch"
    broken = [item for item in passes if isinstance(item[1]["loss"], str)]
    worst = broken or [max(passes, key=lambda item: item[1]["loss"])]
    told = []
    for rank, one in worst:
        names = ", ".join(one["samples"][:SHOWN])
        more = len(one["samples"]) - SHOWN
        told.append(
            f"rank {rank}, loss {one['loss'] if broken else format(one['loss'], '.4g')}: {names}"
            + (f" and {more} more" if more > 0 else "")
        )
    return "; ".join(told)


def write_failure(
    path: Path,
    problem: str,
    update: Mapping[str, Any],
    ranks: Sequence[Mapping[str, Any]],
    usual: float,
) -> None:
    """Leave what is known of a failed update beside the checkpoints.

    Args:
        path: the file, JSON.
        problem: what `Watch.judge` said.
        update: its numbers.
        ranks: what each rank told (`rank_report`).
        usual: the median loss before.
    """
    broken = [r["rank"] for r in ranks if any(isinstance(p["loss"], str) for p in r["passes"])]
    content = {
        "problem": problem,
        "step": update["step"],
        "usual_loss": usual,
        "ranks_without_a_loss": broken,
        "groups_without_a_norm": [n for n, v in update["norms"].items() if not math.isfinite(v)],
        "update": update,
        "ranks": ranks,
    }
    with written(path) as file:
        file.write(as_json(plain(content), indent=2))


def plain(value: Any) -> Any:
    """The same with every number that JSON cannot hold as text."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return number(value) if isinstance(value, float) else value


def number(value: float) -> float | str:
    """A number for JSON, which has no nan and no infinity: those become text."""
    return value if math.isfinite(value) else str(value)
