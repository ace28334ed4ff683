"""PaddleMIX's LLaVA: LlavaLlamaForCausalLM and LlavaQwenForCausalLM on Paddle.

PaddleNLP's language model with LLaVA's additions below it: projector, newline, and a vision tower
that is always saved along. CLIP has names of its own; SigLIP has Hugging Face's. All Linear
weights and the head are stored turned, [in, out]; embeddings, positions, the patch convolution
[O, I, H, W], norms and the newline are not.

config.json is LLaVA's with PaddleNLP's fields for the language model; `processor/train` and
`processor/eval` hold the image processor. Where `mm_patch_merge_type` is absent, the class says
spatial_unpad, so that models without tiles have an `image_newline` too, which nothing initialises
and nothing uses: it is left out, and a note says so.

Source: PaddleMIX 2.1 and 3.0, paddlemix/models/llava/{modeling,base_model,llava_arch,clip_model,
siglip_encoder,mm_projector,configuration}.py, paddlemix/auto/processing.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from weight_convert import canonical
from weight_convert.canonical import NEWLINE, PARTS, PROJECTOR, VISION, Config
from weight_convert.contents import Contents
from weight_convert.dialects import clip, paddlenlp
from weight_convert.dialects.assembly import processor_files
from weight_convert.dialects.base import (
    Dialect,
    check_complete,
    check_whole,
    to_canonical,
    to_stored,
)
from weight_convert.dialects.configs import as_it_was, dtype_of, restored
from weight_convert.dialects.llava_config import (
    Facts,
    canonical_config,
    facts_of,
    stored_config,
    whole_layers,
)
from weight_convert.dialects.mm_settings import TOWER, projector_of
from weight_convert.dialects.paddlenlp import (
    EMBEDDED,
    base_of,
    flat_from_text,
    for_whole,
    fused_forms,
    has_image_parts,
    kept_files_of,
    language_rules,
    open_paddle,
    read_document,
    side_files_of,
    stored_side_files,
    text_from_flat,
    weight_files,
    with_second_copy,
    without_second_copy,
)
from weight_convert.dialects.towers import FOLDER, find_tower, known_name, settings_files
from weight_convert.dialects.vocabulary import grow, trim
from weight_convert.errors import CheckpointError
from weight_convert.mapping import TRANSPOSE, NameTable, Rule, prefixed, rule
from weight_convert.opening import borrowed
from weight_convert.source import Content, Options, Source, Target, as_json, parse_json
from weight_convert.storage.tensor import Tensor

NAME = "paddlemix"
CLASSES = {
    "llama": ("LlavaLlamaForCausalLM", "llava"),
    "qwen2": ("LlavaQwenForCausalLM", "llava_qwen"),
}
"""Language model -> class and model_type."""
TEMPLATES = {"llama": "vicuna_v1", "qwen2": "qwen_1_5"}
"""What PaddleMIX trains with; its tokenizers' own templates know nothing of images."""
CLASS_DEFAULT_MERGE = "spatial_unpad"
PROCESSORS = ("processor/eval/preprocessor_config.json", "processor/train/preprocessor_config.json")

# --- names -----------------------------------------------------------------------------------

