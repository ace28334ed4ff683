"""What `runtime.setup` has put in force: the one place that ops and runtime share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

device: str | None = None
"""Paddle's name of the device, such as gpu:0; None before the first setup."""
dtype: str = "float32"
"""Floating dtype of tensors and parameters made from now on."""
fused: dict[str, Callable[..., Any]] = {}
"""Op name -> fused kernel to use instead of the portable form. Empty with kernels=portable."""
