"""The group of processes on MindSpore. Meaning: backends/contract.py.

`msrun` starts the workers and one process more, the scheduler, with the same command. It never
returns from `start`: it serves the workers there and ends with them. So call `start` before
anything that only one process may do.
"""

from __future__ import annotations

import os

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication
from mindspore import ops as F

from backends.errors import BackendError

STRATEGIES = ("single", "ddp", "zero1")
"""single: one process. ddp: data parallel, gradients summed by AllReduce. zero1 (arXiv 1910.02054):
the same, and each rank keeps the moments of its share of every tensor alone."""

_GIVEN_UP = 10
"""Seconds without a sign of life after which the scheduler gives a worker up. Until then msrun
does not return, although it sees at once that a worker has died, and ends the others."""


def world() -> tuple[int, int]:
    """(rank, size) from msrun's environment. The scheduler is given (0, size)."""
    if "MS_ROLE" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK_ID", 0)), int(os.environ["MS_WORKER_NUM"])


def check(strategy: str) -> None:
    """Raise BackendError unless this is a strategy for as many processes as there are."""
    _, size = world()
    if strategy not in STRATEGIES:
        raise BackendError(
            f"strategy {strategy!r} is not supported by backend 'mindspore'",
            expected=f"one of {', '.join(STRATEGIES)}",
        )
    if strategy == "single" and size > 1:
        raise BackendError(
            "strategy 'single' is for one process",
            given=f"{size} processes",
            expected=f"one of {', '.join(STRATEGIES[1:])}",
        )


def start(strategy: str, timeout: float = 1800.0) -> None:
    """Join the processes that msrun started; the scheduler does not come back."""
    check(strategy)
    _, size = world()
    if size == 1:
        return
    scheduler = os.environ["MS_ROLE"] == "MS_SCHED"
    # The same variable says how long an exchange on CPU waits (30 s without it).
    os.environ.setdefault("MS_NODE_TIMEOUT", str(_GIVEN_UP if scheduler else int(timeout)))
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(int(timeout)))
    communication.init()


def gather(array: np.ndarray) -> np.ndarray:
    """The arrays that all ranks give, stacked, [ranks, …], bit by bit; dtypes of 4 or 8 bytes."""
    if world()[1] == 1:
        return array[None].copy()
    bits = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    stacked = F.AllGather()(Tensor(bits, ms.int32)).asnumpy()
    return stacked.view(array.dtype).reshape(-1, *array.shape)


def sum_over_ranks(array: np.ndarray) -> np.ndarray:
    """Added on the host, in the order of the ranks: no device adds 64-bit numbers everywhere."""
    return gather(array).sum(0)


def barrier() -> None:
    """An exchange of one number."""
    gather(np.zeros(1, np.int64))


def stop() -> None:
    """Leave the group."""
    if communication.GlobalComm.INITED:
        communication.release()
