"""Tiles, token counts and the order of rows, compared with transformers' own code.

Pixels are compared bit for bit with the processors that transformers builds on Pillow.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaProcessor,
)
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import ChannelDimension
from transformers.image_utils import load_image as hf_load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from tests.pictures import FIVE_WH, scene, spec
from unillava.data.images import ImageProcessor, load_image, to_rgb
from unillava.data.layout import (
    NEWLINE,
    best_resolution,
    fitted_size,
    image_rows,
    image_tokens,
    num_tiles,
    pooled_side,
    video_rows,
    video_tokens,
)
from unillava.data.video import uniform_indices
from unillava.spec import VideoSpec

# transformers reads the same list as (height, width).
FIVE_HW = FIVE_WH


def scaled(tile: int) -> tuple[tuple[int, int], ...]:
    return tuple((h * tile // 336, w * tile // 336) for h, w in FIVE_HW)


SIZES_WH = [
    *((1, 1), (1, 2), (2, 1), (1, 300), (300, 1), (3, 700), (700, 3)),
    *((336, 336), (336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    *((335, 337), (337, 335), (671, 673), (1009, 337), (168, 168)),
    *((640, 480), (480, 640), (1024, 768), (500, 333), (333, 500), (50, 400), (400, 50)),
    *((997, 331), (331, 997), (613, 617), (101, 103), (7, 11), (900, 300), (300, 900)),
    *((1920, 1080), (1000, 300), (176, 55), (99, 88)),
]


def as_read(processor) -> dict:
    """The processor's settings as they stand in preprocessor_config.json."""
    return json.loads(processor.to_json_string())


def assert_same_tiles(processor, model, image: Image.Image) -> None:
    theirs = np.asarray(processor(image)["pixel_values"][0])
    ours, size_hw = ImageProcessor.from_config(model, as_read(processor)).tiles(image)
    assert size_hw == (image.height, image.width)
    assert ours.dtype == theirs.dtype == np.float32
    assert np.array_equal(ours if theirs.ndim == 4 else ours[0], theirs)


# --- pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES_WH)
def test_released_processors(size):
    """LLaVA 1.5 (crop and pad) and NeXT as published, and SigLIP."""
    image = scene(*size)
    square = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    assert_same_tiles(CLIPImageProcessorPil(**square), spec("square"), image)
    assert_same_tiles(LlavaImageProcessorPil(**square, do_pad=True), spec("pad"), image)
    next_processor = LlavaNextImageProcessorPil(**square, image_grid_pinpoints=list(FIVE_HW))
    assert_same_tiles(next_processor, spec("anyres"), image)
    siglip = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    assert_same_tiles(siglip, spec("square", tower="siglip", image_size=384), image)


PROCESSORS = {
    "shrunk more than cropped": (
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=56),
        spec("square", image_size=56),
    ),
    "smaller than the crop": (
        CLIPImageProcessorPil(size={"shortest_edge": 51}, crop_size=56),
        spec("square", image_size=56),
    ),
    "stretched, then cropped": (
        CLIPImageProcessorPil(size={"height": 63, "width": 80}, crop_size=56),
        spec("square", image_size=56),
    ),
    "llava without padding": (
        LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=56),
        spec("square", image_size=56),
    ),
    "padded, then cropped": (
        LlavaImageProcessorPil(size={"shortest_edge": 60}, crop_size=56, do_pad=True),
        spec("pad", image_size=56),
    ),
    "padded with half grey": (
        LlavaImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size=56,
            do_pad=True,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        spec("pad", image_size=56),
    ),
    "tiles": (
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size=56, image_grid_pinpoints=list(scaled(56))
        ),
        spec("anyres", image_size=56, pinpoints_hw=scaled(56)),
    ),
    "tiles in another order": (
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 56}, crop_size=56, image_grid_pinpoints=list(scaled(56)[::-1])
        ),
        spec("anyres", image_size=56, pinpoints_hw=scaled(56)[::-1]),
    ),
    "tiles enlarged and cropped": (
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 70}, crop_size=56, image_grid_pinpoints=list(scaled(56))
        ),
        spec("anyres", image_size=56, pinpoints_hw=scaled(56)),
    ),
    "tiles of SigLIP": (
        LlavaNextImageProcessorPil(
            size={"height": 56, "width": 56},
            do_center_crop=False,
            crop_size=56,
            image_grid_pinpoints=list(scaled(56)),
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        spec("anyres", tower="siglip", image_size=56, pinpoints_hw=scaled(56)),
    ),
    "not normalised": (
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56, do_normalize=False),
        spec("square", image_size=56),
    ),
    "not rescaled": (
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56, do_rescale=False),
        spec("square", image_size=56),
    ),
    "other factor": (
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56, rescale_factor=0.0078125),
        spec("square", image_size=56),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 260), st.integers(1, 260), st.integers(0, 3))
def test_any_size(name, width, height, seed):
    processor, model = PROCESSORS[name]
    assert_same_tiles(processor, model, scene(width, height, seed))


