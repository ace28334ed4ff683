"""`unillava curves A B …`: overlay runs, and judge them by the official criteria."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unillava.errors import RequestError

if TYPE_CHECKING:
    from unillava.training.curves import Judgement

GUIDES = {"mindspore": ("MindSpore",), "paddle": ("Paddle",), "all": ("MindSpore", "Paddle")}


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("curves")(_curves)


def _curves(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…",
            help="Folders of runs, or their logs: log.jsonl, log.csv, trainer_state.json, text "
            "logs of MindFormers and PaddleNLP. The first is what the others are compared with.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for curves.png and curves.html.")
    ] = Path("curves"),
    by: Annotated[
        str,
        typer.Option(
            help="Whose criteria decide: mindspore, paddle or all. Paddle's 1e-6 is below float32 "
            "rounding for losses above 8, so it is shown and does not decide by default."
        ),
    ] = "mindspore",
    names: Annotated[str | None, typer.Option(help="For the legend, separated by commas.")] = None,
) -> None:
    """Overlay the loss of runs, and judge each against the first one. Exit code 1: one fails."""
    from unillava.training import curves

    if by not in GUIDES:
        raise RequestError(f"unknown guide {by!r}", expected=", ".join(GUIDES))
    labels = _labels(runs, names)
    read = [curves.read_curve(path, label) for path, label in zip(runs, labels, strict=True)]
    judgements = [curves.judge(read[0], one) for one in read[1:]]
    output.mkdir(parents=True, exist_ok=True)
    try:
        picture = curves.draw_overlay(read, output / "curves.png")
    except ModuleNotFoundError:
        raise RequestError(
            "matplotlib is not installed", fix='pip install "unillava[train]"'
        ) from None
    curves.write_page(read, judgements, picture, output / "curves.html")
    _print(judgements, read[0].name)
    print(f"{output / 'curves.png'} and {output / 'curves.html'}")
    if not all(one.passed(GUIDES[by]) for one in judgements):
        raise typer.Exit(1)


def _labels(runs: list[Path], names: str | None) -> list[str | None]:
    if names is None:
        # Folders of several runs are often all called `out`: then their parents tell them apart.
        plain = [path.name for path in runs]
        if len(set(plain)) == len(plain):
            return list(plain)
        return [str(path) for path in runs]
    labels = [name.strip() for name in names.split(",")]
    if len(labels) != len(runs):
        raise RequestError(
            "--names does not name every run", given=f"{len(labels)} names, {len(runs)} runs"
        )
    return list(labels)


def _print(judgements: list[Judgement], reference: str) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from unillava.training.curves import describe

    if not judgements:
        return
    table = Table(
        "run", "guide", "criterion", "demands", Column("absolute", justify="right"),
        Column("relative", justify="right"), "",
    )  # fmt: skip
    for run in judgements:
        for one in run.criteria:
            verdict = Text("met", "green") if one.passed else Text("not met", "bold red")
            numbers = (f"{one.absolute:.3g}", f"{100 * one.relative:.3g} %")
            table.add_row(Text(run.name), one.guide, one.name, one.demands, *numbers, verdict)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 120))
    console.print(table)
    for run in judgements:
        console.print(describe(run, reference), markup=False, highlight=False, soft_wrap=True)
