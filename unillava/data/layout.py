"""Which rows of the vision part stand where in the merged sequence: integer arithmetic only.

An image becomes one tile, or (anyres) a base tile followed by a grid of tiles that shows a larger
copy of it. Each tile yields `spec.rows_per_tile` projected rows; a frame of a video yields
`rows_per_frame`. The functions here say in which order those rows, and the newline row, follow
one another. Formulas: LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next), as
transformers' `modeling_llava_next` and the original repository compute them.

Suffixes: _hw (height, width) in pixels; `map` is the large picture of all grid tiles in patches;
R rows of one tile, N positions of the merged sequence.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from unillava.errors import ConfigError, MediaError, RequestError
from unillava.spec import AnyresVariant, LlavaSpec, VideoSpec

NEWLINE = -1
"""Entry of `image_rows` and `video_rows` that stands for the learnt newline row."""

Size = tuple[int, int]

# A float product such as 48 * (33 / 99) may end just below the integer that it stands for.
# transformers rounds to 7 digits before it cuts off; the original LLaVA only cuts off.
_WHOLE = {"hf": lambda length: int(round(length, 7)), "llava": int}


@lru_cache(maxsize=4096)
def best_resolution(size_hw: Size, pinpoints_hw: tuple[Size, ...]) -> Size:
    """The candidate that shows most of an image, and among equals the one that wastes least.

    Full ties go to the earlier candidate, so their order matters: 336 x 336 fits 336 x 672 and
    672 x 336 equally well. The original repository writes candidates as (width, height); turn
    each pair around and keep the order of the list.

    Args:
        size_hw: the image, in pixels.
        pinpoints_hw: candidates, in pixels.

    Raises:
        ConfigError: no candidates.
        MediaError: an image without pixels.
    """
    height, width = size_hw
    if min(size_hw) < 1:
        raise MediaError("the image has no pixels", given=f"{width} x {height}")
    if not pinpoints_hw:
        raise ConfigError("anyres needs image_grid_pinpoints", given="none")

    def merit(candidate_hw: Size) -> tuple[int, int]:
        rows, columns = candidate_hw
        scale = min(columns / width, rows / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - rows * columns

    return max(pinpoints_hw, key=merit)  # max keeps the first of equals


def fitted_size(size_hw: Size, target_hw: Size) -> Size:
    """(height, width) of an image scaled to fit into `target_hw`; the short side rounds up."""
    (height, width), (rows, columns) = size_hw, target_hw
    across, down = columns / width, rows / height
    if across < down:
        return min(math.ceil(height * across), rows), columns
    return rows, min(math.ceil(width * down), columns)


def tile_grid(spec: LlavaSpec, size_hw: Size) -> Size:
    """(rows, columns) of anyres tiles beside the base tile; (0, 0) in the other image modes."""
    if spec.image_mode != "anyres":
        return 0, 0
    best_hw, side = best_resolution(size_hw, spec.grid_pinpoints), spec.vision.image_size
    if best_hw[0] % side or best_hw[1] % side:
        raise ConfigError(
            "a resolution of image_grid_pinpoints is no multiple of the tile",
            given=f"{best_hw[0]} x {best_hw[1]}",
            expected=f"multiples of image_size {side}",
        )
    return best_hw[0] // side, best_hw[1] // side


def num_tiles(spec: LlavaSpec, size_hw: Size) -> int:
    """Tiles that the vision tower sees of one image."""
    rows, columns = tile_grid(spec, size_hw)
    return 1 + rows * columns


def unpadded_box(map_hw: Size, size_hw: Size, variant: AnyresVariant = "hf") -> tuple[int, ...]:
    """(top, bottom, left, right) of the part of the map that is image and not padding.

    The picture was scaled with a length rounded up (`fitted_size`); here it is rounded down, so
    that up to one row or column of patches that shows image is cut off at each side. Very long
    images may keep no patch at all; their sequence is the base tile alone. Both are so in every
    LLaVA, and the token counts depend on it.

    Args:
        map_hw: patches.
        size_hw: the original image, in pixels.
        variant: "hf": the product is rounded to 7 digits before it is cut to an integer (in
            transformers from 4.49 processors and models agree on that). "llava": it is only cut,
            which loses one more row at each side where the float product ends just below an
            integer, as for 176 x 55 pixels. (Models of transformers up to 4.46 cut too, while
            their processors counted with exact integers, and so failed on such sizes.)
    """
    (rows, columns), (height, width) = map_hw, size_hw
    whole = _WHOLE[variant]
    if width / height > columns / rows:
        margin = (rows - whole(height * (columns / width))) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - whole(width * (rows / height))) // 2
    return 0, rows, margin, columns - margin


def unpadded_size(spec: LlavaSpec, size_hw: Size) -> Size:
    """(rows, columns) of patches of the grid tiles that enter the sequence."""
    rows, columns = (n * spec.vision.grid for n in tile_grid(spec, size_hw))
    if not (spec.unpad and rows):
        return rows, columns
    top, bottom, left, right = unpadded_box((rows, columns), size_hw, spec.anyres_variant)
    return bottom - top, right - left


def limited_size(map_hw: Size, max_tiles: int, grid: int) -> Size:
    """(rows, columns) to which `anyres_max_N` shrinks an unpadded map, in patches.

    Maps of at most 1.1 times the side of N = `max_tiles` whole tiles stay as they are
    (LLaVA-OneVision). `grid` is patches per side of a tile.
    """
    rows, columns = map_hw
    times = math.sqrt(rows * columns / (max_tiles * grid**2))
    return (int(rows // times), int(columns // times)) if times > 1.1 else map_hw


def image_tokens(spec: LlavaSpec, size_hw: Size) -> int:
    """Positions that one image takes in the sequence: the length of `image_rows`."""
    rows, columns = unpadded_size(spec, size_hw)
    newlines = (rows if num_tiles(spec, size_hw) > 1 else 1) if spec.unpad else 0
    return spec.rows_per_tile + rows * columns + newlines


@lru_cache(maxsize=256)
def image_rows(spec: LlavaSpec, size_hw: Size) -> np.ndarray:
    """The rows of one image in the order of the merged sequence.

    First the base tile. Then (anyres) the map of all grid tiles, row by row, without its padding
    and with a newline after every row if `spec.unpad`. An image of a single tile ends with one
    newline if `spec.unpad`.

    Args:
        spec: the model.
        size_hw: the original image, in pixels.

    Returns:
        int64 [N], read-only: an index into the `num_tiles * rows_per_tile` projected rows of
        this image (tile by tile), or `NEWLINE`.

    Raises:
        ConfigError: tiles that do not form a map (`tile_grid`; a class token among their rows).
    """
    R, grid = spec.rows_per_tile, spec.vision.grid
    base_R = np.arange(R)
    tiles_down, tiles_across = tile_grid(spec, size_hw)
    if not tiles_down:
        return _frozen(base_R, [NEWLINE] * spec.unpad)
    _require_square(spec, "anyres")
    tiles = R + np.arange(tiles_down * tiles_across * R)
    tiles = tiles.reshape(tiles_down, tiles_across, grid, grid).transpose(0, 2, 1, 3)
    whole = tiles.reshape(tiles_down * grid, tiles_across * grid)
    if not spec.unpad:
        return _frozen(base_R, whole)
    top, bottom, left, right = unpadded_box(whole.shape, size_hw, spec.anyres_variant)
    return _frozen(base_R, _with_newlines(whole[top:bottom, left:right]))


def pooled_side(spec: LlavaSpec) -> int:
    """Rows per side of one video frame after pooling: average and max round down, bilinear up."""
    video, grid = _video(spec), spec.vision.grid
    if video.pool_mode == "none":
        return grid
    if video.pool_mode == "bilinear":
        return math.ceil(grid / video.pool_stride)
    return grid // video.pool_stride


def rows_per_frame(spec: LlavaSpec) -> int:
    """Projected rows that one video frame yields. (transformers' processor counts a quarter of
    the patches, which differs from what its model makes where the grid is odd.)"""
    return pooled_side(spec) ** 2


def video_tokens(spec: LlavaSpec, num_frames: int) -> int:
    """Positions that one video takes in the sequence: the length of `video_rows`."""
    newlines = {
        "grid": num_frames * pooled_side(spec),
        "frame": num_frames,
        "one_token": 1,
        "no_token": 0,
    }
    return num_frames * rows_per_frame(spec) + newlines[_video(spec).newline]


@lru_cache(maxsize=64)
def video_rows(spec: LlavaSpec, num_frames: int) -> np.ndarray:
    """The rows of one video in the order of the merged sequence.

    Frame after frame, each row by row. Newlines as `spec.video.newline` says: `grid` one after
    every row of every frame, `frame` one after every frame, `one_token` one at the end,
    `no_token` none.

    Returns:
        int64 [N], read-only: an index into the `num_frames * rows_per_frame` projected rows, or
        `NEWLINE`.

    Raises:
        RequestError: the model takes no video.
        ConfigError: a class token among the rows of a frame.
    """
    side, newline = pooled_side(spec), _video(spec).newline
    _require_square(spec, "video")
    rows = np.arange(num_frames * side**2)
    if newline == "grid":
        return _frozen(_with_newlines(rows.reshape(num_frames * side, side)))
    if newline == "frame":
        return _frozen(_with_newlines(rows.reshape(num_frames, side**2)))
    return _frozen(rows, [NEWLINE] * (newline == "one_token"))


def _with_newlines(rows: np.ndarray) -> np.ndarray:
    """[r, c] -> [r, c + 1]: a newline after every row."""
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=NEWLINE)


def _frozen(*parts: np.ndarray | list[int]) -> np.ndarray:
    """The parts flattened and joined; read-only because the result is cached and shared."""
    joined = np.concatenate([np.ravel(part) for part in parts]).astype(np.int64)
    joined.flags.writeable = False
    return joined


def _require_square(spec: LlavaSpec, what: str) -> None:
    if spec.rows_per_tile != spec.vision.grid**2:
        raise ConfigError(
            f"{what} needs tiles whose rows form a square",
            given="vision_feature_select_strategy that keeps the class token",
            expected='"default" (LLaVA: "patch")',
        )


def _video(spec: LlavaSpec) -> VideoSpec:
    if spec.video is None:
        raise RequestError(
            "this model does not take videos",
            given=f"model family {spec.family}",
            fix="use a LLaVA-NeXT-Video checkpoint, or pass frames as images",
        )
    return spec.video
