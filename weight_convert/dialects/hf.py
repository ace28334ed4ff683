"""The spellings in which transformers writes one and the same LLaVA checkpoint.

The canonical names are those of the llava-hf files on the hub. transformers 5 leaves
`vision_model.` out when it saves, and uses other prefixes in memory, as versions since 4.52 do;
weights that were saved from `named_parameters()` have those. A spelling is a table of prefixes,
read in both directions; what follows a prefix never changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Spelling = Mapping[str, str]
"""Canonical prefix -> prefix in the spelling. Longer prefixes are tried first."""

HUB: Spelling = {
    "language_model.model.": "language_model.model.",
    "language_model.lm_head.": "language_model.lm_head.",
    "vision_tower.vision_model.": "vision_tower.vision_model.",
    "multi_modal_projector.": "multi_modal_projector.",
    "image_newline": "image_newline",
}
"""Files of the hub, and of transformers before 5: the canonical names themselves."""

SAVED_BY_5: Spelling = {**HUB, "vision_tower.vision_model.": "vision_tower."}
"""Files that transformers 5 saves."""

MEMORY_SINCE_4_52: Spelling = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}
"""`named_parameters()` of transformers 4.52 to 4.57."""

MEMORY_OF_5: Spelling = {
    **MEMORY_SINCE_4_52,
    "vision_tower.vision_model.": "model.vision_tower.",
}
"""`named_parameters()` of transformers 5."""

SPELLINGS: Mapping[str, Spelling] = {
    "hub": HUB,
    "saved by transformers 5": SAVED_BY_5,
    "in memory, transformers 4.52 to 4.57": MEMORY_SINCE_4_52,
    "in memory, transformers 5": MEMORY_OF_5,
}

BUFFERS = re.compile(r"(^|\.)(embeddings\.position_ids|rotary_emb\.inv_freq)$")
"""Constants that old files carry next to the weights; they follow from the configuration."""


def _longest_first(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(set(pairs), key=lambda pair: (-len(pair[0]), pair)))


_TO_CANONICAL = _longest_first(
    (prefix, canonical) for table in SPELLINGS.values() for canonical, prefix in table.items()
)


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is a constant and no weight, to be left out on reading."""
    return BUFFERS.search(name) is not None


def canonical_name(name: str) -> str:
    """The canonical name of a tensor stored in any spelling; an unknown name stays itself."""
    for prefix, canonical in _TO_CANONICAL:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


def spelled_name(name: str, spelling: Spelling) -> str:
    """A canonical name in one of SPELLINGS; a name outside the canonical ones stays itself."""
    for canonical in sorted(spelling, key=len, reverse=True):
        if name.startswith(canonical):
            return spelling[canonical] + name[len(canonical) :]
    return name


def spelling_of(names: Iterable[str]) -> str | None:
    """Which of SPELLINGS all names (buffers aside) are written in, None if in no single one."""
    weights = [name for name in names if not is_buffer(name)]
    for label, spelling in SPELLINGS.items():
        if all(spelled_name(canonical_name(name), spelling) == name for name in weights):
            return label
    return None
