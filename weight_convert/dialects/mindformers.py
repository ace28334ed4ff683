"""MindFormers: LLaVA, LLaVA-NeXT and LLaVA-NeXT-Video, its LLaMA, and CLIP's tower in its names.

Names differ throughout; matrices lie as in PyTorch. In the vision tower q, k and v are one tensor,
one after the other. A LLaMA prepared for inference (`qkv_concat`) has two more fused tensors per
layer: `w_qkv`, grouped by key/value head, and `w_gate_hidden`, in which the rows of gate and up
projection alternate. Older versions of MindFormers concatenated both plainly; no file says which
form it has, so the older one is a dialect of its own, which must be named.

A model that MindFormers has trained lacks the vision blocks behind the one whose output it uses:
23 of 24. They are not missed: the configuration is read as that of a tower of 23 blocks, whose
last output is used. What is written here always has all blocks.

Source: MindFormers r1.3 to r1.5, research/llava*/convert_weight.py, models/llama and models/clip
(convert_weight.py), utils/convert_utils.py (the fused form), models/llama/llama.py (fusing while
loading, biases included).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from weight_convert import canonical
from weight_convert.canonical import (
    HEAD,
    LANGUAGE,
    NEWLINE,
    PARTS,
    PROJECTOR,
    VISION,
    Config,
    part_of,
)
from weight_convert.contents import Contents
from weight_convert.dialects import clip, hf, language, mindspore, yaml_file
from weight_convert.dialects import mindformers_config as settings
from weight_convert.dialects.assembly import processor_files
from weight_convert.dialects.base import Dialect, check_complete, to_canonical, to_stored
from weight_convert.dialects.configs import as_it_was, dtype_of, restored
from weight_convert.dialects.vocabulary import token_ids
from weight_convert.errors import CheckpointError
from weight_convert.mapping import (
    NameTable,
    Op,
    Rule,
    derive,
    grouped_qkv,
    interleaved,
    joined,
    prefixed,
    rule,
)
from weight_convert.opening import open_source
from weight_convert.source import (
    Content,
    Options,
    Source,
    Target,
    Vocabulary,
    as_json,
    describe_parts,
    pick_files,
)
from weight_convert.storage.tensor import Tensor, few

# --- names -----------------------------------------------------------------------------------

_TOWER = (
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.weight", "conv1.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("pre_layrnorm.weight", "ln_pre.gamma"),
    ("pre_layrnorm.bias", "ln_pre.beta"),
    ("post_layernorm.weight", "ln_post.gamma"),
    ("post_layernorm.bias", "ln_post.beta"),
)
_BLOCK, _RESBLOCK = "encoder.layers.{n}.", "transformer.resblocks.{n}."
_TOWER_BLOCK = (
    ("layer_norm1.weight", "ln_1.gamma"),
    ("layer_norm1.bias", "ln_1.beta"),
    ("layer_norm2.weight", "ln_2.gamma"),
    ("layer_norm2.bias", "ln_2.beta"),
    ("self_attn.out_proj.{p}", "attn.out_proj.{p}"),
    ("mlp.fc1.{p}", "mlp.c_fc.{p}"),
    ("mlp.fc2.{p}", "mlp.c_proj.{p}"),
)
_TOWER_QKV = ("self_attn.q_proj.{p}", "self_attn.k_proj.{p}", "self_attn.v_proj.{p}")
_PROJECTOR = (("linear_1.{p}", "adapter.adapter.{p}"), ("linear_2.{p}", "adapter.adapter_2.{p}"))
_EMBEDDING = "model.tok_embeddings.embedding_weight"
_LLAMA = (
    ("model.embed_tokens.weight", _EMBEDDING),
    ("model.norm.weight", "model.norm_out.weight"),
    ("lm_head.weight", "lm_head.weight"),
)
_LAYER = "model.layers.{n}."
_LLAMA_LAYER = (
    ("self_attn.o_proj.{p}", "attention.wo.{p}"),
    ("mlp.down_proj.{p}", "feed_forward.w2.{p}"),
    ("input_layernorm.weight", "attention_norm.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
)
_LLAMA_QKV = (
    ("self_attn.q_proj.{p}", "attention.wq.{p}"),
    ("self_attn.k_proj.{p}", "attention.wk.{p}"),
    ("self_attn.v_proj.{p}", "attention.wv.{p}"),
)
_LLAMA_FFN = (
    ("mlp.gate_proj.{p}", "feed_forward.w1.{p}"),
    ("mlp.up_proj.{p}", "feed_forward.w3.{p}"),
)
_FUSED_QKV, _FUSED_FFN = "attention.w_qkv.{p}", "feed_forward.w_gate_hidden.{p}"
_VISION_BLOCK = re.compile(re.escape(VISION) + r"encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class _Layout:
    """What distinguishes one of the dialects from another."""

    name: str
    title: str
    parts: frozenset[str]
    """Those that it can hold."""
    vision: str = "vision_encoder."
    language: str = LANGUAGE
    """Prefixes of the tower and of the language model."""
    signs: tuple[str, ...] = ()
    """Any of these tensors is enough to recognise it; without any, it must be named."""
    fuses: bool = False
    """Whether `qkv_concat` is written; it is read in any case."""
    plain: bool = False
    """Whether fused tensors are plain concatenations."""
    whole_name: str = ""
    """Of the files, if it is not the model's family."""


