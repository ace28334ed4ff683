"""Conversion: open -> plan -> stream -> verify -> manifest.

Everything that can be found wrong is found before a byte is written. Files are written into a
temporary folder beside the target, which is renamed at the end: an interruption leaves the old
state, and `resume` goes on after the last finished file. Tensors pass one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from weight_convert import files
from weight_convert.canonical import Config, expected_names, with_dtype
from weight_convert.cast import CODES, cast, cast_all
from weight_convert.contents import MANIFEST, manifest_path
from weight_convert.dialects import registry
from weight_convert.dialects.base import Dialect
from weight_convert.dialects.vocabulary import grow, trim
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Options, Source, Target, WeightFile, as_json
from weight_convert.storage.tensor import Tensor, few, raw_bytes, write_file_synced

TOOL = "unillava weight_convert 1"
"""What the manifest names as its writer; the number is that of the manifest's own layout."""

Progress = Callable[[str, int], None]
"""Called as (stored name, bytes) after each tensor that was written."""


@dataclass(frozen=True)
class Plan:
    """A conversion that was checked and not begun."""

    source: Source
    target: Target
    destination: Path
    hashes: Hashes

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(
            tensor.nbytes for file in self.target.weights for tensor in file.tensors.values()
        )


@dataclass(frozen=True)
class Row:
    """One tensor of the plan, for people to read."""

    source: str
    operation: str
    target: str
    file: str
    shape: tuple[int, ...]
    dtype: str


# --- planning --------------------------------------------------------------------------------


def plan(source: Source, to: str, destination: str | Path, options: Options | None = None) -> Plan:
    """What a conversion would write.

    Args:
        source: from `open_source`.
        to: name of the target dialect.
        destination: directory that will be made; or, if it ends like a file of weights
            (`files.SUFFIXES`), the one file that the weights alone go to.
        options: see Options.

    Raises:
        CheckpointError: the dialect cannot be written, or cannot hold what the source has.
    """
    dialect = registry.named(to)
    if dialect.write is None:
        raise CheckpointError(f"dialect {to} can only be read, not written")
    options, destination = options or Options(), Path(destination).expanduser()
    if options.dtype:
        source = _in_dtype(source, options.dtype)
    kind = files.SUFFIXES.get(destination.suffix)
    if kind:
        options = replace(options, weights=options.weights or kind, max_shard_bytes=sys.maxsize)
    _check_kind(source, dialect)
    hashes = Hashes()
    target = dialect.write(hashes.of_source(_in_order(source)), options)
    if kind and not target.single_file:
        target = _weights_alone(target, kind, destination)
    return Plan(source, target, destination, hashes)


def _weights_alone(target: Target, kind: str, destination: Path) -> Target:
    """One file of weights, without the small files of a directory."""
    formats = {file.format for file in target.weights}
    if len(target.weights) != 1 or formats != {kind}:
        raise CheckpointError(
            f"dialect {target.dialect} is not written as one file of this kind",
            given=destination.name,
            expected=f"a directory, for {few([file.name for file in target.weights])}",
        )
    file = replace(target.weights[0], name="")
    return replace(target, weights=(file,), documents={}, single_file=True)


def _check_kind(source: Source, dialect: Dialect) -> None:
    """Low-rank adapters go where adapters are held, and whole weights where weights are."""
    if dialect.adapters and source.adapter is None:
        raise CheckpointError(
            f"dialect {dialect.name} holds a low-rank adapter, and the source has none",
            given=f"{source.path}: {source.dialect}, {len(source.tensors)} whole tensors",
            fix="an adapter cannot be made of merged weights; to convert an adapter, give its "
            "directory and no --base",
        )
    if source.adapter is not None and not dialect.adapters:
        named = source.adapter.settings.get("base_model_name_or_path")
        raise CheckpointError(
            f"{source.path} is a LoRA adapter, and dialect {dialect.name} holds whole models",
            given=f"{len(source.adapter.pairs)} low-rank modules"
            + (f", trained on {named}" if named else ""),
            fix="name the model that it belongs to, into which it is then merged: --base DIR",
        )


def _in_order(source: Source) -> Source:
    """Tensors in the canonical order, so that files do not depend on where they come from."""
    if not source.tensors or not source.config:
        return source
    known = dict.fromkeys(expected_names(source.config, source.parts))
    order = [name for name in known if name in source.tensors]
    order += [name for name in source.tensors if name not in known]
    return replace(source, tensors={name: source.tensors[name] for name in order})


