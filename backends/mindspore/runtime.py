"""Device, memory, gradients and compilation on MindSpore. Meaning: backends/contract.py."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Collection
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint
from mindspore.common import _no_grad
from mindspore.common.np_dtype import bfloat16 as numpy_bfloat16

from backends.errors import BackendError
from backends.mindspore import nn, ops
from backends.process import available_bytes, peak_resident_bytes, processor_name

_STATE: dict[str, Any] = {"device": None, "dtype": "float32", "setups": 0}

_TARGETS = {"cpu": "CPU", "ascend": "Ascend", "npu": "Ascend", "gpu": "GPU", "cuda": "GPU"}
"""Spelling of a device kind -> MindSpore's name of it."""

_DTYPES = {
    "CPU": ["float32", "float16"],  # there is no bfloat16 matrix product
    "Ascend": ["bfloat16", "float16", "float32"],
    "GPU": ["float16", "float32"],
}

_NUMPY = {
    ms.float32: np.float32,
    ms.float16: np.float16,
    ms.bfloat16: numpy_bfloat16,
    ms.int8: np.int8,
    ms.uint8: np.uint8,
}

# --- device and dtype ------------------------------------------------------------------------


def versions() -> dict[str, str]:
    return {"mindspore": importlib.metadata.version("mindspore")}


def devices() -> list[str]:
    names = []
    if ms.device_context.ascend.is_available():
        names += [f"ascend:{n}" for n in range(ms.device_context.ascend.device_count())]
    # Where there is no such driver, asking MindSpore about GPUs prints errors.
    if os.path.exists("/dev/nvidiactl") and ms.device_context.gpu.is_available():
        names += [f"gpu:{n}" for n in range(ms.device_context.gpu.device_count())]
    return [*names, "cpu"]


def supported_dtypes(device: str) -> list[str]:
    return list(_DTYPES[_TARGETS[_canonical(device).split(":")[0]]])


def _canonical(device: str) -> str:
    """A device by the name that `devices` gives it: `Ascend`, `npu:0` … are `ascend:0`.

    A process that msrun started takes the one that msrun gave it, whichever was named.
    """
    kind, _, index = device.lower().partition(":")
    target = _TARGETS.get(kind, kind)
    if (target, index or "0") == ("CPU", "0"):
        return "cpu"
    own = os.environ.get("DEVICE_ID") if "MS_ROLE" in os.environ else None
    return f"{target.lower()}:{own or index or 0}"


def setup(device: str, dtype: str, kernels: str = "auto") -> None:
    name, known = _canonical(device), devices()
    if name not in known:
        raise BackendError(
            f"device {device!r} is not available to backend 'mindspore'",
            expected=f"one of {', '.join(known)}",
            fix="pass --device with one of these; `unillava doctor` shows what is here",
        )
    if dtype not in supported_dtypes(name):
        raise BackendError(
            f"dtype {dtype!r} is not supported by backend 'mindspore' on device {device!r}",
            expected=f"one of {', '.join(supported_dtypes(name))}",
            fix="pass --dtype with one of these",
        )
    if _STATE["device"] != name:
        _set_device(name)
    _STATE.update(device=name, dtype=dtype, setups=_STATE["setups"] + 1)
    ops.FUSED = name.startswith("ascend") and kernels == "auto"
    ops.WIDE = ms.float64 if name == "cpu" else ms.float32
    nn.DTYPE = ops.DTYPES[dtype]


def _set_device(name: str) -> None:
    kind, _, index = name.partition(":")
    try:
        ms.set_device(_TARGETS[kind], int(index) if index else None)
    except RuntimeError as error:
        raise BackendError(
            f"MindSpore cannot take device {name!r}",
            given=str(error).strip().splitlines()[0],
            fix="if this process has already run on another device, start a new one",
        ) from error
    if kind == "cpu":
        # Eager mode's queue of kernels pays on an accelerator only. Without it small kernels run
        # several times faster on few cores, and an error surfaces at the call that made it.
        ms.runtime.launch_blocking()
        # Otherwise MindSpore starts 25 threads, which fight for the cores.
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(wanted) if wanted.isdigit() else os.cpu_count() or 1
        ms.device_context.cpu.op_tuning.threads_num(max(threads, 1))


def current() -> tuple[str | None, str]:
    return _STATE["device"], _STATE["dtype"]


def seed(value: int) -> None:
    ms.set_seed(value)


# --- NumPy in and out ------------------------------------------------------------------------


def tensor(array: np.ndarray) -> Tensor:
    kinds = {"f": nn.DTYPE, "i": ms.int64, "u": ms.int64, "b": ms.bool_}
    return Tensor(np.ascontiguousarray(array), kinds[array.dtype.kind])


def tensor32(array: np.ndarray) -> Tensor:
    return Tensor(np.ascontiguousarray(array, np.float32))


def numpy(x: Tensor) -> np.ndarray:
    if x.dtype in (ms.float16, ms.bfloat16):
        x = x.float()
    return x.asnumpy()


# --- parameters ------------------------------------------------------------------------------


def build(factory: Callable[[], Any]) -> Any:
    return factory().set_train(False)


