"""config.json of original LLaVA, both ways.

Its fields are those of the language model with the multimodal ones (`mm_…`, `image_…`) among
them, and nothing about the vision tower but its name. Some say what is not so: a config is
rewritten with `mm_projector_type` linear over an mlp2x projector (LLaVA-MOSS2), released ones
have `model_type` llava where the code wants llava_llama. What tensors tell is therefore taken from
them (`Facts`).

Source: haotian-liu/LLaVA 1.2.2 llava/model/{llava_arch,builder}.py, LLaVA-VL/LLaVA-NeXT 1.7
(`mm_spatial_pool_…`, `mm_newline_position`), LLaVA of June 2023 for what absent fields mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weight_convert import canonical
from weight_convert.canonical import ARCHITECTURES, TEXT_DEFAULTS, Config, has_newline
from weight_convert.dialects import assembly, language
from weight_convert.errors import CheckpointError

KINDS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    # Files that were never upgraded (`consolidate` asks about it).
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
}
"""Architecture or model_type -> kind of language model."""
NAMED = {
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
    "qwen2": ("LlavaQwenForCausalLM", "llava_qwen"),
}
"""Kind of language model -> architecture and model_type that are written."""
TEXT_FIELDS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache"),
    *("pretraining_tp", "attention_dropout", "rope_scaling", "rope_parameters", "layer_types"),
)
"""Fields of the language model besides those of TEXT_DEFAULTS."""
IMAGE_MODES = {None: "square", "square": "square", "pad": "pad", "anyres": "anyres"}
"""image_aspect_ratio -> image mode."""
MERGES = ("flat", "spatial", "spatial_unpad")
STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""mm_vision_select_feature -> vision_feature_select_strategy."""
POOL_MODES = {
    "before_projector": ("average", "max"),
    "after_projector": ("average", "max", "bilinear"),
}
POOL_STRIDE = 2
"""Behind the projector, whatever mm_spatial_pool_stride says."""
NEWLINES = ("grid", "frame", "one_token", "no_token")
PROJECTOR = re.compile(r"identity|linear|mlp[1-9]\d?x_gelu")

Unsupported = tuple[str, tuple[Any, ...], str]
UNSUPPORTED: tuple[Unsupported, ...] = (
    ("s2", (None, False), "a tower at several scales (S2)"),
    ("mm_resampler_type", (None, "spatial_pool"), "a resampler with weights"),
    ("add_faster_video", (None, False), "a second, faster path of video frames"),
    ("quantization_config", (None,), "a quantised checkpoint"),
)
"""(field, values that change nothing, what any other value asks for)."""


@dataclass(frozen=True)
class Facts:
    """What the tensors and the tower's own configuration say."""

    vision: Config
    """The canonical vision_config."""
    projector: str
    """identity, linear or mlp{N}x_gelu."""
    projector_bias: bool
    newline: bool
    """Whether image_newline exists."""
    dtype: str
    tower_layers: int
    """Layers of the whole tower: LLaVA deletes the last one of SigLIP's, and files lack it."""


def facts_of(config: Config) -> Facts:
    """What a canonical configuration says of them."""
    return Facts(
        vision=canonical.vision_config(config),
        projector=canonical.projector_kind(config),
        projector_bias=canonical.family(config)["multimodal_projector_bias"],
        newline=has_newline(config),
        dtype=canonical.stored_dtype(config),
        tower_layers=whole_layers(config),
    )


def whole_layers(config: Config) -> int:
    """Layers of the whole tower of a canonical configuration.

    LLaVA takes the last hidden state of SigLIP without its last layer.
    """
    vision = canonical.vision_config(config)
    siglip = vision["model_type"] == "siglip_vision_model"
    layer = canonical.family(config)["vision_feature_layer"]
    # Features of another layer are refused on writing.
    follows = siglip and layer in (-1, -2)
    return vision["num_hidden_layers"] + (layer + 2 if follows else 0)


# --- from the original -----------------------------------------------------------------------


