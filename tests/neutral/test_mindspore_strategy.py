"""Rank-sharded MindSpore checkpoints without MindSpore: layouts, merging, choice of files, damage.

What MindSpore itself cuts and merges is compared in tests/mindspore/test_mindspore_strategy.py.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_convert.errors import CheckpointError
from weight_convert.storage import mindspore_ckpt, safetensors
from weight_convert.storage.mindspore_strategy import Layout, open_ranks, read_strategy
from weight_convert.storage.tensor import NUMPY_DTYPES, Tensor

Tensors = dict[str, tuple[str, np.ndarray]]
"""name -> (dtype code, array; bfloat16 as uint16)"""


# --- an encoder of its own --------------------------------------------------------------------


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def block(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return varint(field * 8) + varint(value % 2**64)


def numbers(field: int, values: Iterable[int]) -> bytes:
    return block(field, b"".join(number(1, value) for value in values))


def encode_layout(layout: Layout) -> bytes:
    """As MindSpore writes it: one flat tensor map, or one for each axis if an axis needs more."""
    if all(len(axis) < 2 for axis in layout.tensor_map):
        maps = numbers(2, [axis[0] if axis else -1 for axis in layout.tensor_map])
    else:
        maps = b"".join(numbers(2, axis or [-1]) for axis in layout.tensor_map)
        maps += block(2, b"") if len(layout.tensor_map) == 1 else b""
    return (
        numbers(1, layout.dev_matrix)
        + maps
        + numbers(3, layout.param_split_shape)
        + numbers(4, layout.param_split_shape)
        + number(5, layout.field)
        + number(6, layout.opt_weight_shard_step)
        + number(7, layout.opt_weight_shard_size)
    )


def encode_strategy(layouts: Mapping[str, Layout], stage: int | None = 0) -> bytes:
    operator = block(1, b"MatMul-0") + block(2, number(1, stage or 0) + numbers(2, [1, 1]))
    items = (
        block(3, block(1, name.encode()) + block(2, encode_layout(layout)))
        for name, layout in layouts.items()
    )
    return number(1, 1) + block(2, operator) * (stage is not None) + b"".join(items)


def json_strategy(layouts: Mapping[str, Layout], stage: int = 0) -> str:
    items = {
        name: {
            "dev_matrix": list(layout.dev_matrix),
            "tensor_map": [list(a) if len(a) > 1 else [*a, -1][0] for a in layout.tensor_map],
            "tensor_shape": [1],
            "field": layout.field,
            "opt_weight_shard_step": layout.opt_weight_shard_step,
            "opt_weight_shard_size": layout.opt_weight_shard_size,
            "param_split_shape": list(layout.param_split_shape),
            "indices_offset": list(layout.param_split_shape),
        }
        for name, layout in layouts.items()
    }
    operators = {"MatMul-0": {"stage": stage, "parallel_strategy": [[1, 1]]}}
    return json.dumps({"parallel_layout_item": items, "parallel_strategy_item": operators})


# --- an independent reference: what each rank holds -------------------------------------------


def cut(whole: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """The slices of a tensor, in order of rank, from the definitions and with NumPy's means."""
    grid = np.arange(math.prod(layout.dev_matrix)).reshape(layout.dev_matrix)
    dims = len(layout.dev_matrix)
    slices: list[Any] = [None] * grid.size
    for rank in range(grid.size):
        coordinate = np.unravel_index(rank, layout.dev_matrix)
        part = whole
        for axis, cutters in enumerate(layout.tensor_map):
            for d in cutters:
                pieces = layout.dev_matrix[dims - 1 - d]
                part = np.split(part, pieces, axis)[coordinate[dims - 1 - d]]
        slices[rank] = part
    if layout.opt_weight_shard_size:
        used = [dims - 1 - d for axis in layout.tensor_map for d in axis]
        free = [d for d in range(dims) if d not in used]
        groups = np.transpose(grid, used + free).reshape(-1, math.prod(grid.shape[d] for d in free))
        size = layout.opt_weight_shard_size
        for group in groups.reshape(-1, groups.shape[1] if size == -1 else size):
            for position, rank in enumerate(group):
                slices[rank] = np.split(slices[rank], len(group))[position]
    return slices


