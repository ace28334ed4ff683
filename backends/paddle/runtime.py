"""Device, memory, gradients and compilation on paddle. Meaning: backends/contract.py."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.distributed.fleet.utils import recompute as _recompute

from backends.errors import BackendError
from backends.paddle import _fused, _state
from backends.process import available_bytes, peak_resident_bytes, processor_name

DTYPES = ("bfloat16", "float16", "float32")
"""Floating dtypes, best first for inference."""


# --- device and dtype ------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"paddle": paddle.__version__}
    if paddle.is_compiled_with_cuda():
        found["cuda"] = paddle.version.cuda()
    return found


def devices() -> list[str]:
    names = []
    if paddle.is_compiled_with_cuda():
        names += [f"gpu:{n}" for n in range(paddle.device.cuda.device_count())]
    names += paddle.device.get_available_custom_device() or []
    return [*names, "cpu"]


def supported_dtypes(device: str) -> list[str]:
    return [dtype for dtype in DTYPES if _multiplies(_known_device(device), dtype)]


@functools.cache
def _multiplies(device: str, dtype: str) -> bool:
    """Whether a matrix product runs there: what no model can do without, and cpus lack in half."""
    before = paddle.device.get_device()
    try:
        paddle.device.set_device(device)
        one = paddle.ones([8, 8], dtype)
        paddle.matmul(one, one).astype("float32").numpy()
    except RuntimeError:
        return False
    finally:
        paddle.device.set_device(before)
    return True


def setup(device: str, dtype: str, kernels: str = "auto") -> None:
    name = _known_device(device)
    if dtype not in supported_dtypes(name):
        raise BackendError(
            f"dtype {dtype!r} is not supported by backend 'paddle' on device {device!r}",
            expected=f"one of {', '.join(supported_dtypes(name))}",
            fix="pass --dtype with one of these",
        )
    kind = name.split(":")[0]
    paddle.device.set_device(name)
    paddle.set_flags(
        {
            # Kernels of cpus and of custom devices copy strided views before they use them,
            # slowly; without views the transposing kernel writes the result at once.
            "FLAGS_use_stride_kernel": kind == "gpu",
            # A compiled graph of small ops runs faster in order than handed to many threads.
            "FLAGS_enable_pir_in_executor_trace_run": kind == "cpu",
        }
    )
    _state.device, _state.dtype, _state.fused = name, dtype, {}
    if kernels == "auto":
        _state.fused = _fused.choose(kind, dtype)


def _known_device(device: str) -> str:
    """Paddle's full name of the device: gpu:0 for gpu, cuda and cuda:0."""
    name, known = _paddle_name(device), devices()
    if name not in known:
        raise BackendError(
            f"device {device!r} is not available to backend 'paddle'",
            expected=f"one of {', '.join(known)}",
            fix="pass --device with one of these; `unillava doctor` shows what is here",
        )
    return name


def _paddle_name(device: str) -> str:
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return device
    return f"{'gpu' if kind == 'cuda' else kind}:{number or 0}"


def current() -> tuple[str | None, str]:
    return _state.device, _state.dtype


def seed(value: int) -> None:
    paddle.seed(value)


def synchronize() -> None:
    if _state.device != "cpu":
        paddle.device.synchronize()


def peak_memory() -> int:
    if _state.device != "cpu":
        return paddle.device.max_memory_allocated(_state.device)
    return peak_resident_bytes()


def device_name() -> str:
    return processor_name() if _state.device == "cpu" else _properties().name


def device_memory() -> int | None:
    return available_bytes() if _state.device == "cpu" else _properties().total_memory


def _properties() -> Any:
    """Of the device in force, which is none of the host."""
    if _state.device.startswith("gpu"):
        return paddle.device.cuda.get_device_properties(_state.device)
    return paddle.device.get_device_properties(_state.device)


# --- NumPy in and out ------------------------------------------------------------------------


def tensor(array: np.ndarray) -> Tensor:
    kind = np.asarray(array).dtype.kind
    if kind == "f":
        return _upload(array, _state.dtype)
    return paddle.to_tensor(np.asarray(array, bool if kind == "b" else np.int64))