def canonical_config(config: Config, facts: Facts, where: str) -> Config:
    """The canonical configuration, without the ids of tokens and without a template.

    Args:
        config: the original config.json.
        facts: what it does not say.
        where: names the file in errors.

    Raises:
        CheckpointError: a field that cannot be, or asks for what is not supported.
    """
    for key, harmless, meaning in UNSUPPORTED:
        if config.get(key) not in harmless:
            raise CheckpointError(
                f"config.json of {where} asks for {meaning}, which is not supported",
                given=f"{key} {config[key]!r}",
            )
    family, mode = family_of(config), _choice(where, config, "image_aspect_ratio", IMAGE_MODES)
    merge = config.get("mm_patch_merge_type") or MERGES[0]
    if merge not in MERGES or (mode == "anyres" and merge == "flat"):
        allowed = MERGES[1:] if mode == "anyres" else MERGES
        raise _refused(where, "mm_patch_merge_type", merge, allowed)
    layer, strategy = _features(config, facts, where)
    canonical_config = {
        "architectures": [ARCHITECTURES[family]],
        "ignore_index": -100,
        "image_seq_length": assembly.image_rows(facts.vision, strategy),
        "model_type": family,
        "multimodal_projector_bias": facts.projector_bias,
        "projector_hidden_act": "gelu",
        **_text(config, facts.dtype, where),
        "vision_config": dict(sorted(facts.vision.items())),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
    }
    own: Config = {}
    if facts.projector != "mlp2x_gelu":
        own["projector"] = facts.projector
    own |= _image_fields(family, mode, merge)
    if facts.newline != (family != "llava"):
        own["image_newline"] = facts.newline
    if family != "llava":
        side = facts.vision["image_size"]
        canonical_config["image_grid_pinpoints"] = _pinpoints(config, side, mode, where)
        canonical_config["use_image_newline_parameter"] = facts.newline
    if family == "llava_next_video":
        fields, block = _video_fields(config, merge, facts.vision, where)
        canonical_config |= fields
        own |= {"video": block} if block else {}
    return dict(sorted((canonical_config | ({"unillava": own} if own else {})).items()))


def family_of(config: Config) -> str:
    """The canonical model_type of an original configuration."""
    if config.get("mm_spatial_pool_mode") or config.get("mm_resampler_type") == "spatial_pool":
        return "llava_next_video"
    return "llava_next" if config.get("image_aspect_ratio") == "anyres" else "llava"


def text_kind(config: Config, where: str) -> str:
    """llama, mistral or qwen2.

    Raises:
        CheckpointError: another language model.
    """
    stated = config.get("architectures")
    names = [*(stated if isinstance(stated, list) else ()), config.get("model_type")]
    for name in names:
        if isinstance(name, str) and name in KINDS:
            return KINDS[name]
    raise CheckpointError(
        f"config.json of {where} names a language model that this dialect does not know",
        given=f"architectures {config.get('architectures')}, model_type {config.get('model_type')}",
        expected=", ".join(architecture for architecture, _ in NAMED.values()),
    )


def _text(config: Config, dtype: str, where: str) -> Config:
    kind = text_kind(config, where)
    known = (*TEXT_DEFAULTS[kind], *TEXT_FIELDS)
    given = {key: config[key] for key in known if key in config}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(given.get(key), int) and given[key] < 0:  # LLaMA of early 2023 pads with -1
            del given[key]
    named = {"model_type": kind, "architectures": [language.ARCHITECTURES[kind]]}
    whole = language.canonical_config({**given, **named}, dtype, where)
    rope = whole["text_config"]["rope_scaling"]
    if rope and "type" in rope:
        rest = {key: value for key, value in rope.items() if key != "type"}
        whole["text_config"]["rope_scaling"] = {"rope_type": rope["type"], **rest}
    return whole


def _features(config: Config, facts: Facts, where: str) -> tuple[int, str]:
    """vision_feature_layer and vision_feature_select_strategy."""
    strategy = _choice(where, config, "mm_vision_select_feature", {None: "default", **STRATEGIES})
    if facts.vision["model_type"] == "siglip_vision_model":
        # The last hidden state of the tower without its last layer; the fields say nothing.
        return facts.tower_layers - facts.vision["num_hidden_layers"] - 2, "full"
    layer = config.get("mm_vision_select_layer", -1)
    if type(layer) is not int:
        raise _refused(where, "mm_vision_select_layer", layer, ("a whole number",))
    return layer, strategy


def _image_fields(family: str, mode: str, merge: str) -> Config:
    """What the block "unillava" says about images."""
    if mode == "anyres":
        return {"anyres_variant": "llava"} | ({"unpad": False} if merge == "spatial" else {})
    if family == "llava":
        return {"image_mode": mode} if mode != "square" else {}
    return {"image_mode": mode, "unpad": False}


