"""Mixtures of data files, written down in YAML as in LLaVA-NeXT and MindFormers.

    datasets:
      - json_path: a/instruct.json         # JSON or JSON lines; folder/{a,b}.json names two
        sampling_strategy: "first:10%"     # first, end or random : a number or a percentage; all
        image_folder: a/images             # unillava only; default: the folder of json_path

A percentage is rounded up. `random` is seeded here, and `end:0` takes nothing; in the original it
takes everything. What the original quietly takes for `all` (an unknown name, a strategy without
its number) is refused.
"""

from __future__ import annotations

import difflib
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from unillava.data.files import as_json, refuse_taken, written
from unillava.data.forms import (
    CLOSE_TAG,
    OPEN_TAG,
    TEXT_TAG,
    is_url,
    read_parts,
    resolve,
)
from unillava.data.records import Records, open_records
from unillava.data.video import load_frames
from unillava.errors import DataError, MediaError, RequestError

SEED = 42
STRATEGIES = ("all", "first", "end", "random")
ENTRY_KEYS = ("json_path", "sampling_strategy", "image_folder")

Json = dict[str, Any]
Progress = Callable[[int], None]
"""Is called with the number of records that have been written since the last call."""


@dataclass(frozen=True)
class Strategy:
    """Which records of a file are taken."""

    kind: Literal["all", "first", "end", "random"] = "all"
    amount: float = 0.0
    percent: bool = False

    def count(self, total: int) -> int:
        """How many of `total` are asked for; may be more than there are."""
        if self.kind == "all":
            return total
        return math.ceil(self.amount * total / 100) if self.percent else int(self.amount)

    def numbers(self, total: int, source: random.Random) -> np.ndarray:
        """int64: which of `total` records, in their order in the mixture."""
        count = min(self.count(total), total)
        if self.kind == "end":
            return np.arange(total - count, total)
        if self.kind == "random":
            # As the original does it, so that the same seed gives it the same choice.
            shuffled = list(range(total))
            source.shuffle(shuffled)
            return np.array(shuffled[:count], np.int64)
        return np.arange(count)


@dataclass(frozen=True)
class Entry:
    """One file of a mixture."""

    json_path: str
    strategy: Strategy
    image_folder: str | None = None

    @property
    def root(self) -> str:
        """Where relative paths of its media begin."""
        return self.image_folder or os.path.dirname(self.json_path) or "."


def parse_strategy(text: Any) -> Strategy:
    """`all`, or `first:N`, `end:N`, `random:N` with a count or a percentage.

    Raises:
        DataError: it is written differently.
    """
    name, colon, number = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name == "all" and not colon:
        return Strategy()
    percent = number.endswith("%")
    try:
        amount = float(number[:-1]) if percent else int(number)
    except ValueError:
        amount = -1
    if name in STRATEGIES[1:] and 0 <= amount < math.inf:
        return Strategy(name, amount, percent)
    near = difflib.get_close_matches(name, STRATEGIES, 1)
    raise DataError(
        "a sampling_strategy cannot be understood",
        given=repr(text),
        expected="all, or first:N, end:N, random:N, where N is a count (100) or a share (2.5%)",
        fix=f"did you mean {near[0]}?" if near and near[0] != name else None,
    )


def read_mixture(path: str | os.PathLike[str]) -> list[Entry]:
    """The entries of a YAML file.

    A json_path is looked for from the working directory, and then from the folder of the file.

    Raises:
        DataError: the file cannot be read, or has other fields than those of this module.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"the mixture cannot be read: {error}", given=path) from error
    listed = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed:
        raise DataError(
            "a mixture lists no datasets",
            given=path,
            expected="datasets: a list of entries with json_path and sampling_strategy",
        )
    return [_read_entry(path, n, entry) for n, entry in enumerate(listed)]


def open_mixture(path: str | os.PathLike[str], seed: int = SEED) -> Records:
    """The records of a mixture, chosen and in order, without copying them.

    Raises:
        DataError: as `read_mixture` and `open_records` do.
    """
    return choose(read_mixture(path), seed)


def choose(
    entries: Sequence[Entry], seed: int = SEED, tell: Callable[[str], None] | None = None
) -> Records:
    """The records that the entries name, one entry after another.

    Args:
        entries: of `read_mixture`.
        seed: of every `random`: one sequence of random numbers for all entries.
        tell: is called with a line before and after every file.

    Raises:
        DataError: as `open_records` does.
    """
    source = random.Random(seed)
    parts = []
    for entry in entries:
        strategy = entry.strategy
        if tell is not None:
            tell(f"Loading {entry.json_path}")
        records = open_records(entry.json_path, entry.root)
        parts.append(records.take(strategy.numbers(len(records), source)))
        if tell is not None:
            tell(f"Loaded {len(parts[-1])} of {len(records)} samples from {entry.json_path}")
    return Records.join(parts)


# --- writing ---------------------------------------------------------------------------------


def write_lines(
    records: Records, path: str | os.PathLike[str], progress: Progress | None = None
) -> None:
    """JSON lines: every record with all its fields, and `image_root` where it has media.

    Raises:
        DataError: the name is taken, the disk refuses, or a record is no object.
    """
    with written(path, overwrite=False) as file:
        for number in range(len(records)):
            record = records[number]
            if not isinstance(record, dict):
                raise DataError(f"{records.where(number)} is no object", given=repr(record)[:100])
            if _has_media(record):
                folders = records.locate(number)[0].folders
                record = {
                    **record,
                    "image_root": record.get("image_root") or _root(record, folders),
                }
            file.write(as_json(record) + b"\n")
            if progress is not None:
                progress(1)


def _has_media(record: Json) -> bool:
    return any(record.get(key) for key in ("image", "images", "video", "videos"))


def _root(record: Json, folders: Sequence[str]) -> str:
    """The folder in which the record's first medium is."""
    key = next(key for key in ("image", "images", "video", "videos") if record.get(key))
    first = record[key][0] if isinstance(record[key], list) else record[key]
    holds = (
        f for f in folders if isinstance(first, str) and os.path.exists(os.path.join(f, first))
    )
    return os.path.abspath(next(holds, folders[0]))


