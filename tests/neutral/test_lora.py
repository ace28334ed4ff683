"""Adapters without a framework: which layers, first values, few bits, dropout, `merge`."""

from __future__ import annotations

import dataclasses
import tracemalloc
from fnmatch import fnmatch

import numpy as np
import pytest

from backends.quantised import KINDS, LEVELS, dequantise, layout, quantise
from tests.training_cases import llava_spec
from unillava.errors import ConfigError
from unillava.spec import parameter_table
from unillava.training import lora
from unillava.training.groups import trained_groups, trained_names
from unillava.training.recipe import Lora, read_recipe

SPEC = llava_spec()
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def recipe(**parts: object) -> object:
    return read_recipe(
        {
            "output": "out",
            "model": {"path": "model"},
            "data": {"files": [{"path": "train.json"}]},
            "rates": {"language": 2e-4, "projector": 2e-5},
            "steps": {"batch": 8},
            **parts,
        }
    )


# --- which layers ----------------------------------------------------------------------------


def test_by_default_every_projection_of_the_decoder_is_adapted() -> None:
    chosen = lora.adapter_spec(SPEC, Lora(rank=4, alpha=8)).modules
    assert len(chosen) == SPEC.text.num_layers * len(LAYERS)
    assert {name.rpartition(".")[2] for name in chosen} == set(LAYERS)
    assert not any("lm_head" in name or "vision" in name for name in chosen)


