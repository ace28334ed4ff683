"""Weights in 8 or 4 bits: how they are stored, made and read back, in NumPy.

| kind | codes | scale, float32 | a weight is |
|---|---|---|---|
| int8 | int8 [O, I] | [O, 1] | code / 127 * scale |
| int4 | uint8 [O, I / 2] | [O, I / block] | (code - 8) / 7 * scale |
| nf4 | uint8 [O, I / 2] | [O, I / block] | NF4[code] * scale |

The scale is the largest magnitude of a row (int8) or of a block of a row (4 bits). Two codes share
a byte, the first in the upper half. NF4 is the 4-bit NormalFloat of QLoRA (arXiv 2305.14314,
appendix E); this is also how bitsandbytes lays it out, without its second quantisation of scales.
"""

from __future__ import annotations

import math

import numpy as np

KINDS = ("int8", "int4", "nf4")
BLOCK = 64
"""Weights of a row that share a scale in 4 bits; fewer where rows are no multiple of it."""
LEVELS: dict[str, tuple[float, ...]] = {
    "int4": tuple((code - 8) / 7 for code in range(16)),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip
"""4-bit code -> share of the scale."""
LARGEST = 127
"""Of an int8 code."""
CHUNK = 2**22
"""Weights that `quantise` holds in float32 at a time."""


def block_of(in_features: int, kind: str) -> int:
    """How many weights of a row share a scale."""
    return in_features if kind == "int8" else math.gcd(in_features, BLOCK)


def layout(
    in_features: int, out_features: int, kind: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of `codes` and `scale` of a weight [out, in].

    Raises:
        ValueError: rows of odd length cannot be packed in pairs.
    """
    blocks = in_features // block_of(in_features, kind)
    if kind == "int8":
        codes = ((out_features, in_features), "int8")
    elif in_features % 2 == 0:
        codes = ((out_features, in_features // 2), "uint8")
    else:
        raise ValueError(f"{kind} needs rows of even length, not {in_features}")
    return {"codes": codes, "scale": ((out_features, blocks), "float32")}


def pairs(kind: str) -> np.ndarray:
    """Byte -> the two levels that it holds, float32 [256, 2]."""
    levels, byte = np.array(LEVELS[kind], np.float32), np.arange(256)
    return np.stack([levels[byte >> 4], levels[byte & 15]], 1)


def quantise(weight_OI: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale) nearest to a weight [O, I], of float dtype or uint16 holding bfloat16."""
    (rows, columns) = weight_OI.shape
    table = layout(columns, rows, kind)
    codes, scale = (np.empty(shape, dtype) for shape, dtype in table.values())
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes[part], scale[part] = _quantise(_float32(weight_OI[part]), kind, scale.shape[1])
    return codes, scale


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _quantise(weight_OI: np.ndarray, kind: str, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = weight_OI.shape
    parts_OGN = weight_OI.reshape(rows, blocks, -1)
    scale_OG = np.abs(parts_OGN).max(-1)
    share_OGN = parts_OGN / np.where(scale_OG == 0, np.float32(1), scale_OG)[..., None]
    if kind == "int8":
        return np.rint(share_OGN * LARGEST).astype(np.int8).reshape(rows, columns), scale_OG
    levels = np.array(LEVELS[kind], np.float32)
    borders = (levels[1:] + levels[:-1]) / 2
    codes_OI = np.searchsorted(borders, share_OGN).astype(np.uint8).reshape(rows, columns)
    return codes_OI[:, ::2] << 4 | codes_OI[:, 1::2], scale_OG


def dequantise(codes: np.ndarray, scale_OG: np.ndarray, kind: str) -> np.ndarray:
    """The weight [O, I] that codes stand for, in the dtype of the scale."""
    rows, blocks = scale_OG.shape
    share = codes / LARGEST if kind == "int8" else pairs(kind)[codes]
    return (share.reshape(rows, blocks, -1) * scale_OG[..., None]).reshape(rows, -1)
