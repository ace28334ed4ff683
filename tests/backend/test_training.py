"""The training engine of this backend against AdamW in NumPy, and its promises.

One process, float32 unless a test says otherwise. Gradients that the judge uses come from
`runtime.value_and_grad` of a module of its own, which the op tests hold to NumPy.
"""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest

import backends
from backends import contract
from backends.contract import AdamW, Group, LossScale
from backends.errors import BackendError
from tests.training_cases import CASES, Reference, small, state_of

DEVICE = "cpu"
KINDS = ("parameter", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def training():
    return backends.training


def engine_of(training, runtime, case, settings=None, **options):
    module = case.build(runtime, case.trained)
    return training.Engine(module, case.groups, settings or AdamW(), **options), module


def joined(batches):
    """Batches of one row each (of the small module) as one batch."""
    return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


def tensors(runtime, inputs):
    """As `Engine.accumulate` converts them."""
    return [
        None if a is None else runtime.tensor32(a) if a.dtype == np.float64 else runtime.tensor(a)
        for a in inputs
    ]


class Judge:
    """Loss and gradients at the engine's parameters, through a module where all is trained."""

    def __init__(self, runtime, case):
        self.runtime, self.case, self.module = runtime, case, case.build(runtime)
        self.run = runtime.value_and_grad(lambda *args: self.module(*args), self.module)

    def at(self, parameters, batches, scale):
        for name, value in parameters.items():
            self.runtime.assign(self.module, name, value)
        total, sums = 0.0, {name: 0.0 for name in self.case.trained}
        for inputs in batches:
            value, gradients = self.run(*tensors(self.runtime, inputs))
            total += scale * value
            for name in sums:
                sums[name] = sums[name] + scale * gradients[name].astype(np.float64)
        return total, sums


def parameters_of(engine):
    return {name: a for (name, kind), a in state_of(engine).items() if kind == "parameter"}


def without_noise(name):
    """A constant added to all scores of a softmax changes nothing: its gradient is rounding."""
    return not name.endswith("self_attn.k_proj.bias")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value, err_msg=str(key))


# --- the mathematics --------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
@pytest.mark.parametrize("name", CASES)
def test_updates_are_adamw(name, clip, training, runtime):
    """Several steps with two groups: losses, norms, parameters and moments."""
    case = CASES[name]()
    settings = AdamW(beta1=0.8, beta2=0.95, eps=1e-6, clip_norm=clip)
    engine, _ = engine_of(training, runtime, case, settings)
    reference, judge = Reference(case, settings), Judge(runtime, case)
    for step in range(4):
        batches, scale = case.batches(step, 2), 0.25
        loss, gradients = judge.at(parameters_of(engine), batches, scale)
        rates = {group: rate / (step + 1) for group, rate in case.rates.items()}
        found = sum(engine.accumulate(inputs, scale) for inputs in batches)
        norms = engine.update(rates)
        total, groups = reference.norms(gradients)
        assert found == pytest.approx(loss, rel=1e-6)
        assert norms.total == pytest.approx(total, rel=1e-5) and not norms.skipped
        assert norms.groups == pytest.approx(groups, rel=1e-5)
        reference.update(gradients, rates)
        assert engine.steps == step + 1
    state = state_of(engine)
    assert set(state) == set(reference.state)
    for (parameter, kind), expected in reference.state.items():
        if not without_noise(parameter):
            continue
        size = np.abs(expected).max()
        if kind == "parameter":
            bar = 1e-6 * size + 1e-4 * max(case.rates.values())
        else:
            bar = 1e-5 * size
        difference = np.abs(state[parameter, kind] - expected).max()
        assert difference <= bar, (parameter, kind, difference, bar)


def test_decay_alone(training, runtime):
    """What no loss depends on takes part: zero gradient, decayed, moments zero."""
    case = small()
    engine, _ = engine_of(training, runtime, case)
    engine.accumulate(case.batches(0, 1)[0], 1.0)
    engine.update({"fast": 0.0, "slow": 0.5})
    state = state_of(engine)
    expected = case.values["idle.weight"] * np.float32(1 - 0.5 * 0.1)
    np.testing.assert_allclose(state["idle.weight", "parameter"], expected, rtol=1e-6)
    assert not state["idle.weight", "exp_avg"].any()
    assert not state["idle.weight", "exp_avg_sq"].any()


