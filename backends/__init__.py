"""The only room where a framework is imported. One process uses one framework.

    import backends
    backends.select("torch", device="cpu", dtype="float32")
    from backends import nn, ops, runtime      # those of the chosen framework

Without `select`, the first access to `nn`, `ops` or `runtime` chooses automatically:
`UNILLAVA_BACKEND`, else what is installed and which device is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

from backends.errors import BackendError

PACKAGES = {"torch": "torch", "mindspore": "mindspore", "paddle": "paddle"}
"""Backend name -> the package that must be importable."""
INSTALL = {
    "torch": 'pip install "unillava[torch]"',
    "mindspore": 'pip install "unillava[mindspore]"',
    "paddle": 'pip install "unillava[paddle]"',
}

NAME: str | None = None
"""The backend in force, None before the choice."""


def installed() -> list[str]:
    """Backends whose framework can be imported here; imports nothing."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


def select(
    name: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    kernels: str | None = None,
) -> ModuleType:
    """Choose the backend of this process and set its device and dtype; returns its runtime.

    Args:
        name: torch, mindspore, paddle or auto; None means UNILLAVA_BACKEND, else auto.
        device: as the framework names it; None takes the best that is there.
        dtype: float32, float16 or bfloat16 (also fp32, fp16, bf16); None takes float32.
        kernels: auto or portable; None means UNILLAVA_KERNELS, else auto.

    Raises:
        BackendError: unknown or not installed backend, another one already chosen, unknown
            device, unsupported dtype.
    """
    global NAME
    name = name or os.environ.get("UNILLAVA_BACKEND") or "auto"
    if name == "auto":
        name = NAME or _automatic()
    if name not in PACKAGES:
        raise BackendError(
            f"unknown backend {name!r}",
            expected=f"one of {', '.join(PACKAGES)}, auto",
            fix="pass --backend or set UNILLAVA_BACKEND to one of these",
        )
    if NAME not in (None, name):
        raise BackendError(
            f"backend {name!r} asked for, but this process already runs on {NAME!r}",
            expected="one backend per process",
            fix=f"start another process with --backend {name}",
        )
    if name not in installed():
        raise BackendError(
            f"backend {name!r} is not installed here",
            given=f"installed: {', '.join(installed()) or 'none'}",
            fix=INSTALL[name],
        )
    runtime = importlib.import_module(f"backends.{name}.runtime")
    NAME = name
    if device is not None or dtype is not None or kernels is not None or not runtime.current()[0]:
        _setup(runtime, device, dtype, kernels)
    return runtime


def _setup(runtime: ModuleType, device: str | None, dtype: str | None, kernels: str | None) -> None:
    device = device or runtime.current()[0] or runtime.devices()[0]
    kernels = kernels or os.environ.get("UNILLAVA_KERNELS") or "auto"
    if kernels not in ("auto", "portable"):
        raise BackendError(f"unknown kernels {kernels!r}", expected="auto or portable")
    runtime.setup(device, dtype_name(dtype or "float32"), kernels)


def dtype_name(text: str) -> str:
    """The full name of a floating dtype: fp32, bf16, half … are understood.

    Raises BackendError for anything else.
    """
    short = {
        "fp32": "float32", "float": "float32", "f32": "float32",
        "fp16": "float16", "half": "float16", "f16": "float16",
        "bf16": "bfloat16",
    }  # fmt: skip
    full = short.get(text, text)
    if full not in ("float32", "float16", "bfloat16"):
        raise BackendError(
            f"unknown dtype {text!r}", expected="float32, float16 or bfloat16 (fp32, fp16, bf16)"
        )
    return full


def _automatic() -> str:
    """An installed backend with an accelerator (torch, mindspore, paddle), else the first."""
    names = installed()
    if not names:
        raise BackendError(
            "no framework is installed",
            expected="at least one of torch, mindspore, paddlepaddle",
            fix=INSTALL["torch"],
        )
    if len(names) == 1:
        return names[0]
    # Importing a framework only to ask for its devices would break the one that follows
    # (they clash in one process), so the devices are looked for in the file system.
    if any(os.path.exists(node) for node in ("/dev/davinci0", "/dev/davinci_manager")):
        if importlib.util.find_spec("torch_npu") and "torch" in names:
            return "torch"
        return next(name for name in ("mindspore", "paddle", "torch") if name in names)
    return names[0]


def __getattr__(attribute: str) -> Any:
    if attribute in ("nn", "ops", "runtime", "training", "parallel"):
        if NAME is None or attribute == "runtime":
            select(NAME)
        return importlib.import_module(f"backends.{NAME}.{attribute}")
    raise AttributeError(f"module 'backends' has no attribute {attribute!r}")