def tensor32(array: np.ndarray) -> Tensor:
    return _upload(array, "float32")


def numpy(x: Tensor) -> np.ndarray:
    x = x.detach()
    if x.dtype in (paddle.float16, paddle.bfloat16):
        x = x.astype("float32")
    return x.numpy()


def _upload(array: np.ndarray, dtype: str | paddle.dtype) -> Tensor:
    """Float array -> a tensor of this dtype on the device. uint16 holds bfloat16 bits."""
    if np.asarray(array).dtype == np.float64:
        array = np.asarray(array, np.float32)
    x = paddle.to_tensor(array)
    wanted = getattr(paddle, dtype) if isinstance(dtype, str) else dtype
    return x if x.dtype == wanted else x.astype(wanted)


# --- parameters ------------------------------------------------------------------------------


def build(factory: Callable[[], Any]) -> Any:
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(_state.dtype)
    try:
        with paddle.LazyGuard():
            module = factory()
    finally:
        paddle.set_default_dtype(before)
    module.eval()
    return module


def parameter_shapes(module: paddle.nn.Layer) -> dict[str, tuple[int, ...]]:
    return {name: canonical_shape(p, turned) for name, p, turned in named_parameters(module)}


def assign(module: paddle.nn.Layer, name: str, array: np.ndarray, bfloat16: bool = False) -> None:
    parameter, turned = find(module, name)
    if bfloat16 != (array.dtype == np.uint16):
        raise BackendError(
            f"wrong dtype for {name!r}",
            given=f"{array.dtype} with bfloat16={bfloat16}",
            expected="uint16 bits with bfloat16=True, floats with bfloat16=False",
        )
    # The parameter takes over this memory: nothing is copied a second time.
    stored(name, array, parameter, turned)._share_buffer_to(parameter)


def stored(name: str, array: np.ndarray, parameter: Tensor, turned: bool) -> Tensor:
    """A canonical array as the parameter (or what belongs to it) is stored, in its dtype."""
    wanted = canonical_shape(parameter, turned)
    if array.shape != wanted:
        raise BackendError(f"wrong shape for {name!r}", given=array.shape, expected=wanted)
    value = _upload(array, parameter.dtype)
    return paddle.transpose(value, [1, 0]).contiguous() if turned else value


def fetch(module: paddle.nn.Layer, name: str) -> np.ndarray:
    return canonical(*find(module, name))


def named_parameters(module: paddle.nn.Layer) -> Iterator[tuple[str, Tensor, bool]]:
    """(canonical name, parameter, whether stored turned) of every parameter, each once."""
    seen = set()
    for path, layer in module.named_sublayers(include_self=True):
        for leaf, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{leaf}".lstrip("."), parameter, _is_turned(layer, leaf)


def _is_turned(layer: paddle.nn.Layer, leaf: str) -> bool:
    """Paddle's Linear stores [in, out] where the canonical orientation is [out, in]."""
    return isinstance(layer, paddle.nn.Linear) and leaf == "weight"


def find(module: paddle.nn.Layer, name: str) -> tuple[Tensor, bool]:
    path, _, leaf = name.rpartition(".")
    try:
        layer = functools.reduce(getattr, path.split(".") if path else [], module)
        return layer._parameters[leaf], _is_turned(layer, leaf)
    except (AttributeError, KeyError):
        raise BackendError(f"the module has no parameter {name!r}") from None


def canonical_shape(parameter: Tensor, turned: bool) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    return shape[::-1] if turned else shape


def canonical(x: Tensor, turned: bool) -> np.ndarray:
    """A parameter or its gradient as NumPy in canonical orientation."""
    # Files are written from these arrays, so they are contiguous.
    return np.ascontiguousarray(numpy(x).T) if turned else numpy(x)


# --- gradients -------------------------------------------------------------------------------


def set_trained(module: paddle.nn.Layer, names: Collection[str]) -> None:
    parameters = {name: p for name, p, _ in named_parameters(module)}
    unknown = sorted(set(names) - parameters.keys())
    if unknown:
        raise BackendError(
            "these cannot be trained: the module has no such parameters", given=unknown[:5]
        )
    for name, parameter in parameters.items():
        parameter.stop_gradient = name not in names
        if name in names and parameter.dtype != paddle.float32:
            _replace(module, parameter, _empty32(parameter))


