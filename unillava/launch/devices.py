"""What each kind of device wants: its name in each framework, and environment variables.

Sources: MindFormers' and PaddleMIX' guides for Ascend 910B (Atlas 800T A2); CANN's HCCL variables.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, Mapping[str, str]] = {
    "torch": {"a100": "cuda:0", "ascend910b": "npu:0", "cpu": "cpu"},
    "mindspore": {"ascend910b": "ascend", "cpu": "cpu"},
    "paddle": {"a100": "gpu:0", "ascend910b": "npu:0", "cpu": "cpu"},
}
"""Backend -> device -> what `unillava train --device` takes; a worker turns 0 into its own."""

VISIBLE = {"a100": "CUDA_VISIBLE_DEVICES", "ascend910b": "ASCEND_RT_VISIBLE_DEVICES"}
"""The variable that says which cards a run may use."""

_HCCL = {
    # The ranks reach their first exchange minutes apart: each compiles before it.
    "HCCL_CONNECT_TIMEOUT": "1200",
}
_HCCL_BETWEEN_MACHINES = {
    # Sixteen ports from here on, outside those that the system hands out itself.
    "HCCL_IF_BASE_PORT": "64000",
}
_ENVIRONMENT: Mapping[tuple[str, str], Mapping[str, str]] = {
    # Samples differ in length: without this, memory falls into pieces that nothing fits in.
    ("torch", "ascend910b"): {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
    ("paddle", "a100"): {"FLAGS_allocator_strategy": "auto_growth"},
    ("paddle", "ascend910b"): {
        "FLAGS_allocator_strategy": "auto_growth",
        # NPU kernels want contiguous tensors in the usual formats.
        "FLAGS_use_stride_kernel": "0",
        "FLAGS_npu_storage_format": "0",
        # On-line compilation pays for fixed shapes alone; batches differ in length.
        "FLAGS_npu_jit_compile": "0",
        "FLAGS_npu_scale_aclnn": "True",
        "FLAGS_npu_split_aclnn": "True",
        "CUSTOM_DEVICE_BLACK_LIST": "set_value,set_value_with_tensor",
    },
    ("paddle", "cpu"): {"PADDLE_DISTRI_BACKEND": "gloo"},
}


def environment(backend: str, device: str, processes: int, nodes: int, logs: str) -> dict[str, str]:
    """Variables for one machine; what the user has set himself goes before them.

    Args:
        backend, device: a pair of `NAMES`.
        processes: workers on this machine.
        nodes: machines.
        logs: folder of the run's logs.
    """
    values = dict(_ENVIRONMENT.get((backend, device), {}))
    if device in VISIBLE:
        values[VISIBLE[device]] = ",".join(map(str, range(processes)))
    if device == "ascend910b":
        # Otherwise CANN's logs fill the home folder.
        values |= _HCCL | {"ASCEND_PROCESS_LOG_PATH": f"{logs}/ascend"}
        values |= _HCCL_BETWEEN_MACHINES if nodes > 1 else {}
    return values
