"""Fused kernels by kind of device, and the check that lets one in.

A kernel that Paddle names for a kind of device is used only after it has given, here and now,
on this device and in this dtype, the values and gradients of the portable form. So a plugin
without the kernel, with another signature or with another convention costs speed, not truth.
The names and argument conventions of the npu kernels are those of PaddleCustomDevice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.incubate.nn import functional as fused_functional

from backends.paddle import _state, ops

_log = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
"""How far a fused kernel may stand from the portable form, of the largest entry.

float32 leaves room for the reduced-precision products that accelerators use by default.
"""


def choose(kind: str, dtype: str) -> dict[str, Callable[..., Any]]:
    """The fused kernels that work on this kind of device, the device being in force already."""
    chosen = {}
    for name, kernel in KERNELS.get(kind, {}).items():
        try:
            error = _distance(name, kernel, dtype)
        except Exception as failure:  # a kernel that is not there fails in as many ways as it likes
            reason = (str(failure).strip() or repr(failure)).splitlines()[-1]
            _log.info("no fused %s on %s in %s: %s", name, kind, dtype, reason)
            continue
        if error <= TOLERANCE[dtype]:
            chosen[name] = kernel
        else:
            _log.warning(
                "fused %s on %s in %s is wrong by %.1e: not used", name, kind, dtype, error
            )
    return chosen


# --- kernels ---------------------------------------------------------------------------------
# Arguments are those of the op, resolved; None means: not for this shape or dtype.


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.swiglu(gate, up)


def _rms_norm_gpu(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, list(weight_D.shape), weight_D, eps)[0]


def _rms_norm_npu(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _custom_op("rms_norm_npu", x, weight_D, eps)[0]


def _rotary_gpu(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    x, cos, sin = _one_row(x_BSHD, cos_BSD, sin_BSD)
    # Paddle calls neox the interleaved form; the half-split form is the other one.
    turned = fused_functional.fused_rotary_position_embedding(
        x, sin=sin, cos=cos, use_neox_rotary_style=False
    )[0]
    return turned.reshape(x_BSHD.shape)


def _rotary_npu(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor | None:
    if x_BSHD.shape[-1] % 64:
        return None
    x, cos, sin = _one_row(x_BSHD, cos_BSD, sin_BSD)
    return _custom_op("fused_rope", x, cos, sin)[0].reshape(x_BSHD.shape)


def _one_row(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels take one table for all rows of a batch, so the batch becomes one long row."""
    B, S, H, D = x_BSHD.shape
    tables = (table.reshape([1, B * S, 1, D]) for table in (cos_BSD, sin_BSD))
    return x_BSHD.reshape([1, B * S, H, D]), *tables


def _attention_gpu(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    scale: float,
    causal: bool,
    mask_BST: Tensor | None,
) -> Tensor:
    """Paddle chooses: flash attention in half precision, else memory-efficient, else plain."""
    mask_B1ST = None if mask_BST is None else _per_row(mask_BST, q_BSHD).unsqueeze(1)
    q_BSHD = _scaled_for_kernel(q_BSHD, scale)
    return F.scaled_dot_product_attention(
        q_BSHD, k_BTKD, v_BTKD, attn_mask=mask_B1ST, is_causal=causal
    )


def _attention_npu(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    scale: float,
    causal: bool,
    mask_BST: Tensor | None,
) -> Tensor | None:
    if q_BSHD.dtype not in (paddle.float16, paddle.bfloat16):
        return None
    # For this kernel True is what is hidden.
    hidden = None if mask_BST is None else ~_per_row(mask_BST, q_BSHD).unsqueeze(1)
    no_seed, no_dropout, no_softmax, for_training, any_mask = None, 0.0, False, False, False
    return _custom_op(
        "flash_attention_npu",
        _scaled_for_kernel(q_BSHD, scale),
        k_BTKD,
        v_BTKD,
        no_seed,
        hidden,
        no_dropout,
        causal,
        no_softmax,
        for_training,
        any_mask,
    )[0]


