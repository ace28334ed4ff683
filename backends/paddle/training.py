"""The training engine on paddle. Meaning: backends/contract.py.

The update is plain arithmetic in place, so that it means the same on every device: Paddle's own
AdamW kernel takes 1 - beta2 in float32, which is 5e-5 off for 0.999, and needs on cpu ten times
as long.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from backends.contract import AdamW, Group, LossScale, Norms
from backends.errors import BackendError
from backends.paddle import _state, parallel, runtime
from backends.paddle.parallel import STRATEGIES

__all__ = ["PREFERS_COMPILED", "STRATEGIES", "Engine"]

PREFERS_COMPILED = False

KINDS = ("parameter", "exp_avg", "exp_avg_sq")
NORM_NUMBERS = 2**20
"""Squares that are added in float32 before float64 takes over."""
NO_RATE = 1e-30
"""Below this no parameter moves; its reciprocal would leave float32."""


class _Trained:
    """A parameter in training."""

    def __init__(self, parameter: Tensor, turned: bool, owner: int, everywhere: bool) -> None:
        self.parameter = parameter
        self.turned = turned
        """Stored [in, out]."""
        self.owner = owner
        """The rank that hands out its state."""
        self.kept = everywhere or owner == parallel.world()[0]
        """This rank has the moments, and steps."""
        if self.kept:
            self.exp_avg = paddle.zeros(parameter.shape, "float32")
            self.exp_avg_sq = paddle.zeros(parameter.shape, "float32")

    def gradient(self) -> Tensor:
        """What was found since the last update, zero if nothing was."""
        found = self.parameter.grad
        return paddle.zeros_like(self.parameter) if found is None else found


class Engine:
    """One module in training.

    With several ranks every one has the whole module; gradients are summed when `update` begins
    (`last` changes nothing: no exchange runs during the backward pass).
    With `zero1` a rank has the moments of its own parameters alone, steps those and sends them.

    `compiled` compiles forward and backward of the module with `paddle.jit.to_static`, once for
    each set of input shapes; `runtime.recompute` has no effect there.
    """

    def __init__(
        self,
        module: paddle.nn.Layer,
        groups: Sequence[Group],
        settings: AdamW,
        *,
        strategy: str = "single",
        compiled: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        parallel.check_strategy(strategy)
        _check_groups(module, groups)
        if options:
            raise BackendError(
                f"unknown options of the strategy: {', '.join(options)}", expected="none"
            )
        if parallel.world()[1] > 1 and not paddle.distributed.is_initialized():
            raise BackendError(
                f"strategy {strategy!r} before the processes have met",
                fix="call parallel.start(strategy) first",
            )
        # Not the module itself: the wrapper would take over its attributes.
        self._forward = runtime.compile(lambda *args: module(*args)) if compiled else module
        self._groups, self._settings = tuple(groups), settings
        self._shards = strategy == "zero1"
        places = {n: runtime.find(module, n) for group in groups for n in group.parameters}
        owners = _owners({name: parameter.size for name, (parameter, _) in places.items()})
        self._trained = {
            name: _Trained(parameter, turned, owners[name], everywhere=not self._shards)
            for name, (parameter, turned) in places.items()
        }
        self._steps = 0
        self._loss_scale = LossScale() if _state.dtype == "float16" else None

    def accumulate(
        self, inputs: Sequence[np.ndarray | None], scale: float, last: bool = False
    ) -> float:
        value = self._forward(*(_tensor(array) for array in inputs))
        if not value.stop_gradient:
            (value * (scale * self._scale)).backward()
        return value.item() * scale

    @paddle.no_grad()
    def update(self, rates: Mapping[str, float]) -> Norms:
        gradients = {name: held.gradient() for name, held in self._trained.items()}
        parallel.sum_tensors(list(gradients.values()))
        norms = self._norms(gradients)
        if not norms.skipped:
            self._steps += 1
            self._step(gradients, self._factor(norms.total), rates)
        for held in self._trained.values():
            held.parameter.clear_gradient(False)
        if self._loss_scale is not None:
            self._loss_scale = self._loss_scale.after(norms.skipped)
        return norms

    def _step(
        self, gradients: Mapping[str, Tensor], factor: float, rates: Mapping[str, float]
    ) -> None:
        for group in self._groups:
            for name in group.parameters:
                held = self._trained[name]
                if held.kept:
                    rate, decay = rates[group.name], group.weight_decay
                    adamw(held, gradients[name], factor, self._settings, self._steps, rate, decay)
        if self._shards:
            for owner in range(parallel.world()[1]):
                mine = [held.parameter for held in self._trained.values() if held.owner == owner]
                parallel.send_tensors(mine, owner)

    def _norms(self, gradients: Mapping[str, Tensor]) -> Norms:
        """One transfer for all of them."""
        found = [(name, part) for name, g in gradients.items() for part in _squares(g)]
        numbers = paddle.concat([part for _, part in found]).numpy().astype(np.float64)
        squares = Counter()
        for (name, _), number in zip(found, numbers, strict=True):
            squares[name] += number
        groups = {
            group.name: math.sqrt(sum(squares[name] for name in group.parameters)) / self._scale
            for group in self._groups
        }
        total = math.sqrt(sum(squares.values())) / self._scale
        return Norms(total, groups, skipped=not math.isfinite(total))

    def _factor(self, norm: float) -> float:
        """What gradients are multiplied by: without the loss scale, and clipped."""
        clip = self._settings.clip_norm
        return (1.0 if clip is None else min(1.0, clip / (norm + 1e-6))) / self._scale

    @property
    def _scale(self) -> float:
        return 1.0 if self._loss_scale is None else self._loss_scale.size

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def loss_scale(self) -> LossScale | None:
        return self._loss_scale

    def state(self) -> Iterator[tuple[str, str, np.ndarray | None]]:
        rank, _ = parallel.world()
        for name, held in self._trained.items():
            for kind in KINDS:
                mine = held.owner == rank
                array = runtime.canonical(getattr(held, kind), held.turned) if mine else None
                yield name, kind, array

    def restore(
        self,
        steps: int,
        read: Callable[[str, str], np.ndarray],
        loss_scale: LossScale | None = None,
    ) -> None:
        for name, held in self._trained.items():
            for kind in KINDS if held.kept else ("parameter",):
                value = runtime.stored(name, read(name, kind), held.parameter, held.turned)
                value._share_buffer_to(getattr(held, kind))
        self._steps = steps
        if self._loss_scale is not None:
            self._loss_scale = loss_scale or LossScale()


def adamw(
    held: _Trained,
    gradient: Tensor,
    factor: float,
    settings: AdamW,
    step: int,
    rate: float,
    decay: float,
) -> None:
    """AdamW in the memory of the gradient, which is lost."""
    rest1, rest2 = 1 - settings.beta1, 1 - settings.beta2
    gradient.scale_(factor * rest1)
    held.exp_avg.scale_(settings.beta1)
    held.exp_avg.add_(gradient)
    gradient.square_()
    gradient.scale_(rest2 / rest1**2)
    held.exp_avg_sq.scale_(settings.beta2)
    held.exp_avg_sq.add_(gradient)
    if rate < NO_RATE:
        return
    # rate * m_hat / (sqrt(v_hat) + eps) as m / (a * sqrt(v) + b)
    unit = (1 - settings.beta1**step) / rate
    gradient.copy_(held.exp_avg_sq, False)
    gradient.sqrt_()
    gradient.scale_(unit / math.sqrt(1 - settings.beta2**step), unit * settings.eps)
    gradient.reciprocal_()
    gradient.multiply_(held.exp_avg)
    if decay:
        held.parameter.scale_(1 - rate * decay)
    held.parameter.subtract_(gradient)


def _squares(gradient: Tensor) -> list[Tensor]:
    """Sums of squares, [1] each, of parts that are small enough for float32."""
    if gradient.size <= NORM_NUMBERS:
        return [paddle._C_ops.squared_l2_norm(gradient)]
    flat = gradient.reshape([-1])
    return [
        paddle._C_ops.squared_l2_norm(flat[start : start + NORM_NUMBERS])
        for start in range(0, gradient.size, NORM_NUMBERS)
    ]


def _owners(sizes: Mapping[str, int]) -> dict[str, int]:
    """Name -> rank, so that ranks own about the same: large ones are dealt out first."""
    owners, owned = {}, [0] * parallel.world()[1]
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        owners[name] = owned.index(min(owned))
        owned[owners[name]] += sizes[name]
    return owners


def _tensor(array: np.ndarray | None) -> Tensor | None:
    if array is None:
        return None
    return runtime.tensor32(array) if array.dtype == np.float64 else runtime.tensor(array)


def _check_groups(module: paddle.nn.Layer, groups: Sequence[Group]) -> None:
    """The groups hold every trained parameter once, in float32; else BackendError."""
    trained = {n: p.dtype for n, p, _ in runtime.named_parameters(module) if not p.stop_gradient}
    grouped = Counter(name for group in groups for name in group.parameters)
    problems = {
        "in no group": [name for name in trained if name not in grouped],
        "in several groups": [name for name, count in grouped.items() if count > 1],
        "in a group, but not trained": [name for name in grouped if name not in trained],
        "trained, but not float32": [n for n, dtype in trained.items() if dtype != paddle.float32],
    }
    for problem, names in problems.items():
        if names:
            raise BackendError(
                f"{problem}: {', '.join(names[:5])}",
                expected="groups that hold each trained parameter once",
                fix="name the trained parameters by runtime.set_trained before they are assigned",
            )
