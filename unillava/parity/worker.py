"""One computation in a process of its own: `python -m unillava.parity.worker JOB_DIR`.

It loads the model, runs it on the arrays that the parent prepared, and either stores every
watched output and gradient or compares them, one at a time, with those that are stored.

Shape letters: B rows, S positions, N learnt positions, V vocabulary, L rows of rotary tables.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import backends
from unillava.errors import UnillavaError
from unillava.parity.compare import (
    Difference,
    Run,
    difference,
    execution_order,
    gradient_scale_name,
    in_order,
)
from unillava.parity.job import Arrays, Job, ParityError, Result, read_arrays

Record = Callable[[str, np.ndarray], None]

LOGIT_BYTES = 64 << 20
"""Logits that are computed at a time: a whole batch of them can be larger than the model."""


class Computation(Protocol):
    """What is run: the native model or transformers' own."""

    def use_kernels(self, kernels: str) -> None:
        """Switch between fused (auto) and portable kernels."""

    def forward(self, batch: Arrays, record: Record) -> None:
        """Run the model once; every module's output goes to `record`, `logits` last."""

    def loss(self, batch: Arrays) -> float:
        """Mean loss of the learnt tokens."""

    def gradients(self, batch: Arrays) -> tuple[float, dict[str, np.ndarray]]:
        """The same loss and its gradient with respect to each parameter."""

    def greedy(self, prompt: Arrays, count: int) -> tuple[list[int], list[float]]:
        """`count` tokens after one prompt, and by how much the best logit led each time."""


# --- our model on a backend ------------------------------------------------------------------


