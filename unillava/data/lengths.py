"""How long every record is as a sample: counted once, without decoding a picture, and kept.

What packing has to know. A record's length is the number of positions of its merged sequence:
tokens of its text and rows of its pictures, whose sizes their headers tell. Lengths lie beside the
index of the data file, one array per way to prepare samples (tokenizer, template, model, …).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unillava.data import layout
from unillava.data.conversation import render
from unillava.data.files import written
from unillava.data.images import image_size
from unillava.data.index import index_places
from unillava.data.pipeline import Pipeline
from unillava.data.processes import for_each
from unillava.data.records import RecordFile, Records
from unillava.data.request import normalise
from unillava.data.tokens import Encoded, encode
from unillava.errors import DataError, RequestError, UnillavaError
from unillava.progress import Advance, no_bar

FORMAT = 1
SUFFIX = ".unillava-lengths"
HEAD = 64
"""Bytes before the array: a digest of it and of what it was counted for."""
ROW = np.dtype([("length", "<i4"), ("needed", "<i4")])
"""Positions of a sample, and how many of them, from the first, hold something to learn.

Both are 0 for a record that cannot be used, which is tried again each time."""
UNKNOWN = -1
Bar = Callable[[int], contextlib.AbstractContextManager[Advance]]
FEW = 2000
"""Records that are counted before more processes have started."""


def token_lengths(
    pipeline: Pipeline, encoded: Encoded, sizes: Sequence[tuple[int, int] | None], num_videos: int
) -> np.ndarray | None:
    """How many positions of the merged sequence each token takes.

    Args:
        pipeline: of the checkpoint.
        encoded: a conversation with one token for each picture and video.
        sizes: (height, width) of the pictures; None where it is not known.
        num_videos: how many there are.

    Returns:
        int64 [tokens]; None if that depends on the size of a picture that is not known.
    """
    spec = pipeline.spec
    if spec.image_mode == "anyres" and None in sizes:
        return None
    lengths = np.ones(len(encoded.ids), np.int64)
    square = (spec.vision.image_size,) * 2
    if sizes:
        each = [layout.image_tokens(spec, size or square) for size in sizes]
        lengths[encoded.ids == spec.image_token] = each
    if num_videos:
        lengths[encoded.ids == spec.video_token] = layout.video_tokens(spec, pipeline.num_frames)
    return lengths


def sample_length(
    records: Records, pipeline: Pipeline, placement: str, number: int
) -> tuple[int, int]:
    """(length, needed) of one record, as in `ROW`; both are those of what `prepare` would return.

    Raises:
        UnillavaError: the record cannot be used.
    """
    request, _ = records.request(number, placement)
    messages, images, videos = normalise(request)
    pipeline.refuse_unsupported(videos)
    encoded = encode(pipeline.tokenizer, render(pipeline.template, messages), pipeline.spec)
    looks = pipeline.spec.image_mode == "anyres"
    sizes = [image_size(source) if looks else None for source in images]
    ends = np.cumsum(token_lengths(pipeline, encoded, sizes, len(videos)))
    targets = np.flatnonzero(encoded.learnt[1:]) + 1  # nothing is asked for the first token
    if not len(targets):
        raise RequestError("nothing in the sample is learnt")
    return int(ends[-1]), int(ends[targets[0]])


def refusal(records: Records, pipeline: Pipeline, placement: str, number: int) -> UnillavaError:
    """Why a record that has no length, or needs more positions than there are, cannot be used."""
    try:
        _, needed = sample_length(records, pipeline, placement, number)
    except UnillavaError as error:
        return records.failure(number, error)
    error = RequestError(
        "all that is to be learnt lies behind the longest length",
        given=f"{needed} positions before the end of the first learnt token",
        fix="raise data.max_length, or drop the record",
    )
    return records.failure(number, error)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, which share the counting."""

    rank: int = 0
    world: int = 1
    total: Callable[[np.ndarray], np.ndarray] = lambda array: array
    """The sum over all ranks of an array of each; collective."""


def sample_lengths(
    records: Records,
    pipeline: Pipeline,
    placement: str = "keep",
    *,
    workers: int = 0,
    ranks: Ranks = Ranks(),
    progress: Bar = no_bar,
) -> np.ndarray:
    """The lengths of all records.

    What is not known yet is counted by all ranks together, each a part, and kept by the first one.
    So all have the same, whichever disks they see.

    Args:
        records: whose.
        pipeline: that will prepare them.
        placement: of images; see `unillava.data.forms`.
        workers: processes of this rank; 0: this one alone.
        ranks: the processes of the run.
        progress: a context that is entered with how many records are counted here, and gives
            what is called with how many have been since the last call.

    Returns:
        `ROW` [records], read-only.

    Raises:
        DataError: a data file has changed, or a worker process dies.
    """
    setting = setting_of(pipeline, placement)
    first = ranks.rank == 0
    known = _kept(records, setting)
    known = ranks.total(known if first else np.zeros_like(known))
    missing = np.unique(records.numbers[known[records.numbers, 0] <= 0])
    if len(missing):
        make = functools.partial(_make_count, Records(records.files), pipeline, placement)
        known[missing] = ranks.total(_counted(make, missing, workers, ranks, progress))
        if first:
            _keep(records, setting, known)
    rows = _as_rows(known[records.numbers])
    rows.flags.writeable = False
    return rows


