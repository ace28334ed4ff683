"""Every op and layer against its NumPy reference in backends/contract.py, forward and gradient.

The reference runs in float64. Gradients are compared with central differences of the reference
along random directions, so nothing but NumPy decides what is right.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from backends import contract
from backends.quantised import quantise

TOLERANCE = 1e-5
"""Of the largest entry, in float32."""

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def integers(high: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, high, shape)


def cosines(rows: int, size: int) -> np.ndarray:
    return np.cos(np.tile(normal(2, rows, size // 2), 2))


SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
SCATTERED = np.array([[1, 2, 1, 0, 2, 2], [3, 1, 1, 3, 3, 0]])
QKV = (normal(2, 6, 4, 8), normal(2, 6, 2, 8), normal(2, 6, 2, 8))
CACHE = (normal(3, 2, 4, 8), normal(3, 9, 2, 8), normal(3, 9, 2, 8))

CASES: list[tuple[str, tuple, dict]] = [
    ("reshape", (normal(3, 4), (2, -1)), {}),
    ("transpose", (normal(2, 3, 4), (2, 0, 1)), {}),
    ("concat", ([normal(2, 3), normal(1, 3)],), {"axis": 0}),
    ("concat", ([normal(2, 3), normal(2, 2), normal(2, 1)],), {"axis": -1}),
    ("broadcast_to", (normal(1, 3), (4, 3)), {}),
    ("cast", (normal(3, 2), "float32"), {}),
    ("take_rows", (normal(5, 3), np.array([[0, 4], [4, 4]])), {}),
    ("reduce_sum", (normal(2, 3, 4),), {"axis": (0, 2)}),
    ("reduce_sum", (normal(2, 3),), {"axis": -1, "keepdims": True}),
    ("reduce_mean", (normal(2, 3, 4),), {"axis": 1}),
    ("reduce_mean", (normal(2, 3, 4),), {"axis": (1, 2), "keepdims": True}),
    ("reduce_max", (normal(2, 7),), {"axis": 1}),
    ("where", (integers(2, 3, 4).astype(bool), normal(3, 4), normal(1, 4)), {}),
    ("matmul", (normal(2, 3, 4), normal(2, 4, 5)), {}),
    ("matmul", (normal(2, 3, 4), normal(4, 5)), {}),
    ("linear", (normal(2, 3, 4), normal(5, 4), normal(5)), {}),
    ("linear", (normal(3, 4), normal(5, 4)), {}),
    ("softmax", (normal(3, 5) * 10,), {"axis": -1}),
    ("gelu", (np.linspace(-6, 6, 101, dtype=np.float32),), {"approximate": False}),
    ("gelu", (np.linspace(-6, 6, 101, dtype=np.float32),), {"approximate": True}),
    ("quick_gelu", (np.linspace(-9, 9, 101, dtype=np.float32),), {}),
    ("silu", (np.linspace(-9, 9, 101, dtype=np.float32),), {}),
    ("relu", (np.linspace(-3, 3, 100, dtype=np.float32),), {}),
    ("swiglu", (normal(3, 8), normal(3, 8)), {}),
    ("layer_norm", (normal(2, 3, 16) * 3 + 1, normal(16), normal(16)), {"eps": 1e-5}),
    ("layer_norm", (normal(2, 16) * 1e-3, normal(16), normal(16)), {"eps": 1e-6}),
    ("rms_norm", (normal(2, 3, 16) * 3, normal(16)), {"eps": 1e-5}),
    ("rms_norm", (normal(2, 16) * 1e-3, normal(16)), {"eps": 1e-6}),
    ("rotary", (normal(2, 5, 3, 8), cosines(5, 8), cosines(5, 8)), {}),
    ("attention", QKV, {"scale": 0.3, "causal": True}),
    ("attention", QKV, {"scale": 0.3, "causal": False}),
    ("attention", (normal(2, 6, 4, 8),) * 3, {"scale": 0.3, "causal": False}),
    ("attention", QKV, {"scale": 0.3, "causal": True, "segment_ids_BS": SEGMENTS}),
    ("attention", QKV, {"scale": 0.3, "causal": False, "segment_ids_BS": SEGMENTS}),
    ("attention", QKV, {"scale": 0.3, "causal": True, "segment_ids_BS": SCATTERED}),
    ("attention", QKV, {"scale": 0.3, "causal": True, "window": 3}),
    (
        "attention",
        QKV,
        {"scale": 0.3, "causal": True, "window": 2, "segment_ids_BS": SEGMENTS},
    ),
    ("attention", CACHE, {"scale": 0.4, "causal": True, "lengths_B": np.array([2, 5, 9])}),
    ("attention", CACHE, {"scale": 0.4, "causal": False, "lengths_B": np.array([2, 5, 9])}),
    (
        "attention",
        (normal(3, 1, 4, 8), *CACHE[1:]),
        {"scale": 0.4, "causal": True, "lengths_B": np.array([1, 4, 9])},
    ),
    (
        "attention",
        CACHE,
        {"scale": 0.4, "causal": True, "lengths_B": np.array([3, 5, 9]), "window": 3},
    ),
    ("patch_embed", (normal(2, 3, 8, 12), normal(5, 3, 4, 4), normal(5)), {}),
    ("patch_embed", (normal(1, 3, 9, 10), normal(5, 3, 4, 4), None), {}),
    ("cross_entropy", (normal(6, 11) * 5, integers(11, 6)), {}),
    ("linear_cross_entropy", (normal(7, 4), normal(11, 4), integers(11, 7)), {}),
    (
        "linear_cross_entropy",
        (normal(5, 4), normal(11, 4), np.array([3, -100, 10, -100, 0])),
        {},
    ),
    # More rows than any chunk, so that the chunks are really walked through.
    ("linear_cross_entropy", (normal(3000, 4), normal(13, 4), integers(13, 3000)), {}),
]

OWN = np.random.default_rng(1)


def own(*shape: int) -> np.ndarray:
    """As `normal`, without changing what the cases above and the directions below are."""
    return OWN.standard_normal(shape).astype(np.float32)


def odd(*shape: int) -> np.ndarray:
    """Any odd int32."""
    return OWN.integers(-(2**30), 2**30, shape) * 2 + 1


CASES += [
    *(
        ("quantised_linear", (own(2, 3, width), *quantise(own(6, width), kind), kind), {})
        for kind, width in (("int8", 20), ("int4", 128), ("nf4", 128), ("nf4", 96))
    ),
    ("dropout", (own(3, 40, 64), odd(3, 40), odd(64), -1234567, 0.3), {}),
]

LAYER_CASES: list[tuple[str, tuple, np.ndarray]] = [
    ("Linear", (4, 6, True), normal(2, 3, 4)),
    ("Linear", (4, 4, False), normal(3, 4)),
    ("Embedding", (7, 5), integers(7, 2, 3)),
    ("LayerNorm", (8, 1e-5), normal(2, 3, 8)),
    ("RMSNorm", (8, 1e-6), normal(2, 3, 8)),
    ("PatchEmbed", (3, 5, 4, False), normal(2, 3, 8, 8)),
    ("PatchEmbed", (3, 5, 4, True), normal(2, 3, 8, 8)),
]


def case_id(case: tuple) -> str:
    shapes = "-".join("x".join(map(str, a.shape)) for a in case[1] if isinstance(a, np.ndarray))
    options = ",".join(f"{k}={getattr(v, 'shape', v)}" for k, v in (case[2] or {}).items())
    return f"{case[0]}-{shapes}-{options}"


def is_float(x: object) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def convert(value: object, array):
    """The argument with `array` applied to every NumPy array in it."""
    if isinstance(value, np.ndarray):
        return array(value)
    if isinstance(value, list):
        return [convert(v, array) for v in value]
    return value


def float64(value: object) -> object:
    return convert(value, lambda a: a.astype(np.float64) if is_float(a) else a)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    scale = max(float(np.abs(expected).max()), 1e-30)
    assert float(np.abs(found - expected).max()) <= TOLERANCE * scale


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward(case, ops, runtime):
    name, args, options = case
    expected = getattr(contract, name)(
        *map(float64, args), **{k: float64(v) for k, v in options.items()}
    )
    native = [convert(a, runtime.tensor) for a in args]
    found = getattr(ops, name)(
        *native, **{k: convert(v, runtime.tensor) for k, v in options.items()}
    )
    assert_close(runtime.numpy(found), np.asarray(expected))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradient(case, ops, runtime):
    """d/de of sum(weights * op(x + e * direction)) for random directions, each argument alone."""
    name, args, options = case
    if name == "concat":
        args = tuple(args[0])
        reference = lambda *xs, **o: contract.concat(list(xs), **o)  # noqa: E731
        operation = lambda *xs, **o: ops.concat(list(xs), **o)  # noqa: E731
    else:
        reference, operation = getattr(contract, name), getattr(ops, name)
    if name == "cast":
        reference = lambda x, dtype: x  # noqa: E731  (rounding has no derivative)
    wide = [float64(a) for a in args]
    shape = np.shape(reference(*wide, **options))
    weights = normal(*shape) if shape else np.float32(1.0)
    places = [n for n, a in enumerate(args) if is_float(a)]
    if name in ("rotary", "quantised_linear"):
        places = [0]  # the tables are constants, and so is what the weight is made of

    def scalar(*floats):
        full = [convert(a, runtime.tensor) for a in args]
        for place, value in zip(places, floats, strict=True):
            full[place] = value
        native_options = {k: convert(v, runtime.tensor) for k, v in options.items()}
        y = operation(*full, **native_options)
        if not shape:
            return y
        return ops.reduce_sum(ops.reshape(y * runtime.tensor(weights), (-1,)), axis=0)

    gradients = runtime.grad_of(scalar, *[runtime.tensor(args[n]) for n in places])
    for place, gradient in zip(places, gradients, strict=True):
        step = 1e-4 * np.abs(wide[place]).mean()
        for _ in range(3):
            direction = RNG.standard_normal(args[place].shape)
            ends = []
            for sign in (1, -1):
                moved = list(wide)
                moved[place] = wide[place] + sign * step * direction
                ends.append(np.sum(weights.astype(np.float64) * reference(*moved, **options)))
            expected = (ends[0] - ends[1]) / (2 * step)
            found = float(np.sum(gradient.astype(np.float64) * direction))
            scale = float(np.abs(gradient).astype(np.float64).ravel() @ np.abs(direction).ravel())
            assert abs(found - expected) <= TOLERANCE * scale + 1e-7


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0] in ("attention", "rms_norm")], ids=case_id
)
def test_portable_kernels(case, ops, runtime):
    """The other side of the one switch between fused and portable kernels."""
    device, dtype = runtime.current()
    runtime.setup(device, dtype, "portable")
    try:
        test_forward(case, ops, runtime)
        test_gradient(case, ops, runtime)
    finally:
        runtime.setup(device, dtype, "auto")


def test_argmax(ops, runtime):
    x = normal(4, 9)
    found = runtime.numpy(ops.argmax(runtime.tensor(x), axis=-1))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, x.argmax(-1))


def test_zeros_and_casts(ops, runtime):
    x = ops.zeros((2, 3), "float32")
    np.testing.assert_array_equal(runtime.numpy(x), np.zeros((2, 3), np.float32))
    integer = ops.cast(runtime.tensor(np.array([1.5, -2.5], np.float32)), "int64")
    np.testing.assert_array_equal(runtime.numpy(integer), [1, -2])
    like = ops.cast(integer, x.dtype)
    assert runtime.numpy(like).dtype == np.float32
    flags = ops.cast(runtime.tensor(np.array([0, 3])), "bool")
    np.testing.assert_array_equal(runtime.numpy(flags), [False, True])


@pytest.mark.parametrize(("length", "start"), [(1, [0, 3, 8]), (4, [0, 0, 0]), (3, [1, 0, 6])])
def test_cache_update(ops, runtime, length, start):
    cache, new = normal(3, 9, 2, 4), normal(3, length, 2, 4)
    start = np.array(start)
    expected = contract.cache_update(cache, new, start)
    found = ops.cache_update(runtime.tensor(cache), runtime.tensor(new), runtime.tensor(start))
    np.testing.assert_array_equal(runtime.numpy(found), expected)


def test_attention_ignores_what_it_must_not_see(ops, runtime):
    """Keys behind a row's length may hold anything, even NaN-producing infinities' cousins."""
    q, k, v = CACHE
    lengths = np.array([2, 5, 9])
    dirty_k, dirty_v = k.copy(), v.copy()
    for row, length in enumerate(lengths):
        dirty_k[row, length:], dirty_v[row, length:] = 1e4, -1e4
    clean, dirty = (
        runtime.numpy(
            ops.attention(
                *map(runtime.tensor, (q, kk, vv)),
                scale=0.4,
                causal=True,
                lengths_B=runtime.tensor(lengths),
            )
        )
        for kk, vv in ((k, v), (dirty_k, dirty_v))
    )
    np.testing.assert_allclose(dirty, clean, rtol=0, atol=1e-6)


def test_stop_gradient(ops, runtime):
    x = normal(5)

    def scalar(t):
        return ops.reduce_sum(t * ops.stop_gradient(t), axis=0)

    (gradient,) = runtime.grad_of(scalar, runtime.tensor(x))
    np.testing.assert_allclose(gradient, x, rtol=1e-6)


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda c: f"{c[0]}{c[1]}")
def test_layer(case, nn, ops, runtime):
    """Canonical names and shapes, assign and fetch, output, and gradients of the parameters."""
    name, args, x = case
    reference = getattr(contract, name)(*args)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = getattr(nn, name)(*args)

        def forward(self, x):
            return self.inner(x)

    holder = runtime.build(Holder)
    shapes = runtime.parameter_shapes(holder)
    assert shapes == {f"inner.{key}": tuple(s) for key, s in reference.parameters.items()}
    values = {key: normal(*s) for key, s in reference.parameters.items()}
    for key, value in values.items():
        runtime.assign(holder, f"inner.{key}", value)
        np.testing.assert_array_equal(runtime.fetch(holder, f"inner.{key}"), value)
    expected = reference(float64(x), **{k: float64(v) for k, v in values.items()})
    found = runtime.numpy(holder(runtime.tensor(x)))
    assert_close(found, expected)
    weights = normal(*expected.shape)

    def loss(native_x):
        return ops.reduce_sum(ops.reshape(holder(native_x) * runtime.tensor(weights), (-1,)), 0)

    value, gradients = runtime.value_and_grad(loss, holder)(runtime.tensor(x))
    assert abs(value - float((expected * weights).sum())) <= 1e-4 * np.abs(expected).sum()
    for key, parameter in values.items():
        gradient = gradients[f"inner.{key}"]
        assert gradient.shape == parameter.shape
        direction, step, ends = RNG.standard_normal(parameter.shape), 1e-4, []
        for sign in (1, -1):
            moved = {k: float64(v) for k, v in values.items()}
            moved[key] = moved[key] + sign * step * direction
            ends.append(float((reference(float64(x), **moved) * weights).sum()))
        numeric = (ends[0] - ends[1]) / (2 * step)
        scale = float(np.abs(gradient).ravel() @ np.abs(direction).ravel())
        assert abs(float((gradient * direction).sum()) - numeric) <= TOLERANCE * scale + 1e-6


def test_unused_parameter_has_zero_gradient(nn, ops, runtime):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.parameter((3,))
            self.unused = nn.parameter((2,))

    two = runtime.build(Two)
    runtime.assign(two, "used", np.arange(3, dtype=np.float32))
    runtime.assign(two, "unused", np.ones(2, np.float32))
    value, gradients = runtime.value_and_grad(lambda x: ops.reduce_sum(two.used * x, axis=0), two)(
        runtime.tensor(np.ones(3, np.float32))
    )
    assert value == 3.0
    np.testing.assert_array_equal(gradients["used"], np.ones(3))
    np.testing.assert_array_equal(gradients["unused"], np.zeros(2))


def test_bfloat16_bits_are_understood(nn, runtime):
    holder = runtime.build(lambda: nn.Embedding(2, 2))
    values = np.array([[1.5, -2.0], [0.0078125, 3e38]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    runtime.assign(holder, "weight", bits, bfloat16=True)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(runtime.fetch(holder, "weight"), expected)


def make_stack(nn, ops, layers=3):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(8, 1e-5)
            self.up = nn.Linear(8, 16, False)
            self.down = nn.Linear(16, 8, True)

        def forward(self, x):
            return x + self.down(ops.silu(self.up(self.norm(x))))

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block() for _ in range(layers)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    return Stack


def filled(runtime, module):
    rng = np.random.default_rng(1)
    for key, shape in runtime.parameter_shapes(module).items():
        runtime.assign(module, key, rng.standard_normal(shape).astype(np.float32) * 0.3)
    return module


def test_linear_matrix_is_out_by_in(nn, runtime):
    layer = filled(runtime, runtime.build(lambda: nn.Linear(3, 5, False)))
    np.testing.assert_array_equal(runtime.numpy(layer.matrix()), runtime.fetch(layer, "weight"))


def test_recompute_changes_nothing(nn, ops, runtime):
    x = runtime.tensor(normal(4, 8))
    results = []
    for recompute in (False, True):
        stack = filled(runtime, runtime.build(make_stack(nn, ops)))
        if recompute:
            for layer in stack.layers:
                runtime.recompute(layer)
        loss = lambda t, stack=stack: ops.reduce_sum(  # noqa: E731
            ops.reshape(stack(t) * stack(t), (-1,)), axis=0
        )
        results.append(runtime.value_and_grad(loss, stack)(x))
    (value, gradients), (again, regradients) = results
    assert abs(value - again) <= 1e-6 * abs(value)
    assert gradients.keys() == regradients.keys()
    for key in gradients:
        assert_close(regradients[key], gradients[key])


def test_watch_names_modules_in_order(nn, ops, runtime):
    stack = filled(runtime, runtime.build(make_stack(nn, ops, layers=2)))
    x, seen = runtime.tensor(normal(4, 8)), []
    stop = runtime.watch(stack, lambda name, output: seen.append((name, runtime.numpy(output))))
    with runtime.no_grad():
        y = stack(x)
        stop()
        stack(x)
    names = [name for name, _ in seen]
    assert names == [
        f"layers.{n}{part}" for n in range(2) for part in (".norm", ".up", ".down", "")
    ]
    np.testing.assert_array_equal(seen[-1][1], runtime.numpy(y))


def test_compile_gives_the_same(nn, ops, runtime):
    stack = filled(runtime, runtime.build(make_stack(nn, ops)))
    x = runtime.tensor(normal(4, 8))

    def twice(x, y):
        h = stack(x)
        return h + y, ops.argmax(h, axis=-1)

    with runtime.no_grad():
        expected = [runtime.numpy(t) for t in twice(x, x)]
        compiled = runtime.compile(twice)
        found = [runtime.numpy(t) for t in compiled(x, x)]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])


def test_the_backend_holds_exactly_the_contract(nn, ops, runtime):
    """Every name is there, with the contract's parameters in the contract's order."""
    for name in contract.OPS:
        wanted = inspect.signature(getattr(contract, name)).parameters
        assert list(inspect.signature(getattr(ops, name)).parameters) == list(wanted), name
    for name in contract.RUNTIME:
        wanted = inspect.signature(getattr(contract, name)).parameters
        assert list(inspect.signature(getattr(runtime, name)).parameters) == list(wanted), name
    for name in (*contract.LAYERS, *contract.STRUCTURE):
        assert hasattr(nn, name), name
    tested = {case[0] for case in CASES} | {"argmax", "zeros", "cache_update", "stop_gradient"}
    assert tested == set(contract.OPS)
    assert {case[0] for case in LAYER_CASES} == set(contract.LAYERS)


def test_setup_refuses_by_name(runtime):
    import backends
    from backends.errors import BackendError

    before = runtime.current()
    with pytest.raises(BackendError, match="toaster"):
        runtime.setup("toaster:0", "float32")
    with pytest.raises(BackendError, match="float12"):
        backends.select(backends.NAME, dtype="float12")
    other = next(name for name in ("torch", "paddle") if name != backends.NAME)
    with pytest.raises(BackendError, match="one backend per process"):
        backends.select(other)
    assert runtime.current() == before
