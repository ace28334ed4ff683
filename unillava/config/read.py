"""config.json -> LlavaSpec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from unillava.config.fields import Fields
from unillava.config.tables import (
    ACTIVATIONS,
    ANYRES_VARIANTS,
    DTYPES,
    IMAGE_MODES,
    NOT_PLAIN,
    OWN_FIELDS,
    OWN_POOL_MODES,
    OWN_VIDEO_FIELDS,
    POOL_MODES,
    POOL_POSITIONS,
    ROPE_FIELDS,
    STRATEGIES,
    UNSUPPORTED_TEXT,
    UNSUPPORTED_VISION,
    VIDEO_NEWLINES,
    VISION_KINDS,
)
from unillava.spec import LlavaSpec, ProjectorSpec, RopeSpec, TextSpec, VideoSpec, VisionSpec
from weight_convert.canonical import (
    ABSENT,
    ARCHITECTURES,
    MOST_LAYERS,
    TEXT_DEFAULTS,
    TOP_DEFAULTS,
    VISION_DEFAULTS,
    Config,
)


def read_spec(
    config: Mapping[str, Any],
    *,
    processor: Mapping[str, Any] | None = None,
    keys: Mapping[str, tuple[int, ...]] | None = None,
) -> LlavaSpec:
    """The model that a config.json describes.

    Args:
        config: the parsed file.
        processor: the checkpoint's image processor settings (preprocessor_config.json). They
            decide between the image modes square and pad, which config.json cannot say.
        keys: canonical name -> shape of the tensors on the disk. They decide where config.json
            is read in two ways: whether SigLIP's unused pooling head was saved, and whether the
            head is tied when the two `tie_word_embeddings` differ.

    Raises:
        ConfigError: see the package's docstring.
    """
    family = Fields(config).choice("model_type", TOP_DEFAULTS)
    top = Fields(config, defaults=TOP_DEFAULTS[family])
    _check_architecture(top, family)
    top.unset(NOT_PLAIN)
    vision_fields = _nested(top, "vision_config", VISION_DEFAULTS)
    text_fields = _nested(top, "text_config", TEXT_DEFAULTS)
    vision = _vision(vision_fields, keys)
    text = _text(text_fields, _is_tied(top, text_fields, family, keys))
    own = Fields(config.get("unillava", {}), "unillava", own_defaults(family, processor))
    own.only(OWN_FIELDS)
    layers = _feature_layers(top, vision)
    spec = LlavaSpec(
        family=family,
        vision=vision,
        text=text,
        projector=_projector(top, own, vision.hidden_size * len(layers), text.hidden_size),
        feature_layers=layers,
        keep_class_token=STRATEGIES[top.choice("vision_feature_select_strategy", STRATEGIES)],
        image_token=_token(top, "image", text.vocab_size),
        video_token=_token(top, "video", text.vocab_size) if _has_video(family) else None,
        image_mode=own.choice("image_mode", IMAGE_MODES),
        grid_pinpoints=() if family == "llava" else _pinpoints(top, vision.image_size),
        unpad=own.flag("unpad"),
        anyres_variant=own.choice("anyres_variant", ANYRES_VARIANTS),
        has_newline=own.flag("image_newline"),
        video=_video(top, own, vision.grid) if _has_video(family) else None,
        template=_template(own),
        dtype=_dtype(top, text_fields),
    )
    _check_whole(spec, top, own, processor or {})
    return spec


def _has_video(family: str) -> bool:
    return family == "llava_next_video"


def _check_architecture(top: Fields, family: str) -> None:
    expected = [ARCHITECTURES[family]]
    if top.get("architectures") not in (None, expected):
        raise top.error("architectures", f"{expected} for model_type {family!r}, or absent")


def _nested(top: Fields, key: str, defaults: Mapping[str, Config]) -> Fields:
    """`text_config` or `vision_config`, with the defaults of its model_type."""
    values = ABSENT[key] if top.get(key) is None else top.get(key)
    kind = Fields(values, key, ABSENT[key]).choice("model_type", defaults)
    return Fields(values, key, defaults[kind] | {"model_type": kind})


def _vision(fields: Fields, keys: Mapping[str, tuple[int, ...]] | None) -> VisionSpec:
    fields.unset(UNSUPPORTED_VISION)
    kind = VISION_KINDS[fields.required("model_type")]
    heads = fields.integer("num_attention_heads")
    if fields.integer("hidden_size") % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads, {heads}")
    if fields.integer("num_channels") != 3:
        raise fields.error("num_channels", "3 (red, green, blue)")
    image, patch = _square(fields, "image_size"), _square(fields, "patch_size")
    if image < patch:
        raise fields.error("image_size", f"at least patch_size, {patch}")
    has_head = kind == "siglip" and fields.flag("vision_use_head")
    if kind == "siglip" and keys is not None:
        has_head = any(name.startswith("vision_tower.vision_model.head.") for name in keys)
    return VisionSpec(
        kind=kind,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", maximum=MOST_LAYERS),
        num_heads=heads,
        image_size=image,
        patch_size=patch,
        hidden_act=ACTIVATIONS[fields.choice("hidden_act", ACTIVATIONS)],
        layer_norm_eps=fields.number("layer_norm_eps"),
        has_head=has_head,
    )


def _square(fields: Fields, key: str) -> int:
    """A side length; transformers also accepts the pair [side, side]."""
    value = fields.required(key)
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if any(type(side) is not int or side < 1 for side in sides) or sides[0] != sides[1]:
        raise fields.error(key, "a whole number of pixels, the same for both sides")
    return sides[0]


def _text(fields: Fields, tied: bool) -> TextSpec:
    fields.unset(UNSUPPORTED_TEXT)
    kind = fields.required("model_type")
    heads = fields.integer("num_attention_heads")
    max_position = fields.integer("max_position_embeddings")
    attention_bias = fields.flag("attention_bias") if kind == "llama" else False
    return TextSpec(
        kind=kind,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", maximum=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(fields, heads),
        head_dim=_head_dim(fields, kind, heads),
        hidden_act=ACTIVATIONS[fields.choice("hidden_act", ACTIVATIONS)],
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position=max_position,
        rope=_rope(fields, max_position),
        tie_embeddings=tied,
        qkv_bias=attention_bias or kind == "qwen2",
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias") if kind == "llama" else False,
        sliding_window=_sliding_window(fields, kind),
    )


def _num_kv_heads(fields: Fields, heads: int) -> int:
    kv_heads = fields.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    return kv_heads


def _head_dim(fields: Fields, kind: str, heads: int) -> int:
    hidden, stated = fields.integer("hidden_size"), fields.optional_integer("head_dim")
    # transformers' LlamaConfig asks for this even where head_dim is given.
    if hidden % heads and (stated is None or kind == "llama"):
        raise fields.error("hidden_size", f"a multiple of num_attention_heads, {heads}")
    if (stated or hidden // heads) % 2:
        key = "head_dim" if stated else "hidden_size"
        raise fields.error(key, "an even head size: rotary positions turn pairs")
    return stated or hidden // heads


def _rope(text: Fields, max_position: int) -> RopeSpec:
    key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    if text.get("rope_scaling") and text.get("rope_scaling") != text.get(key):
        raise text.error("rope_scaling", "the same as rope_parameters, or only one of the two")
    rope = Fields(text.get(key) or {}, text.dotted(key), {"rope_type": "default"})
    if "type" in rope.values:
        if rope.values.get("rope_type", rope.values["type"]) != rope.values["type"]:
            raise rope.error("type", "the same as rope_type, or only one of the two")
        rope = Fields({**rope.values, "rope_type": rope.values["type"]}, rope.name)
    kind = rope.choice("rope_type", ROPE_FIELDS)
    rope.unset({"partial_rotary_factor": UNSUPPORTED_TEXT["partial_rotary_factor"]})
    rope.only(("rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS[kind]))
    theta = _rope_theta(text, rope)
    if kind == "default":
        return RopeSpec(theta=theta)
    factor = rope.number("factor", 1.0)
    if kind == "llama3":
        return _llama3(text, rope, theta, factor, max_position)
    # Dynamic NTK grows its base beyond max_position_embeddings, whatever else a file says.
    return RopeSpec(theta, kind, factor, original_max_position=(kind == "dynamic") * max_position)


def _rope_theta(text: Fields, rope: Fields) -> float:
    inner = rope.values.get("rope_theta")
    if inner is None:
        return text.number("rope_theta")
    if text.values.get("rope_theta", inner) != inner:
        raise text.error("rope_theta", f"the same as {rope.dotted('rope_theta')}, {inner}")
    return rope.number("rope_theta")


def _llama3(text: Fields, rope: Fields, theta: float, factor: float, max_position: int) -> RopeSpec:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"more than low_freq_factor, {low}")
    key = "original_max_position_embeddings"
    stated = text.values.get(key, rope.values.get(key, max_position))
    if rope.values.get(key, stated) != stated:
        raise text.error(key, f"the same as {rope.dotted(key)}, {rope.values[key]}")
    original = Fields({key: stated}, rope.name).integer(key)
    return RopeSpec(theta, "llama3", factor, low, high, original)


def _sliding_window(fields: Fields, kind: str) -> int | None:
    """The window that every layer has; windows in some layers only are not supported.

    transformers ignores `sliding_window` for LLaMA; Mistral applies it to all layers; Qwen2
    applies it, if `use_sliding_window`, from layer `max_window_layers` on.
    """
    layers = fields.integer("num_hidden_layers")
    window = None if kind == "llama" else fields.optional_integer("sliding_window")
    windowed = layers if window else 0
    if kind == "qwen2":
        first = fields.integer("max_window_layers", minimum=0)
        windowed = max(layers - first, 0) if window and fields.flag("use_sliding_window") else 0
    types = fields.get("layer_types")
    if types is not None:
        windowed = _windowed_layers(fields, types, layers, bool(window), kind, windowed)
    if windowed not in (0, layers):
        key = "max_window_layers" if types is None else "layer_types"
        raise fields.error(key, "the same kind of attention in all layers")
    return window if windowed else None


def _windowed_layers(
    fields: Fields, types: Any, layers: int, has_window: bool, kind: str, windowed: int
) -> int:
    """How many layers `layer_types` gives a window; it must agree with the other fields."""
    known = {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != layers or not known.issuperset(types):
        raise fields.error("layer_types", f"{layers} entries of {', '.join(sorted(known))}")
    count = types.count("sliding_attention")
    allowed = has_window and (kind != "qwen2" or fields.flag("use_sliding_window"))
    if (count and not allowed) or (kind == "mistral" and count != windowed):
        raise fields.error("layer_types", "agreement with sliding_window and use_sliding_window")
    return count


def _is_tied(
    top: Fields, text: Fields, family: str, keys: Mapping[str, tuple[int, ...]] | None
) -> bool:
    """Whether the output head is the embedding matrix.

    Up to 4.57 transformers looks at text_config. Version 5 looks at the top, to which llava and
    llava_next_video, but not llava_next, pass on what text_config says. Where the two differ,
    the tensors on the disk tell how the file was written; without them, version 5 is followed.
    """
    outer = top.flag("tie_word_embeddings") if "tie_word_embeddings" in top.values else False
    inner = text.flag("tie_word_embeddings")
    if outer == inner:
        return outer
    if keys is not None:
        return "language_model.lm_head.weight" not in keys
    return outer or family != "llava_next"


def _feature_layers(top: Fields, vision: VisionSpec) -> tuple[int, ...]:
    value, depth = top.required("vision_feature_layer"), vision.num_layers
    layers = value if isinstance(value, list) else [value]
    if not layers or any(type(n) is not int or not -depth - 1 <= n <= depth for n in layers):
        raise top.error(
            "vision_feature_layer",
            f"a whole number from {-depth - 1} to {depth} (the tower has {depth} layers), "
            "or a list of them",
        )
    return tuple(layers)


def _projector(top: Fields, own: Fields, input_size: int, output_size: int) -> ProjectorSpec:
    activation = ACTIVATIONS[top.choice("projector_hidden_act", ACTIVATIONS)]
    name = own.required("projector")
    depths = {None: 2, "identity": 0, "linear": 1}
    layered = re.fullmatch(r"mlp([1-9]\d?)x_(\w+)", name) if isinstance(name, str) else None
    if layered and ACTIVATIONS.get(layered[2]) == activation:
        depth = int(layered[1])
    elif isinstance(name, str | None) and name in depths:
        depth = depths[name]
    else:
        raise own.error(
            "projector",
            f"identity, linear, or mlp{{N}}x_{activation} (as projector_hidden_act says)",
        )
    if depth == 0 and input_size != output_size:
        raise own.error(
            "projector",
            f"a projector with layers: features have {input_size} columns, text {output_size}",
        )
    bias = top.flag("multimodal_projector_bias")
    return ProjectorSpec(depth, input_size, output_size, activation, bias)


def _token(top: Fields, medium: str, vocab_size: int) -> int:
    """The token that stands for an image or a video, under either of its two names."""
    index, alias = f"{medium}_token_index", f"{medium}_token_id"
    key = alias if alias in top.values and index not in top.values else index
    token = top.integer(key, minimum=0)
    if alias in top.values and top.values[alias] != token:
        raise top.error(alias, f"the same as {index}, {token}")
    if token >= vocab_size:
        raise top.error(key, f"less than text_config.vocab_size, {vocab_size}")
    return token


def _pinpoints(top: Fields, tile: int) -> tuple[tuple[int, int], ...]:
    """Candidate (height, width), each a whole number of tiles."""
    key = "image_grid_pinpoints"
    value = top.get(key) if top.get(key) is not None else top.defaults[key]
    pairs = value if isinstance(value, list) else []
    for pair in pairs:
        sound = isinstance(pair, list | tuple) and len(pair) == 2
        if not sound or any(type(side) is not int or side < 1 or side % tile for side in pair):
            raise top.error(
                key, f"[height, width] in multiples of vision_config.image_size, {tile}; not {pair}"
            )
    if not pairs:
        raise top.error(key, "a list of [height, width]")
    return tuple((height, width) for height, width in pairs)


def _video(top: Fields, own: Fields, grid: int) -> VideoSpec:
    stride = top.integer("spatial_pool_stride")
    if stride > grid:
        raise top.error("spatial_pool_stride", f"at most the patches per side, {grid}")
    if top.required("spatial_pool_mode") == "conv":
        raise top.error("spatial_pool_mode", "average or max (conv has weights of its own)")
    mode = top.choice("spatial_pool_mode", POOL_MODES)
    defaults = {"pool_mode": mode, "pool_position": POOL_POSITIONS[0], "newline": "no_token"}
    block = Fields(own.get("video") or {}, "unillava.video", defaults)
    block.only(OWN_VIDEO_FIELDS)
    return VideoSpec(
        pool_mode=block.choice("pool_mode", OWN_POOL_MODES),
        pool_stride=stride,
        pool_position=block.choice("pool_position", POOL_POSITIONS),
        newline=block.choice("newline", VIDEO_NEWLINES),
    )


def _template(own: Fields) -> str | None:
    name = own.get("template")
    if name is not None and not (isinstance(name, str) and name):
        raise own.error("template", "the name of a conversation template, or absent")
    return name


def _dtype(top: Fields, text: Fields) -> Any:
    for fields in (top, text):
        stated = [key for key in ("dtype", "torch_dtype") if fields.get(key) is not None]
        values = {fields.choice(key, DTYPES) for key in stated}
        if len(values) > 1:
            raise fields.error("torch_dtype", f"the same as {fields.dotted('dtype')}")
        if values:
            return values.pop()
    return "float32"


# --- the object "unillava" -------------------------------------------------------------------


def own_defaults(family: str, processor: Mapping[str, Any] | None) -> Config:
    """What transformers' files imply for our fields; None where they say it themselves."""
    anyres = family != "llava"
    return {
        "projector": None,
        "image_mode": "anyres" if anyres else ("pad" if _pads(processor or {}) else "square"),
        "anyres_variant": "hf",
        "unpad": anyres,
        "image_newline": anyres,
        "video": None,
        "template": None,
    }


