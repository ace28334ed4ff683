"""All records of training data checked, in several processes; and a clean copy of them."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unillava.data.check import UNKNOWN, Checked, Checker, Settings
from unillava.data.files import as_json, written
from unillava.data.forms import map_media, resolve, root_of
from unillava.data.index import describe
from unillava.data.pipeline import Pipeline
from unillava.data.processes import for_each
from unillava.data.records import MODALITIES, Records

EXAMPLES = 10
"""Findings of each kind that are kept with their text."""

Progress = Callable[[int], None]
"""Is called with the number of records that have been checked since the last call."""


@dataclass(frozen=True)
class Example:
    """A finding with its text."""

    number: int
    """Of the record; of a damage, how many records are before it."""
    id: Any
    detail: str
    where: str = ""


@dataclass
class Report:
    """What was found out about all records."""

    records: Records
    settings: Settings
    max_length: int | None
    """Longest sample in tokens; None: not known."""
    counts: Counter[str] = field(default_factory=Counter)
    """Kind: records with such a finding."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    bad_records: int = 0
    """Records with a problem."""
    lost: int = 0
    """Learnt tokens behind the longest length, of all records."""
    renamed: dict[int, dict[str, str]] = field(default_factory=dict)
    """Record: its media that have another suffix."""

    def __post_init__(self) -> None:
        total = len(self.records)
        self.tokens, self.picture_tokens, self.learnt = np.full((3, total), UNKNOWN, np.int32)
        self.mendable, self.repeated = np.zeros((2, total), bool)

    tokens: np.ndarray = field(init=False)
    """int32 [records], as the next two; UNKNOWN where nothing could be counted."""
    picture_tokens: np.ndarray = field(init=False)
    learnt: np.ndarray = field(init=False)
    mendable: np.ndarray = field(init=False)
    """bool [records]: a clean copy holds it, perhaps with `renamed` media."""
    repeated: np.ndarray = field(init=False)
    """bool [records]: the same as an earlier one."""

    @property
    def problems(self) -> int:
        """Records with a problem, and damaged places of files."""
        return self.bad_records + self.counts["damaged"]

    @property
    def modalities(self) -> dict[str, int]:
        """Modality: number of records."""
        return {name: int((self.records.modality == n).sum()) for n, name in enumerate(MODALITIES)}

    @property
    def is_counted(self) -> np.ndarray:
        """bool [records]: its length in tokens is known."""
        return self.tokens != UNKNOWN

    def note(self, kind: str, example: Example) -> None:
        """Keep an example, if there are not enough yet."""
        listed = self.examples.setdefault(kind, [])
        if len(listed) < EXAMPLES:
            listed.append(example)

    def enter(self, checked: Checked) -> None:
        """Add what was found out about one record."""
        number = checked.number
        self.tokens[number] = checked.tokens
        self.picture_tokens[number] = checked.picture_tokens
        self.learnt[number] = checked.learnt
        self.lost += checked.lost
        self.bad_records += bool(checked.problems)
        self.mendable[number] = checked.problems <= {"image-renamed"}
        if checked.renamed:
            self.renamed[number] = checked.renamed
        self.counts.update({kind for kind, _ in checked.findings})
        for kind, detail in checked.findings:
            self.note(kind, Example(number, checked.id, detail))


def check_records(
    records: Records,
    settings: Settings,
    make_pipeline: Callable[[], Pipeline] | None = None,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Check every record.

    Args:
        records: opened with `allow_damage`, so that damages are reported and do not stop it.
        settings: how.
        make_pipeline: called once in every process; None: prompts and tokens are not checked.
        workers: processes; 0: this one alone.
        progress: called with the number of records that have been checked since the last call.

    Raises:
        DataError: a file changes meanwhile, or a worker process dies.
    """
    make = functools.partial(_make_check, records, settings, make_pipeline)
    report = Report(records, settings, _checker(records, settings, make_pipeline).max_length)
    digests, ids = [], []
    for checked in for_each(make, range(len(records)), workers):
        report.enter(checked)
        digests.append(checked.digest)
        ids.append(checked.id)
        if progress is not None:
            progress(1)
    report.repeated = _note_repeated(report, "duplicate", digests, ids)
    _note_repeated(report, "same-id", [None if i is None else repr(i) for i in ids], ids)
    _note_damages(report)
    _locate(report)
    return report


def _checker(
    records: Records, settings: Settings, make_pipeline: Callable[[], Pipeline] | None
) -> Checker:
    return Checker(records, settings, make_pipeline() if make_pipeline else None)


def _make_check(
    records: Records, settings: Settings, make_pipeline: Callable[[], Pipeline] | None
) -> Callable[[int], Checked]:
    return _checker(records, settings, make_pipeline).check


def write_clean(
    report: Report,
    path: str | os.PathLike[str],
    *,
    drop_repeated: bool = False,
) -> int:
    """Write the records that can be trained on as JSON lines; returns how many.

    They stay as they are but for media that have another suffix than written.

    Raises:
        DataError: the name is taken (also by one of the files that were checked), or the disk
            refuses.
    """
    kept = report.mendable & ~report.repeated if drop_repeated else report.mendable
    with written(path, overwrite=False) as out:
        for number in np.flatnonzero(kept).tolist():
            file, place = report.records.locate(number)
            data = file.read(place)
            if number in report.renamed or b"\n" in data:
                names = report.renamed.get(number, {})
                data = as_json(_with_suffixes(file.parse(place), file.folders, names))
            out.write(data + b"\n")
    return int(kept.sum())


def _with_suffixes(record: Any, folders: Sequence[str], names: dict[str, str]) -> Any:
    """The record with the suffixes that its media really have."""

    def change(source: str) -> str:
        found = names.get(resolve(source, root_of(record) or folders))
        return source if found is None else os.path.splitext(source)[0] + os.path.splitext(found)[1]

    return map_media(record, change)


def _note_repeated(
    report: Report, kind: str, keys: Sequence[Any], ids: Sequence[Any]
) -> np.ndarray:
    """bool [records]: where a key stands again; each is a finding of that kind."""
    first: dict[Any, int] = {}
    repeated = np.zeros(len(keys), bool)
    for number, key in enumerate(keys):
        if key is not None and first.setdefault(key, number) != number:
            repeated[number] = True
            file, place = report.records.locate(first[key])
            told = f"{file.path.name} record {place}"
            report.note(kind, Example(number, ids[number], told))
    report.counts[kind] = int(repeated.sum())
    return repeated


def _note_damages(report: Report) -> None:
    for file in report.records.files:
        report.counts["damaged"] += file.index.num_damages
        for damage in file.index.damages[:EXAMPLES]:
            told = describe(file.index, damage).problem
            report.note("damaged", Example(damage.records, None, told))


def _locate(report: Report) -> None:
    """Say of every example where it stands; the files are read once more for their lines."""
    listed = [(k, example) for k, e in report.examples.items() if k != "damaged" for example in e]
    numbers = sorted({example.number for _, example in listed})
    places = dict(zip(numbers, report.records.places(numbers), strict=True))
    for kind, examples in report.examples.items():
        if kind != "damaged":
            report.examples[kind] = [replace(e, where=places[e.number]) for e in examples]
