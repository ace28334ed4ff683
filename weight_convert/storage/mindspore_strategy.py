"""MindSpore's strategy files, and checkpoints cut over ranks merged to whole tensors.

A parallel run saves one checkpoint per rank, `rank_0/….ckpt`, `rank_1/….ckpt`, with slices of
the tensors, and strategy files that say how they were cut: Protocol Buffers messages with the
extension `.ckpt` (MindSpore 2.10, `train/node_strategy_pb2`; `parallel/checkpoint_transform.py`
is MindSpore's own use of them), or the same as JSON:

    ParallelStrategyMap { current_stage = 1; ParallelStrategyItem = 2; ParallelLayoutItem = 3 }
    ParallelStrategyItem { node_name = 1; ParallelStrategys { stage = 1; … } = 2 }
    ParallelLayoutItem { param_name = 1; ParallelLayouts = 2 }
    ParallelLayouts { dev_matrix = 1; tensor_map = 2; param_split_shape = 3; indices_offset = 4;
                      field = 5; opt_weight_shard_step = 6; opt_weight_shard_size = 7 }

A pipeline has stages with equally many ranks: stage 0 has the first ranks. Each stage has a
strategy file of its own, or one file has them all, with names like `1-model.norm.weight`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weight_convert.errors import CheckpointError
from weight_convert.storage import mindspore_ckpt, safetensors
from weight_convert.storage.protobuf import (
    BYTES,
    VARINT,
    Field,
    WireError,
    collect_fields,
    encode_key,
    read_numbers,
    read_text,
    to_signed,
)
from weight_convert.storage.tensor import NUMPY_DTYPES, Tensor, few, raw_bytes

LEFT_OUT = "accu_grads."
"""Prefix of the gradients that wait for an optimizer step. Strategy files describe them wrongly
where only the optimizer is sharded; MindSpore's own `unified_safetensors` leaves them out too."""

_LISTS = {1: 32, 2: 32, 3: 64, 4: 64}
"""Fields of ParallelLayouts that are lists -> bits of their numbers."""
_MAX_FILE_BYTES = 1 << 28
_MAX_ITEMS = 1_000_000
_MAX_LIST = 1 << 16
_MAX_DIMENSIONS = 32
_MAX_RANKS = 1 << 20
_STAGE_NAME = re.compile(r"([0-9]{1,6})-(.+)", re.DOTALL)
_RANK_DIRECTORY = re.compile(r"rank_([0-9]{1,9})")
_SAVE = re.compile(r"-([0-9]{1,18})_([0-9]{1,18})\Z")
"""How MindSpore ends a checkpoint's name: epoch and step."""
_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".ckpt": mindspore_ckpt.open_file,
    ".safetensors": lambda path: safetensors.open_file(path).tensors(),
}

Slot = tuple[int, ...]
"""Which slice of a tensor: an index for each axis."""
Save = tuple[int, int]
"""Epoch and step of a checkpoint."""


@dataclass(frozen=True)
class Layout:
    """How one tensor is cut over the ranks of its stage.

    The ranks are numbered in C order over `dev_matrix`. Every axis of the tensor is cut along
    some dimensions of `dev_matrix`; ranks that differ in the other dimensions hold the same slice.
    If the optimizer is sharded, these share the slice's rows instead: in order of rank, every
    `opt_weight_shard_size` of them have all rows together.
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    """For each axis the dimensions that cut it, counted from the last; the first cuts coarsest."""
    param_split_shape: tuple[int, ...] = ()
    """Rows of each slice where they were chosen by hand; else all slices are equal."""
    field: int = 0
    """Not 0 where an embedding is cut by columns of the data."""
    opt_weight_shard_step: int = 0
    """Distance of the ranks that share rows; 0 if none do."""
    opt_weight_shard_size: int = 0
    """How many ranks share the rows of a slice: 0 none, -1 all that hold it."""

    @property
    def ranks(self) -> int:
        """Ranks of the stage."""
        return math.prod(self.dev_matrix)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Slices along each axis; shards of the optimizer do not count."""
        return tuple(math.prod(self.dev_matrix[-1 - d] for d in axis) for axis in self.tensor_map)

    @property
    def copies(self) -> int:
        """Ranks that hold, or share, one slice."""
        return self.ranks // math.prod(self.cuts)

    @property
    def shards(self) -> int:
        """Parts of a slice along axis 0, one for each rank that shares it."""
        if not self.opt_weight_shard_step or not self.opt_weight_shard_size:
            return 1
        return self.copies if self.opt_weight_shard_size == -1 else self.opt_weight_shard_size

    def slots(self) -> tuple[Slot, ...]:
        """The slice that each rank holds, in order of rank; indices of axis 0 count the shards."""
        return _assign_slots(self)


