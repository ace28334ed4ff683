"""`unillava train RECIPE.yaml [key=value …]`: one recipe, on any backend."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unillava.cli import flags
from unillava.spec import parameter_table

if TYPE_CHECKING:
    from rich.console import Console

    from unillava.training.estimate import Setting
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
    world: Annotated[int, typer.Option(min=1, help="For --dry-run: the number of devices.")] = 1,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; what an earlier run left is put aside.")
    ] = False,
    stop_at: Annotated[
        int | None, typer.Option(min=1, help="Save and stop after this many updates in all.")
    ] = None,
) -> None:
    """Train a model; goes on from the newest checkpoint in the recipe's output."""
    from unillava.training.journal import check_writers
    from unillava.training.recipe import load_recipe
    from unillava.training.run import make_plan

    chosen = load_recipe(recipe, overrides or ())
    if dry_run:
        check_writers(chosen.logging)
        show(make_plan(chosen), world, device)
        return
    from unillava.training.session import run_recipe

    finished = run_recipe(chosen, backend=backend, device=device, resume=not fresh, stop_at=stop_at)
    if not finished:
        raise typer.Exit(143)


def show(plan: Plan, world: int = 1, device: str | None = None) -> None:
    """The plan in tables: what is trained, on what, what it needs, and every setting.

    Args:
        plan: the run.
        world: number of devices.
        device: on which it is to run; decides the precision if the recipe does not.

    Raises:
        ConfigError: it cannot fit into `running.memory`.
    """
    from rich.console import Console

    from unillava.training.estimate import check_fits, setting_of
    from unillava.training.run import strategy_of

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 120))
    recipe = plan.recipe
    precision = recipe.running.precision or ("float32" if device == "cpu" else "bfloat16")
    setting = setting_of(plan, precision, strategy_of(recipe, world), world)
    _grid(console, _summary(plan))
    _show_groups(console, plan)
    _show_memory(console, plan, setting)
    _show_settings(console, plan, setting)
    if recipe.running.memory:
        memory = int(recipe.running.memory * 2**30)
        warning = check_fits(plan.checkpoint.spec, setting, memory, "running.memory")
        if warning:
            print(warning, file=sys.stderr)
    print("nothing was trained (--dry-run)", file=sys.stderr)


def _summary(plan: Plan) -> dict[str, str]:
    from unillava.training.estimate import tokens_per_update

    recipe, schedule = plan.recipe, plan.schedule
    tokens, how = tokens_per_update(plan)
    return {
        "model": f"{plan.source.path} ({plan.source.dialect}), {plan.checkpoint.spec.family}",
        "samples": f"{len(plan.records):,} in {len(recipe.data.files)} file(s)",
        **({"packing": plan.order.described()} if recipe.data.packing else {}),
        "updates": f"{schedule.total_steps:,} of {recipe.steps.batch} rows",
        "tokens": f"{tokens:,.0f} per update, {tokens * schedule.total_steps:,.0f} in all ({how})",
        "schedule": f"{schedule.kind}, {schedule.warmup_steps} steps of warm-up",
        "order": plan.order.fingerprint(min(recipe.steps.epochs, 1.0)),
        "output": recipe.output,
    }


def _show_groups(console: Console, plan: Plan) -> None:
    from rich.table import Column, Table

    table = Table("trained", *(Column(n, justify="right") for n in ("parameters", "rate", "decay")))
    shapes = plan.trained_shapes
    for group in plan.groups:
        size = sum(math.prod(shapes[name]) for name in group.parameters)
        rate = f"{plan.rates[group.name]:g}"
        table.add_row(group.name, f"{size:,}", rate, f"{group.weight_decay:g}")
    everything = parameter_table(plan.checkpoint.spec) | shapes
    total, trained = (sum(map(math.prod, t.values())) for t in (everything, shapes))
    table.add_section()
    table.add_row("frozen", f"{total - trained:,}", "", "")
    console.print(table)


def _show_memory(console: Console, plan: Plan, setting: Setting) -> None:
    from rich.table import Column, Table

    from unillava.training.estimate import estimate, gib

    need = estimate(plan.checkpoint.spec, setting)
    title = f"{setting.strategy}, {setting.world} device(s)"
    table = Table("memory of each device", Column(title, justify="right"))
    for one in dataclasses.fields(need):
        table.add_row(one.name, gib(getattr(need, one.name)))
    table.add_section()
    table.add_row("in all, about", gib(need.total))
    console.print(table)
    console.print(
        f"In {setting.precision}, for a pass of {setting.rows} row(s) of {setting.length} "
        "positions; 1 to 3 GiB of the framework's own are not counted.",
        style="dim",
        highlight=False,
    )


def _show_settings(console: Console, plan: Plan, setting: Setting) -> None:
    """Every setting of the recipe; what was left to us with what we take."""
    from rich.table import Table
    from rich.text import Text

    decided = {
        "running.precision": setting.precision,
        "running.strategy": setting.strategy,
        "steps.max_steps": plan.schedule.total_steps,
        "optimizer.warmup_steps": plan.schedule.warmup_steps,
        "model.image_mode": plan.checkpoint.spec.image_mode,
    }
    table = Table("setting", "value", "")
    for name, value in _flat(plan.recipe.as_dict()):
        given = value in (None, "auto") and name in decided
        shown = decided[name] if given else value
        text = "none" if shown is None else str(shown)
        table.add_row(Text(name), Text(text), "decided" if given else "")
    console.print(table)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        for n, item in enumerate(value):
            yield from _flat(item, f"{name}[{n}]")
    else:
        yield name, value


def _grid(console: Console, rows: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, Text(value, overflow="fold"))
    console.print(table)
