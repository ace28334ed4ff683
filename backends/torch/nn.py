"""Layers of the contract as real torch modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backends.torch import ops

Module = torch.nn.Module
ModuleList = torch.nn.ModuleList


def parameter(shape: Sequence[int], dtype: str | None = None) -> torch.nn.Parameter:
    """A bare parameter, not initialised."""
    empty = torch.empty(tuple(shape), dtype=dtype and getattr(torch, dtype))
    return torch.nn.Parameter(empty, requires_grad=empty.is_floating_point())


class Linear(torch.nn.Linear):
    """torch.nn.Linear without its random initialisation."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Nothing: values come from a checkpoint or a recipe."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias)

    def matrix(self) -> torch.Tensor:
        """The weight as [out, in]."""
        return self.weight


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding without its random initialisation; rows come in the dtype in force."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__(rows, size)

    def reset_parameters(self) -> None:
        """Nothing: values come from a checkpoint or a recipe."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ops.take_rows(self.weight, ids).to(ops.COMPUTE)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.Module):
    """RMSNorm with LLaMA's rounding, which differs from torch.nn.RMSNorm below float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter((size,))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class PatchEmbed(torch.nn.Conv2d):
    """A convolution whose stride is its kernel; its output is [B, G, O]."""

    def __init__(self, in_channels: int, out_features: int, patch: int, bias: bool) -> None:
        super().__init__(in_channels, out_features, patch, stride=patch, bias=bias)

    def reset_parameters(self) -> None:
        """Nothing: values come from a checkpoint or a recipe."""

    def forward(self, x_B3HW: torch.Tensor) -> torch.Tensor:
        return ops.patch_embed(x_B3HW, self.weight, self.bias)