def parameter_shapes(module: ms.nn.Cell) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.parameters_and_names()}


def _parameter(module: ms.nn.Cell, name: str) -> Parameter:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_sub_cell(path), leaf)


def set_trained(module: ms.nn.Cell, names: Collection[str]) -> None:
    parameters = dict(module.parameters_and_names())
    unknown = sorted(set(names) - set(parameters))
    if unknown:
        raise BackendError(
            f"the module has no parameter {unknown[0]!r}",
            expected="canonical names, as runtime.parameter_shapes gives them",
        )
    for parameter in parameters.values():
        parameter.requires_grad = False
    for name in names:
        _parameter(module, name).requires_grad = True
        if parameters[name].dtype != ms.float32:
            path, _, leaf = name.rpartition(".")
            empty = mint.empty(parameters[name].shape, dtype=ms.float32, device="meta")
            setattr(module.get_sub_cell(path), leaf, Parameter(empty, parameters[name].name))


def assign(module: ms.nn.Cell, name: str, array: np.ndarray, bfloat16: bool = False) -> None:
    parameter = _parameter(module, name)
    if tuple(parameter.shape) != array.shape:
        raise BackendError(
            f"parameter {name!r} cannot take this array",
            given=f"shape {array.shape}",
            expected=f"shape {tuple(parameter.shape)}",
        )
    value = Tensor.from_numpy(_native(array, bfloat16, parameter.dtype))
    if parameter.is_meta:
        parameter.set_data(value)
    else:
        # In place: a graph that is already compiled holds on to the parameter's storage.
        parameter.copy_(value)


def _native(array: np.ndarray, bfloat16: bool, dtype: Any) -> np.ndarray:
    """A new array of this MindSpore dtype."""
    if bfloat16 and dtype == ms.bfloat16:
        return array.view(numpy_bfloat16).copy()
    if bfloat16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(_NUMPY[dtype], order="C", copy=True)


def fetch(module: ms.nn.Cell, name: str) -> np.ndarray:
    # A copy: `asnumpy` may look into the parameter's own storage, which `assign` overwrites.
    return numpy(_parameter(module, name)).copy()


# --- gradients -------------------------------------------------------------------------------


def no_grad() -> Any:
    return _no_grad()


def value_and_grad(
    function: Callable[..., Tensor], module: ms.nn.Cell
) -> Callable[..., tuple[float, dict[str, np.ndarray]]]:
    def run(*args: Tensor) -> tuple[float, dict[str, np.ndarray]]:
        names, parameters = zip(*module.parameters_and_names(), strict=True)
        graded = ms.value_and_grad(function, None, ms.ParameterTuple(parameters))
        value, gradients = graded(*args)
        return float(numpy(value)), {
            name: numpy(g) for name, g in zip(names, gradients, strict=True)
        }

    return run


def grad_of(function: Callable[..., Tensor], *args: Tensor) -> list[np.ndarray]:
    places = tuple(n for n, x in enumerate(args) if x.is_floating_point())
    gradients = ms.grad(function, places)(*args)
    # For a single place MindSpore returns the gradient itself.
    return [numpy(g) for g in ([gradients] if len(places) == 1 else gradients)]


def recompute(layer: ms.nn.Cell) -> None:
    layer.recompute()


# --- watching and compiling ------------------------------------------------------------------


def watch(module: ms.nn.Cell, callback: Callable[[str, Tensor], None]) -> Callable[[], None]:
    def hook_for(name: str) -> Callable[..., None]:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                callback(name, output)

        return hook

    handles = [c.register_forward_hook(hook_for(n)) for n, c in module.cells_and_names() if n]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    graphs: dict[int, Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        # A graph keeps the value that ops.FUSED had when it was made.
        setups = _STATE["setups"]
        if setups not in graphs:
            graphs.clear()
            graphs[setups] = _jit(function)
        return graphs[setups](*[_variable(x) for x in args])

    return run


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    # Around the function, not on it: jit of a cell's bound method replaces the graph that
    # MindSpore keeps for the whole cell, and other graphs then call the wrong method.
    def graph(*args: Any) -> Any:
        return function(*args)

    return ms.jit(graph)


def _variable(argument: Any) -> Any:
    """Tensors in a tuple or list are constants to jit unless it is told otherwise."""
    return ms.mutable(argument) if isinstance(argument, tuple | list) else argument


def synchronize() -> None:
    if _STATE["device"] != "cpu":  # there, launch_blocking leaves nothing to wait for
        ms.runtime.synchronize()


def peak_memory() -> int:
    if _STATE["device"] != "cpu":
        return ms.runtime.max_memory_allocated()
    return peak_resident_bytes()


def device_name() -> str:
    if _STATE["device"] != "cpu":
        return ms.hal.get_device_name(_device_number())
    return processor_name()


def device_memory() -> int | None:
    if _STATE["device"] == "cpu":
        return available_bytes()
    # 0 on Ascend before the device has been used.
    return ms.hal.get_device_properties(_device_number()).total_memory or None


def _device_number() -> int:
    return int(_STATE["device"].rpartition(":")[2])