def test_rate_zero_moves_moments_alone(training, runtime):
    case = small()
    engine, _ = engine_of(training, runtime, case)
    engine.accumulate(case.batches(0, 1)[0], 1.0)
    engine.update({"fast": 0.0, "slow": 0.0})
    for (name, kind), array in state_of(engine).items():
        if kind == "parameter":
            np.testing.assert_array_equal(array, case.values[name])
        else:
            assert array.any() or name == "idle.weight"
    assert engine.steps == 1


def test_micro_batches_add_up(training, runtime):
    """Rows one by one, in one batch, and with the last one announced: the same update."""
    results = []
    for form in ("one by one", "at once", "last announced"):
        case = small()
        engine, _ = engine_of(training, runtime, case)
        rows = case.batches(3, 4)
        batches = [joined(rows)] if form == "at once" else rows
        loss = 0.0
        for n, inputs in enumerate(batches):
            last = {"last": n == len(batches) - 1} if form == "last announced" else {}
            loss += engine.accumulate(inputs, 0.125, **last)
        norms = engine.update(case.rates)
        results.append((loss, norms.total, state_of(engine)))
    loss, norm, state = results[0]
    for other_loss, other_norm, other_state in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        for key, value in state.items():
            bar = 1e-5 * max(np.abs(value).max(), 1e-3)
            assert np.abs(other_state[key] - value).max() <= bar, key


def test_gradients_that_share_memory_add_up_apart(training, runtime):
    """Of one tile, the gradient of the class token is the first row of that of the positions:
    frameworks give both the same memory, where the next micro-batch would be added twice."""
    from backends import nn, ops

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.parameter((4,))
            self.places = nn.parameter((3, 4))

        def forward(self, x_B2D, y_B3D):
            token_B1D = ops.broadcast_to(ops.reshape(self.token, (1, 1, 4)), (len(x_B2D), 1, 4))
            rows_B3D = ops.concat([token_B1D, x_B2D], axis=1)
            rows_B3D = rows_B3D + ops.reshape(self.places, (1, 3, 4))
            return ops.reduce_sum(rows_B3D * y_B3D, axis=(0, 1, 2))

    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((3, n, 4)).astype(np.float32) for n in (2, 3))
    groups = [Group("token", ("token",)), Group("places", ("places",))]
    module = runtime.build(Rows)
    runtime.set_trained(module, ["token", "places"])
    for name, shape in runtime.parameter_shapes(module).items():
        runtime.assign(module, name, np.ones(shape, np.float32))
    engine = training.Engine(module, groups, AdamW())
    for _ in range(2):
        for part in (slice(1), slice(1, 3)):
            engine.accumulate([x[part], y[part]], 1.0)
        norms = engine.update({"token": 0.0, "places": 0.0}).groups
        expected = {"token": y.sum(0)[0], "places": y.sum(0)}
        assert norms == pytest.approx({n: np.linalg.norm(v) for n, v in expected.items()}, rel=1e-5)


def test_gradients_are_cleared(training, runtime):
    """The second update sees its own gradients only."""
    case, norms = small(), []
    for warm in (False, True):
        engine, _ = engine_of(training, runtime, case)
        if warm:
            engine.accumulate(case.batches(1, 1)[0], 1.0)
            engine.update({"fast": 0.0, "slow": 0.0})
        engine.accumulate(case.batches(2, 1)[0], 1.0)
        norms.append(engine.update({"fast": 0.0, "slow": 0.0}).total)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


