"""Labels and prompts as historical systems trained on them, by name: `data.compat` of a recipe.

A mode is where the system put its images, and which templates it learnt by another rule than what
the assistant has to produce (`historical` in templates.yaml). A template that it learnt by the
usual rule, or never had, stays.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unillava.data.conversation import get_template
from unillava.data.pipeline import Pipeline
from unillava.errors import ConfigError

FIRST_RULE = {
    "v0": "v0_original",
    "llava_v0": "v0_original",
    "v0_training": "v0_original",
    "v0_mmtag": "v0_mmtag_original",
    "kollava_mistral": "kollava_mistral_original",
    "kollava_mistral_training": "kollava_mistral_original",
}
"""Templates without a rule of their own were trained by LLaVA's first, in every fork of it."""


@dataclass(frozen=True)
class Compat:
    """How a historical system prepared its samples."""

    placement: str = "keep"
    """Of images; a name of `unillava.data.forms.PLACEMENTS`."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Template -> what it was trained as."""

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with the template that the system trained on."""
        name = self.templates.get(pipeline.template.name)
        template: Any = pipeline.template if name is None else get_template(name)
        return dataclasses.replace(pipeline, template=template)


_LLAVA = Compat("llava", FIRST_RULE)
MODES = {
    "none": Compat(),
    "llava": _LLAVA,
    "kollava": _LLAVA,
    "moss2": _LLAVA,
    "open_llava_next": Compat("llava", {**FIRST_RULE, "llava_llama_3": "oln_llama_3"}),
    "llava_next": Compat(
        "nx",
        {
            **FIRST_RULE,
            "llava_llama_3": "nx_llama_3",
            "qwen_1_5": "nx_qwen_1_5",
            "qwen_2_5": "nx_qwen_2_5",
        },
    ),
    "mindformers": Compat("mindformers"),
    "paddlemix": Compat("paddlemix"),
}
"""moss2: LLaVA-MOSS2. paddlemix: without the accidents of its search for USER and ASSISTANT in
texts. None of them drops a sample whose tokens it counted wrongly, as all of them did."""


def get_compat(name: str | None) -> Compat:
    """The mode of that name; None is `none`.

    Raises:
        ConfigError: there is no such mode.
    """
    mode = MODES.get(name or "none")
    if mode is not None:
        return mode
    near = difflib.get_close_matches(str(name), MODES, 1)
    raise ConfigError(
        "there is no such compatibility mode",
        given=name,
        expected=f"one of {', '.join(MODES)}",
        fix=f"did you mean {near[0]}?" if near else None,
    )
