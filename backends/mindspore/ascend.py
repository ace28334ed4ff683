"""Ops of the contract on Ascend's own kernels, which exist on no other device.

`ops` calls these where its switch FUSED is on. Every MindSpore function used here is documented
for Ascend (tests/mindspore/test_ascend_audit.py). Shapes and letters: backends/contract.py.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor
from mindspore import ops as F

FLASH_DTYPES = (ms.float16, ms.bfloat16)
"""What the flash attention kernels take."""
COMPRESSED = 2048
"""Side of the one mask that Ascend's flash attention wants for its causal mode."""


def take_rows(table_ND: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, table_ND)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return F.dense(x, weight_OI, bias_O)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight_D, eps)[0]


def rotary(x_BSHD: Tensor, cos_BS1D: Tensor, sin_BS1D: Tensor) -> Tensor:
    """Half-split rotation; the tables have the dtype of x.

    MindSpore has announced the removal of this function, and none that replaces it.
    """
    return F.rotary_position_embedding(x_BSHD, cos_BS1D, sin_BS1D, 0)


def cache_update(cache_BTKD: Tensor, new_BSKD: Tensor, start_B: Tensor) -> Tensor:
    """Every cache row takes itself or a new row: static shapes, and no scatter."""
    B, T, K, D = cache_BTKD.shape
    S = new_BSKD.shape[1]
    place_BT = F.arange(T) - F.expand_dims(start_B, 1)  # of each cache row among the new ones
    inside_BT = F.logical_and(place_BT >= 0, place_BT < S)
    if S > 1:
        row_BT = F.clamp(place_BT, 0, S - 1) + F.expand_dims(F.arange(B), 1) * S
        new_BSKD = F.reshape(F.gather(F.reshape(new_BSKD, (B * S, K * D)), row_BT, 0), (B, T, K, D))
    return F.where(F.reshape(inside_BT, (B, T, 1, 1)), new_BSKD, cache_BTKD)


def has_attention(q_BSHD: Tensor) -> bool:
    """Whether the flash kernels take this dtype and head size."""
    return q_BSHD.dtype in FLASH_DTYPES and q_BSHD.shape[-1] % 16 == 0


def attention(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float, hidden_BST: Tensor | None
) -> Tensor:
    """Flash attention. `hidden`, bool [B or 1, S or 1, T]: the keys that a query must not see."""
    B, S, H, _ = q_BSHD.shape
    if hidden_BST is not None:
        hidden_BST = F.broadcast_to(F.expand_dims(hidden_BST, 1), (B, 1, S, k_BTKD.shape[1]))
    return F.flash_attention_score(
        q_BSHD,
        k_BTKD,
        v_BTKD,
        H,
        attn_mask=hidden_BST,
        scalar_value=scale,
        input_layout="BSND",
        sparse_mode=0,
    )


def causal_attention(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, scale: float) -> Tensor:
    """Flash attention under the plain causal mask, which it keeps compressed at any length."""
    above = F.triu(F.ones((COMPRESSED, COMPRESSED), ms.uint8), 1)
    return F.flash_attention_score(
        q_BSHD,
        k_BSKD,
        v_BSKD,
        q_BSHD.shape[2],
        attn_mask=above,
        scalar_value=scale,
        input_layout="BSND",
        sparse_mode=2,
    )


def decode_attention(
    q_B1HD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float, hidden_B1T: Tensor | None
) -> Tensor:
    """The kernel for one query per row. It reads the cache as it lies, [B, T, K * D].

    The lengths come as a mask and not as `actual_seq_lengths`, which the host would have to
    read from the device in every layer. No gradient.
    """
    B, _, H, D = q_B1HD.shape
    T, K = k_BTKD.shape[1], k_BTKD.shape[2]
    out_B1X = F.incre_flash_attention(
        F.reshape(q_B1HD, (B, 1, H * D)),
        [F.reshape(k_BTKD, (B, T, K * D))],
        [F.reshape(v_BTKD, (B, T, K * D))],
        attn_mask=hidden_B1T,
        num_heads=H,
        input_layout="BSH",
        scale_value=scale,
        num_key_value_heads=K,
    )
    return F.reshape(out_B1X, (B, 1, H, D))
