"""Checkpoints that MindSpore's own writers made, whole or cut over ranks; and one with our names.

`mindspore` is what unillava's native Cells are saved as: canonical names, in safetensors that say
`format: ms`, or in `.ckpt`, with the small files of a llava-hf directory beside them.
`mindspore.load_checkpoint` reads it straight into a Cell. What this module knows about MindSpore's
files (folders of several, one folder per rank, the optimizer's state) the dialects of MindFormers
use too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from weight_convert import files
from weight_convert.canonical import HEAD, PARTS, TOP_DEFAULTS, Config, part_of, text_config
from weight_convert.contents import Contents
from weight_convert.dialects import clip, hf, language
from weight_convert.dialects.base import Dialect, check_complete
from weight_convert.errors import CheckpointError
from weight_convert.opening import borrowed
from weight_convert.source import (
    Content,
    Options,
    Source,
    Target,
    Vocabulary,
    WeightFile,
    as_json,
    matches,
    pick_files,
)
from weight_convert.storage.mindspore_strategy import open_ranks
from weight_convert.storage.tensor import Tensor, few

# --- MindSpore's files -----------------------------------------------------------------------

STATE_PREFIXES = ("adam_m.", "adam_v.", "moment1.", "moment2.", "accu_grads.")
STATE_NAMES = frozenset(
    (
        *("beta1_power", "beta2_power", "learning_rate", "global_step", "epoch_num", "step_num"),
        *("loss_scale", "global_batch_size"),
    )
)
RANK = re.compile(r"rank_(\d+)")
SAVED_BELOW = ("checkpoint_network", "checkpoint")
"""Folders of MindFormers' output, weights alone first, that have a folder for each rank."""
METADATA = {"format": "ms"}


def is_state(name: str) -> bool:
    """Whether a stored tensor is the optimizer's or a counter, and no weight."""
    return name.startswith(STATE_PREFIXES) or name in STATE_NAMES


def stored_names(contents: Contents) -> frozenset[str]:
    """Names of all tensors that are there; for ranks, those of the first."""
    folder = _rank_root(contents)
    if folder is None:
        return frozenset(_whole_tensors(contents))
    first = next(iter(_ranks(folder).values()))
    saves = [path for path in sorted(first.iterdir()) if path.suffix in (".ckpt", ".safetensors")]
    return frozenset(files.open_file(saves[-1]) if saves else ())


def stored_tensors(contents: Contents, options: Options) -> Mapping[str, Tensor]:
    """Every tensor, the ranks of a parallel run put together.

    Args:
        contents: a file, a folder of files, or one with a folder for each rank.
        options: `strategy`, if it does not lie inside or beside.

    Raises:
        CheckpointError: a damaged file, or ranks without the strategy that they were cut by.
    """
    folder = _rank_root(contents)
    if folder is None:
        return _whole_tensors(contents)
    strategy = options.strategy or _find_strategy(folder)
    if strategy is not None:
        return open_ranks(folder, strategy)
    ranks = _ranks(folder)
    if len(ranks) == 1:
        return _folder_tensors(*ranks.values())
    raise CheckpointError(
        f"{folder} holds {len(ranks)} ranks, and nothing says how they cut the tensors",
        expected=f"the strategy files of the run, in {folder / 'strategy'} or beside it",
        fix="name them: --strategy PATH; if every rank holds the whole model (data parallelism "
        f"alone), convert {next(iter(ranks.values())).name}",
    )


def _rank_root(contents: Contents) -> Path | None:
    """The folder whose folders are the ranks: this one, or one of SAVED_BELOW."""
    if contents.is_file:
        return None
    below = [contents.path / name for name in SAVED_BELOW]
    folders = (contents.path, *(folder for folder in below if folder.is_dir()))
    return next((folder for folder in folders if _ranks(folder)), None)