def _per_row(mask_BST: Tensor, q_BSHD: Tensor) -> Tensor:
    return paddle.broadcast_to(mask_BST, [q_BSHD.shape[0], *mask_BST.shape[1:]])


def _scaled_for_kernel(q_BSHD: Tensor, scale: float) -> Tensor:
    """The kernels multiply by 1 / sqrt(D) themselves: what is left for us to do."""
    rest = scale * math.sqrt(q_BSHD.shape[-1])
    return q_BSHD if math.isclose(rest, 1.0) else q_BSHD * rest


def _custom_op(name: str, *args: Any) -> list[Tensor]:
    """An operator that a device plugin has registered."""
    return paddle.base.core.eager._run_custom_op(name, *args)


KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "gpu": {
        "swiglu": _swiglu,
        "rms_norm": _rms_norm_gpu,
        "rotary": _rotary_gpu,
        "attention": _attention_gpu,
    },
    "npu": {
        "swiglu": _swiglu,
        "rms_norm": _rms_norm_npu,
        "rotary": _rotary_npu,
        "attention": _attention_npu,
    },
}
"""Kind of device -> op -> fused kernel. Only what is named here is ever tried: a kernel that is
registered for the wrong processor (fused_rms_norm on a cpu without AVX-512) kills the process.
On cpu nothing is: of its two fused kernels the other, swiglu, is slower than silu and a product."""


# --- the check -------------------------------------------------------------------------------


def _distance(name: str, kernel: Callable[..., Any], dtype: str) -> float:
    """Largest deviation of values and gradients from the portable form, of the largest entry."""
    worst = 0.0
    for floats, constants in _examples(name):
        expected, found = (
            _outcome(name, in_force, floats, constants, dtype) for in_force in ({}, {name: kernel})
        )
        for a, b in zip(found, expected, strict=True):
            worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst


def _outcome(
    name: str,
    in_force: dict[str, Callable[..., Any]],
    floats: list[np.ndarray],
    constants: dict[str, Any],
    dtype: str,
) -> list[np.ndarray]:
    """The value of the op, and its gradients by `floats`, with these kernels in force."""
    tensors = [paddle.to_tensor(a).astype(dtype) for a in floats]
    for x in tensors:
        x.stop_gradient = False
    options = {
        key: paddle.to_tensor(value) if isinstance(value, np.ndarray) else value
        for key, value in constants.items()
    }
    before, _state.fused = _state.fused, in_force
    try:
        value = getattr(ops, name)(*tensors, **options)
        gradients = paddle.grad((value * value).sum(), tensors)
    finally:
        _state.fused = before
    return [x.astype("float32").numpy() for x in (value, *gradients)]


def _examples(name: str) -> list[tuple[list[np.ndarray], dict[str, Any]]]:
    """Arguments to try an op with: arrays it is differentiated by, and constants."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    angles_BSD = np.tile(normal(2, 16, 32), 2)
    qkv = [normal(2, 16, 4, 64), normal(2, 16, 2, 64), normal(2, 16, 2, 64)]
    segments_BS = np.repeat([[1, 2, 2, 0], [1, 1, 1, 1]], 4, axis=1)
    lengths_B = np.array([5, 16])
    one_query = [normal(2, 1, 4, 64), *qkv[1:]]
    examples: dict[str, list[tuple[list[np.ndarray], dict[str, Any]]]] = {
        "swiglu": [([normal(6, 64), normal(6, 64)], {})],
        "rms_norm": [([normal(2, 3, 64), normal(64)], {"eps": 1e-5})],
        "rotary": [
            (
                [normal(2, 16, 4, 64)],
                {"cos_BSD": np.cos(angles_BSD), "sin_BSD": np.sin(angles_BSD)},
            )
        ],
        "attention": [
            (qkv, {"scale": 0.125, "causal": True}),
            (qkv, {"scale": 0.2, "causal": False}),
            (qkv, {"scale": 0.125, "causal": True, "segment_ids_BS": segments_BS}),
            (qkv, {"scale": 0.125, "causal": True, "window": 3}),
            (one_query, {"scale": 0.125, "causal": True, "lengths_B": lengths_B}),
        ],
    }
    return examples[name]
