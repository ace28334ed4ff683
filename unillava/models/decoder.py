"""The LLaMA family in one file: LLaMA, Vicuna, Mistral, Yi, Qwen2 (arXiv 2302.13971).

Shape letters: B rows, S positions of this call, T positions of the cache, D model width,
H heads, K key/value heads, E size of a head, F feed-forward width, V vocabulary.

`linear` makes the Linear layers, `noise` is for dropout in their adapters: `unillava.models.lora`.
"""

from __future__ import annotations

import math
from typing import Any

from backends import nn, ops
from unillava.models.layers import activate
from unillava.models.lora import Linears, Noise
from unillava.spec import AdapterSpec, TextSpec

Tensor = Any


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped key/value heads."""

    def __init__(self, spec: TextSpec, linear: Linears) -> None:
        super().__init__()
        D, E = spec.hidden_size, spec.head_dim
        self.heads, self.kv_heads, self.size = spec.num_heads, spec.num_kv_heads, E
        self.scale, self.window = 1 / math.sqrt(E), spec.sliding_window
        self.q_proj = linear("q_proj", D, spec.num_heads * E, spec.qkv_bias)
        self.k_proj = linear("k_proj", D, spec.num_kv_heads * E, spec.qkv_bias)
        self.v_proj = linear("v_proj", D, spec.num_kv_heads * E, spec.qkv_bias)
        self.o_proj = linear("o_proj", spec.num_heads * E, D, spec.output_bias)

    def qkv(
        self, x_BSD: Tensor, cos_BSE: Tensor, sin_BSE: Tensor, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every position; positions turned into the first two."""
        B, S, _ = tuple(x_BSD.shape)
        q_BSHE = ops.reshape(self.q_proj(x_BSD, noise), (B, S, self.heads, self.size))
        k_BSKE = ops.reshape(self.k_proj(x_BSD, noise), (B, S, self.kv_heads, self.size))
        v_BSKE = ops.reshape(self.v_proj(x_BSD, noise), (B, S, self.kv_heads, self.size))
        q_BSHE = ops.rotary(q_BSHE, cos_BSE, sin_BSE)
        return q_BSHE, ops.rotary(k_BSKE, cos_BSE, sin_BSE), v_BSKE

    def out(self, x_BSHE: Tensor, noise: Noise | None = None) -> Tensor:
        B, S, H, E = tuple(x_BSHE.shape)
        return self.o_proj(ops.reshape(x_BSHE, (B, S, H * E)), noise)

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        segment_ids_BS: Tensor | None,
        noise: Noise | None = None,
    ) -> Tensor:
        q_BSHE, k_BSKE, v_BSKE = self.qkv(x_BSD, cos_BSE, sin_BSE, noise)
        return self.out(
            ops.attention(
                q_BSHE,
                k_BSKE,
                v_BSKE,
                scale=self.scale,
                causal=True,
                segment_ids_BS=segment_ids_BS,
                window=self.window,
            ),
            noise,
        )

    def cached(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        start_B: Tensor,
        k_BTKE: Tensor,
        v_BTKE: Tensor,
        visible: int,
        uneven: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the positions at `start_b` into the caches, and attend.

        With `visible` 0 the caches were empty: the new keys are all there are (prefill). Else one
        position per row reads the first `visible` cache rows; only `uneven` rows need a mask, the
        others have filled all that is visible.
        """
        q_BSHE, k_BSKE, v_BSKE = self.qkv(x_BSD, cos_BSE, sin_BSE)
        k_BTKE = ops.cache_update(k_BTKE, k_BSKE, start_B)
        v_BTKE = ops.cache_update(v_BTKE, v_BSKE, start_B)
        seen_k, seen_v = k_BSKE, v_BSKE
        if visible > 0:
            whole = visible == tuple(k_BTKE.shape)[1]  # a slice of everything still costs a copy
            seen_k = k_BTKE if whole else k_BTKE[:, :visible]
            seen_v = v_BTKE if whole else v_BTKE[:, :visible]
        masked = visible > 0 and (uneven or self.window is not None)
        x_BSHE = ops.attention(
            q_BSHE,
            seen_k,
            seen_v,
            scale=self.scale,
            causal=masked or visible == 0,
            lengths_B=start_B + 1 if masked else None,
            window=self.window if masked or visible == 0 else None,
        )
        return self.out(x_BSHE), k_BTKE, v_BTKE


class Mlp(nn.Module):
    """The gated feed-forward layer (SwiGLU where the activation is silu)."""

    def __init__(self, spec: TextSpec, linear: Linears) -> None:
        super().__init__()
        D, F = spec.hidden_size, spec.intermediate_size
        self.gate_proj = linear("gate_proj", D, F, spec.mlp_bias)
        self.up_proj = linear("up_proj", D, F, spec.mlp_bias)
        self.down_proj = linear("down_proj", F, D, spec.mlp_bias)
        self.activation = spec.hidden_act

    def forward(self, x_BSD: Tensor, noise: Noise | None = None) -> Tensor:
        gate_BSF, up_BSF = self.gate_proj(x_BSD, noise), self.up_proj(x_BSD, noise)
        if self.activation == "silu":
            return self.down_proj(ops.swiglu(gate_BSF, up_BSF), noise)
        return self.down_proj(activate(self.activation, gate_BSF) * up_BSF, noise)


class Block(nn.Module):
    """Attention and feed-forward, each normalised first and added to its input."""

    def __init__(self, spec: TextSpec, linear: Linears) -> None:
        super().__init__()
        self.self_attn = Attention(spec, linear.under("self_attn"))
        self.mlp = Mlp(spec, linear.under("mlp"))
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        segment_ids_BS: Tensor | None,
        noise: Noise | None = None,
    ) -> Tensor:
        h_BSD = self.input_layernorm(x_BSD)
        y_BSD = self.self_attn(h_BSD, cos_BSE, sin_BSE, segment_ids_BS, noise)
        return self.feed_forward(x_BSD + y_BSD, noise)

    def feed_forward(self, x_BSD: Tensor, noise: Noise | None = None) -> Tensor:
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD), noise)

    def cached(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        start_B: Tensor,
        k_BTKE: Tensor,
        v_BTKE: Tensor,
        visible: int,
        uneven: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, through the caches: see `Attention.cached`."""
        h_BSD = self.input_layernorm(x_BSD)
        y_BSD, k_BTKE, v_BTKE = self.self_attn.cached(
            h_BSD, cos_BSE, sin_BSE, start_B, k_BTKE, v_BTKE, visible, uneven
        )
        return self.feed_forward(x_BSD + y_BSD), k_BTKE, v_BTKE


class Stack(nn.Module):
    """Embeddings, blocks and final norm: what checkpoints call `model`."""

    def __init__(self, spec: TextSpec, linear: Linears) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(
            [Block(spec, linear.under(f"layers.{n}")) for n in range(spec.num_layers)]
        )
        self.norm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        segment_ids_BS: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos_BSE, sin_BSE, segment_ids_BS, noise)
        return self.norm(x_BSD)

    def cached(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        start_B: Tensor,
        caches: tuple[Tensor, ...],
        visible: int,
        uneven: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `forward`, through the caches: see `Attention.cached`."""
        filled: tuple[Tensor, ...] = ()
        for n, layer in enumerate(self.layers):
            x_BSD, k_BTKE, v_BTKE = layer.cached(
                x_BSD,
                cos_BSE,
                sin_BSE,
                start_B,
                caches[2 * n],
                caches[2 * n + 1],
                visible,
                uneven,
            )
            filled = (*filled, k_BTKE, v_BTKE)
        return self.norm(x_BSD), filled


class LanguageModel(nn.Module):
    """The decoder with its head. `caches` is (keys, values) of every block in one flat tuple."""

    def __init__(self, spec: TextSpec, adapters: AdapterSpec | None = None) -> None:
        super().__init__()
        self.model = Stack(spec, Linears(adapters).under("model"))
        self.tied = spec.tie_embeddings
        if not self.tied:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, False)

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSE: Tensor,
        sin_BSE: Tensor,
        segment_ids_BS: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """Final hidden states of the merged rows, [B, S, D]."""
        return self.model(x_BSD, cos_BSE, sin_BSE, segment_ids_BS, noise)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """[..., V] in the dtype of the model."""
        if self.tied:
            return ops.linear(hidden_BSD, self.model.embed_tokens.weight)
        return self.lm_head(hidden_BSD)

    def head_matrix(self) -> Tensor:
        """The output matrix as [V, D]."""
        return self.model.embed_tokens.weight if self.tied else self.lm_head.matrix()