def _in_dtype(source: Source, dtype: str) -> Source:
    """Cast everything. Rows that were added to the vocabulary are made again from the cast ones,
    as reading the result will make them."""
    if source.vocabulary is not None and "model_type" in source.config:
        return grow(_in_dtype(replace(trim(source), vocabulary=None), dtype))
    adapter = source.adapter and source.adapter.map(lambda _, tensor: cast(tensor, CODES[dtype]))
    config = with_dtype(source.config, dtype) if source.config else source.config
    return replace(source, tensors=cast_all(source.tensors, dtype), adapter=adapter, config=config)


def rows(chosen: Plan) -> Iterator[Row]:
    """The plan tensor by tensor: source name, operation, target name, shape, dtype."""
    for file in chosen.target.weights:
        for name, tensor in file.tensors.items():
            names = list(dict.fromkeys(place.name for place in tensor.places))
            yield Row(
                few(names, 3),
                ", ".join(tensor.how) or ("copy" if names == [name] else "rename"),
                name,
                file.name or chosen.destination.name,
                tensor.shape,
                tensor.dtype,
            )


# --- carrying out ----------------------------------------------------------------------------


def carry_out(
    chosen: Plan, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> Config:
    """Write what was planned, and return the manifest.

    Args:
        chosen: from `plan`.
        resume: go on with an interrupted run of the same plan.
        overwrite: replace a destination that exists, once the new one is complete.
        progress: told about each tensor written.

    Raises:
        CheckpointError: the destination exists, cannot be written, or the disk is too small; or
            there is nothing to resume.
    """
    destination = chosen.destination
    if destination.exists() and not overwrite:
        raise CheckpointError(
            f"{destination} exists already",
            fix="name another place, or remove it first (--overwrite replaces it at the end)",
        )
    partial = destination.with_name(f"{destination.name}.partial")
    _prepare(partial, chosen, resume)
    hashes = _write_all(partial, chosen, progress)
    manifest = _manifest(chosen, hashes)
    _finish(partial, chosen, manifest)
    return manifest


JOURNAL = ".progress.json"
"""In the temporary folder: the plan's fingerprint, and hashes of the files that are finished."""


def _prepare(partial: Path, chosen: Plan, resume: bool) -> None:
    if partial.exists() and not resume:
        raise CheckpointError(
            f"{partial} is left from an interrupted conversion",
            fix="go on with --resume, or remove it",
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be made", given=error.strerror) from error
    journal = _journal(partial)
    if journal and journal["plan"] != _fingerprint(chosen):
        raise CheckpointError(
            f"{partial} belongs to another conversion, and cannot be resumed by this one",
            fix="remove it, or repeat the command with its arguments",
        )
    done = journal.get("files", {})
    needed = sum(
        tensor.nbytes
        for file in chosen.target.weights
        if _key(file) not in done
        for tensor in file.tensors.values()
    )
    free = shutil.disk_usage(partial).free
    if needed > free:
        if not any(partial.iterdir()):
            partial.rmdir()
        raise CheckpointError(
            f"the disk of {partial.parent} is too small",
            given=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB",
        )


def _journal(partial: Path) -> Config:
    try:
        return json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _key(file: WeightFile) -> str:
    return file.name or "single"


def _fingerprint(chosen: Plan) -> str:
    """Changes when the files to be written, or the files that are read, change."""
    digest = hashlib.sha256(chosen.target.dialect.encode())
    read: set[Path] = set()
    for file in chosen.target.weights:
        for name, tensor in file.tensors.items():
            digest.update(
                f"{_key(file)} {name} {tensor.dtype} {tensor.shape} {tensor.how}".encode()
            )
            read |= {place.path for place in tensor.places}
    for path in sorted(read):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _write_all(partial: Path, chosen: Plan, progress: Progress | None) -> dict[str, str]:
    """Write every file that is not finished, and return canonical name -> sha256."""
    journal = _journal(partial) or {"plan": _fingerprint(chosen), "files": {}, "hashes": {}}
    for file in chosen.target.weights:
        if _key(file) in journal["files"]:
            for name, tensor in file.tensors.items():
                _report(progress, name, tensor.nbytes)
            continue
        path = partial / _key(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_one(path, file, progress)
        journal["files"][_key(file)] = path.stat().st_size
        journal["hashes"] |= chosen.hashes.collect()
        _write_synced(partial / JOURNAL, as_json(journal))
    return journal["hashes"]


def _report(progress: Progress | None, name: str, count: int) -> None:
    if progress:
        progress(name, count)


def _write_one(path: Path, file: WeightFile, progress: Progress | None) -> None:
    order = files.write_order(file)

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name in order:
            yield name, file.tensors[name].read()
            _report(progress, name, file.tensors[name].nbytes)

    table = files.table_of(file.tensors, order)
    files.FORMATS[file.format].write_file(path, table, stream(), **file.settings)


def _manifest(chosen: Plan, hashes: Mapping[str, str]) -> Config:
    source = chosen.source
    low = source.adapter.tensors() if source.adapter else {}
    held = {**source.tensors, **low}
    written = {name: tensor for name, tensor in held.items() if name in hashes}
    vocabulary = source.vocabulary
    return {
        "tool": TOOL,
        "source": {"dialect": source.dialect, "name": source.path.name},
        "target": {"dialect": chosen.target.dialect},
        "left_out": list(chosen.target.left_out),
        "vocabulary": vocabulary.as_json() if vocabulary else None,
        "config": source.config,
        "memory": dict(source.memory),
        "tensors": {
            name: {"dtype": t.dtype, "shape": list(t.shape), "sha256": hashes[name]}
            for name, t in written.items()
        },
    }


def _finish(partial: Path, chosen: Plan, manifest: Config) -> None:
    """Add the small files and give everything its final name."""
    destination, single = chosen.destination, chosen.target.single_file
    for name, content in chosen.target.documents.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(path, content if isinstance(content, bytes) else content.read_bytes())
    if single:
        beside = manifest_path(destination, single_file=True)
        _write_synced(partial / MANIFEST, as_json(manifest))
        os.replace(partial / "single", destination)
        os.replace(partial / MANIFEST, beside)
        shutil.rmtree(partial)
        return
    _write_synced(partial / MANIFEST, as_json(manifest))
    (partial / JOURNAL).unlink()
    if destination.exists():
        old = destination.with_name(f"{destination.name}.old")
        os.replace(destination, old)
        os.replace(partial, destination)
        shutil.rmtree(old)
    else:
        os.replace(partial, destination)


def _write_synced(path: Path, data: bytes) -> None:
    """A small file, complete or not there at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with write_file_synced(temporary) as file:
        file.write(data)
    os.replace(temporary, path)


# --- hashes ----------------------------------------------------------------------------------


class Hashes:
    """sha256 of canonical tensors, taken in a second thread while they are written."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: list[tuple[str, Future[str]]] = []
        self._done: dict[str, str] = {}

    def of_source(self, source: Source) -> Source:
        """The same source; reading a tensor also hashes it."""
        wrapped = {name: self._wrap(name, tensor) for name, tensor in source.tensors.items()}
        if source.adapter is None:
            return replace(source, tensors=wrapped)
        adapter = source.adapter.map(self._wrap)
        return replace(source, tensors=wrapped, adapter=adapter)

    def _wrap(self, name: str, tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            self._wait()  # an array is held until it is hashed: one at a time
            array = tensor.read()
            self._pending.append((name, self._pool.submit(hash_array, array)))
            return array

        return replace(tensor, read=read)

    def collect(self) -> dict[str, str]:
        """Canonical name -> sha256 of everything read so far."""
        self._wait()
        return self._done

    def _wait(self) -> None:
        while self._pending:
            name, future = self._pending.pop()
            self._done[name] = future.result()


def hash_array(array: np.ndarray) -> str:
    """sha256 of a tensor's bytes (little-endian, C order), as hexadecimal digits."""
    return hashlib.sha256(raw_bytes(np.ascontiguousarray(array))).hexdigest()


# --- all in one ------------------------------------------------------------------------------


def convert(
    path: str | Path,
    destination: str | Path,
    to: str,
    options: Options | None = None,
    *,
    dialect: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Config:
    """Convert a checkpoint and return the manifest; see `open_source`, `plan` and `carry_out`."""
    source = open_source(path, options, dialect)
    chosen = plan(source, to, destination, options)
    return carry_out(chosen, resume=resume, overwrite=overwrite, progress=progress)
