"""Runs the comparison: one batch, a process for each backend, one report.

The reference runs first and stores its tensors. It then runs again, in another process with
another number of threads and with portable kernels: how far it is from itself is the noise that
the others' differences are seen against. Each other backend compares with the store as it runs.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from PIL import Image

import backends
from unillava.checkpoint import Checkpoint, locate, open_checkpoint
from unillava.parity.batch import Inputs, make_inputs, make_rows, why_not_transformers
from unillava.parity.compare import (
    EPSILON,
    TOLERANCE,
    Difference,
    Divergence,
    Facts,
    Judgement,
    Mismatch,
    Run,
    facts_of,
    first_divergence,
    first_mismatch,
    judge,
    noise_band,
    passes,
    worst_facts,
)
from unillava.parity.job import (
    Job,
    ParityError,
    Result,
    block_names,
    module_names,
    names_inside,
    output_bytes,
    run_job,
)
from unillava.spec import parameter_table

TRANSFORMERS = "transformers"
Tokens = tuple[tuple[int, ...], ...]

KEEP_EVERYTHING_BYTES = 2 << 30
"""Outputs of all modules are compared if they are not more than this; else those of the blocks,
and in a second pass those inside the first block that diverges."""


@dataclass(frozen=True)
class Settings:
    """What is to be compared, and how."""

    checkpoint: str
    backends: tuple[str, ...] = ()
    """Names, or `name@device`. Empty: all that are installed."""
    reference: str | None = None
    """A backend or `transformers`, or either `@device`; None: the first of `backends`."""
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    prompt: str | None = None
    template: str | None = None
    new_tokens: int = 16
    dtype: str = "float32"
    devices: Mapping[str, str] = field(default_factory=dict)
    """By backend; the key "" stands for all others."""
    tolerance: float | None = None
    """None: that of the dtype, see `unillava.parity.compare.TOLERANCE`."""
    gradients: bool = True
    repeats: int = 3
    """Runs of the reference in its own process; 1: its noise is not measured."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Backend -> checkpoint that it loads instead."""
    base: str | None = None
    vision: str | None = None
    """For checkpoints that lack something; see `unillava.checkpoint.open_checkpoint`."""
    work_dir: str | None = None
    """Where the temporary folder is made; None: where the system has its own."""


@dataclass(frozen=True)
class Candidate:
    """One backend against the reference."""

    label: str
    checkpoint: str
    result: Result
    run: Run
    """Outputs include those of the second pass, in the order of execution."""
    divergence: Divergence | None
    mismatch: Mismatch | None
    judgements: tuple[Judgement, ...]

    @property
    def passed(self) -> bool:
        """Whether every deciding bar is met."""
        return passes(self.judgements)


@dataclass(frozen=True)
class RowText:
    """One conversation of the batch, for the report."""

    title: str
    prompt: str
    picture: Image.Image | None
    replies: dict[str, tuple[str, ...]]
    """Label -> text of each greedy token."""


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    settings: Settings
    checkpoint: str
    model: str
    """In words: family, number of parameters, stored dtype."""
    tolerance: float
    reference: str
    reference_result: Result
    noise_runs: tuple[tuple[str, Run], ...]
    """How it was varied, and what came of it."""
    noise_facts: Facts | None
    output_noise: dict[str, float]
    gradient_noise: dict[str, float]
    candidates: tuple[Candidate, ...]
    rows: tuple[RowText, ...]
    batch: dict[str, tuple[int, ...]]
    """Shapes of the arrays."""
    everything: bool
    """Whether all modules were compared in one pass, or blocks first."""
    disk_bytes: int
    machine: str

    @property
    def passed(self) -> bool:
        """Whether every backend passed."""
        return all(candidate.passed for candidate in self.candidates)


Progress = Callable[[str, int, int, str], None]
"""Called with (label, steps done, steps in all, what is done now)."""


def run_parity(settings: Settings, progress: Progress = lambda *_: None) -> Report:
    """Compare backends on one checkpoint; see `Settings`.

    Raises:
        UnillavaError: nothing to compare, an unusable checkpoint or picture, a backend that
            cannot run, or too little room on the disk.
    """
    _check(settings)
    checkpoint = _open(settings.checkpoint, settings)
    checkpoint.check()
    plan = _plan(settings, checkpoint)
    # Imported here: this is the half that reads pictures and tokenizers.
    from unillava.loading import load_pipeline

    pipeline = load_pipeline(checkpoint, template=settings.template)
    with tempfile.TemporaryDirectory(prefix="unillava-parity-", dir=settings.work_dir) as folder:
        scratch = Path(folder)
        rows = make_rows(
            pipeline,
            scratch,
            images=settings.images,
            videos=settings.videos,
            prompt=settings.prompt,
        )
        inputs = make_inputs(pipeline, rows)
        inputs.write(scratch / "inputs")
        comparison = _Comparison(settings, checkpoint, plan, inputs, scratch, progress)
        return comparison.report(pipeline.tokenizer)