@dataclass(frozen=True)
class Strategy:
    """How the tensors of a checkpoint are cut over its ranks."""

    ranks_per_stage: int
    stages: tuple[Mapping[str, Layout], ...]
    """For each stage, tensor name -> layout."""

    @property
    def ranks(self) -> int:
        """Ranks of all stages."""
        return self.ranks_per_stage * len(self.stages)


@functools.lru_cache(maxsize=1024)
def _assign_slots(layout: Layout) -> tuple[Slot, ...]:
    slots, holders, shards = [], Counter[Slot](), layout.shards
    for coordinates in itertools.product(*map(range, layout.dev_matrix)):
        slot = tuple(_index(layout, axis, coordinates) for axis in layout.tensor_map)
        holders[slot] += 1
        if shards > 1:
            shard = (holders[slot] - 1) % shards
            slots.append((slot[0] * shards + shard, *slot[1:]))
        else:
            slots.append(slot)
    return tuple(slots)


def _index(layout: Layout, axis: Iterable[int], coordinates: Sequence[int]) -> int:
    """Index of a rank's slice along an axis that is cut by these dimensions."""
    index = 0
    for dimension in axis:
        index = index * layout.dev_matrix[-1 - dimension] + coordinates[-1 - dimension]
    return index


# --- strategy files --------------------------------------------------------------------------


def read_strategy(path: str | os.PathLike[str]) -> Strategy:
    """Read a strategy file, or a directory of those that the ranks or stages of one run wrote.

    Raises CheckpointError if a file is absent, damaged, something else, or describes a cut that
    cannot be; if files contradict one another; or if they leave a stage out.
    """
    path = Path(path)
    stages: dict[int, dict[str, Layout]] = {}
    for file in _strategy_files(path):
        for stage, layouts in _read_file(file).items():
            if stages.setdefault(stage, layouts) != layouts:
                raise CheckpointError(
                    f"{file} cuts the tensors of stage {stage} otherwise than the files before",
                    fix="keep the strategy files of one run in the directory",
                )
    return _join_stages(path, stages)


def _strategy_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [file for file in _list(path) if file.suffix in (".ckpt", ".json")]
    if not files:
        raise CheckpointError(
            f"{path} holds no strategy files", expected="*.ckpt or *.json of MindSpore"
        )
    return files


def _join_stages(path: Path, stages: Mapping[int, Mapping[str, Layout]]) -> Strategy:
    absent = set(range(len(stages))) - stages.keys()
    if absent:
        raise CheckpointError(
            f"{path} leaves out stages of the pipeline",
            given=f"stages {few(map(str, sorted(stages)))}",
            expected=f"also stage {min(absent)}",
            fix="give a directory with the strategy files of all stages",
        )
    layouts = [layout for stage in stages.values() for layout in stage.values()]
    counts = {layout.ranks for layout in layouts if layout.dev_matrix} or {1}
    if len(counts) > 1:
        raise CheckpointError(
            f"{path} cuts tensors over different numbers of ranks", given=sorted(counts)
        )
    return Strategy(counts.pop(), tuple(stages[stage] for stage in range(len(stages))))


