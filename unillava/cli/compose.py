"""`unillava compose DST --vision … --language … --projector …`: what stage 1 starts from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from unillava.cli.convert import print_summary, progress_bar, read_options


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("compose")(_compose)


def _compose(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New directory.")],
    vision: Annotated[
        str, typer.Option(metavar="DIR", help="CLIP or SigLIP, or a checkpoint that has one.")
    ],
    language: Annotated[
        str, typer.Option(metavar="DIR", help="Language model, or a checkpoint that has one.")
    ],
    projector: Annotated[
        str,
        typer.Option(help="mm_projector.bin, or the kind of a new one: linear, mlp2x_gelu, …"),
    ] = "mlp2x_gelu",
    family: Annotated[str, typer.Option(help="llava, llava_next or llava_next_video.")] = "llava",
    image_mode: Annotated[
        str | None, typer.Option(help="square, pad or anyres; default: the family's.")
    ] = None,
    feature_layer: Annotated[
        int | None, typer.Option(help="Hidden states of the tower that are projected; usually -2.")
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="default (without the class token) or full.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template to name.")] = None,
    seed: Annotated[int, typer.Option(help="Of new weights.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: each part's own.")
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="DIALECT", help="Of DST.")] = "hf",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes per file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Put a LLaVA together from a vision tower, a language model and a projector."""
    from unillava.checkpoint import locate
    from weight_convert.compose import compose
    from weight_convert.convert import carry_out, plan

    options = read_options(dtype=dtype, shard_size=shard_size)
    source = compose(
        vision=locate(vision),
        language=locate(language),
        projector=projector,
        family=family,
        image_mode=image_mode,
        feature_layer=feature_layer,
        strategy=select,
        template=template,
        seed=seed,
        dtype=options.dtype,
    )
    chosen = plan(source, to, destination, options)
    began = time.monotonic()
    with progress_bar("composing", chosen.total_bytes) as advance:
        carry_out(chosen, overwrite=overwrite, progress=advance)
    print_summary(chosen, time.monotonic() - began)
