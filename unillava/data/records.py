"""The records of training files, of any size, as one sequence.

Only the record that is asked for is read and parsed; the rest is an index in a memory-mapped file
that all processes share (`unillava.data.index`). A `Records` can be sent to worker processes: it
travels as file names and finds its maps again there.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unillava.data.forms import to_request
from unillava.data.index import Index, Progress, describe, open_index
from unillava.data.scan import lines_of
from unillava.errors import DataError, RequestError, UnillavaError

TEXT, IMAGE, VIDEO = range(3)
"""Modalities. A record with images and a video counts as a video."""
MODALITIES = ("text", "image", "video")

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class RecordFile:
    """One file of records."""

    def __init__(self, path: Path, folders: tuple[str, ...], index: Index) -> None:
        self.path = path
        self.folders = folders
        """Where relative paths of media begin."""
        self._index: Index | None = index
        self._identity = index.identity
        self._file: io.FileIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Neither maps nor open files travel.
        return self.__dict__ | {"_index": None, "_file": None}

    @property
    def index(self) -> Index:
        """Where its records lie.

        Raises:
            DataError: the file is not what it was when it was opened first.
        """
        if self._index is None:
            index = open_index(self.path)
            if index.identity != self._identity:
                raise _changed(self.path)
            self._index = index
        return self._index

    def __len__(self) -> int:
        return len(self.index.rows)

    def read(self, number: int) -> bytes:
        """The text of a record.

        Raises:
            DataError: the file cannot be read, or has changed.
        """
        row = self.index.rows[number]
        offset, size = int(row["offset"]), int(row["size"])
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (kept open)
            data = _read_at(self._file, offset, size)
        except OSError as error:
            raise DataError(
                f"the data file cannot be read any more: {error.strerror or error}", given=self.path
            ) from error
        if len(data) != size:
            raise _changed(self.path)
        return data

    def parse(self, number: int) -> Any:
        """A record as it stands in the file.

        Raises:
            DataError: as `read` does.
        """
        try:
            return json.loads(self.read(number))
        except ValueError as error:
            raise _changed(self.path) from error

    def lines(self, numbers: Sequence[int]) -> list[int]:
        """In which line of the file each of these records begins, counted from 1."""
        offsets = self.index.rows["offset"][list(numbers)].astype(np.int64)
        with open(self.path, "rb") as file:
            return lines_of(file, offsets.tolist())


class Records(Sequence[Any]):
    """The records of some files, or a choice of them; made by `open_records`.

    `records[i]` is a record as it stands in its file. `take` and `join` make mixtures.
    """

    def __init__(self, files: Sequence[RecordFile], chosen: np.ndarray | None = None) -> None:
        self.files = tuple(files)
        self._starts = np.cumsum([0, *map(len, self.files)])
        self._chosen = chosen
        """int64: numbers over all files; None: all of them in order."""

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, number: int) -> Any:
        file, place = self.locate(number)
        return file.parse(place)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("files", "_starts", "_chosen")}

    def take(self, numbers: Sequence[int] | np.ndarray) -> Records:
        """Only these records, in this order."""
        numbers = np.asarray(numbers, np.int64)
        return Records(self.files, numbers if self._chosen is None else self._chosen[numbers])

    @staticmethod
    def join(parts: Sequence[Records]) -> Records:
        """All records of all parts, in order."""
        files = [file for part in parts for file in part.files]
        if all(part._chosen is None for part in parts):
            return Records(files)
        starts = np.cumsum([0, *(part._starts[-1] for part in parts)])
        numbers = [start + part.numbers for start, part in zip(starts, parts, strict=False)]
        return Records(files, np.concatenate(numbers))

    def locate(self, number: int) -> tuple[RecordFile, int]:
        """The file of a record, and its number there.

        Raises IndexError as a list does.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        place = int(number) % len(self)
        if self._chosen is not None:
            place = int(self._chosen[place])
        n = int(np.searchsorted(self._starts, place, "right")) - 1
        return self.files[n], place - int(self._starts[n])

    def where(self, number: int) -> str:
        """File, record and line, for messages; reads the file up to there."""
        return self.places([number])[0]

    def places(self, numbers: Sequence[int]) -> list[str]:
        """As `where` says it, for many records at once."""
        located = [self.locate(number) for number in numbers]
        told: dict[tuple[int, int], str] = {}
        for file in {id(file): file for file, _ in located}.values():
            own = sorted({place for other, place in located if other is file})
            for place, line in zip(own, file.lines(own), strict=True):
                told[id(file), place] = f"{file.path.name} record {place} (line {line})"
        return [told[id(file), place] for file, place in located]

    def request(self, number: int, placement: str = "keep") -> tuple[dict[str, Any], Any]:
        """A record as a request for `Pipeline.prepare(request, generate=False)`, and its id.

        Raises:
            RequestError: the record cannot be understood; the message says which.
            DataError: its file cannot be read any more.
        """
        file, place = self.locate(number)
        try:
            return to_request(file.parse(place), file.folders, placement)
        except RequestError as error:
            raise self.failure(number, error) from error

    def failure(self, number: int, error: UnillavaError) -> UnillavaError:
        """The same kind of error, saying which record it is about."""
        where = self.where(number)
        if error.problem.startswith(where):
            return error
        return type(error)(
            f"{where}: {error.problem}",
            given=error.given,
            expected=error.expected,
            fix=error.fix,
        )

    @cached_property
    def words(self) -> np.ndarray:
        """int64 [records]: what white space separates, over all turns, as LLaVA counts."""
        return self._column("words")

    @cached_property
    def characters(self) -> np.ndarray:
        """int64 [records]: over all turns."""
        return self._column("characters")

    @cached_property
    def images(self) -> np.ndarray:
        """int64 [records]: how many."""
        return self._column("images")

    @cached_property
    def videos(self) -> np.ndarray:
        """int64 [records]: how many."""
        return self._column("videos")

    @cached_property
    def modality(self) -> np.ndarray:
        """int8 [records]: TEXT, IMAGE or VIDEO."""
        return np.select([self.videos > 0, self.images > 0], [VIDEO, IMAGE], TEXT).astype(np.int8)

    @cached_property
    def modality_lengths(self) -> np.ndarray:
        """int64 [records]: words, negative without media: what LLaVA's sampler groups by."""
        words = np.maximum(self.words, 1)
        return np.where(self.modality == TEXT, -words, words)

    @property
    def numbers(self) -> np.ndarray:
        """int64 [records]: each one's number, counted over all records of all files."""
        return np.arange(self._starts[-1]) if self._chosen is None else self._chosen

    def _column(self, name: str) -> np.ndarray:
        columns = [file.index.rows[name].astype(np.int64) for file in self.files]
        column = np.concatenate(columns) if columns else np.empty(0, np.int64)
        return column if self._chosen is None else column[self._chosen]


