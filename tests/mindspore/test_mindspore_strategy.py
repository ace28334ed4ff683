"""Rank-sharded checkpoints against MindSpore's own tools, which cut and merge on a CPU."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore.parallel import unified_safetensors
from mindspore.parallel._tensor import _load_tensor
from mindspore.train._utils import get_parameter_redundancy, remove_param_redundancy
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from weight_convert.storage import safetensors
from weight_convert.storage.mindspore_ckpt import open_file
from weight_convert.storage.mindspore_strategy import open_ranks, read_strategy
from weight_convert.storage.tensor import Tensor

Axes = Sequence[int | Sequence[int]]
Cut = tuple[Sequence[int], Axes, int, int]
"""(device matrix, tensor map, optimizer shard step, size), in MindSpore's own words"""
Cuts = Mapping[str, Cut]


def save_strategy(path: Path, cuts: Cuts, stage: int = 0) -> str:
    """As MindSpore writes it: nested maps get a message for each axis, and never just one."""
    strategy = ParallelStrategyMap(current_stage=1)
    operator = strategy.parallel_strategy_item.add(node_name="MatMul-op0")
    operator.parallel_strategys.stage = stage
    operator.parallel_strategys.parallel_strategy.add(dim=[1, 1])
    for name, (matrix, axes, step, size) in cuts.items():
        layouts = strategy.parallel_layout_item.add(param_name=name).parallel_layouts
        layouts.dev_matrix.add(dim=matrix)
        nested = any(isinstance(axis, Sequence) for axis in axes)
        for dims in axes if nested else [axes]:
            layouts.tensor_map.add(dim=dims)
        if nested and len(axes) == 1:
            layouts.tensor_map.add()
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field, layouts.opt_weight_shard_step, layouts.opt_weight_shard_size = 0, step, size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(strategy.SerializeToString())
    return str(path)


