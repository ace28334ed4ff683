"""Device, memory, gradients and compilation on torch. Meaning: backends/contract.py."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint

from backends.errors import BackendError
from backends.process import peak_resident_bytes
from backends.torch import ops

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
    if ops.DEVICE.type in ("cuda", "npu", "xpu"):
        getattr(torch, ops.DEVICE.type).set_device(ops.DEVICE)


def current() -> tuple[str | None, str]:
    return _STATE["device"], _STATE["dtype"]


def seed(value: int) -> None:
    torch.manual_seed(value)


def _compute_dtype() -> torch.dtype:
    return ops.DTYPES[_STATE["dtype"]]


def tensor(array: np.ndarray) -> torch.Tensor:
    kinds = {"f": _compute_dtype(), "i": torch.int64, "u": torch.int64, "b": torch.bool}
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
    torch.set_default_dtype(_compute_dtype())
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
    # copy=True: the array may be a view of a memory-mapped file.
    value = value.to(device=ops.DEVICE, dtype=_compute_dtype(), copy=True)
    trainable = getattr(owner, leaf).requires_grad
    setattr(owner, leaf, torch.nn.Parameter(value, requires_grad=trainable))


def fetch(module: torch.nn.Module, name: str) -> np.ndarray:
    return numpy(module.get_parameter(name))


def no_grad() -> Any:
    return torch.inference_mode()


def value_and_grad(
    function: Callable[..., torch.Tensor], module: torch.nn.Module
) -> Callable[..., tuple[float, dict[str, np.ndarray]]]:
    def run(*args: torch.Tensor) -> tuple[float, dict[str, np.ndarray]]:
        parameters = dict(module.named_parameters())
        with torch.enable_grad():
            value = function(*args)
            gradients = torch.autograd.grad(value, parameters.values(), allow_unused=True)
        return value.item(), {
            name: np.zeros(tuple(p.shape), np.float32) if g is None else numpy(g)
            for (name, p), g in zip(parameters.items(), gradients, strict=True)
        }

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
