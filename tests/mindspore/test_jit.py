"""What `ms.jit` compiles gives what eager mode gives: layers, losses, gradients, recomputation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

import backends
from backends import contract
from backends.mindspore import nn, ops
from tests.backend.test_ops import CASES, case_id, convert

RNG = np.random.default_rng(0)
V, D, H, K, E, S = 23, 32, 4, 2, 8, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


class Block(nn.Module):
    """Grouped attention with packed rows, and a gated layer: what a decoder block needs."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D, 1e-5), nn.LayerNorm(D, 1e-6)
        self.q = nn.Linear(D, H * E, True)
        self.k, self.v = nn.Linear(D, K * E, False), nn.Linear(D, K * E, False)
        self.o, self.gate, self.up = (nn.Linear(D, D, False) for _ in range(3))

    def forward(self, x, cos, sin, segments=None, *, window=None):
        B, S, _ = tuple(x.shape)
        h = self.norm1(x)
        q = ops.rotary(ops.reshape(self.q(h), (B, S, H, E)), cos, sin)
        k = ops.rotary(ops.reshape(self.k(h), (B, S, K, E)), cos, sin)
        v = ops.reshape(self.v(h), (B, S, K, E))
        y = ops.attention(q, k, v, scale=0.3, causal=True, segment_ids_BS=segments, window=window)
        x = x + self.o(ops.reshape(y, (B, S, H * E)))
        h = self.norm2(x)
        return x + ops.swiglu(self.gate(h), self.up(h))


class Tiny(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.newline = nn.parameter((D,))
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.head = nn.Linear(D, V, False)

    def forward(self, ids, cos, sin, segments=None):
        x = self.table(ids) + ops.reshape(self.newline, (1, 1, D))
        for n, layer in enumerate(self.layers):
            x = layer(x, cos, sin, segments, window=3 if n else None)
        return x

    def loss(self, ids, cos, sin, segments, targets):
        x = self.forward(ids, cos, sin, segments)
        return ops.linear_cross_entropy(ops.reshape(x, (-1, D)), self.head.matrix(), targets)

    def scaled(self, ids, cos, sin):
        return self.forward(ids, cos, sin) * 2.0


def build(runtime, factory=Tiny):
    module = runtime.build(factory)
    rng = np.random.default_rng(1)
    for name, shape in runtime.parameter_shapes(module).items():
        value = rng.standard_normal(shape).astype(np.float32) * 0.2
        runtime.assign(module, name, value + np.float32("norm" in name and "weight" in name))
    return module


@pytest.fixture(scope="module")
def tiny(runtime):
    return build(runtime)


@pytest.fixture(scope="module")
def inputs(runtime):
    ids, targets = RNG.integers(0, V, (2, S)), RNG.integers(0, V, 2 * S)
    targets[::3] = -100
    tables = [runtime.tensor32(normal(2, S, E)) for _ in range(2)]
    return [runtime.tensor(ids), *tables, runtime.tensor(SEGMENTS), runtime.tensor(targets)]


def assert_close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


def jitted_gradients(loss, module, args):
    """Value and gradients with differentiation inside the graph, as a training step has it."""
    parameters = ms.ParameterTuple(module.get_parameters())

    @ms.jit
    def step(*args):
        return ms.value_and_grad(loss, None, parameters)(*args)

    value, gradients = step(*args)
    return float(value.asnumpy()), {
        p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)
    }


def assert_same_gradients(found, expected):
    assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_op_compiles(case, runtime):
    """The cases of the contract, whose eager values tests/backend compares with NumPy."""
    name, args, options = case
    args = [convert(a, runtime.tensor) for a in args]
    places = [n for n, a in enumerate(args) if isinstance(a, ms.Tensor)]
    tensors = {k: runtime.tensor(v) for k, v in options.items() if isinstance(v, np.ndarray)}
    constants = {k: v for k, v in options.items() if k not in tensors}
    operation = getattr(ops, name)

    def function(*inputs):
        full = list(args)
        for n, place in enumerate(places):
            full[place] = inputs[n]
        named = dict(constants)
        for n, key in enumerate(tensors):
            named[key] = inputs[len(places) + n]
        return operation(*full, **named)

    inputs = [*(args[n] for n in places), *tensors.values()]
    assert_close(
        runtime.numpy(runtime.compile(function)(*inputs)), runtime.numpy(function(*inputs))
    )