@pytest.mark.parametrize(
    "patterns",
    [
        ["*.q_proj"],
        ["model.layers.1.*"],
        ["*.self_attn.[qv]_proj", "*.0.mlp.down_proj"],
        ["model.layers.0.self_attn.o_proj"],
    ],
)
def test_patterns_are_of_whole_paths(patterns: list[str]) -> None:
    chosen = lora.adapter_spec(SPEC, Lora(targets=tuple(patterns))).modules
    every = lora.linear_layers(SPEC)
    assert chosen == {n for n in every if any(fnmatch(n, pattern) for pattern in patterns)}
    assert 0 < len(chosen) < len(every)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("q_proj", "q_proj"),  # a name that contains it is not enough
        ("*.self_attn.qproj", "self_attn.q_proj"),
        ("lm_head", ""),
        ("model.embed_tokens", ""),
        ("language_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lora.adapter_spec(SPEC, Lora(targets=("*.v_proj", pattern)))
    assert repr(pattern) in str(caught.value) and near in caught.value.given


def test_the_table_of_adapters() -> None:
    table = lora.adapter_table(SPEC, Lora(rank=5, targets=("*.1.mlp.down_proj",)))
    name = "language_model.model.layers.1.mlp.down_proj"
    inner, width = SPEC.text.intermediate_size, SPEC.text.hidden_size
    assert table == {f"{name}.lora_A.weight": (5, inner), f"{name}.lora_B.weight": (width, 5)}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_the_scale(rslora: bool, scale: float) -> None:
    assert lora.adapter_spec(SPEC, Lora(rank=4, alpha=16, rslora=rslora)).scale == scale


def test_groups_train_adapters_in_place_of_the_language_model() -> None:
    chosen = recipe(lora={"rank": 4, "alpha": 8}, optimizer={"weight_decay": 0.1})
    groups = trained_groups(SPEC, chosen)
    assert [group.name for group in groups] == ["language", "projector", "projector.undecayed"]
    assert groups[0].parameters == tuple(lora.adapter_table(SPEC, chosen.lora))
    rest = trained_names(groups[1:])
    assert rest and all(name in parameter_table(SPEC) for name in rest)


@pytest.mark.parametrize(
    "parts",
    [
        {"lora": {"rank": 0}},
        {"lora": {"dropout": 1.0}},
        {"lora": {"targets": []}},
        {"lora": {"base": "int3"}},
        {"lora": {}, "rates": {"projector": 1e-3}},
    ],
)
def test_settings_that_cannot_be(parts: dict) -> None:
    with pytest.raises(ConfigError, match="lora"):
        recipe(**parts)


# --- first values and dropout ----------------------------------------------------------------


def test_first_values_are_pefts_distribution_and_the_seeds() -> None:
    table = lora.adapter_table(SPEC, Lora(rank=64, alpha=8))
    values = dict(lora.first_values(table, 1))
    again, other = dict(lora.first_values(table, 1)), dict(lora.first_values(table, 2))
    assert values.keys() == table.keys()
    for name, value in values.items():
        assert value.shape == table[name] and value.dtype == np.float32
        np.testing.assert_array_equal(value, again[name])
        if "lora_B" in name:
            assert not value.any()
            continue
        bound = 1 / np.sqrt(table[name][1])
        assert 0.97 * bound < np.abs(value).max() <= bound and (value != other[name]).any()
        assert abs(value.std() - bound / np.sqrt(3)) < 0.05 * bound
    firsts = [value for name, value in values.items() if name.endswith("q_proj.lora_A.weight")]
    assert (firsts[0] != firsts[1]).any()


def noise(ids: np.ndarray, step: int, **settings: object) -> dict[str, np.ndarray]:
    arrays = {"input_ids": ids, "segment_ids": (ids > 0).astype(np.int64)}
    chosen = recipe(lora={"dropout": 0.1, **settings})
    return lora.dropout_noise(arrays, SPEC, chosen, step)


def test_noise_belongs_to_the_row_not_to_its_place() -> None:
    """So a run with other ranks, micro-batches or padding drops the same."""
    ids = np.array([[5, 6, 7, 0], [8, 9, 0, 0]])
    both = noise(ids, 3)
    turned = noise(np.pad(ids[::-1], ((0, 0), (0, 2))), 3)
    for n in range(2):
        np.testing.assert_array_equal(turned["noise_rows"][1 - n, :4], both["noise_rows"][n])
    np.testing.assert_array_equal(turned["noise_columns"], both["noise_columns"])
    assert both["noise_columns"].shape == (SPEC.text.intermediate_size,)
    later = noise(ids, 4)
    assert (later["noise_rows"] != both["noise_rows"]).all()
    assert (both["noise_rows"][0] != both["noise_rows"][1]).all()
    assert noise(ids, 3, dropout=0.0) == {}


def test_dropout_drops_its_share_evenly() -> None:
    """Of rows, of columns, and of pairs of columns and layers as if they were independent."""
    from backends.contract import dropout

    rng = np.random.default_rng(0)
    odd = lambda *shape: rng.integers(-(2**30), 2**30, shape) * 2 + 1  # noqa: E731
    rows, columns = odd(4000), odd(256)
    x = np.ones((4000, 256))
    first, second = (dropout(x, rows, columns, salt, 0.2) == 0 for salt in (12345, -777777))
    assert abs(first.mean() - 0.2) < 2e-3
    assert np.abs(first.mean(0) - 0.2).max() < 5 * np.sqrt(0.16 / 4000)
    assert np.abs(first.mean(1) - 0.2).max() < 6 * np.sqrt(0.16 / 256)
    together = (first.astype(float).T @ first) / 4000
    off = together[~np.eye(256, dtype=bool)]
    assert abs(off.mean() - 0.04) < 1e-3 and np.quantile(np.abs(off - 0.04), 0.99) < 0.01
    assert abs((first & second).mean() - 0.04) < 2e-3
    np.testing.assert_allclose(dropout(x, rows, columns, 1, 0.2).max(), 1.25)


# --- few bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_becomes_the_nearest_that_can_be_stored(kind: str) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 192)).astype(np.float32)
    weight[3] = 0
    codes, scale = quantise(weight, kind)
    assert {"codes": (codes.shape, codes.dtype.name), "scale": (scale.shape, "float32")} == layout(
        192, 7, kind
    )
    levels = np.arange(-127, 128) / 127 if kind == "int8" else np.array(LEVELS[kind])
    wide = np.repeat(scale, 192 // scale.shape[1], axis=1).astype(np.float64)
    nearest = np.abs(weight[..., None] - wide[..., None] * levels).min(-1)
    error = np.abs(dequantise(codes, scale, kind) - weight)
    np.testing.assert_allclose(error, nearest, atol=1e-6)
    assert not dequantise(codes, scale, kind)[3].any()


def test_bfloat16_bits_are_read_as_such() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
    rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    for found, expected in zip(quantise(bits, "nf4"), quantise(rounded, "nf4"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_nf4_is_bitsandbytes() -> None:
    """What bitsandbytes 0.50.2 makes of this weight: `functional.quantize_4bit`, blocks of 64."""
    weight = (np.arange(128) * 37 % 101 - 50).astype(np.float32).reshape(2, 64) / np.float32(7)
    codes, scale = quantise(weight, "nf4")
    assert codes.tobytes().hex() == GOLDEN
    np.testing.assert_array_equal(scale[:, 0], np.abs(weight).max(1))


GOLDEN = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
    "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
)


def test_weights_are_as_small_as_they_should_be() -> None:
    spec = dataclasses.replace(
        SPEC, text=dataclasses.replace(SPEC.text, hidden_size=256, intermediate_size=512)
    )
    for kind in ("nf4", "int4"):
        stored = lora.stored_bits(spec, kind)
        assert {bits for name, bits in stored.items() if "o_proj" not in name} == {4.5}
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    assert lora.stored_bits(spec, "int8")[name] == 8 + 32 / 512
    assert lora.stored_bits(spec, "full") == {}


def test_the_model_is_never_held_in_full() -> None:
    """Streaming holds a tensor, its codes, and the blocks that are worked on."""
    names = [f"language_model.model.layers.{n}.mlp.up_proj.weight" for n in range(12)]

    def stream():
        for name in names:
            yield name, np.ones((1024, 1024), np.float16), False
        yield "language_model.model.norm.weight", np.ones(1024, np.float16), False

    tracemalloc.start()
    kept = {name: array for name, array, _ in lora.in_few_bits(stream(), "nf4")}
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    weights = 12 * 2**20
    assert set(kept) == {
        *(n.replace("weight", end) for n in names for end in ("codes", "scale")),
        "language_model.model.norm.weight",
    }
    assert held < 1.01 * weights * 4.5 / 8 + 2**16
    assert peak - held < 40 * 2**20 < 12 * 4 * 2**20


def test_a_matrix_that_cannot_be_packed_is_named() -> None:
    odd = dataclasses.replace(SPEC, text=dataclasses.replace(SPEC.text, intermediate_size=47))
    with pytest.raises(ConfigError, match="down_proj"):
        lora.adapter_spec(odd, Lora(base="nf4"))
    assert lora.adapter_spec(odd, Lora(base="int8")).base == "int8"