def open_records(
    paths: Paths,
    image_folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    allow_damage: bool = False,
    progress: Progress | None = None,
) -> Records:
    """The records of files, one after another.

    Args:
        paths: a file, or several; `folder/{a,b}.json` (LLaVA-NeXT) names two.
        image_folder: where relative paths of media begin, or several such folders, which are
            searched in order; None: where each file lies, then the working directory.
        allow_damage: leave out what cannot be read of a damaged file, instead of refusing it.
        progress: called with bytes read while an index is made.

    Raises:
        DataError: a file cannot be read, is empty or damaged; the message names line and column.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = []
    for path in (Path(path) for written in listed for path in expand_braces(os.fspath(written))):
        index = open_index(path, progress)
        if index.damages and not allow_damage:
            raise describe(index, index.damages[0])
        files.append(RecordFile(path, _folders(image_folder, path), index))
    if not files:
        raise DataError("no data file is named", expected="a file of JSON or JSON lines")
    return Records(files)


def expand_braces(path: str) -> list[str]:
    """`folder/{a,b}.json` as `folder/a.json`, `folder/b.json`; other paths as they are."""
    match = re.fullmatch(r"(.*)\{([^{}]*)\}(.*)", path)
    if not match or os.path.exists(path):
        return [path]
    return [f"{match[1]}{name.strip()}{match[3]}" for name in match[2].split(",")]


def _folders(given: Any, path: Path) -> tuple[str, ...]:
    if given is None:
        # MindFormers and PaddleMIX write paths as seen from the working directory.
        return tuple(dict.fromkeys((str(path.parent), ".")))
    if isinstance(given, str | os.PathLike):
        return (os.fspath(given),)
    return tuple(map(os.fspath, given))


def _read_at(file: io.FileIO, offset: int, size: int) -> bytes:
    if hasattr(os, "pread"):  # independent of other threads and of processes that share the file
        return os.pread(file.fileno(), size, offset)
    with open(file.name, "rb") as own:
        own.seek(offset)
        return own.read(size)


def _changed(path: Path) -> DataError:
    return DataError(
        "the data file has changed since it was opened",
        given=path,
        fix="start again; if it has not changed, remove its .unillava-index file",
    )
