"""Learning rates over the steps of a run.

Warm-up is linear from 0: step n of w warm-up steps (counted from 0) trains with n / w of the full
rate, as transformers' schedules do. `warmup_ratio` is rounded up to whole steps (transformers,
PaddleNLP); MindFormers rounds down, by less than one step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """The factor by which every group's learning rate is multiplied."""

    kind: Kind
    total_steps: int
    warmup_steps: int = 0
    floor: float = 0.0
    """cosine and linear end at this share of the full rate."""

    def factor(self, step: int) -> float:
        """For the update after `step` finished ones (0 is the first)."""
        if step < self.warmup_steps:
            return step / max(1, self.warmup_steps)
        if self.kind == "constant":
            return 1.0
        span = max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * shape


def warmup_steps(ratio: float, total_steps: int) -> int:
    """Whole steps of a warm-up that is given as a share of the run."""
    return math.ceil(ratio * total_steps)
