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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from backends.quantised import dequantise

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


def quantised_linear(x: Tensor, codes: Tensor, scale_OG: Tensor, kind: str) -> Tensor:
    """`linear` with a weight in 8 or 4 bits; kinds and storage: `backends/quantised.py`.

    The weight is read back in float32 and cast to the dtype of x, forward and backward anew, so
    that it is never kept. The gradient goes to x alone.
    """
    return linear(x, dequantise(codes, scale_OG, kind))


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


# --- dropout ---------------------------------------------------------------------------------


def dropout(x: Tensor, rows: Tensor, columns_D: Tensor, salt: int, rate: float) -> Tensor:
    """x with a share `rate` of its entries zero, and the others divided by 1 - rate.

    Which ones follows from the arguments alone, the same everywhere: `row * salt * column` in
    wrapping int32 arithmetic is below the share `rate` of all int32 numbers (multiply-shift
    hashing). rows [x.shape[:-1]] and columns are random odd int32 numbers (as int64), `salt` an
    odd int32 that tells layers apart.
    """
    with np.errstate(over="ignore"):
        row = rows.astype(np.int32) * np.int32(salt)
        number = row[..., None] * columns_D.astype(np.int32)
    return np.where(number >= dropout_limit(rate), x / (1 - rate), 0)


def dropout_limit(rate: float) -> int:
    """The int32 number that the share `rate` of all is below. Not an op."""
    return round(rate * 2**32) - 2**31


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


def set_trained(module: Any, names: Collection[str]) -> None:
    """Train exactly these parameters: they become float32, with gradients; all others none.

    Called between `build` and `assign`; parameters keep their dtype when assigned. Layers cast a
    parameter to the type of what they multiply it with, so computing in bfloat16 with float32
    parameters is mixed precision with nothing hidden.
    """
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


def device_name() -> str:
    """What the maker calls the device in force: "NVIDIA A100-SXM4-80GB", "Ascend910B3"."""
    raise NotImplementedError


def device_memory() -> int | None:
    """Bytes the device has in all (on cpu: that processes can still take); None: not known."""
    raise NotImplementedError


# --- training (signatures only; `backends/<name>/training.py`) --------------------------------


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a decay."""

    name: str
    parameters: tuple[str, ...]
    """Canonical names."""
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdamW:
    """Settings of the optimizer (Loshchilov and Hutter, arXiv 1711.05101); all written out.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  at step t, counted from 1:
    p = p - lr * decay * p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None
    """Gradients of all groups together are scaled down to this Euclidean norm (torch's
    clip_grad_norm_: factor clip / (norm + 1e-6), at most 1); None: not clipped."""


@dataclass(frozen=True)
class Norms:
    """What an update did."""

    total: float
    """Global norm of the gradients (true size: without the loss scale) before clipping, over all
    groups and ranks; inf or nan if a gradient is not finite."""
    groups: dict[str, float]
    skipped: bool = False
    """A gradient is not finite, so nothing was changed but the loss scale."""


