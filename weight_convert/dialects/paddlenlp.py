"""PaddleNLP's LLaMA and Qwen2: a language model alone.

The names are Hugging Face's with another prefix; every Linear weight and the head are stored
turned, [in, out]. Two fused forms exist: `qkv_proj`, whose columns are grouped by key/value head
[its q heads | k | v], and `gate_up_fused_proj`, gate then up. PaddleNLP saves a tied head as a
second copy of the embedding, [V, H].

PaddleNLP writes bfloat16 into safetensors under the tag U16, because it saves through NumPy; it
reads the tag BF16 as well, and that is what is written here.

Source: PaddleNLP 3.0.0b4, transformers/{llama,qwen2}/{configuration,modeling}.py,
transformers/conversion_utils.py, utils/safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weight_convert import canonical, files
from weight_convert.canonical import HEAD, LANGUAGE, Config
from weight_convert.contents import Contents
from weight_convert.dialects.base import Dialect, check_complete, to_canonical, to_stored
from weight_convert.dialects.configs import as_it_was, check_types, dtype_of, restored
from weight_convert.dialects.hf import SIDE_FILES, TOKENIZER_FILES
from weight_convert.dialects.language import CONFIG_KEYS, partial_config
from weight_convert.errors import CheckpointError
from weight_convert.mapping import (
    TRANSPOSE,
    NameTable,
    Op,
    Rule,
    derive,
    grouped_qkv,
    joined,
    prefixed,
    rule,
    then,
    transposed,
)
from weight_convert.opening import borrowed
from weight_convert.source import (
    Content,
    Options,
    Source,
    Target,
    WeightFile,
    as_json,
    parse_json,
    pick_files,
)
from weight_convert.storage.tensor import Tensor
from weight_convert.storage.tensor_parallel import open_tensor_parallel

# --- names -----------------------------------------------------------------------------------

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""Language model, and prefix of all its names -> class."""
EMBEDDED, STORED_HEAD = "embed_tokens.weight", "lm_head.weight"
_QKV = tuple(f"self_attn.{part}_proj.{{p}}" for part in "qkv")
_FFN = tuple(f"mlp.{part}_proj.weight" for part in ("gate", "up"))
_OTHERS = [
    rule("self_attn.o_proj.weight", "self_attn.o_proj.weight", TRANSPOSE),
    rule("mlp.down_proj.weight", "mlp.down_proj.weight", TRANSPOSE),
    rule("input_layernorm.weight", "input_layernorm.weight"),
    rule("post_attention_layernorm.weight", "post_attention_layernorm.weight"),
]


def fused_qkv(heads: int, kv_heads: int) -> Op:
    """q, k, v <-> one stored tensor whose columns are grouped by key/value head.

    Weights and biases alike; the stored group is [its q heads | k | v].
    """
    queries = heads // kv_heads
    slots = queries + 2
    parts = {"q": slice(queries), "k": slice(queries, queries + 1), "v": slice(queries + 1, slots)}

    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        groups = (kv_heads, slots)
        return [
            _columns(whole, groups, (slice(None), part), f"{name} of the groups")
            for name, part in parts.items()
        ]

    return Op(then(grouped_qkv(heads, kv_heads), TRANSPOSE).to_stored, cut)


def _cut_ffn(tensors: Sequence[Tensor]) -> list[Tensor]:
    (whole,) = tensors
    return [_columns(whole, (2,), (slice(k, k + 1),), f"half {k + 1}") for k in range(2)]


FUSED_FFN = Op(then(joined(2), TRANSPOSE).to_stored, _cut_ffn)
"""gate and up <-> one stored matrix, side by side."""


def _columns(whole: Tensor, groups: tuple[int, ...], part: tuple[slice, ...], how: str) -> Tensor:
    """Some columns of a stored tensor, turned. Cut out first: turning is what takes time.

    Args:
        whole: [I, O], or [O].
        groups: O is a multiple of their product.
        part: of each axis of the groups.
        how: a word for people.
    """
    *rows, columns = whole.shape or (1,)
    count = math.prod(groups)
    if columns % count or len(rows) > 1:
        raise CheckpointError(
            "a fused tensor has a shape that cannot be",
            given=f"{whole.places[0].name} {list(whole.shape)}",
            expected=f"columns in {count} groups",
        )
    size = columns // count
    chosen = math.prod(len(range(g)[p]) for g, p in zip(groups, part, strict=True))

    def take(array: np.ndarray) -> np.ndarray:
        grouped = array.reshape(*rows, *groups, size)
        taken = grouped[(..., *part, slice(None))].reshape(*rows, chosen * size)
        return transposed(taken) if rows else taken

    return derive([whole], (chosen * size, *rows), take, f"{how}, transpose" if rows else how)


