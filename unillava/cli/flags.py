"""Command-line options that several sub-commands share, with the names that old users know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unillava.errors import RequestError

Directory = Annotated[
    str | None,
    typer.Argument(help="Checkpoint directory or hub id.", metavar="DIR", show_default=False),
]
ModelPath = Annotated[
    str | None, typer.Option("--model-path", help="The same as DIR.", metavar="DIR")
]
Backend = Annotated[
    str | None,
    typer.Option(help="torch, mindspore, paddle or auto. Default: UNILLAVA_BACKEND, else auto."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda:0, npu:0, … as the framework names it.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Template = Annotated[
    str | None,
    typer.Option(
        "--template", "--conv-mode", help="Conversation template; default: the checkpoint's."
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Use the framework's compiler: the same tokens.")
]
Temperature = Annotated[
    float | None, typer.Option(help="0 always takes the best token; higher is more varied.")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", "--top_p", help="Draw from the best tokens that reach this sum."),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", "--top_k", help="Draw from this many best tokens; 0: all.")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", "--repetition_penalty", help="Above 1: less repetition."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", "--max_new_tokens", help="Longest reply, in tokens."),
]
Seed = Annotated[int | None, typer.Option(help="Of the random choice of tokens.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End the reply before this text; repeatable.")
]
NumFrames = Annotated[
    int, typer.Option("--num-frames", min=1, help="Frames taken from a video, evenly spread.")
]
System = Annotated[str | None, typer.Option(help="System text, in place of the template's own.")]

Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        "--model-base",
        metavar="DIR",
        help="What the checkpoint lacks: the configuration and tokenizer of a bare weight file, "
        "or the model that an adapter or a delta belongs to.",
    ),
]
Vision = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The vision tower of a checkpoint that has none inside."),
]
Strategy = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="MindSpore's strategy file or folder, for a checkpoint that is cut by ranks.",
    ),
]


def checkpoint_path(directory: str | None, model_path: str | None) -> str:
    """The checkpoint, named either way.

    Raises:
        RequestError: named not at all, or twice and differently.
    """
    if directory and model_path and directory != model_path:
        raise RequestError(
            "two checkpoints are named",
            given=f"{directory} and --model-path {model_path}",
            expected="one of the two",
        )
    path = directory or model_path
    if not path:
        raise RequestError(
            "no checkpoint is named", fix="put its directory or hub id after the command"
        )
    return path


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: neither None nor an empty list."""
    return {name: value for name, value in options.items() if value not in (None, [])}
