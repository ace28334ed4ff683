"""The specification of a backend: every op and layer, with its meaning in NumPy.

`backends/<name>/ops.py` holds exactly the functions of OPS with these signatures, `nn.py` the
classes of LAYERS, `runtime.py` the functions of RUNTIME. The bodies here are the reference that
the contract tests compare with, forward and (by finite differences) gradient, so they are
written to be read, not to be fast.

Shape letters: B batch rows, S query positions, T key positions, H heads, K key/value heads,
D size of the last axis (model width or head size), O output and I input features,
N rows of a table, V vocabulary, P patch side, G patches.

Dtype rule unless an op says otherwise: the result has the dtype of the first tensor argument.
Reductions of a normalisation, a softmax and a loss are computed in float32 at least.

Models also use, on native tensors, `+ - * /` with tensors of the same dtype or Python numbers,
basic slicing (`x[:, 1:]`, `x[..., None]`), and `.shape` (read with `tuple(x.shape)`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

Tensor = Any
"""A native tensor of the chosen framework; here np.ndarray."""
Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]

# --- shape -----------------------------------------------------------------------------------


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` with another shape, in row-major order; one entry may be -1."""
    return np.reshape(x, shape)


def transpose(x: Tensor, axes: Sequence[int]) -> Tensor:
    """`x` with its axes permuted: axis n of the result is axis `axes[n]` of `x`."""
    return np.transpose(x, axes)


