"""`unillava info DIR`: what a checkpoint is, and what it needs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated

import typer

from unillava.cli import flags
from unillava.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from unillava.info import Info


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("info")(_info)


def _info(
    directory: flags.Directory = None,
    model_path: flags.ModelPath = None,
    base: flags.Base = None,
    vision: flags.Vision = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option("--image-size", metavar="WxH", help="Count tokens for it; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what a checkpoint is, its size, image tokens, and the memory it needs."""
    from rich.console import Console

    from unillava import info
    from unillava.checkpoint import open_checkpoint

    sizes = [parse_size(size) for size in image_size or []] or info.TYPICAL_SIZES
    path = flags.checkpoint_path(directory, model_path)
    checkpoint = open_checkpoint(path, base=base, vision=vision)
    facts = info.examine(checkpoint, sizes)
    if as_json:
        print(json.dumps(info.as_json(facts), indent=2))
    else:
        _print(Console(soft_wrap=True), facts)
    if facts.problem:
        checkpoint.check()


def parse_size(text: str) -> tuple[int, int]:
    """`640x480` as (width, height).

    Raises:
        RequestError: it is not written so.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text)
    if not match:
        raise RequestError(
            "an image size cannot be read", given=text, expected="WIDTHxHEIGHT, as in 640x480"
        )
    return int(match[1]), int(match[2])


def _print(console: Console, info: Info) -> None:
    from unillava.memory import ASSUMPTIONS

    _print_summary(console, info)
    _print_parts(console, info)
    _print_tokens(console, info)
    _print_inference(console, info)
    _print_training(console, info)
    for line in ASSUMPTIONS:
        console.print(line, style="dim")


def _print_summary(console: Console, info: Info) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    rows = {
        "checkpoint": info.directory,
        "layout": f"{info.layout}, {info.files} weight file{'s' * (info.files > 1)}",
        "family": f"{info.family}, images {info.image_mode}",
        "vision": info.vision,
        "projector": info.projector,
        "language": info.language,
        "stored as": ", ".join(info.dtypes),
        "template": info.template or f"unknown: {info.template_problem}",
        "context": f"{info.context} tokens",
        "weights": "contradict config.json" if info.problem else "as config.json says",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def _print_parts(console: Console, info: Info) -> None:
    from rich.table import Table

    table = Table("part", *_right("tensors", "parameters", "size"))
    for part in info.parts:
        table.add_row(part.name, str(part.tensors), f"{part.parameters:,}", _size(part.bytes))
    tensors = sum(part.tensors for part in info.parts)
    table.add_section()
    table.add_row("total", str(tensors), f"{info.parameters:,}", _size(info.bytes))
    console.print(table)


def _print_tokens(console: Console, info: Info) -> None:
    from rich.table import Table

    table = Table("image or video", *_right("tiles", "tokens", "of the context"))
    for image in info.images:
        name = f"{image.width} x {image.height}"
        table.add_row(name, str(image.tiles), str(image.tokens), _share(image.tokens, info.context))
    for video in info.videos:
        table.add_row(
            f"{video.frames} frames",
            str(video.frames),
            str(video.tokens),
            _share(video.tokens, info.context),
        )
    console.print(table)


def _print_inference(console: Console, info: Info) -> None:
    from rich.table import Table

    table = Table("inference", *_right("weights", "cache, whole context", "total"))
    for need in info.inference:
        table.add_row(need.dtype, _size(need.weights), _size(need.cache), _size(need.total))
    console.print(table)


def _print_training(console: Console, info: Info) -> None:
    from rich.table import Table

    # One column for each kind, so that the table fits into a terminal of 80 columns.
    table = Table("training", *_right(*(need.kind for need in info.training)))
    table.add_row("trained", *(_count(need.trained) for need in info.training))
    for name in ("weights", "gradients", "moments", "master", "activations"):
        table.add_row(name, *(_size(getattr(need, name)) for need in info.training))
    table.add_section()
    table.add_row("total", *(_size(need.total) for need in info.training))
    console.print(table)


def _right(*names: str) -> list:
    from rich.table import Column

    return [Column(name, justify="right") for name in names]


def _count(number: int) -> str:
    """Parameters in billions, fewer in millions."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _size(count: int) -> str:
    """Bytes in GiB, small ones in MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def _share(tokens: int, context: int) -> str:
    return f"{100 * tokens / context:.1f} %"
