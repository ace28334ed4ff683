"""bitsandbytes' kernel that reads 4-bit NormalFloat back, where it is installed.

Source: bitsandbytes 0.41 to 0.50, functional.py: QuantState, dequantize_4bit.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from backends.quantised import LEVELS

BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Block lengths that every version of it knows."""
DEVICES = ("cuda",)
"""Where its kernel is faster than the portable form, and does not print warnings."""


def dequantised(codes: Tensor, scale_OG: Tensor, kind: str, dtype: torch.dtype) -> Tensor | None:
    """The weight [O, I] in `dtype`; None if the kernel does not serve here."""
    block = 2 * codes.numel() // scale_OG.numel()
    if kind != "nf4" or block not in BLOCKS or codes.device.type not in DEVICES:
        return None
    functional = _functional()
    if functional is None:
        return None
    state = functional.QuantState(
        absmax=scale_OG.reshape(-1).float(),  # FSDP's mixed precision rounds it
        shape=torch.Size((codes.shape[0], 2 * codes.shape[1])),
        code=_levels(codes.device),
        blocksize=block,
        quant_type="nf4",
        dtype=dtype,
    )
    return functional.dequantize_4bit(codes.reshape(-1, 1), state)


@functools.cache
def _functional() -> ModuleType | None:
    """bitsandbytes.functional; None where it is absent or cannot be loaded."""
    try:
        from bitsandbytes import functional
    except (ImportError, OSError, RuntimeError):
        return None
    return functional


@functools.cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS["nf4"], dtype=torch.float32, device=device)