def test_dtypes_by_name_and_by_tensor(runtime):
    def function(x):
        half = ops.cast(x, "float16")
        return ops.zeros((2, 3), half.dtype), ops.cast(half, x.dtype), ops.zeros((1,), "int64")

    for run in (function, runtime.compile(function)):
        dtypes = [t.dtype for t in run(runtime.tensor(np.ones(2)))]
        assert dtypes == [ms.float16, ms.float32, ms.int64]


def test_names_of_parameters_are_their_paths(tiny, runtime):
    names = [name for name, _ in tiny.parameters_and_names()]
    assert [p.name for p in tiny.get_parameters()] == names
    assert {"newline", "layers.1.norm2.bias", "layers.0.q.weight", "table.weight"} <= set(names)


def test_forward(tiny, inputs, runtime):
    def with_segments(ids, cos, sin, segments):
        return tiny(ids, cos, sin, segments)

    expected = runtime.numpy(with_segments(*inputs[:4]))
    assert_close(runtime.numpy(runtime.compile(with_segments)(*inputs[:4])), expected)


def test_gradients(tiny, inputs, runtime):
    expected = runtime.value_and_grad(tiny.loss, tiny)(*inputs)
    assert_same_gradients(jitted_gradients(tiny.loss, tiny, inputs), expected)


def test_recompute(tiny, inputs, runtime):
    expected = runtime.value_and_grad(tiny.loss, tiny)(*inputs)
    again = build(runtime)
    for layer in again.layers:
        runtime.recompute(layer)
    assert_same_gradients(jitted_gradients(again.loss, again, inputs), expected)
    assert_same_gradients(runtime.value_and_grad(again.loss, again)(*inputs), expected)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_linear_cross_entropy(rows, runtime, monkeypatch):
    """Whole and odd chunks, unlearnt rows: value and both gradients, against NumPy."""
    hidden, weight = normal(10, 4), normal(7, 4)
    targets = np.array([3, -100, 6, 0, 0, -100, -100, 5, 1, 2])
    monkeypatch.setattr(ops, "CHUNK_BYTES", (rows - 1) * 4 * 7)

    def thirds(hidden, weight, targets):
        return ops.linear_cross_entropy(hidden, weight, targets) / 3.0

    def graded(hidden, weight, targets):
        return ms.value_and_grad(thirds, (0, 1))(hidden, weight, targets)

    kept = targets >= 0
    slope = contract.softmax(hidden @ weight.T, -1)
    slope[np.arange(10), np.maximum(targets, 0)] -= 1
    slope *= kept[:, None] / 3
    args = [runtime.tensor(x) for x in (hidden, weight, targets)]
    for run in (graded, runtime.compile(graded)):
        value, (hidden_gradient, weight_gradient) = run(*args)
        expected = contract.linear_cross_entropy(hidden, weight, targets) / 3
        assert abs(float(value) - expected) <= 1e-5 * expected
        assert_close(runtime.numpy(hidden_gradient), slope @ weight)
        assert_close(runtime.numpy(weight_gradient), slope.T @ hidden)


