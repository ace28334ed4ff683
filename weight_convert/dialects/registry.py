"""Every dialect, in the order in which they are tried on an unknown checkpoint."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from weight_convert.errors import CheckpointError
from weight_convert.storage.tensor import few

if TYPE_CHECKING:
    from weight_convert.contents import Contents
    from weight_convert.dialects.base import Dialect

MODULES = (
    "peft",
    "paddle_lora",
    "delta",
    "hf",
    "clip",
    "language",
    "paddlenlp",
    "moss2",
    "mpt",
    "original",
    "paddlemix",
    "parts",
    "mindspore",
    "mindformers",
    "projector_file",
)
"""Modules of this package with a tuple DIALECTS. Imported when first asked for, because dialects
open other checkpoints (a base, a vision tower) and so need this table themselves."""


@functools.cache
def dialects() -> dict[str, Dialect]:
    """Name -> dialect."""
    modules = [importlib.import_module(f"weight_convert.dialects.{name}") for name in MODULES]
    return {dialect.name: dialect for module in modules for dialect in module.DIALECTS}


def recognise(contents: Contents) -> tuple[Dialect, str]:
    """The dialect of a checkpoint and what it is recognised by: the first whose evidence holds.

    Raises:
        CheckpointError: none is recognised; says what is there.
    """
    for dialect in dialects().values():
        evidence = dialect.evidence(contents)
        if evidence:
            return dialect, evidence
    raise _unknown(contents)


def _unknown(contents: Contents) -> CheckpointError:
    inner = [path.parent for path in sorted(contents.path.glob("*/config.json"))]
    kind = contents.config.get("model_type")
    signs = [
        f"config.json: model_type {kind!r}" if kind else "no config.json",
        f"files: {few(sorted(contents.names))}",
        f"tensors: {few(contents.tensors) or 'none'}",
    ]
    if any(name.endswith(".gguf") for name in contents.names):
        signs.append("GGUF holds quantised weights for inference, from which no dialect is made")
    return CheckpointError(
        f"{contents.path} is a checkpoint of no known layout",
        given="; ".join(signs),
        expected=f"one of: {', '.join(dialects())}",
        fix=f"did you mean {inner[-1]}?"
        if inner
        else "look at `unillava convert --list`; if you know what it is, say so: --from DIALECT",
    )


def named(name: str) -> Dialect:
    """A dialect by its name.

    Raises:
        CheckpointError: there is none of that name.
    """
    if name not in dialects():
        raise CheckpointError(
            "there is no such dialect", given=name, expected=f"one of {', '.join(dialects())}"
        )
    return dialects()[name]
