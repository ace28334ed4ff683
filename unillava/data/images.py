"""From a picture to the tiles that the vision tower sees: Pillow and NumPy only.

The arithmetic is that of transformers' Pillow processors, bit for bit: the same Pillow calls in
the same order, and a table of the 256 values that a byte can take instead of the float64 rescale
and the float32 normalisation, which yields the same float32 numbers. The torchvision processors of
transformers are not reproduced: on the CPU their resize differs from Pillow's by one or two grey
levels in about 0.5 % of the values, and their normalisation by rounding (2e-7).

Suffixes: N tiles, F frames, 3 colours, H, W pixels; _hw (height, width). Pillow's own sizes are
(width, height).
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from unillava.data import layout
from unillava.data.sources import Source, describe, locate
from unillava.errors import ConfigError, MediaError
from unillava.spec import AnyresVariant, ImageMode, LlavaSpec, VisionSpec

Transparency = Literal["white", "drop"]

TIMEOUT_S = 20.0
"""Seconds that the download of an image may take."""
MAX_IMAGE_BYTES = 64 << 20
MAX_PIXELS = 178_956_970
"""Largest image that is decoded: where Pillow itself begins to refuse (twice its warning size)."""

# EXIF 2.3, tag 0x0112: how the stored picture must be turned to stand upright.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_ALPHA_MODES = {"LA", "PA", "RGBA", "RGBa"}

# Formats that Pillow hands to another program or to the system, or only recognises.
_REFUSED_FORMATS = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
# Their headers say the size and orientation of what is decoded.
_TOLD_BY_HEADER = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF"}

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)

_pillow_limit = threading.Lock()


# --- loading ---------------------------------------------------------------------------------


def load_image(
    source: Source | Image.Image,
    *,
    timeout: float = TIMEOUT_S,
    max_bytes: int = MAX_IMAGE_BYTES,
    max_pixels: int = MAX_PIXELS,
    transparency: Transparency = "white",
) -> Image.Image:
    """Read one picture as upright RGB.

    The EXIF orientation is applied (damaged EXIF counts as none), the first frame of an animation
    is taken, and colour profiles are ignored, as in transformers and LLaVA. See `to_rgb` for
    palettes, alpha and deep grey.

    Args:
        source: path, `file://`, `http(s)://` or `data:` URI, the bytes of a file, or a PIL image.
        timeout: seconds that a download may take in all.
        max_bytes: largest download or data: URI.
        max_pixels: largest width x height that is decoded.
        transparency: see `to_rgb`.

    Returns:
        An image of mode RGB. An RGB image given as such comes back uncopied.

    Raises:
        MediaError: absent, unreachable, damaged, too large, or not a picture.
    """
    with _readable(describe(source), max_pixels):
        if isinstance(source, Image.Image):
            picture = source
            _check_size(picture.size, max_pixels)
            picture.load()
        else:
            place = locate(source, timeout=timeout, max_bytes=max_bytes)
            picture = _decode(place, max_pixels)
        return _upright(to_rgb(picture, transparency), picture)


def image_size(source: Source) -> tuple[int, int]:
    """(height, width) in pixels of what `load_image` returns, without decoding the picture where
    its header says it.

    Raises:
        MediaError: absent, unreachable, damaged in its header, too large, or not a picture.
    """
    with _readable(describe(source), MAX_PIXELS):
        place = locate(source, timeout=TIMEOUT_S, max_bytes=MAX_IMAGE_BYTES)
        with open(place, "rb") if isinstance(place, Path) else io.BytesIO(place) as file:
            image = Image.open(file)
            if image.format not in _TOLD_BY_HEADER or _says_more_later(file, image):
                return load_image(source).size[::-1]
            _check_size(image.size, MAX_PIXELS)
            # Of a PNG the derived method decodes the whole picture, to see what follows it.
            exif = Image.Image.getexif(image) if image.format == "PNG" else None
            turned = orientation(image, exif) >= 5
            width, height = image.size
            return (width, height) if turned else (height, width)


def _says_more_later(file: BinaryIO, image: Image.Image) -> bool:
    """Whether a PNG has texts or EXIF behind its pixels, where an orientation may stand."""
    if image.format != "PNG":
        return False
    place, seen = 8, False
    while True:
        file.seek(place)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in (b"IEND", b""):
            return False
        if seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return True
        seen = seen or kind == b"IDAT"
        place += length + 12


def to_rgb(image: Image.Image, transparency: Transparency = "white") -> Image.Image:
    """Any PIL mode as RGB, equal to what transformers' `convert_to_rgb` makes of it.

    Alpha and transparent palette entries are laid over white, as the processors of current
    transformers do (5.23). `"drop"` uncovers the hidden colours instead, as the original LLaVA and
    older transformers do (until 5.0).

    Grey deeper than 8 bits is where this differs on purpose: Pillow clips at 255, so that nearly
    all of a 16-bit picture turns white; here 0...65535 is scaled to 0...255. 32-bit integers and
    floats carry no range of their own: the smallest of 1 (floats only), 255, 65535 and their own
    maximum that holds all values is taken as white. What is below 0 is black.

    Raises:
        MediaError: a mode that Pillow cannot convert.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    try:
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return _scaled_to_bytes(image).convert("RGB")
        if transparency == "drop" or not _is_transparent(image):
            return image.convert("RGB")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    except ValueError as error:
        raise MediaError(
            f"the image cannot be turned into RGB: {error}",
            given=f"mode {image.mode}",
            fix="save it as an 8-bit RGB picture",
        ) from error