# --- what is not trained ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_frozen_parts_stay(name, training, runtime):
    """Bitwise, and without state; what was trained is in the module too."""
    case = CASES[name]()
    engine, module = engine_of(training, runtime, case)
    for step in range(2):
        for inputs in case.batches(step, 2):
            engine.accumulate(inputs, 1.0)
        engine.update(case.rates)
    state = state_of(engine)
    assert {key[0] for key in state} == set(case.trained)
    for parameter, value in case.values.items():
        held = runtime.fetch(module, parameter)
        if parameter in case.trained:
            np.testing.assert_array_equal(held, state[parameter, "parameter"])
            assert (held != value).any(), parameter
        else:
            np.testing.assert_array_equal(held, value)


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        (lambda names: [Group("all", tuple(n for n in names if n != "scale"))], "scale"),
        (lambda names: [Group("all", tuple(names)), Group("again", ("norm.bias",))], "norm.bias"),
        (lambda names: [Group("all", (*names, "frozen.bias"))], "frozen.bias"),
        (lambda names: [Group("all", (*names, "nobody.weight"))], "nobody.weight"),
    ],
    ids=["missing", "twice", "frozen", "unknown"],
)
def test_groups_must_be_a_partition(change, mentioned, training, runtime):
    case = small()
    with pytest.raises(BackendError, match=mentioned):
        training.Engine(case.build(runtime, case.trained), change(case.trained), AdamW())


def test_unknown_strategy(training, runtime):
    case = small()
    with pytest.raises(BackendError, match="single"):
        engine_of(training, runtime, case, strategy="telepathy")
    assert "single" in training.STRATEGIES


# --- gradients that are no numbers ------------------------------------------------------------


def test_not_finite_is_skipped(training, runtime):
    """Nothing moves, the step does not count, and the next update is as if it had not been."""
    case = small()
    engine, _ = engine_of(training, runtime, case, AdamW(clip_norm=1.0))
    plain, _ = engine_of(training, runtime, case, AdamW(clip_norm=1.0))
    for one in (engine, plain):
        one.accumulate(case.batches(0, 1)[0], 1.0)
        one.update(case.rates)
    before = state_of(engine)
    for bad in (np.inf, np.nan):
        inputs = case.batches(1, 1)[0]
        inputs[1] = np.full_like(inputs[1], bad)
        engine.accumulate(case.batches(1, 1)[0], 1.0)
        engine.accumulate(inputs, 1.0)
        norms = engine.update(case.rates)
        assert norms.skipped and not np.isfinite(norms.total)
        assert engine.steps == 1
        assert_same(state_of(engine), before)
    for one in (engine, plain):
        one.accumulate(case.batches(2, 1)[0], 1.0)
        assert not one.update(case.rates).skipped
    assert engine.steps == 2
    assert_same(state_of(engine), state_of(plain))


# --- state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_state_restores_exactly(name, training, runtime):
    """Three steps, save, restore in a new engine over other values: the next steps are equal."""
    case = CASES[name]()
    settings = AdamW(beta2=0.95, clip_norm=0.5)

    def go_on(engine, start, stop):
        losses = []
        for step in range(start, stop):
            for inputs in case.batches(step, 2):
                losses.append(engine.accumulate(inputs, 0.5))
            losses.append(engine.update(case.rates).total)
        return losses

    engine, _ = engine_of(training, runtime, case, settings)
    go_on(engine, 0, 3)
    saved = state_of(engine)
    expected = go_on(engine, 3, 5)

    other = dataclasses.replace(case, values={n: v * 0.9 for n, v in case.values.items()})
    fresh, module = engine_of(training, runtime, other, settings)
    for parameter in set(case.values) - set(case.trained):
        runtime.assign(module, parameter, case.values[parameter])
    asked = []

    def read(parameter, kind):
        asked.append((parameter, kind))
        return saved[parameter, kind]

    fresh.restore(3, read)
    assert sorted(asked) == sorted(saved)
    assert fresh.steps == 3
    assert_same(state_of(fresh), saved)
    assert go_on(fresh, 3, 5) == expected
    assert_same(state_of(fresh), state_of(engine))