MEMORY = """
import sys
import backends
runtime = backends.select("mindspore", device="cpu", dtype="float32")
import mindspore as ms
import numpy as np
ops, rng = backends.ops, np.random.default_rng(0)
def graded(hidden, weight, targets):
    return ms.value_and_grad(ops.linear_cross_entropy, (0, 1))(hidden, weight, targets)
run = runtime.compile(graded) if sys.argv[1] == "compiled" else graded
def args(N, V):
    floats = [runtime.tensor(rng.standard_normal((n, 8))) for n in (N, V)]
    return (*floats, runtime.tensor(rng.integers(0, V, N)))
run(*args(8, 8))
before = runtime.peak_memory()
run(*args(4096, 32000))
print(runtime.peak_memory() - before)
"""


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_linear_cross_entropy_never_holds_all_logits(mode, tmp_path):
    """All logits of this case are 500 MiB, and their gradient as much."""
    script = tmp_path / "memory.py"  # a file: graphs are compiled from source
    script.write_text(MEMORY)
    root = str(Path(backends.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script), mode],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 * 2**20


@pytest.mark.parametrize(("length", "start"), [(1, [0, 3, 8]), (4, [0, 5, 2])])
def test_cache_and_attention(length, start, runtime):
    cache, new, q = normal(3, 9, 2, 8), normal(3, length, 2, 8), normal(3, length, 4, 8)
    start = np.array(start)
    filled = contract.cache_update(cache, new, start)
    seen = contract.attention(
        q, filled, filled, scale=0.4, causal=True, lengths_B=start + length, window=5
    )

    def step(q, cache, new, start):
        cache = ops.cache_update(cache, new, start)
        lengths = start + length
        y = ops.attention(q, cache, cache, scale=0.4, causal=True, lengths_B=lengths, window=5)
        return y, cache

    args = [runtime.tensor(x) for x in (q, cache, new, start)]
    for run in (step, runtime.compile(step)):
        y, updated = run(*args)
        assert_close(runtime.numpy(y), seen)
        np.testing.assert_array_equal(runtime.numpy(updated), filled)


# --- runtime.compile -------------------------------------------------------------------------


def test_methods_and_closures_of_one_module(tiny, inputs, runtime):
    """Graphs of several functions over the same cell do not disturb one another."""

    def times(factor):
        def function(ids, cos, sin):
            return tiny(ids, cos, sin) * factor

        return function

    args = inputs[:3]
    once = runtime.numpy(tiny(*args))
    functions = {tiny.scaled: 2.0, tiny.forward: 1.0, times(3.0): 3.0, times(5.0): 5.0}
    compiled = {runtime.compile(f): factor for f, factor in functions.items()}
    for _ in range(2):
        for run, factor in compiled.items():
            assert_close(runtime.numpy(run(*args)), factor * once)


def test_compiled_graph_sees_new_values_of_parameters(inputs, runtime):
    tiny = build(runtime)
    run = runtime.compile(tiny.forward)
    run(*inputs[:3])
    runtime.assign(tiny, "newline", np.zeros(D, np.float32))
    runtime.assign(tiny, "layers.0.gate.weight", normal(D, D))
    assert_close(runtime.numpy(run(*inputs[:3])), runtime.numpy(tiny(*inputs[:3])))


def test_tuples_of_tensors_are_inputs(runtime):
    def total(pairs):
        left, right = pairs[0]
        return left + right + pairs[1][0], (left, right)

    run = runtime.compile(total)
    for _ in range(2):
        a, b, c = (normal(3) for _ in range(3))
        y, (left, right) = run(tuple((runtime.tensor(x), runtime.tensor(b)) for x in (a, c)))
        assert_close(runtime.numpy(y), a + b + c)
        assert_close(runtime.numpy(left), a)


def test_setup_makes_compiled_functions_anew(runtime, monkeypatch):
    def function(x):
        return x + 1.0 if ops.FUSED else x

    run, x = runtime.compile(function), runtime.tensor(np.zeros(2, np.float32))
    monkeypatch.setattr(ops, "FUSED", True)
    assert runtime.numpy(run(x)).tolist() == [1, 1]
    runtime.setup("cpu", "float32")
    assert runtime.numpy(run(x)).tolist() == [0, 0]