_BLOCK = "encoder.layers.{n}."
CLIP_RULES = [
    rule("embeddings.class_embedding", "class_embedding"),
    rule("embeddings.patch_embedding.weight", "conv1.weight"),
    rule("embeddings.position_embedding.weight", "positional_embedding.weight"),
    rule("pre_layrnorm.{p}", "ln_pre.{p}"),
    rule("post_layernorm.{p}", "ln_post.{p}"),
    *prefixed(
        [
            *(
                rule(f"self_attn.{part}_proj.{{p}}", f"self_attn.{part}_proj.{{p}}", TRANSPOSE)
                for part in ("q", "k", "v", "out")
            ),
            rule("mlp.fc1.{p}", "linear1.{p}", TRANSPOSE),
            rule("mlp.fc2.{p}", "linear2.{p}", TRANSPOSE),
            rule("layer_norm1.{p}", "norm1.{p}"),
            rule("layer_norm2.{p}", "norm2.{p}"),
        ],
        _BLOCK,
        "transformer.layers.{n}.",
    ),
]
SIGLIP_RULES = [
    *(
        rule(name, name)
        for name in (
            "embeddings.patch_embedding.{p}",
            "embeddings.position_embedding.weight",
            "post_layernorm.{p}",
            f"{_BLOCK}layer_norm1.{{p}}",
            f"{_BLOCK}layer_norm2.{{p}}",
        )
    ),
    *(
        rule(f"{_BLOCK}{name}.{{p}}", f"{_BLOCK}{name}.{{p}}", TRANSPOSE)
        for name in (*(f"self_attn.{c}_proj" for c in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    ),
]
"""Without the pooling head, which PaddleMIX takes off."""
TOWER_RULES = {"clip_vision_model": CLIP_RULES, "siglip_vision_model": SIGLIP_RULES}
SIGLIP_HEAD = f"{VISION}head."
CLIP_EPS = 1e-5
"""What PaddleNLP's CLIP computes with, whatever its configuration says."""


def image_rules(base: str, tower: str, projector: str) -> list[Rule]:
    """Projector, newline and vision tower.

    Args:
        base: the language model, which all names begin with.
        tower: a key of TOWER_RULES.
        projector: identity, linear or mlp{N}x_gelu.
    """
    depth = canonical.projector_depth({"unillava": {"projector": projector}})
    places = [""] if projector == "linear" else [f"{2 * n}." for n in range(depth)]
    return [
        *(
            rule(f"{PROJECTOR}linear_{n}.{{p}}", f"{base}.mm_projector.{place}{{p}}", TRANSPOSE)
            for n, place in enumerate(places, 1)
        ),
        rule(NEWLINE, f"{base}.{NEWLINE}"),
        *prefixed(TOWER_RULES[tower], VISION, f"{base}.{TOWER}"),
    ]


def tower_of(names: Collection[str], base: str) -> str:
    """Which of TOWER_RULES stored names are written by."""
    return f"{'clip' if f'{base}.{TOWER}class_embedding' in names else 'siglip'}_vision_model"


# --- recognition -----------------------------------------------------------------------------


def _evidence(contents: Contents) -> str:
    names = open_paddle(contents)
    base = base_of(names)
    if not base or not has_image_parts(names, base):
        return ""
    return f"a tensor {base}.{EMBEDDED}, and a vision tower or projector below {base}"


# --- configuration ---------------------------------------------------------------------------

_IMAGE_FIELDS = ("mm_", "image_", "tokenizer_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "use_mm_")
"""How the fields begin that PaddleMIX has from original LLaVA."""
_OWN_FIELDS: Config = {
    "mm_dense_connector_type": "none",
    "pretrain_mm_mlp_adapter": None,
    "pretraining_tp": 1,
}
"""Fields that PaddleMIX reads, some without a default, and original LLaVA does not have."""


def original_config(flat: Config, base: str, where: str) -> Config:
    """config.json as original LLaVA would have it.

    Args:
        flat: as PaddleMIX has it.
        base: a key of CLASSES.
        where: names the file in errors.

    Raises:
        CheckpointError: a field that cannot be, or asks for what is not supported.
    """
    dense = flat.get("mm_dense_connector_type")
    if dense not in (None, "none"):
        raise CheckpointError(
            f"config.json of {where} asks for a dense connector, which is not supported",
            given=f"mm_dense_connector_type {dense!r}",
        )
    merge = flat.get("mm_patch_merge_type", CLASS_DEFAULT_MERGE) if _has_tiles(flat) else "flat"
    text = text_from_flat(flat, base, f"config.json of {where}")
    return {**flat, **text, "mm_patch_merge_type": merge}


def _has_tiles(flat: Config) -> bool:
    return "anyres" in str(flat.get("image_aspect_ratio"))


def paddle_config(config: Config, tower: str) -> tuple[str, Config]:
    """The base (a key of CLASSES), and PaddleMIX's config.json, complete.

    Args:
        config: canonical, without tokens that were added for the canonical layout.
        tower: what `mm_vision_tower` shall name.

    Raises:
        CheckpointError: PaddleMIX cannot be this model.
    """
    base, flat = flat_from_text(config)
    if config["model_type"] == "llava_next_video":
        raise _not_held(config["model_type"], "llava or llava_next: PaddleMIX has no video")
    if base == "llama" and flat["tie_word_embeddings"]:
        raise _not_held("a head that is the embedding", "a head of its own")
    vision = canonical.vision_config(config)
    if vision["model_type"] == "clip_vision_model" and vision["layer_norm_eps"] != CLIP_EPS:
        raise _not_held(f"CLIP's layer_norm_eps {vision['layer_norm_eps']}", str(CLIP_EPS))
    original = stored_config(config, tower, inside=True)
    fields = {key: value for key, value in original.items() if key.startswith(_IMAGE_FIELDS)}
    architecture, model_type = CLASSES[base]
    named = {"architectures": [architecture], "model_type": model_type}
    return base, dict(sorted({**flat, **_OWN_FIELDS, **fields, **named}.items()))


def _not_held(given: str, expected: str) -> CheckpointError:
    return CheckpointError("PaddleMIX has no LLaVA like this", given=given, expected=expected)


def _kept_config(flat: Config, config: Config) -> Config:
    """The canonical configuration that a config.json says which was read once.

    Args:
        flat: that config.json.
        config: today's canonical configuration of the same tensors.
    """
    base, now = paddle_config(config, "")
    facts = replace(facts_of(config), dtype=dtype_of(flat, {}, now["dtype"]))
    return canonical_config(original_config(flat, base, "the manifest"), facts, "the manifest")


def _there_and_back(kept: Config, now: Config) -> Config:
    """What a canonical configuration becomes when it is written and read.

    Args:
        kept: the configuration.
        now: what was read: ids of tokens, template and fields of the tower are as there.
    """
    base, flat = paddle_config(kept, "")
    read = canonical_config(
        original_config(flat, base, "the manifest"), facts_of(kept), "the manifest"
    )
    vision = {key: v for key, v in read["vision_config"].items() if key in now["vision_config"]}
    ids = {key: kept.get(key, kept.get(alias, now[key])) for key, alias in _IDS.items()}
    own = {**read.get("unillava", {}), **_template_of(now)}
    return {**read, **ids, "vision_config": vision, **({"unillava": own} if own else {})}


_IDS = {"image_token_index": "image_token_id", "pad_token_id": "pad_token_id"}


def _template_of(config: Config) -> Config:
    own = config.get("unillava") or {}
    return {"template": own["template"]} if "template" in own else {}


# --- reading ---------------------------------------------------------------------------------


def _read(contents: Contents, options: Options) -> Source:
    stored = open_paddle(contents)
    base = base_of(stored)
    source = (_read_described if contents.config else _read_bare)(contents, options, stored, base)
    source = grow(source)
    config = as_it_was(contents, source.config, lambda kept: _there_and_back(kept, source.config))
    check_complete(source.tensors, config, PARTS, options)
    return replace(source, config=config)


def _read_described(
    contents: Contents, options: Options, stored: Mapping[str, Tensor], base: str
) -> Source:
    """A directory with its config.json."""
    flat, where = contents.config, str(contents.path)
    original = original_config(flat, base, where)
    newline = "unpad" in str(original["mm_patch_merge_type"])
    text = canonical.text_config({"text_config": text_from_flat(flat, base, where)})
    source = _with_tensors(contents, options, stored, base, text, newline)
    tower = find_tower(contents, flat.get("mm_vision_tower"), _tower_in(source.tensors), options)
    tensors = {**tower.tensors, **source.tensors}
    facts = Facts(
        vision=tower.config,
        projector=projector_of(stored) or "identity",
        projector_bias=any(n.startswith(PROJECTOR) and n.endswith("bias") for n in tensors),
        newline=newline,
        dtype=dtype_of(flat, {f"{base}.{EMBEDDED}": stored[f"{base}.{EMBEDDED}"]}),
        tower_layers=tower.layers,
    )
    config, side = canonical_config(original, facts, where), side_files_of(contents)
    if not {"chat_template.json", "chat_template.jinja"} & side.keys():
        config["unillava"] = {**config.get("unillava", {}), "template": TEMPLATES[base]}
    processor = _processor_of(contents) or tower.processor
    made = processor_files(config, clip.tower_processor(config, processor))
    made = {name: content for name, content in made.items() if name not in side}
    memory: Config = {
        "config": flat,
        "files": {**kept_files_of(contents), **_processors_of(contents)},
        "made": sorted(made),
        "weights": paddlenlp.format_of(stored),
    }
    return replace(
        source,
        config=config,
        tensors=tensors,
        files={**side, **made},
        dropped=(*source.dropped, *tower.dropped),
        memory={**tower.memory, NAME: memory},
    )


def _read_bare(
    contents: Contents, options: Options, stored: Mapping[str, Tensor], base: str
) -> Source:
    """Weights alone, whose configuration and tokenizer another checkpoint gives."""
    config, side, vocabulary = borrowed(contents, options)
    lent = trim(Source(NAME, contents.path, config, {}, side, vocabulary=vocabulary))
    text, newline = canonical.text_config(config), canonical.has_newline(config)
    source = _with_tensors(contents, options, stored, base, text, newline)
    return replace(source, config=lent.config, files=lent.files, memory=lent.memory)


def _with_tensors(
    contents: Contents,
    options: Options,
    stored: Mapping[str, Tensor],
    base: str,
    text: Config,
    newline: bool,
) -> Source:
    """The canonical tensors; what a tower or a tied head repeats is left out, and said to be."""
    stored, copy = without_second_copy(stored, text, base)
    unused = () if newline else tuple(stored.keys() & {f"{base}.{NEWLINE}"})
    projector = projector_of(stored) or "identity"
    rules = language_rules(text, base, *fused_forms(stored))
    table = NameTable([*rules, *image_rules(base, tower_of(stored, base), projector)])
    used = {name: tensor for name, tensor in stored.items() if name not in unused}
    tensors, dropped = to_canonical(used, table, options)
    note = f"{base}.{NEWLINE} was left out: PaddleMIX makes it unless told not to, and does not use"
    return Source(
        NAME,
        contents.path,
        {},
        tensors,
        dropped=(*copy, *unused, *dropped),
        notes=(f"{note} it for pictures of one tile",) if unused else (),
    )


def _tower_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(VISION)}


def _processors_of(contents: Contents) -> dict[str, str]:
    """The image processor's files as they are."""
    paths = {name: contents.path / name for name in PROCESSORS}
    return {name: read_document(path) for name, path in paths.items() if path.is_file()}


def _processor_of(contents: Contents) -> Config:
    """The image processor's settings; `{}` if there are none. Sizes are objects."""
    texts = _processors_of(contents)
    name = next(iter(texts), "")
    settings = parse_json(texts[name].encode(), name) if name else {}
    if type(settings.get("size")) is int:
        settings["size"] = {"shortest_edge": settings["size"]}
    if type(settings.get("crop_size")) is int:
        settings["crop_size"] = dict.fromkeys(("height", "width"), settings["crop_size"])
    return settings


# --- writing ---------------------------------------------------------------------------------


def _write(source: Source, options: Options) -> Target:
    check_whole(
        source, {"vision", "projector", "language"}, "vision tower, projector and language model"
    )
    source = trim(source)
    config, kept = source.config, source.memory.get(NAME, {})
    text, vision = canonical.text_config(config), canonical.vision_config(config)
    known = known_name(source.tensors, vision, whole_layers(config))
    base, flat = paddle_config(config, known or FOLDER)
    names = image_rules(base, vision["model_type"], canonical.projector_kind(config))
    table = NameTable([*language_rules(text, base, False, False), *names])
    stored, left_out = to_stored(
        source.tensors, table, options, unheld=lambda name: name.startswith(SIGLIP_HEAD)
    )
    stored = with_second_copy(stored, text, base)
    weights, index = weight_files(stored, options, kept.get("weights"))
    documents = {**_documents(source, flat, kept), **index}
    if not known:
        settings = clip.tower_processor(config, clip.image_processor(source))
        documents |= settings_files(vision, whole_layers(config), settings, FOLDER)
    return Target(NAME, weights, documents, left_out=left_out)


def _documents(source: Source, now: Config, kept: Config) -> dict[str, Content]:
    """All small files but those of the tower.

    Args:
        source: what is written, trimmed.
        now: config.json written anew.
        kept: what was remembered when the source was read from this layout, or `{}`.
    """
    was = source.config
    if kept:
        was = _kept_config(kept["config"], source.config)
        before = paddle_config(was, now["mm_vision_tower"])[1]
        now = for_whole(restored(kept["config"], before, now), now["dtype"])
    side = {n: c for n, c in source.files.items() if n not in kept.get("made", ())}
    return {
        "config.json": as_json(dict(sorted(now.items()))),
        **stored_side_files(side),
        **_stored_files(source, was, kept.get("files", {})),
    }


def _stored_files(source: Source, was: Config, kept: Mapping[str, str]) -> dict[str, Content]:
    """The image processor's files, and what llava-hf has no place for.

    Args:
        source: what is written.
        was: the canonical configuration with which `kept` was read.
        kept: file -> text; it stays the same if it says the same.
    """
    texts = dict(kept)
    now = _stored_processor(source.config, clip.image_processor(source))
    for name in PROCESSORS:
        before = parse_json(kept[name].encode(), name) if name in kept else {}
        if not before or _stored_processor(was, before) != now:
            texts[name] = as_json(now).decode()
    return {name: text.encode() for name, text in texts.items()}


def _stored_processor(config: Config, given: Config) -> Config:
    """preprocessor_config.json; of tiles it says their sizes as (width, height)."""
    settings = clip.tower_processor(config, given)
    if config["model_type"] == "llava":
        return settings
    pairs = canonical.family(config)["image_grid_pinpoints"]
    return settings | {"image_grid_pinpoints": [[width, height] for height, width in pairs]}


PADDLEMIX = Dialect(
    NAME,
    "PaddleMIX LLaVA (pdparams or safetensors, whole, in shards or by tensor-parallel rank)",
    _evidence,
    _read,
    _write,
)
DIALECTS = (PADDLEMIX,)