def test_state_is_whole_and_canonical(training, runtime):
    case = small()
    engine, _ = engine_of(training, runtime, case)
    found = [(name, kind) for name, kind, _ in engine.state()]
    assert found == [(name, kind) for name, kind, _ in engine.state()]
    assert sorted(found) == sorted((name, kind) for name in case.trained for kind in KINDS)
    for (name, kind), array in state_of(engine).items():
        assert array.shape == case.values[name].shape and array.dtype == np.float32
        if kind == "parameter":
            np.testing.assert_array_equal(array, case.values[name])
        else:
            assert not array.any(), "moments begin at zero"


# --- options ----------------------------------------------------------------------------------


def one_update(engine, case, batches, scale=1.0):
    """Losses and the norm; in float16 as often as it takes to find the loss scale."""
    for _ in range(17):
        losses = [engine.accumulate(inputs, scale) for inputs in batches]
        norms = engine.update(case.rates)
        if not norms.skipped:
            return [*losses, norms.total]
    raise AssertionError("every update was skipped")


def run_steps(engine, case, steps=3):
    losses = []
    for step in range(steps):
        losses += one_update(engine, case, case.batches(step, 2), 0.5)
    return losses, state_of(engine)


def assert_close(found, expected, case):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for (name, kind), value in expected[1].items():
        bar = 1e-5 * np.abs(value).max() + 1e-3 * max(case.rates.values()) * (kind == "parameter")
        if without_noise(name):
            assert np.abs(found[1][name, kind] - value).max() <= bar, (name, kind)


def test_compiled_is_the_same(training, runtime):
    case = small()
    expected = run_steps(engine_of(training, runtime, case)[0], case)
    found = run_steps(engine_of(training, runtime, case, compiled=True)[0], case)
    assert_close(found, expected, case)


def test_recomputed_is_the_same(training, runtime):
    case = CASES["llava"]()
    expected = run_steps(engine_of(training, runtime, case)[0], case)
    module = case.build(runtime, case.trained)
    blocks = [*module.language_model.model.layers]
    for block in [*blocks, *module.vision_tower.vision_model.encoder.layers]:
        runtime.recompute(block)
    found = run_steps(training.Engine(module, case.groups, AdamW()), case)
    assert_close(found, expected, case)


# --- below float32 ----------------------------------------------------------------------------


