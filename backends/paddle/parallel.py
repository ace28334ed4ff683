"""The group of processes on paddle. Meaning: backends/contract.py.

`python -m paddle.distributed.launch --nproc_per_node N` sets PADDLE_TRAINER_ID,
PADDLE_TRAINERS_NUM and the address to meet at. When a process dies, the launcher ends the others
within seconds and fails; its log names the process and shows the end of its output.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from backends.errors import BackendError
from backends.paddle import _state, runtime

STRATEGIES = ("single", "ddp", "zero1")
"""single: one process. ddp: the whole module on every rank, gradients summed over the ranks.
zero1 (arXiv 1910.02054): the same, and the moments of a parameter are kept by one rank alone,
which updates it and sends it to the others."""
_INSTEAD = dict.fromkeys(
    ("zero2", "zero3", "fsdp"),
    "use zero1; what Paddle has for more (group_sharded_parallel) runs on accelerators only",
)
BUCKET_NUMBERS = 2**24
"""Most numbers of small tensors that are joined for one exchange."""

_ARRIVED = "unillava/arrived"
"""How often ranks have come to a meeting, all together: a counter in the store of the group."""
_meetings = itertools.count(1)
_patience = 1800.0


def world() -> tuple[int, int]:
    """(rank, size) from the environment of paddle.distributed.launch."""
    return (
        int(os.environ.get("PADDLE_TRAINER_ID", 0)),
        int(os.environ.get("PADDLE_TRAINERS_NUM", 1)),
    )


def check_strategy(strategy: str) -> None:
    """Raises BackendError: unknown, or not for as many processes as there are."""
    if strategy not in STRATEGIES:
        raise BackendError(
            f"strategy {strategy!r} is not supported by backend 'paddle'",
            expected=f"one of {', '.join(STRATEGIES)}",
            fix=_INSTEAD.get(strategy),
        )
    if strategy == "single" and world()[1] > 1:
        raise BackendError(
            f"strategy 'single' with {world()[1]} processes",
            expected="one process",
            fix=f"use one of {', '.join(STRATEGIES[1:])}",
        )


def start(strategy: str, timeout: float = 1800.0) -> None:
    """Join the processes that the launcher started."""
    global _patience
    check_strategy(strategy)
    _, size = world()
    if size == 1 or dist.is_initialized():
        return
    _patience = timeout
    os.environ.setdefault("PADDLE_PG_TIMEOUT", str(int(timeout * 1000)))
    _take_own_device()
    # It prints which of Paddle's flags runtime.setup has changed.
    with contextlib.redirect_stderr(io.StringIO()):
        dist.init_parallel_env()


def _take_own_device() -> None:
    """The accelerator that the launcher chose for this process; gloo on cpu."""
    kind = _state.device.split(":")[0]
    if kind == "cpu":
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        return
    number = os.environ.get(f"FLAGS_selected_{kind}s", os.environ.get("PADDLE_LOCAL_RANK", "0"))
    runtime.setup(f"{kind}:{number}", _state.dtype, "auto" if _state.fused else "portable")


def _meet() -> None:
    """Wait until every rank has come here, on cpu, as long as `start` was told.

    An exchange by gloo gives up after 30 seconds, which Paddle does not let one change: less than
    a rank takes that compiles or writes a checkpoint. Accelerators keep PADDLE_PG_TIMEOUT.
    """
    if _state.device != "cpu":
        return
    store = paddle.base.core.create_or_get_global_tcp_store()
    everybody = next(_meetings) * world()[1]
    end, pause = time.monotonic() + _patience, 1e-4
    arrived = store.add(_ARRIVED, 1)
    while arrived < everybody:
        if time.monotonic() > end:
            raise BackendError(
                f"rank {world()[0]} has waited {_patience:.0f} s for the others in vain",
                fix="see the logs of the other ranks; or allow more time",
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
        arrived = store.add(_ARRIVED, 0)


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes, in place, its sum over the ranks."""
    _exchange(dist.all_reduce, tensors)


def send_tensors(tensors: Sequence[Tensor], owner: int) -> None:
    """Each tensor becomes, in place, that of its owner."""
    _exchange(functools.partial(dist.broadcast, src=owner), tensors)


def _exchange(operation: Callable[[Tensor], Any], tensors: Sequence[Tensor]) -> None:
    """What ranks do together with tensors, in place; small ones travel together."""
    if world()[1] == 1:
        return
    _meet()
    for bucket in _buckets(tensors):
        if len(bucket) == 1:
            operation(bucket[0])
            continue
        joined = paddle.concat([tensor.reshape([-1]) for tensor in bucket])
        operation(joined)
        parts = paddle.split(joined, [tensor.size for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.reshape(tensor.shape), False)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    numbers = BUCKET_NUMBERS
    for tensor in tensors:
        numbers += tensor.size
        if numbers > BUCKET_NUMBERS:
            buckets.append([])
            numbers = tensor.size
        buckets[-1].append(tensor)
    return buckets


def sum_over_ranks(array: np.ndarray) -> np.ndarray:
    """Added on the host, in the order of the ranks: no device adds 64-bit numbers everywhere."""
    _, size = world()
    if size == 1 or array.size == 0:
        return np.array(array)
    bits = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    gathered: list[Tensor] = []
    _meet()
    dist.all_gather(gathered, paddle.to_tensor(bits))
    stacked = np.stack([part.numpy() for part in gathered]).view(array.dtype)
    return stacked.sum(0).reshape(array.shape)


def barrier() -> None:
    """An exchange of one number."""
    sum_over_ranks(np.zeros(1, np.int64))


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()
