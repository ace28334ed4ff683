"""What several models share."""

from __future__ import annotations

from typing import Any

from backends import ops

Tensor = Any


def activate(name: str, x: Tensor) -> Tensor:
    """The activation that config.json calls `name`, applied to `x`."""
    if name == "quick_gelu":
        return ops.quick_gelu(x)
    if name == "gelu":
        return ops.gelu(x, False)
    if name in ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"):
        return ops.gelu(x, True)
    if name in ("silu", "swish"):
        return ops.silu(x)
    return ops.relu(x)
