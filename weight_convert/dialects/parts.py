"""A model in parts, each of which other tools load: `vision/`, `language/` and `projector/`.

`vision/` and `language/` are what transformers saves for the tower and the language model;
`projector/` has an `mm_projector.bin` as original LLaVA's stage 1 writes it, with the newline in
the same file. config.json holds what concerns the whole, beside it lie the processor files. Put
together again, nothing has changed. A directory that somebody laid out by hand, without
config.json, is composed as a new model would be.
"""

from __future__ import annotations

from dataclasses import replace

from weight_convert import canonical, files
from weight_convert.canonical import NEWLINE, PARTS, PROJECTOR, TOP_DEFAULTS, Config
from weight_convert.compose import compose
from weight_convert.contents import Contents
from weight_convert.dialects import clip, language, mm_settings, mpt, registry, vocabulary
from weight_convert.dialects.base import Dialect, check_complete, to_canonical, to_stored
from weight_convert.dialects.configs import as_it_was
from weight_convert.dialects.hf import PROCESSOR_FILES
from weight_convert.errors import CheckpointError
from weight_convert.mapping import NameTable
from weight_convert.opening import open_source
from weight_convert.source import Options, Source, Target, as_json, pick_files
from weight_convert.storage.tensor import Tensor

TOWER_FOLDER, LANGUAGE_FOLDER, PROJECTOR_FOLDER = "vision", "language", "projector"
PROJECTOR_STEM = "mm_projector"
NESTED = ("text_config", "vision_config")


def _evidence(contents: Contents) -> str:
    folders = [name for name in (TOWER_FOLDER, LANGUAGE_FOLDER) if (contents.path / name).is_dir()]
    return f"folders {' and '.join(folders)}" if len(folders) == 2 else ""


# --- reading ---------------------------------------------------------------------------------


def _read(contents: Contents, options: Options) -> Source:
    if not contents.config:
        return _composed(contents, options)
    tower = _open(contents, TOWER_FOLDER, "vision", options)
    text = _open(contents, LANGUAGE_FOLDER, "language", options)
    config = {
        **contents.config,
        "text_config": text.config["text_config"],
        "vision_config": canonical.vision_config(tower.config),
    }
    _check_family(contents)
    config = as_it_was(contents, dict(sorted(config.items())), _there_and_back)
    projector, dropped = _read_projector(contents, config, options)
    tensors = {**tower.tensors, **projector, **text.tensors}
    check_complete(tensors, config, PARTS, options)
    return Source(
        "parts",
        contents.path,
        config,
        tensors,
        {**text.files, **pick_files(contents.path, PROCESSOR_FILES)},
        dropped=(*tower.dropped, *text.dropped, *dropped),
        memory={**text.memory, **tower.memory},
    )


def _composed(contents: Contents, options: Options) -> Source:
    """What somebody laid out by hand."""
    folder = contents.path / PROJECTOR_FOLDER
    if not folder.is_dir():
        raise CheckpointError(
            f"{contents.path} has no projector",
            expected=f"{PROJECTOR_FOLDER}/{PROJECTOR_STEM}.bin, and best a config.json",
            fix="begin with a new one: unillava compose --vision … --language … "
            "--projector mlp2x_gelu",
        )
    projector = open_source(folder, options)
    source = compose(
        vision=contents.path / TOWER_FOLDER,
        language=contents.path / LANGUAGE_FOLDER,
        projector=folder,
        family="llava_next" if NEWLINE in projector.tensors else "llava",
        options=options,
    )
    return replace(source, path=contents.path)


def _open(contents: Contents, folder: str, part: str, options: Options) -> Source:
    source = open_source(contents.path / folder, options)
    if part not in source.parts:
        raise CheckpointError(
            f"{contents.path / folder} is not what its name says",
            given=f"dialect {source.dialect}",
            expected=f"the {part} part of a model",
        )
    kept = {name: t for name, t in source.tensors.items() if canonical.part_of(name) == part}
    return replace(source, tensors=kept)