LLAVA = _Layout(
    "mindformers",
    "MindFormers LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video (.ckpt or safetensors; also partial files)",
    frozenset(PARTS),
    signs=(
        "vision_encoder.conv1.weight",
        "adapter.adapter.weight",
        f"{LANGUAGE}{_EMBEDDING}",
    ),
)
LLAMA = _Layout(
    "mindformers-llama",
    "MindFormers LLaMA (plain; or qkv_concat, grouped by key/value head)",
    frozenset({"language"}),
    language="",
    signs=(_EMBEDDING,),
    fuses=True,
    whole_name="llama",
)
LLAMA_PLAIN = _Layout(
    "mindformers-llama-plain",
    "MindFormers LLaMA of older versions (qkv_concat one after the other; must be named: --from)",
    frozenset({"language"}),
    language="",
    fuses=True,
    plain=True,
    whole_name="llama",
)
CLIP = _Layout(
    "mindformers-clip",
    "MindFormers CLIP (the tower; its text side is left out)",
    frozenset({"vision"}),
    vision="visual.",
    signs=("visual.ln_pre.gamma",),
    whole_name="clip",
)
CLIP_TEXT_SIDE = re.compile(
    r"visual\.proj$|(transformer\.resblocks|token_embedding|ln_final)\.|"
    r"(positional_embedding|text_projection|logit_scale)$"
)
"""What MindFormers' CLIP has besides the tower."""


@functools.lru_cache(maxsize=32)
def table(layout: _Layout, qkv: bool, ffn: bool, heads: int, kv_heads: int) -> NameTable:
    """Canonical <-> stored names.

    Args:
        layout: LLAVA, LLAMA, LLAMA_PLAIN or CLIP.
        qkv, ffn: whether q, k, v and the feed-forward inputs of the language model are fused.
        heads, kv_heads: of the language model, for fused tensors.
    """
    rules: list[Rule] = []
    if "vision" in layout.parts:
        block = [rule(_TOWER_QKV, "attn.in_proj.{p}", joined(3)), *_renamed(_TOWER_BLOCK)]
        tower = [*_renamed(_TOWER), *prefixed(block, _BLOCK, _RESBLOCK)]
        rules += prefixed(tower, VISION, layout.vision)
    if "projector" in layout.parts:
        rules += prefixed(_renamed(_PROJECTOR), PROJECTOR, "")
    if "newline" in layout.parts:
        rules.append(rule(NEWLINE, NEWLINE))
    if "language" in layout.parts:
        shares = (heads, kv_heads, kv_heads)
        join_qkv = concatenated(shares) if layout.plain else grouped_qkv(heads, kv_heads)
        join_ffn = joined(2) if layout.plain else interleaved(2)
        layer = [
            *_renamed(_LLAMA_LAYER),
            *(_fusing(_LLAMA_QKV, _FUSED_QKV, join_qkv) if qkv else _renamed(_LLAMA_QKV)),
            *(_fusing(_LLAMA_FFN, _FUSED_FFN, join_ffn) if ffn else _renamed(_LLAMA_FFN)),
        ]
        llama = [*_renamed(_LLAMA), *prefixed(layer, _LAYER, _LAYER)]
        rules += prefixed(llama, LANGUAGE, layout.language)
    return NameTable(rules)


