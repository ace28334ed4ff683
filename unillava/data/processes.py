"""The same work for many records, in several processes, with results in order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from unillava.errors import DataError

TASK = 32
"""Records that a worker process takes at a time."""

Result = TypeVar("Result")

_work: Callable[[int], Any] | None = None
"""What a worker process does with the number of a record."""


def for_each(
    make: Callable[[], Callable[[int], Result]], numbers: Sequence[int], workers: int
) -> Iterator[Result]:
    """`work(number)` for each number, in order.

    Args:
        make: makes `work`, once in every process; it is sent there, so it can be pickled.
        numbers: of records.
        workers: processes; 0: this one alone.

    Raises:
        DataError: a worker process dies. What `work` raises comes through.
    """
    if not workers:
        yield from map(make(), numbers)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (make,))
    try:
        waiting: deque[tuple[int, Future[list[Result]]]] = deque()
        for first in range(0, len(numbers), TASK):
            task = numbers[first : first + TASK]
            waiting.append((task[0], pool.submit(_do, task)))
            if len(waiting) > 4 * workers:
                yield from _result(*waiting.popleft())
        while waiting:
            yield from _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make: Callable[[], Callable[[int], Any]]) -> None:
    global _work
    _work = make()


def _do(numbers: Sequence[int]) -> list[Any]:
    return [_work(number) for number in numbers]


def _result(first: int, future: Future[list[Result]]) -> list[Result]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process has died",
            given=f"at about record {first}",
            expected="enough memory for every worker",
            fix="use fewer workers, or look at the records around that one",
        ) from error
