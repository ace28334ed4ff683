"""What the image side of original LLaVA and its forks is called: tensor names, `mm_*` settings.

The tensors stand below the language model (`model.` or `transformer.`), the vision tower below
that, if it was saved at all. The settings here are those of the forks that look at square pictures
(LLaVA-MOSS2, LLaVA-Lightning-MPT); all of them are in `llava_config`.

Source: haotian-liu/LLaVA, llava/model/llava_arch.py, multimodal_projector/builder.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from weight_convert import canonical
from weight_convert.canonical import NEWLINE, PROJECTOR, VISION, Config
from weight_convert.dialects.assembly import Design, activation
from weight_convert.dialects.clip import TOWERS
from weight_convert.errors import CheckpointError
from weight_convert.mapping import Rule, prefixed, rule

TOWER = "vision_tower.vision_tower.vision_model."
KNOWN_TOWERS = {
    ("clip_vision_model", 1024, 336): "openai/clip-vit-large-patch14-336",
    ("clip_vision_model", 1024, 224): "openai/clip-vit-large-patch14",
    ("siglip_vision_model", 1152, 384): "google/siglip-so400m-patch14-384",
}
"""(model_type, width, image size) -> its name on the hub."""
FEATURES = {"patch": "default", "cls_patch": "full"}
"""mm_vision_select_feature -> vision_feature_select_strategy."""


# --- names -----------------------------------------------------------------------------------


def projector_of(names: Iterable[str]) -> str | None:
    """`linear` or `mlp{N}x_gelu`, by the tensors that are there; None if there is no projector.

    config.json is not asked: LLaVA-MOSS2's scripts leave `linear` in it for an MLP.
    """
    found = [re.search(r"(?:^|\.)mm_projector\.(?:(\d+)\.)?weight$", name) for name in names]
    layers = [match[1] for match in found if match]
    if not layers:
        return None
    return "linear" if layers == [None] else f"mlp{len(layers)}x_gelu"


def rules(prefix: str, projector: str) -> list[Rule]:
    """Projector, newline and vision tower; `prefix` is that of the language model.

    Args:
        prefix: `model.` or `transformer.`.
        projector: identity, linear or mlp{N}x_gelu.
    """
    depth = canonical.projector_depth({"unillava": {"projector": projector}})
    places = [""] if projector == "linear" else [f"{2 * n}." for n in range(depth)]
    layers = [
        rule(f"{PROJECTOR}linear_{n}.{{p}}", f"{prefix}mm_projector.{place}{{p}}")
        for n, place in enumerate(places, 1)
    ]
    towers = sorted({name for tower in TOWERS for name in tower.names})
    return [
        *layers,
        rule(NEWLINE, f"{prefix}image_newline"),
        *prefixed([rule(name, name) for name in towers], VISION, prefix + TOWER),
    ]


# --- settings --------------------------------------------------------------------------------


def design_of(config: Config, projector: str, where: str) -> Design:
    """What the `mm_*` settings say, as a design.

    Args:
        config: a configuration with `mm_*` keys, or an empty one: the defaults.
        projector: from `projector_of`.
        where: names the file in errors.

    Raises:
        CheckpointError: a setting that these models do not have.
    """
    aspect = config.get("image_aspect_ratio") or "square"
    feature = config.get("mm_vision_select_feature", "patch")
    layer = config.get("mm_vision_select_layer", -2)
    for key, value, known in (
        ("image_aspect_ratio", aspect, ("square", "pad")),
        ("mm_vision_select_feature", feature, tuple(FEATURES)),
    ):
        if value not in known:
            raise CheckpointError(
                f"config.json of {where}: {key} has a value that is not supported",
                given=value,
                expected=f"one of {', '.join(known)}",
            )
    if type(layer) is not int:
        raise CheckpointError(f"config.json of {where}: mm_vision_select_layer", given=layer)
    return Design(
        projector=projector,
        image_mode=aspect,
        feature_layer=layer,
        strategy=FEATURES[feature],
    )


def settings_of(config: Config, tower: str) -> Config:
    """The `mm_*` settings of a canonical configuration.

    Args:
        config: canonical.
        tower: the name of the vision tower.

    Raises:
        CheckpointError: something that these models cannot do.
    """
    own = config.get("unillava") or {}
    mode = own.get("image_mode", "square")
    layer = config.get("vision_feature_layer", -2)
    kind = canonical.projector_kind(config)
    act = activation(kind)
    for what, fits, given in (
        ("tiles of large pictures", config["model_type"] == "llava", config["model_type"]),
        ("features of several layers", isinstance(layer, int), layer),
        ("projectors without bias", config.get("multimodal_projector_bias", True), "none"),
        ("projectors with another activation than gelu", act == "gelu", act),
    ):
        if not fits:
            raise CheckpointError(f"this layout has no {what}", given=given)
    vision = canonical.vision_config(config)
    features = {strategy: name for name, strategy in FEATURES.items()}
    strategy = config.get("vision_feature_select_strategy", "default")
    settings = {
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": kind,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": features[strategy],
        "mm_vision_select_layer": layer,
        "mm_vision_tower": tower,
        "use_mm_proj": True,
    }
    return settings | ({"image_aspect_ratio": mode} if mode != "square" else {})
