"""`unillava verify A [B]`: is a checkpoint what its manifest says, or the same as another one?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from unillava.cli import flags
from unillava.cli.convert import progress_bar, read_options

if TYPE_CHECKING:
    from weight_convert.verify import Outcome

MOST_LINES = 10


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("verify")(_verify)


def _verify(
    first: Annotated[str, typer.Argument(metavar="A", help="Checkpoint of any dialect.")],
    second: Annotated[
        str | None, typer.Argument(metavar="B", help="Another one; default: A's manifest.")
    ] = None,
    base: flags.Base = None,
    vision: flags.Vision = None,
    strategy: flags.Strategy = None,
) -> None:
    """Compare a checkpoint with its manifest, or with another of any dialect; exit code 1 if
    they differ."""
    from unillava.checkpoint import locate
    from weight_convert.verify import compare, verify

    options = read_options(base=base, vision=vision, strategy=strategy)
    with progress_bar("comparing", None) as advance:
        if second is None:
            outcome = verify(locate(first), options, progress=advance)
        else:
            outcome = compare(locate(first), locate(second), options, progress=advance)
    report(outcome, f"{first} and {second}" if second else f"{first} against its manifest")


def report(outcome: Outcome, what: str) -> None:
    """Print what was found; ends the program with exit code 1 if something differs."""
    for finding in outcome.findings[:MOST_LINES]:
        print(f"{finding.verdict}: {finding.name}" + f" ({finding.detail})" * bool(finding.detail))
    more = len(outcome.findings) - MOST_LINES
    if more > 0:
        kinds = Counter(finding.verdict for finding in outcome.findings[MOST_LINES:])
        print("and " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    for name, (nan, infinite) in list(outcome.not_numbers.items())[:MOST_LINES]:
        print(f"warning: {name} holds {nan} NaN and {infinite} infinite values")
    equal = f"{outcome.tensors} tensors are equal bit for bit"
    if not outcome.equal:
        print(f"DIFFERENT: {what}: {equal}, {len(outcome.findings)} are not")
        raise typer.Exit(1)
    print(f"EQUAL: {what}: {equal}")