@pytest.mark.parametrize("resample", [int(filter) for filter in Image.Resampling])
def test_every_filter(resample):
    for size in ((130, 61), (61, 130), (40, 30)):
        clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56, resample=resample)
        assert_same_tiles(clip, spec("square", image_size=56), scene(*size))
        tiles = LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size=56,
            resample=resample,
            image_grid_pinpoints=list(scaled(56)),
        )
        model = spec("anyres", image_size=56, pinpoints_hw=scaled(56))
        assert_same_tiles(tiles, model, scene(*size))


def test_every_byte_of_every_colour():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    assert_same_tiles(clip, spec("square", image_size=16, patch_size=8), Image.fromarray(values))


def test_photograph(photo):
    with Image.open(photo) as image:
        processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
        assert_same_tiles(processor, spec("anyres"), image)


def test_frames_of_a_video():
    """transformers' own video processor needs torchvision; its Pillow forerunner (until 4.51)
    treated each frame as CLIP's processor treats a picture."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    pictures = [scene(320, 240, seed) for seed in range(3)]
    theirs = np.stack(clip(pictures)["pixel_values"])
    config = {"video_processor": as_read(clip), "image_processor": {"size": 336, "crop_size": 336}}
    ours = ImageProcessor.from_config(spec(video=VideoSpec()), config).frames(pictures)
    assert np.array_equal(ours, theirs)


# --- colours ---------------------------------------------------------------------------------


def pictures_of_every_mode() -> dict[str, Image.Image]:
    source = scene(23, 19)
    alpha = Image.fromarray(np.arange(23 * 19, dtype=np.uint16).reshape(19, 23).astype(np.uint8))
    rgba = source.copy()
    rgba.putalpha(alpha)
    keyed = source.copy()
    keyed.info["transparency"] = keyed.getpixel((3, 4))
    grey_keyed = source.convert("L")
    grey_keyed.info["transparency"] = grey_keyed.getpixel((3, 4))
    palette = source.convert("P")
    one_clear = palette.copy()
    one_clear.info["transparency"] = palette.getpixel((2, 2))
    graded = palette.copy()
    graded.info["transparency"] = bytes(range(0, 256, 2))
    modes = {mode: source.convert(mode) for mode in ("1", "L", "RGB", "CMYK", "YCbCr", "HSV", "P")}
    return modes | {
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "PA": rgba.convert("RGBA").convert("P").convert("PA"),
        "RGB with a key": keyed,
        "L with a key": grey_keyed,
        "P with a clear entry": one_clear,
        "P with graded entries": graded,
    }


@pytest.mark.parametrize("name", pictures_of_every_mode())
def test_colours(name):
    image = pictures_of_every_mode()[name]
    assert np.array_equal(np.asarray(to_rgb(image)), convert_to_rgb(image, return_numpy=True))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)
    assert_same_tiles(clip, spec("square", image_size=56), image)


@pytest.mark.parametrize("name", pictures_of_every_mode())
def test_dropping_transparency_is_what_the_loader_of_transformers_does(name):
    image = pictures_of_every_mode()[name]
    dropped = load_image(image, transparency="drop")
    assert np.array_equal(np.asarray(dropped), np.asarray(hf_load_image(image)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_loaded_alike(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    scene(70, 50).save(path, quality=90, exif=exif)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(hf_load_image(str(path))))


# --- geometry --------------------------------------------------------------------------------


class Geometry:
    """transformers' model and processor for tiles of one size, and the spec of the same."""

    def __init__(self, tower: str, image_size: int):
        self.pinpoints_hw = scaled(image_size)
        self.spec = spec(tower=tower, image_size=image_size, pinpoints_hw=self.pinpoints_hw)
        text = LlamaConfig(
            vocab_size=64,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
        vision = CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=image_size,
            patch_size=14,
        )
        self.config = LlavaNextConfig(
            vision_config=vision,
            text_config=text,
            image_grid_pinpoints=[list(pair) for pair in self.pinpoints_hw],
        )
        with torch.device("meta"):  # only its arithmetic is used
            self.model = LlavaNextModel(self.config)

    def packed_rows(self, size_hw: tuple[int, int]) -> np.ndarray:
        """What the model makes of features whose only value is their own row number."""
        tiles = num_tiles(self.spec, size_hw)
        R = self.spec.rows_per_tile
        numbers = torch.arange(tiles * R, dtype=torch.float64).reshape(tiles, R, 1)
        (rows,), (length,) = self.model.pack_image_features(
            [numbers],
            torch.tensor([size_hw]),
            vision_feature_select_strategy="default",
            image_newline=torch.tensor([float(NEWLINE)], dtype=torch.float64),
        )
        assert len(rows) == length
        return rows[:, 0].long().numpy()

    def counted_tokens(self, size_hw: tuple[int, int]) -> int:
        """What the processor counts, with the class token added and taken away again."""
        processor = object.__new__(LlavaNextProcessor)
        processor.image_processor = SimpleNamespace(
            image_grid_pinpoints=self.config.image_grid_pinpoints
        )
        processor.patch_size = 14
        processor.num_additional_image_tokens = 1
        side = self.spec.vision.image_size
        return processor._get_number_of_features(*size_hw, side, side) - 1