def _ranks(folder: Path) -> dict[int, Path]:
    """Rank -> its folder, in order."""
    found = [(RANK.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _find_strategy(folder: Path) -> Path | None:
    """Where MindFormers puts the strategy files: `output/strategy`, beside the checkpoints."""
    places = (folder / "strategy", folder.parent / "strategy")
    return next((place for place in places if place.is_dir()), None)


def _whole_tensors(contents: Contents) -> Mapping[str, Tensor]:
    return contents.tensors or _folder_tensors(contents.path)


def _folder_tensors(folder: Path) -> Mapping[str, Tensor]:
    """All `.ckpt` of a folder merged, else all `.safetensors`, as MindFormers loads a folder."""
    for kind in ("ckpt", "safetensors"):
        tensors = files.open_folder(folder, kind)
        if tensors is not None:
            return tensors
    return {}


def weight_files(
    stored: Mapping[str, Tensor], options: Options, default: str, stem: str | None = None
) -> tuple[tuple[WeightFile, ...], dict[str, bytes]]:
    """MindSpore's weight files and the index document, if there is one.

    Raises:
        CheckpointError: MindSpore does not read the format that is asked for.
    """
    kind = options.weights or default
    if kind not in ("ckpt", "safetensors"):
        raise CheckpointError(
            "MindSpore does not read weights of this format",
            given=kind,
            expected="ckpt or safetensors",
        )
    settings = {"metadata": METADATA} if kind == "safetensors" else {}
    return files.shards(stored, kind, options.max_shard_bytes, stem=stem, settings=settings)


# --- partial checkpoints ---------------------------------------------------------------------


def wanted_parts(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """The parts that must be complete: all, or, in files that hold single parts, those there.

    A file with tensors of both the tower and the language model is of a whole model.
    """
    homes: dict[str, set[Path]] = {part: set() for part in PARTS}
    for name, tensor in tensors.items():
        homes[part_of(name)] |= {place.path for place in tensor.places}
    whole = homes["vision"] & homes["language"]
    return frozenset(PARTS if whole else (part for part in PARTS if homes[part]))


def config_of_parts(config: Config, parts: Iterable[str]) -> Config:
    """What a configuration says about a tower or a language model alone, else all of it."""
    parts = set(parts)
    if parts == {"vision"}:
        return clip.partial_config(config)
    return language.partial_config(config) if parts == {"language"} else config


# --- the dialect -----------------------------------------------------------------------------

NAME = "mindspore"
SIGNS = (
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "multi_modal_projector.linear_1.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.transformer.wte.weight",
)
"""Any of these canonical names; the first tensors of each part."""


def _evidence(contents: Contents) -> str:
    if not contents.is_mindspore and _rank_root(contents) is None:
        return ""
    names = {hf.canonical_name(name) for name in stored_names(contents)}
    sign = next((name for name in SIGNS if name in names), "")
    return f"files of MindSpore with a tensor {sign}" if sign else ""


def _read(contents: Contents, options: Options) -> Source:
    stored = stored_tensors(contents, options)
    dropped = [n for n in stored if is_state(n) or matches(n, options.allow_unused)]
    left = set(dropped)
    tensors, buffers = hf.canonical_tensors({n: t for n, t in stored.items() if n not in left})
    parts = wanted_parts(tensors)
    config, side, vocabulary = described(contents, options)
    if text_config(config)["tie_word_embeddings"] and HEAD in tensors:
        tensors = hf.without_repeated_head(contents, tensors)
    check_complete(tensors, config, parts, options)
    config = config_of_parts(config, parts)
    return Source(
        NAME, contents.path, config, tensors, side, vocabulary, dropped=(*dropped, *buffers)
    )


def described(
    contents: Contents, options: Options
) -> tuple[Config, dict[str, Content], Vocabulary | None]:
    """Configuration and small files: those of the directory, else `opening.borrowed`.

    Raises:
        CheckpointError: there is no configuration anywhere.
    """
    beside = {} if contents.is_file else pick_files(contents.path, hf.SIDE_FILES)
    own = contents.config
    if own.get("model_type") in TOP_DEFAULTS or own.keys() & {"text_config", "vision_config"}:
        return own, beside, None
    config, side, vocabulary = borrowed(contents, options)
    return config, side | beside, vocabulary


def _write(source: Source, options: Options) -> Target:
    held = {n: t for n, t in source.tensors.items() if part_of(n) in options.parts}
    if not held:
        raise CheckpointError(
            f"{source.path} has none of the parts that are asked for",
            given=f"it has {few(sorted(source.parts))}",
            expected=few(sorted(options.parts)),
        )
    weights, index = weight_files(held, options, "safetensors")
    config = config_of_parts(source.config, {part_of(name) for name in held})
    documents = {"config.json": as_json(config), **source.files, **index}
    left_out = tuple(name for name in source.tensors if name not in held)
    return Target(NAME, weights, documents, left_out=left_out)


DIALECTS = (
    Dialect(
        NAME,
        "unillava's own names in MindSpore's files (safetensors or .ckpt, whole or rank by rank)",
        _evidence,
        _read,
        _write,
    ),
)