def assert_same_bits(merged: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (merged[name].dtype, merged[name].shape) == (tensor.dtype, tensor.shape)
        assert merged[name].read().tobytes() == tensor.read().tobytes()


def transform(source: Path, target: Path, before: str | None, after: str | None) -> Path:
    """MindSpore's own re-cutting; None stands for not cut."""
    ms.transform_checkpoints(str(source), str(target), "llava_", before, after)
    return target


def save_whole(
    path: Path, tensors: Mapping[str, ms.Tensor], form: str = "ckpt"
) -> dict[str, Tensor]:
    """The whole model as MindSpore's one-rank checkpoint, and its tensors as we read them."""
    path.parent.mkdir(parents=True)
    named = [{"name": name, "data": tensor} for name, tensor in tensors.items()]
    ms.save_checkpoint(named, str(path), format=form)
    ms.save_checkpoint(named, str(path.parents[1] / "whole.ckpt"))
    return open_file(path.parents[1] / "whole.ckpt")


EIGHT: Cuts = {
    "embedding": ([2, 4], [0, -1], 0, 0),
    "adam_m.embedding": ([2, 4], [0, -1], 4, 2),
    "wq": ([2, 2, 2], [1, 0], 4, -1),
    "wo": ([2, 4], [-1, 0], 4, 2),
    "w1": ([8], [-1, -1], 1, 8),
    "w2": ([8], [-1, -1], 1, 4),
    "w3": ([2, 2, 2], [[1, 0], [-1]], 4, 2),
    "w4": ([4, 2], [[0, 1]], 0, 0),
    "w5": ([2, 4], [[1], [0]], 0, 0),
    "norm": ([2, 4], [-1], 0, 0),
    "half": ([4, 2], [-1, 0], 2, 2),
}


def eight_tensors() -> dict[str, ms.Tensor]:
    chance = np.random.default_rng(3)
    shapes = {name: (16, 8)[: len(cut[1])] for name, cut in EIGHT.items()}
    tensors = {
        name: ms.Tensor(chance.standard_normal(shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    for name, dtype in {"wq": ms.bfloat16, "wo": ms.float16, "w2": ms.bfloat16}.items():
        tensors[name] = tensors[name].astype(dtype)
    return {**tensors, "global_step": ms.Tensor(7)}


def test_what_mindspore_cut_is_whole_again(tmp_path: Path) -> None:
    whole = save_whole(tmp_path / "src" / "rank_0" / "x.ckpt", eight_tensors())
    strategy = save_strategy(tmp_path / "strategy.ckpt", EIGHT)
    cut = transform(tmp_path / "src", tmp_path / "cut", None, strategy)
    assert len(list(cut.iterdir())) == 8
    merged = open_ranks(cut, strategy, compare_copies=True)
    assert_same_bits(merged, whole)
    # MindSpore's own merge gives the same, and needs as many ranks.
    back = transform(cut, tmp_path / "back", strategy, None)
    assert_same_bits(merged, open_file(back / "rank_0" / "llava_0.ckpt"))
    used = {place.path.parent.name for tensor in merged.values() for place in tensor.places}
    assert used == {f"rank_{r}" for r in ms.rank_list_for_transform(0, strategy, None)}


def test_fewer_ranks_are_read_where_fewer_are_needed(tmp_path: Path) -> None:
    cuts: Cuts = {"a": ([2, 4], [0, -1], 0, 0), "b": ([2, 4], [-1], 0, 0)}
    tensors = {"a": ms.Tensor(np.ones((8, 2), np.float32)), "b": ms.Tensor(np.ones(3, np.float32))}
    save_whole(tmp_path / "src" / "rank_0" / "x.ckpt", tensors)
    strategy = save_strategy(tmp_path / "s.ckpt", cuts)
    cut = transform(tmp_path / "src", tmp_path / "cut", None, strategy)
    merged = open_ranks(cut, strategy)
    used = {place.path.parent.name for tensor in merged.values() for place in tensor.places}
    assert used == {f"rank_{r}" for r in ms.rank_list_for_transform(0, strategy, None)}
    assert used == {"rank_0", "rank_1", "rank_2", "rank_3"}


def shares(free: list[int]) -> list[int]:
    """The numbers of ranks over which MindSpore can share an optimizer: whole dimensions that no
    axis uses, the fastest first, and then a divisor of the next.

    Args:
        free: sizes of these dimensions, the fastest first.
    """
    whole, found = 1, []
    for size in free:
        found += [whole * n for n in range(2, size + 1) if size % n == 0]
        whole *= size
    return found


@st.composite
def random_cut(draw: Any, ranks: int, nested: bool) -> Cut:
    """A device matrix and a tensor map of 1 to 3 axes, perhaps with a sharded optimizer."""
    matrix: list[int] = []
    while math.prod(matrix) < ranks:
        rest = ranks // math.prod(matrix)
        matrix.append(draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0])))
    axes: list[list[int]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for dimension in draw(st.permutations(range(len(matrix)))):
        free = axes if nested else [axis for axis in axes if not axis]
        if free and draw(st.booleans()):
            draw(st.sampled_from(free)).append(dimension)
    used = {dimension for axis in axes for dimension in axis}
    corner = tuple(0 if d in used else slice(None) for d in reversed(range(len(matrix))))
    group = sorted(np.arange(ranks).reshape(matrix)[corner].reshape(-1).tolist())
    free = [matrix[-1 - dimension] for dimension in range(len(matrix)) if dimension not in used]
    sizes = [-1, *shares(free)]
    size = draw(st.sampled_from([0, *sizes])) if len(group) > 1 else 0
    step = (group[-1] - group[0]) // (len(group) - 1) if size else 0
    flat = [axis[0] if axis else -1 for axis in axes]
    return matrix, [axis or [-1] for axis in axes] if nested else flat, step, size


def mindspore_transforms_wrongly(cut: Cut) -> bool:
    """Cuts that MindSpore 2.10's transform takes for others than its training makes.

    Where the optimizer is sharded over the first dimension and all others cut the tensor, its
    `_construct_tensor_layout_for_opt_shard` lets these follow the axes of the tensor, whatever the
    tensor map says: [0, 1] is taken for [1, 0].
    """
    matrix, axes, _, size = cut
    used = [axis for axis in axes if axis != -1]
    shared = [d for d in range(len(matrix)) if len(matrix) - 1 - d not in used]
    return bool(size) and shared == [0] and used != sorted(used, reverse=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.sampled_from([2, 4, 6, 8]), nested=st.booleans())
def test_random_cuts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ranks: int, nested: bool
) -> None:
    root = tmp_path_factory.mktemp("cuts")
    cuts = {
        f"t{i}": data.draw(random_cut(ranks, nested)) for i in range(data.draw(st.integers(1, 4)))
    }
    if not nested:
        cuts = {name: cut for name, cut in cuts.items() if not mindspore_transforms_wrongly(cut)}
    if not cuts:
        return
    chance = np.random.default_rng(4)
    tensors = {}
    for name, (_, axes, _, _) in cuts.items():
        shape = [ranks * (2 if axis == 0 else 1) for axis in range(len(axes))]
        tensors[name] = ms.Tensor(chance.standard_normal(shape).astype(np.float32))
    whole = save_whole(root / "src" / "rank_0" / "x.ckpt", tensors)
    strategy = save_strategy(root / "strategy.ckpt", cuts)
    cut = transform(root / "src", root / "cut", None, strategy)
    assert_same_bits(open_ranks(cut, strategy, compare_copies=True), whole)
    shutil.rmtree(root)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.sampled_from([2, 4, 6, 8, 12, 16]))
