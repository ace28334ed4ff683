"""Training batches: a grain pipeline over the fixed order of `unillava.data.order`.

Each rank asks for its micro-batches of the updates that are still to come. Nothing before them is
read, so resuming costs nothing, and workers decode ahead in their own processes. A sample that
cannot be used is left out, and named in the micro-batch that it was to be in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from unillava.data import layout
from unillava.data.collate import TEXT, Sample, collate_rows, cut
from unillava.data.order import Order
from unillava.data.pipeline import Pipeline
from unillava.data.records import Records
from unillava.errors import DataError, RequestError, UnillavaError

READ_AHEAD = 2
"""Micro-batches that a worker keeps ready."""
MOST_BAD = 64
"""Samples in a row that cannot be used before a run is stopped: its setting is wrong."""
TARGETS_STEP = 256
"""Learnt positions are rounded up to this where shapes should be few."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one pass of one rank."""

    arrays: dict[str, np.ndarray]
    """What `collate_rows` returns."""
    learnt: int
    """Tokens that are learnt."""
    positions: int
    """Positions that are not padding."""
    samples: tuple[str, ...]
    """Ids of the samples."""
    bad: tuple[tuple[str, str], ...] = ()
    """(place in the files, why) of samples that were left out."""


@dataclass(frozen=True)
class Feed:
    """Where training data come from. Can be sent to worker processes."""

    records: Records
    pipeline: Pipeline
    order: Order
    micro_batch: int
    """Rows per pass."""
    max_length: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    """Processes that prepare batches; 0: this one does."""
    pad_to: int = 1
    on_bad: str = "skip"
    """skip or stop."""
    placement: str = "keep"
    """Where `<image>` stands; see `unillava.data.records`."""
    spare: Sample = field(init=False)

    def __post_init__(self) -> None:
        share = self.micro_batch * self.world
        if self.order.batch % share:
            raise DataError(
                "the batch cannot be shared out evenly",
                given=f"{self.order.batch} rows per update, {self.world} ranks with "
                f"{self.micro_batch} rows per pass",
                expected="a multiple of ranks times rows per pass",
            )
        object.__setattr__(self, "spare", spare_sample(self.pipeline))

    @property
    def passes(self) -> int:
        """Micro-batches of each rank per update."""
        return self.order.batch // (self.micro_batch * self.world)

    def updates(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each update from `start` to `stop`.

        Raises:
            DataError: with on_bad `stop`, a sample that cannot be used; else, many in a row; a
                data file that has changed, or a worker process that has died.
        """
        batches = self._stream(start, stop)
        in_a_row = 0
        for _ in range(start, stop):
            update = [next(batches) for _ in range(self.passes)]
            for batch in update:
                in_a_row = 0 if batch.samples else in_a_row + len(batch.bad)
                if in_a_row >= MOST_BAD:
                    raise _all_bad(in_a_row, *batch.bad[-1])
            yield update

    def _stream(self, start: int, stop: int) -> Iterator[MicroBatch]:
        stream = self._dataset(start, stop)
        try:
            yield from stream
        except RuntimeError as error:  # of grain, if a process ends
            if "process" not in str(error):
                raise
            raise DataError(
                "a worker process that prepares samples has died",
                given=str(error).splitlines()[0],
                expected="enough memory for all workers",
                fix="lower data.workers or steps.micro_batch; the run can be resumed",
            ) from error
        finally:
            stream.close()

    def _dataset(self, start: int, stop: int) -> Any:
        logging.getLogger("absl").setLevel(logging.ERROR)  # it misses a profiler, and says so
        try:
            import grain
        except ImportError:
            raise DataError(
                "training reads its data with grain, which is not installed",
                fix='pip install "unillava[train]"',
            ) from None

        first = start * self.passes
        numbers = grain.MapDataset.range(first, stop * self.passes)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
        stream = numbers.map(self.micro).to_iter_dataset(options)
        if self.workers:
            processes = grain.MultiprocessingOptions(num_workers=self.workers)
            stream = stream.mp_prefetch(processes)
        return iter(stream)

    def micro(self, number: int) -> MicroBatch:
        """Micro-batch `number` of this rank, counted from the beginning of the run."""
        update, turn = divmod(int(number), self.passes)
        begin = update * self.order.batch + (turn * self.world + self.rank) * self.micro_batch
        rows: list[list[Sample]] = []
        names: list[str] = []
        bad: list[tuple[str, str]] = []
        for numbers in self.order.rows(begin, begin + self.micro_batch):
            row: list[Sample] = []
            room = self.order.max_length or self.max_length
            for n in numbers.tolist():
                try:
                    sample, name = self._sample(n, room)
                except DataError:  # the file itself
                    raise
                except UnillavaError as error:
                    if self.on_bad == "stop":
                        raise self.records.failure(n, error) from error
                    bad.append(self._told(n, error))
                    continue
                row.append(sample)
                room -= len(sample)
                names.append(name)
            rows.append(row)
        return self._collate([row for row in rows if row], names, bad)

    def _sample(self, number: int, room: int) -> tuple[Sample, str]:
        request, name = self.records.request(number, self.placement)
        sample = self.pipeline.prepare(request, generate=False, limit=None)
        sample = cut(sample, self.max_length)
        if not sample.learnt_S[1:].any():
            raise RequestError("nothing in the sample is learnt", fix="its answer may be cut off")
        if len(sample) > room:
            raise RequestError(
                "the sample is longer than it was when the rows were filled",
                given=f"{len(sample)} positions",
                expected=f"at most {room}",
                fix="its pictures have changed meanwhile; start again, and it is counted anew",
            )
        return sample, str(name if name is not None else number)

    def _told(self, number: int, error: UnillavaError) -> tuple[str, str]:
        """Where the record stands, and what is wrong with it."""
        where = self.records.where(number)
        why = error.problem.removeprefix(f"{where}: ")
        return where, why if error.given is None else f"{why}: {error.given}"

    def _collate(
        self, rows: list[list[Sample]], names: list[str], bad: list[tuple[str, str]]
    ) -> MicroBatch:
        # Every rank computes something for every micro-batch, also one that has nothing left.
        kept = rows or [[self.spare]]
        targets_step = TARGETS_STEP if self.pad_to > 1 else 1
        arrays = collate_rows(
            kept, pad_to=self.pad_to, pad_targets_to=targets_step, spare=self.spare
        )
        if not rows:
            arrays["targets"] = np.full_like(arrays["targets"], -100)
        learnt = int((arrays["targets"] != -100).sum())
        positions = int(arrays["lengths"].sum()) if rows else 0
        return MicroBatch(arrays, learnt, positions, tuple(names), tuple(bad))


def spare_sample(pipeline: Pipeline) -> Sample:
    """What a batch carries that lacks pictures or videos: one grey tile, and one frame if the model
    takes videos, behind two positions that mean nothing."""
    spec = pipeline.spec
    picture = Image.new("RGB", (32, 32), (127, 127, 127))
    pixels_T3HW, _ = pipeline.images.tiles(picture)
    has_video = spec.video is not None
    return Sample(
        ids_S=np.zeros(2, np.int64),
        kind_S=np.full(2, TEXT, np.int8),
        row_S=np.zeros(2, np.int64),
        learnt_S=np.array([False, True]),
        pixels_T3HW=pixels_T3HW[:1],
        frames_F3HW=pipeline.images.frames([picture]) if has_video else None,
        image_rows=spec.rows_per_tile,
        video_rows=layout.rows_per_frame(spec) if has_video else 0,
    )


def _all_bad(count: int, where: str, why: str) -> DataError:
    return DataError(
        f"{count} samples in a row cannot be used",
        given=f"the last: {where}: {why}",
        expected="samples that can be read",
        fix="check data.files (path and images) of the recipe; `unillava data check` says more",
    )
