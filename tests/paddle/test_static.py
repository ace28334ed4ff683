"""The Paddle backend compiled by paddle.jit.to_static, against itself run eagerly."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import backends

RUNTIME = backends.select("paddle", device="cpu", dtype="float32")

import paddle  # noqa: E402  (after the backend, which imports it quietly)

from backends import nn, ops  # noqa: E402
from backends.errors import BackendError  # noqa: E402
from backends.paddle import _fused, _state  # noqa: E402
from unillava.models.llava import Llava  # noqa: E402
from unillava.spec import LlavaSpec, ProjectorSpec, TextSpec, VideoSpec, VisionSpec  # noqa: E402

WIDTH, HEADS, KV_HEADS, SIZE, VOCABULARY = 16, 4, 2, 4, 23
TOLERANCE = 1e-5


class Block(nn.Module):
    """A decoder block: RMSNorm, rotary grouped-query attention over a cache or not, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(WIDTH, 1e-5)
        self.q = nn.Linear(WIDTH, HEADS * SIZE, True)
        self.k = nn.Linear(WIDTH, KV_HEADS * SIZE, False)
        self.v = nn.Linear(WIDTH, KV_HEADS * SIZE, False)
        self.o = nn.Linear(HEADS * SIZE, WIDTH, False)
        self.norm2 = nn.RMSNorm(WIDTH, 1e-5)
        self.gate = nn.Linear(WIDTH, 3 * WIDTH, False)
        self.up = nn.Linear(WIDTH, 3 * WIDTH, False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, False)

    def forward(self, x, cos, sin, *, segments=None, cache=None, start=None):
        B, S, _ = tuple(x.shape)
        h = self.norm1(x)
        q = ops.rotary(ops.reshape(self.q(h), (B, S, HEADS, SIZE)), cos, sin)
        k = ops.rotary(ops.reshape(self.k(h), (B, S, KV_HEADS, SIZE)), cos, sin)
        v = ops.reshape(self.v(h), (B, S, KV_HEADS, SIZE))
        lengths = None
        if cache is not None:
            k, v = (
                ops.cache_update(old, new, start) for old, new in zip(cache, (k, v), strict=True)
            )
            lengths = start + S
        a = ops.attention(
            q, k, v, scale=0.5, causal=True, segment_ids_BS=segments, lengths_B=lengths
        )
        x = x + self.o(ops.reshape(a, (B, S, HEADS * SIZE)))
        h = self.norm2(x)
        return x + self.down(ops.swiglu(self.gate(h), self.up(h))), (k, v)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY, False)

    def loss(self, ids, cos, sin, segments, targets):
        x = ops.take_rows(self.embed.weight, ids)
        for layer in self.layers:
            x, _ = layer(x, cos, sin, segments=segments)
        rows = ops.reshape(x, (-1, WIDTH))
        return ops.linear_cross_entropy(rows, self.head.matrix(), targets)

    def decode(self, ids, cos, sin, caches, start):
        x = self.embed(ids)
        new = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, kept = layer(x, cos, sin, cache=cache, start=start)
            new.append(kept)
        return self.head(x[:, -1]), tuple(new)


def filled(module):
    rng = np.random.default_rng(1)
    for name, shape in RUNTIME.parameter_shapes(module).items():
        RUNTIME.assign(module, name, rng.standard_normal(shape).astype(np.float32) * 0.3)
    return module


def decoder():
    return filled(RUNTIME.build(Decoder))


