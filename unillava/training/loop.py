"""The training loop: the same for every stage, framework and number of ranks.

It asks the feed for the micro-batches of each update, passes them to the backend's engine, and
keeps the books: rates, norms, logs, checkpoints, signals. What is computed is decided by the
recipe alone; how it is spread over devices is the engine's business.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

from unillava.errors import UnillavaError
from unillava.rope import rotary_tables
from unillava.spec import LlavaSpec, TextSpec
from unillava.training import state
from unillava.training.diagnosis import Pass, Watch, rank_report, suspects, write_failure
from unillava.training.flops import attention_pairs
from unillava.training.groups import PartGroup
from unillava.training.lora import dropout_noise
from unillava.training.recipe import Recipe
from unillava.training.schedule import Schedule

INPUTS = (
    *("input_ids", "merge_index", "position_ids", "segment_ids", "cos", "sin"),
    *("target_index", "targets", "pixel_values", "pixel_values_videos"),
    *("noise_rows", "noise_columns"),
)
"""The batch in the order of `LlavaForTraining.forward`."""


class TrainingError(UnillavaError):
    """A run cannot go on: a loss that is no number or explodes, a bad sample."""


class MicroBatch(Protocol):
    """What the feed gives: the samples of one pass of one rank."""

    arrays: Mapping[str, np.ndarray]
    learnt: int
    """Tokens that are learnt."""
    positions: int
    """Positions that are not padding."""
    samples: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    """(sample, why) of those that were skipped."""


class Feed(Protocol):
    """Where the data come from."""

    def updates(self, start: int, stop: int) -> Iterator[Sequence[MicroBatch]]:
        """This rank's micro-batches of each update from `start` to `stop`."""


@dataclass(frozen=True)
class Update:
    """One finished update, for logs."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the learnt tokens of the global batch (or as `optimizer.normalise` says)."""
    norm: float
    norms: Mapping[str, float]
    rates: Mapping[str, float]
    learnt: int
    positions: int
    samples: int
    bad: int
    """Samples that were left out."""
    tiles: int
    """Tiles of pictures, that of a batch without any included."""
    frames: int
    pairs: int
    """See `flops.attention_pairs`."""
    seconds: float
    """Since the last update was done."""
    waited: float
    """Seconds of these for data."""
    skipped: bool
    """A gradient is not finite, so nothing was changed."""


