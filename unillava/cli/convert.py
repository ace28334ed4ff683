"""`unillava convert SRC DST --to DIALECT`: a checkpoint from any layout to any other."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unillava.cli import flags
from unillava.errors import RequestError

if TYPE_CHECKING:
    from weight_convert.convert import Plan
    from weight_convert.source import Options, Source

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
AllowMissing = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Tensors that may be absent, e.g. '*.bias'; repeatable."),
]
AllowUnused = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Tensors that may be left out; repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("convert")(_convert)


def _convert(
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", help="Directory, weight file or hub id.")
    ] = None,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="New directory or file.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="DIALECT", help="See --list.")] = None,
    dialect: Annotated[
        str | None,
        typer.Option("--from", metavar="DIALECT", help="Of SRC; default: recognised by content."),
    ] = None,
    base: flags.Base = None,
    vision: flags.Vision = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: each tensor's own.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes per file, e.g. 5GB.")
    ] = "5GB",
    weights: Annotated[
        str | None,
        typer.Option(help="safetensors, bin, pdparams or ckpt, where DIALECT has several."),
    ] = None,
    spelling: Annotated[
        str | None,
        typer.Option(help="hf, peft: whose names are written (--list); hf by default 'hub'."),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(metavar="PART,…", help="Only these: vision, projector, newline, language."),
    ] = None,
    qkv_concat: Annotated[
        bool, typer.Option("--qkv-concat", help="Fuse q, k, v where DIALECT knows such a form.")
    ] = False,
    strategy: flags.Strategy = None,
    allow_missing: AllowMissing = None,
    allow_unused: AllowUnused = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, tensor by tensor.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result again and compare every bit.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST, once the new one is complete.")
    ] = False,
    list_dialects: Annotated[
        bool, typer.Option("--list", help="Show the dialects and which directions work.")
    ] = False,
) -> None:
    """Convert a checkpoint between layouts, bit for bit, one tensor in memory at a time."""
    from weight_convert.convert import carry_out, plan

    if list_dialects:
        _list()
        return
    if source is None or destination is None or to is None:
        raise RequestError(
            "convert needs a source, a destination and a dialect",
            expected="unillava convert SRC DST --to DIALECT",
            fix="`unillava convert --list` shows the dialects",
        )
    options = read_options(
        base=base,
        vision=vision,
        dtype=dtype,
        shard_size=shard_size,
        weights=weights,
        spelling=spelling,
        parts=parts,
        qkv_concat=qkv_concat,
        strategy=strategy,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
    )
    opened = open_any(source, options, dialect)
    chosen = plan(opened, to, destination, options)
    if dry_run:
        show_plan(chosen)
        return
    began = time.monotonic()
    with progress_bar("converting", chosen.total_bytes) as advance:
        carry_out(chosen, resume=resume, overwrite=overwrite, progress=advance)
    print_summary(chosen, time.monotonic() - began)
    if verify:
        _verify(chosen, options)


def read_options(
    *,
    base: str | None = None,
    vision: str | None = None,
    dtype: str | None = None,
    shard_size: str = "5GB",
    weights: str | None = None,
    spelling: str | None = None,
    parts: str | None = None,
    qkv_concat: bool = False,
    strategy: Path | None = None,
    allow_missing: list[str] | None = None,
    allow_unused: list[str] | None = None,
) -> Options:
    """The options as given on the command line.

    Raises:
        UnillavaError: a value that cannot be meant.
    """
    from unillava.checkpoint import locate
    from weight_convert.canonical import PARTS
    from weight_convert.cast import dtype_name
    from weight_convert.dialects.peft import SPELLINGS
    from weight_convert.files import FORMATS
    from weight_convert.source import Options

    chosen = frozenset(parts.split(",")) if parts else frozenset(PARTS)
    _choices("--parts", chosen, PARTS)
    _choices("--weights", [weights] if weights else [], FORMATS)
    _choices("--spelling", [spelling] if spelling else [], SPELLINGS)
    return Options(
        base=locate(base) if base else None,
        vision=locate(vision) if vision else None,
        dtype=dtype_name(dtype) if dtype else None,
        max_shard_bytes=parse_bytes(shard_size),
        weights=weights,
        qkv_concat=qkv_concat,
        strategy=strategy,
        spelling=spelling,
        parts=chosen,
        allow_missing=tuple(allow_missing or ()),
        allow_unused=tuple(allow_unused or ()),
    )


def _choices(flag: str, given: object, known: object) -> None:
    unknown = [value for value in given if value not in known]
    if unknown:
        raise RequestError(
            f"{flag} does not know that", given=", ".join(unknown), expected=", ".join(known)
        )


def parse_bytes(text: str) -> int:
    """`5GB`, `500MB` or a plain number as bytes.

    Raises:
        RequestError: it is not written so.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise RequestError("a size cannot be read", given=text, expected="a size such as 5GB")
    return size