# --- what is to be run -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Participant:
    """One computation: its name in the report, what runs it where, and from which files."""

    label: str
    engine: Literal["native", "transformers"]
    backend: str
    device: str | None
    checkpoint: Path


@dataclass(frozen=True)
class _Plan:
    reference: _Participant
    candidates: tuple[_Participant, ...]


def _check(settings: Settings) -> None:
    if settings.repeats < 1:
        raise ParityError("--repeats must be at least 1", given=settings.repeats)
    if settings.new_tokens < 0:
        raise ParityError("--max-new-tokens cannot be negative", given=settings.new_tokens)
    if settings.tolerance is not None and not settings.tolerance > 0:
        raise ParityError("--tolerance must be larger than 0", given=settings.tolerance)
    named = [*settings.backends, *settings.overrides, *(key for key in settings.devices if key)]
    if settings.reference is not None and settings.reference.split("@")[0] != TRANSFORMERS:
        named.append(settings.reference)
    for name in named:
        if name.split("@")[0] not in backends.PACKAGES:
            raise ParityError(
                f"unknown backend {name!r}",
                expected=f"one of {', '.join(backends.PACKAGES)}, or one of them @device",
            )


def _plan(settings: Settings, checkpoint: Checkpoint) -> _Plan:
    """Who is the reference and who is compared with it."""
    chosen = list(dict.fromkeys(settings.backends)) or backends.installed()
    # An override of a backend that is the reference too adds it as a candidate.
    chosen += [name for name in settings.overrides if name not in chosen]
    reference = settings.reference or next(iter(chosen), "torch")
    candidates = []
    for text in chosen:
        own = settings.overrides.get(text)
        if own is not None:
            directory = _same_shapes(own, checkpoint, settings)
            candidates.append(_participant(settings, text, directory, " (override)"))
        elif text != reference:
            candidates.append(_participant(settings, text, checkpoint.directory))
    if not candidates:
        raise ParityError(
            "there is nothing to compare the reference with",
            given=f"reference {reference}; installed: {', '.join(backends.installed()) or 'none'}",
            expected="two backends, or one and --reference transformers",
            fix="install another backend, name it with --backends, or compare on one backend: two "
            "checkpoints with --override, two devices with --backends NAME@DEVICE",
        )
    base = _participant(settings, reference, checkpoint.directory)
    reason = _why_not_transformers(checkpoint) if base.engine == TRANSFORMERS else None
    if reason is not None:
        raise ParityError(
            "transformers' own models cannot express this checkpoint",
            given=reason,
            fix="compare backends with one another: leave --reference out",
        )
    return _Plan(base, tuple(candidates))


def _why_not_transformers(checkpoint: Checkpoint) -> str | None:
    if checkpoint.dialect != "hf":
        return f"it is stored in the layout {checkpoint.dialect}; convert it to hf first"
    return why_not_transformers(checkpoint.spec)


def _absolute(path_or_hub_id: str | None) -> str | None:
    return str(locate(path_or_hub_id).absolute()) if path_or_hub_id else None


def _participant(settings: Settings, text: str, directory: Path, note: str = "") -> _Participant:
    """`text` is a name, or `name@device`."""
    name, _, device = text.partition("@")
    backend = "torch" if name == TRANSFORMERS else name
    return _Participant(
        label=text + note,
        engine=TRANSFORMERS if name == TRANSFORMERS else "native",
        backend=backend,
        device=device or settings.devices.get(backend, settings.devices.get("")),
        checkpoint=directory,
    )


def _open(path: str, settings: Settings) -> Checkpoint:
    return open_checkpoint(path, base=settings.base, vision=settings.vision)


def _same_shapes(directory: str, checkpoint: Checkpoint, settings: Settings) -> Path:
    other = _open(directory, settings)
    other.check()
    if parameter_table(other.spec) != parameter_table(checkpoint.spec):
        raise ParityError(
            "an override must hold the same model: names and shapes of parameters differ",
            given=directory,
            expected=f"those of {checkpoint.directory}",
        )
    return other.directory