def _read_file(path: Path) -> dict[int, dict[str, Layout]]:
    """Stage -> tensor name -> layout."""
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise _damaged(path, f"it has {size} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", given=error.strerror) from None
    stage, layouts = _parse_json(path, data) if path.suffix == ".json" else _parse(path, data)
    if not layouts:
        raise _damaged(path, "it describes no tensors")
    for name, layout in layouts.items():
        _check_layout(path, name, layout)
    names = {name: _STAGE_NAME.fullmatch(name) for name in layouts}
    if None in names.values():
        return {stage: layouts}
    stages: dict[int, dict[str, Layout]] = {}
    for name, match in names.items():
        stages.setdefault(int(match[1]), {})[match[2]] = layouts[name]
    return stages


def _parse(path: Path, data: bytes) -> tuple[int, dict[str, Layout]]:
    """(stage, tensor name -> layout) of a Protocol Buffers file."""
    if data[:1] != encode_key(1, VARINT):
        raise CheckpointError(
            f"{path} is no MindSpore strategy file",
            given=f"a file that begins with the bytes {data[:4].hex(' ') or '(none)'}",
            expected="08, with which the field current_stage begins",
        )
    try:
        root = collect_fields(data, 0, len(data), _MAX_ITEMS)
        layouts: dict[str, Layout] = {}
        for item in root.get(3, ()):
            name, layout = _read_item(data, item)
            if layouts.setdefault(name, layout) != layout:
                raise WireError(f"{name!r} is cut in two ways", item.offset)
        return _read_stage(data, root.get(2, ())), layouts
    except WireError as error:
        raise _damaged(path, f"at byte {error.offset}, {error.problem}") from None


def _read_stage(data: bytes, items: Sequence[Field]) -> int:
    """The stage of the first operator; a file without operators is of a run without stages."""
    if not items:
        return 0
    strategys = _only(_message(data, items[0]), 2, BYTES, items[0])
    return _only(_message(data, strategys), 1, VARINT, strategys).value


def _read_item(data: bytes, item: Field) -> tuple[str, Layout]:
    fields = _message(data, item)
    name = read_text(data, _only(fields, 1, BYTES, item))
    layouts = _only(fields, 2, BYTES, item)
    fields = _message(data, layouts)
    matrix, axes, rows, offsets = (
        _read_lists(data, fields.get(number, ()), bits) for number, bits in _LISTS.items()
    )
    if len(matrix) != 1:
        raise WireError(f"{name!r} has {len(matrix)} device matrices", layouts.offset)
    # One list has a dimension for each axis; several have a list for each, and an empty one
    # keeps a single list from being taken for the former.
    tensor_map = [[d] for d in axes[0]] if len(axes) == 1 else [axis for axis in axes if axis]
    # Files of MindSpore 1.x may lack these three.
    field, step, size = (
        to_signed(fields[number][-1].value, 32) if number in fields else 0 for number in (5, 6, 7)
    )
    split = [*itertools.chain(*rows)], [*itertools.chain(*offsets)]
    return name, _make_layout(matrix[0], tensor_map, split, field, step, size)


def _make_layout(
    matrix: Sequence[int],
    tensor_map: Iterable[Sequence[int]],
    split: tuple[Sequence[int], Sequence[int]],
    field: int,
    step: int,
    size: int,
) -> Layout:
    """The layout of what a file says; `split` is param_split_shape and indices_offset.

    -1 in a tensor map says that nothing cuts the axis. Rows chosen by hand come with offsets:
    MindFormers' own writer puts a slice's shape into param_split_shape, alone.
    """
    axes = tuple(tuple(d for d in axis if d != -1) for axis in tensor_map)
    rows, offsets = split
    by_hand = tuple(rows) if len(rows) == len(offsets) else ()
    return Layout(tuple(matrix), axes, by_hand, field, step, size)


def _message(data: bytes, field: Field) -> dict[int, list[Field]]:
    if field.wire_type != BYTES:
        raise WireError(f"field {field.number} is no message", field.offset)
    return collect_fields(data, field.begin, field.end, _MAX_LIST)


