"""`unillava data`: look through training data (`check`) and mix it (`mix`)."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unillava.cli import flags
from unillava.errors import RequestError
from unillava.progress import progress_bar

if TYPE_CHECKING:
    from unillava.data.check_report import Report
    from unillava.data.pipeline import Pipeline
    from unillava.data.records import Records

MIXTURE_SUFFIXES = (".yaml", ".yml")
BARS = " ▁▂▃▄▅▆▇█"
DEPTHS = ("whole", "size", "none")

ImageFolder = Annotated[
    list[str] | None,
    typer.Option(
        "--image-folder",
        "--image_folder",
        help="Where relative image and video paths begin; repeatable. Default: beside each file.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of every random choice of a mixture.")]


def register(app: typer.Typer) -> None:
    """Add the sub-commands to `app`."""
    group = typer.Typer(help="Look through training data, and mix it.", no_args_is_help=True)
    group.command("check")(_check)
    group.command("mix")(_mix)
    app.add_typer(group, name="data")


# --- check -----------------------------------------------------------------------------------


def _check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="JSON, JSON lines, or a YAML mixture.")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Checkpoint: with it, tokens and labels are checked."),
    ] = None,
    base: flags.Base = None,
    vision: flags.Vision = None,
    template: flags.Template = None,
    image_folder: ImageFolder = None,
    compat: Annotated[
        str | None,
        typer.Option(help="Prompts and labels of a historical system, as data.compat of a recipe."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", "--model_max_length", min=2, help="Longest sample; default: context."
        ),
    ] = None,
    num_frames: flags.NumFrames = 8,
    images: Annotated[
        str,
        typer.Option(help="How far they are read: whole, size (quick), or none (only looked for)."),
    ] = "whole",
    fetch: Annotated[bool, typer.Option("--fetch", help="Read images on the web, too.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Report as a page.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Records shown on the page.")] = 8,
    fix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the sound records, as JSON lines.")
    ] = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="With --fix: leave repeated records out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; default: one per core, at most 8.")
    ] = None,
    seed: Seed = 42,
) -> None:
    """Find what is wrong with training data; exit code 1 if something is.

    Nothing of the data is changed. --fix writes a copy without the records that have problems.
    """
    from unillava.data.check import Settings
    from unillava.data.check_report import check_records, write_clean
    from unillava.data.compat import get_compat
    from unillava.data.files import refuse_taken

    placement = get_compat(compat).placement
    if images not in DEPTHS:
        raise RequestError("unknown --images", given=images, expected=", ".join(DEPTHS))
    if fix is not None:
        refuse_taken(fix)
    settings = Settings(placement, max_length, images, fetch)
    make = model and functools.partial(
        open_pipeline, model, base, vision, template, num_frames, compat
    )
    started = time.perf_counter()
    records = _open(files, image_folder, seed)
    with progress_bar("checking", len(records)) as advance:
        report = check_records(
            records, settings, make, workers=_workers(workers, len(records)), progress=advance
        )
    seconds = time.perf_counter() - started
    if out is not None:
        _write_page(out, report, make, samples, seconds)
    print(json.dumps(summary(report), indent=2)) if as_json else _print(report, seconds)
    if fix is not None:
        kept = write_clean(report, fix, drop_repeated=drop_duplicates)
        print(f"{fix}: {kept:,} of {len(records):,} records", file=sys.stderr)
    if report.problems:
        raise typer.Exit(1)


def open_pipeline(
    model: str,
    base: str | None,
    vision: str | None,
    template: str | None,
    num_frames: int,
    compat: str | None = None,
) -> Pipeline:
    """Tokenizer, template and image sizes of a checkpoint; no framework, no weights."""
    from unillava.checkpoint import open_checkpoint
    from unillava.data.compat import get_compat
    from unillava.loading import load_pipeline

    checkpoint = open_checkpoint(model, base=base, vision=vision)
    pipeline = load_pipeline(checkpoint, template=template, num_frames=num_frames)
    return get_compat(compat).apply(pipeline)


def summary(report: Report) -> dict[str, Any]:
    """The findings as plain JSON values."""
    from dataclasses import asdict

    from unillava.data.check import PROBLEMS
    from unillava.data.check_page import count_tokens

    tokens = count_tokens(report)
    return {
        "format": 1,
        "records": len(report.records),
        "problems": report.problems,
        "bad_records": report.bad_records,
        "modalities": report.modalities,
        "tokens": tokens and asdict(tokens),
        "findings": [
            {
                "kind": kind,
                "problem": kind in PROBLEMS,
                "count": count,
                "examples": [asdict(example) for example in report.examples.get(kind, [])],
            }
            for kind, count in report.counts.most_common()
            if count
        ],
    }


def _open(files: list[str], image_folder: list[str] | None, seed: int) -> Records:
    from unillava.data.mixture import open_mixture
    from unillava.data.records import Records, open_records

    total = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    with progress_bar("indexing", total) as advance:
        return Records.join(
            [
                open_mixture(file, seed)
                if file.endswith(MIXTURE_SUFFIXES)
                else open_records(file, image_folder, allow_damage=True, progress=advance)
                for file in files
            ]
        )


def _workers(wanted: int | None, records: int) -> int:
    """None for a few records: starting processes would take longer."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 8) if records > 2000 else 0


