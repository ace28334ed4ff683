"""Rotary tables in NumPy, computed once and shared by all backends, so that they cannot differ.

L positions, D head size. Tables hold each frequency twice (half-split form).
"""

from __future__ import annotations

import math

import numpy as np

from unillava.spec import RopeSpec, TextSpec


def rotary_tables(
    spec: TextSpec, length: int, prompt_length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position below `length`, float32 [L, D].

    `prompt_length` matters to dynamic NTK alone: the prompt is read with the base of its own
    length, and each later position with the base of the length reached there, as
    transformers' generation does. None: everything is read at once (training, scoring).

    Angles are formed in float32, as the frameworks' models do: at position p the angle carries
    the rounding that the weights were trained with.
    """
    prompt_length = length if prompt_length is None else min(prompt_length, length)
    frequencies = inverse_frequencies(spec, prompt_length)
    positions = np.arange(length, dtype=np.float32)
    angles = positions[:, None] * frequencies[None]
    if spec.rope.kind == "dynamic":
        # Below the limit the base does not move, so only later rows need their own.
        for p in range(max(prompt_length, spec.rope.original_max_position), length):
            angles[p] = np.float32(p) * inverse_frequencies(spec, p + 1)
    angles = np.concatenate([angles, angles], -1).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def inverse_frequencies(spec: TextSpec, length: int) -> np.ndarray:
    """Angle per position of each pair of a head, float32 [D / 2], for a sequence of `length`.

    linear: arXiv 2306.15595; dynamic NTK and llama3: as in transformers' modeling_rope_utils.
    """
    rope = spec.rope
    theta = _dynamic_base(rope, spec.head_dim, length) if rope.kind == "dynamic" else rope.theta
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _dynamic_base(rope: RopeSpec, head_dim: int, length: int) -> float:
    limit = rope.original_max_position
    if length <= limit:
        return rope.theta
    stretch = rope.factor * length / limit - (rope.factor - 1)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def _llama3(frequencies: np.ndarray, rope: RopeSpec) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1).astype(np.float32)
    return ((1 - blend) * frequencies / np.float32(rope.factor) + blend * frequencies).astype(
        np.float32
    )