def tables(B: int, S: int):
    angles = np.tile(np.random.default_rng(2).standard_normal((B, S, SIZE // 2)), 2)
    return RUNTIME.tensor32(np.cos(angles)), RUNTIME.tensor32(np.sin(angles))


def batch():
    rng = np.random.default_rng(3)
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    targets = rng.integers(0, VOCABULARY, 12)
    targets[[2, 5, 7]] = -100
    ids = rng.integers(0, VOCABULARY, (2, 6))
    return (
        RUNTIME.tensor(ids), *tables(2, 6), RUNTIME.tensor(segments), RUNTIME.tensor(targets)
    )  # fmt: skip


def close(found, expected):
    scale = max(float(np.abs(expected).max()), 1e-30)
    assert float(np.abs(found - expected).max()) <= TOLERANCE * scale


def same_gradients(found, expected):
    assert abs(found[0] - expected[0]) <= TOLERANCE * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        close(found[1][name], gradient)


@pytest.mark.parametrize("chunk_rows", [1024, 5])
def test_loss_and_every_gradient_compiled(monkeypatch, chunk_rows):
    monkeypatch.setattr("backends.paddle.ops.CHUNK_ROWS", chunk_rows)
    model, arguments = decoder(), batch()
    expected = RUNTIME.value_and_grad(model.loss, model)(*arguments)
    found = RUNTIME.value_and_grad(RUNTIME.compile(model.loss), model)(*arguments)
    same_gradients(found, expected)


def test_a_function_first_run_without_gradients_has_them_later():
    model, arguments = decoder(), batch()
    compiled = RUNTIME.compile(model.loss)
    with RUNTIME.no_grad():
        compiled(*arguments)
    expected = RUNTIME.value_and_grad(model.loss, model)(*arguments)
    same_gradients(RUNTIME.value_and_grad(compiled, model)(*arguments), expected)


def test_recompute_compiled_and_eager():
    arguments = batch()
    plain = decoder()
    expected = RUNTIME.value_and_grad(plain.loss, plain)(*arguments)
    model = decoder()
    for layer in model.layers:
        RUNTIME.recompute(layer)
    same_gradients(RUNTIME.value_and_grad(model.loss, model)(*arguments), expected)
    compiled = RUNTIME.compile(model.loss)
    with pytest.warns(UserWarning, match="recompute works eagerly only"):
        same_gradients(RUNTIME.value_and_grad(compiled, model)(*arguments), expected)


def test_recompute_runs_a_block_again(capfd):
    """Also where only parameters, not inputs, are learnt, and without a word about it."""
    model, arguments, runs = decoder(), batch(), []
    model.embed.weight.stop_gradient = True
    inner = model.layers[0].gate
    inner.register_forward_post_hook(lambda *_: runs.append(1))
    RUNTIME.value_and_grad(model.loss, model)(*arguments)
    assert len(runs) == 1
    RUNTIME.recompute(model.layers[0])
    RUNTIME.value_and_grad(model.loss, model)(*arguments)
    assert len(runs) == 3
    assert capfd.readouterr() == ("", "")


def test_frozen_parameters_get_zeros_and_cost_the_others_nothing():
    model, arguments = decoder(), batch()
    _, expected = RUNTIME.value_and_grad(model.loss, model)(*arguments)
    model.head.weight.stop_gradient = True
    for function in (model.loss, RUNTIME.compile(model.loss)):
        _, found = RUNTIME.value_and_grad(function, model)(*arguments)
        assert not found["head.weight"].any()
        close(found["embed.weight"], expected["embed.weight"])
    for parameter in model.parameters():
        parameter.stop_gradient = True
    value, found = RUNTIME.value_and_grad(model.loss, model)(*arguments)
    assert value > 0
    assert not any(gradient.any() for gradient in found.values())


def test_linear_cross_entropy_holds_one_chunk_of_logits(monkeypatch):
    """No tensor as large as all logits is alive at any time, forward or backward."""
    monkeypatch.setattr("backends.paddle.ops.CHUNK_ROWS", 4)
    rows_alive = []
    product = paddle.matmul

    def watched(a, b, **options):
        y = product(a, b, **options)
        if tuple(y.shape)[-1] == VOCABULARY:
            rows_alive.append(y.shape[0])
        return y

    monkeypatch.setattr("backends.paddle.ops.paddle.matmul", watched)
    rng = np.random.default_rng(4)
    hidden, weight = (
        RUNTIME.tensor(rng.standard_normal(s)) for s in ((10, WIDTH), (VOCABULARY, WIDTH))
    )
    targets = RUNTIME.tensor(rng.integers(0, VOCABULARY, 10))
    RUNTIME.grad_of(lambda h, w: ops.linear_cross_entropy(h, w, targets), hidden, weight)
    assert rows_alive == [4, 4, 2, 4, 4, 2]


def decoded(step):
    """Logits of five greedy steps of two rows, the second one token ahead."""
    caches = tuple(
        tuple(ops.zeros((2, 9, KV_HEADS, SIZE), "float32") for _ in range(2)) for _ in range(2)
    )
    ids, logits_of_steps = RUNTIME.tensor(np.array([[1], [2]])), []
    with RUNTIME.no_grad():
        for position in range(5):
            start = RUNTIME.tensor(np.array([position, position + 1]))
            logits, caches = step(ids, *tables(2, 1), caches, start)
            ids = ops.reshape(ops.argmax(logits, -1), (2, 1))
            logits_of_steps.append(RUNTIME.numpy(logits))
    return np.stack(logits_of_steps)


def test_decoding_compiled():
    model = decoder()
    close(decoded(RUNTIME.compile(model.decode)), decoded(model.decode))


def whole_model():
    vision = VisionSpec("siglip", 24, 40, 2, 3, 20, 4, "gelu_pytorch_tanh", 1e-6)
    text = TextSpec(
        "qwen2", 31, 32, 48, 2, 4, 2, 8, "silu", 1e-5, 64, tie_embeddings=True, qkv_bias=True
    )
    video = VideoSpec("bilinear", 2, "after_projector")
    spec = LlavaSpec(
        "llava_next_video", vision, text, ProjectorSpec(2, 24, 32), has_newline=True, video=video
    )
    return filled(RUNTIME.build(lambda: Llava(spec)))


def test_the_whole_model_compiled():
    """Image, video, merge, decoder, tied head: loss and every gradient."""
    model, rng = whole_model(), np.random.default_rng(5)
    rows = 2 * 12 + 25 + 9 + 1  # text, one tile, one pooled frame, newline
    integers = [
        rng.integers(0, 31, (2, 12)),
        np.stack([rng.permutation(rows)[:12] for _ in range(2)]),
        np.tile(np.arange(12), (2, 1)),
        np.repeat([[1, 2], [1, 0]], 6, axis=1),
        rng.permutation(24)[:7],
        rng.integers(0, 31, 7),
    ]
    pixels, frames = (RUNTIME.tensor(rng.standard_normal((1, 3, 20, 20))) for _ in range(2))
    ids, merge_index, positions, segments, target_index, targets = map(RUNTIME.tensor, integers)
    cos, sin = (RUNTIME.tensor32(f(rng.standard_normal((12, 8)))) for f in (np.cos, np.sin))

    def loss(ids, merge_index, positions, segments, target_index, targets, pixels, frames):
        hidden = model(ids, merge_index, positions, cos, sin, segments, pixels, frames)
        return model.loss(hidden, target_index, targets)

    arguments = (ids, merge_index, positions, segments, target_index, targets, pixels, frames)
    expected = RUNTIME.value_and_grad(loss, model)(*arguments)
    same_gradients(RUNTIME.value_and_grad(RUNTIME.compile(loss), model)(*arguments), expected)
    assert any(g.any() for name, g in expected[1].items() if name.startswith("vision_tower"))


def test_a_compiled_function_follows_its_weights_and_its_shapes():
    model = decoder()
    compiled = RUNTIME.compile(lambda ids: model.head(model.embed(ids)))
    for shape in ((2, 3), (1, 5)):
        ids = RUNTIME.tensor(np.zeros(shape, np.int64))
        for factor in (1, 2):
            weight = RUNTIME.fetch(model, "head.weight") * factor
            RUNTIME.assign(model, "head.weight", weight)
            row = weight @ RUNTIME.fetch(model, "embed.weight")[0]
            with RUNTIME.no_grad():
                close(RUNTIME.numpy(compiled(ids)), np.broadcast_to(row, (*shape, VOCABULARY)))


def test_a_linear_inside_stays_paddles_own():
    model = decoder()
    layer = model.layers[0].gate
    assert isinstance(layer, paddle.nn.Linear)
    assert tuple(layer.weight.shape) == (WIDTH, 3 * WIDTH)
    assert RUNTIME.parameter_shapes(model)["layers.0.gate.weight"] == (3 * WIDTH, WIDTH)
    np.testing.assert_array_equal(
        RUNTIME.fetch(model, "layers.0.gate.weight"), layer.weight.numpy().T
    )
    assert set(model.state_dict()) == set(RUNTIME.parameter_shapes(model))


def test_building_takes_no_memory():
    """A matrix of 4 TiB is built, named and measured, only not assigned."""
    layer = RUNTIME.build(lambda: nn.Linear(2**20, 2**20, False))
    assert RUNTIME.parameter_shapes(layer) == {"weight": (2**20, 2**20)}


def test_parameters_in_bfloat16(monkeypatch):
    """No cpu computes in it, but it stores it: rounded to nearest even, turned, read as float32."""
    monkeypatch.setattr(_state, "dtype", "bfloat16")
    layer = RUNTIME.build(lambda: nn.Linear(4, 2, True))
    weight = np.arange(8, dtype=np.float32).reshape(2, 4) / 3
    upper = weight.view(np.uint32) >> 16
    odd, rest = upper & 1, weight.view(np.uint32) & 0xFFFF
    nearest = (upper + (rest + odd > 0x8000)).astype(np.uint32) << 16
    for given, bits, expected in (
        (weight, False, nearest),
        (weight.astype(np.float64), False, nearest),
        (upper.astype(np.uint16), True, upper << 16),
    ):
        RUNTIME.assign(layer, "weight", given, bfloat16=bits)
        assert layer.weight.dtype == paddle.bfloat16
        assert tuple(layer.weight.shape) == (4, 2)
        np.testing.assert_array_equal(RUNTIME.fetch(layer, "weight"), expected.view(np.float32))


def test_assign_refuses_a_wrong_shape():
    layer = RUNTIME.build(lambda: nn.Linear(3, 5, False))
    with pytest.raises(BackendError, match=r"\(3, 5\)[\s\S]*\(5, 3\)"):
        RUNTIME.assign(layer, "weight", np.zeros((3, 5), np.float32))
    with pytest.raises(BackendError, match="wight"):
        RUNTIME.assign(layer, "wight", np.zeros((5, 3), np.float32))


def test_cpu_computes_in_float32_only():
    assert RUNTIME.supported_dtypes("cpu") == ["float32"]
    with pytest.raises(BackendError, match="float32"):
        RUNTIME.setup("cpu", "bfloat16")
    assert RUNTIME.current() == ("cpu", "float32")


@pytest.fixture
def kernels_of_cpu(monkeypatch):
    """Gives the cpu fused kernels to choose from; puts the switch back afterwards."""

    def give(kernels):
        monkeypatch.setitem(_fused.KERNELS, "cpu", kernels)
        return _fused.choose("cpu", "float32")

    yield give
    monkeypatch.undo()
    RUNTIME.setup("cpu", "float32")


def test_kernels_switch(kernels_of_cpu):
    assert kernels_of_cpu({"swiglu": _fused._swiglu}) == {"swiglu": _fused._swiglu}
    model, arguments = decoder(), batch()
    results = []
    for kernels, in_force in (("portable", set()), ("auto", {"swiglu"})):
        RUNTIME.setup("cpu", "float32", kernels)
        assert set(_state.fused) == in_force
        results.append(RUNTIME.value_and_grad(model.loss, model)(*arguments))
    same_gradients(*results)


def test_attention_that_paddle_chooses(kernels_of_cpu):
    """The kernel of gpus: on cpu scaled_dot_product_attention runs too, as plain mathematics."""
    assert "attention" in kernels_of_cpu({"attention": _fused._attention_gpu})


def test_a_wrong_or_absent_kernel_is_not_let_in(kernels_of_cpu, caplog):
    def wrong(gate, up):
        return paddle.nn.functional.swiglu(up, gate)

    def hides_what_is_seen(q, k, v, scale, causal, mask):
        mask = None if mask is None else ~mask
        return _fused._attention_gpu(q, k, v, scale, causal, mask)

    absent = {
        "rms_norm": _fused._rms_norm_npu,
        "rotary": _fused._rotary_npu,
    }
    kernels = {"swiglu": wrong, "attention": hides_what_is_seen, **absent}
    with caplog.at_level("INFO"):
        assert kernels_of_cpu(kernels) == {}
    assert "fused swiglu on cpu in float32 is wrong" in caplog.text
    assert "fused attention on cpu in float32 is wrong" in caplog.text
    for name in absent:
        assert f"no fused {name} on cpu in float32" in caplog.text


def test_paddle_is_imported_without_noise():
    """GLOG_v is set for MindSpore; Paddle would print 250 000 lines with it."""
    script = (
        "import os, backends; r = backends.select('paddle', device='cpu');"
        "import numpy as np; x = r.tensor(np.ones(3));"
        "print(r.grad_of(r.compile(lambda x: (x * x).sum()), x));"
        "print(os.environ['GLOG_v'], 'GLOG_minloglevel' in os.environ)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GLOG")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "GLOG_v": "3", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[array([2., 2., 2.], dtype=float32)]\n3 False\n"
    assert done.stderr == ""
