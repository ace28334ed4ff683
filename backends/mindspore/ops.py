"""Ops of the contract on MindSpore tensors. Meaning, shapes and dtypes: backends/contract.py.

Every function works eagerly and inside `ms.jit`: plain module functions, no lambdas, branches
only on Python values. The MindSpore functions used here run on CPU, GPU and Ascend; those that
Ascend alone has are in `ascend`, behind the switch FUSED.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore import ops as F

from backends.contract import dropout_limit
from backends.mindspore import ascend
from backends.quantised import LARGEST, LEVELS
from backends.quantised import pairs as pairs_of

DTYPES = {
    "float32": ms.float32,
    "float16": ms.float16,
    "bfloat16": ms.bfloat16,
    "int64": ms.int64,
    "int32": ms.int32,
    "bool": ms.bool_,
}

FUSED = False
"""The one switch between Ascend's kernels and the portable form; set by runtime.setup."""

CHUNK_BYTES = 32 * 2**20
"""Float32 logits that `linear_cross_entropy` holds at a time."""

WIDE = ms.float64
"""What a softmax is computed in; set by runtime.setup. The float32 `exp` of MindSpore's CPU kernels
is off by up to 1e-5 of its value, ten times what its neighbours are, so there it is float64."""

LOWEST = -3.0e38
"""Score of a key that a query must not see: its weight underflows to exactly 0."""

# On CPU MindSpore broadcasts two operands of different shape 10 to 20 times slower than it adds
# or multiplies equal ones, and copies a transposed view as slowly. The forms below avoid both
# where tensors are large.
_add_row = F.BiasAdd()
_outer = F.MatMul()
_times_transposed = F.MatMul(transpose_b=True)
_transposed_times = F.MatMul(transpose_a=True)
_scores = F.BatchMatMul(transpose_b=True)


def _dtype(dtype: str | Any) -> Any:
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


# --- shape -----------------------------------------------------------------------------------


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return F.reshape(x, tuple(shape))


def transpose(x: Tensor, axes: Sequence[int]) -> Tensor:
    return F.transpose(x, tuple(axes))


def concat(xs: Sequence[Tensor], axis: int) -> Tensor:
    return F.cat(tuple(xs), axis)


def broadcast_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    return F.broadcast_to(x, tuple(shape))


def cast(x: Tensor, dtype: str | Any) -> Tensor:
    return F.cast(x, _dtype(dtype))


def zeros(shape: Sequence[int], dtype: str | Any) -> Tensor:
    return F.zeros(tuple(shape), _dtype(dtype))


# --- rows and reductions ---------------------------------------------------------------------


def take_rows(table_ND: Tensor, index: Tensor) -> Tensor:
    return ascend.take_rows(table_ND, index) if FUSED else F.gather(table_ND, index, 0)


def reduce_sum(x: Tensor, axis: int | Sequence[int], keepdims: bool = False) -> Tensor:
    return F.sum(x, axis, keepdims)


def reduce_mean(x: Tensor, axis: int | Sequence[int], keepdims: bool = False) -> Tensor:
    return F.mean(x, axis, keepdims)


