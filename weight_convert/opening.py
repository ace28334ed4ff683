"""Opening a checkpoint of any dialect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from weight_convert.canonical import Config
from weight_convert.contents import Contents, look
from weight_convert.dialects import registry
from weight_convert.errors import CheckpointError
from weight_convert.source import Content, Options, Source, Vocabulary


def open_source(
    path: str | Path, options: Options | None = None, dialect: str | None = None
) -> Source:
    """Open a checkpoint of any dialect, in canonical terms. No tensor is read.

    Args:
        path: a directory, or a single file of weights.
        options: `base`, `vision`, `allow_missing` and `allow_unused` matter here.
        dialect: its name, if it shall not be recognised by content.

    Raises:
        CheckpointError: of no known layout, damaged, incomplete, or with unknown tensors.
    """
    contents = look(path)
    found = registry.named(dialect) if dialect else registry.recognise(contents)[0]
    if found.read is None:
        raise CheckpointError(f"dialect {found.name} can only be written, not read")
    source = found.read(contents, options or Options())
    return _remember(source, contents.manifest)


def _remember(source: Source, manifest: Config) -> Source:
    """Add what the manifest knows and the dialect cannot say."""
    vocabulary = manifest.get("vocabulary")
    if vocabulary and source.vocabulary is None:
        source = replace(
            source, vocabulary=Vocabulary(vocabulary["rows"], dict(vocabulary["tokens"]))
        )
    return replace(source, memory={**manifest.get("memory", {}), **source.memory})


def borrowed(
    contents: Contents, options: Options
) -> tuple[Config, dict[str, Content], Vocabulary | None]:
    """Configuration, side files and vocabulary for a layout that has none of its own.

    They come from `--base` (a checkpoint of any dialect), else from the manifest that an earlier
    conversion left beside the weights (which has no side files).

    Raises:
        CheckpointError: there is neither.
    """
    if options.base is not None:
        base = open_source(options.base, replace(options, base=None))
        return base.config, dict(base.files), base.vocabulary
    if contents.manifest.get("config"):
        vocabulary = contents.manifest.get("vocabulary")
        kept = Vocabulary(vocabulary["rows"], dict(vocabulary["tokens"])) if vocabulary else None
        return dict(contents.manifest["config"]), {}, kept
    raise CheckpointError(
        f"{contents.path} holds weights, and nothing says what model they belong to",
        fix="name a checkpoint of the same model, in any layout, that has its configuration "
        "and tokenizer: --base DIR",
    )
