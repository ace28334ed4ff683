"""Ops of the contract on torch tensors. Meaning, shapes and dtypes: backends/contract.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import quantised
from backends.contract import dropout_limit
from backends.torch import fused_4bit

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}

FUSED = True
"""The one switch between fused kernels and the portable form; set by runtime.setup."""
DEVICE = torch.device("cpu")
"""Where `zeros` puts its result; set by runtime.setup."""
COMPUTE = torch.float32
"""The dtype in force; set by runtime.setup."""

CHUNK_BYTES = 64 * 2**20
"""Float32 logits that `linear_cross_entropy` holds at a time."""


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


# --- shape -----------------------------------------------------------------------------------


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape(tuple(shape))


def transpose(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.permute(tuple(axes))


def concat(xs: Sequence[Tensor], axis: int) -> Tensor:
    return torch.cat(list(xs), axis)


def broadcast_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.expand(tuple(shape))


def cast(x: Tensor, dtype: str | torch.dtype) -> Tensor:
    return x.to(_dtype(dtype))


def zeros(shape: Sequence[int], dtype: str | torch.dtype) -> Tensor:
    return torch.zeros(tuple(shape), dtype=_dtype(dtype), device=DEVICE)


# --- rows and reductions ---------------------------------------------------------------------


def take_rows(table_ND: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, table_ND)


def reduce_sum(x: Tensor, axis: int | Sequence[int], keepdims: bool = False) -> Tensor:
    return torch.sum(x, dim=axis, keepdim=keepdims)


def reduce_mean(x: Tensor, axis: int | Sequence[int], keepdims: bool = False) -> Tensor:
    return torch.mean(x, dim=axis, keepdim=keepdims)


def reduce_max(x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
    return torch.amax(x, dim=axis, keepdim=keepdims)


def argmax(x: Tensor, axis: int) -> Tensor:
    return torch.argmax(x, dim=axis)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


# --- linear algebra and activations ----------------------------------------------------------


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    return F.linear(x, weight_OI.to(x.dtype), bias_O)


def quantised_linear(x: Tensor, codes: Tensor, scale_OG: Tensor, kind: str) -> Tensor:
    return _QuantisedLinear.apply(x, codes, scale_OG, kind)


class _QuantisedLinear(torch.autograd.Function):
    """Keeps the codes alone for the backward pass, which needs the weight once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale_OG: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(codes, scale_OG)
        ctx.kind = kind
        return F.linear(x, _dequantised(codes, scale_OG, kind, x.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale_OG = ctx.saved_tensors
        return upstream @ _dequantised(codes, scale_OG, ctx.kind, upstream.dtype), None, None, None


def _dequantised(codes: Tensor, scale_OG: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    if FUSED and codes.dtype == torch.uint8:
        weight_OI = fused_4bit.dequantised(codes, scale_OG, kind, dtype)
        if weight_OI is not None:
            return weight_OI
    rows, blocks = scale_OG.shape
    if kind == "int8":
        share = codes.float() / quantised.LARGEST
    else:
        share = F.embedding(codes.int(), _pairs(kind, codes.device))
    return (share.view(rows, blocks, -1) * scale_OG[..., None]).view(rows, -1).to(dtype)


@functools.cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    return torch.from_numpy(quantised.pairs(kind)).to(device)


def softmax(x: Tensor, axis: int) -> Tensor:
    return F.softmax(x, dim=axis, dtype=torch.float32).to(x.dtype)


def gelu(x: Tensor, approximate: bool) -> Tensor:
    return F.gelu(x, approximate="tanh" if approximate else "none")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


# --- dropout ---------------------------------------------------------------------------------


def dropout(x: Tensor, rows: Tensor, columns_D: Tensor, salt: int, rate: float) -> Tensor:
    number = (rows.int() * salt)[..., None] * columns_D.int()
    return torch.where(number >= dropout_limit(rate), x / (1 - rate), 0)


# --- normalisation ---------------------------------------------------------------------------


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight_D.shape, weight_D.to(x.dtype), bias_D.to(x.dtype), eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    weight_D = weight_D.to(x.dtype)
    if FUSED and x.dtype == torch.float32:
        # Below float32 torch's fused kernel multiplies before it rounds; LLaMA rounds first.
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight_D


# --- transformer ops -------------------------------------------------------------------------


def rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    cos_BS1D = cos_BSD[:, :, None].to(x_BSHD.dtype)
    sin_BS1D = sin_BSD[:, :, None].to(x_BSHD.dtype)
    first, second = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos_BS1D + torch.cat((-second, first), dim=-1) * sin_BS1D


def attention(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    scale: float,
    causal: bool,
    lengths_B: Tensor | None = None,
    segment_ids_BS: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    if FUSED and segment_ids_BS is not None and not torch.compiler.is_compiling():
        runs = _runs(segment_ids_BS)
        if runs is not None:
            return _attention_by_runs(q_BSHD, k_BTKD, v_BTKD, scale, causal, window, runs)
    S, T = q_BSHD.shape[1], k_BTKD.shape[1]
    masked = lengths_B is not None or segment_ids_BS is not None or window is not None
    mask_BST = (
        _mask(q_BSHD.device, S, T, causal, lengths_B, segment_ids_BS, window) if masked else None
    )
    q_BHSD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in (q_BSHD, k_BTKD, v_BTKD))
    if FUSED:
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD,
            k_BKTD,
            v_BKTD,
            attn_mask=None if mask_BST is None else mask_BST[:, None],
            is_causal=causal and not masked and S > 1,
            scale=scale,
            enable_gqa=q_BHSD.shape[1] != k_BKTD.shape[1],
        )
        return out_BHSD.transpose(1, 2)
    if mask_BST is None and causal:
        mask_BST = _mask(q_BSHD.device, S, T, causal, None, None, None)
    return _portable_attention(q_BHSD, k_BKTD, v_BKTD, scale, mask_BST).transpose(1, 2)


def _runs(segment_ids_BS: Tensor) -> list[list[int]] | None:
    """Lengths of the segments of each row; None if the positions of one do not lie together.

    Kept with the tensor: every layer asks, and an accelerator has to be waited for.
    """
    if not hasattr(segment_ids_BS, "runs"):
        counted = [torch.unique_consecutive(row, return_counts=True) for row in segment_ids_BS]
        whole = all(len(set(ids.tolist())) == len(ids) for ids, _ in counted)
        segment_ids_BS.runs = [counts.tolist() for _, counts in counted] if whole else None
    return segment_ids_BS.runs


def _attention_by_runs(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    runs: list[list[int]],
) -> Tensor:
    """Each segment by itself: nothing is computed to be masked, and the kernels need no mask."""
    rows = []
    for b, lengths in enumerate(runs):
        parts = [x[b : b + 1].split(lengths, 1) for x in (q_BSHD, k_BSKD, v_BSKD)]
        rows.append(
            torch.cat(
                [
                    attention(q, k, v, scale=scale, causal=causal, window=window)
                    for q, k, v in zip(*parts, strict=True)
                ],
                1,
            )
        )
    return torch.cat(rows)


def _portable_attention(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, mask_BST: Tensor | None
) -> Tensor:
    B, H, S, D = q_BHSD.shape
    K = k_BKTD.shape[1]
    # Query heads of one key/value head are rows of one product: nothing is repeated in memory.
    q_BKRD = q_BHSD.reshape(B, K, H // K * S, D)
    scores_BHST = (q_BKRD @ k_BKTD.transpose(-1, -2) * scale).reshape(B, H, S, -1)
    if mask_BST is not None:
        scores_BHST = scores_BHST.masked_fill(~mask_BST[:, None], -torch.inf)
    weights_BKRT = softmax(scores_BHST, -1).reshape(B, K, H // K * S, -1)
    return (weights_BKRT @ v_BKTD).reshape(B, H, S, D)


def _mask(
    device: torch.device,
    S: int,
    T: int,
    causal: bool,
    lengths_B: Tensor | None,
    segment_ids_BS: Tensor | None,
    window: int | None,
) -> Tensor:
    """Which keys a query sees, bool [B or 1, S, T]."""
    key_T = torch.arange(T, device=device)
    query_BS = torch.arange(S, device=device)[None]
    visible_BST = torch.ones((1, S, T), dtype=torch.bool, device=device)
    if lengths_B is not None:
        query_BS = query_BS + (lengths_B - S)[:, None]
        visible_BST = visible_BST & (key_T < lengths_B[:, None, None])
    if causal:
        visible_BST = visible_BST & (key_T <= query_BS[:, :, None])
    if window is not None:
        visible_BST = visible_BST & (key_T > query_BS[:, :, None] - window)
    if segment_ids_BS is not None:
        visible_BST = visible_BST & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None])
    return visible_BST


def cache_update(cache_BTKD: Tensor, new_BSKD: Tensor, start_B: Tensor) -> Tensor:
    B, S = new_BSKD.shape[:2]
    places_BS = start_B[:, None]
    if S > 1:
        places_BS = places_BS + torch.arange(S, device=start_B.device)
    if torch.compiler.is_compiling():
        # The compiler writes index_put in place; for scatter it would copy the whole cache.
        rows_B1 = torch.arange(B, device=start_B.device)[:, None]
        return cache_BTKD.index_put_((rows_B1, places_BS), new_BSKD)
    return cache_BTKD.scatter_(1, places_BS[:, :, None, None].expand_as(new_BSKD), new_BSKD)


def patch_embed(x_B3HW: Tensor, weight_OIPP: Tensor, bias_O: Tensor | None) -> Tensor:
    bias_O = None if bias_O is None else bias_O.to(x_B3HW.dtype)
    weight_OIPP = weight_OIPP.to(x_B3HW.dtype)
    return F.conv2d(x_B3HW, weight_OIPP, bias_O, stride=weight_OIPP.shape[-1]).flatten(2).mT


# --- losses ----------------------------------------------------------------------------------


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed chunk by chunk with the loss (idea: Liger-Kernel, arXiv 2410.10989).

    The logits of a chunk give its loss and, at once, its share of both gradients; the backward
    pass only scales them.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        rows = max(1, CHUNK_BYTES // (4 * weight_VD.shape[0]))
        weight_dtype, weight_VD = weight_VD.dtype, weight_VD.to(hidden_ND.dtype)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            hidden, targets = hidden_ND[part], targets_N[part]
            logits_NV = (hidden @ weight_VD.T).float()
            total += F.cross_entropy(logits_NV, targets, ignore_index=-100, reduction="sum")
            if not (needs_hidden or needs_weight):
                continue
            kept = targets != -100
            grad_NV = F.softmax(logits_NV, -1)
            grad_NV[torch.arange(len(targets), device=targets.device), targets * kept] -= 1
            grad_NV = (grad_NV * kept[:, None]).to(hidden.dtype)
            if needs_hidden:
                grad_hidden[part] = grad_NV @ weight_VD
            if needs_weight:
                grad_weight += (grad_NV.T @ hidden).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * upstream.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * upstream).to(ctx.weight_dtype),
            None,
        )


def stop_gradient(x: Tensor) -> Tensor:
    return x.detach()
