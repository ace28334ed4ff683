"""LlavaSpec -> config.json, the inverse of `read_spec`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from unillava.config.read import own_defaults, read_spec
from unillava.config.tables import POOL_MODES, POOL_POSITIONS, ROPE_FIELDS, VISION_KINDS
from unillava.errors import ConfigError
from unillava.spec import LlavaSpec, RopeSpec, VideoSpec
from weight_convert.canonical import ABSENT, ARCHITECTURES, Config

_SUPERSEDED = {
    "": ("dtype", "image_token_id", "video_token_id", "unillava"),
    "text_config": (
        *("dtype", "rope_parameters", "rope_scaling", "layer_types", "partial_rotary_factor"),
        *("original_max_position_embeddings", "sliding_window"),
    ),
    "vision_config": ("dtype",),
}
"""Fields of a base configuration that would speak against those written here."""
_VISION_TYPES = {kind: model_type for model_type, kind in VISION_KINDS.items()}


def write_config(spec: LlavaSpec, base: Mapping[str, Any] | None = None) -> Config:
    """A config.json for `spec`: the inverse of `read_spec`.

    Every field is written out, in the spelling that transformers 4.45 to 5.x all read. What
    transformers' files cannot say goes into the object "unillava", which is left out when there
    is nothing to say.

    Args:
        spec: the model.
        base: a config.json whose other fields (token ids, names, …) are kept.

    Raises:
        ConfigError: no config.json can describe this spec; the message names what is lost.
    """
    config: Config = copy.deepcopy(dict(base or {}))
    for key in _SUPERSEDED[""]:
        config.pop(key, None)
    if "vocab_size" in config:  # older files repeat it at the top
        config["vocab_size"] = spec.text.vocab_size
    config |= _top_fields(spec)
    config["text_config"] = _text_fields(spec, _base_of(config, "text_config", spec.text.kind))
    vision_type = _VISION_TYPES[spec.vision.kind]
    config["vision_config"] = _base_of(config, "vision_config", vision_type) | _vision_fields(spec)
    own = _own_fields(spec)
    if own:
        config["unillava"] = own
    _check_written(spec, config)
    return config


def _base_of(config: Config, key: str, model_type: str) -> Config:
    """The base's nested fields, if it describes the same kind of model."""
    nested = config.get(key) or {}
    if nested.get("model_type", ABSENT[key]["model_type"]) != model_type:
        return {}
    return {name: value for name, value in nested.items() if name not in _SUPERSEDED[key]}


def _top_fields(spec: LlavaSpec) -> Config:
    layers = spec.feature_layers
    fields: Config = {
        "model_type": spec.family,
        "architectures": [ARCHITECTURES[spec.family]],
        "projector_hidden_act": spec.projector.activation,
        "multimodal_projector_bias": spec.projector.bias,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": "full" if spec.keep_class_token else "default",
        "image_token_index": spec.image_token,
        "tie_word_embeddings": spec.text.tie_embeddings,
        "torch_dtype": spec.dtype,
    }
    if spec.grid_pinpoints:
        fields["image_grid_pinpoints"] = [list(pair) for pair in spec.grid_pinpoints]
    if spec.video:
        mode = spec.video.pool_mode if spec.video.pool_mode in POOL_MODES else "average"
        fields["video_token_index"] = spec.video_token
        fields["spatial_pool_mode"] = mode
        fields["spatial_pool_stride"] = spec.video.pool_stride
    return fields


def _text_fields(spec: LlavaSpec, base: Config) -> Config:
    text = spec.text
    fields = base | {
        "model_type": text.kind,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": text.hidden_act,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position,
        "rope_theta": text.rope.theta,
        "rope_scaling": _rope_fields(text.rope),
        "tie_word_embeddings": text.tie_embeddings,
        "torch_dtype": spec.dtype,
    }
    if text.kind == "llama":
        return fields | {"attention_bias": text.qkv_bias, "mlp_bias": text.mlp_bias}
    fields["sliding_window"] = text.sliding_window
    if text.kind == "qwen2":
        windowed = text.sliding_window is not None
        fields["use_sliding_window"] = windowed
        fields["max_window_layers"] = 0 if windowed else text.num_layers
    return fields


def _rope_fields(rope: RopeSpec) -> Config | None:
    values = {
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
    if rope.kind == "default":
        return None
    return {"rope_type": rope.kind} | {key: values[key] for key in ROPE_FIELDS[rope.kind]}


def _vision_fields(spec: LlavaSpec) -> Config:
    vision = spec.vision
    fields = {
        "model_type": _VISION_TYPES[vision.kind],
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.num_channels,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": vision.hidden_act,
        "layer_norm_eps": vision.layer_norm_eps,
        "torch_dtype": spec.dtype,
    }
    return fields | ({"vision_use_head": vision.has_head} if vision.kind == "siglip" else {})


def _own_fields(spec: LlavaSpec) -> Config:
    """Only what differs from what transformers' own fields already say."""
    implied = own_defaults(spec.family, None)
    names = {0: "identity", 1: "linear", 2: None}
    wanted = {
        "projector": names.get(
            spec.projector.depth, f"mlp{spec.projector.depth}x_{spec.projector.activation}"
        ),
        "image_mode": spec.image_mode,
        "anyres_variant": spec.anyres_variant,
        "unpad": spec.unpad,
        "image_newline": spec.has_newline,
        "video": _own_video_fields(spec.video) if spec.video else None,
        "template": spec.template,
    }
    return {key: value for key, value in wanted.items() if value != implied[key]}


def _own_video_fields(video: VideoSpec) -> Config | None:
    fields = {}
    if video.pool_mode not in POOL_MODES:
        fields["pool_mode"] = video.pool_mode
    if video.pool_position != POOL_POSITIONS[0]:
        fields["pool_position"] = video.pool_position
    if video.newline != "no_token":
        fields["newline"] = video.newline
    return fields or None


def _check_written(spec: LlavaSpec, config: Config) -> None:
    """What was written must read back as the same spec; otherwise say what cannot be said."""
    read = read_spec(config)
    if read == spec:
        return
    lost = [
        f"{field.name} = {getattr(spec, field.name)!r}"
        for field in dataclasses.fields(LlavaSpec)
        if getattr(spec, field.name) != getattr(read, field.name)
    ]
    raise ConfigError("config.json cannot describe this model", given="; ".join(lost))