def _pinpoints(config: Config, side: int, mode: str, where: str) -> list[list[int]]:
    """Candidates as (height, width), in the order of the file, which has (width, height)."""
    stated = config.get("image_grid_pinpoints")
    if stated is None and mode != "anyres":
        return [[rows * side, columns * side] for rows, columns in assembly.TILES]
    if isinstance(stated, str):
        pairs: Any = _parse_pinpoints(stated, side)
    else:
        pairs = stated
    sound = isinstance(pairs, list) and pairs
    for pair in pairs if sound else ():
        sound = sound and isinstance(pair, list | tuple) and len(pair) == 2
        sound = sound and all(type(length) is int and length > 0 for length in pair)
    if not sound:
        expected = ("a list of [width, height]", "its text", "(1x1),...,(6x6)")
        raise _refused(where, "image_grid_pinpoints", stated, expected)
    return [[height, width] for width, height in pairs]


def _parse_pinpoints(text: str, side: int) -> list[tuple[int, int]]:
    """`[(336, 672), ...]` in pixels, or `(1x1),...,(6x6)` in tiles: all between first and last."""
    tiles = [(int(a), int(b)) for a, b in re.findall(r"\(\s*(\d{1,3})\s*x\s*(\d{1,3})\s*\)", text)]
    if tiles:
        (wide, high), (widest, highest) = tiles[0], tiles[-1]
        return [
            (i * side, j * side) for i in range(wide, widest + 1) for j in range(high, highest + 1)
        ]
    pairs = re.findall(r"[\[(]\s*(\d{1,6})\s*,\s*(\d{1,6})\s*[\])]", text)
    return [(int(width), int(height)) for width, height in pairs]


def _video_fields(config: Config, merge: str, vision: Config, where: str) -> tuple[Config, Config]:
    """Fields of the top level, and the block `video`."""
    before = config.get("mm_resampler_type") == "spatial_pool"
    position = "before_projector" if before else "after_projector"
    mode = config.get("mm_spatial_pool_mode") or "average"
    if mode not in POOL_MODES[position]:
        raise _refused(where, "mm_spatial_pool_mode", mode, POOL_MODES[position])
    stride = (config.get("mm_spatial_pool_stride") or POOL_STRIDE) if before else POOL_STRIDE
    if type(stride) is not int or stride < 1:
        raise _refused(where, "mm_spatial_pool_stride", stride, ("a whole number above 0",))
    newline = "no_token" if before else _video_newline(config, merge, where)
    fields = {
        "spatial_pool_mode": "average" if mode == "bilinear" else mode,
        "spatial_pool_stride": stride,
        "video_seq_length": (assembly.grid(vision) // stride) ** 2,
    }
    block: Config = {"pool_mode": mode} if mode == "bilinear" else {}
    block |= {} if before else {"pool_position": position}
    return fields, block | ({"newline": newline} if newline != "no_token" else {})


def _video_newline(config: Config, merge: str, where: str) -> str:
    position = config.get("mm_newline_position") or "one_token"
    if position not in NEWLINES:
        raise _refused(where, "mm_newline_position", position, NEWLINES)
    if merge == "flat" or (position == "one_token" and "unpad" not in merge):
        return "no_token"
    return position


def _choice(where: str, config: Config, key: str, allowed: dict[Any, str]) -> str:
    value = config.get(key)
    if not isinstance(value, str | None) or value not in allowed:
        raise _refused(where, key, value, [name for name in allowed if name])
    return allowed[value]


def _refused(where: str, key: str, value: Any, expected: Iterable[Any]) -> CheckpointError:
    return CheckpointError(
        f"config.json of {where}: {key} cannot be used",
        given=repr(value),
        expected=" or ".join(str(one) for one in expected),
    )


# --- to the original -------------------------------------------------------------------------


def stored_config(config: Config, tower: str, *, inside: bool) -> Config:
    """The original config.json.

    Args:
        config: canonical, without tokens that were added for the canonical layout.
        tower: what `mm_vision_tower` shall name.
        inside: whether the tower's weights are among the model's.

    Raises:
        CheckpointError: original LLaVA cannot be this model.
    """
    top, text = canonical.family(config), canonical.text_config(config)
    vision, own = canonical.vision_config(config), config.get("unillava") or {}
    _check_holds(top, text, vision)
    mode = own.get("image_mode") or ("square" if top["model_type"] == "llava" else "anyres")
    siglip = vision["model_type"] == "siglip_vision_model"
    architecture, model_type = NAMED[text["model_type"]]
    features = {strategy: feature for feature, strategy in STRATEGIES.items()}
    stored = {
        **_stored_text(text),
        "architectures": [architecture],
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": mode,
        "mm_hidden_size": vision["hidden_size"],
        "mm_patch_merge_type": _stored_merge(config, mode, own),
        "mm_projector_type": canonical.projector_kind(config),
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": (
            "patch" if siglip else features[top["vision_feature_select_strategy"]]
        ),
        "mm_vision_select_layer": -2 if siglip else top["vision_feature_layer"],
        "mm_vision_tower": tower,
        "model_type": model_type,
        "tokenizer_padding_side": "right",
        "torch_dtype": canonical.stored_dtype(config),
        "transformers_version": "4.37.2",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": inside,
        "use_mm_proj": True,
    }
    if mode == "anyres":
        pairs = top["image_grid_pinpoints"]
        stored["image_grid_pinpoints"] = [[width, height] for height, width in pairs]
    if top["model_type"] == "llava_next_video":
        stored |= _stored_video(top, own, vision)
    return dict(sorted(stored.items()))


