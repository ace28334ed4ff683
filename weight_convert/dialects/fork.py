"""LLaVA over other language models: what LLaVA-MOSS2 and LLaVA-Lightning-MPT have in common.

Both are forks of LLaVA that look at square pictures. The tensors of the image side stand below the
language model (`model.` or `transformer.`), the vision tower below that if it was saved at all;
config.json is the language model's with `mm_*` settings. A `Fork` says what distinguishes them.

Source: haotian-liu/LLaVA, llava/model/llava_arch.py, multimodal_projector/builder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from weight_convert import canonical, files
from weight_convert.canonical import HEAD, PARTS, VISION, Config
from weight_convert.contents import Contents
from weight_convert.dialects import clip, mm_settings, registry, towers
from weight_convert.dialects.assembly import Design, processor_files, whole_config
from weight_convert.dialects.base import Dialect, check_complete, to_canonical, to_stored
from weight_convert.dialects.configs import as_it_was, check_types, dtype_of, restored
from weight_convert.dialects.hf import SIDE_FILES, TOKENIZER_FILES
from weight_convert.dialects.language import CONFIG_KEYS, alone, partial_config
from weight_convert.dialects.vocabulary import grow, trim
from weight_convert.errors import CheckpointError
from weight_convert.mapping import NameTable, Rule
from weight_convert.opening import borrowed, open_source
from weight_convert.source import Content, Options, Source, Target, as_json, pick_files
from weight_convert.storage.tensor import Tensor


@dataclass(frozen=True)
class Fork:
    """One language model and the LLaVA over it."""

    name: str
    title: str
    whole: tuple[str, str]
    """Architecture and model_type with images."""
    alone: tuple[str, str]
    """Architecture and model_type of the language model on its own."""
    template: str
    """The conversation template that it was trained with."""
    prefix: str
    """Of the names of the image side."""
    embedding: tuple[str, str]
    """Canonical and stored name."""
    evidence: str
    """A stored name that no other layout has."""
    rules: Callable[[Config], list[Rule]]
    """text_config -> names of the language model."""
    canonical_text: Callable[[Config, str, str], Config]
    """(config.json, dtype, name of the file) -> canonical configuration of the language model."""
    stored_text: Callable[[Config], Config]
    """text_config -> its fields in config.json; refuses what the language model cannot be."""
    overlay: str | None = None
    """A file in the directory whose projector replaces that of the weights, if it is there."""

    def table(self, text: Config, projector: str | None) -> NameTable:
        """Canonical <-> stored names, with the image side if there is one."""
        images = mm_settings.rules(self.prefix, projector) if projector else []
        return NameTable([*self.rules(text), *images])

    def stored_config(self, config: Config, tower: str = towers.FOLDER) -> Config:
        """config.json, complete, for a canonical configuration: whole, or the language model's.

        Args:
            config: canonical.
            tower: the name of the vision tower.

        Raises:
            CheckpointError: something that this layout cannot hold.
        """
        whole = "model_type" in config
        architecture, model_type = self.whole if whole else self.alone
        stored = {
            **self.stored_text(canonical.text_config(config)),
            "architectures": [architecture],
            "model_type": model_type,
            "torch_dtype": canonical.stored_dtype(config),
            **(mm_settings.settings_of(config, tower) if whole else {}),
        }
        return dict(sorted(stored.items()))

    def canonical_config(self, config: Config, dtype: str, vision: Config | None) -> Config:
        """What reading a config.json gives, but for the ids of the media tokens.

        Args:
            config: as it is stored.
            dtype: if it states none.
            vision: canonical configuration with the tower; None: there are no images.
        """
        text = self.canonical_text(config, dtype_of(config, {}, dtype), "the manifest")
        if vision is None:
            return text
        projector = config.get("mm_projector_type", "linear")
        return whole_config(self.design(config, projector, "the manifest"), text, vision)

    def design(self, config: Config, projector: str, where: str) -> Design:
        """See `mm_settings.design_of`."""
        return replace(mm_settings.design_of(config, projector, where), template=self.template)


# --- reading ---------------------------------------------------------------------------------


def dialect(fork: Fork) -> Dialect:
    """The dialect of a fork."""
    return Dialect(
        fork.name,
        fork.title,
        lambda contents: f"a tensor {fork.evidence}" if fork.evidence in contents.tensors else "",
        lambda contents, options: _read(fork, contents, options),
        lambda source, options: _write(fork, source, options),
    )


def _read(fork: Fork, contents: Contents, options: Options) -> Source:
    stored = {**files.open_weights(contents.path), **_overlaid(fork, contents)}
    text, side, base = _language(fork, contents, stored, options)
    projector = mm_settings.projector_of(stored)
    names = fork.table(canonical.text_config(text), projector)
    tensors, dropped = to_canonical(stored, names, options)
    if canonical.text_config(text)["tie_word_embeddings"] and HEAD in tensors:
        tensors = _without_head(contents, tensors, fork.embedding[0])
    source = Source(fork.name, contents.path, text, tensors, side, dropped=dropped)
    memory: Config = {"config": contents.config} if contents.config else {}
    parts, keys = ("language",), CONFIG_KEYS
    if projector is not None:
        parts, keys = PARTS, None
        design = fork.design(contents.config, projector, str(contents.path))
        source, kept = with_images(source, contents, options, design, base)
        memory |= kept
    config = as_it_was(contents, source.config, lambda kept: there_and_back(fork, kept), keys)
    check_complete(source.tensors, config, parts, options)
    return replace(source, config=config, memory={**source.memory, fork.name: memory})


def _overlaid(fork: Fork, contents: Contents) -> dict[str, Tensor]:
    if contents.is_file or fork.overlay is None or fork.overlay not in contents.names:
        return {}
    tensors = files.open_file(contents.path / fork.overlay)
    return {name: tensor for name, tensor in tensors.items() if "mm_projector." in name}


def _language(
    fork: Fork, contents: Contents, stored: Mapping[str, Tensor], options: Options
) -> tuple[Config, dict[str, Content], Config]:
    """Canonical configuration of the language model, side files, and the base's configuration."""
    side = {} if contents.is_file else pick_files(contents.path, SIDE_FILES)
    base = contents.manifest.get("config") or {}
    if options.base is not None:
        opened = trim(open_source(options.base, Options(vision=options.vision)))
        base = opened.config
        side = {**{n: c for n, c in opened.files.items() if n in TOKENIZER_FILES}, **side}
    if contents.config:
        dtype = dtype_of(contents.config, stored)
        return fork.canonical_text(contents.config, dtype, str(contents.path)), side, base
    text = partial_config(borrowed(contents, options)[0] if options.base is None else base)
    rows = stored[fork.embedding[1]].shape[0] if fork.embedding[1] in stored else 0
    text["text_config"] = {**canonical.text_config(text), "vocab_size": rows}
    return text, side, base


