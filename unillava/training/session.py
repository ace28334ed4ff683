"""A training run in this process: backend, loop, logs, and what is left at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import backends
from unillava.training import journal, state
from unillava.training.estimate import check_fits, setting_of
from unillava.training.flops import peak_flops, update_cost
from unillava.training.recipe import Recipe
from unillava.training.run import Plan, build_run, export, make_plan, strategy_of


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
    journal.check_writers(recipe.logging)
    runtime = backends.select(backend, device=device)
    precision = recipe.running.precision or _best_precision(runtime)
    backends.select(backends.NAME, device=runtime.current()[0], dtype=precision)
    rank, world = backends.parallel.world()
    backends.parallel.start(strategy_of(recipe, world))
    try:
        plan = make_plan(recipe)
        warning = _check_memory(plan, runtime, world)
        output = Path(recipe.output)
        if rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            if not resume:
                put_aside(output)
        backends.parallel.barrier()
        machine = _machine(plan, runtime, world)
        settings = recipe.as_dict()
        with journal.Journal(
            output, recipe.logging, machine, active=rank == 0, settings=settings
        ) as told:
            if warning:
                told.warn(warning)
            run, start = build_run(plan, report=told.add, warn=told.warn, resume=resume)
            run.report_bad = told.add_bad
            total = plan.schedule.total_steps
            told.begin(start, min(stop_at or total, total))
            step = run.train(start, min(stop_at or total, total))
        if step < total:
            return False
        if rank == 0:
            _finish(plan, output)
        backends.parallel.barrier()
        return True
    finally:
        backends.parallel.stop()


def put_aside(output: Path) -> Path | None:
    """Move what an earlier run left into a folder of its own, for a run that begins anew.

    Returns the folder; None if there was no checkpoint and no log.
    """
    names = (journal.LOG, journal.TABLE, journal.BAD, journal.PICTURE, "failure.json", "final")
    left = [output / name for name in (*names, "tensorboard", "wandb_id.txt")]
    left = [path for path in left if path.exists()] + list(state.saved_steps(output).values())
    if not left:
        return None
    number = 1
    while (folder := output / f"before-{number}").exists():
        number += 1
    folder.mkdir()
    for path in left:
        os.replace(path, folder / path.name)
    return folder


def _check_memory(plan: Plan, runtime: Any, world: int) -> str | None:
    """A warning that the run may not fit, None if it does or nothing is known.

    Raises:
        ConfigError: it cannot fit.
    """
    device, precision = runtime.current()
    limit = plan.recipe.running.memory
    if limit is not None:
        memory = int(limit * 2**30)
    else:
        # Processes on one host share its memory.
        memory = (runtime.device_memory() or 0) // (world if device == "cpu" else 1)
    if not memory:
        return None
    setting = setting_of(plan, precision, strategy_of(plan.recipe, world), world)
    return check_fits(plan.checkpoint.spec, setting, memory, f"{device} ({runtime.device_name()})")


def _machine(plan: Plan, runtime: Any, world: int) -> journal.Machine:
    name, precision = runtime.device_name(), runtime.current()[1]
    return journal.Machine(
        backend=backends.NAME,
        device=name,
        world=world,
        peak=peak_flops(name, precision),
        cost=update_cost(plan.checkpoint.spec, plan.trained_shapes).of,
        memory=runtime.peak_memory,
    )


def _best_precision(runtime: object) -> str:
    """bfloat16 on an accelerator that has it, else float32."""
    device = runtime.current()[0]
    on_host = device.split(":")[0] == "cpu"
    known = runtime.supported_dtypes(device)
    return "bfloat16" if not on_host and "bfloat16" in known else "float32"


def _finish(plan: Plan, output: Path) -> None:
    saved = state.find_latest(output)
    export(plan, saved, output / "final")
    kind = "the adapters, a PEFT" if plan.recipe.lora else "the trained model, a Hugging Face"
    print(f"{output / 'final'}: {kind} directory")
