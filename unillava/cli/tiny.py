"""`unillava tiny DIR`: write a tiny random checkpoint to try things out on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unillava.errors import DataError


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("tiny")(_tiny)


def _tiny(
    directory: Annotated[Path, typer.Argument(help="New or empty directory.")],
    family: Annotated[
        str, typer.Option(help="llava, llava_next or llava_next_video.")
    ] = "llava_next",
    text: Annotated[str, typer.Option(help="llama, llama3, mistral or qwen2.")] = "llama",
    vision: Annotated[str, typer.Option(help="clip or siglip.")] = "clip",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the weights on disk: float32, float16 or bfloat16.")
    ] = "float32",
    size: Annotated[
        str, typer.Option(help="tiny; or small: about a million parameters, to be trained.")
    ] = "tiny",
    corpus: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text that the tokenizer is learnt from.")
    ] = None,
) -> None:
    """Write a tiny random checkpoint in the Hugging Face layout (its replies are nonsense)."""
    from unillava.tiny import CORPUS, build_tiny

    texts = CORPUS if corpus is None else read_corpus(corpus)
    build_tiny(directory, family, text, vision, seed=seed, dtype=dtype, size=size, corpus=texts)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}: {family}, {text}, {vision}, {size / 1e6:.1f} MB")


def read_corpus(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the corpus cannot be read", given=f"{path}: {error}", expected="text in UTF-8"
        ) from error
