"""Ops of the contract on paddle tensors. Meaning, shapes and dtypes: backends/contract.py.

Every op works eagerly and while `paddle.jit.to_static` traces a graph. Where a fused kernel is
in force (`_state.fused`), it is taken; what stands here is the portable form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.jit.dy2static.py_layer import StaticPyLayerContext

from backends import quantised
from backends.contract import dropout_limit
from backends.paddle import _state

CHUNK_ROWS = 1024
"""Most rows whose logits `linear_cross_entropy` holds at a time."""
CHUNK_BYTES = 64 * 2**20
"""Most float32 bytes of these logits."""
SPREAD_FROM = 2**13
"""Entries from which on a factor is broadcast before it is multiplied."""
IGNORED = -100
"""The target that adds nothing."""


def _fused(name: str, *args: Any) -> Tensor | None:
    """The result of the fused kernel; None if there is none or it does not take these shapes."""
    kernel = _state.fused.get(name)
    return kernel and kernel(*args)


# --- shape -----------------------------------------------------------------------------------


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return paddle.reshape(x, list(shape))


def transpose(x: Tensor, axes: Sequence[int]) -> Tensor:
    return paddle.transpose(x, list(axes))


def concat(xs: Sequence[Tensor], axis: int) -> Tensor:
    return paddle.concat(list(xs), axis)


def broadcast_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    return paddle.broadcast_to(x, list(shape))


def cast(x: Tensor, dtype: str | paddle.dtype) -> Tensor:
    return paddle.cast(x, dtype)


def zeros(shape: Sequence[int], dtype: str | paddle.dtype) -> Tensor:
    return paddle.zeros(list(shape), dtype)


# --- rows and reductions ---------------------------------------------------------------------


def take_rows(table_ND: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, table_ND)


def reduce_sum(x: Tensor, axis: int | Sequence[int], keepdims: bool = False) -> Tensor:
    return paddle.sum(x, _axes(axis), keepdim=keepdims)


def reduce_mean(x: Tensor, axis: int | Sequence[int], keepdims: bool = False) -> Tensor:
    return paddle.mean(x, _axes(axis), keepdim=keepdims)


def reduce_max(x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
    return paddle.max(x, axis, keepdim=keepdims)


def argmax(x: Tensor, axis: int) -> Tensor:
    return paddle.argmax(x, axis, dtype="int64")


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # paddle.where broadcasts too, but in a traced graph by adding zeros, at ten times the cost.
    shape = functools.reduce(paddle.broadcast_shape, (condition.shape, a.shape, b.shape))
    return paddle.where(*(paddle.broadcast_to(x, shape) for x in (condition, a, b)))


def _axes(axis: int | Sequence[int]) -> int | list[int]:
    return axis if isinstance(axis, int) else list(axis)


# --- linear algebra and activations ----------------------------------------------------------


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return paddle.matmul(a, b)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    y = paddle.matmul(x, like(weight_OI, x), transpose_y=True)
    return y if bias_O is None else y + like(bias_O, x)


def quantised_linear(x: Tensor, codes: Tensor, scale_OG: Tensor, kind: str) -> Tensor:
    layer = _QUANTISED[kind]
    inputs = [x, codes, scale_OG]
    if paddle.in_dynamic_mode():
        return layer.apply(*inputs)
    graph = StaticPyLayerContext()
    return paddle.static.nn.static_pylayer(
        functools.partial(layer.forward, graph), inputs, functools.partial(layer.backward, graph)
    )


class _QuantisedLinear(paddle.autograd.PyLayer):
    """Keeps the codes alone for the backward pass, which needs the weight once more."""

    kind: str

    @classmethod
    def weight(cls, codes: Tensor, scale_OG: Tensor, dtype: paddle.dtype) -> Tensor:
        if cls.kind == "int8":
            share = paddle.cast(codes, "float32") / quantised.LARGEST
        else:
            table = paddle.to_tensor(quantised.pairs(cls.kind))
            share = F.embedding(paddle.cast(codes, "int32"), table)
        share_OGN = paddle.reshape(share, [*scale_OG.shape, -1])
        scale_OG1 = paddle.unsqueeze(scale_OG, -1)
        return _as(paddle.reshape(share_OGN * scale_OG1, [codes.shape[0], -1]), dtype)

    @classmethod
    def forward(cls, ctx: Any, x: Tensor, codes: Tensor, scale_OG: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale_OG)
        return paddle.matmul(x, cls.weight(codes, scale_OG, x.dtype), transpose_y=True)

    @classmethod
    def backward(cls, ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        codes, scale_OG = ctx.saved_tensor()
        return paddle.matmul(upstream, cls.weight(codes, scale_OG, upstream.dtype)), None, None


_QUANTISED = {
    kind: type(f"_Quantised{kind}", (_QuantisedLinear,), {"kind": kind}) for kind in quantised.KINDS
}


def softmax(x: Tensor, axis: int) -> Tensor:
    return _as(F.softmax(_wide(x), axis), x.dtype)


def gelu(x: Tensor, approximate: bool) -> Tensor:
    return F.gelu(x, approximate=approximate)


def quick_gelu(x: Tensor) -> Tensor:
    return x * F.sigmoid(x * 1.702)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = _fused("swiglu", gate, up)
    return F.silu(gate) * up if y is None else y


# --- dropout ---------------------------------------------------------------------------------


def dropout(x: Tensor, rows: Tensor, columns_D: Tensor, salt: int, rate: float) -> Tensor:
    # As tensors: in a traced graph a product with a Python number goes through float32.
    factor, limit = (paddle.full([1], n, "int32") for n in (salt, dropout_limit(rate)))
    row = paddle.unsqueeze(paddle.cast(rows, "int32") * factor, -1)
    kept = row * paddle.cast(columns_D, "int32") >= limit
    return x * paddle.cast(kept, x.dtype) * (1 / (1 - rate))


# --- normalisation ---------------------------------------------------------------------------


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, list(weight_D.shape), like(weight_D, x), like(bias_D, x), eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    weight_D = like(weight_D, x)
    y = _fused("rms_norm", x, weight_D, eps)
    if y is not None:
        return y
    wide = _wide(x)
    scale = paddle.rsqrt(paddle.mean(wide * wide, -1, keepdim=True) + eps)
    return _as(wide * _spread(scale, x.shape), x.dtype) * _spread(weight_D, x.shape)


# --- transformer ops -------------------------------------------------------------------------


def rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    cos_BSD, sin_BSD = _as(cos_BSD, x_BSHD.dtype), _as(sin_BSD, x_BSHD.dtype)
    y_BSHD = _fused("rotary", x_BSHD, cos_BSD, sin_BSD)
    if y_BSHD is not None:
        return y_BSHD
    half = x_BSHD.shape[-1] // 2
    turned_BSHD = paddle.concat([-x_BSHD[..., half:], x_BSHD[..., :half]], -1)
    cos_BSHD, sin_BSHD = (_spread(t.unsqueeze(2), x_BSHD.shape) for t in (cos_BSD, sin_BSD))
    return x_BSHD * cos_BSHD + turned_BSHD * sin_BSHD


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
    mask_BST = None
    if lengths_B is not None or segment_ids_BS is not None or window is not None:
        mask_BST = _mask(S, T, causal, lengths_B, segment_ids_BS, window)
    # Plain causal attention goes without a mask: the kernels skip what is not seen.
    plain = causal and mask_BST is None
    out_BSHD = _fused("attention", q_BSHD, k_BTKD, v_BTKD, scale, plain, mask_BST)
    if out_BSHD is not None:
        return out_BSHD
    if plain:
        mask_BST = _mask(S, T, causal, None, None, None)
    return _portable_attention(q_BSHD, k_BTKD, v_BTKD, scale, mask_BST)


def _portable_attention(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scale: float, mask_BST: Tensor | None
) -> Tensor:
    B, S, H, D = q_BSHD.shape
    T, K = k_BTKD.shape[1:3]
    # Query heads of one key/value head are rows of one product: nothing is repeated in memory.
    q_BKRD = paddle.transpose(q_BSHD * scale, [0, 2, 1, 3]).reshape([B, K, H // K * S, D])
    k_BKTD, v_BKTD = (paddle.transpose(x, [0, 2, 1, 3]) for x in (k_BTKD, v_BTKD))
    scores_BKRT = _wide(paddle.matmul(q_BKRD, k_BKTD, transpose_y=True))
    if mask_BST is not None:
        # 0 where a key is seen, -1e30 where it is not: no score outweighs that in float32.
        bias_B1ST = paddle.scale(paddle.cast(mask_BST, "float32"), 1e30, bias=-1e30).unsqueeze(1)
        bias_BHST = paddle.broadcast_to(bias_B1ST, [B, H, S, T])
        scores_BKRT = scores_BKRT + bias_BHST.reshape([B, K, H // K * S, T])
    weights_BKRT = _as(F.softmax(scores_BKRT, -1), q_BSHD.dtype)
    out_BHSD = paddle.matmul(weights_BKRT, v_BKTD).reshape([B, H, S, D])
    return paddle.transpose(out_BHSD, [0, 2, 1, 3])


def _mask(
    S: int,
    T: int,
    causal: bool,
    lengths_B: Tensor | None,
    segment_ids_BS: Tensor | None,
    window: int | None,
) -> Tensor:
    """Which keys a query sees, bool [B or 1, S, T]."""
    key_11T, query_BS1 = _arange(1, 1, T), _arange(1, S, 1)
    rules = []
    if lengths_B is not None:
        lengths_B11 = lengths_B.reshape([-1, 1, 1])
        query_BS1 = query_BS1 + (lengths_B11 - S)
        rules.append(key_11T < lengths_B11)
    if causal:
        # Of a cache, positions up to the query's own are all below the row's length.
        rules = [key_11T <= query_BS1]
    if window is not None:
        rules.append(key_11T > query_BS1 - window)
    if segment_ids_BS is not None:
        rules.append(segment_ids_BS.unsqueeze(2) == segment_ids_BS.unsqueeze(1))
    return functools.reduce(paddle.logical_and, rules)


def cache_update(cache_BTKD: Tensor, new_BSKD: Tensor, start_B: Tensor) -> Tensor:
    B, S = new_BSKD.shape[:2]
    rows_B1, places_BS = _arange(B, 1), start_B.reshape([B, 1]) + _arange(1, S)
    with paddle.no_grad():
        if S > 1 and _state.device == "cpu":
            return _scatter_rows(cache_BTKD, new_BSKD, rows_B1, places_BS)
        rows_BS = paddle.broadcast_to(rows_B1, [B, S])
        return paddle.index_put_(cache_BTKD, (rows_BS, places_BS), new_BSKD)


def _scatter_rows(
    cache_BTKD: Tensor, new_BSKD: Tensor, rows_B1: Tensor, places_BS: Tensor
) -> Tensor:
    """What index_put_ does, which on cpu walks element by element: 30 times as long as this."""
    B, T, K, D = cache_BTKD.shape
    index_N = (rows_B1 * T + places_BS).reshape([-1])
    # A traced graph forbids to write into what it takes for a view.
    scatter = paddle.scatter_ if paddle.in_dynamic_mode() else paddle.scatter
    flat_ND = scatter(
        cache_BTKD.reshape([B * T, K * D]), index_N, new_BSKD.reshape([-1, K * D]), overwrite=True
    )
    return flat_ND.reshape([B, T, K, D])


def _arange(*shape: int) -> Tensor:
    """0 … n - 1 as int64, in this shape. Eagerly made once: it costs as much as ten small ops."""
    if paddle.in_dynamic_mode():
        return _kept_arange(shape, _state.device)
    return paddle.arange(math.prod(shape), dtype="int64").reshape(shape)


@functools.lru_cache(maxsize=256)
def _kept_arange(shape: tuple[int, ...], device: str) -> Tensor:
    return paddle.arange(math.prod(shape), dtype="int64").reshape(shape)


def patch_embed(x_B3HW: Tensor, weight_OIPP: Tensor, bias_O: Tensor | None) -> Tensor:
    weight_OIPP = like(weight_OIPP, x_B3HW)
    bias_O = None if bias_O is None else like(bias_O, x_B3HW)
    y_BOhw = F.conv2d(x_B3HW, weight_OIPP, bias_O, stride=weight_OIPP.shape[-1])
    return paddle.transpose(paddle.flatten(y_BOhw, 2), [0, 2, 1])


# --- losses ----------------------------------------------------------------------------------


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(_wide(logits_NV), targets_N, reduction="none")


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    inputs = [hidden_ND, weight_VD, targets_N]
    if paddle.in_dynamic_mode():
        return _LinearCrossEntropy.apply(*inputs)
    # to_static makes this of a PyLayer when it rewrites source, which runtime.compile does not.
    graph = StaticPyLayerContext()
    return paddle.static.nn.static_pylayer(
        functools.partial(_LinearCrossEntropy.forward, graph),
        inputs,
        functools.partial(_LinearCrossEntropy.backward, graph),
    )


class _LinearCrossEntropy(paddle.autograd.PyLayer):
    """Keeps the inputs only; the backward pass computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        # Asked here, because what a traced graph hands back has lost it.
        ctx.wanted = (not hidden_ND.stop_gradient, not weight_VD.stop_gradient)
        matrix_VD = like(weight_VD, hidden_ND)
        total = paddle.zeros([], "float32")
        for part in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
            logits_NV = _wide(paddle.matmul(hidden_ND[part], matrix_VD, transpose_y=True))
            # Paddle's mean would count ignored rows; its sum does not.
            total += F.cross_entropy(
                logits_NV, targets_N[part], ignore_index=IGNORED, reduction="sum"
            )
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_ND, weight_VD, targets_N = ctx.saved_tensor()
        matrix_VD = like(weight_VD, hidden_ND)
        wants_hidden, wants_weight = ctx.wanted
        grad_hidden, grad_weight = [], paddle.zeros(weight_VD.shape, "float32")
        for part in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
            hidden = hidden_ND[part]
            logits_NV = _wide(paddle.matmul(hidden, matrix_VD, transpose_y=True))
            grad_NV = _as(_logits_gradient(logits_NV, targets_N[part], upstream), hidden.dtype)
            if wants_hidden:
                grad_hidden.append(paddle.matmul(grad_NV, matrix_VD))
            if wants_weight:
                grad_weight += _wide(paddle.matmul(grad_NV, hidden, transpose_x=True))
        return (
            paddle.concat(grad_hidden, 0) if wants_hidden else None,
            _as(grad_weight, weight_VD.dtype) if wants_weight else None,
            None,
        )