def _only(fields: Mapping[int, list[Field]], number: int, wire_type: int, message: Field) -> Field:
    """The one field of that number, which the schema requires."""
    found = fields.get(number, ())
    if len(found) != 1 or found[0].wire_type != wire_type:
        raise WireError(
            f"a message has {len(found)} fields {number} instead of one", message.offset
        )
    return found[0]


def _read_lists(data: bytes, fields: Iterable[Field], bits: int) -> list[tuple[int, ...]]:
    """The numbers of messages that hold nothing but a list of numbers, as signed ones."""
    return [
        tuple(
            to_signed(number, bits)
            for number in read_numbers(data, _message(data, field).get(1, ()), _MAX_LIST)
        )
        for field in fields
    ]


def _parse_json(path: Path, data: bytes) -> tuple[int, dict[str, Layout]]:
    """(stage, tensor name -> layout) of a JSON file."""
    try:
        root = json.loads(data)
        operators = list(root.get("parallel_strategy_item", {}).values())
        stage = operators[0]["stage"] if operators else 0
        if type(stage) is not int or stage < 0:
            raise ValueError(f"stage {stage!r}")
        items = root["parallel_layout_item"].items()
        return stage, {name: _layout_of_json(item) for name, item in items}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _layout_of_json(item: Mapping[str, Any]) -> Layout:
    matrix = item["dev_matrix"]
    split = item.get("param_split_shape", []), item.get("indices_offset", [])
    axes = [axis if isinstance(axis, list) else [axis] for axis in item["tensor_map"]]
    numbers = [item[key] for key in ("field", "opt_weight_shard_step", "opt_weight_shard_size")]
    if not all(type(n) is int for n in itertools.chain(matrix, *split, *axes, numbers)):
        raise TypeError("a layout holds something else than whole numbers")
    return _make_layout(matrix, axes, split, *numbers)


def _check_layout(path: Path, name: str, layout: Layout) -> None:
    """Every rank must have its place, and every dimension cut at most one axis."""
    matrix, used = layout.dev_matrix, list(itertools.chain(*layout.tensor_map))
    sound = (
        len(matrix) <= _MAX_DIMENSIONS
        and len(layout.tensor_map) <= _MAX_DIMENSIONS
        and all(0 < size <= _MAX_RANKS for size in matrix)
        and layout.ranks <= _MAX_RANKS
        and all(0 <= dimension < len(matrix) for dimension in used)
        and len(set(used)) == len(used)
        and all(rows >= 0 for rows in layout.param_split_shape)
    )
    if not sound:
        raise _damaged(path, f"the layout of {name!r} makes no sense: {str(layout)[:500]}")
    if not _shards_soundly(layout):
        raise _damaged(path, f"the optimizer cannot shard {name!r} so: {str(layout)[:500]}")


def _shards_soundly(layout: Layout) -> bool:
    if layout.shards == 1:
        return True
    if layout.shards < 1 or layout.copies % layout.shards or not layout.tensor_map:
        return False
    used = set(itertools.chain(*layout.tensor_map))
    matrix = layout.dev_matrix
    shared = [d for d in range(len(matrix)) if matrix[-1 - d] > 1 and d not in used]
    # Along one dimension all distances are the same; else MindSpore writes a mean.
    distance = math.prod(matrix[len(matrix) - shared[0] :])
    return len(shared) > 1 or layout.opt_weight_shard_step == distance


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound MindSpore strategy file: {what}", fix="copy it again"
    )


# --- merging ---------------------------------------------------------------------------------


