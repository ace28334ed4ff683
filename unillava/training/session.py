"""A training run in this process: backend, loop, logs, and what is left at the end."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import backends
from unillava.training import state
from unillava.training.loop import Update
from unillava.training.recipe import Recipe
from unillava.training.run import Plan, build_run, export, make_plan, strategy_of

LOG = "log.jsonl"


def run_recipe(
    recipe: Recipe,
    *,
    backend: str | None = None,
    device: str | None = None,
    resume: bool = True,
    stop_at: int | None = None,
) -> bool:
    """Train, save, and export the result; returns whether the run came to its end.

    Args:
        recipe: what is trained.
        backend: as in `unillava.load`.
        device: as in `unillava.load`.
        resume: go on from the newest checkpoint of the output folder.
        stop_at: save and stop after this many updates in all.

    Raises:
        UnillavaError: anything that stands in the way.
    """
    runtime = backends.select(backend, device=device)
    precision = recipe.running.precision or _best_precision(runtime)
    backends.select(backends.NAME, device=runtime.current()[0], dtype=precision)
    rank, world = backends.parallel.world()
    backends.parallel.start(strategy_of(recipe, world))
    try:
        plan = make_plan(recipe)
        output = Path(recipe.output)
        output.mkdir(parents=True, exist_ok=True)
        journal = Journal(output / LOG, rank == 0, recipe.logging.every)
        run, start = build_run(plan, report=journal.add, warn=journal.warn, resume=resume)
        total = plan.schedule.total_steps
        step = run.train(start, min(stop_at or total, total))
        if step < total:
            return False
        if rank == 0:
            _finish(plan, output)
        backends.parallel.barrier()
        return True
    finally:
        backends.parallel.stop()


def _best_precision(runtime: object) -> str:
    """bfloat16 on an accelerator that has it, else float32."""
    device = runtime.current()[0]
    on_host = device.split(":")[0] == "cpu"
    known = runtime.supported_dtypes(device)
    return "bfloat16" if not on_host and "bfloat16" in known else "float32"


def _finish(plan: Plan, output: Path) -> None:
    saved = state.find_latest(output)
    export(plan, saved, output / "final")
    print(f"{output / 'final'}: the trained model, a Hugging Face directory")


class Journal:
    """What a run tells: lines for people, and JSON lines in a file."""

    def __init__(self, path: Path, active: bool, every: int) -> None:
        self.path, self.active, self.every = path, active, every

    def add(self, update: Update) -> None:
        """A finished update."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(update)) + "\n")
        if update.step % self.every == 0:
            rate = max(update.rates.values(), default=0.0)
            speed = update.positions / max(update.seconds, 1e-9)
            print(
                f"step {update.step}  loss {update.loss:.4f}  norm {update.norm:.3f}  "
                f"rate {rate:.2e}  {speed:,.0f} tokens/s",
                flush=True,
            )

    def warn(self, text: str) -> None:
        """Something that a person should know."""
        print(text, file=sys.stderr, flush=True)
