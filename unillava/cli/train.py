"""`unillava train RECIPE.yaml [key=value …]`: one recipe, on any backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unillava.cli import flags

if TYPE_CHECKING:
    from unillava.training.run import Plan


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("train")(_train)


def _train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="See docs/training.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Put over the recipe: steps.batch=64."),
    ] = None,
    backend: flags.Backend = None,
    device: flags.Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, and stop.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, although the output has checkpoints.")
    ] = False,
    stop_at: Annotated[
        int | None, typer.Option(min=1, help="Save and stop after this many updates in all.")
    ] = None,
) -> None:
    """Train a model; goes on from the newest checkpoint in the recipe's output."""
    from unillava.training.recipe import load_recipe
    from unillava.training.run import make_plan

    chosen = load_recipe(recipe, overrides or ())
    if dry_run:
        show(make_plan(chosen))
        return
    from unillava.training.session import run_recipe

    finished = run_recipe(chosen, backend=backend, device=device, resume=not fresh, stop_at=stop_at)
    if not finished:
        raise typer.Exit(143)


def show(plan: Plan) -> None:
    """The plan in words."""
    recipe, schedule = plan.recipe, plan.schedule
    rows: list[tuple[str, Any]] = [
        ("model", f"{plan.source.path} ({plan.source.dialect}), {plan.checkpoint.spec.family}"),
        ("samples", f"{len(plan.records):,} in {len(recipe.data.files)} file(s)"),
        ("updates", f"{schedule.total_steps:,} of {recipe.steps.batch} rows"),
        ("schedule", f"{schedule.kind}, {schedule.warmup_steps} steps of warm-up"),
        ("order", plan.order.fingerprint(min(recipe.steps.epochs, 1.0))),
        ("output", recipe.output),
    ]
    if recipe.data.packing:
        rows.append(("packing", plan.order.described()))
    shapes = plan.trained_shapes
    for group in plan.groups:
        count = sum(_product(shapes[name]) for name in group.parameters)
        rate, decay = plan.rates[group.name], group.weight_decay
        rows.append((group.name, f"{count:,} parameters, rate {rate:g}, decay {decay:g}"))
    for name, value in rows:
        print(f"{name:<12} {value}")
    print("nothing was trained (--dry-run)", file=sys.stderr)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