def open_ranks(
    directory: str | os.PathLike[str],
    strategy: str | os.PathLike[str],
    *,
    save: Save | None = None,
    compare_copies: bool = False,
) -> dict[str, Tensor]:
    """The whole tensors of a checkpoint that was saved in slices, one directory per rank.

    Nothing is read until a tensor is; then its slices go into one array, one after the other, so
    the peak is the tensor and one slice. What several ranks hold is taken from the first of them,
    also what the strategy does not describe (`global_step`, `epoch_num`, …), and a tensor of
    several stages from the first of these. A rank may lack a slice that another one holds
    (`remove_redundancy`). `accu_grads.*` is left out.

    Args:
        directory: holds `rank_0`, `rank_1`, …, and these hold `.ckpt` or `.safetensors` files.
        strategy: the strategy file or the directory of all of them; see `read_strategy`.
        save: (epoch, step) to take where ranks hold several files, named `…-EPOCH_STEP`; without
            it the newest, which every rank must have.
        compare_copies: when a tensor is read, also read every copy of it and compare the bits.

    Raises CheckpointError if a rank or a slice is missing; if the ranks are not those of the
    strategy, hold different saves, or several of which none is the newest; if slices contradict
    each other or the strategy; and, when a tensor is read, if copies differ.
    """
    plan = read_strategy(strategy)
    files = _choose_files(_rank_directories(Path(directory), plan.ranks), save)
    ranks = [_READERS[file.suffix](file) for file in files]
    _check_described(Path(directory), plan, ranks)
    described = set().union(*plan.stages)
    merged: dict[str, dict[str, Tensor]] = {}
    for stage, layouts in enumerate(plan.stages):
        first = stage * plan.ranks_per_stage
        held = dict(enumerate(ranks[first : first + plan.ranks_per_stage], first))
        for name in dict.fromkeys(itertools.chain(*held.values())):
            if name.startswith(LEFT_OUT) or (name in described and name not in layouts):
                continue
            layout = layouts.get(name, Layout((), ()))
            merged.setdefault(name, {})[f"stage {stage}"] = _merge(
                name, layout, held, compare_copies
            )
    return {name: _take_first(name, wholes, compare_copies) for name, wholes in merged.items()}


def _rank_directories(directory: Path, count: int) -> list[Path]:
    """`rank_0` to `rank_{count - 1}`, all of them and no others."""
    found: dict[int, Path] = {}
    for entry in _list(directory):
        match = _RANK_DIRECTORY.fullmatch(entry.name)
        if match and found.setdefault(int(match[1]), entry) != entry:
            raise CheckpointError(
                f"{directory} holds rank {int(match[1])} twice",
                given=f"{found[int(match[1])].name} and {entry.name}",
            )
    if found.keys() != set(range(count)):
        absent = itertools.islice((rank for rank in range(count) if rank not in found), 6)
        surplus = sorted(rank for rank in found if rank >= count)
        raise CheckpointError(
            f"{directory} does not hold the ranks of the strategy",
            given=f"{len(found)} ranks"
            + "".join(f"; rank_{rank} is missing" for rank in absent)
            + "".join(f"; rank_{rank} is not expected" for rank in surplus[:6]),
            expected=f"rank_0 to rank_{count - 1}",
            fix="copy the missing ranks, or give the strategy files of all pipeline stages",
        )
    return [found[rank] for rank in range(count)]