def concatenated(shares: Sequence[int]) -> Op:
    """Tensors of unlike lengths <-> one, in which they lie one after the other.

    Args:
        shares: how their rows relate; for q, k and v the heads of each.
    """

    def join(tensors: Sequence[Tensor]) -> list[Tensor]:
        rows = _rows(sum(tensor.shape[0] for tensor in tensors), tensors[0])
        if [tensor.shape[0] for tensor in tensors] != [end - begin for begin, end in rows]:
            raise _unlike(tensors, shares)
        shape = (rows[-1][1], *tensors[0].shape[1:])
        return [derive(tensors, shape, lambda *arrays: np.concatenate(arrays), "concatenate")]

    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        return [
            derive(
                [whole],
                (end - begin, *whole.shape[1:]),
                lambda array, begin=begin, end=end: array[begin:end],
                f"part {k}",
            )
            for k, (begin, end) in enumerate(_rows(whole.shape[0], whole), 1)
        ]

    def _rows(total: int, tensor: Tensor) -> list[tuple[int, int]]:
        size, rest = divmod(total, sum(shares))
        if rest:
            raise _unlike([tensor], shares)
        ends = [size * end for end in itertools.accumulate(shares)]
        return list(zip([0, *ends], ends, strict=False))

    return Op(join, cut)


def _unlike(tensors: Sequence[Tensor], shares: Sequence[int]) -> CheckpointError:
    return CheckpointError(
        "a fused tensor cannot have these rows",
        given=", ".join(f"{t.places[0].name} {list(t.shape)}" for t in tensors),
        expected=f"rows in the ratio {' : '.join(map(str, shares))}",
    )


