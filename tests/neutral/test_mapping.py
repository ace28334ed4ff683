"""Rules between names: every operation undoes itself, tables are bijections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_convert import mapping
from weight_convert.errors import CheckpointError
from weight_convert.mapping import NameTable, rule
from weight_convert.storage.tensor import Place, Tensor


def lazy(array: np.ndarray, name: str = "x") -> Tensor:
    code = {"f4": "F32", "u2": "BF16", "i8": "I64"}[array.dtype.str[1:]]
    return Tensor(code, array.shape, lambda: array, (Place(Path("file"), 0, name),))


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype="<f4").reshape(shape)


def check_both_ways(op: mapping.Op, arrays: list[np.ndarray], expected: np.ndarray) -> None:
    (stored,) = op.to_stored([lazy(array) for array in arrays])
    assert stored.shape == expected.shape and stored.read().flags.c_contiguous
    assert np.array_equal(stored.read(), expected)
    back = op.to_canonical([stored])
    assert len(back) == len(arrays)
    for tensor, array in zip(back, arrays, strict=True):
        assert tensor.shape == array.shape and tensor.read().flags.c_contiguous
        assert np.array_equal(tensor.read(), array)


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["<f4", "<u2", "<i8"]))
def test_transposed_in_tiles_is_transposed(rows: int, columns: int, dtype: str) -> None:
    array = np.arange(rows * columns).reshape(rows, columns).astype(dtype)
    turned = mapping.transposed(array)
    assert np.array_equal(turned, array.T) and turned.flags.c_contiguous


def test_matrices_turn_and_vectors_do_not() -> None:
    check_both_ways(mapping.TRANSPOSE, [numbered(3, 5)], numbered(3, 5).T)
    check_both_ways(mapping.TRANSPOSE, [numbered(5)], numbered(5))


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([(), (3,), (2, 2)]))
def test_joined_and_interleaved(count: int, rows: int, tail: tuple[int, ...]) -> None:
    whole = numbered(count, rows, *tail)
    arrays = list(whole)
    check_both_ways(mapping.joined(count), arrays, whole.reshape(count * rows, *tail))
    alternating = np.stack([array[i] for i in range(rows) for array in arrays])
    check_both_ways(mapping.interleaved(count), arrays, alternating)


@given(
    st.sampled_from([(1, 1), (4, 4), (4, 2), (8, 1), (6, 3)]),
    st.integers(1, 4),
    st.sampled_from([(), (5,)]),
)
def test_grouped_qkv(heads: tuple[int, int], size: int, tail: tuple[int, ...]) -> None:
    count, kv = heads
    query = numbered(count * size, *tail)
    key, value = (numbered(kv * size, *tail) + start for start in (1000, 2000))
    blocks = []
    for g in range(kv):
        per_group = count // kv
        blocks += [query[(g * per_group + j) * size :][:size] for j in range(per_group)]
        blocks += [key[g * size :][:size], value[g * size :][:size]]
    op = mapping.grouped_qkv(count, kv)
    check_both_ways(op, [query, key, value], np.concatenate(blocks))
    if tail:
        turned = mapping.then(op, mapping.TRANSPOSE)
        check_both_ways(turned, [query, key, value], np.concatenate(blocks).T)


def test_several_dtypes_in_one_tensor_are_refused() -> None:
    pair = [lazy(numbered(2, 2), "a"), lazy(np.zeros((2, 2), "<u2"), "b")]
    with pytest.raises(CheckpointError, match="different dtypes") as caught:
        mapping.joined(2).to_stored(pair)
    assert "--dtype" in str(caught.value) and "b BF16" in str(caught.value)


@pytest.mark.parametrize(
    ("op", "arrays"),
    [
        (mapping.joined(2), [numbered(2, 2), numbered(3, 2)]),
        (mapping.grouped_qkv(4, 2), [numbered(8, 3), numbered(8, 3), numbered(4, 3)]),
        (mapping.grouped_qkv(4, 2), [numbered(7, 3), numbered(4, 3), numbered(4, 3)]),
    ],
)
def test_shapes_that_cannot_be_joined(op: mapping.Op, arrays: list[np.ndarray]) -> None:
    with pytest.raises(CheckpointError, match="shape that cannot be"):
        op.to_stored([lazy(array) for array in arrays])


@pytest.mark.parametrize(
    "op", [mapping.joined(3), mapping.interleaved(3), mapping.grouped_qkv(4, 2)]
)
def test_rows_that_cannot_be_cut(op: mapping.Op) -> None:
    with pytest.raises(CheckpointError, match="divide"):
        op.to_canonical([lazy(numbered(10, 2))])


# --- tables --------------------------------------------------------------------------------------

TABLE = NameTable(
    [
        rule("norm.weight", "final.gamma"),
        rule("layers.{n}.mlp.{p}", "blocks.{n}.ffn.{p}"),
        rule(
            [f"layers.{{n}}.{k}.{{p}}" for k in "qkv"],
            "blocks.{n}.qkv.{p}",
            mapping.joined(3),
        ),
    ]
)


def test_a_table_in_both_directions() -> None:
    canonical = {"norm.weight": lazy(numbered(4))}
    for n in (0, 10):
        canonical |= {f"layers.{n}.{k}.weight": lazy(numbered(2, 2) + n) for k in "qkv"}
        canonical[f"layers.{n}.mlp.bias"] = lazy(numbered(2))
    stored = TABLE.to_stored(canonical)
    assert not stored.unnamed and not stored.lacking
    assert set(stored.tensors) == {
        "final.gamma",
        *(f"blocks.{n}.{x}" for n in (0, 10) for x in ("qkv.weight", "ffn.bias")),
    }
    back = TABLE.to_canonical(stored.tensors)
    assert set(back.tensors) == set(canonical)
    for name, tensor in back.tensors.items():
        assert np.array_equal(tensor.read(), canonical[name].read())


def test_what_does_not_fit_is_told() -> None:
    canonical = {
        "norm.bias": lazy(numbered(4)),
        "layers.0.q.weight": lazy(numbered(2, 2)),
        "layers.0.v.weight": lazy(numbered(2, 2)),
    }
    mapped = TABLE.to_stored(canonical)
    assert mapped.unnamed == ["norm.bias"] and not mapped.tensors
    lacking = ["layers.0.k.weight"]
    assert mapped.lacking == {"layers.0.q.weight": lacking, "layers.0.v.weight": lacking}


@pytest.mark.parametrize(
    "rules",
    [
        [rule("a.{n}", "b.{n}"), rule("a.0", "c")],
        [rule("a.{n}", "b.{n}"), rule("c.{n}", "b.{n}")],
        [rule("a.{p}", "b"), rule("c", "d")],
        [rule(["a", "a"], "b", mapping.joined(2))],
    ],
)
def test_a_table_that_is_no_bijection_cannot_be_built(rules: list[mapping.Rule]) -> None:
    with pytest.raises(CheckpointError, match=r"bijection|other variables"):
        NameTable(rules)