def _list(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read", given=error.strerror) from None


def _choose_files(directories: Sequence[Path], save: Save | None) -> list[Path]:
    """The file of each rank, all of the same save."""
    files = [[file for file in _list(d) if file.suffix in _READERS] for d in directories]
    for directory, found in zip(directories, files, strict=True):
        if not found:
            raise CheckpointError(f"{directory} holds no checkpoint", expected="a .ckpt file")
    suffixes = {file.suffix for found in files for file in found}
    if len(suffixes) > 1:
        raise CheckpointError(
            f"{directories[0].parent} holds checkpoints in two formats",
            given=" and ".join(sorted(suffixes)),
            fix="remove those that are not meant",
        )
    if save is None and all(len(found) == 1 for found in files):
        single = [found[0] for found in files]
        _check_same_save(single)
        return single
    save = save or _newest_save(files)
    return [_pick(d, found, save) for d, found in zip(directories, files, strict=True)]


def _check_same_save(files: Sequence[Path]) -> None:
    """Numbers in the names may be that of the rank; others are steps, which must agree."""
    numbers = [tuple(map(int, re.findall("[0-9]+", file.stem))) for file in files]
    ranks = tuple(range(len(files)))
    same = len(set(map(len, numbers))) == 1 and all(
        len(set(column)) == 1 or column == ranks for column in zip(*numbers, strict=True)
    )
    if not same:
        raise CheckpointError(
            f"the ranks in {files[0].parent.parent} hold different saves",
            given=few([f"{file.parent.name}/{file.name}" for file in files]),
            fix="copy the files of one save",
        )


def _save_of(file: Path) -> Save | None:
    match = _SAVE.search(file.stem)
    return (int(match[1]), int(match[2])) if match else None


def _newest_save(files: Iterable[Iterable[Path]]) -> Save:
    saves = set()
    for file in itertools.chain(*files):
        save = _save_of(file)
        if save is None:
            raise CheckpointError(
                f"{file.parent} holds several checkpoints; which one is meant?",
                given=f"{file.name}, which has no epoch and step in its name",
                fix="remove those that are not meant, or name a save",
            )
        saves.add(save)
    return max(saves)


def _pick(directory: Path, files: Sequence[Path], save: Save) -> Path:
    picked = [file for file in files if _save_of(file) == save]
    if len(picked) != 1:
        raise CheckpointError(
            f"{directory} holds {len(picked)} checkpoints of epoch {save[0]}, step {save[1]}",
            given=few([file.name for file in picked or files]),
            expected=f"one file *-{save[0]}_{save[1]}{files[0].suffix}",
            fix="copy the missing file, or name a save that every rank has",
        )
    return picked[0]


def _check_described(
    directory: Path, plan: Strategy, ranks: Iterable[Mapping[str, Tensor]]
) -> None:
    """A strategy of another model would make every tensor look as if all ranks held it whole."""
    held = dict.fromkeys(itertools.chain(*ranks))
    if held.keys().isdisjoint(set().union(*plan.stages)):
        raise CheckpointError(
            f"the strategy describes no tensor of {directory}",
            given=f"tensors {few(held)}",
            expected=f"some of {few(itertools.chain(*plan.stages))}",
            fix="give the strategy files of the run that saved this checkpoint",
        )


def _merge(
    name: str, layout: Layout, held: Mapping[int, Mapping[str, Tensor]], compare_copies: bool
) -> Tensor:
    """One tensor of a stage, from what its ranks hold."""
    some = next(tensors[name] for tensors in held.values() if name in tensors)
    layout = _fit(name, layout, len(held), some.shape)
    slices: dict[Slot, dict[str, Tensor]] = {slot: {} for slot in layout.slots()}
    for slot, (rank, tensors) in zip(layout.slots(), held.items(), strict=True):
        if name in tensors:
            slices[slot][f"rank {rank}"] = tensors[name]
    extents = _extents(name, layout, some.shape)
    _check_slices(name, slices, some.dtype, extents)
    regions = [(_region(extents, slot), copies) for slot, copies in slices.items()]
    shape = tuple(sum(sizes) for sizes in extents)

    def read() -> np.ndarray:
        if len(regions) == 1:
            return _read_first(name, regions[0][1], compare_copies)
        whole = np.empty(shape, NUMPY_DTYPES[some.dtype])
        for region, copies in regions:
            whole[region] = _read_first(name, copies, compare_copies)
        return whole

    firsts = [next(iter(copies.values())) for copies in slices.values()]
    places = tuple(place for tensor in firsts for place in tensor.places)
    how = (f"merge {len(firsts)} slices",) if len(firsts) > 1 else firsts[0].how
    return Tensor(some.dtype, shape, read, places, how)


def _fit(name: str, layout: Layout, ranks: int, shape: tuple[int, ...]) -> Layout:
    """The layout with all that is left out written out, for a tensor of this shape."""
    layout = layout if layout.dev_matrix else dataclasses.replace(layout, dev_matrix=(ranks,))
    if math.prod(layout.cuts) * layout.shards == 1:
        return dataclasses.replace(layout, tensor_map=((),) * len(shape))
    if layout.field:
        raise CheckpointError(
            f"tensor {name!r} is an embedding cut by columns of the data",
            given=f"field {layout.field} in the strategy",
            fix="merge it with MindSpore's merge_sliced_parameter",
        )
    if len(layout.tensor_map) != len(shape):
        raise CheckpointError(
            f"tensor {name!r} does not have the axes of its layout",
            given=f"shape {shape}",
            expected=f"{len(layout.tensor_map)} axes, as the strategy says",
        )
    return layout


def _extents(name: str, layout: Layout, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sizes of the slices along each axis, if one of them has this shape."""
    counts = [cuts * (layout.shards if axis == 0 else 1) for axis, cuts in enumerate(layout.cuts)]
    extents = [(size,) * count for size, count in zip(shape, counts, strict=True)]
    if layout.param_split_shape and math.prod(counts) > 1:
        if math.prod(counts) != counts[0] or len(layout.param_split_shape) != counts[0]:
            raise CheckpointError(
                f"tensor {name!r} is cut by hand and otherwise too",
                given=f"rows {layout.param_split_shape}, {counts} slices",
                expected="slices along axis 0 alone, as many as there are rows given",
            )
        extents[0] = layout.param_split_shape
    return extents


def _check_slices(
    name: str,
    slices: Mapping[Slot, Mapping[str, Tensor]],
    dtype: str,
    extents: Sequence[Sequence[int]],
) -> None:
    """Every slice must be there, and have the dtype and shape that its place asks for."""
    absent = [slot for slot, copies in slices.items() if not copies]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(slices)} slices of tensor {name!r} are in no rank's file",
            given=f"without slice {absent[0]}",
            fix="copy the files of all ranks",
        )
    for slot, copies in slices.items():
        shape = tuple(sizes[index] for sizes, index in zip(extents, slot, strict=True))
        for holder, tensor in copies.items():
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise CheckpointError(
                    f"the slices of tensor {name!r} do not fit together",
                    given=f"{tensor.dtype} {tensor.shape} in {holder}",
                    expected=f"{dtype} {shape}",
                    fix="check that all ranks and the strategy are of one run",
                )


def _region(extents: Sequence[Sequence[int]], slot: Slot) -> tuple[slice, ...]:
    """Where a slice lies in the whole tensor."""
    begins = [sum(sizes[:index]) for sizes, index in zip(extents, slot, strict=True)]
    return tuple(
        slice(begin, begin + sizes[index])
        for begin, sizes, index in zip(begins, extents, slot, strict=True)
    )


def _take_first(name: str, wholes: Mapping[str, Tensor], compare_copies: bool) -> Tensor:
    """The tensor of the first stage that has it; the other stages' must be like it."""
    first = next(iter(wholes.values()))
    for stage, whole in wholes.items():
        if (whole.dtype, whole.shape) != (first.dtype, first.shape):
            raise CheckpointError(
                f"the stages disagree about tensor {name!r}",
                given=f"{whole.dtype} {whole.shape} in {stage}",
                expected=f"{first.dtype} {first.shape}, as in the first that has it",
            )
    return dataclasses.replace(first, read=lambda: _read_first(name, wholes, compare_copies))


def _read_first(name: str, copies: Mapping[str, Tensor], compare_copies: bool) -> np.ndarray:
    """The first copy; if asked for, held against the others bit for bit."""
    (holder, first), *others = copies.items()
    array = first.read()
    for other, tensor in others if compare_copies else ():
        if raw_bytes(array) != raw_bytes(tensor.read()):
            raise CheckpointError(
                f"{holder} and {other} hold different values of tensor {name!r}",
                fix="check that both files are of one save",
            )
    return array
