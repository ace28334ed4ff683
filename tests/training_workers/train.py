"""Trains cases of tests/training_cases.py in a process that a launcher started.

    torchrun --nproc-per-node 2 tests/training_workers/train.py JOBS.json

JOBS.json holds a list of jobs, run one after the other in one group of processes; see `Job`. Each
rank leaves OUT/rank-N.npz: what its engine's state gave it (`kind/name`), and the global losses
and norms of each step. Runs on every backend (UNILLAVA_BACKEND).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

import backends
from backends.contract import AdamW
from tests.training_cases import CASES, Case


@dataclass(frozen=True)
class Job:
    """One run."""

    out: str
    strategy: str
    case: str = "small"
    start: int = 0
    steps: int = 3
    rows: int = 4
    """Of the global batch; each rank takes every n-th, and all call `accumulate` equally often."""
    announce: bool = False
    """Say which micro-batch is the last."""
    restore: str = ""
    """The `out` of another job, whose state is taken first."""
    spoil: int = -1
    """In this step the last rank's first batch has an infinite value."""
    die: int = -1
    """In this step the last rank kills itself."""
    dtype: str = "float32"
    compiled: bool = False
    recompute: bool = False
    late: bool = False
    """Parameters get their values after the engine was made."""
    clip_norm: float | None = 0.5
    options: dict[str, Any] = field(default_factory=dict)


def main(path: str) -> None:
    jobs = [Job(**job) for job in json.loads(Path(path).read_text())]
    backends.select(os.environ.get("UNILLAVA_BACKEND", backends.NAME), device="cpu")
    backends.parallel.start(jobs[0].strategy)
    for job in jobs:
        run(job)
    backends.parallel.stop()


def run(job: Job) -> None:
    runtime = backends.runtime
    runtime.setup("cpu", job.dtype)
    case = CASES[job.case]()
    module = runtime.build(case.factory) if job.late else case.build(runtime, case.trained)
    if job.late:
        runtime.set_trained(module, case.trained)
    if job.recompute:
        for block in module.language_model.model.layers:
            runtime.recompute(block)
    engine = backends.training.Engine(
        module,
        case.groups,
        AdamW(beta2=0.95, clip_norm=job.clip_norm),
        strategy=job.strategy,
        compiled=job.compiled,
        options=job.options,
    )
    if job.late:
        for name, value in case.values.items():
            runtime.assign(module, name, value)
    if job.restore:
        saved = saved_state(Path(job.restore))
        engine.restore(job.start, lambda name, kind: saved[f"{kind}/{name}"])
    books = [one_step(job, case, engine, step) for step in range(job.start, job.start + job.steps)]
    rank, _ = backends.parallel.world()
    state = {f"{kind}/{name}": a for name, kind, a in engine.state() if a is not None}
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / f"rank-{rank}.npz", books=np.array(books), steps=engine.steps, **state)
    backends.parallel.barrier()


def one_step(job: Job, case: Case, engine: Any, step: int) -> list[float]:
    """Global loss, global norm, norm of each group, skipped."""
    rank, size = backends.parallel.world()
    batches = case.batches(step, job.rows)
    mine = batches[rank::size]
    calls = -(-job.rows // size)
    if rank == size - 1 and step == job.die:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == size - 1 and step == job.spoil:
        mine[0] = [np.full_like(a, np.inf) if a.ndim == 2 else a for a in mine[0]]
    loss = 0.0
    for n in range(calls):
        last = {"last": n == calls - 1} if job.announce else {}
        # A rank with fewer rows repeats one with weight zero.
        inputs, scale = (mine[n], 1 / job.rows) if n < len(mine) else (mine[0], 0.0)
        loss += engine.accumulate(inputs, scale, **last)
    norms = engine.update(case.rates)
    loss = float(backends.parallel.sum_over_ranks(np.array([loss]))[0])
    return [loss, norms.total, *norms.groups.values(), float(norms.skipped)]


def saved_state(folder: Path) -> dict[str, np.ndarray]:
    """What all ranks of a job left; every tensor belongs to exactly one of them."""
    state: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("rank-*.npz")):
        with np.load(path) as arrays:
            mine = {name: arrays[name] for name in arrays if "/" in name}
        assert not mine.keys() & state.keys(), "a tensor has two owners"
        state |= mine
    return state


if __name__ == "__main__":
    main(sys.argv[1])