def _is_transparent(image: Image.Image) -> bool:
    # transformers asks for a band named A, which LAB has too: those pictures turn white there.
    return image.mode in _ALPHA_MODES or image.info.get("transparency") is not None


def _scaled_to_bytes(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    if image.mode.startswith("I;16"):
        full = 65535.0
    else:
        peak = float(values.max(initial=0.0))
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = next((limit for limit in usual if peak <= limit), peak)
    return Image.fromarray(np.rint(values.clip(0.0) * (255.0 / full)).astype(np.uint8))


def orientation(image: Image.Image, exif: Image.Exif | None = None) -> int:
    """How the stored picture lies, as EXIF numbers it: 1 upright to 8; damaged EXIF counts as 1."""
    try:
        stated = (image.getexif() if exif is None else exif).get(_ORIENTATION, 1)
    except Exception:  # whatever Pillow's readers stumble over, the picture itself is sound
        return 1
    return stated if stated in _TURNS else 1


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it copies an upright image, and it writes the whole EXIF block
    # anew, which fails for damaged ones.
    turn = _TURNS.get(orientation(original))
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    turned.info = {}  # the orientation in it no longer holds
    return turned


def _decode(place: Path | bytes, max_pixels: int) -> Image.Image:
    with (
        open(place, "rb") if isinstance(place, Path) else io.BytesIO(place) as file,
        _raised_pillow_limit(max_pixels),
    ):
        image = Image.open(file)
        if image.format in _REFUSED_FORMATS:
            raise ValueError(f"{image.format} is not read")
        _check_size(image.size, max_pixels)
        image.load()
        return image


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise Image.DecompressionBombError(f"{width} x {height}")
    _require_pixels(size)


def _require_pixels(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise MediaError("the image has no pixels", given=f"{size[0]} x {size[1]}")


@contextlib.contextmanager
def _readable(name: str, max_pixels: int) -> Iterator[None]:
    """Whatever Pillow raises becomes a MediaError about `name`."""
    try:
        yield
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(
            "the image has more pixels than allowed",
            given=f"{name}: {error}",
            expected=f"at most {max_pixels} pixels",
            fix="scale it down, or pass a larger max_pixels to load_image if you trust the file",
        ) from error
    except Exception as error:  # Pillow's plug-ins raise many kinds for damaged files
        raise MediaError(
            f"the image cannot be decoded: {error or type(error).__name__}",
            given=name,
            expected="a whole JPEG, PNG, WebP, GIF, BMP, TIFF or other picture that Pillow reads",
            fix="open it in an image viewer and save it as PNG or JPEG",
        ) from error


@contextlib.contextmanager
def _raised_pillow_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's own guard is one number for the whole process: lift it only when asked to."""
    if max_pixels <= MAX_PIXELS:
        yield
        return
    with _pillow_limit:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


# --- processing ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """One RGB picture to one tile: resize, crop the centre, rescale, normalise."""

    shortest_edge: int | None
    """Scale so that the shorter side has this length; None: stretch to `resize_hw`."""
    resize_hw: tuple[int, int] | None
    crop_hw: tuple[int, int] | None
    """Cut out the centre (or surround a smaller picture with black); None: no crop."""
    resample: int
    """A value of PIL.Image.Resampling; 3 is bicubic."""
    rescale_factor: float | None
    """The bytes are multiplied by this; None: they are not."""
    mean: tuple[float, float, float] | None
    """With `std`: (value - mean) / std per colour; None: no normalisation."""
    std: tuple[float, float, float] | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], vision: VisionSpec) -> Preprocess:
        """Read the keys of preprocessor_config.json (all spellings of CLIP, Llava, LlavaNext,
        LlavaNextVideo and Siglip processors); what is absent follows from the vision tower.

        Raises:
            ConfigError: a value that cannot be understood.
        """
        siglip = _is_siglip(config, vision)
        side = vision.image_size
        size = config.get("size")
        if size is None:
            size = {"height": side, "width": side} if siglip else {"shortest_edge": side}
        if not config.get("do_resize", True):
            raise ConfigError(
                "pictures of any size must be resized to what the vision tower takes",
                given="do_resize false",
                expected="do_resize true",
            )
        shortest_edge, resize_hw = _read_size("size", size)
        crop_hw = None
        if config.get("do_center_crop", not siglip):
            crop = config.get("crop_size")
            edge, crop_hw = _read_size("crop_size", side if crop is None else crop)
            crop_hw = crop_hw or (edge, edge)
        normalize = config.get("do_normalize", True)
        return cls(
            shortest_edge=shortest_edge,
            resize_hw=resize_hw,
            crop_hw=crop_hw,
            resample=_read_resample(config.get("resample")),
            rescale_factor=_read_rescale(config),
            mean=_read_colours(config, "image_mean", siglip) if normalize else None,
            std=_read_colours(config, "image_std", siglip) if normalize else None,
        )

    @property
    def square_hw(self) -> tuple[int, int]:
        """What a square picture is resized to."""
        return self.resize_hw or (self.shortest_edge, self.shortest_edge)

    def geometry(self, image: Image.Image) -> Image.Image:
        """Resize and crop; an image that is right already comes back as it is.

        Raises:
            MediaError: so elongated that scaling its short side to the tile needs more than
                `MAX_PIXELS`.
        """
        target_hw = self._resized_hw(image)
        image = _resize(image, target_hw, self.resample)
        if self.crop_hw in (None, target_hw):
            return image
        top, left = ((have - want) // 2 for have, want in zip(target_hw, self.crop_hw, strict=True))
        # Pillow fills what lies outside of the picture with black.
        return image.crop((left, top, left + self.crop_hw[1], top + self.crop_hw[0]))

    def values(self, image: Image.Image, out_3HW: np.ndarray) -> None:
        """Write the rescaled and normalised pixels of an RGB picture into float32 `out_3HW`."""
        pixels_HW3 = np.asarray(image)
        table_3x256 = _byte_values(self.rescale_factor, self.mean, self.std)
        for colour in range(3):
            # A byte is never out of bounds; `clip` spares NumPy a buffer for the check.
            np.take(table_3x256[colour], pixels_HW3[..., colour], out=out_3HW[colour], mode="clip")

    def _resized_hw(self, image: Image.Image) -> tuple[int, int]:
        if self.resize_hw:
            return self.resize_hw
        width, height = image.size
        edge = self.shortest_edge
        long = int(edge * max(width, height) / min(width, height))
        if edge * long > MAX_PIXELS:
            raise MediaError(
                "the image is too elongated to be scaled until its short side fills a tile",
                given=f"{width} x {height}",
                expected=f"one side at most {MAX_PIXELS // edge**2} times the other",
                fix="crop or pad the picture, or use a model with image mode pad or anyres",
            )
        return (long, edge) if width <= height else (edge, long)


@dataclass(frozen=True)
class ImageProcessor:
    """Pictures to tiles, as one checkpoint wants them.

    Image modes (https://arxiv.org/abs/2310.03744, LLaVA-NeXT blog of 2024-01-30):

    * `square`: one tile; what the centre crop cuts off is lost.
    * `pad`: one tile; first a square of the longer side, filled with the mean colour.
    * `anyres`: the whole picture stretched to one tile, then the tiles, row by row, of a copy
      that is scaled into the best of `grid_pinpoints` and centred on black.
    """

    mode: ImageMode
    anyres_variant: AnyresVariant
    """anyres: "hf" scales with the filter of the config, "llava" always bicubic. That is all the
    difference in pixels: both centre the scaled copy with the odd pixel of padding at the right
    or bottom (transformers before 4.53 left it out, which moved the tiles by half a pixel). The
    rounding of the sequence and the order of candidates stand in `unillava.data.layout`."""
    grid_pinpoints: tuple[tuple[int, int], ...]
    """Candidate (height, width) of anyres, in pixels."""
    image: Preprocess
    frame: Preprocess
    """For the frames of a video, which are always taken as in mode `square`."""
    tile_size: int
    """Pixels per side."""

    @classmethod
    def from_config(
        cls, spec: LlavaSpec, processor_config: Mapping[str, Any] | None
    ) -> ImageProcessor:
        """Build from the spec and the contents of preprocessor_config.json.

        `image_processor` and `video_processor` blocks, as transformers 5 nests them in
        processor_config.json, take precedence over keys at the top. The image mode is the
        spec's. An empty config gives the processor that the vision tower was trained with.

        Raises:
            ConfigError: a value that cannot be understood, or one that contradicts the spec.
        """
        config = dict(processor_config or {})
        image_config = config | dict(config.get("image_processor") or {})
        frame_config = image_config | dict(config.get("video_processor") or {})
        _check_pinpoints(spec, image_config.get("image_grid_pinpoints"))
        image = Preprocess.from_config(image_config, spec.vision)
        frame = Preprocess.from_config(frame_config, spec.vision)
        side = spec.vision.image_size
        _check_output(image, side, any_shape=spec.image_mode == "square")
        _check_output(frame, side, any_shape=spec.video is not None)
        return cls(
            mode=spec.image_mode,
            anyres_variant=spec.anyres_variant,
            grid_pinpoints=spec.grid_pinpoints,
            image=image,
            frame=frame,
            tile_size=side,
        )

    def tiles(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """The tiles of one picture.

        Args:
            image: any mode; converted with `to_rgb`. Use `load_image` for its orientation.

        Returns:
            float32 [N, 3, H, W] (base tile first), and the picture's (height, width), which
            `unillava.data.layout.image_rows` takes.

        Raises:
            MediaError: an image without pixels, or far too elongated for mode `square`.
        """
        image = to_rgb(image)
        size_hw = (image.height, image.width)
        _require_pixels(image.size)
        if self.mode == "anyres":
            tiles = [self._stretched(image), *self._grid(image, size_hw)]
        elif self.mode == "pad":
            tiles = [_padded_square(image, self.image)]
        else:
            tiles = [image]
        return self._values(self.image, tiles), size_hw

    def frames(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float32 [F, 3, H, W] of the frames of a video.

        Raises:
            MediaError: no frames, or frames without pixels.
        """
        if not images:
            raise MediaError("a video needs at least one frame", given="none")
        for image in images:
            _require_pixels(image.size)
        return self._values(self.frame, [to_rgb(image) for image in images])

    def _values(self, preprocess: Preprocess, tiles: Sequence[Image.Image]) -> np.ndarray:
        values = np.empty((len(tiles), 3, self.tile_size, self.tile_size), np.float32)
        for tile, out_3HW in zip(tiles, values, strict=True):
            preprocess.values(preprocess.geometry(tile), out_3HW)
        return values

    @property
    def _filter(self) -> int:
        return self.image.resample if self.anyres_variant == "hf" else Image.Resampling.BICUBIC

    def _stretched(self, image: Image.Image) -> Image.Image:
        return _resize(image, self.image.square_hw, self._filter)

    def _grid(self, image: Image.Image, size_hw: tuple[int, int]) -> Iterator[Image.Image]:
        rows, columns = layout.best_resolution(size_hw, self.grid_pinpoints)
        fitted = _resize(image, layout.fitted_size(size_hw, (rows, columns)), self._filter)
        canvas = Image.new("RGB", (columns, rows))
        canvas.paste(fitted, ((columns - fitted.width) // 2, (rows - fitted.height) // 2))
        side = self.tile_size
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                yield canvas.crop((left, top, left + side, top + side))


def _resize(image: Image.Image, target_hw: tuple[int, int], resample: int) -> Image.Image:
    size = (target_hw[1], target_hw[0])
    return image if image.size == size else image.resize(size, resample)


_STRIP = 256
"""Rows of a tall picture that are padded at once."""


def _padded_square(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Pad to a square of the longer side with the mean colour, and resize that square.

    Pillow resizes rows first, then columns, with bytes between. Padding only what each of the
    two passes reads gives the same bytes without ever making the square, which for a screenshot
    of 1000 x 30000 pixels would take 3.6 GB.
    """
    width, height = image.size
    if width == height:
        return image
    rows, columns = preprocess.square_hw
    fill = tuple(int(level * 255) for level in preprocess.mean or (0, 0, 0))
    if width > height:
        flat = image.resize((columns, height), preprocess.resample)
        tall = Image.new("RGB", (columns, width), fill)
        tall.paste(flat, (0, (width - height) // 2))
    else:
        tall = Image.new("RGB", (columns, height))
        for top in range(0, height, _STRIP):
            bottom = min(top + _STRIP, height)
            strip = Image.new("RGB", (height, bottom - top), fill)
            strip.paste(image.crop((0, top, width, bottom)), ((height - width) // 2, 0))
            tall.paste(strip.resize((columns, bottom - top), preprocess.resample), (0, top))
    return tall.resize((columns, rows), preprocess.resample)


@lru_cache(maxsize=16)
def _byte_values(
    rescale_factor: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> np.ndarray:
    """float32 [3, 256]: what each byte of each colour becomes.

    In transformers the bytes are multiplied in float64, rounded to float32, and normalised in
    float32 with mean and std rounded to float32.
    """
    values = np.arange(256, dtype=np.float64)
    if rescale_factor is not None:
        values = values * rescale_factor
    table = np.tile(values.astype(np.float32), (3, 1))
    if mean is not None:
        table = (table - np.float32(mean)[:, None]) / np.float32(std)[:, None]
    return table


# --- reading the config ----------------------------------------------------------------------


def _is_siglip(config: Mapping[str, Any], vision: VisionSpec) -> bool:
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or vision.kind
    return kind.lower().startswith("siglip")


def _read_size(key: str, value: Any) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest edge, None) or (None, (height, width)); one number is a shortest edge."""
    if isinstance(value, Mapping):
        value = {name: length for name, length in value.items() if length is not None}
        if set(value) == {"shortest_edge"}:
            value = value["shortest_edge"]
        elif set(value) == {"height", "width"}:
            value = (value["height"], value["width"])
    lengths = value if isinstance(value, list | tuple) else (value,)
    if len(lengths) > 2 or not all(type(n) is int and n > 0 for n in lengths):
        raise ConfigError(
            f"{key} of the processor config cannot be understood",
            given=value,
            expected='a number, {"shortest_edge": n} or {"height": h, "width": w}',
        )
    return (lengths[0], None) if len(lengths) == 1 else (None, tuple(lengths))


def _read_resample(value: Any) -> int:
    if value is None:
        return Image.Resampling.BICUBIC
    try:
        return Image.Resampling(value)
    except ValueError as error:
        raise ConfigError(
            "resample of the processor config is no filter of Pillow",
            given=value,
            expected=", ".join(f"{int(one)} ({one.name.lower()})" for one in Image.Resampling),
        ) from error


def _read_rescale(config: Mapping[str, Any]) -> float | None:
    if not config.get("do_rescale", True):
        return None
    factor = config.get("rescale_factor")
    return 1 / 255 if factor is None else float(factor)


def _read_colours(config: Mapping[str, Any], key: str, siglip: bool) -> tuple[float, float, float]:
    value = config.get(key)
    if value is None:
        usual = {"image_mean": _CLIP_MEAN, "image_std": _CLIP_STD}
        return _HALF if siglip else usual[key]
    colours = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(colours) != 3 or not all(isinstance(level, int | float) for level in colours):
        raise ConfigError(
            f"{key} of the processor config must have a number per colour",
            given=value,
            expected="three numbers",
        )
    return colours


def _check_pinpoints(spec: LlavaSpec, pinpoints: Any) -> None:
    if spec.image_mode != "anyres" or not pinpoints:
        return
    if tuple(map(tuple, pinpoints)) != spec.grid_pinpoints:
        raise ConfigError(
            "image_grid_pinpoints of the model and of its processor differ",
            given=f"processor {[list(pair) for pair in pinpoints]}",
            expected=f"as in config.json {[list(pair) for pair in spec.grid_pinpoints]}",
        )


def _check_output(preprocess: Preprocess, side: int, *, any_shape: bool) -> None:
    """The tile must be what the vision tower takes, for pictures of any shape where needed."""
    if preprocess.crop_hw is None and preprocess.shortest_edge and any_shape:
        raise ConfigError(
            "the processor config makes tiles of changing shape",
            given="size.shortest_edge without do_center_crop",
            expected="do_center_crop true, or size with height and width",
        )
    tile_hw = preprocess.crop_hw or preprocess.square_hw
    if tile_hw != (side, side):
        raise ConfigError(
            "the processor config does not make the tiles that the vision tower takes",
            given=f"{tile_hw[0]} x {tile_hw[1]} pixels",
            expected=f"{side} x {side} (vision_config.image_size)",
        )