class Native:
    """`unillava.models.llava.Llava` on the backend of this process."""

    def __init__(self, job: Job) -> None:
        from unillava.checkpoint import open_checkpoint
        from unillava.loading import load_network

        checkpoint = open_checkpoint(job.checkpoint, base=job.base, vision=job.vision)
        self.spec, self.network = checkpoint.spec, load_network(checkpoint)
        self.watched = frozenset(job.watch)

    def use_kernels(self, kernels: str) -> None:
        """See Computation."""
        device, dtype = backends.runtime.current()
        backends.runtime.setup(device, dtype, kernels)

    def forward(self, batch: Arrays, record: Record) -> None:
        """See Computation. Outputs for videos are named `…@video`."""
        runtime, network = backends.runtime, self.network
        phase = ""

        def on_output(name: str, x: Any) -> None:
            if name in self.watched:
                record(name + phase, runtime.numpy(x))

        unwatch = runtime.watch(network, on_output)
        try:
            with runtime.no_grad():
                images = videos = None
                if "pixel_values" in batch:
                    images = network.image_rows(runtime.tensor(batch["pixel_values"]))
                if "pixel_values_videos" in batch:
                    phase = "@video"
                    videos = network.video_rows(runtime.tensor(batch["pixel_values_videos"]))
                phase = ""
                tensors = self._tensors(batch)
                embeds_BSD = network.merge(
                    tensors["input_ids"], tensors["merge_index"], images, videos
                )
                record("merge", runtime.numpy(embeds_BSD))
                hidden_BSD = network.hidden(
                    embeds_BSD,
                    tensors["position_ids"],
                    *self._rotary(batch),
                    tensors["segment_ids"],
                )
        finally:
            unwatch()
        with runtime.no_grad():
            record("logits", self._logits(hidden_BSD))

    def _tensors(self, batch: Arrays) -> dict[str, Any]:
        return {name: backends.runtime.tensor(array) for name, array in batch.items()}

    def _rotary(self, batch: Arrays) -> tuple[Any, Any]:
        from unillava.rope import rotary_tables

        cos_LE, sin_LE = rotary_tables(self.spec.text, batch["input_ids"].shape[1])
        return backends.runtime.tensor32(cos_LE), backends.runtime.tensor32(sin_LE)

    def _logits(self, hidden_BSD: Any) -> np.ndarray:
        """[B, S, V], computed in pieces."""
        B, S, _ = tuple(hidden_BSD.shape)
        V = self.spec.text.vocab_size
        logits_BSV = np.empty((B, S, V), np.float32)
        step = max(1, LOGIT_BYTES // (4 * V * B))
        for start in range(0, S, step):
            part = self.network.logits(hidden_BSD[:, start : start + step])
            logits_BSV[:, start : start + step] = backends.runtime.numpy(part)
        return logits_BSV

    def _mean_loss(self, batch: Arrays) -> Callable[..., Any]:
        tensors, network = self._tensors(batch), self.network
        count = len(batch["targets"])

        def mean_loss(cos_LE: Any, sin_LE: Any) -> Any:
            hidden_BSD = network(
                tensors["input_ids"],
                tensors["merge_index"],
                tensors["position_ids"],
                cos_LE,
                sin_LE,
                tensors["segment_ids"],
                tensors.get("pixel_values"),
                tensors.get("pixel_values_videos"),
            )
            total = network.loss(hidden_BSD, tensors["target_index"], tensors["targets"])
            return total * (1 / count)

        return mean_loss

    def loss(self, batch: Arrays) -> float:
        """See Computation."""
        with backends.runtime.no_grad():
            return float(backends.runtime.numpy(self._mean_loss(batch)(*self._rotary(batch))))

    def gradients(self, batch: Arrays) -> tuple[float, dict[str, np.ndarray]]:
        """See Computation."""
        run = backends.runtime.value_and_grad(self._mean_loss(batch), self.network)
        return run(*self._rotary(batch))

    def greedy(self, prompt: Arrays, count: int) -> tuple[list[int], list[float]]:
        """See Computation; prefill and decode as `unillava chat` does."""
        from unillava.inference.engine import Engine, greedy

        engine = Engine(self.network, self.spec)
        state, logits_1V = engine.start(prompt, count)
        tokens, gaps = [], []
        for n in range(count):
            token_1 = greedy(logits_1V)
            tokens.append(int(token_1[0]))
            gaps.append(lead(backends.runtime.numpy(logits_1V)[0]))
            if n + 1 < count:
                logits_1V = engine.step(state, token_1)
        return tokens, gaps


def lead(logits_V: np.ndarray) -> float:
    """By how much the best logit is above the second."""
    second, best = np.partition(logits_V, -2)[-2:]
    return float(best - second)


def transformers_model(job: Job) -> Computation:
    """transformers' own model; its class speaks in paths and arrays as `Computation` does."""
    from backends.torch.reference import Reference

    return Reference(job.checkpoint, frozenset(job.watch))


# --- storing or comparing --------------------------------------------------------------------


class Store:
    """The reference's tensors: a .npy file each, mapped when read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.written = 0

    def names(self, kind: str) -> set[str]:
        """What is stored of a kind (outputs, gradients)."""
        return {path.stem for path in (self.directory / kind).glob("*.npy")}

    def write(self, kind: str, name: str, array: np.ndarray) -> None:
        """Store one tensor as float32."""
        folder = self.directory / kind
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", np.asarray(array, np.float32))
        self.written += array.size * 4

    def read(self, kind: str, name: str) -> np.ndarray:
        """One tensor, mapped."""
        return np.load(self.directory / kind / f"{name}.npy", mmap_mode="r")


class Rows:
    """The rows of a tensor that mean something: neither padding nor text ids under pictures."""

    def __init__(self, batch: Arrays) -> None:
        """`batch` is the native batch."""
        self.shape = batch["input_ids"].shape
        is_valid = batch["segment_ids"].reshape(-1) > 0
        is_text = batch["merge_index"].reshape(-1) < is_valid.size
        self.valid, self.text = np.flatnonzero(is_valid), np.flatnonzero(is_valid & is_text)

    def of(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array, or [rows, width] of a decoder tensor [B, S, width]."""
        if not (name.startswith("language_model.") or name in ("merge", "logits")):
            return array
        rows = self.text if name.endswith("embed_tokens") else self.valid
        return array.reshape(self.shape[0] * self.shape[1], -1)[rows]


class Recorder:
    """Takes one run's tensors: to the store, or compares them with what is there."""

    def __init__(self, store: Store, rows: Rows, *, fills: bool) -> None:
        self.store, self.rows, self.fills = store, rows, fills
        self.known = set() if fills else store.names("outputs")
        self.order: list[str] = []
        self.outputs: list[Difference] = []
        self.differences: list[Difference] = []

    def output(self, name: str, array: np.ndarray) -> None:
        """Take one module's output. What the store does not have is passed over."""
        array = self.rows.of(name, array)
        if self.fills:
            self.store.write("outputs", name, array)
        elif name in self.known:
            # Shapes may be laid out differently ([tiles, rows, C] or flat): the order is one.
            stored = self.store.read("outputs", name)
            self.outputs.append(difference(name, stored, array.reshape(stored.shape)))
        else:
            return
        self.order.append(name)

    def gradient(self, name: str, array: np.ndarray) -> None:
        """Take one parameter's gradient, in canonical orientation."""
        if self.fills:
            self.store.write("gradients", name, array)
            return
        stored = self.store.read("gradients", name)
        scale_name = gradient_scale_name(name)
        scale = None
        if scale_name != name:
            scale = float(np.abs(self.store.read("gradients", scale_name)).max())
        self.differences.append(difference(name, stored, array, scale=scale))

    def check_complete(self, watched: Iterable[str]) -> None:
        """What was not compared would count as equal.

        Raises:
            ParityError: a watched module gave no output, or one that the store has is missing.
        """
        seen = {name.partition("@")[0] for name in self.order}
        absent = (set(watched) - seen) | (self.known - set(self.order))
        if absent:
            raise ParityError(
                f"{len(absent)} modules gave no output",
                given=f"nothing from {', '.join(sorted(absent)[:5])}",
                expected="an output of every module, also of those that the reference has",
            )


def norm_of(gradients: dict[str, np.ndarray]) -> float:
    """2-norm over all gradients."""
    return math.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in gradients.values()))


