"""What of training only Paddle has: compute below float32, which no cpu of Paddle's can.

float64 stands in for the compute dtype: the parameters that are trained stay float32 all the
same, and every layer has to bring the two together.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import backends
from backends.contract import LOSS_SCALE_PATIENCE, AdamW, LossScale
from backends.errors import BackendError
from backends.paddle import _state, nn, ops, training
from tests.training_cases import CASES, state_of

RUNTIME = backends.select("paddle", device="cpu", dtype="float32")


def run(case, steps=3, **options):
    module = case.build(RUNTIME, case.trained)
    engine = training.Engine(module, case.groups, AdamW(clip_norm=0.5), **options)
    books = []
    for step in range(steps):
        books += [engine.accumulate(inputs, 0.5) for inputs in case.batches(step, 2)]
        books.append(engine.update(case.rates).total)
    return module, books, state_of(engine)


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_compute_of_different_dtypes(name, monkeypatch):
    case = CASES[name]()
    _, expected, wanted = run(case)
    monkeypatch.setattr(_state, "dtype", "float64")
    module, found, state = run(case)
    for parameter, value, _ in RUNTIME.named_parameters(module):
        trained = parameter in case.trained
        assert value.dtype == (paddle.float32 if trained else paddle.float64), parameter
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for (parameter, kind), value in wanted.items():
        # This gradient is rounding alone: a constant added to all scores of a softmax.
        if not parameter.endswith("k_proj.bias"):
            bar = 1e-4 * max(float(np.abs(value).max()), 1e-3)
            assert float(np.abs(state[parameter, kind] - value).max()) <= bar, (parameter, kind)


@pytest.mark.parametrize("layer", ["Linear", "Embedding", "LayerNorm", "RMSNorm", "PatchEmbed"])
def test_layers_compute_in_the_dtype_in_force(layer, monkeypatch):
    arguments, x = {
        "Linear": ((4, 3, True), np.ones((2, 4))),
        "Embedding": ((4, 3), np.array([1, 2])),
        "LayerNorm": ((4, 1e-5), np.ones((2, 4))),
        "RMSNorm": ((4, 1e-5), np.ones((2, 4))),
        "PatchEmbed": ((3, 5, 2, True), np.ones((1, 3, 4, 4))),
    }[layer]
    monkeypatch.setattr(_state, "dtype", "float64")
    module = RUNTIME.build(lambda: getattr(nn, layer)(*arguments))
    shapes = RUNTIME.parameter_shapes(module)
    RUNTIME.set_trained(module, list(shapes))
    for name, shape in shapes.items():
        RUNTIME.assign(module, name, np.ones(shape))
    x = RUNTIME.tensor(x) if x.dtype == np.int64 else paddle.to_tensor(x)
    y = module(x)
    assert y.dtype == paddle.float64
    y.sum().backward()
    assert all(p.grad.dtype == paddle.float32 for p in module.parameters())


def test_nothing_is_cast_in_float32():
    x, weight = paddle.ones([2, 3]), paddle.ones([3])
    assert ops.like(weight, x) is weight


def test_parameters_are_replaced_wherever_they_are_used(monkeypatch):
    monkeypatch.setattr(_state, "dtype", "bfloat16")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 2, False)
            self.two = nn.Linear(3, 2, False)
            self.two.weight = self.one.weight
            self.rest = nn.Linear(2, 2, True)

    module = RUNTIME.build(Twice)
    RUNTIME.set_trained(module, ["one.weight"])
    RUNTIME.assign(module, "one.weight", np.full((2, 3), 1 + 2.0**-12, np.float32))
    RUNTIME.assign(module, "rest.bias", np.full(2, 1 + 2.0**-12, np.float32))
    assert module.two.weight is module.one.weight
    assert (RUNTIME.fetch(module, "one.weight") == 1 + 2.0**-12).all()
    assert (RUNTIME.fetch(module, "rest.bias") == 1).all()
    assert [n for n, p, _ in RUNTIME.named_parameters(module) if not p.stop_gradient] == [
        "one.weight"
    ]
    with pytest.raises(BackendError, match=r"tow\.weight"):
        RUNTIME.set_trained(module, ["tow.weight"])


def float16_engine(monkeypatch, case):
    """An engine that scales its loss; computing goes on in float32."""
    module = case.build(RUNTIME, case.trained)
    with monkeypatch.context() as patch:
        patch.setattr(_state, "dtype", "float16")
        return training.Engine(module, case.groups, AdamW(clip_norm=0.5))


def test_the_loss_scale_shows_nowhere(monkeypatch):
    """A power of two: everything is the same to the bit."""
    case = CASES["small"]()
    _, expected, wanted = run(case, steps=1)
    engine = float16_engine(monkeypatch, case)
    assert engine.loss_scale == LossScale()
    found = [engine.accumulate(inputs, 0.5) for inputs in case.batches(0, 2)]
    found.append(engine.update(case.rates).total)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert engine.loss_scale == LossScale(2.0**16, 1)
    state = state_of(engine)
    for key, value in wanted.items():
        np.testing.assert_allclose(state[key], value, rtol=1e-6, atol=1e-12, err_msg=str(key))


def test_overflow_halves_the_loss_scale(monkeypatch):
    case = CASES["small"]()
    engine = float16_engine(monkeypatch, case)
    saved = state_of(engine)
    engine.restore(7, lambda name, kind: saved[name, kind], LossScale(2.0**126, 5))
    engine.accumulate(case.batches(0, 1)[0], 1e3)
    norms = engine.update(case.rates)
    assert norms.skipped and engine.steps == 7
    assert engine.loss_scale == LossScale(2.0**125, 0)
    patient = LossScale(4.0, LOSS_SCALE_PATIENCE - 1)
    engine.restore(7, lambda name, kind: saved[name, kind], patient)
    engine.accumulate(case.batches(0, 1)[0], 1e-3)
    assert not engine.update(case.rates).skipped
    assert engine.loss_scale == LossScale(8.0, 0)
    engine.restore(7, lambda name, kind: saved[name, kind])
    assert engine.loss_scale == LossScale()


def test_no_gradient_and_no_graph_of_what_is_frozen(monkeypatch):
    """The vision tower in front of what is trained leaves no graph, and no gradient anywhere."""
    case = CASES["llava"]()
    module = case.build(RUNTIME, case.trained)
    engine = training.Engine(module, case.groups, AdamW())
    outputs = {}
    remove = RUNTIME.watch(module, lambda name, output: outputs.setdefault(name, output))
    engine.accumulate(case.batches(0, 1)[0], 1.0)
    remove()
    tower = [name for name in outputs if name.startswith("vision_tower")]
    assert tower and all(outputs[name].stop_gradient for name in tower)
    assert not outputs["multi_modal_projector"].stop_gradient
    for name, parameter, _ in RUNTIME.named_parameters(module):
        assert (parameter.grad is None) == (name not in case.trained), name


def test_a_tiny_rate_is_none():
    """The end of a cosine: 1 / rate would not fit float32."""
    case = CASES["small"]()
    engine = training.Engine(case.build(RUNTIME, case.trained), case.groups, AdamW())
    engine.accumulate(case.batches(0, 1)[0], 1.0)
    engine.update({"fast": 1e-45, "slow": 1e-29})
    for (name, kind), array in state_of(engine).items():
        assert np.isfinite(array).all(), name
        if kind == "parameter":
            np.testing.assert_array_equal(array, case.values[name])


def test_norms_of_large_tensors():
    """Squares are not added in float32 alone: 2^25 of them would be wrong by percents."""
    gradient = paddle.full([5, 7, 60_000], 0.1)
    parts = training._squares(gradient)
    assert len(parts) == 3
    total = sum(float(part.item()) for part in parts)
    assert total == pytest.approx(5 * 7 * 60_000 * float(np.float32(0.1)) ** 2, rel=1e-5)


def test_strategies_that_paddle_has_not():
    with pytest.raises(BackendError, match=r"(?s)zero3.*single, ddp, zero1.*accelerators only"):
        backends.parallel.start("zero3")