@dataclass
class Run:
    """Everything that the loop needs."""

    recipe: Recipe
    spec: LlavaSpec
    engine: Any
    feed: Feed
    groups: Sequence[PartGroup]
    rates: Mapping[str, float]
    """Group -> full learning rate."""
    schedule: Schedule
    parallel: Any
    """The backend's module of that name."""
    output: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What state.json says beside the step."""
    report: Callable[[Update], None] = lambda update: None
    warn: Callable[[str], None] = lambda text: None
    report_bad: Callable[[int, str, str], None] = lambda step, name, why: None
    """Called with (step, sample, why) for each sample that was left out, on every rank."""

    def train(self, start: int, stop_at: int) -> int:
        """Take the updates from `start` to `stop_at`; returns the number of finished ones.

        Fewer than planned if a signal asked to stop. The state is saved at the end.

        Raises:
            TrainingError: the loss is no number or explodes; says where.
        """
        watch = Watch(self.spec.text.vocab_size)
        step, saved, began = start, start, time.monotonic()
        with _signals() as asked:
            for batches in self.feed.updates(start, stop_at):
                update, passes = self._update(step, batches, began)
                began += update.seconds
                self.report(update)
                self._check(update, passes, watch)
                step += 1
                stop = self._anyone(bool(asked))
                if stop or (step % self.recipe.saving.every == 0 and watch.calm):
                    self.save(step)
                    saved = step
                if stop:
                    self.warn(f"stopped by {asked[0] if asked else 'another rank'} at step {step}")
                    return step
        if saved != step:
            self.save(step)
        return step

    def save(self, step: int) -> Path:
        """A portable checkpoint of now; collective."""
        rank, world = self.parallel.world()
        scale = self.engine.loss_scale
        facts = {
            "engine_steps": self.engine.steps,
            "loss_scale": None if scale is None else dataclasses.asdict(scale),
        }
        return state.save(
            self.output,
            step,
            self.engine.state(),
            {**facts, **self.facts},
            rank=rank,
            world=world,
            barrier=self.parallel.barrier,
            keep=self.recipe.saving.keep,
        )

    def _update(
        self, step: int, batches: Sequence[MicroBatch], began: float
    ) -> tuple[Update, list[Pass]]:
        """One update, and how each pass of this rank went. `began`: when the last one was done."""
        waited = time.monotonic() - began
        counts = [self._counts(batch) for batch in batches]
        totals = self.parallel.sum_over_ranks(np.sum(counts, axis=0, dtype=np.int64))
        learnt, positions, samples, bad, tiles, frames, pairs = (int(count) for count in totals)
        loss, passes = 0.0, []
        for n, batch in enumerate(batches, 1):
            scale, last = self._scale(batch, totals), n == len(batches)
            value = self.engine.accumulate(self._inputs(batch.arrays, step), scale, last=last)
            loss += value
            mean = value / (scale * max(1, batch.learnt))
            passes.append(Pass(batch.samples, batch.learnt, batch.positions, mean))
        rates = {name: rate * self.schedule.factor(step) for name, rate in self.rates.items()}
        norms = self.engine.update(rates)
        loss = float(self.parallel.sum_over_ranks(np.array([loss], np.float64))[0])
        if bad:
            self._name_bad(step + 1, batches)
        update = Update(
            step=step + 1,
            loss=loss,
            norm=norms.total,
            norms=norms.groups,
            rates=rates,
            learnt=learnt,
            positions=positions,
            samples=samples,
            bad=bad,
            tiles=tiles,
            frames=frames,
            pairs=pairs,
            seconds=time.monotonic() - began,
            waited=waited,
            skipped=norms.skipped,
        )
        return update, passes

    def _counts(self, batch: MicroBatch) -> tuple[int, ...]:
        arrays = batch.arrays
        tiles, frames = (
            len(arrays.get(name, ())) for name in ("pixel_values", "pixel_values_videos")
        )
        pairs = 0
        if batch.positions:
            pairs = attention_pairs(arrays["segment_ids"], self.spec.text.sliding_window)
        samples, bad = len(batch.samples), len(batch.bad)
        return batch.learnt, batch.positions, samples, bad, tiles, frames, pairs

    def _name_bad(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Collective: rank 0 hears of every rank's bad samples."""
        own = json.dumps([found for batch in batches for found in batch.bad])
        for text in gather_text(self.parallel, own):
            for name, why in json.loads(text):
                self.report_bad(step, name, why)

    def _scale(self, batch: MicroBatch, totals: np.ndarray) -> float:
        """What the sum of a micro-batch's token losses is multiplied by."""
        if self.recipe.optimizer.normalise == "tokens":
            return 1.0 / max(1, int(totals[0]))
        # Every micro-batch of every rank weighs the same, however few tokens it has.
        return 1.0 / (max(1, batch.learnt) * int(self._micro_batches))

    @property
    def _micro_batches(self) -> int:
        return self.recipe.steps.batch // self.recipe.steps.micro_batch

    def _inputs(self, arrays: Mapping[str, np.ndarray], step: int) -> list[np.ndarray | None]:
        tables = _tables(self.spec.text, arrays["input_ids"].shape[1])
        noise = dropout_noise(arrays, self.spec, self.recipe, step)
        given = {**arrays, **tables, **noise}
        if not self.recipe.data.packing:
            # A row is one sample with padding behind it: attention that is causal sees nothing
            # else, and without a mask it is faster.
            del given["segment_ids"]
        return [given.get(name) for name in INPUTS]

    def _anyone(self, asked: bool) -> bool:
        """Whether any rank was asked to stop: all must stop at the same step."""
        return bool(self.parallel.sum_over_ranks(np.array([int(asked)], np.int64))[0])

    def _check(self, update: Update, passes: Sequence[Pass], watch: Watch) -> None:
        """Collective where something is wrong: then every rank tells of its passes.

        Raises:
            TrainingError: the run cannot go on; failure.json in the output says all that is known.
        """
        usual = watch.usual
        problem = watch.judge(update.loss, update.skipped)
        if problem is None:
            return
        rank, _ = self.parallel.world()
        texts = gather_text(self.parallel, rank_report(rank, passes))
        ranks = [json.loads(text) for text in texts]
        if rank == 0:
            path = self.output / "failure.json"
            write_failure(path, problem, dataclasses.asdict(update), ranks, usual)
        norms = sorted(update.norms.items(), key=lambda item: math.isfinite(item[1]))
        raise TrainingError(
            f"{problem} at step {update.step}",
            given=f"loss {update.loss:.4g}, usually {usual:.4g}; gradient norms: "
            + ", ".join(f"{name} {norm:.3g}" for name, norm in norms)
            + f"; look first at {suspects(ranks)}",
            expected="a loss like that of the steps before",
            fix="look at these samples with `unillava data check`; lower the rates, lengthen the "
            f"warm-up, clip gradients. {self.output / 'failure.json'} names every sample of this "
            "update; the newest checkpoint is from before it",
        )


@functools.lru_cache(maxsize=16)
def _tables(spec: TextSpec, length: int) -> Mapping[str, np.ndarray]:
    """The rotary tables of a sequence; float64 tells the engine to keep them in float32."""
    cos_LE, sin_LE = rotary_tables(spec, length)
    return {"cos": cos_LE.astype(np.float64), "sin": sin_LE.astype(np.float64)}


def gather_text(parallel: Any, own: str) -> list[str]:
    """Each rank's text, in the order of the ranks; collective.

    Args:
        parallel: the backend's module of that name; it can only add up numbers.
        own: of this rank.
    """
    rank, world = parallel.world()
    codes = np.frombuffer(own.encode(), np.uint8)
    sizes = np.zeros(world, np.int64)
    sizes[rank] = len(codes)
    ends = np.cumsum(parallel.sum_over_ranks(sizes))
    everything = np.zeros(ends[-1], np.int64)
    everything[ends[rank] - len(codes) : ends[rank]] = codes
    joined = parallel.sum_over_ranks(everything).astype(np.uint8)
    return [part.tobytes().decode() for part in np.split(joined, ends[:-1])]


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one kills as usual."""
    asked: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        # Native code that waits for other ranks would take an interrupted read for a failure.
        signal.siginterrupt(number, False)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