def test_who_holds_the_same_slice(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ranks: int
) -> None:
    """MindSpore's redundancy groups are the ranks to which we give the same slot, for any cut."""
    root = tmp_path_factory.mktemp("groups")
    cuts = {}
    for name in "abc":
        matrix, axes, step, size = data.draw(random_cut(ranks, nested=False))
        cuts[name] = (matrix, axes, step * (size > 0), max(size, 0))
    strategy = save_strategy(root / "strategy.ckpt", cuts)
    ours = read_strategy(strategy).stages[0]
    for name, theirs in get_parameter_redundancy(strategy, initial_rank=0).items():
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, slot in enumerate(ours[name].slots()):
            groups.setdefault(slot, []).append(rank)
        assert sorted(map(tuple, groups.values())) == sorted(theirs)


def cut_as_training_does(directory: Path, array: np.ndarray, cut: Cut) -> str:
    """Every rank's slice, from the function with which MindSpore slices parameters for training.

    `_load_tensor_by_layout` needs a running group for the optimizer's share; it is taken here from
    the groups that `get_parameter_redundancy` gives. Returns the path of the strategy.
    """
    matrix, axes, step, size = cut
    strategy = save_strategy(directory / "strategy.ckpt", {"w": cut})
    plain = save_strategy(directory / "plain.ckpt", {"w": (matrix, axes, 0, 0)})
    for group in get_parameter_redundancy(plain, initial_rank=0)["w"]:
        for position, rank in enumerate(group):
            part = _load_tensor(ms.Tensor(array), list(matrix), list(axes), rank_id=rank)
            if size:
                shards = len(group) if size == -1 else size
                part = np.split(part, shards)[position % shards]
            path = directory / "cut" / f"rank_{rank}" / "x.ckpt"
            path.parent.mkdir(parents=True)
            ms.save_checkpoint([{"name": "w", "data": ms.Tensor(part)}], str(path))
    return strategy


@settings(max_examples=30, deadline=None)
@given(data=st.data(), ranks=st.sampled_from([2, 4, 6, 8]))
def test_what_training_cut_is_whole_again(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ranks: int
) -> None:
    root = tmp_path_factory.mktemp("training")
    cut = data.draw(random_cut(ranks, nested=False))
    shape = [ranks * (2 if axis == 0 else 1) for axis in range(len(cut[1]))]
    array = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    strategy = cut_as_training_does(root, array, cut)
    merged = open_ranks(root / "cut", strategy, compare_copies=True)
    assert np.array_equal(merged["w"].read(), array)
    shutil.rmtree(root)