def language_rules(text: Config, base: str, qkv: bool, ffn: bool) -> list[Rule]:
    """The language model's names.

    Args:
        text: `canonical.text_config`.
        base: a key of ARCHITECTURES.
        qkv: whether q, k and v are fused.
        ffn: whether gate and up are fused.
    """
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    fused_query = rule(_QKV, "self_attn.qkv_proj.{p}", fused_qkv(heads, kv_heads))
    fused_gate = rule(_FFN, "mlp.gate_up_fused_proj.weight", FUSED_FFN)
    layer = [
        *([fused_query] if qkv else [rule(name, name, TRANSPOSE) for name in _QKV]),
        *([fused_gate] if ffn else [rule(name, name, TRANSPOSE) for name in _FFN]),
        *_OTHERS,
    ]
    inner = [
        rule("embed_tokens.weight", "embed_tokens.weight"),
        *prefixed(layer, "layers.{n}.", "layers.{n}."),
        rule("norm.weight", "norm.weight"),
    ]
    head = [] if text["tie_word_embeddings"] else [rule(HEAD, STORED_HEAD, TRANSPOSE)]
    return [*prefixed(inner, f"{LANGUAGE}model.", f"{base}."), *head]


def fused_forms(names: Collection[str]) -> tuple[bool, bool]:
    """Whether q, k, v and whether gate and up are fused, by the stored names."""
    qkv = any(".qkv_proj." in name for name in names)
    return qkv, any(".gate_up_fused_proj." in name for name in names)


# --- configuration ---------------------------------------------------------------------------

_SIZES: Config = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
DEFAULTS: dict[str, Config] = {
    "llama": {
        **_SIZES,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "qwen2": {
        **_SIZES,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}
"""Class defaults of PaddleNLP's LlamaConfig and Qwen2Config, of the fields that both sides have."""
TOKENS: dict[str, Config] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "qwen2": {"bos_token_id": 151643, "eos_token_id": 151643, "pad_token_id": 0},
}
FIXED: dict[str, Config] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False},
}
"""What PaddleNLP's classes compute whatever their configuration says, in canonical fields."""
_SCALINGS = {None: "default", "linear": "linear", "dynamic_ntk": "dynamic"}
"""`rope_scaling_type` -> `rope_scaling.rope_type`; `ntk` is a larger `rope_theta`."""


def text_from_flat(flat: Config, base: str, where: str) -> Config:
    """`text_config` from the fields of PaddleNLP's LlamaConfig or Qwen2Config.

    Args:
        flat: config.json.
        base: a key of ARCHITECTURES.
        where: names the file.

    Raises:
        CheckpointError: a field that cannot be, or rotary positions that PaddleNLP does not have.
    """
    check_types(flat, DEFAULTS[base], where)
    if flat.get("alibi"):
        raise CheckpointError(f"{where}: alibi is not supported", given=flat["alibi"])
    text = {key: flat.get(key, value) for key, value in (DEFAULTS[base] | TOKENS[base]).items()}
    text |= {**FIXED[base], "model_type": base, "architectures": [ARCHITECTURES[base]]}
    text["num_key_value_heads"] = text["num_key_value_heads"] or text["num_attention_heads"]
    if base == "llama":
        text |= _rope_from_flat(flat, text, where)
    return dict(sorted(text.items()))


def _rope_from_flat(flat: Config, text: Config, where: str) -> Config:
    scaling = flat.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type") == "llama3":
        return {"rope_scaling": scaling}
    if scaling:
        raise CheckpointError(
            f"{where}: PaddleNLP ignores this rope_scaling, and it is not clear what is meant",
            given=scaling,
            expected="rope_scaling_type and rope_scaling_factor, or rope_type llama3",
        )
    kind, factor = flat.get("rope_scaling_type"), flat.get("rope_scaling_factor", 1.0)
    size = text["hidden_size"] // text["num_attention_heads"]
    known = isinstance(kind, str | None) and (kind in _SCALINGS or (kind == "ntk" and size > 2))
    if not known or type(factor) not in (int, float) or not 0 < factor < 1e9:
        raise CheckpointError(
            f"{where}: rotary positions of an unknown kind",
            given=f"rope_scaling_type {kind!r}, rope_scaling_factor {factor!r}",
            expected="a number above 0, and one of null, linear, ntk, dynamic_ntk",
        )
    if kind == "ntk":
        stretched = text["rope_theta"] * factor ** (size / (size - 2))
        return {"rope_scaling": None, "rope_theta": stretched}
    if kind is None:
        return {"rope_scaling": None}
    return {"rope_scaling": {"rope_type": _SCALINGS[kind], "factor": factor}}


