"""Original LLaVA: the directories of liuhaotian, lmms-lab, Open-LLaVA-NeXT and KoLLaVA.

`LlavaLlamaForCausalLM`, `LlavaMistralForCausalLM` and `LlavaQwenForCausalLM`, from LLaVA v0 (linear
projector, added `<im_start>` tokens) to LLaVA-NeXT-Video, as safetensors or pytorch_model.bin. The
language model has its own names; projector, newline and, if it was saved along, the vision tower
stand below `model.`. A tower that is not inside is looked for beside (`towers`).

Read, the checkpoint gets the tokens, rows and processor files of llava-hf's; written, they are
taken away again. The tower is written among the weights, as v1.6 has it; if the checkpoint once
was read with its tower beside (v1.5), into a folder `vision_tower`; not at all if `Options.parts`
leaves it out. A tower whose settings do not follow from its shapes also gets that folder, with
the settings alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from weight_convert import canonical, files
from weight_convert.canonical import (
    EMBEDDING,
    HEAD,
    LANGUAGE,
    NEWLINE,
    PARTS,
    PROJECTOR,
    VISION,
    Config,
)
from weight_convert.contents import Contents
from weight_convert.dialects import clip, language, mm_settings, registry
from weight_convert.dialects.assembly import processor_files
from weight_convert.dialects.base import (
    Dialect,
    check_complete,
    check_whole,
    to_canonical,
    to_stored,
)
from weight_convert.dialects.configs import as_it_was, dtype_of, restored
from weight_convert.dialects.delta import BASE_FILE
from weight_convert.dialects.hf import SIDE_FILES, without_repeated_head
from weight_convert.dialects.llava_config import (
    Facts,
    canonical_config,
    facts_of,
    stored_config,
    whole_layers,
)
from weight_convert.dialects.towers import (
    FOLDER,
    Tower,
    find_tower,
    known_name,
    settings_files,
)
from weight_convert.dialects.vocabulary import grow, token_ids, trim
from weight_convert.errors import CheckpointError
from weight_convert.mapping import NameTable, prefixed, rule
from weight_convert.opening import borrowed
from weight_convert.source import Content, Options, Source, Target, as_json
from weight_convert.storage.tensor import Tensor

NAME = "original"
QUERY = "model.layers.0.self_attn.q_proj.weight"
TOKEN_IDS = ("image_token_index", "video_token_index", "pad_token_id")
TEMPLATES = (
    ("[PAD]", None, "llava_v0"),
    ("<|start_header_id|>", None, "llava_llama_3"),
    ("<|im_start|>", "qwen2", "qwen_1_5"),
    ("<|im_start|>", None, "chatml_direct"),
    (None, "mistral", "mistral_instruct"),
    (None, None, "vicuna_v1"),
)
"""(a token of the tokenizer, kind of language model, template): the first row that fits. `[PAD]`
was added by the recipe v0 alone; the tokenizers' own chat templates know nothing of LLaVA's."""


CHAT_TEMPLATES = frozenset({"chat_template.json", "chat_template.jinja"})
FOLDER_NAME = re.compile(r"\w[\w.-]*")


@functools.cache
def table(projector: str) -> NameTable:
    """Canonical <-> stored names.

    Args:
        projector: identity, linear or mlp{N}x_gelu.
    """
    text = [rule(name, name) for name in language.NAMES]
    return NameTable([*prefixed(text, LANGUAGE, ""), *mm_settings.rules("model.", projector)])


# --- recognition -----------------------------------------------------------------------------


def _evidence(contents: Contents) -> str:
    if QUERY not in contents.tensors or BASE_FILE in contents.names:
        return ""
    projector = contents.first("model.mm_projector.")
    if projector:
        return f"tensors {QUERY} and {projector}"
    return "config.json: mm_vision_tower" if "mm_vision_tower" in contents.config else ""


# --- reading ---------------------------------------------------------------------------------


def _read(contents: Contents, options: Options) -> Source:
    stored = contents.tensors
    projector = mm_settings.projector_of(stored) or "identity"
    tensors, dropped = to_canonical(stored, table(projector), options)
    read = _read_described if contents.config else _read_bare
    source = read(contents, options, tensors)
    if canonical.text_config(source.config)["tie_word_embeddings"] and HEAD in tensors:
        source = replace(source, tensors=without_repeated_head(contents, dict(source.tensors)))
    source = grow(source)
    config = as_it_was(contents, source.config, lambda kept: _there_and_back(kept, source.config))
    check_complete(source.tensors, config, PARTS, options)
    return replace(source, config=config, dropped=(*dropped, *source.dropped))


def _read_described(contents: Contents, options: Options, tensors: Mapping[str, Tensor]) -> Source:
    """A directory with its config.json."""
    given = contents.config
    tower = find_tower(contents, given.get("mm_vision_tower"), _tower_in(tensors), options)
    side = contents.side_files(SIDE_FILES)
    config = canonical_config(given, _facts(contents, tensors, tower), str(contents.path))
    template = _template(config["text_config"]["model_type"], side)
    if template:
        config["unillava"] = {**config.get("unillava", {}), "template": template}
    made = _processor_files(config, tower)
    made = {name: content for name, content in made.items() if name not in side}
    memory: Config = {
        "config": given,
        "made": sorted(made),
        "weights": _format(contents),
        "tower": "beside" if tower.tensors else "inside",
        "folder": tower.folder,
        "repeats_head": HEAD in tensors and bool(config["tie_word_embeddings"]),
    }
    return Source(
        NAME,
        contents.path,
        config,
        {**tower.tensors, **tensors},
        {**side, **made},
        dropped=tower.dropped,
        notes=_notes(given),
        memory={**tower.memory, NAME: memory},
    )


def _facts(contents: Contents, tensors: Mapping[str, Tensor], tower: Tower) -> Facts:
    biases = (f"{PROJECTOR}linear_{n}.bias" for n in (1, 2))
    return Facts(
        vision=tower.config,
        projector=mm_settings.projector_of(contents.tensors) or "identity",
        projector_bias=any(name in tensors for name in biases),
        newline=NEWLINE in tensors,
        dtype=dtype_of(contents.config, {n: tensors[n] for n in (EMBEDDING,) if n in tensors}),
        tower_layers=tower.layers,
    )


def _processor_files(config: Config, tower: Tower) -> dict[str, bytes]:
    # Files of 2021 and 2022 give sizes as one number: that of the tower, which is filled in.
    sizes = [key for key in ("size", "crop_size") if type(tower.processor.get(key)) is int]
    stated = {key: value for key, value in tower.processor.items() if key not in sizes}
    return processor_files(config, clip.tower_processor(config, stated))


def _read_bare(contents: Contents, options: Options, tensors: Mapping[str, Tensor]) -> Source:
    """Weights alone, whose configuration and tokenizer another checkpoint gives."""
    config, side, vocabulary = borrowed(contents, options)
    base = trim(Source(NAME, contents.path, config, {}, side, vocabulary=vocabulary))
    stated = canonical.vision_config(config)
    tower = find_tower(contents, None, _tower_in(tensors), options, stated)
    return replace(
        base,
        config={**base.config, "vision_config": tower.config},
        tensors={**tower.tensors, **tensors},
        dropped=tower.dropped,
        memory=tower.memory,
    )


def _tower_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(VISION)}


def _format(contents: Contents) -> str:
    first = next(iter(contents.tensors.values()))
    return files.format_of(first.places[0].path)


def _template(kind: str, side: Mapping[str, Content]) -> str | None:
    """The template that a checkpoint was trained with, as far as its content tells.

    None if it brings a chat template for images, which goes before.
    """
    if CHAT_TEMPLATES & side.keys():
        return None
    tokens = token_ids(side)
    return next(
        template
        for token, wanted, template in TEMPLATES
        if (token is None or token in tokens) and wanted in (None, kind)
    )


def _notes(config: Config) -> tuple[str, ...]:
    if not config.get("mm_use_im_start_end"):
        return ()
    return (
        "the model was trained with <im_start> and <im_end> around each image; conversation "
        "templates do not write them by themselves",
    )


def _there_and_back(kept: Config, now: Config) -> Config:
    """What a canonical configuration becomes when it is written and read.

    Args:
        kept: the configuration.
        now: what was read: ids of tokens, and what is known of the tower, are as there.
    """
    stored = stored_config(kept, "", inside=True)
    read = canonical_config(stored, facts_of(kept), "the manifest")
    vision = {key: v for key, v in read["vision_config"].items() if key in now["vision_config"]}
    ids = {key: _token_id(kept, key, now[key]) for key in TOKEN_IDS if key in now}
    template = (now.get("unillava") or {}).get("template")
    own = {**read.get("unillava", {}), **({"template": template} if template else {})}
    return {**read, **ids, "vision_config": vision, **({"unillava": own} if own else {})}


def _token_id(config: Config, key: str, otherwise: int) -> int:
    """A token's id under either of its names."""
    alias = key.replace("_index", "_id")
    return config.get(key, config.get(alias, otherwise))


