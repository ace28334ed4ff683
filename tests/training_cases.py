"""Small things to train, on whichever backend was selected, and the judge in NumPy.

`small` and `llava` give a module's factory, its values and batches; `Reference` is AdamW in
float64 that knows nothing of any framework. Used by tests/backend/test_training.py and by the
processes that tests start (tests/training_workers/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.contract import AdamW, Group

Arrays = dict[str, np.ndarray]
Inputs = list[np.ndarray | None]


@dataclass(frozen=True)
class Case:
    """Something to train."""

    factory: Callable[[], Any]
    values: Arrays
    """Every parameter, canonical."""
    groups: tuple[Group, ...]
    batches: Callable[[int, int], list[Inputs]]
    """(seed, rows) -> as many batches of one row each; put together they are one batch."""
    rates: dict[str, float]

    @property
    def trained(self) -> list[str]:
        return [name for group in self.groups for name in group.parameters]

    def build(self, runtime: Any, trained: Sequence[str] | None = None) -> Any:
        """The module with its values; everything is trained unless `trained` says otherwise."""
        module = runtime.build(self.factory)
        if trained is not None:
            runtime.set_trained(module, trained)
        for name, value in self.values.items():
            runtime.assign(module, name, value)
        return module


# --- a module of few layers ------------------------------------------------------------------


def small(seed: int = 0) -> Case:
    """Every kind of layer, one of them frozen in front of trained ones, one never used."""
    from backends import nn, ops

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(8, 1e-6)
            self.up = nn.Linear(8, 12, True)
            self.down = nn.Linear(12, 8, False)

        def forward(self, x_ND):
            return x_ND + self.down(ops.gelu(self.up(self.norm(x_ND)), False))

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(6, 8, True)
            self.table = nn.Embedding(11, 8)
            self.scale = nn.parameter((8,))
            self.parts = nn.ModuleList([Part(), Part()])
            self.norm = nn.LayerNorm(8, 1e-5)
            self.idle = nn.Linear(3, 2, False)
            self.head = nn.Linear(8, 7, False)

        def forward(self, ids_N, x_NI, targets_N, weights_N=None):
            x_ND = self.table(ids_N) + self.frozen(x_NI)
            x_ND = x_ND * ops.cast(self.scale, x_ND.dtype)
            for part in self.parts:
                x_ND = part(x_ND)
            losses_N = ops.cross_entropy(self.head(self.norm(x_ND)), targets_N)
            if weights_N is not None:
                losses_N = losses_N * weights_N
            return ops.reduce_sum(losses_N, 0)

    shapes = {
        "frozen.weight": (8, 6), "frozen.bias": (8,), "table.weight": (11, 8), "scale": (8,),
        "norm.weight": (8,), "norm.bias": (8,), "idle.weight": (2, 3), "head.weight": (7, 8),
    }  # fmt: skip
    for n in range(2):
        shapes |= {
            f"parts.{n}.norm.weight": (8,), f"parts.{n}.up.weight": (12, 8),
            f"parts.{n}.up.bias": (12,), f"parts.{n}.down.weight": (8, 12),
        }  # fmt: skip
    rng = np.random.default_rng(seed)
    values = {
        name: (rng.standard_normal(shape) * 0.4 + name.endswith("norm.weight")).astype(np.float32)
        for name, shape in shapes.items()
    }
    trained = [name for name in shapes if not name.startswith("frozen")]
    slow = [name for name in trained if name.startswith(("head", "scale", "idle"))]

    def batches(seed: int, rows: int) -> list[Inputs]:
        rng = np.random.default_rng(seed)
        return [
            [
                rng.integers(0, 11, 1),
                rng.standard_normal((1, 6)).astype(np.float32),
                rng.integers(0, 7, 1),
                rng.uniform(0.5, 2, 1),
            ]
            for _ in range(rows)
        ]

    return Case(
        factory=Small,
        values=values,
        groups=(
            Group("fast", tuple(name for name in trained if name not in slow)),
            Group("slow", tuple(slow), weight_decay=0.1),
        ),
        batches=batches,
        rates={"fast": 1e-2, "slow": 3e-3},
    )


# --- a tiny LLaVA ----------------------------------------------------------------------------


def llava_spec(text_layers: int = 2) -> Any:
    from unillava.spec import LlavaSpec, ProjectorSpec, TextSpec, VisionSpec

    vision = VisionSpec(
        kind="clip", hidden_size=24, intermediate_size=40, num_layers=3, num_heads=3,
        image_size=12, patch_size=4, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    text = TextSpec(
        kind="llama", vocab_size=71, hidden_size=32, intermediate_size=48,
        num_layers=text_layers, num_heads=4, num_kv_heads=2, head_dim=8, hidden_act="silu",
        rms_norm_eps=1e-5, max_position=256,
    )  # fmt: skip
    return LlavaSpec(
        family="llava_next",
        vision=vision,
        text=text,
        projector=ProjectorSpec(2, 24, 32),
        has_newline=True,
    )


def llava(seed: int = 0) -> Case:
    """LlavaForTraining with a frozen vision tower; a sample has one tile or none."""
    from unillava.data.collate import IMAGE, NEWLINE, Sample, collate
    from unillava.models.llava import LlavaForTraining
    from unillava.rope import rotary_tables
    from unillava.spec import parameter_table

    spec = llava_spec()
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in parameter_table(spec).items():
        size = 0.3 if len(shape) == 1 else 1.2 / math.sqrt(math.prod(shape[1:]))
        value = rng.standard_normal(shape) * size + ("norm" in name and name.endswith("weight"))
        values[name] = value.astype(np.float32)
    trained = [name for name in values if not name.startswith("vision_tower")]
    projector = [name for name in trained if not name.startswith("language_model")]

    def sample(rng: np.random.Generator, with_image: bool) -> Sample:
        """Seven positions of text, nine of image and newline rows between them (or text)."""
        rows = spec.rows_per_tile
        kind = np.zeros(7 + rows, np.int8)
        row = np.zeros(7 + rows, np.int64)
        if with_image:
            kind[3 : 3 + rows], row[3 : 3 + rows] = IMAGE, rng.permutation(rows)
            kind[3 : 3 + rows : 4], row[3 : 3 + rows : 4] = NEWLINE, 0
        ids = np.where(kind == 0, rng.integers(0, spec.text.vocab_size, len(kind)), 0)
        learnt = (kind == 0) & (np.arange(len(kind)) > 3 + rows)
        pixels = rng.standard_normal((1, 3, 12, 12)).astype(np.float32) if with_image else None
        return Sample(ids, kind, row, learnt, pixels, None, rows if with_image else 0, 0)

    spare = sample(np.random.default_rng(99), True)
    length = 7 + spec.rows_per_tile
    # float64: stay float32 whatever the compute dtype.
    tables = [table.astype(np.float64) for table in rotary_tables(spec.text, length)]

    def batches(seed: int, rows: int) -> list[Inputs]:
        rng = np.random.default_rng(seed)
        return [inputs(collate([sample(rng, n % 2 == 0)], spare=spare)) for n in range(rows)]

    def inputs(batch: Mapping[str, np.ndarray]) -> Inputs:
        names = ("input_ids", "merge_index", "position_ids", "segment_ids")
        return [
            *(batch[name] for name in names), *tables,
            batch["target_index"], batch["targets"], batch["pixel_values"], None,
        ]  # fmt: skip

    return Case(
        factory=lambda: LlavaForTraining(spec),
        values=values,
        groups=(
            Group("projector", tuple(projector)),
            Group("language", tuple(n for n in trained if n not in projector), weight_decay=0.05),
        ),
        batches=batches,
        rates={"projector": 2e-3, "language": 1e-3},
    )


CASES = {"small": small, "llava": llava}


# --- the judge -------------------------------------------------------------------------------


class Reference:
    """AdamW as backends/contract.py writes it, in float64."""

    def __init__(self, case: Case, settings: AdamW) -> None:
        self.case, self.settings, self.steps = case, settings, 0
        self.state = {
            (name, kind): np.zeros(case.values[name].shape)
            for name in case.trained
            for kind in ("parameter", "exp_avg", "exp_avg_sq")
        }
        for name in case.trained:
            self.state[name, "parameter"] = case.values[name].astype(np.float64)

    def norms(self, gradients: Mapping[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        squares = {
            group.name: sum(
                float(np.square(gradients[name].astype(np.float64)).sum())
                for name in group.parameters
            )
            for group in self.case.groups
        }
        return math.sqrt(sum(squares.values())), {n: math.sqrt(s) for n, s in squares.items()}

    def update(self, gradients: Mapping[str, np.ndarray], rates: Mapping[str, float]) -> None:
        s, self.steps = self.settings, self.steps + 1
        factor = 1.0
        if s.clip_norm is not None:
            factor = min(1.0, s.clip_norm / (self.norms(gradients)[0] + 1e-6))
        for group in self.case.groups:
            rate = rates[group.name]
            for name in group.parameters:
                g = gradients[name].astype(np.float64) * factor
                p, m, v = (self.state[name, k] for k in ("parameter", "exp_avg", "exp_avg_sq"))
                m = s.beta1 * m + (1 - s.beta1) * g
                v = s.beta2 * v + (1 - s.beta2) * g**2
                m_hat = m / (1 - s.beta1**self.steps)
                v_hat = v / (1 - s.beta2**self.steps)
                p = p - rate * group.weight_decay * p - rate * m_hat / (np.sqrt(v_hat) + s.eps)
                self.state[name, "parameter"] = p
                self.state[name, "exp_avg"], self.state[name, "exp_avg_sq"] = m, v


def state_of(engine: Any) -> dict[tuple[str, str], np.ndarray]:
    """All that this rank owns, copied."""
    return {(n, kind): a.copy() for n, kind, a in engine.state() if a is not None}