def flat_from_text(config: Config) -> tuple[str, Config]:
    """The base (a key of ARCHITECTURES) and the fields of PaddleNLP's configuration.

    Args:
        config: canonical configuration with a language model.

    Raises:
        CheckpointError: PaddleNLP's classes do not compute what this language model does.
    """
    text = canonical.text_config(config)
    base = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}.get(text["model_type"])
    if base is None:
        raise _not_held(f"text_config.model_type {text['model_type']!r}", "llama or qwen2")
    _check_held(text, base)
    flat = {key: text.get(key, value) for key, value in (DEFAULTS[base] | TOKENS[base]).items()}
    flat |= {
        "architectures": [ARCHITECTURES[base]],
        "dtype": canonical.stored_dtype(config),
        "model_type": base,
        "seq_length": flat["max_position_embeddings"],
    }
    if base == "llama":
        flat |= {"alibi": False, **_rope_to_flat(text)}
    return base, flat


def _check_held(text: Config, base: str) -> None:
    size = text["hidden_size"] // text["num_attention_heads"]
    fixed = {**FIXED[base], "head_dim": size}
    if text["model_type"] == "mistral":
        fixed |= {"sliding_window": None, "attention_bias": None, "mlp_bias": None}
    alike = {"hidden_act": ("silu", "swish")}
    for key, value in fixed.items():
        if text.get(key) not in alike.get(key, (value,)):
            raise _not_held(f"text_config.{key} {text.get(key)!r}", repr(value))


def _not_held(given: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "PaddleNLP has no class for this language model", given=given, expected=expected
    )


def _rope_to_flat(text: Config) -> Config:
    scaling = text["rope_scaling"] or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    plain = {"rope_scaling": None, "rope_scaling_factor": 1.0, "rope_scaling_type": None}
    if kind == "llama3":
        trained = text.get("original_max_position_embeddings", text["max_position_embeddings"])
        whole = {"original_max_position_embeddings": trained, **scaling, "rope_type": "llama3"}
        return plain | {"rope_scaling": whole}
    stored = {canonical_kind: stored_kind for stored_kind, canonical_kind in _SCALINGS.items()}
    if kind not in stored:
        raise _not_held(f"rope_type {kind!r}", f"one of {', '.join(stored)}, llama3")
    factor = scaling.get("factor", 1.0)
    return plain | {"rope_scaling_type": stored[kind], "rope_scaling_factor": factor}


# --- small files -----------------------------------------------------------------------------

RENAMED = {"tokenizer.model": "sentencepiece.bpe.model"}
"""llava-hf file -> PaddleNLP's file."""
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.json"
AT_THE_TOP = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json"),
)
"""Files that PaddleNLP knows by the same names."""
ASIDE = "llava_hf/"
"""Folder for llava-hf files that PaddleNLP would misunderstand or has no place for. It reads
another chat_template.json, and templates only without transformers' `{% generation %}`."""


def side_files_of(contents: Contents) -> dict[str, Content]:
    """Small files of a Paddle directory under their llava-hf names."""
    if contents.is_file:
        return {}
    found = pick_files(contents.path, AT_THE_TOP)
    for ours, theirs in RENAMED.items():
        present = pick_files(contents.path, (theirs, ours))
        if present:
            found[ours] = next(iter(present.values()))
    if "chat_template" in contents.json(CHAT_TEMPLATE):
        found[CHAT_TEMPLATE] = contents.path / CHAT_TEMPLATE
    return found | pick_files(contents.path / ASIDE, SIDE_FILES)


def language_files(given: Mapping[str, Content]) -> dict[str, Content]:
    """Those of llava-hf's small files that concern the language model."""
    wanted = (*TOKENIZER_FILES, "generation_config.json")
    return {name: content for name, content in given.items() if name in wanted}


def kept_files_of(contents: Contents) -> dict[str, str]:
    """PaddleNLP's own chat_template.json, which no llava-hf directory has a place for."""
    template = contents.json(CHAT_TEMPLATE)
    if not template or "chat_template" in template:
        return {}
    return {CHAT_TEMPLATE: read_document(contents.path / CHAT_TEMPLATE)}


