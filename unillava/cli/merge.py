"""`unillava merge ADAPTER DST`: a LoRA adapter and its base as one whole model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unillava.cli import flags
from unillava.cli.convert import print_summary, progress_bar, read_options
from unillava.errors import CheckpointError

if TYPE_CHECKING:
    from weight_convert.source import Source


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("merge")(_merge)


def _merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="PEFT's or Paddle's LoRA.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New directory.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base", "--model-base", metavar="DIR", help="Default: what the adapter names."
        ),
    ] = None,
    vision: flags.Vision = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: the base's.")
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="DIALECT", help="Of DST.")] = "hf",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes per file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Merge an adapter into the model that it belongs to; one matrix at a time."""
    from unillava.checkpoint import locate
    from weight_convert.convert import carry_out, plan
    from weight_convert.opening import open_source

    path = locate(adapter)
    alone = open_source(path)
    named = _named_base(alone)
    options = read_options(base=base or named, vision=vision, dtype=dtype, shard_size=shard_size)
    chosen = plan(open_source(path, options), to, destination, options)
    began = time.monotonic()
    with progress_bar("merging", chosen.total_bytes) as advance:
        carry_out(chosen, overwrite=overwrite, progress=advance)
    print_summary(chosen, time.monotonic() - began)
    print(f"{len(alone.adapter.pairs)} matrices were merged")


def _named_base(source: Source) -> str | None:
    """The base that an adapter was trained on, as it says itself.

    Raises:
        CheckpointError: it is no adapter, so nothing could be merged.
    """
    if source.adapter is None:
        raise CheckpointError(
            f"there is nothing to merge in {source.path}",
            given=f"dialect {source.dialect}: whole weights, no low-rank matrices",
            expected="a LoRA directory",
        )
    return source.adapter.settings.get("base_model_name_or_path")