def with_shards(layout: Layout, size: int) -> Layout:
    """The layout with the optimizer sharded; the step as MindSpore computes it."""
    used = {d for axis in layout.tensor_map for d in axis}
    dims = len(layout.dev_matrix)
    grid = np.arange(math.prod(layout.dev_matrix)).reshape(layout.dev_matrix)
    corner = tuple(0 if dims - 1 - d in used else slice(None) for d in range(dims))
    group = sorted(grid[corner].reshape(-1).tolist())
    step = (group[-1] - group[0]) // (len(group) - 1) if len(group) > 1 else 0
    return Layout(
        layout.dev_matrix,
        layout.tensor_map,
        opt_weight_shard_step=step,
        opt_weight_shard_size=size if len(group) > 1 else 0,
    )


@st.composite
def layouts(draw: Any, ranks: int) -> Layout:
    """A random layout over that many ranks; dimensions of size 1 included."""
    matrix: list[int] = []
    rest = ranks
    while rest > 1:
        matrix.append(draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0])))
        rest //= matrix[-1]
    matrix.insert(draw(st.integers(0, len(matrix))), 1)
    axes: list[list[int]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for dimension in draw(st.permutations(range(len(matrix)))):
        if draw(st.booleans()):
            draw(st.sampled_from(axes)).append(dimension)
    layout = Layout(tuple(matrix), tuple(map(tuple, axes)))
    copies = layout.copies
    sizes = [n for n in range(1, copies + 1) if copies % n == 0]
    return with_shards(layout, draw(st.sampled_from([0, -1, *sizes])))


@st.composite
def tensors(draw: Any, layout: Layout) -> tuple[str, np.ndarray]:
    code = draw(st.sampled_from(["F32", "BF16", "U8", "BOOL", "I64"]))
    shards = layout.copies if layout.opt_weight_shard_size == -1 else layout.opt_weight_shard_size
    cuts = [math.prod(layout.dev_matrix[-1 - d] for d in axis) for axis in layout.tensor_map]
    cuts[0] *= max(1, shards)
    shape = [cut * draw(st.integers(0 if axis else 1, 2)) for axis, cut in enumerate(cuts)]
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return code, chance.integers(0, 2, shape).astype(NUMPY_DTYPES[code])


# --- directories ------------------------------------------------------------------------------


def save(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {name: (code, array.shape) for name, (code, array) in tensors.items()}
    arrays = ((name, array) for name, (_, array) in tensors.items())
    mindspore_ckpt.write_file(path, table, arrays)


def save_ranks(
    root: Path,
    tensors: Tensors,
    layouts: Mapping[str, Layout],
    *,
    first_rank: int = 0,
    name: str = "llava_rank_{rank}-1_10.ckpt",
) -> None:
    """Cut the tensors as the layouts say; those without a layout are on every rank."""
    ranks = math.prod(next(iter(layouts.values())).dev_matrix)
    held: list[Tensors] = [{} for _ in range(ranks)]
    for key, (code, array) in tensors.items():
        slices = cut(array, layouts[key]) if key in layouts else [array] * ranks
        for rank, part in enumerate(slices):
            held[rank][key] = (code, part)
    for rank, content in enumerate(held, first_rank):
        save(root / f"rank_{rank}" / name.format(rank=rank), content)


def save_strategy(path: Path, layouts: Mapping[str, Layout], stage: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_strategy(layouts, stage))
    return path


def assert_whole(merged: Mapping[str, Tensor], tensors: Tensors) -> None:
    assert list(merged) == list(tensors)
    for name, (code, array) in tensors.items():
        read = merged[name].read()
        assert (merged[name].dtype, merged[name].shape) == (code, array.shape)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()


DP2_MP4 = {
    "embedding": Layout((2, 4), ((0,), ())),
    "wo": Layout((2, 4), ((), (0,)), opt_weight_shard_step=4, opt_weight_shard_size=-1),
    "norm": Layout((2, 4), ((),)),
}


def eight_ranks(root: Path) -> tuple[Path, Path, Tensors]:
    """(directory, strategy, the whole tensors): data parallel 2, model parallel 4."""
    chance = np.random.default_rng(1)
    whole: Tensors = {
        "embedding": ("F32", chance.standard_normal((16, 3)).astype("<f4")),
        "wo": ("BF16", chance.integers(0, 2**16, (6, 8), np.uint16)),
        "norm": ("F32", chance.standard_normal(5).astype("<f4")),
        "global_step": ("I32", np.array(10, "<i4")),
    }
    save_ranks(root / "checkpoint", whole, DP2_MP4)
    return root / "checkpoint", save_strategy(root / "strategy.ckpt", DP2_MP4), whole


# --- layouts ----------------------------------------------------------------------------------


def test_the_slices_of_a_known_layout() -> None:
    """The example in MindSpore's own source: [4, 2, 2], an optimizer group of 2."""
    assert Layout((2, 4), ((0,), ())).slots() == tuple((n, 0) for n in (0, 1, 2, 3) * 2)
    assert Layout((2, 4), ((), (1,))).slots() == tuple((0, n) for n in (0, 0, 0, 0, 1, 1, 1, 1))
    assert Layout((2, 2), ((1, 0),)).slots() == ((0,), (1,), (2,), (3,))
    assert Layout((2, 2), ((0, 1),)).slots() == ((0,), (2,), (1,), (3,))
    halves = Layout((4, 2), ((0,),), opt_weight_shard_step=2, opt_weight_shard_size=2)
    # Ranks 0 2 4 6 hold the first half of the rows: 0 and 2 share them, and 4 and 6.
    assert halves.slots() == ((0,), (2,), (1,), (3,), (0,), (2,), (1,), (3,))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), ranks=st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_cutting_and_merging(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ranks: int
) -> None:
    root = tmp_path_factory.mktemp("ranks")
    plan = {f"t{index}": data.draw(layouts(ranks)) for index in range(data.draw(st.integers(1, 4)))}
    whole = {name: data.draw(tensors(layout)) for name, layout in plan.items()}
    save_ranks(root / "checkpoint", whole, plan)
    strategy = save_strategy(root / "s.ckpt", plan)
    read = read_strategy(strategy)
    assert (read.ranks, read.stages) == (ranks, (plan,))
    assert_whole(open_ranks(root / "checkpoint", strategy, compare_copies=True), whole)
    shutil.rmtree(root)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_json_strategies(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("json")
    plan = {f"t{index}": data.draw(layouts(8)) for index in range(3)}
    (root / "s.json").write_text(json_strategy(plan))
    save_strategy(root / "s.ckpt", plan)
    assert read_strategy(root / "s.json") == read_strategy(root / "s.ckpt")


def test_the_shape_of_a_slice_is_no_choice_of_rows(tmp_path: Path) -> None:
    """MindFormers' own writer puts it where rows chosen by hand belong, without offsets."""
    cuts = numbers(1, [2, 2, 1]) + numbers(2, [1, 0]) + numbers(3, [4, 6])
    fields = number(5, 0) + number(6, 0) + number(7, 0)
    path = tmp_path / "s.ckpt"
    path.write_bytes(number(1, 0) + block(3, block(1, b"w") + block(2, cuts + fields)))
    assert read_strategy(path).stages == ({"w": Layout((2, 2, 1), ((1,), (0,)))},)


def test_packed_numbers_and_what_old_files_lack(tmp_path: Path) -> None:
    """Packed lists are allowed by the format; MindSpore 1.x wrote no optimizer shards."""
    layout = block(1, block(1, b"\2\4")) + block(2, block(1, b"\0" + varint(2**64 - 1)))
    item = block(1, b"w") + block(2, layout)
    path = tmp_path / "s.ckpt"
    path.write_bytes(number(1, 1) + block(3, item) + block(9, b"unknown"))
    assert read_strategy(path).stages == ({"w": Layout((2, 4), ((0,), ()))},)


# --- merging ----------------------------------------------------------------------------------


def test_eight_ranks(tmp_path: Path) -> None:
    directory, strategy, whole = eight_ranks(tmp_path)
    merged = open_ranks(directory, strategy)
    assert_whole(merged, whole)
    assert merged["wo"].how == ("merge 8 slices",)
    assert [place.path.parent.name for place in merged["embedding"].places] == [
        "rank_0", "rank_1", "rank_2", "rank_3",
    ]  # fmt: skip
    assert merged["norm"].how == () and len(merged["norm"].places) == 1


def test_safetensors_ranks(tmp_path: Path) -> None:
    directory, strategy, whole = eight_ranks(tmp_path)
    for path in sorted(directory.glob("*/*.ckpt")):
        opened = mindspore_ckpt.open_file(path)
        table = {name: (tensor.dtype, tensor.shape) for name, tensor in opened.items()}
        arrays = [(name, np.array(tensor.read())) for name, tensor in opened.items()]
        safetensors.write_shards(path.parent / "one", table, arrays)
        (path.parent / "one" / "model.safetensors").rename(path.with_suffix(".safetensors"))
        path.unlink()
    merged = open_ranks(directory, strategy)
    assert_whole({name: merged[name] for name in whole}, whole)
    save(directory / "rank_3" / "again.ckpt", whole)
    with pytest.raises(CheckpointError, match="two formats"):
        open_ranks(directory, strategy)


def test_rows_chosen_by_hand(tmp_path: Path) -> None:
    table = np.arange(20, dtype="<f4").reshape(10, 2)
    plan = {"table": Layout((2, 3), ((0,), ()), param_split_shape=(1, 5, 4))}
    for rank in range(6):
        rows = np.split(table, [1, 6])[rank % 3]
        save(tmp_path / "c" / f"rank_{rank}" / "a.ckpt", {"table": ("F32", rows)})
    strategy = save_strategy(tmp_path / "s.ckpt", plan)
    assert_whole(open_ranks(tmp_path / "c", strategy), {"table": ("F32", table)})
    save_strategy(strategy, {"table": Layout((2, 3), ((0,), ()), param_split_shape=(1, 4, 5))})
    with pytest.raises(CheckpointError, match="do not fit together"):
        open_ranks(tmp_path / "c", strategy)
    for wrong in [((0,), ()), (1, 9)], [((1,), (0,)), (1, 5, 4)]:
        save_strategy(strategy, {"table": Layout((2, 3), wrong[0], param_split_shape=wrong[1])})
        with pytest.raises(CheckpointError, match="cut by hand and otherwise"):
            open_ranks(tmp_path / "c", strategy)
    save_strategy(strategy, {"table": Layout((2, 3), ((0,), ()), field=39)})
    with pytest.raises(CheckpointError, match="columns of the data"):
        open_ranks(tmp_path / "c", strategy)


def test_what_other_ranks_hold_may_be_missing(tmp_path: Path) -> None:
    """`remove_redundancy` keeps each slice on one rank; without any it is an error."""
    directory, strategy, whole = eight_ranks(tmp_path)
    for rank in range(8):
        (path,) = (directory / f"rank_{rank}").iterdir()
        opened = mindspore_ckpt.open_file(path)
        kept = {
            name: (tensor.dtype, tensor.read())
            for name, tensor in opened.items()
            if name == "wo" or (name == "embedding" and rank >= 4) or (name == "norm" and rank == 5)
        }
        save(path, kept)
    del whole["global_step"]
    merged = open_ranks(directory, strategy, compare_copies=True)
    assert_whole({name: merged[name] for name in whole}, whole)
    save(next((directory / "rank_6").iterdir()), {"wo": kept["wo"]})
    with pytest.raises(CheckpointError, match="1 of 4 slices of tensor 'embedding'"):
        open_ranks(directory, strategy)


def test_copies_are_compared_if_asked(tmp_path: Path) -> None:
    directory, strategy, whole = eight_ranks(tmp_path)
    (path,) = (directory / "rank_5").iterdir()
    content = bytearray(path.read_bytes())
    place = mindspore_ckpt.open_file(path)["embedding"].places[0]
    content[place.offset] ^= 1
    path.write_bytes(content)
    assert_whole(open_ranks(directory, strategy), whole)
    merged = open_ranks(directory, strategy, compare_copies=True)
    assert np.array_equal(merged["wo"].read(), whole["wo"][1])
    with pytest.raises(CheckpointError, match="rank 1 and rank 5 hold different values"):
        merged["embedding"].read()


def test_gradients_are_left_out(tmp_path: Path) -> None:
    """Their layouts are wrong with ZeRO 1: sharded in the strategy, whole on every rank."""
    sharded = Layout((4,), ((),), opt_weight_shard_step=1, opt_weight_shard_size=4)
    plan = {"w": sharded, "accu_grads.w": sharded}
    array = np.arange(8, dtype="<f4")
    for rank, part in enumerate(cut(array, sharded)):
        path = tmp_path / "c" / f"rank_{rank}" / "a.ckpt"
        save(path, {"w": ("F32", part), "accu_grads.w": ("F32", array)})
    strategy = save_strategy(tmp_path / "s.ckpt", plan)
    assert_whole(open_ranks(tmp_path / "c", strategy), {"w": ("F32", array)})


def test_slices_that_contradict(tmp_path: Path) -> None:
    directory, strategy, whole = eight_ranks(tmp_path)
    (path,) = (directory / "rank_2").iterdir()
    good = {n: (t.dtype, np.array(t.read())) for n, t in mindspore_ckpt.open_file(path).items()}
    for wrong in [("F32", np.ones((5, 3), "<f4")), ("I32", np.ones((4, 3), "<i4"))]:
        save(path, {**good, "embedding": wrong})
        with pytest.raises(CheckpointError, match=r"'embedding' do not .*\n.*in rank 2"):
            open_ranks(directory, strategy)
    save(path, good)
    save_strategy(strategy, {**DP2_MP4, "embedding": Layout((2, 4), ((0,), (), ()))})
    with pytest.raises(CheckpointError, match="does not have the axes"):
        open_ranks(directory, strategy)
    save_strategy(strategy, {"another.model": DP2_MP4["norm"]})
    with pytest.raises(CheckpointError, match="describes no tensor"):
        open_ranks(directory, strategy)


def test_memory_is_the_tensor_and_a_slice(tmp_path: Path) -> None:
    layout = Layout((8,), ((), (0,)))
    array = np.arange(1 << 20, dtype="<f4").reshape(1024, 1024)
    save_ranks(tmp_path / "c", {"w": ("F32", array)}, {"w": layout})
    strategy = save_strategy(tmp_path / "s.ckpt", {"w": layout})
    tracemalloc.start()
    merged = open_ranks(tmp_path / "c", strategy)
    assert tracemalloc.get_traced_memory()[1] < 1 << 19
    read = merged["w"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(read, array)
    assert peak < array.nbytes * 1.2


# --- pipelines --------------------------------------------------------------------------------


def two_stages(root: Path) -> tuple[Path, Path, Tensors]:
    """(directory, directory of strategy files, the whole tensors): 2 stages of 2 ranks."""
    chance = np.random.default_rng(2)
    rows, columns = Layout((2,), ((0,), ())), Layout((2,), ((), (0,)))
    plans = [{"embed": rows, "layers.0": columns}, {"layers.1": columns, "embed": rows}]
    whole: Tensors = {
        name: ("F32", chance.standard_normal((4, 6)).astype("<f4"))
        for name in ("embed", "layers.0", "layers.1")
    }
    step: Tensors = {"global_step": ("I32", np.array(3, "<i4"))}
    for stage, plan in enumerate(plans):
        held = {name: whole[name] for name in plan} | step
        save_ranks(root / "checkpoint", held, plan, first_rank=2 * stage)
        for rank in (2 * stage, 2 * stage + 1):
            save_strategy(root / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt", plan, stage)
    ordered = {name: whole[name] for name in ("embed", "layers.0")} | step
    return root / "checkpoint", root / "strategy", {**ordered, "layers.1": whole["layers.1"]}


def test_pipeline_stages(tmp_path: Path) -> None:
    directory, strategies, whole = two_stages(tmp_path)
    merged = open_ranks(directory, strategies, compare_copies=True)
    assert_whole(merged, whole)
    assert {place.path.parent.name for place in merged["embed"].places} == {"rank_0", "rank_1"}
    assert {place.path.parent.name for place in merged["layers.1"].places} == {"rank_2", "rank_3"}


def test_a_merged_strategy_file(tmp_path: Path) -> None:
    directory, strategies, whole = two_stages(tmp_path)
    plan = read_strategy(strategies)
    names = {
        f"{s}-{name}": lay for s, stage in enumerate(plan.stages) for name, lay in stage.items()
    }
    merged = save_strategy(tmp_path / "merged.ckpt", names)
    assert read_strategy(merged) == plan
    assert_whole(open_ranks(directory, merged), whole)


def test_a_stage_is_missing(tmp_path: Path) -> None:
    directory, strategies, _ = two_stages(tmp_path)
    with pytest.raises(CheckpointError, match="rank_2 is not expected; rank_3 is not expected"):
        open_ranks(directory, strategies / "ckpt_strategy_rank_0.ckpt")
    with pytest.raises(CheckpointError, match="also stage 0"):
        open_ranks(directory, strategies / "ckpt_strategy_rank_3.ckpt")


def test_strategy_files_that_contradict(tmp_path: Path) -> None:
    _, strategies, _ = two_stages(tmp_path)
    save_strategy(strategies / "z.ckpt", {"embed": Layout((2,), ((), ()))}, 1)
    with pytest.raises(CheckpointError, match=r"z\.ckpt cuts the tensors of stage 1 otherwise"):
        read_strategy(strategies)
    save_strategy(strategies / "z.ckpt", {"embed": Layout((4,), ((), ()))}, 2)
    with pytest.raises(CheckpointError, match=r"different numbers of ranks\n.*\[2, 4\]"):
        read_strategy(strategies)


def test_stages_that_disagree_about_a_tensor(tmp_path: Path) -> None:
    directory, strategies, whole = two_stages(tmp_path)
    (path,) = (directory / "rank_2").iterdir()
    held = {n: (t.dtype, np.array(t.read())) for n, t in mindspore_ckpt.open_file(path).items()}
    held["embed"][1][0, 0] += 1
    save(path, held)
    assert_whole(open_ranks(directory, strategies), whole)
    with pytest.raises(CheckpointError, match="stage 0 and stage 1 hold different values"):
        open_ranks(directory, strategies, compare_copies=True)["embed"].read()
    for rank in (2, 3):
        (path,) = (directory / f"rank_{rank}").iterdir()
        save(path, {**held, "embed": ("F32", np.ones((3, 6), "<f4"))})
    with pytest.raises(CheckpointError, match="the stages disagree about tensor 'embed'"):
        open_ranks(directory, strategies)


def test_a_pipeline_of_single_ranks(tmp_path: Path) -> None:
    """Without any other parallelism the device matrix is empty."""
    whole: Tensors = {"a": ("F32", np.ones(2, "<f4")), "b": ("F32", np.zeros((), "<f4"))}
    for stage, name in enumerate(whole):
        save(tmp_path / "c" / f"rank_{stage}" / "x.ckpt", {name: whole[name]})
        save_strategy(tmp_path / "s" / f"{stage}.ckpt", {name: Layout((), ())}, stage)
    assert_whole(open_ranks(tmp_path / "c", tmp_path / "s"), whole)


# --- which files ------------------------------------------------------------------------------


def test_ranks_that_do_not_fit(tmp_path: Path) -> None:
    directory, strategy, _ = eight_ranks(tmp_path)
    (directory / "rank_3").rename(directory / "rank_9")
    (directory / "rank_x").mkdir()
    with pytest.raises(CheckpointError, match="8 ranks; rank_3 is missing; rank_9 is not expect"):
        open_ranks(directory, strategy)
    (directory / "rank_9").rename(directory / "rank_03")
    with pytest.raises(CheckpointError, match="twice") as caught:
        (directory / "rank_3").mkdir()
        open_ranks(directory, strategy)
    assert "rank_03 and rank_3" in str(caught.value)
    shutil.rmtree(directory / "rank_03")
    with pytest.raises(CheckpointError, match="rank_3 holds no checkpoint"):
        open_ranks(directory, strategy)
    for absent in (tmp_path / "absent", strategy):
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_ranks(absent, strategy)


def test_an_absurd_number_of_ranks(tmp_path: Path) -> None:
    directory, strategy, _ = eight_ranks(tmp_path)
    begin = time.perf_counter()
    save_strategy(strategy, {"norm": Layout((1 << 20,), ((),))})
    with pytest.raises(CheckpointError, match="rank_8 is missing; rank_9 is missing"):
        open_ranks(directory, strategy)
    save_strategy(strategy, {"norm": Layout((1 << 10, 1 << 11), ((),))})
    with pytest.raises(CheckpointError, match="makes no sense"):
        open_ranks(directory, strategy)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    "names",
    [
        ["llava_rank_0-1_10", "llava_rank_1-1_10"],
        ["checkpoint_0", "checkpoint_1"],
        ["llava-7_0", "llava-7_1"],  # ends like epoch and step, but is the rank
        ["weights", "weights"],
    ],
)
def test_one_file_each(tmp_path: Path, names: Sequence[str]) -> None:
    layout, array = Layout((2,), ((0,),)), np.arange(4, dtype="<f4")
    for rank, (name, part) in enumerate(zip(names, np.split(array, 2), strict=True)):
        save(tmp_path / "c" / f"rank_{rank}" / f"{name}.ckpt", {"w": ("F32", part)})
        (tmp_path / "c" / f"rank_{rank}" / "meta.json").write_text("{}")
    strategy = save_strategy(tmp_path / "s.ckpt", {"w": layout})
    assert_whole(open_ranks(tmp_path / "c", strategy), {"w": ("F32", array)})


@pytest.mark.parametrize(
    "names", [["a-1_10", "a-1_20"], ["a_rank_0-1_10", "a_rank_1-2_10"], ["a", "a-1_10"]]
)
def test_one_file_each_of_different_saves(tmp_path: Path, names: Sequence[str]) -> None:
    layout, array = Layout((2,), ((0,),)), np.arange(4, dtype="<f4")
    for rank, (name, part) in enumerate(zip(names, np.split(array, 2), strict=True)):
        save(tmp_path / "c" / f"rank_{rank}" / f"{name}.ckpt", {"w": ("F32", part)})
    strategy = save_strategy(tmp_path / "s.ckpt", {"w": layout})
    with pytest.raises(CheckpointError, match="hold different saves"):
        open_ranks(tmp_path / "c", strategy)


def test_several_saves(tmp_path: Path) -> None:
    """The newest by number, not by name or date: 10 comes after 9."""
    layout = Layout((2,), ((0,),))
    strategy = save_strategy(tmp_path / "s.ckpt", {"w": layout})
    for value, (epoch, step) in enumerate([(1, 9), (1, 10), (10, 2), (9, 30)]):
        whole: Tensors = {"w": ("F32", np.full(4, value, "<f4"))}
        name = f"llava_rank_{{rank}}-{epoch}_{step}.ckpt"
        save_ranks(tmp_path / "c", whole, {"w": layout}, name=name)
    directory = tmp_path / "c"
    assert open_ranks(directory, strategy)["w"].read().tolist() == [2] * 4
    assert open_ranks(directory, strategy, save=(1, 10))["w"].read().tolist() == [1] * 4
    (directory / "rank_1" / "llava_rank_1-10_2.ckpt").unlink()  # interrupted
    with pytest.raises(CheckpointError, match="rank_1 holds 0 checkpoints of epoch 10, step 2"):
        open_ranks(directory, strategy)
    assert open_ranks(directory, strategy, save=(9, 30))["w"].read().tolist() == [3] * 4
    save(directory / "rank_0" / "llava_rank_0_1-9_30.ckpt", whole)
    with pytest.raises(CheckpointError, match="rank_0 holds 2 checkpoints of epoch 9, step 30"):
        open_ranks(directory, strategy, save=(9, 30))
    save(directory / "rank_0" / "breakpoint.ckpt", whole)
    with pytest.raises(CheckpointError, match=r"which one is meant\?\n.*breakpoint"):
        open_ranks(directory, strategy)
    assert open_ranks(directory, strategy, save=(1, 9))["w"].read().tolist() == [0] * 4


# --- damage -----------------------------------------------------------------------------------


def encode_item(content: bytes) -> bytes:
    return number(1, 1) + block(3, content)


GOOD = encode_layout(Layout((2, 2), ((0,),)))
DAMAGED = {
    "empty": (b"", r"begins with the bytes \(none\)"),
    "checkpoint": (b"\x0a\x00", "no MindSpore strategy file"),
    "no layouts": (number(1, 1), "describes no tensors"),
    "truncated": (encode_strategy({"w": DP2_MP4["norm"]})[:-1], "byte 24, field 3 reaches"),
    "no name": (encode_item(block(2, GOOD)), "0 fields 1"),
    "no layout": (encode_item(block(1, b"w")), "0 fields 2"),
    "number for layout": (encode_item(block(1, b"w") + number(2, 3)), "1 fields 2"),
    "number for item": (number(1, 1) + number(3, 7), "field 3 is no message"),
    "no stage": (number(1, 1) + block(2, block(1, b"m") + block(2, b"")), "0 fields 1"),
    "two matrices": (
        encode_item(block(1, b"w") + block(2, numbers(1, [2]) + GOOD)),
        "'w' has 2 device matrices",
    ),
    "name": (encode_item(block(1, b"\xff") + block(2, GOOD)), "not UTF-8"),
    "two layouts": (
        encode_item(block(1, b"w") + block(2, GOOD))
        + block(3, block(1, b"w") + block(2, encode_layout(Layout((2, 2), ((1,),))))),
        "'w' is cut in two ways",
    ),
}
SENSELESS = {
    "no devices": Layout((2, 0), ((0,),)),
    "unknown dimension": Layout((2, 2), ((2,),)),
    "negative dimension": Layout((2, 2), ((-2,),)),
    "dimension twice": Layout((2, 2), ((0,), (0,))),
    "dimension twice on an axis": Layout((2, 2), ((0, 0), ())),
    "axes": Layout((2, 2), ((),) * 33),
    "dimensions": Layout((1,) * 33, ((),)),
    "rows": Layout((2, 2), ((0,),), param_split_shape=(-1, 3)),
}
UNSHARDABLE = {
    "size": Layout((4,), ((),), (), 0, 1, 3),
    "negative size": Layout((4,), ((),), (), 0, 1, -2),
    "larger": Layout((4,), ((),), (), 0, 1, 8),
    "step": Layout((2, 4), ((0,),), (), 0, 1, 2),
    "no axes": Layout((4,), (), (), 0, 1, 4),
}


@pytest.mark.parametrize("kind", [*DAMAGED, *SENSELESS, *UNSHARDABLE])
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    content, problem = DAMAGED.get(kind, (b"", ""))
    if kind in SENSELESS:
        content, problem = encode_strategy({"w": SENSELESS[kind]}), "layout of 'w' makes no sense"
    elif kind in UNSHARDABLE:
        content, problem = encode_strategy({"w": UNSHARDABLE[kind]}), "optimizer cannot shard 'w'"
    path = tmp_path / "s.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_strategy(path)
    assert str(path) in str(caught.value)


CUT_IN_2 = json_strategy({"w": Layout((2,), ((0,),))})
NO_STRATEGIES = {
    "empty": "",
    "a list": "[]",
    "nothing in it": "{}",
    "not UTF-8": "\xff",
    "a number for the layouts": '{"parallel_layout_item": 3}',
    "a layout without parts": '{"parallel_layout_item": {"w": {}}}',
    "nested without end": "[" * 100_000,
    "a fraction": CUT_IN_2.replace("[2]", "[2.5]"),
    "a truth": CUT_IN_2.replace("[2]", "[true]"),
    "a text": CUT_IN_2.replace("[2]", '"22"'),
    "other devices": CUT_IN_2.replace("[2]", "[3, 7, -1]"),
    "stage -1": json_strategy({"w": Layout((2,), ((0,),))}, -1),
}


@pytest.mark.parametrize("kind", NO_STRATEGIES)
def test_json_that_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(NO_STRATEGIES[kind], encoding="latin-1")
    with pytest.raises(CheckpointError, match=str(path)):
        read_strategy(path)


def test_strategies_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_strategy(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match="holds no strategy files"):
        read_strategy(tmp_path)


# --- fuzzing ----------------------------------------------------------------------------------

FUZZ_INPUTS = 5000
FUZZ_SECONDS = 15


def mutate(chance: random.Random, content: bytearray) -> None:
    position = chance.randrange(len(content))
    kind = chance.randrange(5)
    if kind < 2:
        content[position] = chance.choice([0, 1, 2, 3, 4, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    elif kind == 2:
        content[position:position] = chance.choice([b"\xff" * 9, b"\1", chance.randbytes(3)])
    elif kind == 3 and len(content) > 8:
        del content[position : position + chance.randrange(1, 8)]
    else:
        content[position:position] = content[position : position + chance.randrange(1, 40)]


def test_fuzz(tmp_path: Path) -> None:
    """A damaged strategy gives a CheckpointError, or whole tensors made of all the slices."""
    directory, strategy, whole = eight_ranks(tmp_path)
    chance = random.Random(4)
    seeds = {
        ".ckpt": encode_strategy({**DP2_MP4, "embedding": Layout((2, 2, 2), ((1, 0), ()))}),
        ".json": json_strategy(DP2_MP4).encode(),
    }
    outcomes, begin = {"sound": 0, "refused": 0}, time.monotonic()
    for _ in range(FUZZ_INPUTS):
        suffix = chance.choice([".ckpt", ".ckpt", ".json"])
        content = bytearray(seeds[suffix])
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            mutate(chance, content)
        strategy = tmp_path / f"fuzz{suffix}"
        strategy.write_bytes(content)
        try:
            merged = open_ranks(directory, strategy, compare_copies=bool(chance.randrange(2)))
            for tensor in merged.values():
                array = tensor.read()
                assert (array.dtype.str, array.shape) == (
                    np.dtype(NUMPY_DTYPES[tensor.dtype]).str,
                    tensor.shape,
                )
                assert array.nbytes <= 8 * whole["embedding"][1].nbytes
            outcomes["sound"] += 1
        except CheckpointError:
            outcomes["refused"] += 1
        if time.monotonic() - begin > FUZZ_SECONDS:
            break
    assert min(outcomes.values()) > 100, outcomes
