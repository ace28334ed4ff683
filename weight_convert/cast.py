"""Changing the dtype of floating-point tensors: the only operation that may lose bits.

bfloat16 is the upper half of float32 (rounded to nearest, ties to even, as all frameworks do);
NumPy does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weight_convert.errors import CheckpointError
from weight_convert.mapping import derive
from weight_convert.storage.tensor import FLOATS, Tensor

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_name(name: str) -> str:
    """`float32`, `float16` or `bfloat16` from any usual spelling.

    Raises:
        CheckpointError: it is none of them.
    """
    full = ALIASES.get(name, name.removeprefix("torch."))
    if full not in CODES:
        raise CheckpointError(
            "there is no such dtype to convert to", given=name, expected=", ".join(CODES)
        )
    return full


def cast_all(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Floating-point tensors in another dtype; all others as they are.

    Args:
        tensors: name -> tensor.
        dtype: float32, float16 or bfloat16.
    """
    return {name: cast(tensor, CODES[dtype]) for name, tensor in tensors.items()}


def cast(tensor: Tensor, code: str) -> Tensor:
    """One tensor in another floating-point dtype; not a floating-point one: as it is.

    Args:
        tensor: of any dtype.
        code: F32, F16 or BF16.
    """
    if tensor.dtype == code or tensor.dtype not in FLOATS:
        return tensor
    source = tensor.dtype
    return derive(
        [tensor],
        tensor.shape,
        lambda array: from_float(to_float(array, source), code),
        f"cast to {code}",
        code,
    )


def to_float(array: np.ndarray, code: str) -> np.ndarray:
    """The values of a floating-point tensor: float64 stays, everything else as float32.

    Args:
        array: as `Tensor.read` gives it.
        code: its dtype code.
    """
    if code == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array if code == "F64" else array.astype(np.float32, copy=False)


def from_float(values: np.ndarray, code: str) -> np.ndarray:
    """float32 or float64 values in the dtype of a file; bfloat16 as uint16.

    Values beyond the range become infinite, as in the frameworks.
    """
    with np.errstate(over="ignore"):
        if code == "BF16":
            return _round_to_bfloat16(values.astype(np.float32, copy=False))
        return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[code])


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Rounding could carry a NaN over into infinity or zero: keep its sign, make it quiet.
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = ((bits[nan] >> 16) | 0x0040).astype(np.uint16)
    return rounded