def open_any(path: str, options: Options, dialect: str | None = None) -> Source:
    """A checkpoint from a path or hub id, its shapes checked against its configuration.

    Raises:
        UnillavaError: it cannot be opened, or contradicts itself.
    """
    from unillava.checkpoint import locate
    from weight_convert.opening import open_source

    source = open_source(locate(path), options, dialect)
    _check_shapes(source)
    return source


def _check_shapes(source: Source) -> None:
    """Hold every shape to the configuration, where unillava knows the model."""
    from unillava.checkpoint import as_checkpoint
    from unillava.errors import ConfigError

    if source.adapter is not None or not {"vision", "language"} <= source.parts:
        return
    try:
        checkpoint = as_checkpoint(source)
    except ConfigError as error:
        print(f"note: unillava cannot run this model; shapes were not checked ({error.problem})")
        return
    checkpoint.check()


class progress_bar:
    """A bar of bytes per second on stderr; `with progress_bar(…) as advance: advance(name, n)`."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self):
        self._progress.start()
        return lambda name, count: self._progress.advance(self._task, count)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from weight_convert.dialects.peft import SPELLINGS
    from weight_convert.dialects.registry import dialects

    table = Table("dialect", "read", "write", "what it is")
    for dialect in dialects().values():
        table.add_row(
            dialect.name,
            "yes" if dialect.read else "no",
            "yes" if dialect.write else "no",
            dialect.title,
        )
    console = Console(soft_wrap=False)
    console.print(table)
    names = "; ".join(SPELLINGS)
    console.print(f"--spelling, hf and peft ('original': peft alone): {names}", style="dim")


def show_plan(chosen: Plan) -> None:
    """The plan as a table: source name, operation, target name, shape, dtype."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from weight_convert.convert import rows

    names = ("source", "operation", "target", "shape", "dtype", "file")
    lines = [
        (row.source, row.operation, row.target, "x".join(map(str, row.shape)), row.dtype, row.file)
        for row in rows(chosen)
    ]
    console = Console()
    if console.is_terminal:
        table = Table(*(Column(name, overflow="fold") for name in names))
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
    else:  # for grep and cut
        print("\t".join(names))
        print("\n".join("\t".join(line) for line in lines))
    for line in _facts(chosen):
        print(line)
    print(f"nothing was written; {chosen.destination} would hold {_size(chosen.total_bytes)}")


def _facts(chosen: Plan) -> list[str]:
    source, target = chosen.source, chosen.target
    lines = [f"{source.path}: {source.dialect} -> {target.dialect}"]
    if source.vocabulary:
        tokens = ", ".join(f"{t} {n}" for t, n in source.vocabulary.tokens.items()) or "none"
        lines.append(f"vocabulary: {source.vocabulary.rows} rows before; tokens added: {tokens}")
    lines += source.notes
    if source.dropped:
        lines.append(f"left out, no weights: {len(source.dropped)} ({_few(source.dropped)})")
    if target.left_out:
        lines.append(f"not held by {target.dialect}: {_few(target.left_out)}")
    return lines


def _few(names: tuple[str, ...]) -> str:
    from weight_convert.storage.tensor import few

    return few(names, 3)


def print_summary(chosen: Plan, seconds: float) -> None:
    """What was done, how much and how fast."""
    for line in _facts(chosen):
        print(line)
    count = sum(len(file.tensors) for file in chosen.target.weights)
    speed = _size(int(chosen.total_bytes / max(seconds, 1e-9)))
    print(
        f"{chosen.destination}: {count} tensors, {_size(chosen.total_bytes)} in {seconds:.1f} s "
        f"({speed}/s)"
    )


def _verify(chosen: Plan, options: Options) -> None:
    from dataclasses import replace

    from unillava.cli.verify import report
    from weight_convert.verify import verify

    reading = replace(options, dtype=None)
    with progress_bar("verifying", chosen.total_bytes) as advance:
        outcome = verify(
            chosen.destination, reading, dialect=chosen.target.dialect, progress=advance
        )
    report(outcome, f"{chosen.destination} against its manifest")


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
