"""The training engine on torch. Meaning: backends/contract.py."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint

from backends.contract import AdamW, Group, LossScale, Norms
from backends.errors import BackendError
from backends.torch import native, ops, runtime
from backends.torch.parallel import STRATEGIES, check_strategy, world

__all__ = ["PREFERS_COMPILED", "STRATEGIES", "Engine"]

PREFERS_COMPILED = False


class Engine:
    """One module in training; the strategy does what ranks share."""

    def __init__(
        self,
        module: torch.nn.Module,
        groups: Sequence[Group],
        settings: AdamW,
        *,
        strategy: str = "single",
        compiled: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_strategy(strategy)
        _check_groups(module, groups)
        if strategy != "single" and not dist.is_initialized():
            raise BackendError(
                f"strategy {strategy!r} before the processes have met",
                fix="call parallel.start(strategy) first",
            )
        if compiled and strategy == "zero3":
            raise BackendError(
                "strategy 'zero3' cannot be compiled: DeepSpeed gathers every layer by hooks",
                fix="use --strategy fsdp",
            )
        if compiled:
            for part in native.blocks(module) or [module]:
                part.forward = _compiled(part.forward)
        self._strategy = _strategy(strategy)(module, groups, settings, options or {})
        self._steps = 0
        self._loss_scale = LossScale() if ops.COMPUTE == torch.float16 else None
        self._complete = False

    def accumulate(
        self, inputs: Sequence[np.ndarray | None], scale: float, last: bool = False
    ) -> float:
        if self._complete:
            raise BackendError("accumulate after the last micro-batch", fix="call update first")
        self._complete = last
        tensors = [_tensor(array) for array in inputs]
        run = functools.partial(self._strategy.forward, *tensors)
        value = self._strategy.backward(run, scale, self._size, last)
        return value.item() * scale

    def update(self, rates: Mapping[str, float]) -> Norms:
        norms = self._strategy.update(rates, self._size)
        self._complete = False
        self._steps += not norms.skipped
        if self._loss_scale is not None:
            self._loss_scale = self._loss_scale.after(norms.skipped)
        return norms

    @property
    def _size(self) -> float:
        return 1.0 if self._loss_scale is None else self._loss_scale.size

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def loss_scale(self) -> LossScale | None:
        return self._loss_scale

    def state(self) -> Iterator[tuple[str, str, np.ndarray | None]]:
        rank, size = world()
        held = [0] * size
        for name, kind, whole in self._strategy.tensors():
            tensor = whole()
            owner = held.index(min(held))
            held[owner] += tensor.nbytes
            yield name, kind, runtime.numpy(tensor) if owner == rank else None

    def restore(
        self,
        steps: int,
        read: Callable[[str, str], np.ndarray],
        loss_scale: LossScale | None = None,
    ) -> None:
        self._strategy.restore(steps, read)
        self._steps = steps
        if self._loss_scale is not None:
            self._loss_scale = loss_scale or LossScale()


def _strategy(name: str) -> type:
    if name in ("zero2", "zero3"):
        from backends.torch import zero  # DeepSpeed takes seconds to import

        return functools.partial(zero.Zero, int(name[-1]))
    return {"single": native.Single, "ddp": native.DataParallel, "fsdp": native.FullySharded}[name]


def _tensor(array: np.ndarray | None) -> torch.Tensor | None:
    if array is None:
        return None
    return runtime.tensor32(array) if array.dtype == np.float64 else runtime.tensor(array)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward, compiled; a recomputed layer runs the compiled one again."""
    if isinstance(forward, functools.partial) and forward.func is torch.utils.checkpoint.checkpoint:
        return functools.partial(forward.func, _compiled(forward.args[0]), **forward.keywords)
    return torch.compile(forward)


def _check_groups(module: torch.nn.Module, groups: Sequence[Group]) -> None:
    """The groups hold every trained parameter once, in float32; else BackendError."""
    trained = {name: p.dtype for name, p in module.named_parameters() if p.requires_grad}
    grouped = Counter(name for group in groups for name in group.parameters)
    problems = {
        "in no group": [name for name in trained if name not in grouped],
        "in several groups": [name for name, count in grouped.items() if count > 1],
        "in a group, but not trained": [name for name in grouped if name not in trained],
        "trained, but not float32": [n for n, dtype in trained.items() if dtype != torch.float32],
    }
    for problem, names in problems.items():
        if names:
            raise BackendError(
                f"{problem}: {', '.join(names[:5])}",
                expected="groups that hold each trained parameter once",
                fix="name the trained parameters by runtime.set_trained before they are assigned",
            )