# --- the job ---------------------------------------------------------------------------------


def work(job: Job, step: Callable[[str], None]) -> Result:
    """Carry out a job; `step` is told what is begun."""
    start = time.monotonic()
    step("loading")
    kernels = os.environ.get("UNILLAVA_KERNELS") or "auto"
    runtime = backends.select(job.backend, device=job.device, dtype=job.dtype, kernels=kernels)
    model: Computation = Native(job) if job.engine == "native" else transformers_model(job)
    inputs = Path(job.inputs)
    batch = read_arrays(inputs / job.engine / "batch")
    rows = Rows(read_arrays(inputs / "native" / "batch"))
    store, order, runs = Store(Path(job.store)), [], []
    for n, wanted in enumerate(job.runs):
        model.use_kernels(wanted if wanted != "auto" else kernels)
        recorder = Recorder(store, rows, fills=job.fills_store and n == 0)
        runs.append(_run(job, model, batch, recorder, wanted, _numbered(step, n, job.runs)))
        order = order or recorder.order
    tokens, gaps = _replies(job, model, inputs, step)
    versions = runtime.versions()
    if job.engine == "transformers":
        import transformers

        versions = {"transformers": transformers.__version__} | versions
    return Result(
        versions=versions,
        device=runtime.current()[0],
        threads=os.environ.get("OMP_NUM_THREADS", "default"),
        order=tuple(order),
        runs=tuple(runs),
        tokens=tuple(tokens),
        gaps=tuple(gaps),
        peak_memory=runtime.peak_memory(),
        stored=store.written,
        seconds=time.monotonic() - start,
    )


def _numbered(step: Callable[[str], None], n: int, runs: tuple[str, ...]) -> Callable[[str], None]:
    note = "" if len(runs) == 1 else f" {n + 1} of {len(runs)}"
    return lambda what: step(what + note)


def _run(
    job: Job,
    model: Computation,
    batch: Arrays,
    recorder: Recorder,
    kernels: str,
    step: Callable[[str], None],
) -> Run:
    """One forward pass, and one backward pass if wanted."""
    step("forward pass")
    model.forward(batch, recorder.output)
    recorder.check_complete(job.watch)
    if not job.gradients:
        return Run(kernels, model.loss(batch), tuple(recorder.outputs))
    step("backward pass")
    loss, gradients = model.gradients(batch)
    norm = norm_of(gradients)
    absent = set() if recorder.fills else recorder.store.names("gradients") - set(gradients)
    if absent:
        raise ParityError("gradients are missing", given=f"none of {', '.join(sorted(absent)[:5])}")
    for name in list(gradients):
        recorder.gradient(name, gradients.pop(name))
    places = execution_order([d.name for d in recorder.differences], recorder.order)
    in_place = in_order(recorder.differences, places)
    return Run(kernels, loss, tuple(recorder.outputs), in_place, norm)


def _replies(
    job: Job, model: Computation, inputs: Path, step: Callable[[str], None]
) -> tuple[list[tuple[int, ...]], list[tuple[float, ...]]]:
    tokens: list[tuple[int, ...]] = []
    gaps: list[tuple[float, ...]] = []
    if job.new_tokens:
        step("greedy tokens")
        for prompt in _prompts(inputs / job.engine):
            found, leads = model.greedy(prompt, job.new_tokens)
            tokens.append(tuple(found))
            gaps.append(tuple(leads))
    return tokens, gaps


def _prompts(directory: Path) -> Iterator[Arrays]:
    n = 0
    while (directory / f"prompt{n}").is_dir():
        yield read_arrays(directory / f"prompt{n}")
        n += 1


def main(directory: Path) -> None:
    """Carry out the job in `directory` and leave `result.json` there."""

    def step(what: str) -> None:
        with open(directory / "progress", "a", encoding="utf-8") as progress:
            progress.write(f"{what}\n")

    try:
        fields = work(Job.read(directory), step).to_json()
    except UnillavaError as error:
        details = {name: getattr(error, name) for name in ("problem", "given", "expected", "fix")}
        fields = {"error": {k: None if v is None else str(v) for k, v in details.items()}}
    unfinished = directory / "result.json.part"
    unfinished.write_text(json.dumps(fields, allow_nan=False), encoding="utf-8")
    unfinished.rename(directory / "result.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
