"""Pictures that look like photographs, and specs with the geometry of released models."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from unillava.spec import LlavaSpec, ProjectorSpec, TextSpec, VideoSpec, VisionSpec

# As v1.6 writes them: (width, height).
FIVE_WH = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

_TEXT = TextSpec("llama", 64, 8, 8, 1, 1, 1, 8, "silu", 1e-5, 4096)


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB: smooth light, hard edges and sensor noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    light = np.stack([x, y, 1 - (x + y) / 2], axis=-1) * 200
    edges = 55 * ((x * 7).astype(int) % 2 ^ (y * 5).astype(int) % 2)
    noise = rng.normal(0, 12, (height, width, 3))
    values = light + edges[..., None] + noise
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def spec(
    mode: str = "anyres",
    *,
    tower: str = "clip",
    image_size: int = 336,
    patch_size: int = 14,
    pinpoints_hw: tuple[tuple[int, int], ...] = FIVE_WH,
    video: VideoSpec | None = None,
    **fields: Any,
) -> LlavaSpec:
    """A spec whose image side is real and whose text side is tiny."""
    vision = VisionSpec(tower, 32, 64, 2, 2, image_size, patch_size, "gelu", 1e-5)
    anyres = mode == "anyres"
    values = {
        "family": "llava_next_video" if video else "llava_next",
        "image_mode": mode,
        "grid_pinpoints": pinpoints_hw if anyres else (),
        "unpad": anyres,
        "has_newline": anyres,
        "video": video,
    }
    return LlavaSpec(
        vision=vision, text=_TEXT, projector=ProjectorSpec(2, 32, 8), **(values | fields)
    )