def test_what_training_cut_and_mindspore_transforms_wrongly(tmp_path: Path) -> None:
    cut: Cut = ([2, 2, 2], [0, 1], 4, -1)
    assert mindspore_transforms_wrongly(cut)
    array = np.arange(32, dtype=np.float32).reshape(8, 4)
    strategy = cut_as_training_does(tmp_path, array, cut)
    assert np.array_equal(open_ranks(tmp_path / "cut", strategy)["w"].read(), array)
    back = transform(tmp_path / "cut", tmp_path / "back", strategy, None)
    theirs = open_file(back / "rank_0" / "llava_0.ckpt")["w"].read()
    assert theirs.shape == array.shape
    assert not np.array_equal(theirs, array)


PIPELINE: tuple[Cuts, Cuts] = (
    {"embed": ([2, 2], [0, -1], 0, 0), "layers.0": ([2, 2], [-1, 0], 2, 2)},
    {
        "layers.1": ([2, 2], [-1, 0], 2, 2),
        "norm": ([2, 2], [-1], 0, 0),
        "head": ([4], [0, -1], 0, 0),
    },
)


def test_pipeline_stages(tmp_path: Path) -> None:
    chance = np.random.default_rng(6)
    names = {name: len(cut[1]) for cuts in PIPELINE for name, cut in cuts.items()}
    tensors = {
        name: ms.Tensor(chance.standard_normal((8, 4)[:axes]).astype(np.float32))
        for name, axes in names.items()
    }
    whole = save_whole(tmp_path / "src" / "rank_0" / "x.ckpt", tensors)
    for stage, cuts in enumerate(PIPELINE):
        for rank in range(4 * stage, 4 * stage + 4):
            path = tmp_path / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt"
            save_strategy(path, cuts, stage)
    merged_file = str(tmp_path / "merged.ckpt")
    ms.merge_pipeline_strategys(str(tmp_path / "strategy"), merged_file)
    assert read_strategy(merged_file) == read_strategy(tmp_path / "strategy")
    cut = transform(tmp_path / "src", tmp_path / "cut", None, merged_file)
    assert [sorted(open_file(cut / f"rank_{r}" / f"llava_{r}.ckpt")) for r in (0, 7)] == [
        sorted(cuts) for cuts in PIPELINE
    ]
    for strategy in (merged_file, tmp_path / "strategy"):
        assert_same_bits(open_ranks(cut, strategy, compare_copies=True), whole)
    back = transform(cut, tmp_path / "back", merged_file, None)
    assert_same_bits(open_ranks(cut, merged_file), open_file(back / "rank_0" / "llava_0.ckpt"))


def test_json_strategies_that_mindspore_merged(tmp_path: Path) -> None:
    for stage, cuts in enumerate(PIPELINE):
        items = {
            name: {
                "dev_matrix": matrix,
                "tensor_map": axes,
                "tensor_shape": [8, 4],
                "field": 0,
                "opt_weight_shard_step": step,
                "opt_weight_shard_size": size,
            }
            for name, (matrix, axes, step, size) in cuts.items()
        }
        operators = {f"MatMul-op{stage}": {"stage": stage, "parallel_strategy": [[1, 1]]}}
        strategy = {"parallel_layout_item": items, "parallel_strategy_item": operators}
        save_strategy(tmp_path / "protobuf" / f"{stage}.ckpt", cuts, stage)
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / f"{stage}.json").write_text(json.dumps(strategy))
    ms.merge_pipeline_strategys(str(tmp_path / "json"), str(tmp_path / "merged.json"))
    expected = read_strategy(tmp_path / "protobuf")
    assert read_strategy(tmp_path / "merged.json") == expected
    assert read_strategy(tmp_path / "json") == expected