GEOMETRIES = {
    "CLIP 336": Geometry("clip", 336),
    "SigLIP 384": Geometry("siglip", 384),
    "56": Geometry("clip", 56),
}
# Sizes at which the rounding of the two variants differs.
ROUNDING_WH = [(176, 55), (99, 88), (110, 352), (656, 205)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [*SIZES_WH, *ROUNDING_WH, (1000, 1), (1, 1000), (3000, 17)])
def test_order_of_rows_and_token_counts(geometry, size):
    theirs, size_hw = GEOMETRIES[geometry], size[::-1]
    rows = image_rows(theirs.spec, size_hw)
    assert np.array_equal(rows, theirs.packed_rows(size_hw))
    assert len(rows) == image_tokens(theirs.spec, size_hw) == theirs.counted_tokens(size_hw)


SIDES = st.integers(1, 4000)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(GEOMETRIES)), SIDES, SIDES)
def test_order_of_rows_and_token_counts_for_any_size(geometry, height, width):
    theirs = GEOMETRIES[geometry]
    rows = image_rows(theirs.spec, (height, width))
    assert np.array_equal(rows, theirs.packed_rows((height, width)))
    assert len(rows) == theirs.counted_tokens((height, width))


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES)
def test_resolutions(height, width):
    pinpoints = [list(pair) for pair in FIVE_HW]
    size_hw = (height, width)
    best = best_resolution(size_hw, FIVE_HW)
    assert best == tuple(select_best_resolution(size_hw, pinpoints))
    # A picture without memory behind it: only its shape is asked for.
    blank = np.broadcast_to(np.uint8(0), (3, height, width))
    assert fitted_size(size_hw, best) == get_patch_output_size(blank, best, ChannelDimension.FIRST)
    assert num_tiles(spec(), size_hw) == image_size_to_num_patches(size_hw, pinpoints, 336)


def test_one_tile():
    """transformers appends a newline to an image that is a single tile."""
    model = GEOMETRIES["56"]
    numbers = torch.arange(16.0).reshape(1, 16, 1)
    (rows,), _ = model.model.pack_image_features(
        [numbers], torch.tensor([[9, 9]]), "default", torch.tensor([-1.0])
    )
    single = replace(model.spec, image_mode="pad")
    assert np.array_equal(image_rows(single, (9, 9)), rows[:, 0].long().numpy())


@pytest.mark.parametrize("keeps", [False, True])
def test_token_count_of_llava_15(keeps):
    processor = object.__new__(LlavaProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 1
    processor.vision_feature_select_strategy = "full" if keeps else "default"
    processor.image_token = "i"
    text = processor.replace_image_token({"pixel_values": [np.zeros((3, 336, 336))]}, 0)
    assert image_tokens(spec("square", keep_class_token=keeps), (30, 40)) == len(text)


# --- video -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["average", "max"])
@pytest.mark.parametrize("image_size", [336, 378])
def test_rows_of_a_video(mode, image_size):
    """The model's own pooling, fed with the coordinates of every patch."""
    video = VideoSpec(pool_mode=mode)
    model = spec(image_size=image_size, pinpoints_hw=((image_size, image_size),), video=video)
    side, grid, frames = pooled_side(model), model.vision.grid, 2
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(
            image_size=image_size, patch_size=14, hidden_size=3, num_attention_heads=1
        ),
        text_config=LlamaConfig(hidden_size=8, num_attention_heads=1),
        spatial_pool_mode=mode,
        spatial_pool_stride=2,
    )
    frame, y, x = np.meshgrid(*map(np.arange, (frames, grid, grid)), indexing="ij")
    places = np.stack([frame, y, x], axis=-1).reshape(frames, grid * grid, 3)
    pooled = LlavaNextVideoPooler(config)(torch.tensor(places, dtype=torch.float32))
    assert pooled.shape == (frames, side**2, 3)
    rows = video_rows(model, frames)
    corner = 0.5 if mode == "average" else 1.0
    shown = pooled.reshape(-1, 3)[rows.copy()].tolist()
    for row, place in enumerate(shown):
        inside = row % side**2
        assert place == [row // side**2, inside // side * 2 + corner, inside % side * 2 + corner]


def test_token_count_of_a_video():
    """Where the grid is odd transformers' processor counts more than its model yields."""
    for image_size, agree in ((336, True), (378, False)):
        processor = object.__new__(LlavaNextVideoProcessor)
        processor.patch_size, processor.video_token = 14, "v"
        frames = np.zeros((5, 3, image_size, image_size))
        text = processor.replace_video_token({"pixel_values_videos": [frames]}, 0)
        model = spec(
            image_size=image_size, pinpoints_hw=((image_size, image_size),), video=VideoSpec()
        )
        assert (video_tokens(model, 5) == len(text)) is agree


@given(st.integers(1, 5000), st.integers(1, 64))
def test_frames_that_transformers_takes(total, count):
    if count <= total:  # transformers refuses shorter clips
        metadata = VideoMetadata(total_num_frames=total, fps=24.0)
        theirs = default_sample_indices_fn(metadata, num_frames=count)
        assert np.array_equal(uniform_indices(total, count, "floor"), theirs)
