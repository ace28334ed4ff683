"""Device, memory, gradients and compilation on torch. Meaning: backends/contract.py."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint

from backends.errors import BackendError
from backends.process import available_bytes, peak_resident_bytes, processor_name
from backends.torch import native, ops

if importlib.util.find_spec("torch_npu"):
    # Registers the device type `npu` with torch.
    importlib.import_module("torch_npu")

_STATE: dict[str, Any] = {"device": None, "dtype": "float32"}


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for package in ("torch_npu", "flash_attn", "deepspeed"):
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    return found


def devices() -> list[str]:
    names = []
    for kind in ("cuda", "npu", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            names += [f"{kind}:{n}" for n in range(module.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def supported_dtypes(device: str) -> list[str]:
    kind = device.split(":")[0]
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ["float16", "float32"]
    if kind == "cpu":
        return ["float32", "bfloat16", "float16"]
    return ["bfloat16", "float16", "float32"]


def setup(device: str, dtype: str, kernels: str = "auto") -> None:
    known = devices()
    # "cuda" means the first of its kind; "cuda:1" must be there.
    matching = [name for name in known if name == device or name.split(":")[0] == device]
    if not matching:
        raise BackendError(
            f"device {device!r} is not available to backend 'torch'",
            expected=f"one of {', '.join(known)}",
            fix="pass --device with one of these; `unillava doctor` shows what is here",
        )
    if dtype not in supported_dtypes(matching[0]):
        raise BackendError(
            f"dtype {dtype!r} is not supported by backend 'torch' on device {device!r}",
            expected=f"one of {', '.join(supported_dtypes(matching[0]))}",
            fix="pass --dtype with one of these",
        )
    _STATE.update(device=matching[0], dtype=dtype)
    ops.DEVICE, ops.FUSED = torch.device(matching[0]), kernels == "auto"
    ops.COMPUTE = ops.DTYPES[dtype]
    if ops.DEVICE.type in ("cuda", "npu", "xpu"):
        getattr(torch, ops.DEVICE.type).set_device(ops.DEVICE)


def current() -> tuple[str | None, str]:
    return _STATE["device"], _STATE["dtype"]


def seed(value: int) -> None:
    torch.manual_seed(value)


def tensor(array: np.ndarray) -> torch.Tensor:
    kinds = {"f": ops.COMPUTE, "i": torch.int64, "u": torch.int64, "b": torch.bool}
    return torch.from_numpy(np.ascontiguousarray(array)).to(ops.DEVICE, kinds[array.dtype.kind])


def tensor32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(ops.DEVICE)


def numpy(x: torch.Tensor) -> np.ndarray:
    x = x.detach()
    if x.is_floating_point():
        x = x.float()
    return x.cpu().numpy()


def build(factory: Callable[[], Any]) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(ops.COMPUTE)
    try:
        with torch.device("meta"):
            return factory().eval()
    finally:
        torch.set_default_dtype(before)


def parameter_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def assign(module: torch.nn.Module, name: str, array: np.ndarray, bfloat16: bool = False) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    # view: NumPy has no bfloat16, so its bits travel as integers.
    value = torch.from_numpy(array.view(np.int16) if bfloat16 else array)
    value = value.view(torch.bfloat16) if bfloat16 else value
    held = getattr(owner, leaf)
    if hasattr(held, "device_mesh"):
        held.detach().to_local().copy_(native.own_rows(held, value))
        return
    if not held.is_meta:
        # In place: an engine or a compiled function may hold on to the parameter.
        held.data.copy_(value)
        return
    # copy=True: the array may be a view of a memory-mapped file.
    value = value.to(device=ops.DEVICE, dtype=held.dtype, copy=True)
    setattr(owner, leaf, torch.nn.Parameter(value, requires_grad=held.requires_grad))


def fetch(module: torch.nn.Module, name: str) -> np.ndarray:
    # A copy: on the host `numpy` gives a view, and parameters are changed in place.
    return np.array(numpy(module.get_parameter(name)))


def set_trained(module: torch.nn.Module, names: Collection[str]) -> None:
    trained = set(names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            parameter.data = parameter.data.float()
        trained.discard(name)
    if trained:
        raise BackendError(
            "these cannot be trained: the module has no such parameters", given=sorted(trained)[:5]
        )


def no_grad() -> Any:
    return torch.inference_mode()


def value_and_grad(
    function: Callable[..., torch.Tensor], module: torch.nn.Module
) -> Callable[..., tuple[float, dict[str, np.ndarray]]]:
    def run(*args: torch.Tensor) -> tuple[float, dict[str, np.ndarray]]:
        parameters = dict(module.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        with torch.enable_grad():
            value = function(*args)
            found = torch.autograd.grad(value, trained.values(), allow_unused=True)
        gradients = {n: numpy(g) for n, g in zip(trained, found, strict=True) if g is not None}
        zeros = {n: np.zeros(tuple(p.shape), np.float32) for n, p in parameters.items()}
        return value.item(), zeros | gradients

    return run


def grad_of(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> list[np.ndarray]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in args]
    gradients = torch.autograd.grad(function(*leaves), [x for x in leaves if x.requires_grad])
    return [numpy(g) for g in gradients]


def recompute(layer: torch.nn.Module) -> None:
    layer.forward = functools.partial(
        torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False
    )


def watch(
    module: torch.nn.Module, callback: Callable[[str, torch.Tensor], None]
) -> Callable[[], None]:
    def hook_for(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                callback(name, output)

        return hook

    handles = [m.register_forward_hook(hook_for(n)) for n, m in module.named_modules() if n]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def synchronize() -> None:
    module = getattr(torch, ops.DEVICE.type)
    if hasattr(module, "synchronize"):
        module.synchronize()


def peak_memory() -> int:
    if ops.DEVICE.type in ("cuda", "npu", "xpu"):
        return getattr(torch, ops.DEVICE.type).max_memory_allocated()
    return peak_resident_bytes()


def device_name() -> str:
    if ops.DEVICE.type in ("cuda", "npu", "xpu"):
        return getattr(torch, ops.DEVICE.type).get_device_name(ops.DEVICE)
    return processor_name()


def device_memory() -> int | None:
    if ops.DEVICE.type in ("cuda", "npu", "xpu"):
        module = getattr(torch, ops.DEVICE.type)
        return module.get_device_properties(ops.DEVICE).total_memory
    return available_bytes()