def _without_head(
    contents: Contents, tensors: dict[str, Tensor], embedding: str
) -> dict[str, Tensor]:
    """Leave out a head that repeats the embedding."""
    one, other = tensors[HEAD], tensors.get(embedding)
    same = other is not None and (one.dtype, one.shape) == (other.dtype, other.shape)
    if same and not _one_place(one, other):
        same = np.array_equal(*(t.read().reshape(-1).view(np.uint8) for t in (one, other)))
    if not same:
        raise CheckpointError(
            f"{contents.path} has an output head of its own, and its configuration says that the "
            "embedding matrix is the head",
            given=f"{one.places[0].name} unlike {embedding}",
            fix=f"if it is not meant, leave it out: --allow-unused {one.places[0].name}",
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _one_place(one: Tensor, other: Tensor) -> bool:
    places = [[(place.path, place.offset) for place in t.places] for t in (one, other)]
    return places[0] == places[1]


# --- from the language model to the whole ----------------------------------------------------


def with_images(
    source: Source, contents: Contents, options: Options, design: Design, base: Config
) -> tuple[Source, Config]:
    """A whole LLaVA from its language model and projector: tower, processor files, media tokens.

    Args:
        source: the tensors that the file holds, and the language model's configuration.
        contents: the checkpoint.
        options: `vision` is a directory with the tower.
        design: from `mm_settings.design_of`.
        base: canonical configuration of the checkpoint that gives what this one lacks, or `{}`.

    Returns:
        The source, and for `Source.memory` what was not in the checkpoint: `made` (files) and
        `tower` (false if it was beside it).

    Raises:
        CheckpointError: the tower is nowhere, or of an unknown shape; a tokenizer that cannot be
            read.
    """
    inside = {name: t for name, t in source.tensors.items() if name.startswith(VISION)}
    described = base.get("vision_config")
    if inside and options.vision is None and described and isinstance(described, dict):
        tower = towers.Tower(_checked(described), 0)
    else:
        name = contents.config.get("mm_vision_tower")
        tower = towers.find_tower(contents, name, inside, options)
    config = whole_config(design, source.config, {"vision_config": tower.config})
    made = processor_files(config, clip.tower_processor(config, tower.processor))
    made = {name: content for name, content in made.items() if name not in source.files}
    whole = replace(
        source,
        config=config,
        tensors={**tower.tensors, **source.tensors},
        files={**made, **source.files},
        dropped=(*source.dropped, *tower.dropped),
        memory={**source.memory, **tower.memory},
    )
    return grow(whole), {"made": sorted(made), "tower": bool(inside)}


def _checked(vision: Config) -> Config:
    """A vision_config that a manifest or a base gives."""
    whole = canonical.vision_config({"vision_config": vision})
    check_types(whole, canonical.VISION_DEFAULTS[whole["model_type"]], "vision_config")
    return whole


# --- writing ---------------------------------------------------------------------------------


def _write(fork: Fork, source: Source, options: Options) -> Target:
    if "language" not in source.parts:
        raise CheckpointError(f"{source.path} has no language model to write")
    names, whole = tuple(source.tensors), "projector" in source.parts
    source = trim(source if whole else alone(source))
    config, memory = source.config, source.memory.get(fork.name, {})
    stored = _stored_config(fork, source, config, memory.get("config"))
    projector = canonical.projector_kind(config) if whole else None
    beside = memory.get("tower") is False
    inside = "vision" in options.parts and not beside
    held = {n: t for n, t in source.tensors.items() if inside or not n.startswith(VISION)}
    table = fork.table(canonical.text_config(config), projector)
    tensors, unused = to_stored(held, table, options)
    weights, index = files.shards(tensors, options.weights or "bin", options.max_shard_bytes)
    side = {n: c for n, c in source.files.items() if n not in memory.get("made", ())}
    tower = Target(fork.name, ())
    if "vision" in source.parts & options.parts:
        tower = _tower_folder(source, options, beside, stored["mm_vision_tower"])
    return Target(
        fork.name,
        (*weights, *tower.weights),
        {"config.json": as_json(stored), **side, **index, **tower.documents},
        left_out=tuple(n for n in names if n in unused or not (n in held or tower.weights)),
    )


def _tower_folder(source: Source, options: Options, beside: bool, name: str) -> Target:
    """A folder with the tower, if it was beside the model; with its settings, if it has no name."""
    config, tower = source.config, clip.tower_of(source.config).name
    if beside:
        written = registry.named(tower).write(source, options)
    elif name == towers.FOLDER:
        vision = canonical.vision_config(config)
        processor = clip.tower_processor(config, clip.image_processor(source))
        layers = vision["num_hidden_layers"]
        return Target(tower, (), towers.settings_files(vision, layers, processor, towers.FOLDER))
    else:
        return Target(tower, ())
    return Target(
        tower,
        tuple(replace(one, name=f"{towers.FOLDER}/{one.name}") for one in written.weights),
        {f"{towers.FOLDER}/{name}": document for name, document in written.documents.items()},
    )


def _stored_config(fork: Fork, source: Source, config: Config, kept: Config | None) -> Config:
    vision = canonical.vision_config(config)
    tower = towers.FOLDER
    if "vision" in source.parts:
        layers = vision["num_hidden_layers"]
        tower = towers.known_name(source.tensors, vision, layers) or towers.FOLDER
    now = fork.stored_config(config, tower)
    whole = "model_type" in config
    if not kept or whole != ("mm_vision_tower" in kept):
        return now
    before = fork.canonical_config(kept, now["torch_dtype"], config if whole else None)
    return restored(kept, fork.stored_config(before, tower), now)


def there_and_back(fork: Fork, config: Config) -> Config:
    """What a canonical configuration becomes when it is written and read."""
    vision = config if "model_type" in config else None
    return fork.canonical_config(fork.stored_config(config), "float32", vision)
