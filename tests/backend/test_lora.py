"""Adapters in the model on this backend: what they compute, their gradients, what is trained.

The judge is the same model without adapters, whose weights were merged or read back in NumPy:
with W' = W + s B A, a gradient G of W' gives s B^T G for A and s G A^T for B.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import backends
from backends.contract import AdamW, Group, dropout
from backends.quantised import dequantise, quantise
from tests.training_cases import Case, llava, llava_spec, state_of
from unillava.training.lora import LOW, adapter_spec, adapter_table, in_few_bits, stored_bits
from unillava.training.recipe import Lora

SPEC = llava_spec()
BASES = ("full", "int8", "nf4")
ONE = Lora(rank=4, alpha=6, targets=("*.self_attn.[qo]_proj", "*.1.mlp.*_proj"))


def with_adapters(lora: Lora, seed: int = 7) -> tuple[Case, dict[str, np.ndarray]]:
    """The tiny LLaVA with adapters that are not zero, and the weights that it amounts to."""
    plain, table, rng = llava(), adapter_table(SPEC, lora), np.random.default_rng(seed)
    low = {n: (rng.standard_normal(s) * 0.2).astype(np.float32) for n, s in table.items()}
    stream = ((name, array, False) for name, array in plain.values.items())
    held = {name: array for name, array, _ in in_few_bits(stream, lora.base)}
    scale, merged = adapter_spec(SPEC, lora).scale, dict(plain.values)
    for name in stored_bits(SPEC, lora.base):
        merged[name] = dequantise(*quantise(plain.values[name], lora.base), lora.base)
    for name in table:
        if name.endswith(LOW[0]):
            module = name.removesuffix(LOW[0])
            merged[f"{module}.weight"] = (
                merged[f"{module}.weight"] + scale * low[module + LOW[1]] @ low[name]
            ).astype(np.float32)
    return adapted(plain, lora, {**held, **low}, tuple(table)), merged


def adapted(plain: Case, lora: Lora, values: dict, names: tuple[str, ...]) -> Case:
    from unillava.models.llava import LlavaForTraining

    return dataclasses.replace(
        plain,
        factory=lambda: LlavaForTraining(SPEC, adapter_spec(SPEC, lora)),
        values=values,
        groups=(Group("language", names),),
        rates={"language": 1e-2},
    )


def tensors(runtime, inputs):
    return [
        None if a is None else runtime.tensor32(a) if a.dtype == np.float64 else runtime.tensor(a)
        for a in inputs
    ]


def close(found, expected, bar=1e-5):
    size = np.abs(expected).max()
    assert np.abs(found - expected).max() <= bar * size, np.abs(found - expected).max() / size


@pytest.mark.parametrize("base", BASES)
def test_an_adapted_model_is_the_merged_one(base, runtime):
    """The loss, and the gradients of every A and B; weights in few bits are constants."""
    lora = dataclasses.replace(ONE, base=base)
    case, merged = with_adapters(lora)
    (inputs,) = case.batches(0, 1)
    plain = llava()
    judge = dataclasses.replace(plain, values=merged).build(runtime)
    expected, slopes = runtime.value_and_grad(lambda *a: judge(*a), judge)(
        *tensors(runtime, inputs)
    )
    module = case.build(runtime, case.trained)
    engine = backends.training.Engine(module, case.groups, AdamW())
    assert engine.accumulate(inputs, 1.0) == pytest.approx(expected, rel=1e-5)
    engine.update({"language": 0.0})
    scale, rest = adapter_spec(SPEC, lora).scale, 1 - AdamW().beta1
    moments = {n: a / rest for (n, kind), a in state_of(engine).items() if kind == "exp_avg"}
    assert set(moments) == set(case.trained)
    for name in case.trained:
        module_name = name.removesuffix(LOW[0]).removesuffix(LOW[1])
        slope = slopes[f"{module_name}.weight"]
        a, b = (case.values[module_name + end] for end in LOW)
        wanted = scale * b.T @ slope if name.endswith(LOW[0]) else scale * slope @ a.T
        close(moments[name], wanted, 3e-5)


@pytest.mark.parametrize("base", ["full", "int4"])
def test_only_adapters_are_trained(base, runtime):
    lora = dataclasses.replace(ONE, base=base)
    case, _ = with_adapters(lora)
    module = case.build(runtime, case.trained)
    engine = backends.training.Engine(module, case.groups, AdamW())
    first = engine.accumulate(case.batches(0, 1)[0], 1.0)
    engine.update(case.rates)
    assert engine.accumulate(case.batches(0, 1)[0], 1.0) < first
    assert {name for name, _ in state_of(engine)} == set(case.trained)
    for name, value in case.values.items():
        found = runtime.fetch(module, name)
        assert (found != value).any() if name in case.trained else (found == value).all(), name


def test_adapters_of_one_layer_drop_their_input(nn, ops, runtime):
    """`LoraLinear` by itself against NumPy: W x + s B (A drop(x)), and every gradient."""
    from unillava.models.lora import LoraLinear, salt_of

    spec = adapter_spec(SPEC, Lora(rank=3, alpha=6, dropout=0.3))
    layer = runtime.build(lambda: LoraLinear(8, 5, True, spec, "some.path"))
    rng = np.random.default_rng(0)
    shapes = runtime.parameter_shapes(layer)
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    for name, value in values.items():
        runtime.assign(layer, name, value)
    x, weights = (rng.standard_normal(s).astype(np.float32) for s in ((2, 6, 8), (2, 6, 5)))
    rows, columns = (rng.integers(-(2**30), 2**30, s) * 2 + 1 for s in ((2, 6), (11,)))

    def loss(x, rows, columns, weights):
        return ops.reduce_sum(ops.reshape(layer(x, (rows, columns)) * weights, (-1,)), 0)

    arrays = (x, rows, columns, weights)
    value, slopes = runtime.value_and_grad(loss, layer)(*map(runtime.tensor, arrays))
    w, bias, a, b = (values[n] for n in ("weight", "bias", "lora_A.weight", "lora_B.weight"))
    seen = dropout(x, rows, columns[:8], salt_of("some.path"), 0.3)
    assert 0.1 < (seen == 0).mean() < 0.5
    expected = x @ w.T + bias + 2 * (seen @ a.T) @ b.T
    assert value == pytest.approx(float((expected * weights).sum()), rel=1e-5)
    close(slopes["lora_A.weight"], 2 * np.einsum("nso,or,nsi->ri", weights, b, seen))
    close(slopes["lora_B.weight"], 2 * np.einsum("nso,ri,nsi->or", weights, a, seen))
    still = runtime.numpy(layer(runtime.tensor(x)))
    close(still, x @ w.T + bias + 2 * (x @ a.T) @ b.T)


@pytest.mark.parametrize("how", ["recompute", "compiled"])
def test_recomputed_and_compiled_it_is_the_same(how, runtime):
    """With dropout and few bits: the second run of a layer drops what the first did."""
    few = Lora(rank=2, dropout=0.25, targets=("*.1.self_attn.[qo]_proj",), base="nf4")
    case, _ = with_adapters(few)
    (inputs,) = case.batches(0, 1)
    rng = np.random.default_rng(3)
    noise = [rng.integers(-(2**30), 2**30, s) * 2 + 1 for s in (inputs[0].shape, (48,))]
    found = []
    for changed in (False, True):
        module = case.build(runtime, case.trained)
        if changed and how == "recompute":
            for block in module.language_model.model.layers:
                runtime.recompute(block)
        compiled = changed and how == "compiled" and backends.NAME != "torch"
        engine = backends.training.Engine(module, case.groups, AdamW(), compiled=compiled)
        loss = engine.accumulate([*inputs, *noise], 1.0)
        engine.update({"language": 0.0})
        found.append((loss, {k: v for k, v in state_of(engine).items() if k[1] == "exp_avg"}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for key, value in found[0][1].items():
        close(found[1][1][key], value)
    (quiet,) = (engine.accumulate(inputs, 1.0),)
    assert abs(quiet - loss) > 1e-3 * abs(loss)


def size_of(parameter) -> int:
    """Bytes, in whichever framework."""
    count = int(np.prod(tuple(parameter.shape)))
    bits = {"int8": 8, "uint8": 8, "float32": 32}
    return count * bits[str(parameter.dtype).lower().rpartition(".")[2]] // 8


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_the_weights_take_what_they_should(base, runtime):
    case, _ = with_adapters(dataclasses.replace(ONE, base=base))
    module = case.build(runtime, case.trained)
    owners = [
        (getattr(block, part), name)
        for block in module.language_model.model.layers
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in (f"{n}_proj" for n in names)
    ]
    layers = [getattr(owner, name) for owner, name in owners]
    assert not any(hasattr(layer, "weight") for layer in layers)
    found = sum(size_of(layer.codes) + size_of(layer.scale) for layer in layers)
    bits, plain = stored_bits(SPEC, base), llava().values
    assert found == sum(plain[name].size * each for name, each in bits.items()) / 8
    assert len(layers) == len(bits)
