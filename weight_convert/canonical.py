"""The canonical checkpoint: llava-hf's config.json and tensor names.

Every dialect is a two-way table between its own layout and this one. A canonical configuration is
config.json as a dict. Fields may be absent: what that means is transformers' class default, in
the tables below. Partial checkpoints (a vision tower, a language model, a projector) have partial
configurations: only `vision_config` or `text_config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from weight_convert.errors import CheckpointError

Config = dict[str, Any]

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
}

# --- what absent fields mean: transformers' class defaults -----------------------------------

_TOP: Config = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "image_token_index": 32000,
}
_ANYRES: Config = {
    **_TOP,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
TOP_DEFAULTS: dict[str, Config] = {
    "llava": _TOP,
    "llava_next": _ANYRES,
    "llava_next_video": {
        **_ANYRES,
        "image_token_index": 32001,
        "video_token_index": 32000,
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
    },
}

VISION_DEFAULTS: dict[str, Config] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
}

_TEXT: Config = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
TEXT_DEFAULTS: dict[str, Config] = {
    "llama": {
        **_TEXT,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        **_TEXT,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,  # Mistral v0.2 and later must say null
    },
    "qwen2": {
        **_TEXT,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
MPT_DEFAULTS: Config = {
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": 50368,
    "no_bias": True,
    "tie_word_embeddings": True,
}
"""LLaVA-Lightning-MPT's language model; its head is always the embedding matrix."""

