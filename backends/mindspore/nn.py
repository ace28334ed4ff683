"""Layers of the contract as real MindSpore cells. Meaning: backends/contract.py.

Parameters are made on MindSpore's `meta` device: they have a name, a shape and a dtype and take
no memory, so that a 34B model is built at once. `runtime.assign` gives them their storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, mint

from backends.mindspore import ops

DTYPE = ms.float32
"""Dtype of new parameters; set by runtime.setup."""


class Module(ms.nn.Cell):
    """A cell whose subclasses define `forward`, which MindSpore calls `construct`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__:
            # Graph mode parses `construct`; an alias keeps source and signature as they are.
            cls.construct = cls.forward


class ModuleList(ms.nn.CellList):
    """MindSpore's list of cells."""


def parameter(shape: Sequence[int], dtype: str | None = None) -> Parameter:
    """A bare parameter, not initialised. The attribute it is assigned to gives its name."""
    empty = _empty(shape, dtype and getattr(ms, dtype))
    return Parameter(empty, requires_grad=empty.is_floating_point())


def _empty(shape: Sequence[int], dtype: Any = None) -> Tensor:
    return mint.empty(tuple(shape), dtype=dtype or DTYPE, device="meta")


def _like(parameter: Parameter | None, x: Tensor) -> Tensor | None:
    """The parameter in the dtype of `x`: trained ones are float32 whatever is computed in."""
    if parameter is None or parameter.dtype == x.dtype:
        return parameter
    return ops.cast(parameter, x.dtype)


class Linear(Module, mint.nn.Linear):
    """mint.nn.Linear without its random initialisation."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            weight_init=_empty((out_features, in_features)),
            bias_init=_empty((out_features,)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, _like(self.weight, x), _like(self.bias, x))

    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight


class Embedding(Module, mint.nn.Embedding):
    """mint.nn.Embedding without its random initialisation, on devices that lack its kernel too."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__(rows, size, _weight=_empty((rows, size)))

    def forward(self, ids: Tensor) -> Tensor:
        rows = ops.take_rows(self.weight, ids)
        return rows if rows.dtype == DTYPE else ops.cast(rows, DTYPE)


class LayerNorm(Module, mint.nn.LayerNorm):
    """mint.nn.LayerNorm over the last axis, on devices that lack its kernel too."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, _like(self.weight, x), _like(self.bias, x), self.eps)


class RMSNorm(Module):
    """RMSNorm with LLaMA's rounding."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter((size,))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, _like(self.weight, x), self.eps)


class PatchEmbed(Module):
    """A convolution whose stride is its kernel, as a matrix product; its output is [B, G, O]."""

    def __init__(self, in_channels: int, out_features: int, patch: int, bias: bool) -> None:
        super().__init__()
        self.weight = parameter((out_features, in_channels, patch, patch))
        self.bias = parameter((out_features,)) if bias else None

    def forward(self, x_B3HW: Tensor) -> Tensor:
        return ops.patch_embed(x_B3HW, _like(self.weight, x_B3HW), _like(self.bias, x_B3HW))