def _logits_gradient(logits_NV: Tensor, targets_N: Tensor, upstream: Tensor) -> Tensor:
    """`upstream` times d sum(cross entropy) / d logits.

    That is softmax, minus one at the target, and zero in ignored rows.
    """
    targets_N1 = targets_N.unsqueeze(1)
    is_target_NV = _arange(1, logits_NV.shape[1]) == targets_N1
    weight_N1 = paddle.cast(targets_N1 != IGNORED, "float32") * upstream
    return (F.softmax(logits_NV, -1) - paddle.cast(is_target_NV, "float32")) * weight_N1


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (4 * vocabulary)))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


# --- gradients and dtypes --------------------------------------------------------------------


def stop_gradient(x: Tensor) -> Tensor:
    return x.detach()


def _spread(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` broadcast to the shape of what it meets.

    Paddle's arithmetic broadcasts by itself, but on cpu over middle axes at 20 times the cost;
    with few numbers the additional op costs more.
    """
    if math.prod(shape) < SPREAD_FROM or tuple(x.shape) == tuple(shape):
        return x
    return paddle.broadcast_to(x, list(shape))


def _wide(x: Tensor) -> Tensor:
    """`x` as float32: what norms, softmax and losses are computed in."""
    return _as(x, paddle.float32)


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter in the dtype of what it meets: trained ones are float32 always."""
    return _as(parameter, x.dtype)


def _as(x: Tensor, dtype: paddle.dtype) -> Tensor:
    # paddle.cast copies even when there is nothing to change.
    return x if x.dtype == dtype else paddle.cast(x, dtype)