def _counted(
    make: Callable[[], Callable[[int], tuple[int, int]]],
    missing: np.ndarray,
    workers: int,
    ranks: Ranks,
    progress: Bar,
) -> np.ndarray:
    """int64 [missing, 2]: this rank's share of what is missing, 0 where others count."""
    counted = np.zeros((len(missing), 2), np.int64)
    mine = range(ranks.rank, len(missing), ranks.world)
    workers = workers if len(mine) > FEW else 0
    rows = for_each(make, missing[mine].tolist(), workers)
    with progress(len(mine)) as advance:
        for place, row in zip(mine, rows, strict=True):
            counted[place] = row
            advance(1)
    return counted


def _as_rows(known: np.ndarray) -> np.ndarray:
    """int64 [n, 2] as `ROW` [n]."""
    return np.ascontiguousarray(known.astype("<i4")).view(ROW).reshape(-1)


def setting_of(pipeline: Pipeline, placement: str) -> str:
    """A digest of everything but the records that decides their lengths."""
    import transformers

    template, tokenizer = pipeline.template, pipeline.tokenizer
    facts = [
        FORMAT,
        transformers.__version__,
        repr(pipeline.spec),
        pipeline.num_frames,
        placement,
        getattr(template, "source", repr(template)),
        type(tokenizer).__name__,
        repr(tokenizer.special_tokens_map),
        tokenizer("").input_ids,
        _vocabulary(tokenizer),
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """All that a tokenizer knows; of a slow one its pieces, and its settings."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    settings = {k: str(v) for k, v in tokenizer.init_kwargs.items() if not k.endswith("_file")}
    return json.dumps([sorted(tokenizer.get_vocab().items()), settings], sort_keys=True)


def _make_count(
    records: Records, pipeline: Pipeline, placement: str
) -> Callable[[int], tuple[int, int]]:
    return functools.partial(_count, records, pipeline, placement)


def _count(records: Records, pipeline: Pipeline, placement: str, number: int) -> tuple[int, int]:
    try:
        return sample_length(records, pipeline, placement, number)
    except DataError:  # the file itself
        raise
    except UnillavaError:
        return 0, 0


# --- storing ---------------------------------------------------------------------------------


def _places(file: RecordFile, setting: str) -> tuple[str, list[Path]]:
    """What the lengths of a file are counted for, and where they may lie."""
    folders = [os.path.abspath(folder) for folder in file.folders]
    how = hashlib.blake2b(json.dumps([setting, folders]).encode(), digest_size=8).hexdigest()
    return json.dumps([how, file.index.identity]), index_places(file.path, f".{how}{SUFFIX}")


def _kept(records: Records, setting: str) -> np.ndarray:
    """int64 [records of all files, 2]; UNKNOWN where nothing is kept."""
    rows = np.concatenate([_stored(file, setting) for file in records.files])
    return rows.view("<i4").reshape(-1, 2).astype(np.int64)


def _keep(records: Records, setting: str, known: np.ndarray) -> None:
    """Keep what is known; where no folder can be written, it is counted again the next time."""
    bounds = np.cumsum([len(file) for file in records.files])[:-1]
    for file, part in zip(records.files, np.split(known, bounds), strict=True):
        rows = _as_rows(part)
        # The same file may stand in a mixture twice, each time with other records.
        _store(file, setting, np.where(rows["length"] > 0, rows, _stored(file, setting)))


def _stored(file: RecordFile, setting: str) -> np.ndarray:
    """`ROW` [records of the file] as kept, if that is whole and of the file as it is now."""
    key, places = _places(file, setting)
    for place in places:
        with contextlib.suppress(OSError):
            data = place.read_bytes()
            content = data[HEAD:]
            if data[:HEAD] == _head(key, content) and len(content) == len(file) * ROW.itemsize:
                return np.frombuffer(content, ROW)
    return np.full(2 * len(file), UNKNOWN, "<i4").view(ROW)


def _store(file: RecordFile, setting: str, rows: np.ndarray) -> None:
    key, places = _places(file, setting)
    content = rows.tobytes()
    for place in places:
        with contextlib.suppress(OSError, DataError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with written(place) as out:
                out.write(_head(key, content) + content)
            return


def _head(key: str, content: bytes) -> bytes:
    return hashlib.blake2b(key.encode() + content, digest_size=HEAD).digest()