def concat(xs: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors of one dtype joined along `axis`."""
    return np.concatenate(xs, axis)


def broadcast_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` repeated to `shape` by NumPy's rules."""
    return np.broadcast_to(x, shape)


def cast(x: Tensor, dtype: Dtype | Any) -> Tensor:
    """`x` in another dtype, named or as another tensor's `.dtype`."""
    return x.astype(dtype)


def zeros(shape: Sequence[int], dtype: Dtype | Any) -> Tensor:
    """Zeros on the current device; dtype named or as another tensor's `.dtype`."""
    return np.zeros(shape, dtype)


# --- rows and reductions ---------------------------------------------------------------------


def take_rows(table_ND: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, [*index.shape, D]. Indices are int64, in [0, N); gradients accumulate."""
    return table_ND[index]


def reduce_sum(x: Tensor, axis: int | Sequence[int], keepdims: bool = False) -> Tensor:
    """Sum over `axis`."""
    return np.sum(x, axis=_axes(axis), keepdims=keepdims)


def reduce_mean(x: Tensor, axis: int | Sequence[int], keepdims: bool = False) -> Tensor:
    """Mean over `axis`."""
    return np.mean(x, axis=_axes(axis), keepdims=keepdims)


def reduce_max(x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
    """Maximum over one axis."""
    return np.max(x, axis=axis, keepdims=keepdims)


def argmax(x: Tensor, axis: int) -> Tensor:
    """Index (int64) of the maximum over `axis`; no gradient."""
    return np.argmax(x, axis=axis).astype(np.int64)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where the bool `condition` holds, else `b`; all broadcast."""
    return np.where(condition, a, b)


# --- linear algebra and activations ----------------------------------------------------------


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product over the last two axes, the others broadcast."""
    return np.matmul(a, b)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` over the last axis."""
    y = np.matmul(x, weight_OI.T)
    return y if bias_O is None else y + bias_O


def softmax(x: Tensor, axis: int) -> Tensor:
    """Softmax over `axis`, computed in float32 at least, in the dtype of `x`."""
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


def gelu(x: Tensor, approximate: bool) -> Tensor:
    """GELU (arXiv 1606.08415): the exact erf form, or the tanh form when `approximate`."""
    if approximate:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    return x / (1 + np.exp(-1.702 * x))


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`."""
    return x / (1 + np.exp(-x))


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`."""
    return np.maximum(x, 0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (arXiv 2002.05202), fused where the framework can."""
    return silu(gate) * up


# --- normalisation ---------------------------------------------------------------------------


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis with the biased variance."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight_D + bias_D


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467): normalise in float32, cast to x's dtype, then times weight."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight_D


# --- transformer ops -------------------------------------------------------------------------


def rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotary embedding, half-split form: `x * cos + concat(-x2, x1) * sin`.

    x1, x2 are the halves of the last axis. cos and sin are float32 and hold each frequency
    twice (`concat(f, f)`). Computed in the dtype of x, as LLaMA does.
    """
    half = x_BSHD.shape[-1] // 2
    turned = np.concatenate([-x_BSHD[..., half:], x_BSHD[..., :half]], -1)
    return x_BSHD * cos_BSD[:, :, None] + turned * sin_BSD[:, :, None]


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
    """softmax(q k^T * scale) v, with grouped heads; [B, S, H, D].

    Query head h reads key/value head h // (H // K). Softmax in float32.

    * Without `lengths_B`, query s stands at position s, and S == T when `causal`.
    * With `lengths_B` (int64, S <= lengths <= T) only the first lengths_b keys of row b exist,
      and the S queries are the last S of them: query s stands at lengths_b - S + s. This is
      decoding with a static cache.
    * `causal`: a query at position p sees keys at positions <= p.
    * `window` (with causal): and of these only the last `window`, itself included.
    * `segment_ids_BS` (int64, S == T, not with lengths): a query sees only keys of its own
      segment. Padding is segment 0 and sees itself, so that no row is empty.
    """
    B, S, H, D = q_BSHD.shape
    T, K = k_BTKD.shape[1:3]
    k_BTHD, v_BTHD = (np.repeat(x, H // K, axis=2) for x in (k_BTKD, v_BTKD))
    scores_BHST = np.einsum("bshd,bthd->bhst", q_BSHD, k_BTHD) * scale
    visible_BST = attention_mask(B, S, T, causal, lengths_B, segment_ids_BS, window)
    scores_BHST = np.where(visible_BST[:, None], scores_BHST, -np.inf)
    return np.einsum("bhst,bthd->bshd", softmax(scores_BHST, -1), v_BTHD)


def cache_update(cache_BTKD: Tensor, new_BSKD: Tensor, start_B: Tensor) -> Tensor:
    """The cache with `new` written at positions start_b … start_b + S - 1 of each row b.

    May change the cache in place: use only the returned tensor afterwards. No gradient.
    start is int64 with start + S <= T.
    """
    cache_BTKD = cache_BTKD.copy()
    for b, start in enumerate(start_B):
        cache_BTKD[b, start : start + new_BSKD.shape[1]] = new_BSKD[b]
    return cache_BTKD


def patch_embed(x_B3HW: Tensor, weight_OIPP: Tensor, bias_O: Tensor | None) -> Tensor:
    """Convolution with stride = kernel = P, flattened row-major to [B, G, O].

    Edges that do not fill a patch are dropped, as a strided convolution does.
    """
    B, C, height, width = x_B3HW.shape
    O, _, P, _ = weight_OIPP.shape
    rows, cols = height // P, width // P
    x = x_B3HW[:, :, : rows * P, : cols * P].reshape(B, C, rows, P, cols, P)
    x_BGI = x.transpose(0, 2, 4, 1, 3, 5).reshape(B, rows * cols, C * P * P)
    return linear(x_BGI, weight_OIPP.reshape(O, -1), bias_O)


# --- losses ----------------------------------------------------------------------------------


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Loss of each row in float32, [N]: logsumexp(logits) - logits[target]. No reduction."""
    top_N = logits_NV.max(-1)
    total_N = top_N + np.log(np.exp(logits_NV - top_N[:, None]).sum(-1))
    return total_N - logits_NV[np.arange(len(targets_N)), targets_N]


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of `cross_entropy(linear(hidden, weight), targets)`, float32 scalar.

    Never holds all [N, V] logits: works in chunks of rows, in the backward pass too. A target
    of -100 adds nothing (padding of N to a bucket).
    """
    kept = targets_N != -100
    return cross_entropy(linear(hidden_ND[kept], weight_VD), targets_N[kept]).sum()


# --- gradients -------------------------------------------------------------------------------


def stop_gradient(x: Tensor) -> Tensor:
    """`x`, through which no gradient flows."""
    return x


def attention_mask(
    B: int,
    S: int,
    T: int,
    causal: bool,
    lengths_B: np.ndarray | None = None,
    segment_ids_BS: np.ndarray | None = None,
    window: int | None = None,
) -> np.ndarray:
    """Which keys a query sees, bool [B, S, T]: the rule of `attention`, in NumPy. Not an op."""
    key_BST = np.broadcast_to(np.arange(T), (B, S, T))
    query_BS = np.broadcast_to(np.arange(S), (B, S))
    visible_BST = np.ones((B, S, T), bool)
    if lengths_B is not None:
        query_BS = query_BS + (lengths_B - S)[:, None]
        visible_BST = visible_BST & (key_BST < lengths_B[:, None, None])
    if causal:
        visible_BST = visible_BST & (key_BST <= query_BS[:, :, None])
    if window is not None:
        visible_BST = visible_BST & (key_BST > query_BS[:, :, None] - window)
    if segment_ids_BS is not None:
        visible_BST = visible_BST & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None])
    return visible_BST


def _axes(axis: int | Sequence[int]) -> int | tuple[int, ...]:
    return axis if isinstance(axis, int) else tuple(axis)


# --- layers ----------------------------------------------------------------------------------
# Each is a real layer of its framework. The constructor's arguments and the parameters
# (canonical names and torch-oriented shapes) are the contract; `__call__` is its meaning.
# Parameters are created without costly initialisation: checkpoints or recipes fill them.


class Linear:
    """`y = x W^T + b`. Parameters weight [O, I], bias [O] (absent without `bias`).

    Paddle stores the weight as [I, O]; its runtime turns it on the way in and out, and
    `matrix()` gives [O, I] on every backend (for `linear_cross_entropy`).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        self.parameters = {"weight": (out_features, in_features)}
        if bias:
            self.parameters["bias"] = (out_features,)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)


