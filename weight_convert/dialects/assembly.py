"""A whole model's configuration and processor files, put together from those of its parts.

Written in the spelling of the hub's llava-hf files (transformers 4.45), complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weight_convert import canonical
from weight_convert.canonical import ARCHITECTURES, Config
from weight_convert.errors import CheckpointError
from weight_convert.source import as_json

PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
}
MODES = {
    "llava": ("square", "pad"),
    "llava_next": ("anyres",),
    "llava_next_video": ("anyres",),
}
"""Family -> its image modes, the usual one first."""
TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Candidates of anyres as (rows, columns) of tiles, in the order of the hub's files."""
STRATEGIES = ("default", "full")
KIND = re.compile(r"identity|linear|mlp([1-9]\d?)x_(gelu|gelu_pytorch_tanh|silu|relu|quick_gelu)")


@dataclass(frozen=True)
class Design:
    """What a LLaVA is besides its parts."""

    family: str = "llava"
    """llava, llava_next or llava_next_video."""
    projector: str = "mlp2x_gelu"
    """identity, linear or mlp{N}x_{activation}."""
    projector_bias: bool = True
    image_mode: str | None = None
    """square, pad or anyres; None: the family's usual one."""
    feature_layer: int | tuple[int, ...] = -2
    """Which hidden states of the tower are projected; several are put side by side."""
    strategy: str | None = None
    """default (without the class token) or full; None: default for CLIP, full for SigLIP."""
    template: str | None = None
    """Name of a conversation template."""

    @property
    def mode(self) -> str:
        """The image mode, filled in."""
        return self.image_mode or MODES[self.family][0]


def check_design(design: Design) -> None:
    """Refuse what no model can be.

    Raises:
        CheckpointError: an unknown family, image mode, strategy or projector.
    """
    _check_choice("family", design.family, MODES)
    _check_choice(f"image mode of {design.family}", design.mode, MODES[design.family])
    _check_choice("feature selection strategy", design.strategy or "full", STRATEGIES)
    if not KIND.fullmatch(design.projector):
        raise CheckpointError(
            "there is no such kind of projector",
            given=design.projector,
            expected="identity, linear, mlp2x_gelu, mlp3x_gelu, …, or a checkpoint with one",
        )


def _check_choice(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise CheckpointError(
            f"there is no such {what}", given=value, expected=f"one of {', '.join(known)}"
        )


def whole_config(design: Design, text: Config, vision: Config) -> Config:
    """The canonical config.json of a whole model, without the ids of its media tokens.

    Args:
        design: checked.
        text: canonical configuration with `text_config`.
        vision: canonical configuration with `vision_config`.

    Raises:
        CheckpointError: the parts and the design contradict each other.
    """
    vision_config = canonical.vision_config(vision)
    text_config = canonical.text_config(text)
    layers = design.feature_layer
    config: Config = {
        "architectures": [ARCHITECTURES[design.family]],
        "ignore_index": -100,
        "image_seq_length": image_rows(vision_config, strategy_of(design, vision_config)),
        "model_type": design.family,
        "multimodal_projector_bias": design.projector_bias,
        "projector_hidden_act": activation(design.projector),
        "text_config": dict(sorted(text_config.items())),
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        "torch_dtype": canonical.stored_dtype(text),
        "vision_config": dict(sorted(vision_config.items())),
        "vision_feature_layer": layers if isinstance(layers, int) else list(layers),
        "vision_feature_select_strategy": strategy_of(design, vision_config),
    }
    if design.family != "llava":
        side = vision_config["image_size"]
        config["image_grid_pinpoints"] = [[rows * side, cols * side] for rows, cols in TILES]
        config["use_image_newline_parameter"] = True
    if design.family == "llava_next_video":
        config["spatial_pool_mode"] = "average"
        config["spatial_pool_stride"] = 2
        config["video_seq_length"] = (grid(vision_config) // 2) ** 2
    own = _own_fields(design)
    if own:
        config["unillava"] = own
    return dict(sorted(config.items()))


def _own_fields(design: Design) -> Config:
    own: Config = {}
    if design.projector != f"mlp2x_{activation(design.projector)}":
        own["projector"] = design.projector
    if design.mode != MODES[design.family][0]:
        own["image_mode"] = design.mode
    if design.template:
        own["template"] = design.template
    return own


def activation(projector: str) -> str:
    """The activation of a kind of projector; of one without, the usual one."""
    match = KIND.fullmatch(projector)
    return (match and match[2]) or "gelu"


def strategy_of(design: Design, vision: Config) -> str:
    """`vision_feature_select_strategy`, filled in.

    Raises:
        CheckpointError: SigLIP has no class token that could be left out.
    """
    clip = vision["model_type"] == "clip_vision_model"
    if design.strategy == "default" and not clip:
        raise CheckpointError(
            "SigLIP has no class token: the strategy `default` would drop the first patch",
            given=design.strategy,
            expected="full",
        )
    return design.strategy or ("default" if clip else "full")


def grid(vision: Config) -> int:
    """Patches per side."""
    return vision["image_size"] // vision["patch_size"]


def image_rows(vision: Config, strategy: str) -> int:
    """Rows of features that one tile yields."""
    clip = vision["model_type"] == "clip_vision_model"
    return grid(vision) ** 2 + (clip and strategy == "full")


def processor_files(config: Config, tower: Config) -> dict[str, bytes]:
    """The processor files of a whole model.

    Args:
        config: from `whole_config`.
        tower: the image processor of its tower alone (`clip.tower_processor`).
    """
    family = config["model_type"]
    images = _image_processor(config, tower)
    vision = config["vision_config"]
    processor: dict[str, Any] = {
        "image_token": "<image>",
        "num_additional_image_tokens": int(vision["model_type"] == "clip_vision_model"),
        "patch_size": vision["patch_size"],
        "processor_class": PROCESSORS[family],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    documents = {"preprocessor_config.json": images, "processor_config.json": processor}
    if family == "llava_next_video":
        processor["video_token"] = "<video>"
        frames = {**tower, "processor_class": PROCESSORS[family]}
        frames.pop("image_processor_type")
        frames["video_processor_type"] = "LlavaNextVideoVideoProcessor"
        documents["video_preprocessor_config.json"] = frames
    return {name: as_json(dict(sorted(value.items()))) for name, value in documents.items()}


def _image_processor(config: Config, tower: Config) -> Config:
    family = config["model_type"]
    images = {**tower, "processor_class": PROCESSORS[family]}
    if family != "llava":
        side = config["vision_config"]["image_size"]
        return images | {
            "aspect_ratio_setting": "anyres",
            "crop_size": tower.get("crop_size", {"height": side, "width": side}),
            "do_center_crop": tower.get("do_center_crop", False),
            "do_pad": True,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
            "image_processor_type": "LlavaNextImageProcessor",
        }
    if (config.get("unillava") or {}).get("image_mode") == "pad":
        return images | {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    return images