@pytest.fixture
def computing_in(runtime):
    """Set the compute dtype for one test; skips where the device has no such kernels."""

    def change(dtype):
        if dtype not in runtime.supported_dtypes(DEVICE):
            pytest.skip(f"{backends.NAME} has no {dtype} on {DEVICE}")
        runtime.setup(DEVICE, dtype)

    yield change
    runtime.setup(DEVICE, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trained_parameters_stay_float32(dtype, computing_in, training, runtime):
    """Small steps are not lost; frozen parameters are in the compute dtype."""
    computing_in(dtype)
    case = small()
    fine = {n: v + np.float32(2.0**-20) * (v != 0) for n, v in case.values.items()}
    case = dataclasses.replace(case, values=fine)
    engine, module = engine_of(training, runtime, case)
    for name, value in case.values.items():
        if name in case.trained:
            np.testing.assert_array_equal(runtime.fetch(module, name), value)
        elif value.size > 10:
            assert (runtime.fetch(module, name) != value).any(), "frozen ones are rounded"
    rate = 1e-6
    slow = dataclasses.replace(case, rates={"fast": rate, "slow": rate})
    one_update(engine, slow, case.batches(0, 1))
    moved = state_of(engine)["head.weight", "parameter"] - case.values["head.weight"]
    assert 0 < np.abs(moved).max() < 3 * rate


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_mixed_precision_follows_float32(name, dtype, computing_in, training, runtime):
    case = CASES[name]()
    expected = run_steps(engine_of(training, runtime, case)[0], case)
    computing_in(dtype)
    found = run_steps(engine_of(training, runtime, case)[0], case)
    # bfloat16 has 8 bits: losses and norms agree to about 1 %.
    np.testing.assert_allclose(found[0], expected[0], rtol=0.03)


def test_float64_inputs_keep_float32(computing_in, training, runtime):
    """A weight of 1 + 2^-12 is lost in bfloat16; the loss shows that it was not."""
    computing_in("bfloat16")
    case, losses = small(), []
    for weight in (1.0, 1 + 2.0**-12):
        engine, _ = engine_of(training, runtime, case)
        inputs = case.batches(0, 1)[0]
        losses.append(engine.accumulate([*inputs[:3], np.array([weight])], 1.0))
    assert losses[1] / losses[0] == pytest.approx(1 + 2.0**-12, rel=2e-7)


def test_float16_scales_its_loss(computing_in, training, runtime):
    """Overflow skips and halves; the loss and the norms show nothing of the scale."""
    computing_in("float16")
    case = small()
    engine, _ = engine_of(training, runtime, case)
    assert engine.loss_scale == LossScale(2.0**16, 0)
    inputs = case.batches(0, 1)[0]
    skipped, before = 0, state_of(engine)
    while True:
        # 1e3 * 2^16 does not fit float16, whose largest is 65504.
        value = engine.accumulate(inputs, 1e3)
        norms = engine.update(case.rates)
        if not norms.skipped:
            break
        skipped += 1
        assert engine.loss_scale == LossScale(2.0 ** (16 - skipped), 0)
        assert_same(state_of(engine), before)
    assert 0 < skipped < 16 and engine.steps == 1
    assert engine.loss_scale == LossScale(2.0 ** (16 - skipped), 1)
    runtime.setup(DEVICE, "float32")
    plain, _ = engine_of(training, runtime, case)
    assert plain.loss_scale is None
    assert value == pytest.approx(plain.accumulate(inputs, 1e3), rel=5e-3)
    assert norms.total == pytest.approx(plain.update(case.rates).total, rel=2e-2)


def test_loss_scale_is_restored(computing_in, training, runtime):
    computing_in("float16")
    case = small()
    engine, _ = engine_of(training, runtime, case)
    one_update(engine, case, case.batches(0, 1))
    saved = state_of(engine)
    patient = LossScale(4.0, contract.LOSS_SCALE_PATIENCE - 1)
    engine.restore(1, lambda name, kind: saved[name, kind], patient)
    assert engine.loss_scale == patient
    engine.accumulate(case.batches(0, 1)[0], 1.0)
    engine.update(case.rates)
    assert engine.loss_scale == LossScale(8.0, 0)
    engine.restore(1, lambda name, kind: saved[name, kind])
    assert engine.loss_scale == LossScale()


def test_the_rule_of_the_loss_scale():
    scale = LossScale()
    for _ in range(contract.LOSS_SCALE_PATIENCE - 1):
        scale = scale.after(False)
    assert scale == LossScale(2.0**16, 1999)
    assert scale.after(False) == LossScale(2.0**17, 0)
    assert scale.after(True) == LossScale(2.0**15, 0)
    assert LossScale(1.0, 7).after(True) == LossScale(1.0, 0)


# --- one process is a world -------------------------------------------------------------------


def test_alone(training):
    parallel = backends.parallel
    assert parallel.world() == (0, 1)
    parallel.start("single")
    for array in (np.array([2**60 + 1, -3]), np.array([0.1, -2.5])):
        found = parallel.sum_over_ranks(array)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    parallel.barrier()
    parallel.stop()


@pytest.mark.parametrize("name", ["accumulate", "update", "state", "restore", "__init__"])
def test_same_signatures(name, training):
    found = inspect.signature(getattr(training.Engine, name)).parameters
    expected = inspect.signature(getattr(contract.Engine, name)).parameters
    assert [(p.name, p.kind, p.default) for p in found.values()] == [
        (p.name, p.kind, p.default) for p in expected.values()
    ]


@pytest.mark.parametrize("name", ["world", "start", "sum_over_ranks", "barrier", "stop"])
def test_same_signatures_of_parallel(name):
    found = inspect.signature(getattr(backends.parallel, name)).parameters
    expected = inspect.signature(getattr(contract, name)).parameters
    assert list(found) == list(expected)