def read_document(path: Path) -> str:
    """The text of a JSON file.

    Raises:
        CheckpointError: it is none.
    """
    parse_json(path, str(path))
    return path.read_text(encoding="utf-8")


def stored_side_files(given: Mapping[str, Content]) -> dict[str, Content]:
    """llava-hf files under the names, and in the places, of a Paddle directory."""
    stored: dict[str, Content] = {}
    for name, content in given.items():
        if name in RENAMED or name in AT_THE_TOP:
            stored[RENAMED.get(name, name)] = content
        else:
            stored[ASIDE + name] = content
    if TOKENIZER_CONFIG in given:
        settings = parse_json(given[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
        template = settings.pop("chat_template", None)
        if template is not None and (
            not isinstance(template, str) or re.search(r"{%-?\s*generation", template)
        ):
            stored[TOKENIZER_CONFIG] = as_json(settings)
            stored[ASIDE + TOKENIZER_CONFIG] = given[TOKENIZER_CONFIG]
    return stored


# --- weights ---------------------------------------------------------------------------------


def open_paddle(contents: Contents) -> Mapping[str, Tensor]:
    """The weights of a Paddle directory or file; ranks of tensor parallelism are put together.

    Tensors of the tag U16 are bfloat16. The optimizer and whatever else a trainer puts beside them
    is left alone.

    Raises:
        CheckpointError: there are weights, but they cannot be used.
    """
    tensors = contents.tensors
    if not tensors and any(re.match(r"model_state\.tp\d+", name) for name in contents.names):
        tensors = open_tensor_parallel(contents.path, contents.config)
    return {
        name: replace(tensor, dtype="BF16") if tensor.dtype == "U16" else tensor
        for name, tensor in tensors.items()
    }


def with_second_copy(stored: Mapping[str, Tensor], text: Config, base: str) -> dict[str, Tensor]:
    """Add the head of a tied model, which PaddleNLP saves as a copy of the embedding."""
    copy = {STORED_HEAD: stored[f"{base}.{EMBEDDED}"]} if text["tie_word_embeddings"] else {}
    return {**stored, **copy}


def without_second_copy(
    stored: Mapping[str, Tensor], text: Config, base: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Leave the head of a tied model out, and say so: the tensors, and the names left out.

    It must be the embedding; whether it is, is seen when that is read.

    Raises:
        CheckpointError: it has another shape or dtype.
    """
    name = f"{base}.{EMBEDDED}"
    if not text["tie_word_embeddings"] or STORED_HEAD not in stored or name not in stored:
        return dict(stored), ()
    embedding, head = stored[name], stored[STORED_HEAD]

    def read() -> np.ndarray:
        array = embedding.read()
        if not np.array_equal(array.view(np.uint8), head.read().view(np.uint8)):
            raise _untied(embedding, head)
        return array

    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
        raise _untied(embedding, head)
    left = {key: tensor for key, tensor in stored.items() if key != STORED_HEAD}
    return left | {name: replace(embedding, read=read)}, (STORED_HEAD,)


def _untied(embedding: Tensor, head: Tensor) -> CheckpointError:
    return CheckpointError(
        "config.json says that the output head is the embedding matrix, but the weights hold "
        "another head",
        given=f"{STORED_HEAD} {head.dtype} {list(head.shape)}, unlike {embedding.places[0].name} "
        f"{embedding.dtype} {list(embedding.shape)}",
        fix="if the head was trained on its own, set tie_word_embeddings to false",
    )


def format_of(stored: Mapping[str, Tensor]) -> str:
    """What weights are stored in: a key of `files.FORMATS`."""
    return files.format_of(next(iter(stored.values())).places[0].path)


def weight_files(
    stored: Mapping[str, Tensor], options: Options, kept: str | None
) -> tuple[tuple[WeightFile, ...], dict[str, bytes]]:
    """Paddle's files: model_state.pdparams, or safetensors in Paddle's orientation.

    Args:
        stored: stored name -> tensor.
        options: `weights` and `max_shard_bytes`.
        kept: the format that they once had.

    Raises:
        CheckpointError: another format is asked for.
    """
    kind = options.weights or kept or "pdparams"
    if kind not in ("pdparams", "safetensors"):
        raise CheckpointError(
            "Paddle does not read weights of this format",
            given=kind,
            expected="pdparams or safetensors",
        )
    settings: dict[str, Any] = {"metadata": {"format": "np"}} if kind == "safetensors" else {}
    return files.shards(stored, kind, options.max_shard_bytes, settings=settings)


# --- the dialect -----------------------------------------------------------------------------

NAME = "paddlenlp"
FUSED_FLAGS = ("fuse_attention_ffn", "fuse_attention_qkv")
"""PaddleNLP saves them, and goes by the names of the tensors when it loads."""


def base_of(names: Collection[str]) -> str:
    """Which of ARCHITECTURES stored names belong to, or an empty string."""
    return next((base for base in ARCHITECTURES if f"{base}.{EMBEDDED}" in names), "")


def has_image_parts(names: Collection[str], base: str) -> bool:
    """Whether a tower or a projector is there as well: PaddleMIX's LLaVA."""
    prefixes = (f"{base}.vision_tower.", f"{base}.mm_projector.")
    return any(name.startswith(prefixes) for name in names)


def _evidence(contents: Contents) -> str:
    names = open_paddle(contents)
    base = base_of(names)
    if not base or has_image_parts(names, base):
        return ""
    return f"a tensor {base}.{EMBEDDED}, and no vision tower or projector"


def _read(contents: Contents, options: Options) -> Source:
    stored = open_paddle(contents)
    base, flat, form = base_of(stored), contents.config, format_of(stored)
    if flat:
        config = _canonical_config(
            flat, base, dtype_of(flat, stored), f"config.json of {contents.path}"
        )
        config = as_it_was(contents, config, _there_and_back, CONFIG_KEYS)
        side = side_files_of(contents)
    else:
        whole, side, _ = borrowed(contents, options)
        config = partial_config(whole)
    text = canonical.text_config(config)
    stored, copy = without_second_copy(stored, text, base)
    table = NameTable(language_rules(text, base, *fused_forms(stored)))
    tensors, dropped = to_canonical(stored, table, options)
    check_complete(tensors, config, ("language",), options)
    kept = {"config": flat, "files": kept_files_of(contents), "weights": form}
    memory = {NAME: kept} if flat else {}
    return Source(NAME, contents.path, config, tensors, side, dropped=copy + dropped, memory=memory)


def _canonical_config(flat: Config, base: str, dtype: str, where: str) -> Config:
    text = text_from_flat(flat, base, where)
    return {
        "text_config": text | {"torch_dtype": dtype},
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": dtype,
    }


def _there_and_back(config: Config) -> Config:
    base, flat = flat_from_text(config)
    return _canonical_config(flat, base, flat["dtype"], "the manifest")


def _write(source: Source, options: Options) -> Target:
    base, flat = flat_from_text(source.config)
    text = canonical.text_config(source.config)
    fused = options.qkv_concat
    stored, left_out = to_stored(
        source.tensors,
        NameTable(language_rules(text, base, fused, fused)),
        options,
        unheld=lambda name: canonical.part_of(name) != "language",
    )
    if not stored:
        raise CheckpointError(f"{source.path} has no language model to write")
    kept = source.memory.get(NAME, {})
    flat = _as_kept(flat, base, kept.get("config"))
    flat |= {key: fused for key in FUSED_FLAGS if fused or key in flat}
    weights, index = weight_files(
        with_second_copy(stored, text, base), options, kept.get("weights")
    )
    documents = {
        "config.json": as_json(dict(sorted(flat.items()))),
        **stored_side_files(language_files(source.files)),
        **{name: text.encode() for name, text in kept.get("files", {}).items()},
        **index,
    }
    return Target(NAME, weights, documents, left_out=left_out)


def _as_kept(now: Config, base: str, kept: Config | None) -> Config:
    if kept is None:
        return now
    dtype = canonical.stored_dtype(kept)
    before = flat_from_text(_canonical_config(kept, base, dtype, "the manifest"))[1]
    return for_whole(restored(kept, before, now), now["dtype"])


def for_whole(flat: Config, dtype: str) -> Config:
    """A configuration that was kept, for weights that are in one piece and of that dtype.

    PaddleNLP prefers torch_dtype where a file has both, and ranks have been put together.
    """
    kept = {key: value for key, value in flat.items() if not key.startswith("tensor_parallel_")}
    return kept | {key: dtype for key in ("torch_dtype",) if key in flat}


PADDLENLP = Dialect(
    NAME,
    "PaddleNLP LLaMA and Qwen2 language models (pdparams or safetensors; plain or fused)",
    _evidence,
    _read,
    _write,
)
DIALECTS = (PADDLENLP,)