def reduce_max(x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
    return F.amax(x, axis, keepdims)


def argmax(x: Tensor, axis: int) -> Tensor:
    return F.argmax(x, axis)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.where(condition, a, b)


# --- linear algebra and activations ----------------------------------------------------------


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return F.matmul(a, b)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    if FUSED:
        return ascend.linear(x, weight_OI, bias_O)
    y_NO = _times_transposed(F.reshape(x, (-1, x.shape[-1])), weight_OI)
    if bias_O is not None:
        y_NO = _add_row(y_NO, bias_O)
    return F.reshape(y_NO, x.shape[:-1] + (weight_OI.shape[0],))


def quantised_linear(x: Tensor, codes: Tensor, scale_OG: Tensor, kind: str) -> Tensor:
    x_NI = F.reshape(x, (-1, x.shape[-1]))
    if kind == "int8":
        y_NO = _linear_8bit(x_NI, codes, scale_OG)
    else:
        y_NO = _linear_4bit(x_NI, codes, scale_OG, _PAIRS[kind])
    return F.reshape(y_NO, x.shape[:-1] + (codes.shape[0],))


class _Linear8bit(ms.nn.Cell):
    """Keeps the codes alone for the backward pass, which needs the weight once more.

    It makes that from codes that wait for its upstream gradient (`depend`), else a compiled graph
    may share the forward pass's weight.
    """

    def construct(self, x_NI: Tensor, codes: Tensor, scale_OG: Tensor) -> Tensor:
        return _times_transposed(x_NI, _from_8bit(codes, scale_OG, x_NI.dtype))

    def bprop(
        self, x_NI: Tensor, codes: Tensor, scale_OG: Tensor, y_NO: Tensor, upstream_NO: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_OI = _from_8bit(F.depend(codes, upstream_NO), scale_OG, upstream_NO.dtype)
        return F.matmul(upstream_NO, weight_OI), F.zeros_like(codes), F.zeros_like(scale_OG)


class _Linear4bit(ms.nn.Cell):
    """The same for two codes in a byte; `pairs` [256, 2] says what they stand for."""

    def construct(self, x_NI: Tensor, codes: Tensor, scale_OG: Tensor, pairs: Tensor) -> Tensor:
        return _times_transposed(x_NI, _from_4bit(codes, scale_OG, pairs, x_NI.dtype))

    def bprop(
        self,
        x_NI: Tensor,
        codes: Tensor,
        scale_OG: Tensor,
        pairs: Tensor,
        y_NO: Tensor,
        upstream_NO: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        later = F.depend(codes, upstream_NO)
        weight_OI = _from_4bit(later, scale_OG, pairs, upstream_NO.dtype)
        return (
            F.matmul(upstream_NO, weight_OI),
            F.zeros_like(codes),
            F.zeros_like(scale_OG),
            F.zeros_like(pairs),
        )


def _from_8bit(codes: Tensor, scale_OG: Tensor, dtype: Any) -> Tensor:
    return _scaled(F.cast(codes, ms.float32) * (1 / LARGEST), scale_OG, dtype)


def _from_4bit(codes: Tensor, scale_OG: Tensor, pairs: Tensor, dtype: Any) -> Tensor:
    return _scaled(F.gather(pairs, F.cast(codes, ms.int32), 0), scale_OG, dtype)


def _scaled(share: Tensor, scale_OG: Tensor, dtype: Any) -> Tensor:
    share_OGN = F.reshape(share, scale_OG.shape + (-1,))
    scale_OGN = F.broadcast_to(F.expand_dims(scale_OG, -1), share_OGN.shape)
    return F.cast(F.reshape(share_OGN * scale_OGN, (scale_OG.shape[0], -1)), dtype)


_linear_8bit, _linear_4bit = _Linear8bit(), _Linear4bit()
_PAIRS = {kind: Tensor(pairs_of(kind)) for kind in LEVELS}


def softmax(x: Tensor, axis: int) -> Tensor:
    return F.cast(F.softmax(F.cast(x, WIDE), axis), x.dtype)


def gelu(x: Tensor, approximate: bool) -> Tensor:
    return F.gelu(x, "tanh" if approximate else "none")


def quick_gelu(x: Tensor) -> Tensor:
    return x * F.sigmoid(x * 1.702)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    # Ascend's swiglu kernel wants both halves in one tensor; joining them would move more
    # memory than the kernel saves.
    return F.silu(gate) * up


# --- dropout ---------------------------------------------------------------------------------


def dropout(x: Tensor, rows: Tensor, columns_D: Tensor, salt: int, rate: float) -> Tensor:
    row = F.expand_dims(F.cast(rows, ms.int32) * salt, -1)
    number = F.broadcast_to(row, x.shape) * F.broadcast_to(F.cast(columns_D, ms.int32), x.shape)
    return x * F.cast(number >= dropout_limit(rate), x.dtype) * (1 / (1 - rate))


# --- normalisation ---------------------------------------------------------------------------


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    if FUSED:
        return ascend.layer_norm(x, weight_D, bias_D, eps)
    return F.LayerNorm(-1, -1, eps)(x, weight_D, bias_D)[0]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if FUSED:
        return ascend.rms_norm(x, weight_D, eps)
    wide = F.cast(x, ms.float32)
    inverse = F.rsqrt(F.mean(F.square(wide), -1, True) + eps)
    if x.dtype == ms.float32:
        D = x.shape[-1]
        scale_ND = _outer(F.reshape(inverse, (-1, 1)), F.reshape(weight_D, (1, D)))
        return x * F.reshape(scale_ND, x.shape)
    return F.cast(wide * inverse, x.dtype) * weight_D


# --- transformer ops -------------------------------------------------------------------------


def rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    cos_BS1D = F.cast(F.expand_dims(cos_BSD, 2), x_BSHD.dtype)
    sin_BS1D = F.cast(F.expand_dims(sin_BSD, 2), x_BSHD.dtype)
    if FUSED:
        return ascend.rotary(x_BSHD, cos_BS1D, sin_BS1D)
    B, S, H, D = x_BSHD.shape
    turned_ND = F.matmul(F.reshape(x_BSHD, (-1, D)), F.cast(_quarter_turn(D), x_BSHD.dtype))
    turned_BSHD = F.reshape(turned_ND, (B, S, H, D))
    if S > 1:
        cos_BS1D, sin_BS1D = F.tile(cos_BS1D, (1, 1, H, 1)), F.tile(sin_BS1D, (1, 1, H, 1))
    return x_BSHD * cos_BS1D + turned_BSHD * sin_BS1D


def _quarter_turn(D: int) -> Tensor:
    """The matrix M with x @ M = concat(-x2, x1), float32 [D, D]: exact, one 1 or -1 per column."""
    half = D // 2
    return Tensor((np.eye(D, k=half) - np.eye(D, k=-half)).astype(np.float32))


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
    S, T = q_BSHD.shape[1], k_BTKD.shape[1]
    if window is not None and window >= T:
        window = None
    if FUSED and ascend.has_attention(q_BSHD):
        if causal and lengths_B is None and segment_ids_BS is None and window is None:
            return ascend.causal_attention(q_BSHD, k_BTKD, v_BTKD, scale)
        visible_BST = _visible(S, T, causal, lengths_B, segment_ids_BS, window)
        hidden_BST = None if visible_BST is None else F.logical_not(visible_BST)
        if S == 1 and T > 1:
            return ascend.decode_attention(q_BSHD, k_BTKD, v_BTKD, scale, hidden_BST)
        return ascend.attention(q_BSHD, k_BTKD, v_BTKD, scale, hidden_BST)
    visible_BST = _visible(S, T, causal, lengths_B, segment_ids_BS, window)
    if S == 1:
        return _one_query(q_BSHD, k_BTKD, v_BTKD, scale, visible_BST)
    return _many_queries(q_BSHD, k_BTKD, v_BTKD, scale, visible_BST)


def _visible(
    S: int,
    T: int,
    causal: bool,
    lengths_B: Tensor | None,
    segment_ids_BS: Tensor | None,
    window: int | None,
) -> Tensor | None:
    """Which keys a query sees, bool [B or 1, S or 1, T]; None: all."""
    key_T, query_BS1 = _positions(T), F.reshape(_positions(S), (1, S, 1))
    visible_BST = None
    if lengths_B is not None:
        query_BS1 = query_BS1 + F.reshape(lengths_B - S, (-1, 1, 1))
    if causal:  # with lengths, it implies that the key exists
        visible_BST = key_T <= query_BS1
    elif lengths_B is not None:
        visible_BST = key_T < F.reshape(lengths_B, (-1, 1, 1))
    if window is not None:
        visible_BST = _both(visible_BST, key_T > query_BS1 - window)
    if segment_ids_BS is not None:
        same_BSS = F.expand_dims(segment_ids_BS, 2) == F.expand_dims(segment_ids_BS, 1)
        visible_BST = _both(visible_BST, same_BSS)
    return visible_BST


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else F.logical_and(a, b)


def _many_queries(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float, visible_BST: Tensor | None
) -> Tensor:
    B, S, H, D = q_BSHD.shape
    T, K = k_BTKD.shape[1], k_BTKD.shape[2]
    # Query heads of one key/value head are rows of one product: nothing is repeated in memory.
    G = H // K
    q_BSKGD = F.reshape(q_BSHD * scale, (B, S, K, G, D))
    q_KBRD = F.reshape(F.transpose(q_BSKGD, (2, 0, 3, 1, 4)), (K, B, G * S, D))
    scores_KBRT = F.cast(_scores(q_KBRD, F.transpose(k_BTKD, (2, 0, 1, 3))), ms.float32)
    if visible_BST is not None:
        # One row for each key/value head, to which the same mask is added.
        hidden_KX = _add_row(F.reshape(scores_KBRT, (K, -1)), _mask_row(visible_BST, B, G, S))
        scores_KBRT = F.reshape(hidden_KX, (K, B, G * S, T))
    weights_KBRT = F.cast(softmax(scores_KBRT, -1), q_BSHD.dtype)
    out_KBRD = F.matmul(weights_KBRT, F.transpose(v_BTKD, (2, 0, 1, 3)))
    out_KBGSD = F.reshape(out_KBRD, (K, B, G, S, D))
    return F.reshape(F.transpose(out_KBGSD, (1, 3, 0, 2, 4)), (B, S, H, D))


def _mask_row(visible_BST: Tensor, B: int, G: int, S: int) -> Tensor:
    """What is added to scores: 0 or LOWEST, float32, repeated to [B, G, S, T] and laid out flat."""
    mask_B1ST = F.expand_dims((F.cast(visible_BST, ms.float32) - 1.0) * -LOWEST, 1)
    repeats = (B // mask_B1ST.shape[0], G, S // mask_B1ST.shape[2], 1)
    return F.stop_gradient(F.reshape(F.tile(mask_B1ST, repeats), (-1,)))


def _one_query(
    q_B1HD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float, visible_B1T: Tensor | None
) -> Tensor:
    """For decoding: reads keys and values as they lie.

    To bring the heads of a long cache to the front (a transposition) takes far longer on CPU
    than attention itself. So each query is laid out over the width of all heads, zero outside
    its own, and multiplies whole rows of the cache.
    """
    B, _, H, D = q_B1HD.shape
    T, K = k_BTKD.shape[1], k_BTKD.shape[2]
    own_KK = Tensor(np.eye(K, dtype=np.float32))
    own_1K1K1 = F.cast(F.reshape(own_KK, (1, K, 1, K, 1)), q_B1HD.dtype)
    q_BKGKD = F.reshape(q_B1HD * scale, (B, K, H // K, 1, D)) * own_1K1K1
    scores_BHT = _scores(F.reshape(q_BKGKD, (B, H, K * D)), F.reshape(k_BTKD, (B, T, K * D)))
    scores_BHT = F.cast(scores_BHT, ms.float32)
    if visible_B1T is not None:
        scores_BHT = F.where(visible_B1T, scores_BHT, LOWEST)
    weights_BHT = F.cast(softmax(scores_BHT, -1), q_B1HD.dtype)
    out_BHX = F.bmm(weights_BHT, F.reshape(v_BTKD, (B, T, K * D)))
    out_BKGKD = F.reshape(out_BHX, (B, K, H // K, K, D)) * own_1K1K1
    return F.reshape(F.sum(out_BKGKD, 3), (B, 1, H, D))


def cache_update(cache_BTKD: Tensor, new_BSKD: Tensor, start_B: Tensor) -> Tensor:
    if FUSED:
        return ascend.cache_update(cache_BTKD, new_BSKD, start_B)
    B, S, K, D = new_BSKD.shape
    rows_B = _positions(B)
    if S == 1:
        places_B2 = F.stack((rows_B, start_B), -1)
        return F.tensor_scatter_update(cache_BTKD, places_B2, F.reshape(new_BSKD, (B, K, D)))
    rows_BS = F.broadcast_to(F.expand_dims(rows_B, 1), (B, S))
    columns_BS = F.expand_dims(start_B, 1) + _positions(S)
    return F.tensor_scatter_update(cache_BTKD, F.stack((rows_BS, columns_BS), -1), new_BSKD)


def _positions(length: int) -> Tensor:
    """0 … length - 1. Eagerly on CPU, F.arange takes far longer than to copy a constant."""
    return F.arange(length) if FUSED else Tensor(np.arange(length))


def patch_embed(x_B3HW: Tensor, weight_OIPP: Tensor, bias_O: Tensor | None) -> Tensor:
    B, C, height, width = x_B3HW.shape
    O, _, P, _ = weight_OIPP.shape
    rows, cols = height // P, width // P
    x = F.reshape(x_B3HW[:, :, : rows * P, : cols * P], (B, C, rows, P, cols, P))
    x_BGI = F.reshape(F.transpose(x, (0, 2, 4, 1, 3, 5)), (B, rows * cols, C * P * P))
    return linear(x_BGI, F.reshape(weight_OIPP, (O, -1)), bias_O)


# --- losses ----------------------------------------------------------------------------------


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    log_weights_NV = F.cast(F.log_softmax(F.cast(logits_NV, WIDE), -1), ms.float32)
    return -F.reshape(F.gather_elements(log_weights_NV, 1, F.expand_dims(targets_N, 1)), (-1,))


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return _chunked_loss(hidden_ND, weight_VD, targets_N)


class _LinearCrossEntropy(ms.nn.Cell):
    """Computes the logits of a chunk of rows at a time, once forward and once backward.

    Each chunk waits for the one before (`depend`), else a compiled graph may hold all of them.
    A `bprop` cannot be compiled if a function that it calls holds an `if` statement.
    """

    def construct(self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        rows = CHUNK_BYTES // (4 * weight_VD.shape[0]) + 1
        matrix_VD = F.cast(weight_VD, hidden_ND.dtype)
        total = F.zeros((), ms.float32)
        for start in range(0, hidden_ND.shape[0], rows):
            hidden = F.depend(hidden_ND[start : start + rows], total)
            targets = targets_N[start : start + rows]
            logits_NV = _times_transposed(hidden, matrix_VD)
            losses = cross_entropy(logits_NV, F.maximum(targets, 0))
            total = total + F.sum(losses * F.cast(targets >= 0, ms.float32), 0)
        return total

    def bprop(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        total: Tensor,
        upstream: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = CHUNK_BYTES // (4 * weight_VD.shape[0]) + 1
        matrix_VD = F.cast(weight_VD, hidden_ND.dtype)
        grads_hidden = ()
        grad_weight_VD = F.zeros(weight_VD.shape, ms.float32)
        for start in range(0, hidden_ND.shape[0], rows):
            hidden = F.depend(hidden_ND[start : start + rows], grad_weight_VD)
            targets = targets_N[start : start + rows]
            kept_N1 = F.expand_dims(upstream * F.cast(targets >= 0, ms.float32), 1)
            slope_NV = _loss_slope(_times_transposed(hidden, matrix_VD), targets)
            if hidden_ND.dtype == ms.float32:
                grad_hidden_ND = F.matmul(slope_NV, matrix_VD) * kept_N1
                share_VD = _transposed_times(slope_NV, hidden * kept_N1)
            else:
                # With the loss scale in it, which keeps small slopes in the range of float16.
                grad_NV = F.cast(slope_NV * kept_N1, hidden_ND.dtype)
                grad_hidden_ND = F.matmul(grad_NV, matrix_VD)
                share_VD = _transposed_times(grad_NV, hidden)
            grads_hidden = (*grads_hidden, grad_hidden_ND)
            grad_weight_VD = grad_weight_VD + F.cast(share_VD, ms.float32)
        return (
            F.cat(grads_hidden, 0),
            F.cast(grad_weight_VD, weight_VD.dtype),
            F.zeros_like(targets_N),
        )


def _loss_slope(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """softmax(logits) - one_hot(target), float32: the gradient of each row's loss."""
    N = logits_NV.shape[0]
    places_N2 = F.stack((_positions(N), F.maximum(targets_N, 0)), -1)
    weights_NV = softmax(F.cast(logits_NV, ms.float32), -1)
    return F.tensor_scatter_add(weights_NV, places_N2, Tensor(np.full(N, -1.0, np.float32)))


_chunked_loss = _LinearCrossEntropy()


def stop_gradient(x: Tensor) -> Tensor:
    return F.stop_gradient(x)