def _write_page(
    out: Path,
    report: Report,
    make: Callable[[], Pipeline] | None,
    samples: int,
    seconds: float,
) -> None:
    from unillava.data.check import Checker
    from unillava.data.check_page import choose_samples, to_html
    from unillava.data.files import written

    checker = Checker(report.records, report.settings, make() if make else None)
    chosen = choose_samples(report, samples) if make else []
    page = to_html(report, checker, chosen, seconds)
    with written(out) as file:
        file.write(page.encode())


def _print(report: Report, seconds: float) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from unillava.data.check import PROBLEMS, REMARKS
    from unillava.data.check_page import count_tokens, histogram

    console = Console(highlight=False)
    found = ", ".join(f"{count:,} {name}" for name, count in report.modalities.items() if count)
    console.print(f"{len(report.records):,} records ({found}) in {seconds:.1f} s")
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    for kinds, style in ((PROBLEMS, "bold red"), (REMARKS, "yellow")):
        for kind, (title, advice) in kinds.items():
            if report.counts[kind]:
                example = report.examples[kind][0]
                place = f"{example.where}: {example.detail}" if example.where else example.detail
                told = (
                    f"[bold]{escape(title)}[/]: {escape(advice)}\n[dim]{escape(_short(place))}[/]"
                )
                table.add_row(f"[{style}]{report.counts[kind]:,}[/]", told)
    console.print(table)
    tokens = count_tokens(report)
    if tokens is not None:
        for name, value in tokens.words().items():
            console.print(f"{name}: {value}")
        lengths = histogram(report)
        more = " and more" * lengths.is_open
        console.print(f"0 |{_drawn(lengths.counts.sum(0))}| {lengths.edges[-1]:,.0f} tokens{more}")
    if report.problems:
        console.print(f"[bold red]PROBLEMS[/]: {report.problems:,}")
    else:
        console.print("[green]CLEAN[/]: every record can be trained on")


def _drawn(counts: Any) -> str:
    """A histogram in one line; what is there at all is seen."""
    most = max(int(counts.max()), 1)
    return "".join(BARS[-(-int(count) * (len(BARS) - 1) // most)] for count in counts)


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


# --- mix -------------------------------------------------------------------------------------


def _mix(
    mixture: Annotated[Path, typer.Argument(metavar="MIX.yaml", help="What is mixed.")],
    out: Annotated[Path, typer.Option("--out", "--output_file", help="A new file.")],
    seed: Seed = 42,
    mindformers: Annotated[
        bool,
        typer.Option("--mindformers", help="Write what MindFormers' data_process.py writes."),
    ] = False,
) -> None:
    """Mix data files as a YAML file says, into JSON lines that keep every field.

    Training reads the YAML file itself, too: mixing it before is not needed.
    """
    from unillava.data.files import refuse_taken
    from unillava.data.mixture import choose, process, read_mixture, write_lines

    refuse_taken(out)
    entries = read_mixture(mixture)
    if mindformers:
        process(entries, out, seed)
        return
    records = choose(entries, seed, lambda line: print(line, file=sys.stderr))
    with progress_bar("writing", len(records)) as advance:
        write_lines(records, out, advance)
    print(f"{out}: {len(records):,} records", file=sys.stderr)
