"""Layers of the contract as real paddle layers. Meaning and parameters: backends/contract.py.

Parameters get no random values: under `paddle.LazyGuard` (see `runtime.build`) they have not
even memory before they are assigned, outside it they are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from backends.paddle import _state, ops

Module = paddle.nn.Layer
ModuleList = paddle.nn.LayerList

_ZEROS = paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(0.0))


def parameter(shape: Sequence[int], dtype: str | None = None) -> Tensor:
    """A bare parameter of this shape."""
    made = Module().create_parameter(list(shape), attr=_ZEROS, dtype=dtype)
    made.stop_gradient = not made.is_floating_point()
    return made


def _bias(present: bool) -> paddle.ParamAttr | bool:
    return _ZEROS if present else False


class Linear(paddle.nn.Linear):
    """paddle.nn.Linear: its weight is stored as [in, out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, weight_attr=_ZEROS, bias_attr=_bias(bias))

    def forward(self, x: Tensor) -> Tensor:
        # Paddle's own asks for a global flag first, which takes as long as a token's product.
        if self.bias is None:
            return paddle.matmul(x, ops.like(self.weight, x))
        return F.linear(x, ops.like(self.weight, x), ops.like(self.bias, x))

    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return paddle.transpose(self.weight, [1, 0])


class Embedding(paddle.nn.Embedding):
    """paddle.nn.Embedding; rows come in the dtype in force."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__(rows, size, weight_attr=_ZEROS)

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        trained_in_float32 = rows.dtype == paddle.float32 and _state.dtype != "float32"
        return paddle.cast(rows, _state.dtype) if trained_in_float32 else rows


class LayerNorm(paddle.nn.LayerNorm):
    """paddle.nn.LayerNorm over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, epsilon=eps, weight_attr=_ZEROS, bias_attr=_ZEROS)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """RMSNorm with LLaMA's rounding."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter((size,))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class PatchEmbed(paddle.nn.Conv2D):
    """A convolution whose stride is its kernel; its output is [B, G, O]."""

    def __init__(self, in_channels: int, out_features: int, patch: int, bias: bool) -> None:
        super().__init__(
            in_channels,
            out_features,
            patch,
            stride=patch,
            weight_attr=_ZEROS,
            bias_attr=_bias(bias),
        )

    def forward(self, x_B3HW: Tensor) -> Tensor:
        return ops.patch_embed(x_B3HW, self.weight, self.bias)