def _check_holds(top: Config, text: Config, vision: Config) -> None:
    layer, kind = top["vision_feature_layer"], text["model_type"]
    siglip = vision["model_type"] == "siglip_vision_model"
    projector = canonical.projector_kind(top)
    for holds, given, expected in (
        (kind in NAMED, f"a language model {kind}", ", ".join(NAMED)),
        (
            PROJECTOR.fullmatch(projector) is not None,
            f"a projector {projector}",
            "identity, linear or mlp{N}x_gelu",
        ),
        (
            top["multimodal_projector_bias"] or projector == "identity",
            "a projector without biases",
            "biases",
        ),
        (isinstance(layer, int), f"features of several layers, {layer}", "one layer"),
        (
            not siglip or layer in (-1, -2),
            f"features of SigLIP's layer {layer}",
            "-2, or -1 of a tower without its last layer",
        ),
    ):
        if not holds:
            raise CheckpointError(
                "original LLaVA cannot be this model", given=given, expected=expected
            )


def _stored_text(text: Config) -> Config:
    left_out = ("architectures", "dtype", "model_type", "torch_dtype", "transformers_version")
    stored = {key: v for key, v in text.items() if key not in left_out and key[:1] != "_"}
    if text["head_dim"] == text["hidden_size"] // text["num_attention_heads"]:
        del stored["head_dim"]
    rope = text["rope_scaling"]
    length = text["max_position_embeddings"]
    if rope:
        kind = rope.get("rope_type", rope.get("type"))
        if kind in ("linear", "dynamic"):  # transformers 4.37 takes these two fields and no other
            stored["rope_scaling"] = {"type": kind, "factor": rope["factor"]}
            length = int(length * rope["factor"])
    return {**stored, "tokenizer_model_max_length": length}


def _stored_merge(config: Config, mode: str, own: Config) -> str:
    if mode == "anyres":
        return "spatial_unpad" if own.get("unpad", True) else "spatial"
    return "spatial_unpad" if has_newline(config) else "flat"


def _stored_video(top: Config, own: Config, vision: Config) -> Config:
    block = own.get("video") or {}
    mode = block.get("pool_mode") or top["spatial_pool_mode"]
    position = block.get("pool_position", "before_projector")
    newline, stride = block.get("newline", "no_token"), top["spatial_pool_stride"]
    before = position == "before_projector"
    for holds, given, expected in (
        (mode in POOL_MODES[position], f"frames pooled by {mode} {position}", POOL_MODES[position]),
        (before or stride == POOL_STRIDE, f"frames pooled by {stride} {position}", POOL_STRIDE),
        (not before or newline == "no_token", f"newlines {newline} {position}", "no_token"),
    ):
        if not holds:
            raise CheckpointError(
                "original LLaVA cannot be this model", given=given, expected=expected
            )
    return {
        "mm_newline_position": newline,
        "mm_resampler_type": "spatial_pool" if before else None,
        "mm_spatial_pool_mode": mode,
        "mm_spatial_pool_out_channels": vision["hidden_size"],
        "mm_spatial_pool_stride": stride,
    }
