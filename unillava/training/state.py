"""The state of a run on the disk: what any framework can go on from.

    checkpoint-200/
      state.json                           step, engine steps, recipe, parameters, writer
      state-00001-of-00002-001.safetensors trained parameters and moments, canonical names

Tensors are float32 in canonical orientation, named `parameter/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME`; each rank writes those that it owns. Frozen parameters are not repeated: they
stand in the checkpoint that the run began with. Where the data stands follows from the step.
A folder is complete if and only if it has its final name.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unillava.errors import CheckpointError
from weight_convert.source import as_json, read_json
from weight_convert.storage import safetensors
from weight_convert.storage.tensor import Tensor, few, write_file_synced

FORMAT = 1
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
FOLDER = re.compile(r"checkpoint-(\d+)")
PART_BYTES = 512 << 20
"""A rank collects its tensors up to this size before it writes them as one file."""


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint folder."""

    path: Path
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def step(self) -> int:
        """Updates of the loop that were finished."""
        return int(self.facts["step"])

    def read(self, name: str, kind: str) -> np.ndarray:
        """One tensor, float32, canonical; what `Engine.restore` asks for."""
        return self.tensors[f"{kind}/{name}"].read()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Hold it to the parameters that a run trains.

        Raises:
            CheckpointError: other parameters, or other shapes: it is of another model or recipe.
        """
        wanted = {f"{kind}/{name}": shape for name, shape in shapes.items() for kind in KINDS}
        missing = [name for name in wanted if name not in self.tensors]
        surplus = [name for name in self.tensors if name not in wanted]
        wrong = [n for n in wanted if n in self.tensors and self.tensors[n].shape != wanted[n]]
        if missing or surplus or wrong:
            raise CheckpointError(
                f"{self.path} is the state of another run",
                given="; ".join(
                    f"{what}: {few(names, 3)}"
                    for what, names in (
                        ("not trained in it", missing),
                        ("trained in it alone", surplus),
                        ("of another shape", wrong),
                    )
                    if names
                ),
                fix="give another output folder, or the recipe that this state was saved with",
            )


def find_latest(output: Path) -> Saved | None:
    """The complete checkpoint with the most steps; None if there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    folders = saved_steps(output)
    return open_saved(folders[max(folders)]) if folders else None


def saved_steps(output: Path) -> dict[int, Path]:
    """Step -> folder, of every complete checkpoint."""
    found = ((FOLDER.fullmatch(path.name), path) for path in output.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match and path.is_dir()}


def open_saved(path: Path) -> Saved:
    """Open a checkpoint folder; no tensor is read.

    Raises:
        CheckpointError: files are absent, damaged, or of a newer format.
    """
    facts = read_json(path / "state.json")
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was saved in another format", given=facts.get("format"), expected=FORMAT
        )
    files = [path / name for name in facts["files"]]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"files are missing in {path}", given=few(absent))
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= safetensors.open_file(file).tensors()
    return Saved(path, facts, tensors)


def save(
    output: Path,
    step: int,
    tensors: Iterable[tuple[str, str, np.ndarray | None]],
    facts: Mapping[str, Any],
    *,
    rank: int,
    world: int,
    barrier: Callable[[], None],
    keep: int,
) -> Path:
    """Write a checkpoint; collective, every rank calls it. Returns its folder.

    Args:
        output: the run's folder.
        step: finished updates.
        tensors: what `Engine.state` yields; None is somebody else's to write.
        facts: for state.json, from rank 0.
        rank: of this process.
        world: number of ranks.
        barrier: waits for all of them.
        keep: older checkpoints beyond this number are removed.

    Raises:
        CheckpointError: the disk refuses; what was there before is untouched.
    """
    final = output / f"checkpoint-{step}"
    partial = output / f".checkpoint-{step}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        _make(partial)
    barrier()
    _write_parts(partial, tensors, rank, world)
    barrier()
    if rank == 0:
        files = sorted(path.name for path in partial.glob("*.safetensors"))
        content = {"format": FORMAT, "step": step, "files": files, **facts}
        with write_file_synced(partial / "state.json") as file:
            file.write(as_json(content))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _prune(output, keep)
    barrier()
    return final


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made", given=error.strerror) from error


def _write_parts(
    folder: Path, tensors: Iterable[tuple[str, str, np.ndarray | None]], rank: int, world: int
) -> None:
    part: dict[str, np.ndarray] = {}
    number = size = 0

    def flush() -> None:
        nonlocal part, number, size
        if not part:
            return
        number += 1
        name = f"state-{rank + 1:05d}-of-{world:05d}-{number:03d}.safetensors"
        table = {key: ("F32", array.shape) for key, array in part.items()}
        order = safetensors.layout_order(table)
        stream = ((key, part[key]) for key in order)
        safetensors.write_file(folder / name, {key: table[key] for key in order}, stream)
        part, size = {}, 0

    for name, kind, array in tensors:
        if array is None:
            continue
        part[f"{kind}/{name}"] = np.ascontiguousarray(array, np.float32)
        size += array.nbytes
        if size >= PART_BYTES:
            flush()
    flush()


def _prune(output: Path, keep: int) -> None:
    folders = saved_steps(output)
    for step in sorted(folders)[:-keep]:
        shutil.rmtree(folders[step])
    for path in output.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
