"""Which parameters are trained, and in which group.

The three parts that have a learning rate of their own are those of LLaVA: the vision tower, the
projector (with the newline row, which is learnt beside it) and the language model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from unillava.spec import LlavaSpec, parameter_table
from unillava.training.lora import adapter_table
from unillava.training.recipe import Rates, Recipe
from weight_convert.canonical import part_of

UNDECAYED = re.compile(r"(\.bias|norm\d?\.weight|layrnorm\.weight|image_newline|class_embedding)$")
"""Biases and norms are never decayed, nor bare vectors (transformers decays the latter)."""
UNUSED_TOWER = re.compile(r"^vision_tower\.vision_model\.(post_layernorm|head)\.")
"""LLaVA reads the tower before these: they would get no gradient."""


@dataclass(frozen=True)
class PartGroup:
    """Parameters of one part, with one rate and one decay."""

    name: str
    """`language`, `projector` or `vision`, with `.undecayed` for the second of a pair."""
    part: str
    parameters: tuple[str, ...]
    weight_decay: float


def trained_groups(spec: LlavaSpec, recipe: Recipe) -> list[PartGroup]:
    """The groups of a run, in a fixed order: language (or its adapters), projector, vision.

    With decay 0 each part is one group; otherwise biases and norms are split off.

    Args:
        spec: the model.
        recipe: its rates say which parts are trained; its optimizer gives the decay.
    """
    decay, table = recipe.optimizer.weight_decay, parameter_table(spec)
    groups: list[PartGroup] = []
    for part, rate in rate_by_part(recipe.rates).items():
        if rate is None:
            continue
        if part == "language" and recipe.lora is not None:
            names = list(adapter_table(spec, recipe.lora))
        else:
            names = [n for n in table if _group_part(n) == part and _is_used(n, spec)]
        decayed = [name for name in names if decay and not UNDECAYED.search(name)]
        undecayed = [name for name in names if name not in set(decayed)]
        for suffix, members, amount in (("", decayed, decay), (".undecayed", undecayed, 0.0)):
            if members:
                name = part + (suffix if decayed else "")
                groups.append(PartGroup(name, part, tuple(members), amount))
    return groups


def rate_by_part(rates: Rates) -> dict[str, float | None]:
    """Part -> learning rate, in the order of the groups."""
    return {"language": rates.language, "projector": rates.projector, "vision": rates.vision}


def trained_names(groups: Iterable[PartGroup]) -> list[str]:
    """Every trained parameter, in the order of the groups."""
    return [name for group in groups for name in group.parameters]


def _group_part(name: str) -> str:
    part = part_of(name)
    return "projector" if part == "newline" else part


def _is_used(name: str, spec: LlavaSpec) -> bool:
    """Whether the loss depends on it: the tower's blocks behind the chosen feature do not count."""
    if UNUSED_TOWER.match(name):
        return False
    if name == "image_newline" and not spec.unpad:
        return spec.video is not None and spec.video.newline != "no_token"
    match = re.match(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.", name)
    if not match:
        return True
    count = spec.vision.num_layers
    deepest = max(layer if layer >= 0 else count + 1 + layer for layer in spec.feature_layers)
    return int(match[1]) < deepest