def test_unified_safetensors(tmp_path: Path) -> None:
    """Ranks in safetensors, made from `.ckpt` ranks by MindSpore's loading and saving.

    Its `transform_checkpoints` is not asked for safetensors: it hands NumPy views to a `save_file`
    that wants contiguous arrays, and what is cut along axis 1 comes out wrong.
    """
    whole = save_whole(tmp_path / "src" / "rank_0" / "x.ckpt", eight_tensors())
    strategy = save_strategy(tmp_path / "strategy.ckpt", EIGHT)
    cut = transform(tmp_path / "src", tmp_path / "cut", None, strategy)
    for path in cut.glob("*/*.ckpt"):
        loaded = [{"name": n, "data": t} for n, t in ms.load_checkpoint(str(path)).items()]
        ms.save_checkpoint(loaded, str(path.with_suffix(".safetensors")), format="safetensors")
        path.unlink()
    merged = open_ranks(cut, strategy, compare_copies=True)
    assert_same_bits(merged, whole)
    unified_safetensors(str(cut), strategy, str(tmp_path / "unified"))
    theirs = safetensors.open_file(tmp_path / "unified" / "part0.safetensors").tensors()
    rest = safetensors.open_file(tmp_path / "unified" / "hyper_param.safetensors").tensors()
    assert rest.keys() == {"global_step"}
    assert_same_bits(merged, theirs | rest)


def test_without_redundancy(tmp_path: Path) -> None:
    """MindSpore decides which rank keeps which slice, and merges them; we give the same."""
    tensors = {name: tensor for name, tensor in eight_tensors().items() if name in ("wo", "norm")}
    cuts = {"wo": ([2, 4], [-1, 0], 0, 0), "norm": EIGHT["norm"]}
    whole = save_whole(tmp_path / "src" / "rank_0" / "x.ckpt", tensors)
    strategy = save_strategy(tmp_path / "strategy.ckpt", cuts)
    cut = transform(tmp_path / "src", tmp_path / "cut", None, strategy)
    kept = remove_param_redundancy(get_parameter_redundancy(strategy, initial_rank=0))
    counts = []
    for rank in range(8):
        loaded = ms.load_checkpoint(str(cut / f"rank_{rank}" / f"llava_{rank}.ckpt"))
        named = [{"name": n, "data": t} for n, t in loaded.items() if n in kept.get(rank, ())]
        counts.append(len(named))
        path = tmp_path / "single" / f"rank_{rank}" / f"llava_{rank}.safetensors"
        path.parent.mkdir(parents=True)
        # A rank that keeps nothing still has a file.
        named = named or [{"name": "global_step", "data": ms.Tensor(1)}]
        ms.save_checkpoint(named, str(path), format="safetensors", remove_redundancy=True)
    assert sum(counts) == 5
    merged = open_ranks(tmp_path / "single", strategy)
    assert_same_bits({name: merged[name] for name in whole}, whole)
    unified_safetensors(
        str(tmp_path / "single"), strategy, str(tmp_path / "unified"), merge_with_redundancy=False
    )
    theirs = safetensors.open_file(tmp_path / "unified" / "part0.safetensors").tensors()
    assert_same_bits({name: merged[name] for name in theirs}, theirs)
    assert theirs.keys() == whole.keys()


def test_rows_chosen_by_hand(tmp_path: Path) -> None:
    """`merge_sliced_parameter`, the only tool of MindSpore that knows unequal slices."""
    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    strategy = ParallelStrategyMap(current_stage=1)
    layouts = strategy.parallel_layout_item.add(param_name="table").parallel_layouts
    layouts.dev_matrix.add(dim=[2, 3])
    layouts.tensor_map.add(dim=[0, -1])
    layouts.param_split_shape.add(dim=[1, 5, 4])
    layouts.indices_offset.add(dim=[0, 1, 6])
    layouts.field = layouts.opt_weight_shard_step = layouts.opt_weight_shard_size = 0
    (tmp_path / "s.ckpt").write_bytes(strategy.SerializeToString())
    slices = []
    for rank in range(6):
        rows = ms.Tensor(np.split(table, [1, 6])[rank % 3])
        slices.append(ms.Parameter(rows, name="table"))
        (tmp_path / "c" / f"rank_{rank}").mkdir(parents=True)
        named = [{"name": "table", "data": rows}]
        ms.save_checkpoint(named, str(tmp_path / "c" / f"rank_{rank}" / "x.ckpt"))
    theirs = ms.merge_sliced_parameter(slices, {"table": layouts})
    ours = open_ranks(tmp_path / "c", tmp_path / "s.ckpt", compare_copies=True)["table"].read()
    assert np.array_equal(theirs.asnumpy(), ours)
    assert np.array_equal(ours, table)
