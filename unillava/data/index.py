"""Where each record of a data file lies and how long it is: found once, kept beside the file.

The index is one file: a line of JSON (what it is the index of), padded to `HEAD` bytes, and then
an array of `ROW`s that every process maps into memory. It is made anew whenever the data file has
another size, time or content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from unillava.data.files import written
from unillava.data.forms import measure
from unillava.data.scan import Damage, line_and_column, scan
from unillava.errors import DataError

ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("words", "<u4"),
        ("characters", "<u4"),
        ("images", "<u2"),
        ("videos", "<u2"),
    ]
)
"""A record: its place in the file in bytes, the length of its text, and how many media it has."""

FORMAT = 1
HEAD = 1 << 16
SUFFIX = ".unillava-index"
CACHE = "UNILLAVA_CACHE"
"""Environment variable: the folder for indexes that cannot lie beside their file."""
MOST_DAMAGES = 100
"""How many are kept; the others are counted."""
BLOCK = 1 << 16
"""Rows in memory at a time while an index is made."""

SAMPLES, SAMPLE_BYTES = 16, 1 << 14
"""How much of a file's content is looked at to see whether it is still the same."""

Progress = Callable[[int], None]
"""Is called with the bytes that have been read since the last call."""


@dataclass(frozen=True)
class Index:
    """The records of one file."""

    data: Path
    rows: np.ndarray
    """`ROW` [records], read-only."""
    damages: tuple[Damage, ...]
    """The first of them."""
    num_damages: int
    identity: tuple[int, int, str]
    """Size and time of the file that this is the index of, and a digest of samples of it."""


def open_index(path: str | os.PathLike[str], progress: Progress | None = None) -> Index:
    """The index of a file; it is made if there is none, which takes seconds per gigabyte.

    It lies beside the file as `.NAME.unillava-index`; where that folder cannot be written, in
    $UNILLAVA_CACHE or ~/.cache/unillava. Processes that want the same one wait for one another.

    Args:
        path: JSON or JSON lines.
        progress: called while an index is made.

    Raises:
        DataError: the file cannot be read, or there is no folder to write an index to. A damaged
            file is no error here: see `Index.damages`.
    """
    path = Path(path)
    with _data_errors(path), open(path, "rb") as file:
        identity = _identity(file)
        found = _stored(path, identity)
        if found is not None:
            return found
        with _alone(file):
            return _stored(path, identity) or _make(path, file, identity, progress)


def describe(index: Index, damage: Damage) -> DataError:
    """A damage as an error that names line, column and record."""
    with open(index.data, "rb") as file:
        line, column = line_and_column(file, damage.offset)
    return DataError(
        f"{index.data.name}, line {line}, column {column} (record {damage.records}): "
        f"{damage.problem}",
        given=index.data,
        fix="download the file again, or write a clean copy of what can be read with "
        "unillava data check FILE --fix clean.jsonl",
    )


def index_places(path: Path, suffix: str = SUFFIX) -> list[Path]:
    """Where the index of a file may lie, in the order in which the places are tried.

    With another `suffix`: what else is kept about it.
    """
    name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
    cache = os.environ.get(CACHE) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "unillava"
    )
    return [
        path.with_name(f".{path.name}{suffix}"),
        Path(cache) / f"{path.name[:100]}-{name}{suffix}",
    ]


# --- identity --------------------------------------------------------------------------------


def _identity(file: BinaryIO) -> tuple[int, int, str]:
    status = os.fstat(file.fileno())
    digest = hashlib.blake2b(digest_size=16)
    last = max(status.st_size - SAMPLE_BYTES, 0)
    for n in range(SAMPLES):
        file.seek(last * n // (SAMPLES - 1))
        digest.update(file.read(SAMPLE_BYTES))
    return status.st_size, status.st_mtime_ns, digest.hexdigest()


@contextlib.contextmanager
def _alone(file: BinaryIO) -> Iterator[None]:
    """One process at a time, where files can be locked; without locks each makes its own."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)  # ends when the file is closed
    yield


@contextlib.contextmanager
def _data_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the data file cannot be read: {error.strerror or error}",
            given=path,
            expected="a file of JSON or JSON lines",
        ) from error


# --- storing ---------------------------------------------------------------------------------


def _stored(path: Path, identity: tuple[int, int, str]) -> Index | None:
    """The index that lies on the disk, if it is one of this file as it is now."""
    for place in index_places(path):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(place, "rb") as file:
                head = json.loads(file.read(HEAD))
            count = int(head["records"])
            whole = os.path.getsize(place) == HEAD + count * ROW.itemsize
            if head["format"] == FORMAT and tuple(head["identity"]) == identity and whole:
                damages = tuple(Damage(**damage) for damage in head["damages"])
                rows = _map(place, count)
                return Index(path, rows, damages, head["num_damages"], identity)
    return None


def _map(place: Path, count: int) -> np.ndarray:
    if not count:
        return np.empty(0, ROW)
    return np.memmap(place, ROW, "r", HEAD, (count,))


def _make(
    path: Path, file: BinaryIO, identity: tuple[int, int, str], progress: Progress | None
) -> Index:
    problems = []
    for place in index_places(path):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with written(place) as out:
                _write(out, file, identity, progress)
        except (OSError, DataError) as error:
            problems.append(
                f"{place.parent}: {error.strerror if isinstance(error, OSError) else error.problem}"
            )
            continue
        found = _stored(path, identity)
        if found is not None:
            return found
    raise DataError(
        "the index of a data file cannot be written",
        given="; ".join(problems) or "it changes while it is being read",
        expected=f"about {ROW.itemsize} bytes per record in the folder of {path}, or elsewhere",
        fix=f"set {CACHE} to a folder that can be written",
    )


def _write(
    out: BinaryIO, file: BinaryIO, identity: tuple[int, int, str], progress: Progress | None
) -> None:
    """Scan the file and write its index, whose head comes last."""
    out.write(bytes(HEAD))
    damages: list[Damage] = []
    rows: list[tuple[int, ...]] = []
    records = num_damages = told = 0
    file.seek(0)
    for item in scan(file):
        if isinstance(item, Damage):
            num_damages += 1
            damages += [item] if len(damages) < MOST_DAMAGES else []
            continue
        rows.append((item.start, item.end - item.start, *_clipped(measure(item.value))))
        records += 1
        if len(rows) == BLOCK:
            out.write(np.array(rows, ROW).tobytes())
            rows.clear()
        if progress is not None and item.end - told >= 1 << 20:
            progress(item.end - told)
            told = item.end
    out.write(np.array(rows, ROW).tobytes())
    head = {
        "format": FORMAT,
        "identity": identity,
        "records": records,
        "num_damages": num_damages,
        "damages": [asdict(damage) for damage in damages],
    }
    line = json.dumps(head).encode()
    out.seek(0)
    out.write(line + b" " * (HEAD - len(line) - 1) + b"\n")


def _clipped(measured: tuple[int, int, int, int]) -> tuple[int, ...]:
    words, characters, images, videos = measured
    return words, characters, min(images, 0xFFFF), min(videos, 0xFFFF)
