"""The index of a sharded checkpoint: which file holds which tensor (`*.index.json`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from weight_convert.errors import CheckpointError
from weight_convert.storage.tensor import Tensor, few


def open_shards(index: Path, open_file: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor of the shards beside an index file.

    Args:
        index: `{"weight_map": {tensor name: file name}}`, file names without folders.
        open_file: opens one shard.

    Raises:
        CheckpointError: the index cannot be used, a shard is absent, or they disagree.
    """
    weight_map = read_index(index)
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        raise CheckpointError(
            f"shards are missing in {index.parent}",
            given=f"{len(absent)} of {len(names)} files of {index.name} absent: {few(absent)}",
            fix="download or copy them again",
        )
    files = {name: open_file(index.parent / name) for name in names}
    _check(index, weight_map, files)
    return {name: tensor for file in files.values() for name, tensor in file.items()}


def read_index(path: Path) -> dict[str, str]:
    """`weight_map`: tensor name -> name of the file that holds it.

    Raises:
        CheckpointError: not JSON, no usable weight_map, or a file outside the directory.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON", given=error) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    sound = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not sound or not weight_map:
        raise CheckpointError(
            f"{path} has no usable weight_map", expected='{"weight_map": {tensor name: file name}}'
        )
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path} names files outside its directory", given=few(outside))
    return weight_map


def _check(
    index: Path, weight_map: Mapping[str, str], files: Mapping[str, Mapping[str, Tensor]]
) -> None:
    unheld = [f"{t} (in {shard})" for t, shard in weight_map.items() if t not in files[shard]]
    unlisted = [
        f"{name} (in {shard})"
        for shard, tensors in files.items()
        for name in tensors
        if weight_map.get(name) != shard
    ]
    faults = (
        (unheld, "tensors are not in the shard it names"),
        (unlisted, "tensors are in a shard where the index does not have them"),
    )
    for names, fault in faults:
        if names:
            raise CheckpointError(
                f"{index.name} disagrees with the shards",
                given=f"{len(names)} {fault}: {few(names)}",
                fix="the shards and the index come from different saves; copy all of one save",
            )
