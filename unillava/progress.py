"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Is called with what has been done since the last call."""


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Advance]:
    """A bar that vanishes at the end; yields what to call with each advance."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def no_bar(total: int) -> Iterator[Advance]:
    """Nothing, in the place of a bar."""
    yield lambda count: None
