"""`unillava parity DIR`: do the backends compute the same thing, and if not, where do they part?"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from unillava.cli import flags
from unillava.errors import RequestError


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("parity")(_parity)


def _parity(
    directory: flags.Directory = None,
    model_path: flags.ModelPath = None,
    base: flags.Base = None,
    vision: flags.Vision = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Which to compare, separated by commas: torch, mindspore, paddle, or NAME@DEVICE. "
            "Default: all installed."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What they are compared with: a backend, or transformers (its own model on "
            "torch), or either @DEVICE. Default: the first of --backends."
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="Picture: path or URL; repeatable. Default: a drawn one."),
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", help="Video file or folder of frames.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What is asked about each picture.")
    ] = None,
    template: flags.Template = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "--max_new_tokens", help="Greedy tokens; 0: none."),
    ] = 16,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="cuda:0 for all, or torch=cuda:0 for one; repeatable."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Bar relative to each tensor's largest value. Default: 1e-5 in float32, 0.08 in "
            "float16, 0.6 in bfloat16 (the same number of roundings).",
            show_default=False,
        ),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients/--no-gradients", help="Compare every gradient, too.")
    ] = True,
    repeats: Annotated[
        int,
        typer.Option(
            help="Runs of the reference; above 1 its own noise is measured, with other threads "
            "and kernels, too."
        ),
    ] = 3,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            help="BACKEND=DIR: compare a converted checkpoint with its source: this backend loads "
            "DIR instead. Of the reference's own backend: adds it to those compared. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The report, one HTML file that needs nothing beside it.")
    ] = Path("parity.html"),
    as_json: Annotated[Path | None, typer.Option("--json", help="The same for programs.")] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the reference's outputs and gradients are kept meanwhile (with gradients "
            "4 bytes per parameter). Default: the system's temporary folder."
        ),
    ] = None,
) -> None:
    """Prove that backends compute the same thing, or name the first layer where they do not.

    Every backend runs in a process of its own on the same NumPy batch. Compared are the output of
    every module, the loss, the gradient of every parameter and greedy tokens. Exit code 0: the
    same, 1: not the same, 2: it could not be compared.
    """
    from rich.console import Console

    from unillava.parity import Settings, run_parity
    from unillava.parity.report import print_report, to_html, to_json, write_whole

    for path in (out, as_json):
        _check_folder(path)
    settings = Settings(
        checkpoint=flags.checkpoint_path(directory, model_path),
        backends=tuple(name.strip() for name in (backends or "").split(",") if name.strip()),
        reference=reference,
        images=tuple(image or ()),
        videos=tuple(video or ()),
        prompt=prompt,
        template=template,
        new_tokens=max_new_tokens,
        dtype=dtype,
        devices=_devices(device or ()),
        tolerance=tolerance,
        gradients=gradients,
        repeats=repeats,
        base=base,
        vision=vision,
        overrides=_pairs("--override", override or ()),
        work_dir=None if work_dir is None else str(work_dir),
    )
    with _Bars() as bars:
        report = run_parity(settings, bars.show)
    print_report(report, Console())
    write_whole(out, to_html(report))
    if as_json is not None:
        text = json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(as_json, text + "\n")
    Console(stderr=True).print(f"report: {out}", markup=False, highlight=False, soft_wrap=True)
    if not report.passed:
        raise typer.Exit(1)


def _check_folder(path: Path | None) -> None:
    """Fail before the work, not after it."""
    if path is not None and not path.resolve().parent.is_dir():
        raise RequestError(
            "the folder for the report does not exist",
            given=path,
            fix=f"make {path.resolve().parent} first, or name another file",
        )


def _devices(given: Iterable[str]) -> dict[str, str]:
    """`cuda:0` for every backend (key ""), `torch=cuda:0` for one."""
    named = [text for text in given if "=" in text]
    plain = [text for text in given if "=" not in text]
    return ({"": plain[-1]} if plain else {}) | _pairs("--device", named)


def _pairs(option: str, given: Iterable[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise RequestError(
                f"{option} cannot be understood", given=text, expected="BACKEND=VALUE"
            )
        pairs[name] = value
    return pairs


class _Bars:
    """A progress bar on stderr for each process."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, int] = {}

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, label: str, done: int, total: int, now: str) -> None:
        """What `unillava.parity.run.Progress` says."""
        if label not in self.tasks:
            self.tasks[label] = self.progress.add_task(label, total=total, now=now)
        self.progress.update(self.tasks[label], completed=done, now=now)
