"""The group of processes on torch. Meaning: backends/contract.py.

torchrun (and DeepSpeed's launcher) set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR. Besides the
device's own backend every group has gloo for tensors on the host, so that counts and signals are
exchanged without waiting for the device.
"""

from __future__ import annotations

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from backends.errors import BackendError
from backends.torch import ops, runtime

STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")

_EXCHANGES = {
    "cpu": "gloo",
    "cuda": "cpu:gloo,cuda:nccl",
    "npu": "cpu:gloo,npu:hccl",
    "xpu": "cpu:gloo,xpu:xccl",
}


def world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(strategy: str, timeout: float = 1800.0) -> None:
    check_strategy(strategy)
    if strategy == "single" or dist.is_initialized():
        return
    rank, size = world()
    _take_own_device(size)
    if ops.DEVICE.type not in _EXCHANGES:
        raise BackendError(
            f"strategy {strategy!r} is not supported by backend 'torch' on {ops.DEVICE.type!r}",
            expected=f"a device of {', '.join(_EXCHANGES)}",
            fix="use --strategy single",
        )
    # Without a launcher a group of one needs no address to meet at.
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    dist.init_process_group(
        _EXCHANGES[ops.DEVICE.type],
        rank=rank,
        world_size=size,
        store=store,
        timeout=timedelta(seconds=timeout),
    )


def check_strategy(strategy: str) -> None:
    """Raises BackendError: unknown, or not for as many processes as there are."""
    if strategy not in STRATEGIES:
        raise BackendError(
            f"unknown strategy {strategy!r}", expected=f"one of {', '.join(STRATEGIES)}"
        )
    if strategy == "single" and world()[1] > 1:
        raise BackendError(
            f"strategy 'single' with {world()[1]} processes",
            expected="one process",
            fix=f"use one of {', '.join(STRATEGIES[1:])}",
        )


def _take_own_device(size: int) -> None:
    """The accelerator of this process's local rank; one process keeps the device it has."""
    if size == 1 or ops.DEVICE.index is None:
        return
    device = f"{ops.DEVICE.type}:{os.environ.get('LOCAL_RANK', 0)}"
    runtime.setup(device, runtime.current()[1], "auto" if ops.FUSED else "portable")


def sum_over_ranks(array: np.ndarray) -> np.ndarray:
    total = torch.from_numpy(np.array(array))
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.numpy()


def barrier() -> None:
    # On the host: dist.barrier would wait for the device, too.
    sum_over_ranks(np.zeros(1, np.int64))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
