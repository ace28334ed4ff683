"""The Ascend path, as far as it can be tried without an Ascend.

* Values: the functions that Ascend alone has are replaced by what their documentation says they
  compute, in NumPy, with the documented limits as assertions. Then the contract must hold.
* Types: MindSpore infers the shape and dtype of the real functions on any device. A graph whose
  result is only a shape runs none of them.
"""

from __future__ import annotations

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from backends import contract
from backends.mindspore import ascend, nn, ops
from unillava.models.llava import Llava
from unillava.rope import rotary_tables
from unillava.spec import LlavaSpec, ProjectorSpec, TextSpec, VisionSpec

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# --- the documented functions in NumPy -------------------------------------------------------


def softmax_attention(q_BSHD, k_BTKD, v_BTKD, scale, hidden):
    """`hidden` is broadcastable to [B, H, S, T]; True is discarded."""
    B, S, H, _ = q_BSHD.shape
    T, K = k_BTKD.shape[1:3]
    k_BTHD, v_BTHD = (np.repeat(x, H // K, axis=2) for x in (k_BTKD, v_BTKD))
    scores = np.einsum("bshd,bthd->bhst", q_BSHD, k_BTHD) * scale
    scores = np.where(np.broadcast_to(hidden, (B, H, S, T)), -np.inf, scores)
    return np.einsum("bhst,bthd->bshd", contract.softmax(scores, -1), v_BTHD)


def flash_attention_score(
    query, key, value, head_num, attn_mask=None, scalar_value=1.0, input_layout="BSH",
    sparse_mode=0,
):  # fmt: skip
    assert input_layout == "BSND"
    B, S, H, D = query.shape
    T, K = key.shape[1:3]
    assert head_num == H and H % K == 0 and D % 16 == 0 and key.shape == value.shape
    hidden = np.zeros((S, T), bool)
    if sparse_mode == 2:  # causal from the upper left, the mask compressed
        assert S == T and attn_mask.shape == (2048, 2048)
        mask = attn_mask.asnumpy().astype(bool)
        np.testing.assert_array_equal(mask, np.triu(np.ones_like(mask), 1))
        hidden = np.triu(np.ones((S, T), bool), 1)
    else:
        assert sparse_mode == 0
        if attn_mask is not None:
            assert attn_mask.shape in ((B, H, S, T), (B, 1, S, T), (S, T))
            assert attn_mask.dtype in (ms.bool_, ms.uint8)
            hidden = attn_mask.asnumpy().astype(bool)
    arrays = (x.asnumpy() for x in (query, key, value))
    return ms.Tensor(softmax_attention(*arrays, scalar_value, hidden).astype(np.float32))


def incre_flash_attention(
    query, key, value, attn_mask=None, num_heads=1, input_layout="BSH", scale_value=1.0,
    num_key_value_heads=0,
):  # fmt: skip
    assert input_layout == "BSH" and isinstance(key, list) and isinstance(value, list)
    (key,), (value,) = key, value
    B, one, width = query.shape
    T = key.shape[1]
    size, K = width // num_heads, num_key_value_heads or num_heads
    assert one == 1 and key.shape == value.shape == (B, T, K * size) and num_heads % K == 0
    hidden = np.zeros((B, 1, T), bool)
    if attn_mask is not None:
        assert attn_mask.shape == (B, 1, T) and attn_mask.dtype == ms.bool_
        hidden = attn_mask.asnumpy()
    q = query.asnumpy().reshape(B, 1, num_heads, size)
    k, v = (x.asnumpy().reshape(B, T, K, size) for x in (key, value))
    out = softmax_attention(q, k, v, scale_value, hidden[:, None])
    return ms.Tensor(out.reshape(B, 1, width).astype(np.float32))


def rotary_position_embedding(x, cos, sin, mode=0):
    assert mode == 0 and x.ndim == 4 and cos.shape == sin.shape and x.dtype == cos.dtype
    B, S, H, D = x.shape
    assert cos.shape in ((1, S, 1, D), (B, S, 1, D), (B, S, H, D)) and D < 896 and D % 2 == 0
    tables = (t.asnumpy()[:, :, 0] for t in (cos, sin))
    return ms.Tensor(contract.rotary(x.asnumpy(), *tables))


def rms_norm(x, gamma, epsilon=1e-6):
    assert x.dtype == gamma.dtype
    return ms.Tensor(contract.rms_norm(x.asnumpy(), gamma.asnumpy(), epsilon)), None


def layer_norm(x, normalized_shape, weight, bias, eps=1e-5):
    assert tuple(normalized_shape) == x.shape[-1:]
    return ms.Tensor(contract.layer_norm(x.asnumpy(), weight.asnumpy(), bias.asnumpy(), eps))


def embedding(index, weight):
    return ms.Tensor(weight.asnumpy()[index.asnumpy()])


DOCUMENTED = {
    f.__name__: f
    for f in (
        flash_attention_score, incre_flash_attention, rotary_position_embedding, rms_norm,
        layer_norm, embedding,
    )
}  # fmt: skip


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(ops, "FUSED", True)


@pytest.fixture
def documented(monkeypatch, fused):
    """The Ascend path over the functions above, in float32 so that errors are seen."""
    real = {name: getattr(ms.ops, name) for name in dir(ms.ops)}
    monkeypatch.setattr(ascend, "F", SimpleNamespace(**(real | DOCUMENTED)))
    monkeypatch.setattr(ascend, "FLASH_DTYPES", (ms.float32,))


SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
QKV = (normal(2, 6, 4, 16), normal(2, 6, 2, 16), normal(2, 6, 2, 16))
CACHE = (normal(3, 9, 2, 16), normal(3, 9, 2, 16))
THREE, ONE = normal(3, 3, 4, 16), normal(3, 1, 4, 16)
LENGTHS = {"lengths_B": np.array([3, 5, 9])}
CASES = [
    ("attention", QKV, {"scale": 0.3, "causal": True}),
    ("attention", QKV, {"scale": 0.3, "causal": False}),
    ("attention", QKV, {"scale": 0.3, "causal": True, "window": 3}),
    ("attention", QKV, {"scale": 0.3, "causal": True, "window": 99}),
    ("attention", QKV, {"scale": 0.3, "causal": True, "segment_ids_BS": SEGMENTS}),
    ("attention", QKV, {"scale": 0.3, "causal": False, "segment_ids_BS": SEGMENTS}),
    ("attention", (THREE, *CACHE), {"scale": 0.4, "causal": True, **LENGTHS}),
    ("attention", (THREE, *CACHE), {"scale": 0.4, "causal": False, **LENGTHS}),
    ("attention", (ONE, *CACHE), {"scale": 0.4, "causal": True, **LENGTHS}),
    ("attention", (ONE, *CACHE), {"scale": 0.4, "causal": True, "window": 2, **LENGTHS}),
    ("attention", (ONE, *CACHE), {"scale": 0.4, "causal": False}),
    ("rotary", (normal(2, 5, 3, 8), normal(2, 5, 8), normal(2, 5, 8)), {}),
    ("rotary", (normal(2, 1, 3, 8), normal(2, 1, 8), normal(2, 1, 8)), {}),
    ("rms_norm", (normal(2, 3, 16), normal(16)), {"eps": 1e-5}),
    ("layer_norm", (normal(2, 3, 16), normal(16), normal(16)), {"eps": 1e-6}),
    ("take_rows", (normal(5, 3), np.array([[0, 4], [4, 4]])), {}),
    ("linear", (normal(2, 3, 4), normal(5, 4), normal(5)), {}),
    ("cache_update", (normal(3, 9, 2, 4), normal(3, 1, 2, 4), np.array([0, 3, 8])), {}),
    ("cache_update", (normal(3, 9, 2, 4), normal(3, 4, 2, 4), np.array([0, 3, 5])), {}),
    ("patch_embed", (normal(2, 3, 8, 12), normal(5, 3, 4, 4), normal(5)), {}),
]


def case_id(case):
    return f"{case[0]}-{'x'.join(map(str, case[1][0].shape))}-{','.join(case[2])}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_by_the_documentation(case, documented, runtime):
    name, args, options = case
    expected = getattr(contract, name)(*args, **options)
    native = {k: runtime.tensor(v) if hasattr(v, "shape") else v for k, v in options.items()}
    found = runtime.numpy(getattr(ops, name)(*map(runtime.tensor, args), **native))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_flash_attention_only_where_it_fits():
    assert ascend.has_attention(ms.ops.zeros((1, 2, 3, 64), ms.float16))
    assert ascend.has_attention(ms.ops.zeros((1, 2, 3, 64), ms.bfloat16))
    assert not ascend.has_attention(ms.ops.zeros((1, 2, 3, 72), ms.float16))
    assert not ascend.has_attention(ms.ops.zeros((1, 2, 3, 64), ms.float32))


# --- types, by MindSpore's own inference -----------------------------------------------------

SPEC = LlavaSpec(
    family="llava_next",
    vision=VisionSpec("clip", 32, 40, 2, 2, 12, 4, "quick_gelu", 1e-5),
    text=TextSpec("llama", 71, 64, 48, 2, 4, 2, 16, "silu", 1e-5, 256),
    projector=ProjectorSpec(2, 32, 64),
    has_newline=True,
)


def zeros(*shape, dtype="int64"):
    return ops.zeros(shape, dtype)


@pytest.fixture(params=["float16", "bfloat16"])
def network(request, fused, runtime, monkeypatch):
    """The model in a dtype of Ascend; the CPU holds its parameters and never runs it."""
    monkeypatch.setattr(nn, "DTYPE", ops.DTYPES[request.param])
    monkeypatch.setitem(runtime._STATE, "dtype", request.param)
    network = runtime.build(lambda: Llava(SPEC))
    for name, shape in runtime.parameter_shapes(network).items():
        runtime.assign(network, name, np.zeros(shape, np.float32))
    return network


def inputs(length):
    cos, sin = (ms.Tensor(t) for t in rotary_tables(SPEC.text, length))
    return zeros(2, length), zeros(2, length), zeros(2, length), cos, sin


def test_types_of_forward_and_gradients(network):
    dtype = nn.DTYPE
    parameters = ms.ParameterTuple(network.get_parameters())
    pixels = zeros(1, 3, 12, 12, dtype=dtype)

    def loss(ids, index, positions, cos, sin, segments, pixels, places, targets):
        hidden = network(ids, index, positions, cos, sin, segments, pixels)
        return network.loss(hidden, places, targets)

    @ms.jit
    def types(*args):
        value, gradients = ms.value_and_grad(loss, None, parameters)(*args)
        shapes = ()
        for gradient in gradients:
            shapes = (*shapes, gradient.shape)
        return value.dtype, shapes

    found = types(*inputs(8), zeros(2, 8), pixels, zeros(5), zeros(5))
    assert found[0] == ms.float32
    assert list(found[1]) == [p.shape for p in parameters]


def test_types_of_prefill_and_decode(network):
    dtype = nn.DTYPE
    caches = tuple(zeros(2, 16, 2, 16, dtype=dtype) for _ in range(4))
    _, _, positions, cos, sin = inputs(16)
    embeds = zeros(2, 8, 64, dtype=dtype)

    @ms.jit
    def prefill(embeds, positions, cos, sin, start, last, caches):
        logits, filled = network.prefill(embeds, positions, cos, sin, start, last, caches)
        return logits.shape, logits.dtype, filled[0].shape, filled[0].dtype

    @ms.jit
    def decode(ids, positions, cos, sin, start, caches):
        logits, filled = network.decode(ids, positions, cos, sin, start, caches, 8, True)
        return logits.shape, logits.dtype, filled[3].shape, filled[3].dtype

    expected = ((2, 71), dtype, (2, 16, 2, 16), dtype)
    caches = ms.mutable(caches)
    assert prefill(embeds, positions[:, :8], cos, sin, zeros(2), zeros(2), caches) == expected
    step = (zeros(2, 1), positions[:, :1], cos, sin, zeros(2))
    assert decode(*step, caches) == expected
