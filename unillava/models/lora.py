"""Linear layers with low-rank adapters (arXiv 2106.09685), on weights in full or in few bits.

Shape letters: D input width, O output width, r rank.
"""

from __future__ import annotations

import zlib
from typing import Any

from backends import nn, ops
from backends.quantised import layout
from unillava.spec import AdapterSpec

Tensor = Any
Noise = tuple[Tensor, Tensor]
"""Random odd int32 numbers (as int64): one for each position [B, S], and one for each column [W],
of which a layer takes as many as its input is wide. See `ops.dropout`."""


class Plain(nn.Linear):
    """A Linear that leaves the noise to others."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        return super().forward(x)


class Quantised(nn.Module):
    """A Linear whose frozen weight has 8 or 4 bits; `backends.quantised` says how."""

    def __init__(self, in_features: int, out_features: int, bias: bool, kind: str) -> None:
        super().__init__()
        table = layout(in_features, out_features, kind)
        self.kind = kind
        self.codes, self.scale = (nn.parameter(*table[name]) for name in ("codes", "scale"))
        self.bias = nn.parameter((out_features,)) if bias else None

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        y = ops.quantised_linear(x, self.codes, self.scale, self.kind)
        return y if self.bias is None else y + ops.cast(self.bias, y.dtype)


class LoraLinear(nn.Linear):
    """x W^T + b, and scale * B A x beside it."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, adapters: AdapterSpec, path: str
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.lora_A = nn.Linear(in_features, adapters.rank, False)
        self.lora_B = nn.Linear(adapters.rank, out_features, False)
        self.strength, self.rate, self.salt = adapters.scale, adapters.dropout, salt_of(path)

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        low = self.lora_A(dropped(x, noise, self.salt, self.rate))
        return super().forward(x) + self.lora_B(low) * self.strength


class LoraQuantised(Quantised):
    """The same on a weight in few bits (QLoRA, arXiv 2305.14314)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, adapters: AdapterSpec, path: str
    ) -> None:
        super().__init__(in_features, out_features, bias, adapters.base)
        self.lora_A = nn.Linear(in_features, adapters.rank, False)
        self.lora_B = nn.Linear(adapters.rank, out_features, False)
        self.strength, self.rate, self.salt = adapters.scale, adapters.dropout, salt_of(path)

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        low = self.lora_A(dropped(x, noise, self.salt, self.rate))
        return super().forward(x) + self.lora_B(low) * self.strength


def dropped(x: Tensor, noise: Noise | None, salt: int, rate: float) -> Tensor:
    """x after dropout; without noise there is none."""
    if noise is None or rate == 0:
        return x
    rows_BS, columns_W = noise
    return ops.dropout(x, rows_BS, columns_W[: tuple(x.shape)[-1]], salt, rate)


def salt_of(path: str) -> int:
    """An odd int32 number that belongs to a layer."""
    return (zlib.crc32(path.encode()) | 1) - 2**31


class Linears:
    """Makes the Linear layers of a decoder, each by its path, as the adapters say."""

    def __init__(self, adapters: AdapterSpec | None = None, path: str = "") -> None:
        self.adapters, self.path = adapters, path

    def under(self, name: str) -> Linears:
        """The same for the layers of a part."""
        return Linears(self.adapters, f"{self.path}{name}.")

    def __call__(self, name: str, in_features: int, out_features: int, bias: bool) -> Any:
        """The layer that the part calls `name`."""
        adapters, path = self.adapters, self.path + name
        if adapters is None:
            return Plain(in_features, out_features, bias)
        if path in adapters.modules:
            kind = LoraLinear if adapters.base == "full" else LoraQuantised
            return kind(in_features, out_features, bias, adapters, path)
        if adapters.base != "full":
            return Quantised(in_features, out_features, bias, adapters.base)
        return Plain(in_features, out_features, bias)