class Embedding:
    """Rows of a table by id. Parameter weight [V, D], readable as `.weight`."""

    def __init__(self, rows: int, size: int) -> None:
        self.parameters = {"weight": (rows, size)}

    def __call__(self, ids: Tensor, weight: Tensor) -> Tensor:
        return take_rows(weight, ids)


class LayerNorm:
    """`ops.layer_norm` with parameters weight [D], bias [D]."""

    def __init__(self, size: int, eps: float) -> None:
        self.eps, self.parameters = eps, {"weight": (size,), "bias": (size,)}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias, self.eps)


class RMSNorm:
    """`ops.rms_norm` with parameter weight [D]."""

    def __init__(self, size: int, eps: float) -> None:
        self.eps, self.parameters = eps, {"weight": (size,)}

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.eps)


class PatchEmbed:
    """`ops.patch_embed` with parameters weight [O, I, P, P] and bias [O] (if `bias`)."""

    def __init__(self, in_channels: int, out_features: int, patch: int, bias: bool) -> None:
        self.parameters = {"weight": (out_features, in_channels, patch, patch)}
        if bias:
            self.parameters["bias"] = (out_features,)

    def __call__(self, x_B3HW: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return patch_embed(x_B3HW, weight, bias)


# --- runtime (signatures only: these talk to a device) ---------------------------------------


def versions() -> dict[str, str]:
    """Package name -> version of what this backend runs on."""
    raise NotImplementedError


def devices() -> list[str]:
    """Names of the devices this machine has for this backend, best first: `["cuda:0", "cpu"]`."""
    raise NotImplementedError


def supported_dtypes(device: str) -> list[Dtype]:
    """Floating dtypes a model can run in on this device, best first for inference."""
    raise NotImplementedError


def setup(device: str, dtype: Dtype, kernels: Literal["auto", "portable"] = "auto") -> None:
    """Make `device` the place and `dtype` the type of everything built afterwards.

    `kernels`: `auto` takes fused kernels where device, dtype and shape allow, `portable` never.

    Raises BackendError if the device does not exist here or does not support the dtype, naming
    those that would do.
    """
    raise NotImplementedError


def current() -> tuple[str, Dtype]:
    """The device and dtype in force."""
    raise NotImplementedError


def seed(value: int) -> None:
    """Seed the framework's random state (initialisation, dropout)."""
    raise NotImplementedError


def tensor(array: np.ndarray) -> Tensor:
    """The array on the device: floats in the dtype in force, integers int64, bool bool."""
    raise NotImplementedError


def tensor32(array: np.ndarray) -> Tensor:
    """The array on the device as float32, whatever the dtype in force (rotary tables)."""
    raise NotImplementedError


def numpy(x: Tensor) -> np.ndarray:
    """A tensor as NumPy; float16 and bfloat16 come as float32. Waits for the device."""
    raise NotImplementedError


def build(factory: Callable[[], Any]) -> Any:
    """`factory()` with its parameters in the dtype in force, not initialised (torch: on meta).

    In evaluation mode. Every parameter must be given a value by `assign` before use.
    """
    raise NotImplementedError


def parameter_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Canonical name -> canonical (torch-oriented) shape of every parameter."""
    raise NotImplementedError


def assign(module: Any, name: str, array: np.ndarray, bfloat16: bool = False) -> None:
    """Give one parameter its value, in canonical orientation, cast to the dtype in force.

    With `bfloat16` the array is uint16 holding bfloat16 bits. Holds at most this one tensor
    twice.
    """
    raise NotImplementedError


def fetch(module: Any, name: str) -> np.ndarray:
    """One parameter in canonical orientation; float16 and bfloat16 as float32."""
    raise NotImplementedError


def no_grad() -> Any:
    """A context manager in which no gradients are recorded."""
    raise NotImplementedError


def value_and_grad(
    function: Callable[..., Tensor], module: Any
) -> Callable[..., tuple[float, dict[str, np.ndarray]]]:
    """A function that takes `function`'s tensors and returns its scalar and every gradient.

    Gradients are NumPy float32 by canonical name, canonical orientation; a parameter that the
    scalar does not depend on is given as zeros.
    """
    raise NotImplementedError


def grad_of(function: Callable[..., Tensor], *args: Tensor) -> list[np.ndarray]:
    """Gradients of a scalar function with respect to each float tensor argument (for tests)."""
    raise NotImplementedError


def recompute(layer: Any) -> None:
    """From now on the layer keeps no activations: the backward pass runs it again."""
    raise NotImplementedError


def watch(module: Any, callback: Callable[[str, Tensor], None]) -> Callable[[], None]:
    """Call back with (module name, output) after every sub-module call whose output is a tensor.

    Returns the function that removes the hooks. Eager mode only.
    """
    raise NotImplementedError


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """The framework's compiler on a function of tensors (static shapes): same results."""
    raise NotImplementedError


def synchronize() -> None:
    """Wait until the device has done everything asked of it."""
    raise NotImplementedError


def peak_memory() -> int:
    """Most bytes the device (on cpu: this process) has held so far."""
    raise NotImplementedError


OPS = (
    "reshape transpose concat broadcast_to cast zeros take_rows reduce_sum reduce_mean reduce_max "
    "argmax where matmul linear softmax gelu quick_gelu silu relu swiglu layer_norm rms_norm "
    "rotary attention cache_update patch_embed cross_entropy linear_cross_entropy stop_gradient"
).split()
LAYERS = "Linear Embedding LayerNorm RMSNorm PatchEmbed".split()
STRUCTURE = "Module ModuleList parameter".split()
"""Module: the framework's base class, whose subclasses define `forward`. ModuleList: its list
of modules. `parameter(shape)`: a bare parameter to assign to an attribute of a Module."""
RUNTIME = (
    "versions devices supported_dtypes setup current seed tensor tensor32 numpy build "
    "parameter_shapes assign fetch no_grad value_and_grad grad_of recompute watch compile "
    "synchronize peak_memory"
).split()