def _empty32(parameter: Tensor) -> Tensor:
    """A float32 parameter like this one, without memory. A parameter cannot change its dtype."""
    with paddle.LazyGuard():
        return paddle.nn.Layer().create_parameter(parameter.shape, dtype="float32")


def _replace(module: paddle.nn.Layer, old: Tensor, new: Tensor) -> None:
    for layer in module.sublayers(include_self=True):
        for leaf, parameter in layer._parameters.items():
            if parameter is old:
                layer._parameters[leaf] = new


def no_grad() -> Any:
    return paddle.no_grad()


def value_and_grad(
    function: Callable[..., Tensor], module: paddle.nn.Layer
) -> Callable[..., tuple[float, dict[str, np.ndarray]]]:
    def run(*args: Tensor) -> tuple[float, dict[str, np.ndarray]]:
        parameters = list(named_parameters(module))
        learnt = [p for _, p, _ in parameters if not p.stop_gradient]
        with paddle.enable_grad():
            value = function(*args)
            found = paddle.grad(value, learnt, allow_unused=True) if learnt else []
        gradients = dict(zip(map(id, learnt), found, strict=True))
        return value.item(), {
            name: _gradient(gradients.get(id(p)), p, turned) for name, p, turned in parameters
        }

    return run


def _gradient(found: Tensor | None, parameter: Tensor, turned: bool) -> np.ndarray:
    if found is None:
        return np.zeros(canonical_shape(parameter, turned), np.float32)
    return canonical(found, turned)


def grad_of(function: Callable[..., Tensor], *args: Tensor) -> list[np.ndarray]:
    leaves = [x.detach() for x in args]
    floats = [x for x in leaves if x.is_floating_point()]
    for x in floats:
        x.stop_gradient = False
    return [numpy(g) for g in paddle.grad(function(*leaves), floats)]


def recompute(layer: paddle.nn.Layer) -> None:
    """As the contract says, in eager mode.

    Paddle has no recomputation of single layers in a compiled graph (only its automatic
    parallelism has): there the layer runs as it is, and a warning says so.
    """
    forward = layer.forward

    @functools.wraps(forward)
    def again(*args: Any, **named: Any) -> Any:
        if not paddle.in_dynamic_mode():
            warnings.warn(
                "Paddle's compiled graphs keep all activations: recompute works eagerly only",
                stacklevel=2,
            )
            return forward(*args, **named)
        # Hooks on saved tensors (not reentrant): gradients reach parameters also through
        # paddle.grad, and keyword arguments pass. There is no dropout, so no state to restore.
        return _recompute(forward, *args, use_reentrant=False, preserve_rng_state=False, **named)

    layer.forward = again


def _is_true_of_hooks(record: logging.LogRecord) -> bool:
    """Paddle says at each call that a block of frozen inputs need not be recomputed.

    That holds where parameters are frozen too; hooks serve parameters as well.
    """
    return "NO need to recompute" not in record.getMessage()


logging.getLogger("paddle.distributed.fleet.utils.log_util").addFilter(_is_true_of_hooks)


# --- observation and compilation -------------------------------------------------------------


def watch(module: paddle.nn.Layer, callback: Callable[[str, Tensor], None]) -> Callable[[], None]:
    def hook_for(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                callback(name, output)

        return hook

    handles = [
        layer.register_forward_post_hook(hook_for(name)) for name, layer in module.named_sublayers()
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Models have no control flow that depends on tensors, so the function is traced as it is;
    # rewriting its source, to_static's other half, could only misread it.
    @paddle.jit.not_to_static
    def as_it_is(args: list, named: dict) -> Any:
        return function(*args, **named)

    def traced(args: list, named: dict) -> Any:
        return as_it_is(args, named)

    # A graph first traced without gradients would have none later, silently: one for each.
    graphs = {mode: paddle.jit.to_static(traced, full_graph=True) for mode in (True, False)}

    @functools.wraps(function)
    def compiled(*args: Any, **named: Any) -> Any:
        return graphs[paddle.is_grad_enabled()](list(args), named)

    return compiled