def _renamed(pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    return [rule(ours, theirs) for ours, theirs in pairs]


def _fusing(pairs: Iterable[tuple[str, str]], fused: str, op: Op) -> list[Rule]:
    return [rule([ours for ours, _ in pairs], fused, op)]


def _table_for(layout: _Layout, config: Config, qkv: bool, ffn: bool) -> NameTable:
    if not qkv:
        return table(layout, qkv, ffn, 1, 1)
    text = canonical.text_config(config)
    return table(layout, qkv, ffn, text["num_attention_heads"], text["num_key_value_heads"])


def _fused(stored: Iterable[str]) -> tuple[bool, bool]:
    """Whether q, k, v and the feed-forward inputs are fused."""
    names = list(stored)
    qkv, ffn = (form.removesuffix("{p}") for form in (_FUSED_QKV, _FUSED_FFN))
    return any(qkv in name for name in names), any(ffn in name for name in names)


# --- recognition -----------------------------------------------------------------------------


def _evidence(layout: _Layout, contents: Contents) -> str:
    names = mindspore.stored_names(contents) if layout.signs else ()
    sign = next((name for name in layout.signs if name in names), "")
    return f"a tensor {sign}" if sign else ""


# --- configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Described:
    """What is said about weights, by whatever says it."""

    config: Config
    files: Mapping[str, Content]
    vocabulary: Vocabulary | None = None
    yaml: Config | None = None
    """name, text and document of the YAML file, if the configuration is from one."""


def _describe(contents: Contents, options: Options, dtype: str) -> _Described:
    """The configuration from a YAML file, a config.json, a base or a manifest: the first there is.

    Args:
        contents: the checkpoint.
        options: `base` may be a YAML file of MindFormers, which then counts.
        dtype: of the weights, which no YAML file says.
    """
    yaml = _find_yaml(contents, options)
    if yaml is None:
        return _Described(*mindspore.described(contents, options))
    config = settings.read_document(yaml["document"], dtype, yaml["name"])
    files = {} if contents.is_file else pick_files(contents.path, hf.SIDE_FILES)
    if options.base is None or options.base.suffix in YAML_SUFFIXES:
        return _Described(config, files, yaml=yaml)
    base = open_source(options.base, replace(options, base=None))
    return _Described(config, {**base.files, **files}, base.vocabulary, yaml)


YAML_SUFFIXES = (".yaml", ".yml")


def _find_yaml(contents: Contents, options: Options) -> Config | None:
    """MindFormers' YAML file: the one that is named, or the only one in the directory."""
    if options.base is not None and options.base.suffix in YAML_SUFFIXES:
        return _open_yaml(options.base, required=True)
    if contents.is_file or not (yaml_file.can_parse() or _nothing_else(contents, options)):
        return None
    paths = [path for path in sorted(contents.path.iterdir()) if path.suffix in YAML_SUFFIXES]
    found = [yaml for yaml in map(_open_yaml, paths) if yaml]
    if len(found) > 1:
        raise CheckpointError(
            f"{contents.path} has several YAML files of MindFormers; which one is meant?",
            given=few(yaml["name"] for yaml in found),
            fix="name it: --base FILE.yaml",
        )
    return found[0] if found else None


def _nothing_else(contents: Contents, options: Options) -> bool:
    return not (options.base or contents.config or contents.manifest.get("config"))


def _open_yaml(path: Path, required: bool = False) -> Config | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read", given=error) from None
    document = yaml_file.parse(text, str(path))
    if settings.describes_a_model(document):
        return {"name": path.name, "text": text, "document": document}
    if not required:
        return None
    raise CheckpointError(
        f"{path} describes no model of MindFormers that is known",
        expected=f"model.model_config.type: {' or '.join(settings.KINDS)}",
    )


def _fitted(config: Config, tensors: Collection[str], files: Mapping[str, Content]) -> Config:
    """The configuration with what only the weights and the tokenizer tell.

    Args:
        config: canonical, whole or partial.
        tensors: canonical names.
        files: of the tokenizer.
    """
    if "model_type" not in config:
        return config
    config = _with_newline(_with_blocks(config, tensors), tensors)
    return config if "image_token_index" in config else _with_tokens(config, files)


def _with_blocks(config: Config, tensors: Collection[str]) -> Config:
    """A tower that ends with the block whose output is used, if MindFormers left out the rest."""
    blocks = {match[1] for name in tensors if (match := _VISION_BLOCK.match(name))}
    layer, depth = config.get("vision_feature_layer", -2), 0
    if type(layer) is int and layer < -1:
        vision = canonical.vision_config(config)
        depth = vision["num_hidden_layers"] + layer + 1
    if not blocks or len(blocks) != depth:
        return config
    vision = {**config.get("vision_config", vision), "num_hidden_layers": depth}
    return config | {"vision_config": vision, "vision_feature_layer": -1}


def _with_newline(config: Config, tensors: Collection[str]) -> Config:
    """MindFormers' video model has no newline, unless its weights were converted to it."""
    own = config.get("unillava") or {}
    optional = config["model_type"] == "llava_next_video" or own.get("image_newline") is False
    if not optional or canonical.has_newline(config) == (NEWLINE in tensors):
        return config
    without = {"image_newline": False, "unpad": False}
    own = {key: value for key, value in own.items() if key not in without}
    own |= {} if NEWLINE in tensors else without
    rest = {key: value for key, value in config.items() if key != "unillava"}
    return rest | ({"unillava": own} if own else {})


def _with_tokens(config: Config, files: Mapping[str, Content]) -> Config:
    """Ids of the media tokens: the tokenizer's, or those of the hub's checkpoints."""
    ids, defaults = token_ids(files), canonical.TOP_DEFAULTS[config["model_type"]]
    media = {
        f"{kind}_token_index": ids.get(f"<{kind}>", defaults[f"{kind}_token_index"])
        for kind in ("image", "video")
        if f"{kind}_token_index" in defaults
    }
    pad = ids.get("<pad>", config["text_config"].get("pad_token_id"))
    return dict(sorted((config | media | {"pad_token_id": pad}).items()))


# --- reading ---------------------------------------------------------------------------------


def _read(layout: _Layout, contents: Contents, options: Options) -> Source:
    stored = mindspore.stored_tensors(contents, options)
    weights = {name: t for name, t in stored.items() if not _is_ignored(layout, name)}
    described = _describe(contents, options, dtype_of({}, weights))
    config, fused = described.config, _fused(weights)
    tensors, dropped = _canonical_tensors(layout, stored, config, options)
    if canonical.text_config(config).get("tie_word_embeddings") and HEAD in tensors:
        tensors = hf.without_repeated_head(contents, tensors)
    parts = mindspore.wanted_parts(tensors) & layout.parts
    config = _fitted(mindspore.config_of_parts(config, parts), tensors, described.files)
    source = Source(
        layout.name,
        contents.path,
        config,
        tensors,
        described.files,
        described.vocabulary,
        dropped=dropped,
    )
    if described.yaml:
        memory = {**described.yaml, "config": config, "fused": any(fused)}
        config = _as_it_was(layout, contents, source, parts)
        source = replace(source, config=config, memory={layout.name: memory})
    check_complete(tensors, config, parts, options)
    return _with_processor(source) if described.yaml else source


def _canonical_tensors(
    layout: _Layout, stored: Mapping[str, Tensor], config: Config, options: Options
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    return to_canonical(
        stored,
        _table_for(layout, config, *_fused(stored)),
        options,
        ignored=lambda name: _is_ignored(layout, name),
    )


def _is_ignored(layout: _Layout, name: str) -> bool:
    return mindspore.is_state(name) or (layout is CLIP and CLIP_TEXT_SIDE.match(name) is not None)


def _as_it_was(
    layout: _Layout, contents: Contents, source: Source, parts: Collection[str]
) -> Config:
    """The canonical configuration that the YAML file was written from, if a manifest has it."""

    def there_and_back(config: Config) -> Config:
        settings.check_held(config, parts)
        document = _document(layout, config, parts, False)
        config = settings.read_document(document, canonical.stored_dtype(config), "the manifest")
        config = mindspore.config_of_parts(config, parts)
        return _fitted(config, source.tensors, source.files)

    alone = {frozenset({"vision"}): clip.CONFIG_KEYS, frozenset({"language"}): language.CONFIG_KEYS}
    return as_it_was(contents, source.config, there_and_back, alone.get(frozenset(parts)))


def _with_processor(source: Source) -> Source:
    """With the processor files that MindFormers has no use for, if they are not there."""
    whole = "model_type" in source.config
    if not whole or source.files.keys() & {"preprocessor_config.json", "processor_config.json"}:
        return source
    made = processor_files(source.config, clip.tower_processor(source.config, {}))
    return replace(source, files={**source.files, **made})


def open_undescribed(contents: Contents, options: Options | None = None) -> Source:
    """A checkpoint of MindFormers of which nothing says more than its names and shapes.

    Its configuration is empty, so only weights can be made of it. That no tensor is absent is
    seen from the names alone.

    Raises:
        CheckpointError: it is none of MindFormers', incomplete, or has fused tensors, which
            cannot be taken apart without the number of heads.
    """
    options = options or Options()
    layout = next((one for one in LAYOUTS if _evidence(one, contents)), None)
    if layout is None:
        raise CheckpointError(f"{contents.path} is no checkpoint of MindFormers")
    stored = mindspore.stored_tensors(contents, options)
    if any(_fused(stored)):
        raise CheckpointError(
            f"{contents.path} has fused tensors, and nothing says how many heads they have",
            fix="name a checkpoint of the same model, or its YAML file: --base PATH",
        )
    tensors, dropped = _canonical_tensors(layout, stored, {}, options)
    parts = mindspore.wanted_parts(tensors) & layout.parts
    check_complete(tensors, _outline(tensors), parts, options)
    return Source(layout.name, contents.path, {}, tensors, dropped=dropped)


def _outline(tensors: Collection[str]) -> Config:
    """As much of a configuration as names tell: which tensors belong to the model."""

    def depth(prefix: str) -> int:
        numbers = (name.removeprefix(prefix).split(".")[0] for name in tensors if prefix in name)
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)

    layer = f"{LANGUAGE}model.layers."
    qkv_bias, output_bias = (f"{layer}0.self_attn.{x}_proj.bias" in tensors for x in "qo")
    return {
        "model_type": "llava_next" if NEWLINE in tensors else "llava",
        "tie_word_embeddings": HEAD not in tensors,
        "text_config": {
            "model_type": "qwen2" if qkv_bias and not output_bias else "llama",
            "attention_bias": output_bias,
            "num_hidden_layers": depth(layer),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "num_hidden_layers": depth(f"{VISION}encoder.layers."),
        },
    }


# --- writing ---------------------------------------------------------------------------------


def _write(layout: _Layout, source: Source, options: Options) -> Target:
    parts = layout.parts & options.parts & source.parts
    _check_request(layout, source, options, parts)
    fused = options.qkv_concat
    stored, left_out = to_stored(
        source.tensors,
        _table_for(layout, source.config, fused, fused),
        options,
        unheld=lambda name: part_of(name) not in parts,
    )
    stem = _stem(layout, source.config, parts)
    weights, index = mindspore.weight_files(stored, options, "ckpt", stem)
    documents = {**_side_files(source, parts), **index}
    if layout is not CLIP and source.config:
        name, text = _yaml(layout, source, parts, fused, f"predict_{stem}.yaml")
        documents[name] = text.encode()
    return Target(layout.name, weights, documents, left_out=left_out)


def _check_request(
    layout: _Layout, source: Source, options: Options, parts: Collection[str]
) -> None:
    if options.qkv_concat and not layout.fuses:
        raise CheckpointError(
            f"dialect {layout.name} has no fused form that MindFormers' converters make",
            given="--qkv-concat",
            expected="it for a language model alone",
            fix=f"leave it out, or write the language model with --to {LLAMA.name}",
        )
    if not parts:
        raise CheckpointError(
            f"{source.path} has none of the parts that dialect {layout.name} was asked to hold",
            given=describe_parts(source.parts),
            expected=describe_parts(layout.parts & options.parts),
        )
    if source.config:
        settings.check_held(source.config, parts)


def _stem(layout: _Layout, config: Config, parts: Collection[str]) -> str:
    """What the files are called: the family, and the parts if they are not all."""
    if layout.whole_name:
        return layout.whole_name
    family = config.get("model_type", "llava_next")
    whole = {"vision", "language"} <= set(parts)
    return family if whole else "_".join([family, *(part for part in PARTS if part in parts)])


def _side_files(source: Source, parts: Collection[str]) -> dict[str, Content]:
    """The small files that concern a tower or a language model alone, else all of them."""
    if set(parts) == {"vision"}:
        settings = clip.tower_processor(source.config, clip.image_processor(source))
        return {clip.PREPROCESSOR: as_json(settings)}
    wanted = language.SIDE_FILES if set(parts) == {"language"} else tuple(source.files)
    return {name: content for name, content in source.files.items() if name in wanted}


def _document(layout: _Layout, config: Config, parts: Collection[str], fused: bool) -> Config:
    if layout is LLAVA:
        return settings.write_document(config, parts, fused=fused)
    return settings.write_language_document(config, fused=fused)


def _yaml(
    layout: _Layout, source: Source, parts: Collection[str], fused: bool, name: str
) -> tuple[str, str]:
    """Name and text of the YAML file: the one that was read, with what became different."""
    now = _document(layout, source.config, parts, fused)
    kept = source.memory.get(layout.name)
    if not kept:
        return name, yaml_file.dump(now)
    before = _document(layout, kept["config"], parts, kept["fused"])
    document = restored(kept["document"], before, now)
    same = document == kept["document"]
    return kept["name"], kept["text"] if same else yaml_file.dump(document)


LAYOUTS = (LLAVA, LLAMA, LLAMA_PLAIN, CLIP)


def _dialect(layout: _Layout) -> Dialect:
    return Dialect(
        layout.name,
        layout.title,
        functools.partial(_evidence, layout),
        functools.partial(_read, layout),
        functools.partial(_write, layout),
    )


DIALECTS = tuple(map(_dialect, LAYOUTS))