# --- MindFormers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Processed:
    """What `process` has done."""

    samples: int
    dropped: int
    max_frames: int
    """Most media in one sample."""


def process(
    entries: Sequence[Entry],
    path: str | os.PathLike[str],
    seed: int = SEED,
    tell: Callable[[str], None] = print,
) -> Processed:
    """Write a mixture in the form of MindFormers' data_process.py, which its training reads.

    Samples whose media do not exist under any entry's folder, or whose video cannot be played,
    are left out and named. (The original looks only for the first medium of a sample that exists.)

    Raises:
        DataError: the name is taken, the disk refuses, or a record cannot be understood.
        MediaError: there are videos, and PyAV is not installed.
    """
    refuse_taken(path)
    records = choose(entries, seed, tell)
    roots = list(dict.fromkeys(entry.root for entry in entries))
    samples = max_frames = 0
    with written(path, overwrite=False) as file:
        file.write(b"[")
        for number in range(len(records)):
            media = _existing(records, number, roots, tell)
            if media is None:
                continue
            max_frames = max(max_frames, len(media))
            if records.videos[number] and not all(_plays(path, tell) for path in media):
                continue
            sample = {"conversations": _tagged(records, number, media)}
            file.write(b",\n  " if samples else b"\n  ")
            # A JSON string has no line breaks, so that all of them are of the layout.
            file.write(as_json(sample, indent=2).replace(b"\n", b"\n  "))
            samples += 1
        file.write(b"\n]" if samples else b"]")
    tell(str(samples))
    tell(f"max frames is {max_frames}")
    return Processed(samples, len(records) - samples, max_frames)


def _existing(
    records: Records, number: int, roots: Sequence[str], tell: Callable[[str], None]
) -> list[str] | None:
    """The media of a record with their root; None if a file is not there."""
    parts = _parts(records, number)
    media = parts.images or parts.videos
    for root in roots:
        paths = [resolve(source, (root,)) for source in media]
        if all(is_url(path) or os.path.isfile(path) for path in paths):
            return paths
    tried = ", ".join(os.path.join(root, source) for source in media for root in roots)
    tell(f"Image files: {tried} are/is not exists, skip!!!")
    return None


def _plays(path: str, tell: Callable[[str], None]) -> bool:
    """Whether the first and the last frame of a video can be decoded."""
    try:
        load_frames(path, 2)
    except MediaError as error:
        if "PyAV" in str(error):
            raise
        tell(path)
        return False
    return True


def _tagged(records: Records, number: int, media: Sequence[str]) -> list[Json]:
    """The conversation with its media before the first text and `<text>` before the others."""
    turns = records[number]["conversations"]
    if not all(isinstance(turn, dict) and "value" in turn for turn in turns):
        speakers = {"user": "human", "assistant": "gpt"}
        plain = _parts(records, number).turns
        turns = [{"from": speakers.get(role, role), "value": text} for role, text in plain]
    tags = "".join(f"{OPEN_TAG}{path}{CLOSE_TAG}" for path in media) or OPEN_TAG + CLOSE_TAG
    first, *others = turns
    later = [
        turn if OPEN_TAG in turn["value"] else turn | {"value": TEXT_TAG + turn["value"]}
        for turn in others
    ]
    return [first | {"value": tags + first["value"]}, *later]


def _parts(records: Records, number: int) -> Any:
    try:
        return read_parts(records[number])
    except RequestError as error:
        failure = records.failure(number, error)
        raise DataError(
            failure.problem, given=error.given, expected=error.expected, fix=error.fix
        ) from error


def _read_entry(path: Path, n: int, entry: Any) -> Entry:
    position = f"{path.name}: datasets[{n}]"
    fields = entry if isinstance(entry, dict) else {}
    for key in fields:
        if key not in ENTRY_KEYS:
            near = difflib.get_close_matches(str(key), ENTRY_KEYS, 1)
            raise DataError(
                f"{position} has an unknown field",
                given=key,
                expected=f"{', '.join(ENTRY_KEYS)}",
                fix=f"did you mean {near[0]}?" if near else None,
            )
    data = fields.get("json_path")
    if not isinstance(data, str) or not data:
        raise DataError(f"{position} names no file", given=repr(entry)[:100], expected="json_path")
    beside = os.path.join(path.parent, data)
    if not os.path.exists(data) and "{" not in data and os.path.exists(beside):
        data = beside
    try:
        strategy = parse_strategy(fields.get("sampling_strategy", "all"))
    except DataError as error:
        raise DataError(
            f"{position}: {error.problem}",
            given=error.given,
            expected=error.expected,
            fix=error.fix,
        ) from None
    return Entry(data, strategy, fields.get("image_folder"))