LOSS_SCALE_PATIENCE = 2000


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16 compute (arXiv 1710.03740), the rule of torch's GradScaler.

    The backward pass starts from `scale * value` times `size`; the gradients are divided by it
    in float32 before they are measured, clipped and used. Only with float16 compute: with
    float32 and bfloat16 there is none, and a gradient that is not finite is skipped all the same.
    """

    size: float = 2.0**16
    good: int = 0
    """Updates since the size last changed, none of them skipped."""

    def after(self, skipped: bool) -> LossScale:
        """What the next update uses: half after a skipped one (at least 1), double after
        LOSS_SCALE_PATIENCE good ones in a row."""
        if skipped:
            return LossScale(max(1.0, self.size / 2))
        if self.good + 1 == LOSS_SCALE_PATIENCE:
            return LossScale(self.size * 2)
        return LossScale(self.size, self.good + 1)


PREFERS_COMPILED = False
"""Whether an engine should be asked for compiled where nobody says otherwise."""


class Engine:
    """Trains a module: gradients, their exchange between ranks, clipping, AdamW.

    The module's `forward` takes positional tensors (None where there is nothing) and returns a
    float32 scalar, the sum of what is to be minimised over its batch. Trained parameters are
    float32, whatever the compute dtype (`runtime.set_trained`); the moments are, too.

    Gradients are summed over micro-batches and over ranks, never averaged: who wants a mean over
    the global batch passes its denominator in `scale`, and gets the same result with any number
    of ranks and micro-batches.

    The groups together name every trained parameter exactly once. All of them take part in every
    update: where no loss depends on one, its gradient is zero (its moments fade, it decays), on
    every framework and with any number of ranks.

    Engines that shard need every rank to call `accumulate` equally often, and with the same
    inputs being None (a batch without pictures carries a spare tile): each call is collective.
    """

    def __init__(
        self,
        module: Any,
        groups: Sequence[Group],
        settings: AdamW,
        *,
        strategy: str = "single",
        compiled: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`strategy`: one of the backend's STRATEGIES (single; ddp, fsdp, zero2, zero3; …).

        `options` go to the native engine (a DeepSpeed configuration, …). Every rank constructs
        its engine at the same time. Raises BackendError for an unknown strategy, naming those
        that this backend has, if the world has another size than the strategy can take, or if
        the groups are not a partition of the trained parameters.
        """
        raise NotImplementedError

    def accumulate(
        self, inputs: Sequence[np.ndarray | None], scale: float, last: bool = False
    ) -> float:
        """Forward and backward of one micro-batch; returns `scale` times the module's value.

        The value is this rank's, not the sum over ranks. Inputs are converted as by
        `runtime.tensor`, except float64 arrays, which stay float32 whatever the compute dtype
        (rotary tables, loss weights).

        `last` promises that `update` comes next, so that an engine can exchange gradients while
        the backward pass still runs; it changes no result, and an engine may ignore it. Without
        it `update` exchanges what is not yet exchanged.
        """
        raise NotImplementedError

    def update(self, rates: Mapping[str, float]) -> Norms:
        """Exchange and clip the accumulated gradients, take one AdamW step, clear gradients.

        `rates`: learning rate of each group. Collective: every rank calls it.
        """
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Updates taken so far, the t of AdamW (skipped ones do not count)."""
        raise NotImplementedError

    @property
    def loss_scale(self) -> LossScale | None:
        """What the next `accumulate` uses; None unless computing in float16."""
        raise NotImplementedError

    def state(self) -> Iterator[tuple[str, str, np.ndarray | None]]:
        """(canonical name, `parameter` | `exp_avg` | `exp_avg_sq`, array) of all trained ones.

        float32, canonical orientation, whole tensors. Collective: every rank iterates, in the same
        order; a tensor comes as an array on exactly one rank (its owner, spread evenly over the
        ranks) and as None on the others. At most one tensor is gathered at a time. An array may
        be a view of what the engine goes on to change: copy it to keep it past the next update.
        """
        raise NotImplementedError

    def restore(
        self,
        steps: int,
        read: Callable[[str, str], np.ndarray],
        loss_scale: LossScale | None = None,
    ) -> None:
        """Set all that `state` gives, `steps` and the loss scale (None: as at the start).

        `read(name, kind)` returns whole tensors. Collective; each rank reads what it needs (a
        slice may be taken at once).
        """
        raise NotImplementedError


def world() -> tuple[int, int]:
    """(rank, size) of this process, as its launcher says; (0, 1) without one.

    `backends/<name>/parallel.py`, as the three below.
    """
    raise NotImplementedError


def start(strategy: str, timeout: float = 1800.0) -> None:
    """Join the group of processes, before anything is built; nothing to do for `single`.

    The process takes the device of its local rank. `timeout`: seconds that an exchange waits for
    the other ranks before it fails, where the framework lets one say so.

    Raises BackendError for an unknown strategy, or `single` with several processes.
    """
    raise NotImplementedError


def sum_over_ranks(array: np.ndarray) -> np.ndarray:
    """The element-wise sum of an int64 or float64 array over all ranks, exact for integers."""
    raise NotImplementedError


def barrier() -> None:
    """Wait until every rank is here."""
    raise NotImplementedError


def stop() -> None:
    """Leave the group of processes."""
    raise NotImplementedError


OPS = (
    "reshape transpose concat broadcast_to cast zeros take_rows reduce_sum reduce_mean reduce_max "
    "argmax where matmul linear quantised_linear softmax gelu quick_gelu silu relu swiglu dropout "
    "layer_norm rms_norm rotary attention cache_update patch_embed cross_entropy "
    "linear_cross_entropy stop_gradient"
).split()
LAYERS = "Linear Embedding LayerNorm RMSNorm PatchEmbed".split()
STRUCTURE = "Module ModuleList parameter".split()
"""Module: the framework's base class, whose subclasses define `forward`. ModuleList: its list
of modules. `parameter(shape, dtype=None)`: a bare parameter to assign to an attribute of a Module;
int8 and uint8 are frozen, float32 stays so, None is the dtype in force."""
RUNTIME = (
    "versions devices supported_dtypes setup current seed tensor tensor32 numpy build "
    "parameter_shapes assign fetch no_grad value_and_grad grad_of set_trained recompute watch "
    "compile synchronize peak_memory device_name device_memory"
).split()