# --- running it ------------------------------------------------------------------------------


class _Comparison:
    """The state of one comparison: who has run and what came of it."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        plan: _Plan,
        inputs: Inputs,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self.settings, self.checkpoint, self.plan = settings, checkpoint, plan
        self.inputs, self.scratch, self.progress = inputs, scratch, progress
        self.dtype = backends.dtype_name(settings.dtype)
        self.tolerance = settings.tolerance or TOLERANCE[self.dtype]
        everything = module_names(checkpoint.spec)
        self.everything = self._bytes(everything) <= KEEP_EVERYTHING_BYTES
        self.watch = tuple(everything if self.everything else block_names(checkpoint.spec))
        self.jobs = 0
        self._check_room()

    def _bytes(self, names: Sequence[str]) -> int:
        spec, batch = self.checkpoint.spec, self.inputs.batch
        media = [batch[name] for name in ("pixel_values", "pixel_values_videos") if name in batch]
        vision_rows = sum(map(len, media)) * spec.vision.num_positions
        text_rows = int((batch["segment_ids"] > 0).sum())
        logits = 4 * text_rows * spec.text.vocab_size
        return output_bytes(spec, names, vision_rows, text_rows) + logits

    def _check_room(self) -> None:
        gradients = 4 * _parameter_count(self.checkpoint) * self.settings.gradients
        needed = self._bytes(self.watch) + gradients
        free = shutil.disk_usage(self.scratch).free
        if needed > free:
            raise ParityError(
                "there is not enough room on the disk for the reference's outputs and gradients",
                given=f"{free / 1e9:.1f} GB free in {self.scratch.parent}",
                expected=f"about {needed / 1e9:.1f} GB",
                fix="name a larger place with --work-dir, or pass --no-gradients",
            )

    def report(self, tokenizer: Any) -> Report:
        """Run everything."""
        reference, noise_runs, again = self._reference()
        first = reference.runs[0]
        equal = all(tokens == reference.tokens for tokens in again)
        noise_facts = worst_facts([facts_of(run, first, equal) for _, run in noise_runs])
        self.output_noise, gradient_noise = noise_band(run for _, run in noise_runs)
        candidates = tuple(
            self._candidate(participant, reference, noise_facts)
            for participant in self.plan.candidates
        )
        return Report(
            settings=replace(self.settings, dtype=self.dtype),
            checkpoint=str(self.checkpoint.directory),
            model=_describe(self.checkpoint),
            tolerance=self.tolerance,
            reference=self.plan.reference.label,
            reference_result=reference,
            noise_runs=tuple(noise_runs),
            noise_facts=noise_facts,
            output_noise=self.output_noise,
            gradient_noise=gradient_noise,
            candidates=candidates,
            rows=self._row_texts(tokenizer, reference, candidates),
            batch={name: array.shape for name, array in self.inputs.batch.items()},
            everything=self.everything,
            disk_bytes=reference.stored,
            machine=_machine(),
        )

    def _run(
        self,
        participant: _Participant,
        *,
        note: str = "",
        store: str = "store",
        fills_store: bool = False,
        runs: tuple[str, ...] = ("auto",),
        watch: tuple[str, ...] | None = None,
        forward_only: bool = False,
        threads: int | None = None,
    ) -> Result:
        """One process."""
        job = Job(
            label=participant.label,
            engine=participant.engine,
            backend=participant.backend,
            device=participant.device,
            dtype=self.dtype,
            checkpoint=str(participant.checkpoint.absolute()),
            base=_absolute(self.settings.base),
            vision=_absolute(self.settings.vision),
            inputs=str(self.scratch / "inputs"),
            store=str(self.scratch / store),
            fills_store=fills_store,
            runs=runs,
            watch=self.watch if watch is None else watch,
            gradients=self.settings.gradients and not forward_only,
            new_tokens=0 if forward_only else self.settings.new_tokens,
        )
        self.jobs += 1
        label, total = f"{job.label}{note}", job.steps
        self.progress(label, 0, total, "starting")
        result = run_job(
            job,
            self.scratch / f"job{self.jobs}",
            lambda done, what: self.progress(label, done, total, what),
            threads=threads,
        )
        self.progress(label, total, total, "done")
        return result

    def _reference(self) -> tuple[Result, list[tuple[str, Run]], list[Tokens]]:
        """The reference, its runs against itself, and its replies in these."""
        repeats, participant = self.settings.repeats, self.plan.reference
        result = self._run(
            participant, note=" (reference)", fills_store=True, runs=("auto",) * repeats
        )
        if repeats == 1:
            return result, [], []
        threads = _another_number_of_threads()
        again = self._run(participant, note=" (noise)", runs=("auto", "portable"), threads=threads)
        named = [(f"same process, run {n}", run) for n, run in enumerate(result.runs[1:], 2)]
        counted = f"{threads} CPU thread{'s' * (threads != 1)}"
        named += [(counted, again.runs[0]), (f"{counted}, portable kernels", again.runs[1])]
        return result, named, [again.tokens]

    def _candidate(
        self, participant: _Participant, reference: Result, noise_facts: Facts | None
    ) -> Candidate:
        result = self._run(participant)
        run, divergence = result.runs[0], self._divergence(result.runs[0].outputs)
        if divergence is not None and not self.everything:
            inside = self._look_inside(participant, divergence.name)
            run = replace(run, outputs=_inserted(run.outputs, inside, divergence.name))
            divergence = self._divergence(run.outputs)
        mismatch = first_mismatch(reference.tokens, result.tokens, reference.gaps)
        equal = None if self.settings.new_tokens == 0 else mismatch is None
        facts = facts_of(run, reference.runs[0], equal)
        return Candidate(
            label=participant.label,
            checkpoint=str(participant.checkpoint),
            result=result,
            run=run,
            divergence=divergence,
            mismatch=mismatch,
            judgements=judge(facts, noise_facts, self.tolerance),
        )

    def _divergence(self, outputs: Sequence[Difference]) -> Divergence | None:
        epsilon = EPSILON[self.dtype]
        return first_divergence(outputs, self.tolerance, noise=self.output_noise, epsilon=epsilon)

    def _look_inside(self, participant: _Participant, layer: str) -> tuple[Difference, ...]:
        """The second pass: every output inside one layer, forward only."""
        module, _, phase = layer.partition("@")
        watch = tuple(names_inside(self.checkpoint.spec, module))
        if not watch:
            return ()
        store = f"inside-{module}"
        shared = {"store": store, "watch": watch, "forward_only": True}
        if not (self.scratch / store).exists():
            reference = self.plan.reference
            self._run(reference, note=f" (reference, {module})", fills_store=True, **shared)
        found = self._run(participant, note=f" ({module})", **shared).runs[0]
        return tuple(
            d
            for d in found.outputs
            if d.name.partition("@")[0] in watch and d.name.partition("@")[2] == phase
        )

    def _row_texts(
        self, tokenizer: Any, reference: Result, candidates: Sequence[Candidate]
    ) -> tuple[RowText, ...]:
        results = {self.plan.reference.label: reference}
        results |= {candidate.label: candidate.result for candidate in candidates}
        texts = []
        for n, row in enumerate(self.inputs.rows):
            replies = {
                label: _pieces(tokenizer, result.tokens[n])
                for label, result in results.items()
                if result.tokens
            }
            picture = row.images[0] if row.images else None
            texts.append(RowText(row.title, row.prompt, picture, replies))
        return tuple(texts)


def _inserted(
    outputs: Sequence[Difference], inside: Sequence[Difference], layer: str
) -> tuple[Difference, ...]:
    """The outputs of a layer's modules put before the layer's own."""
    place = next(n for n, d in enumerate(outputs) if d.name == layer)
    return (*outputs[:place], *inside, *outputs[place:])


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    """How a reply reads, token by token: what each adds to the text before it.

    A character of several tokens appears with the last of them.
    """
    texts = [tokenizer.decode(list(tokens[:n])) for n in range(len(tokens) + 1)]
    texts[:-1] = [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in texts[:-1]]
    return tuple(after[len(before) :] for before, after in pairwise(texts))


def _another_number_of_threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    now = int(given) if given.isdigit() else os.cpu_count() or 1
    return 1 if now > 1 else 2


def _parameter_count(checkpoint: Checkpoint) -> int:
    return sum(math.prod(shape) for shape in parameter_table(checkpoint.spec).values())


def _describe(checkpoint: Checkpoint) -> str:
    spec = checkpoint.spec
    count = _parameter_count(checkpoint)
    unit, name = (1e9, "B") if count >= 1e9 else (1e6, "M")
    parts = f"{spec.vision.kind}, {spec.text.kind}"
    return f"{spec.family} ({parts}), {count / unit:.3g} {name} parameters, stored in {spec.dtype}"


def _machine() -> str:
    python = platform.python_version()
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {python}"
