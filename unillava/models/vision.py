"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) vision transformers.

Shape letters: T tiles, 3HW pixels, P rows of a tile (patches, and CLIP's class token first),
C width, N heads, E size of a head, Q patches per side.
"""

from __future__ import annotations

import math
from typing import Any

from backends import nn, ops
from unillava.models.layers import activate
from unillava.spec import VisionSpec

Tensor = Any


class Embeddings(nn.Module):
    """Patches to rows, class token in front (CLIP), learnt positions added."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        C = spec.hidden_size
        self.has_class = spec.kind == "clip"
        if self.has_class:
            self.class_embedding = nn.parameter((C,))
        self.patch_embedding = nn.PatchEmbed(
            spec.num_channels, C, spec.patch_size, bias=not self.has_class
        )
        self.position_embedding = nn.Embedding(spec.num_positions, C)

    def forward(self, pixels_T3HW: Tensor) -> Tensor:
        x_TPC = self.patch_embedding(pixels_T3HW)
        if self.has_class:
            T, _, C = tuple(x_TPC.shape)
            class_C = ops.cast(self.class_embedding, x_TPC.dtype)
            class_T1C = ops.broadcast_to(ops.reshape(class_C, (1, 1, C)), (T, 1, C))
            x_TPC = ops.concat([class_T1C, x_TPC], axis=1)
        return x_TPC + ops.cast(self.position_embedding.weight, x_TPC.dtype)[None]


class Attention(nn.Module):
    """Every row of a tile sees every other; all projections have biases."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        C = spec.hidden_size
        self.heads, self.size = spec.num_heads, C // spec.num_heads
        self.scale = 1 / math.sqrt(self.size)
        self.k_proj = nn.Linear(C, C, True)
        self.v_proj = nn.Linear(C, C, True)
        self.q_proj = nn.Linear(C, C, True)
        self.out_proj = nn.Linear(C, C, True)

    def forward(self, x_TPC: Tensor) -> Tensor:
        T, P, C = tuple(x_TPC.shape)
        heads = (T, P, self.heads, self.size)
        q_TPNE = ops.reshape(self.q_proj(x_TPC), heads)
        k_TPNE = ops.reshape(self.k_proj(x_TPC), heads)
        v_TPNE = ops.reshape(self.v_proj(x_TPC), heads)
        out_TPNE = ops.attention(q_TPNE, k_TPNE, v_TPNE, scale=self.scale, causal=False)
        return self.out_proj(ops.reshape(out_TPNE, (T, P, C)))


class Mlp(nn.Module):
    """The feed-forward layer."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.hidden_size, spec.intermediate_size, True)
        self.fc2 = nn.Linear(spec.intermediate_size, spec.hidden_size, True)
        self.activation = spec.hidden_act

    def forward(self, x_TPC: Tensor) -> Tensor:
        return self.fc2(activate(self.activation, self.fc1(x_TPC)))


class Block(nn.Module):
    """Attention and feed-forward, each normalised first and added to its input."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.self_attn = Attention(spec)
        self.layer_norm1 = nn.LayerNorm(spec.hidden_size, spec.layer_norm_eps)
        self.mlp = Mlp(spec)
        self.layer_norm2 = nn.LayerNorm(spec.hidden_size, spec.layer_norm_eps)

    def forward(self, x_TPC: Tensor) -> Tensor:
        x_TPC = x_TPC + self.self_attn(self.layer_norm1(x_TPC))
        return x_TPC + self.mlp(self.layer_norm2(x_TPC))


class Encoder(nn.Module):
    """The blocks; `forward` returns the wanted states, 0 being the input of the first block."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(spec) for _ in range(spec.num_layers)])

    def forward(self, x_TPC: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor, ...]:
        states = (x_TPC,) if 0 in wanted else ()
        for n, layer in enumerate(self.layers):
            if n < max(wanted):  # blocks behind the last wanted state are not run
                x_TPC = layer(x_TPC)
                if n + 1 in wanted:
                    states = (*states, x_TPC)
        return states


class PoolingAttention(nn.Module):
    """Holds the parameters of SigLIP's pooling head under torch's MultiheadAttention names."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.parameter((3 * size, size))
        self.in_proj_bias = nn.parameter((3 * size,))
        self.out_proj = nn.Linear(size, size, True)


class PoolingHead(nn.Module):
    """SigLIP's pooling head. LLaVA never runs it; it is carried so that files stay complete."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.probe = nn.parameter((1, 1, spec.hidden_size))
        self.attention = PoolingAttention(spec.hidden_size)
        self.layernorm = nn.LayerNorm(spec.hidden_size, spec.layer_norm_eps)
        self.mlp = Mlp(spec)


class VisionTransformer(nn.Module):
    """Embeddings and encoder; `post_layernorm` and `head` are carried, LLaVA reads before them."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec)
        self.normalises_input = spec.kind == "clip"
        if self.normalises_input:
            self.pre_layrnorm = nn.LayerNorm(spec.hidden_size, spec.layer_norm_eps)
        self.encoder = Encoder(spec)
        self.post_layernorm = nn.LayerNorm(spec.hidden_size, spec.layer_norm_eps)
        if spec.has_head:
            self.head = PoolingHead(spec)

    def forward(self, pixels_T3HW: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor, ...]:
        x_TPC = self.embeddings(pixels_T3HW)
        if self.normalises_input:
            x_TPC = self.pre_layrnorm(x_TPC)
        return self.encoder(x_TPC, wanted)


class VisionTower(nn.Module):
    """The transformer, and the choice of layers and rows that LLaVA makes from it."""

    def __init__(
        self, spec: VisionSpec, feature_layers: tuple[int, ...], keep_class_token: bool
    ) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(spec)
        count = spec.num_layers + 1
        positions = tuple(layer % count for layer in feature_layers)
        self.wanted = tuple(sorted(set(positions)))
        self.order = tuple(self.wanted.index(position) for position in positions)
        self.drops_first = spec.kind == "clip" and not keep_class_token

    def forward(self, pixels_T3HW: Tensor) -> Tensor:
        """Features [T, P, C * number of layers]."""
        states = self.vision_model(pixels_T3HW, self.wanted)
        x_TPC = states[self.order[0]]
        if len(self.order) > 1:
            x_TPC = ops.concat([states[n] for n in self.order], axis=-1)
        return x_TPC[:, 1:] if self.drops_first else x_TPC