def _pads(processor: Mapping[str, Any]) -> bool:
    """Whether transformers' LLaVA-1.5 image processor pads to a square before it resizes."""
    kind = processor.get("image_processor_type")
    mine = isinstance(kind, str) and kind.startswith("LlavaImageProcessor")
    return mine and processor.get("do_pad") is True


def _check_whole(spec: LlavaSpec, top: Fields, own: Fields, processor: Mapping[str, Any]) -> None:
    """Contradictions between fields that are sound one by one."""
    strategy = "vision_feature_select_strategy"
    if spec.vision.kind == "siglip" and not spec.keep_class_token:
        raise top.error(
            strategy, "full: SigLIP has no class token, `default` would drop the first patch"
        )
    anyres = spec.image_mode == "anyres"
    needs_grid = anyres or spec.video is not None
    if needs_grid and spec.vision.kind == "clip" and spec.keep_class_token:
        raise top.error(strategy, "default: a class token has no place in a grid of patches")
    if anyres and spec.family == "llava":
        raise own.error("image_mode", "square or pad for model_type llava")
    if spec.image_mode == "square" and _pads(processor):
        raise own.error("image_mode", "pad, as the image processor's do_pad says")
    if spec.unpad and not (anyres and spec.has_newline):
        raise own.error("unpad", "false unless image_mode is anyres and image_newline is true")
    if spec.video is None and own.get("video") is not None:
        raise own.error("video", "absent, or model_type llava_next_video")
    if spec.video and spec.video.newline != "no_token" and not spec.has_newline:
        raise own.error("image_newline", f"true for the video newline {spec.video.newline!r}")
    if spec.video_token == spec.image_token:
        raise top.error("video_token_index", "another token than image_token_index")