ABSENT: dict[str, Config] = {
    "text_config": {"model_type": "llama"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}
"""What a nested configuration is when it is not given at all: CLIP-L/14-336 and LLaMA."""


def text_config(config: Mapping[str, Any]) -> Config:
    """`text_config` with every field that has a default filled in.

    `num_key_value_heads` and `head_dim` are numbers; `rope_theta` and `rope_scaling` are where
    transformers before 5 has them; `tie_word_embeddings` is what the whole model does.

    Raises:
        CheckpointError: the model_type is none that the tables know.
    """
    given = config.get("text_config") or ABSENT["text_config"]
    kind = given.get("model_type", "llama")
    known = TEXT_DEFAULTS | {"mpt": MPT_DEFAULTS}
    if kind not in known:
        raise _unknown("text_config", kind, known)
    text = {**known[kind], "model_type": kind, **given}
    if kind == "mpt":
        return text | {"num_attention_heads": text["n_heads"], "hidden_size": text["d_model"]}
    heads = text["num_attention_heads"]
    rope = text.pop("rope_parameters", None) or text.get("rope_scaling") or {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    kind_of_rope = scaling.get("rope_type", scaling.get("type", "default"))
    return text | {
        "num_key_value_heads": text["num_key_value_heads"] or heads,
        "head_dim": text["head_dim"] or text["hidden_size"] // heads,
        "rope_theta": rope.get("rope_theta", text["rope_theta"]),
        "rope_scaling": None if kind_of_rope == "default" else scaling,
        "tie_word_embeddings": bool(
            given.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        ),
    }


def vision_config(config: Mapping[str, Any]) -> Config:
    """`vision_config` with every field that has a default filled in.

    Raises:
        CheckpointError: the model_type is none that the tables know.
    """
    given = config.get("vision_config") or ABSENT["vision_config"]
    kind = given.get("model_type", "clip_vision_model")
    if kind not in VISION_DEFAULTS:
        raise _unknown("vision_config", kind, VISION_DEFAULTS)
    return {**VISION_DEFAULTS[kind], "model_type": kind, **given}


def _unknown(section: str, kind: object, known: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{section}.model_type is not known", given=kind, expected=f"one of {', '.join(known)}"
    )


def family(config: Mapping[str, Any]) -> Config:
    """The top level with every field that has a default filled in (nested objects as they are).

    Raises:
        CheckpointError: the model_type is none that the tables know.
    """
    kind = config.get("model_type")
    if kind not in TOP_DEFAULTS:
        raise CheckpointError(
            "config.json: model_type is not known",
            given=kind,
            expected=f"one of {', '.join(TOP_DEFAULTS)}",
        )
    return {**TOP_DEFAULTS[kind], **config}


def stored_dtype(config: Mapping[str, Any]) -> str:
    """`float32`, `float16` or `bfloat16`, as config.json says; float32 if it does not."""
    spellings = (config.get("torch_dtype"), config.get("dtype"))
    nested = config.get("text_config") or {}
    found = [d for d in (*spellings, nested.get("torch_dtype"), nested.get("dtype")) if d]
    return str(found[0]).removeprefix("torch.") if found else "float32"


def with_dtype(config: Mapping[str, Any], dtype: str) -> Config:
    """The configuration of the same model with its weights in another dtype.

    Args:
        config: canonical configuration, whole or partial.
        dtype: float32, float16 or bfloat16.
    """
    changed = dict(config)
    changed["dtype" if "dtype" in config else "torch_dtype"] = dtype
    for section in ("text_config", "vision_config"):
        nested = dict(config.get(section) or {})
        stated = [key for key in ("torch_dtype", "dtype") if key in nested]
        if stated:
            changed[section] = nested | dict.fromkeys(stated, dtype)
    return changed


def projector_kind(config: Mapping[str, Any]) -> str:
    """`identity`, `linear` or `mlp{N}x_gelu`, as original LLaVA calls it."""
    own = (config.get("unillava") or {}).get("projector")
    return own or f"mlp2x_{config.get('projector_hidden_act', 'gelu')}"


def projector_depth(config: Mapping[str, Any]) -> int:
    """How many Linear layers the projector has.

    Raises:
        CheckpointError: the kind cannot be read.
    """
    kind = projector_kind(config)
    match = re.fullmatch(r"mlp(\d+)x_\w+", kind)
    if match:
        return int(match[1])
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    raise CheckpointError(
        "the projector is of an unknown kind",
        given=kind,
        expected="identity, linear or mlp{N}x_gelu",
    )


# --- tensor names ----------------------------------------------------------------------------

VISION, PROJECTOR, NEWLINE = "vision_tower.vision_model.", "multi_modal_projector.", "image_newline"
LANGUAGE = "language_model."
PARTS = ("vision", "projector", "newline", "language")
EMBEDDING, HEAD = f"{LANGUAGE}model.embed_tokens.weight", f"{LANGUAGE}lm_head.weight"
MPT_EMBEDDING = f"{LANGUAGE}transformer.wte.weight"
BUFFERS = re.compile(r"(^|\.)(embeddings\.position_ids|rotary_emb\.inv_freq)$")
"""Constants that old files carry next to the weights; they follow from the configuration."""


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is a constant and no weight, to be left out on reading."""
    return BUFFERS.search(name) is not None


def part_of(name: str) -> str:
    """The part a canonical name belongs to, one of PARTS."""
    first = name.split(".")[0]
    parts = {"vision_tower": "vision", "multi_modal_projector": "projector"}
    return parts.get(first, "newline" if first == NEWLINE else "language")


def has_newline(config: Mapping[str, Any]) -> bool:
    """Whether the model has the parameter `image_newline`."""
    own = (config.get("unillava") or {}).get("image_newline")
    return own if own is not None else config.get("model_type", "llava") != "llava"


def expected_names(
    config: Mapping[str, Any], parts: Iterable[str] = PARTS, *, vision_head: bool = False
) -> list[str]:
    """The canonical name of every tensor that a configuration describes, in file order.

    Args:
        config: canonical configuration.
        parts: those that are wanted, of PARTS.
        vision_head: whether SigLIP's pooling head, which LLaVA never uses, was saved.

    Raises:
        CheckpointError: the configuration is of an unknown kind.
    """
    parts = set(parts)
    names: list[str] = []
    if "vision" in parts:
        names += _vision_names(vision_config(config), vision_head)
    if "projector" in parts:
        kinds = ("weight", "bias") if config.get("multimodal_projector_bias", True) else ("weight",)
        for n in range(1, _count(projector_depth(config)) + 1):
            names += [f"{PROJECTOR}linear_{n}.{kind}" for kind in kinds]
    if "newline" in parts and has_newline(config):
        names.append(NEWLINE)
    if "language" in parts:
        names += _text_names(text_config(config))
    return names


MOST_LAYERS = 10_000
"""More is no model but a file that wants to fill the memory with names."""


def _count(layers: object) -> int:
    if type(layers) is not int or not 0 <= layers <= MOST_LAYERS:
        raise CheckpointError(
            "config.json states a number of layers that cannot be",
            given=layers,
            expected=f"at most {MOST_LAYERS}",
        )
    return layers


_BOTH = ("weight", "bias")
_SIGLIP_HEAD = (
    *("probe", "attention.in_proj_weight", "attention.in_proj_bias"),
    *(f"{layer}.{k}" for layer in ("attention.out_proj", "layernorm") for k in _BOTH),
    *(f"mlp.{layer}.{k}" for layer in ("fc1", "fc2") for k in _BOTH),
)


def _vision_names(vision: Config, head: bool) -> list[str]:
    clip = vision["model_type"] == "clip_vision_model"
    names = ["embeddings.class_embedding"] if clip else []
    names += ["embeddings.patch_embedding.weight"]
    names += [] if clip else ["embeddings.patch_embedding.bias"]
    names += ["embeddings.position_embedding.weight"]
    names += [f"pre_layrnorm.{kind}" for kind in _BOTH] if clip else []
    layers = (
        *(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")),
        *("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"),
    )
    for n in range(_count(vision["num_hidden_layers"])):
        names += [f"encoder.layers.{n}.{layer}.{kind}" for layer in layers for kind in _BOTH]
    names += [f"post_layernorm.{kind}" for kind in _BOTH]
    names += [f"head.{name}" for name in _SIGLIP_HEAD] if head else []
    return [VISION + name for name in names]


def _text_names(text: Config) -> list[str]:
    if text["model_type"] == "mpt":
        return _mpt_names(text)
    attention_bias = text["model_type"] == "llama" and text["attention_bias"]
    qkv_bias = attention_bias or text["model_type"] == "qwen2"
    mlp_bias = text["model_type"] == "llama" and text["mlp_bias"]
    layers = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), qkv_bias),
        "self_attn.o_proj": attention_bias,
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), mlp_bias),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), False),
    }
    names = [EMBEDDING]
    for n in range(_count(text["num_hidden_layers"])):
        for layer, bias in layers.items():
            names += [f"{LANGUAGE}model.layers.{n}.{layer}.{kind}" for kind in _BOTH[: 1 + bias]]
    names.append(f"{LANGUAGE}model.norm.weight")
    return names if text["tie_word_embeddings"] else [*names, HEAD]


def _mpt_names(text: Config) -> list[str]:
    layers = ("norm_1", "attn.Wqkv", "attn.out_proj", "norm_2", "ffn.up_proj", "ffn.down_proj")
    kinds = ("weight",) if text["no_bias"] else _BOTH
    blocks = [f"blocks.{n}.{layer}" for n in range(_count(text["n_layers"])) for layer in layers]
    rest = [f"{layer}.{kind}" for layer in (*blocks, "norm_f") for kind in kinds]
    return [MPT_EMBEDDING, *(f"{LANGUAGE}transformer.{name}" for name in rest)]