def _check_family(contents: Contents) -> None:
    family = contents.config.get("model_type")
    if family not in TOP_DEFAULTS:
        raise CheckpointError(
            f"config.json of {contents.path} names no family",
            given=f"model_type {family!r}",
            expected=f"one of {', '.join(TOP_DEFAULTS)}",
        )


def _read_projector(
    contents: Contents, config: Config, options: Options
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Projector and newline; neither has a file where there are none (`identity`)."""
    folder = contents.path / PROJECTOR_FOLDER
    if not folder.is_dir():
        return {}, ()
    if canonical.projector_kind(config) != "identity":
        opened = open_source(folder, options)
        mine = [n for n in opened.tensors if n.startswith((PROJECTOR, NEWLINE))]
        return {name: opened.tensors[name] for name in mine}, opened.dropped
    for kind in files.FORMATS:
        stored = files.open_set(folder, kind, PROJECTOR_STEM)
        if stored is not None:
            return to_canonical(stored, _projector_table(config), options)
    return {}, ()


def _projector_table(config: Config) -> NameTable:
    """Canonical names <-> those that original LLaVA's stage 1 saves."""
    mpt_like = canonical.text_config(config)["model_type"] == "mpt"
    rules = mm_settings.rules(
        "transformer." if mpt_like else "model.", canonical.projector_kind(config)
    )
    return NameTable([one for one in rules if one.canonical[0].startswith((PROJECTOR, NEWLINE))])


def _there_and_back(config: Config) -> Config:
    """What a canonical configuration becomes when it is split and put together."""
    is_mpt = canonical.text_config(config)["model_type"] == "mpt"
    text = (mpt if is_mpt else language).there_and_back(language.partial_config(config))
    tower = clip.there_and_back(config)
    again = {
        **{key: value for key, value in config.items() if key not in NESTED},
        "text_config": text["text_config"],
        "vision_config": canonical.vision_config(tower),
    }
    return dict(sorted(again.items()))


# --- writing ---------------------------------------------------------------------------------


def _write(source: Source, options: Options) -> Target:
    lacking = sorted({"vision", "language"} - source.parts)
    if lacking:
        raise CheckpointError(
            f"{source.path} cannot be split", given=f"it has no {' and no '.join(lacking)} part"
        )
    kind = canonical.text_config(source.config)["model_type"]
    # The rows of the vocabulary stay as they are: splitting and joining changes nothing.
    memory = {name: kept for name, kept in source.memory.items() if name != vocabulary.MEMORY}
    whole = replace(source, vocabulary=None, memory=memory)
    targets = {
        TOWER_FOLDER: registry.named(clip.tower_of(source.config).name).write(whole, options),
        LANGUAGE_FOLDER: registry.named("mpt" if kind == "mpt" else "llama").write(
            language.alone(whole), options
        ),
    }
    weights, documents = [], {"config.json": as_json(_top(source.config))}
    documents |= {name: c for name, c in source.files.items() if name in PROCESSOR_FILES}
    for folder, target in targets.items():
        weights += [replace(file, name=f"{folder}/{file.name}") for file in target.weights]
        documents |= {f"{folder}/{name}": content for name, content in target.documents.items()}
    image_side = {
        name: t for name, t in source.tensors.items() if name.startswith((PROJECTOR, NEWLINE))
    }
    stored, _ = to_stored(image_side, _projector_table(source.config), options)
    if stored:
        projector, index = files.shards(
            stored,
            options.weights or "bin",
            options.max_shard_bytes,
            stem=PROJECTOR_STEM,
            folder=f"{PROJECTOR_FOLDER}/",
        )
        weights += projector
        documents |= index
    return Target("parts", tuple(weights), documents)


def _top(config: Config) -> Config:
    """What concerns the whole, complete."""
    whole = canonical.family(config)
    return {key: value for key, value in sorted(whole.items()) if key not in NESTED}


DIALECTS = (
    Dialect(
        "parts",
        "a model in parts: vision/, language/, projector/ (transformers' own classes load them)",
        _evidence,
        _read,
        _write,
    ),
)
