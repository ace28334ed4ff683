"""What a dialect is: how it is recognised, read and written; and the checks that all share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from weight_convert.canonical import Config, expected_names, is_buffer, projector_kind
from weight_convert.contents import Contents
from weight_convert.errors import CheckpointError
from weight_convert.mapping import Mapped, NameTable
from weight_convert.source import Options, Source, Target, matches
from weight_convert.storage.tensor import Tensor

MOST_NAMES = 5


@dataclass(frozen=True)
class Dialect:
    """One layout of checkpoints."""

    name: str
    title: str
    """One line for `unillava convert --list`."""
    evidence: Callable[[Contents], str]
    """What it is recognised by, in words; an empty string if it is something else."""
    read: Callable[[Contents, Options], Source] | None
    write: Callable[[Source, Options], Target] | None
    adapters: bool = False
    """Whether it holds low-rank adapters, and not whole weights."""


def to_canonical(
    stored: Mapping[str, Tensor],
    table: NameTable,
    options: Options,
    *,
    ignored: Callable[[str], bool] = is_buffer,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Stored tensors under canonical names, and the stored names that were left out.

    Args:
        stored: stored name -> tensor.
        table: the dialect's names.
        options: `allow_unused` names further tensors to leave out.
        ignored: which stored names are no weights (buffers, optimizer state).

    Raises:
        CheckpointError: a tensor that no rule names, or a group that is incomplete.
    """
    dropped = [n for n in stored if ignored(n) or matches(n, options.allow_unused)]
    left = set(dropped)
    mapped = table.to_canonical({n: tensor for n, tensor in stored.items() if n not in left})
    _check_mapped(mapped, [name for item in table.rules for name in item.stored])
    return mapped.tensors, tuple(dropped)


def to_stored(
    canonical: Mapping[str, Tensor],
    table: NameTable,
    options: Options,
    *,
    unheld: Callable[[str], bool] = lambda name: False,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Canonical tensors under stored names, and the canonical names that were left out.

    Args:
        canonical: canonical name -> tensor.
        table: the dialect's names.
        options: `allow_unused` names tensors to leave out.
        unheld: which canonical names this dialect does not hold by its nature.

    Raises:
        CheckpointError: a tensor that the dialect has no name for, or an incomplete group.
    """
    left_out = [n for n in canonical if unheld(n) or matches(n, options.allow_unused)]
    left = set(left_out)
    mapped = table.to_stored({n: tensor for n, tensor in canonical.items() if n not in left})
    _check_mapped(mapped, [name for item in table.rules for name in item.canonical])
    return mapped.tensors, tuple(left_out)


def check_complete(
    tensors: Mapping[str, Tensor], config: Config, parts: Iterable[str], options: Options
) -> None:
    """Every tensor that the configuration describes, and no other, must be there.

    Args:
        tensors: canonical name -> tensor.
        config: canonical configuration.
        parts: those that the checkpoint should have.
        options: `allow_missing` names tensors that may be absent.

    Raises:
        CheckpointError: lists the missing and surplus names with their nearest counterparts.
    """
    head = any(name.startswith("vision_tower.vision_model.head.") for name in tensors)
    expected = expected_names(config, parts, vision_head=head)
    known = set(expected)
    missing = [n for n in expected if n not in tensors and not matches(n, options.allow_missing)]
    surplus = [n for n in tensors if n not in known and not matches(n, options.allow_unused)]
    if missing or surplus:
        raise CheckpointError(
            "the weights are not those that the configuration describes",
            given="".join(
                f"\n    {line}"
                for line in (
                    *_listed("missing", missing, surplus),
                    *_listed("surplus", surplus, missing),
                )
            ),
            expected=f"{len(expected)} tensors",
            fix="use the configuration that was saved with these weights, or name what may be "
            "absent or left out: --allow-missing PATTERN, --allow-unused PATTERN",
        )


def check_whole(source: Source, parts: Collection[str], words: str) -> None:
    """Refuse to write less than a model; an identity projector has no tensors to miss.

    Args:
        source: what is to be written.
        parts: those that the layout cannot do without.
        words: the same for people.

    Raises:
        CheckpointError: one of them is absent.
    """
    absent = set(parts) - source.parts
    if projector_kind(source.config) == "identity":
        absent -= {"projector"}
    if absent:
        raise CheckpointError(
            f"{source.path} is not a whole model",
            given=f"no {' and no '.join(sorted(absent))}",
            expected=words,
        )


def _check_mapped(mapped: Mapped, templates: list[str]) -> None:
    lines = _listed("no rule for", mapped.unnamed, templates)
    for name, lacking in list(mapped.lacking.items())[:MOST_NAMES]:
        lines.append(f"{name} belongs together with what is absent: {', '.join(lacking)}")
    if lines:
        raise CheckpointError(
            "tensors cannot be placed",
            given="".join(f"\n    {line}" for line in lines),
            fix="if they may be left out, say so: --allow-unused PATTERN",
        )


def _listed(what: str, names: list[str], candidates: list[str]) -> list[str]:
    lines = []
    for name in names[:MOST_NAMES]:
        near = difflib.get_close_matches(name, candidates, 1, 0.6)
        lines.append(f"{what}: {name}" + (f" (nearest: {near[0]})" if near else ""))
    more = len(names) - MOST_NAMES
    return [*lines, f"{what}: {more} more"] if more > 0 else lines
