"""The order of projected rows in the merged sequence, and the token counts that follow from it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pictures import FIVE_WH, spec
from unillava.data.layout import (
    NEWLINE,
    best_resolution,
    fitted_size,
    image_rows,
    image_tokens,
    limited_size,
    num_tiles,
    pooled_side,
    rows_per_frame,
    tile_grid,
    unpadded_box,
    unpadded_size,
    video_rows,
    video_tokens,
)
from unillava.errors import ConfigError, MediaError, RequestError
from unillava.spec import VideoSpec


def _turned(pairs_wh) -> tuple[tuple[int, int], ...]:
    """The original's (width, height) as (height, width), in the original's order."""
    return tuple((height, width) for width, height in pairs_wh)


CLIP = spec(pinpoints_hw=_turned(FIVE_WH), anyres_variant="llava")
CLIP_ONE = spec(pinpoints_hw=((672, 672),), anyres_variant="llava")
SIGLIP = spec(
    tower="siglip",
    image_size=384,
    pinpoints_hw=_turned((w * 384 // 336, h * 384 // 336) for w, h in FIVE_WH),
    anyres_variant="llava",
)
SIGLIP_GRIDS = replace(
    SIGLIP,
    grid_pinpoints=_turned((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)),
)

# image (w, h), best resolution (w, h), scaled (w, h), tiles, unpadded (rows, columns), tokens
GOLDEN_CLIP = [
    ((336, 336), (336, 672), (336, 336), 3, (24, 24), 1176),
    ((100, 100), (336, 672), (336, 336), 3, (24, 24), 1176),
    ((500, 333), (672, 336), (505, 336), 3, (24, 36), 1464),
    ((640, 480), (672, 672), (672, 504), 5, (36, 48), 2340),
    ((1024, 768), (672, 672), (672, 504), 5, (36, 48), 2340),
    ((480, 640), (672, 672), (504, 672), 5, (48, 36), 2352),
    ((672, 672), (672, 672), (672, 672), 5, (48, 48), 2928),
    ((1920, 1080), (672, 672), (672, 378), 5, (28, 48), 1948),
    ((1000, 300), (1008, 336), (1008, 303), 4, (22, 72), 2182),
    ((300, 1000), (336, 1008), (303, 1008), 4, (72, 22), 2232),
    ((1344, 336), (1008, 336), (1008, 252), 4, (18, 72), 1890),
    ((336, 1344), (336, 1008), (252, 1008), 4, (72, 18), 1944),
    ((50, 400), (336, 672), (84, 672), 3, (48, 6), 912),
]


@pytest.mark.parametrize("variant", ["llava", "hf"])
@pytest.mark.parametrize(("image", "best", "scaled", "tiles", "unpadded", "tokens"), GOLDEN_CLIP)
def test_golden_clip(image, best, scaled, tiles, unpadded, tokens, variant):
    size_hw, best_hw = image[::-1], best[::-1]
    clip = replace(CLIP, anyres_variant=variant)
    assert best_resolution(size_hw, clip.grid_pinpoints) == best_hw
    assert fitted_size(size_hw, best_hw) == scaled[::-1]
    assert num_tiles(clip, size_hw) == tiles
    assert unpadded_size(clip, size_hw) == unpadded
    assert image_tokens(clip, size_hw) == tokens == len(image_rows(clip, size_hw))


@pytest.mark.parametrize(
    ("model", "image", "best", "tiles", "unpadded", "tokens"),
    [
        (CLIP_ONE, (640, 480), (672, 672), 5, (36, 48), 2340),
        (CLIP_ONE, (1000, 300), (672, 672), 5, (14, 48), 1262),
        (SIGLIP, (640, 480), (768, 768), 5, (40, 54), 2929),
        (SIGLIP, (1000, 300), (1152, 384), 4, (25, 81), 2779),
    ],
)
def test_golden_other_grids(model, image, best, tiles, unpadded, tokens):
    size_hw = image[::-1]
    assert best_resolution(size_hw, model.grid_pinpoints) == best[::-1]
    assert num_tiles(model, size_hw) == tiles
    assert unpadded_size(model, size_hw) == unpadded
    assert image_tokens(model, size_hw) == tokens == len(image_rows(model, size_hw))


@pytest.mark.parametrize(
    ("image", "best", "tiles", "unpadded", "limited", "tokens"),
    [
        ((384, 384), (384, 384), 2, (27, 27), (27, 27), 1485),
        ((640, 480), (768, 768), 5, (40, 54), (40, 54), 2929),
        ((1920, 1080), (1920, 1152), 16, (75, 135), (60, 108), 7269),
        ((2304, 2304), (2304, 2304), 37, (162, 162), (81, 81), 7371),
        ((3000, 1000), (2304, 768), 13, (54, 162), (46, 140), 7215),
    ],
)
def test_golden_anyres_max_9(image, best, tiles, unpadded, limited, tokens):
    size_hw = image[::-1]
    assert best_resolution(size_hw, SIGLIP_GRIDS.grid_pinpoints) == best[::-1]
    assert num_tiles(SIGLIP_GRIDS, size_hw) == tiles
    assert unpadded_size(SIGLIP_GRIDS, size_hw) == unpadded
    rows, columns = limited_size(unpadded, 9, SIGLIP_GRIDS.vision.grid)
    assert (rows, columns) == limited
    assert SIGLIP_GRIDS.rows_per_tile + rows * (columns + 1) == tokens


def test_order_of_candidates_decides_ties():
    """The same list read as (height, width), as HF checkpoints do, picks the other rectangle."""
    assert best_resolution((336, 336), _turned(FIVE_WH)) == (672, 336)
    assert best_resolution((336, 336), FIVE_WH) == (336, 672)


def test_rows_of_a_small_map_by_hand():
    """Two tiles of 2 x 2 patches one above the other; a 4 x 1 picture keeps its middle rows."""
    small = spec(image_size=28, pinpoints_hw=((56, 28),))
    N = NEWLINE
    assert image_rows(small, (56, 28)).tolist() == [
        *(0, 1, 2, 3),
        *(4, 5, N, 6, 7, N),
        *(8, 9, N, 10, 11, N),
    ]
    wide = spec(image_size=28, pinpoints_hw=((28, 56),))
    assert image_rows(wide, (28, 56)).tolist() == [
        *(0, 1, 2, 3),
        *(4, 5, 8, 9, N),
        *(6, 7, 10, 11, N),
    ]
    assert image_rows(small, (28, 28)).tolist() == [0, 1, 2, 3, 6, 7, N, 8, 9, N]


def test_without_unpadding_the_whole_map_stays():
    padded = spec(image_size=28, pinpoints_hw=((28, 56),), unpad=False)
    assert image_rows(padded, (10, 10)).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
    assert image_tokens(padded, (10, 10)) == 12


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_one_tile(mode):
    plain = spec(mode)
    assert np.array_equal(image_rows(plain, (30, 40)), np.arange(576))
    assert image_tokens(plain, (30, 40)) == 576
    ended = replace(plain, unpad=True)
    assert image_rows(ended, (30, 40))[-1] == NEWLINE
    assert image_tokens(ended, (30, 40)) == len(image_rows(ended, (30, 40))) == 577


def test_class_token():
    full = spec("square", keep_class_token=True)
    assert len(image_rows(full, (30, 40))) == image_tokens(full, (30, 40)) == 577
    with pytest.raises(ConfigError, match="rows form a square"):
        image_rows(spec(keep_class_token=True), (30, 40))


# 55 * (48 / 176) = 14.999999999999998: the variants cut at different rows.
@pytest.mark.parametrize(
    ("size_hw", "map_hw", "hf", "llava"),
    [
        ((55, 176), (24, 48), (4, 20, 0, 48), (5, 19, 0, 48)),
        ((88, 99), (24, 48), (0, 24, 10, 38), (0, 24, 11, 37)),
        ((352, 110), (48, 24), (0, 48, 4, 20), (0, 48, 5, 19)),
    ],
)
def test_variants_round_differently(size_hw, map_hw, hf, llava):
    assert unpadded_box(map_hw, size_hw, "hf") == hf
    assert unpadded_box(map_hw, size_hw, "llava") == llava


def test_very_long_images_keep_the_base_tile_only():
    assert unpadded_size(CLIP, (1, 1000)) == (0, 72)
    assert np.array_equal(image_rows(CLIP, (1, 1000)), np.arange(576))
    assert image_tokens(CLIP, (1, 1000)) == 576
    # An odd number of patches has a middle row, which stays.
    assert unpadded_size(SIGLIP, (1, 1000)) == (1, 81)
    # At the sides, too: every row is empty but for its newline.
    assert unpadded_size(CLIP, (1000, 1)) == (72, 0)
    assert image_rows(CLIP, (1000, 1))[576:].tolist() == [NEWLINE] * 72


SIDES = st.integers(1, 5000)
SIZES = st.tuples(SIDES, SIDES)
MODELS = st.sampled_from([CLIP, replace(CLIP, anyres_variant="hf"), CLIP_ONE, SIGLIP])


@given(MODELS, SIZES)
def test_image_rows_visit_each_patch_at_most_once(model, size_hw):
    rows = image_rows(model, size_hw)
    base, grid = rows[: model.rows_per_tile], rows[model.rows_per_tile :]
    assert rows.dtype == np.int64
    assert len(rows) == image_tokens(model, size_hw)
    assert np.array_equal(base, np.arange(model.rows_per_tile))
    patches = grid[grid != NEWLINE]
    assert len(np.unique(patches)) == len(patches)
    if len(patches):
        assert patches.min() >= model.rows_per_tile
        assert patches.max() < model.rows_per_tile * num_tiles(model, size_hw)
    height, width = unpadded_size(model, size_hw)
    assert len(grid) == height * (width + 1)
    assert np.all(grid.reshape(height, width + 1)[:, -1] == NEWLINE)


@given(MODELS, SIZES)
def test_neighbours_in_the_sequence_are_neighbours_in_the_picture(model, size_hw):
    """Place every entry back in the picture: rows from the top, columns from the left, no gaps."""
    side, columns = model.vision.grid, tile_grid(model, size_hw)[1]
    height, width = unpadded_size(model, size_hw)
    entries = image_rows(model, size_hw)[side**2 :].reshape(height, width + 1)[:, :-1] - side**2
    tile, inside = np.divmod(entries, side**2)
    y = tile // columns * side + inside // side
    x = tile % columns * side + inside % side
    assert np.all(np.diff(x, axis=1) == 1) and np.all(np.diff(x, axis=0) == 0)
    assert np.all(np.diff(y, axis=0) == 1) and np.all(np.diff(y, axis=1) == 0)


@given(SIZES, st.sampled_from([(24, 48), (48, 48), (72, 24), (27, 81), (135, 81)]))
def test_hf_rounding_is_exact(size_hw, map_hw):
    """Rounding the float product to 7 digits gives what exact fractions give."""
    (rows, columns), (height, width) = map_hw, size_hw
    if Fraction(width, height) > Fraction(columns, rows):
        margin = (rows - height * columns // width) // 2
        expected = (margin, rows - margin, 0, columns)
    else:
        margin = (columns - width * rows // height) // 2
        expected = (0, rows, margin, columns - margin)
    assert unpadded_box(map_hw, size_hw, "hf") == expected


@given(SIZES)
def test_best_resolution_is_the_best(size_hw):
    """No candidate shows more pixels; of those that show as many, none is smaller."""

    def shown(candidate):
        scale = min(candidate[1] / size_hw[1], candidate[0] / size_hw[0])
        pixels = int(size_hw[1] * scale) * int(size_hw[0] * scale)
        return min(pixels, size_hw[0] * size_hw[1])

    best = best_resolution(size_hw, CLIP.grid_pinpoints)
    for other in CLIP.grid_pinpoints:
        assert shown(other) <= shown(best)
        if shown(other) == shown(best):
            assert other[0] * other[1] >= best[0] * best[1]


@given(SIZES, SIZES)
def test_fitted_size_touches_the_target(size_hw, target_hw):
    height, width = fitted_size(size_hw, target_hw)
    assert 1 <= height <= target_hw[0] and 1 <= width <= target_hw[1]
    assert height == target_hw[0] or width == target_hw[1]


def _video_by_hand(frames: int, side: int, newline: str) -> list[int]:
    rows, number = [], 0
    for _ in range(frames):
        for _ in range(side):
            for _ in range(side):
                rows.append(number)
                number += 1
            if newline == "grid":
                rows.append(NEWLINE)
        if newline == "frame":
            rows.append(NEWLINE)
    return rows + [NEWLINE] * (newline == "one_token")


@pytest.mark.parametrize("newline", ["grid", "frame", "one_token", "no_token"])
@pytest.mark.parametrize(
    ("pool", "stride", "image_size", "side"),
    [
        ("average", 2, 336, 12),
        ("average", 2, 378, 13),
        ("max", 2, 378, 13),
        ("bilinear", 2, 378, 14),
        ("bilinear", 2, 336, 12),
        ("average", 4, 336, 6),
        ("none", 2, 378, 27),
    ],
)
def test_video_rows(newline, pool, stride, image_size, side):
    video = VideoSpec(pool_mode=pool, pool_stride=stride, newline=newline)
    model = spec(image_size=image_size, pinpoints_hw=((image_size, image_size),), video=video)
    assert pooled_side(model) == side
    assert rows_per_frame(model) == side**2
    expected = _video_by_hand(3, side, newline)
    assert video_rows(model, 3).tolist() == expected
    assert video_tokens(model, 3) == len(expected)


@pytest.mark.parametrize(
    ("newline", "per_frame"), [("grid", 14 * 15), ("frame", 14 * 14 + 1), ("no_token", 14 * 14)]
)
def test_golden_video_of_llava_next(newline, per_frame):
    video = VideoSpec(pool_mode="bilinear", pool_stride=2, newline=newline)
    model = spec(tower="siglip", image_size=384, pinpoints_hw=((384, 384),), video=video)
    assert video_tokens(model, 32) == 32 * per_frame


def test_cached_rows_cannot_be_changed():
    for rows in (image_rows(CLIP, (480, 640)), video_rows(spec(video=VideoSpec()), 2)):
        with pytest.raises(ValueError, match="read-only"):
            rows[0] = 1


def test_errors_name_what_is_wrong():
    with pytest.raises(MediaError, match="no pixels"):
        best_resolution((0, 5), CLIP.grid_pinpoints)
    with pytest.raises(ConfigError, match="image_grid_pinpoints"):
        best_resolution((5, 5), ())
    with pytest.raises(ConfigError, match="no multiple of the tile"):
        image_rows(spec(pinpoints_hw=((500, 336),)), (5, 5))
    with pytest.raises(RequestError, match="does not take videos"):
        video_rows(CLIP, 2)
    with pytest.raises(ConfigError, match="rows form a square"):
        video_rows(spec(video=VideoSpec(), keep_class_token=True), 2)