# --- writing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where the vision tower is written."""

    name: str
    """What `mm_vision_tower` says."""
    inside: bool
    beside: bool = False
    folder: str | None = None
    """A folder with the tower (if `beside`) or with its settings."""


def _write(source: Source, options: Options) -> Target:
    check_whole(source, {"projector", "language"}, "language model and projector")
    source = trim(source)
    kept = source.memory.get(NAME, {})
    place = _place(source, options, kept)
    tensors = {n: t for n, t in source.tensors.items() if place.inside or not n.startswith(VISION)}
    if kept.get("repeats_head") and HEAD not in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    names = table(canonical.projector_kind(source.config))
    stored, left_out = to_stored(tensors, names, options)
    kind = options.weights or kept.get("weights") or "safetensors"
    weights, index = files.shards(stored, kind, options.max_shard_bytes)
    side = {n: c for n, c in source.files.items() if n not in kept.get("made", ())}
    config = _config(source.config, kept, place)
    documents = {"config.json": as_json(config), **side, **index}
    tower = _tower_folder(source, options, place)
    if not (place.inside or place.beside):
        left_out += tuple(_tower_in(source.tensors))
    return Target(
        NAME, weights + tower.weights, {**documents, **tower.documents}, left_out=left_out
    )


def _place(source: Source, options: Options, kept: Config) -> _Place:
    vision, layers = canonical.vision_config(source.config), whole_layers(source.config)
    has_tower = "vision" in source.parts
    known = known_name(source.tensors, vision, layers) if has_tower else None
    if not has_tower or "vision" not in options.parts:
        named = known or kept.get("config", {}).get("mm_vision_tower")
        if not named:
            raise CheckpointError(
                "the vision tower is left out, and it is not one with a name",
                given=f"{vision['model_type']} of width {vision['hidden_size']}",
                fix="write it as well: leave --parts out",
            )
        return _Place(named, inside=False)
    folder = kept.get("folder", FOLDER)
    folder = folder if FOLDER_NAME.fullmatch(folder) else FOLDER
    if kept.get("tower") == "beside" and layers == vision["num_hidden_layers"]:
        return _Place(known or folder, inside=False, beside=True, folder=folder)
    return _Place(known or folder, inside=True, folder=None if known else folder)


