"""From vision rows to text rows: identity, linear, mlp{N}x_gelu (LLaVA-1.5, arXiv 2310.03744).

Shape letters: T tiles, P rows of a tile, C vision width, D text width.
"""

from __future__ import annotations

from typing import Any

from backends import nn
from unillava.models.layers import activate
from unillava.spec import ProjectorSpec

Tensor = Any


class Projector(nn.Module):
    """`depth` Linear layers named linear_1, linear_2, … with an activation between them."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__()
        self.depth, self.activation = spec.depth, spec.activation
        width = spec.input_size
        for n in range(1, spec.depth + 1):
            setattr(self, f"linear_{n}", nn.Linear(width, spec.output_size, spec.bias))
            width = spec.output_size

    def forward(self, x_TPC: Tensor) -> Tensor:
        for n in range(1, self.depth + 1):
            if n > 1:
                x_TPC = activate(self.activation, x_TPC)
            x_TPC = getattr(self, f"linear_{n}")(x_TPC)
        return x_TPC