def _tower_folder(source: Source, options: Options, place: _Place) -> Target:
    """The folder with the tower or its settings."""
    if place.folder is None:
        return Target(NAME, ())
    tower = clip.tower_of(source.config)
    if not place.beside:
        config, layers = canonical.vision_config(source.config), whole_layers(source.config)
        settings = clip.tower_processor(source.config, clip.image_processor(source))
        return Target(NAME, (), settings_files(config, layers, settings, place.folder))
    alone = replace(source, tensors=_tower_in(source.tensors))
    target = registry.named(tower.name).write(alone, options)
    return Target(
        NAME,
        tuple(replace(file, name=f"{place.folder}/{file.name}") for file in target.weights),
        {f"{place.folder}/{name}": content for name, content in target.documents.items()},
    )


def _config(config: Config, kept: Config, place: _Place) -> Config:
    """config.json as it was read, with what became different since."""
    now = stored_config(config, place.name, inside=place.inside)
    if "config" not in kept:
        return now
    facts = replace(facts_of(config), dtype=dtype_of(kept["config"], {}, now["torch_dtype"]))
    read = canonical_config(kept["config"], facts, "the manifest")
    before = stored_config(read, place.name, inside=kept.get("tower") == "inside")
    return dict(sorted(restored(kept["config"], before, now).items()))


DIALECTS = (
    Dialect(
        NAME,
        "original LLaVA, LLaVA-NeXT, -Video, Open-LLaVA-NeXT, KoLLaVA (safetensors or .bin)",
        _evidence,
        _read,
        _write,
    ),
)
