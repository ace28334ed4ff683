"""Reading pictures of every kind, and turning them into tiles."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.pictures import scene, spec
from unillava.data.images import ImageProcessor, load_image, to_rgb
from unillava.data.layout import num_tiles
from unillava.errors import ConfigError, MediaError

MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = np.float32([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def grey_levels(tile_3HW: np.ndarray) -> np.ndarray:
    """The bytes that were normalised with CLIP's mean and std, [H, W, 3]."""
    return np.rint((tile_3HW * STD + MEAN) * 255).astype(np.uint8).transpose(1, 2, 0)


# --- sources ---------------------------------------------------------------------------------


@pytest.fixture
def picture() -> Image.Image:
    return scene(31, 17)


def test_every_kind_of_local_source(picture, tmp_path):
    path = tmp_path / "a photo.png"
    content = encoded(picture)
    path.write_bytes(content)
    data_uri = "data:image/png;base64," + base64.b64encode(content).decode()
    sources = [
        path,
        str(path),
        path.as_uri(),
        content,
        bytearray(content),
        memoryview(content),
        data_uri,
        data_uri.replace("+", "%2B"),
        "data:image/png," + quote(content),
    ]
    for source in sources:
        assert np.array_equal(pixels(load_image(source)), pixels(picture))
    assert load_image(picture) is picture  # not copied


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/file.png", "no such file"),
        ("file:///no/such/file.png", "no such file"),
        ("~nobody-of-this-name/a.png", "no such file"),
        ("a\0b", "no such file"),
        ("x" * 5000, "no such file"),
        (".", "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"not a picture", "cannot be decoded"),
        ("data:image/png;base64,AAA", "base64"),
        ("data:image/png;base64", "no comma"),
        (17, "not something"),
        (None, "not something"),
    ],
)
def test_sources_that_cannot_be_read(source, message):
    with pytest.raises(MediaError, match=message) as caught:
        load_image(source)
    assert len(str(caught.value)) < 700


@pytest.fixture
def server(picture, monkeypatch) -> Iterator[str]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    content = encoded(picture)
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            route = self.path.strip("/")
            if route == "missing":
                return self.send_error(404, "Not Found")
            if route == "elsewhere":
                self.send_response(302)
                self.send_header("Location", "/photo")
                return self.end_headers()
            if route == "off-the-web":
                self.send_response(302)
                self.send_header("Location", "ftp://127.0.0.1/photo.png")
                return self.end_headers()
            self.send_response(200)
            if route != "endless":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if route == "photo":
                self.wfile.write(content)
            elif route == "cut":
                self.wfile.write(content[: len(content) // 2])
            elif route == "silent":
                released.wait(20)
            elif route == "trickle":
                for byte in content:
                    if released.wait(0.05):
                        return
                    self.wfile.write(bytes([byte]))
            elif route == "endless":
                while not released.is_set():
                    try:
                        self.wfile.write(bytes(1 << 16))
                    except OSError:
                        return

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    released.set()
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.mark.parametrize("route", ["photo", "elsewhere"])
def test_url(server, picture, route):
    assert np.array_equal(pixels(load_image(f"{server}/{route}")), pixels(picture))


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("missing", "the server answered 404"),
        ("cut", "ended before the whole file"),
        ("silent", "not fetched within 0.4 s"),
        ("trickle", "not fetched within 0.4 s"),
        ("endless", "larger than allowed"),
        ("off-the-web", "cannot be fetched"),
    ],
)
def test_url_that_fails(server, route, message):
    begin = time.monotonic()
    with pytest.raises(MediaError, match=message):
        load_image(f"{server}/{route}", timeout=0.4, max_bytes=1 << 20)
    assert time.monotonic() - begin < 5


def test_size_limits_of_downloads(server, picture):
    content = encoded(picture)
    with pytest.raises(MediaError, match="larger than allowed"):
        load_image(f"{server}/photo", max_bytes=100)
    with pytest.raises(MediaError, match="larger than allowed"):
        load_image("data:;base64," + base64.b64encode(content).decode(), max_bytes=100)
    load_image(f"{server}/photo", max_bytes=len(content))


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.png"
        with pytest.raises(MediaError, match="cannot be fetched"):
            load_image(url, timeout=2)
    with pytest.raises(MediaError, match="cannot be fetched"):
        load_image("http://", timeout=2)


# --- modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    stored = scene(40, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    stored.save(path, quality=95, exif=exif)
    loaded = load_image(path)
    with Image.open(path) as opened:
        assert np.array_equal(pixels(loaded), pixels(ImageOps.exif_transpose(opened)))
    assert loaded.size == ((40, 24) if orientation < 5 else (24, 40))
    assert np.array_equal(pixels(load_image(loaded)), pixels(loaded))  # not turned twice


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01", b"rubbish"])
def test_damaged_exif_is_no_orientation(exif, tmp_path):
    path = tmp_path / "a.jpg"
    scene(20, 10).save(path, exif=exif)
    assert load_image(path).size == (20, 10)


def test_alpha_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(10, 20, 30, 255), (10, 20, 30, 0), (0, 100, 200, 128)]
    image = Image.fromarray(rgba)
    expected = [[(10, 20, 30), (255, 255, 255), (127, 177, 227)]]
    assert pixels(load_image(encoded(image))).tolist() == [[list(p) for p in expected[0]]]
    dropped = load_image(image, transparency="drop")
    assert np.array_equal(pixels(dropped), rgba[..., :3])


def test_palettes():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert pixels(load_image(encoded(image))).tolist() == [colours]
    clear = encoded(image, transparency=1)
    assert pixels(load_image(clear)).tolist() == [[colours[0], [255, 255, 255], colours[2]]]
    assert pixels(load_image(clear, transparency="drop")).tolist() == [colours]
    graded = encoded(image, transparency=bytes([255, 128, 0]))
    assert pixels(load_image(graded)).tolist() == [[[255, 0, 0], [127, 255, 127], [255] * 3]]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_transparent_colour_key(mode):
    image = Image.new(mode, (2, 1), 7 if mode == "L" else (7, 8, 9))
    image.putpixel((1, 0), 90 if mode == "L" else (90, 91, 92))
    content = encoded(image, transparency=7 if mode == "L" else (7, 8, 9))
    second = [90] * 3 if mode == "L" else [90, 91, 92]
    assert pixels(load_image(content)).tolist() == [[[255] * 3, second]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_8_bit_mode_becomes_rgb(mode):
    source = scene(33, 21)
    image = Image.new(mode, source.size) if mode == "LAB" else source.convert(mode)
    assert np.array_equal(pixels(to_rgb(image)), pixels(image.convert("RGB")))


def test_cmyk_jpeg():
    content = encoded(scene(32, 24).convert("CMYK"), "JPEG", quality=95)
    difference = pixels(load_image(content)).astype(int) - pixels(scene(32, 24))
    assert abs(difference).mean() < 12  # not inverted


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 32896, 65407, 65535]], np.uint16)
    levels = [0, 0, 1, 1, 128, 255, 255]
    for format in ("PNG", "TIFF"):
        loaded = pixels(load_image(encoded(Image.fromarray(values), format)))
        assert loaded[0].tolist() == [[level] * 3 for level in levels]
    every_byte = np.arange(256, dtype=np.uint16)[None] * 257
    assert pixels(to_rgb(Image.fromarray(every_byte)))[0, :, 1].tolist() == list(range(256))


@pytest.mark.parametrize(
    ("values", "kind", "levels"),
    [
        ([0, 7, 255], np.int32, [0, 7, 255]),
        ([-5, 257, 65535], np.int32, [0, 1, 255]),
        ([0, 500_000, 1_000_000], np.int32, [0, 128, 255]),
        ([0.0, 0.2, 1.0], np.float32, [0, 51, 255]),
        ([np.nan, 100.0, 255.0], np.float32, [0, 100, 255]),
        ([-np.inf, 2000.0, np.inf], np.float32, [0, 8, 0]),
        ([0.0, 0.0, 0.0], np.float32, [0, 0, 0]),
    ],
)
def test_deep_grey(values, kind, levels):
    image = Image.fromarray(np.array([values], kind))
    assert pixels(to_rgb(image))[0, :, 0].tolist() == levels


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert pixels(load_image(content))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files(format):
    content = encoded(scene(80, 60), format)
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_image(content[: len(content) * 2 // 3])
    with pytest.raises(MediaError):
        load_image(content[:20])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_anywhere_is_a_media_error_or_a_picture(data):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]))
    content = bytearray(encoded(scene(24, 16), format))
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        image = load_image(bytes(content), max_pixels=10_000_000)
    except MediaError:
        return
    assert image.mode == "RGB"


def test_a_pil_image_that_is_truncated(tmp_path):
    path = tmp_path / "half.png"
    content = encoded(scene(80, 60))
    path.write_bytes(content[: len(content) // 2])
    with Image.open(path) as image, pytest.raises(MediaError, match="cannot be decoded"):
        load_image(image)


def test_programs_are_not_started():
    with pytest.raises(MediaError, match="EPS is not read"):
        load_image(encoded(scene(8, 8), "EPS"))


def test_pixel_limit_can_be_raised(monkeypatch):
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(MediaError, match="more pixels than allowed"):
        load_image(b"P6 20000 20000 255\n")  # a header that promises 1.2 GB
    small = encoded(scene(20, 10))
    for source in (small, Image.open(io.BytesIO(small))):
        with pytest.raises(MediaError, match="20 x 10"):
            load_image(source, max_pixels=199)
        assert load_image(source, max_pixels=200).size == (20, 10)
    # Stand in for a picture beyond Pillow's own guard, without decoding gigabytes.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    monkeypatch.setattr("unillava.data.images.MAX_PIXELS", 120)
    with pytest.raises(MediaError, match="more pixels than allowed"):
        load_image(small, max_pixels=120)
    assert load_image(small, max_pixels=200).size == (20, 10)
    assert Image.MAX_IMAGE_PIXELS == 60
    monkeypatch.undo()
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_pixels(size):
    processor = ImageProcessor.from_config(spec("pad"), {})
    for use in (load_image, processor.tiles, lambda image: processor.frames([image])):
        with pytest.raises(MediaError, match="no pixels"):
            use(Image.new("RGB", size))


# --- tiles -----------------------------------------------------------------------------------


def small(mode: str, **fields):
    """CLIP tiles of 28 x 28 pixels."""
    pinpoints = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    return spec(mode, image_size=28, pinpoints_hw=pinpoints, **fields)


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (28, 28), (97, 31), (31, 97)])
def test_shapes(mode, size):
    model = small(mode)
    tiles, size_hw = ImageProcessor.from_config(model, {}).tiles(scene(*size))
    assert size_hw == size[::-1]
    assert tiles.shape == (num_tiles(model, size_hw), 3, 28, 28)
    assert tiles.dtype == np.float32 and tiles.flags.c_contiguous


def test_square_keeps_the_middle():
    stripes = np.zeros((28, 84, 3), np.uint8)
    stripes[:, 28:56] = 255
    (tile,), _ = ImageProcessor.from_config(small("square"), {}).tiles(Image.fromarray(stripes))
    assert np.all(grey_levels(tile) == 255)


def test_pad_surrounds_with_the_mean_colour():
    white = Image.new("RGB", (28, 13), "white")
    (tile,), _ = ImageProcessor.from_config(small("pad"), {}).tiles(white)
    levels = grey_levels(tile)
    top = (28 - 13) // 2
    assert np.all(levels[:top] == (122, 116, 104)) and np.all(levels[top + 13 :] == (122, 116, 104))
    assert np.all(levels[top : top + 13] == 255)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from(list(Image.Resampling)))
def test_padding_in_strips_equals_padding_at_once(width, height, resample):
    """The large square that `pad` means is never made, yet every byte is the same."""
    image = scene(width, height)
    long = max(width, height)
    square = Image.new("RGB", (long, long), (122, 116, 104))
    square.paste(image, ((long - width) // 2, (long - height) // 2))
    processor = ImageProcessor.from_config(small("pad"), {"resample": int(resample)})
    (tile,), _ = processor.tiles(image)
    assert np.array_equal(grey_levels(tile), pixels(square.resize((28, 28), resample)))


def test_anyres_tiles_show_the_picture_in_order():
    """A picture of the exact size of a candidate is cut, not scaled: the tiles are its parts."""
    picture = scene(84, 28)
    tiles, _ = ImageProcessor.from_config(small("anyres"), {}).tiles(picture)
    parts = np.split(pixels(picture), 3, axis=1)
    for tile, part in zip(tiles[1:], parts, strict=True):
        assert np.array_equal(grey_levels(tile), part)
    stretched = picture.resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(grey_levels(tiles[0]), pixels(stretched))


def test_anyres_pads_with_black_and_the_odd_pixel_last():
    """19 x 56 in 28 x 56: 9 pixels to pad, 4 above and 5 below."""
    white = Image.new("RGB", (56, 19), "white")
    tiles, _ = ImageProcessor.from_config(small("anyres"), {}).tiles(white)
    for tile in tiles[1:]:
        levels = grey_levels(tile)
        assert np.all(levels[:4] == 0) and np.all(levels[23:] == 0)
        assert np.all(levels[4:23] == 255)


def test_variants_differ_in_the_filter_only():
    picture = scene(50, 41)
    config = {"resample": int(Image.Resampling.NEAREST)}
    ours = {
        name: ImageProcessor.from_config(small("anyres", anyres_variant=name), config).tiles(
            picture
        )[0]
        for name in ("hf", "llava")
    }
    assert not np.array_equal(ours["hf"], ours["llava"])
    bicubic = ImageProcessor.from_config(small("anyres"), {}).tiles(picture)[0]
    assert np.array_equal(ours["llava"], bicubic)


def test_frames_are_taken_as_square_pictures():
    pictures = [scene(60, 30, seed) for seed in range(3)]
    square = ImageProcessor.from_config(small("square"), {})
    for mode in ("square", "pad", "anyres"):
        frames = ImageProcessor.from_config(small(mode), {}).frames(pictures)
        assert frames.shape == (3, 3, 28, 28) and frames.dtype == np.float32
        for frame, picture in zip(frames, pictures, strict=True):
            assert np.array_equal(frame, square.tiles(picture)[0][0])
    with pytest.raises(MediaError, match="at least one frame"):
        square.frames([])


def test_other_modes_are_converted():
    processor = ImageProcessor.from_config(small("square"), {})
    grey = scene(30, 30).convert("L")
    assert np.array_equal(processor.tiles(grey)[0], processor.tiles(grey.convert("RGB"))[0])


def test_too_elongated_for_a_centre_crop():
    thin = Image.new("RGB", (1, 20_000_000 // 28))
    square = ImageProcessor.from_config(small("square"), {})
    with pytest.raises(MediaError, match="too elongated"):
        square.tiles(thin)


# --- configs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": 28, "crop_size": 28},
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"shortest_edge": 28, "longest_edge": None}, "do_center_crop": True},
        {"image_processor_type": "CLIPImageProcessorFast", "resample": 3, "do_rescale": True},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28},
        {"image_processor": {"size": 28, "crop_size": 28}, "size": 99, "video_processor": {}},
        {"rescale_factor": 1 / 255, "image_mean": (0.48145466, 0.4578275, 0.40821073)},
    ],
)
def test_spellings_of_the_same_processor(config):
    assert ImageProcessor.from_config(small("square"), config) == ImageProcessor.from_config(
        small("square"), None
    )


def test_siglip_stretches():
    model = spec("square", tower="siglip", image_size=28)
    config = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}
    processor = ImageProcessor.from_config(model, config)
    assert processor == ImageProcessor.from_config(model, {})
    assert processor.image.crop_hw is None and processor.image.mean == (0.5, 0.5, 0.5)
    (tile,), _ = processor.tiles(scene(60, 30))
    stretched = scene(60, 30).resize((28, 28), Image.Resampling.BICUBIC)
    levels = np.rint((tile * 0.5 + 0.5) * 255).transpose(1, 2, 0)
    assert np.array_equal(levels, pixels(stretched))


def test_frames_may_have_their_own_processor():
    config = {"size": 28, "crop_size": 28, "video_processor": {"image_mean": 0.5, "image_std": 0.5}}
    processor = ImageProcessor.from_config(small("square"), config)
    assert processor.image.mean == (0.48145466, 0.4578275, 0.40821073)
    assert processor.frame.mean == processor.frame.std == (0.5, 0.5, 0.5)


def test_switched_off_steps():
    model = small("square")
    grey = Image.new("RGB", (28, 28), (51, 102, 204))
    rescaled = ImageProcessor.from_config(model, {"do_normalize": False})
    assert np.allclose(rescaled.tiles(grey)[0][0, :, 0, 0], [0.2, 0.4, 0.8])
    raw = ImageProcessor.from_config(model, {"do_normalize": False, "do_rescale": False})
    assert raw.tiles(grey)[0][0, :, 0, 0].tolist() == [51, 102, 204]


def test_black_around_pictures_smaller_than_the_crop():
    processor = ImageProcessor.from_config(small("square"), {"size": 23, "crop_size": 28})
    (tile,), _ = processor.tiles(Image.new("RGB", (23, 23), "white"))
    levels = grey_levels(tile)[..., 0]
    assert levels[3:26, 3:26].min() == 255
    assert levels[:3].max() == levels[26:].max() == levels[:, :3].max() == levels[:, 26:].max() == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "large"}, "size of the processor config"),
        ({"size": {"longest_edge": 28}}, "size of the processor config"),
        ({"size": 0}, "size of the processor config"),
        ({"crop_size": [1, 2, 3]}, "crop_size of the processor config"),
        ({"size": 30, "crop_size": 30}, "30 x 30"),
        ({"do_center_crop": False}, "changing shape"),
        ({"do_resize": False}, "must be resized"),
        ({"resample": 17}, "no filter of Pillow"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": ["a", "b", "c"]}, "image_std"),
    ],
)
def test_configs_that_cannot_be(config, message):
    with pytest.raises(ConfigError, match=message):
        ImageProcessor.from_config(small("square"), config)


def test_candidates_must_agree_with_the_model():
    model = small("anyres")
    same = {"image_grid_pinpoints": [list(pair) for pair in model.grid_pinpoints]}
    ImageProcessor.from_config(model, same)
    with pytest.raises(ConfigError, match="image_grid_pinpoints"):
        ImageProcessor.from_config(model, {"image_grid_pinpoints": [[28, 56]]})
    ImageProcessor.from_config(replace(model, image_mode="pad"), {"image_grid_pinpoints": [[1, 2]]})


def test_shortest_edge_without_crop_is_enough_for_squares():
    processor = ImageProcessor.from_config(small("pad"), {"do_center_crop": False})
    assert processor.tiles(scene(50, 20))[0].shape == (1, 3, 28, 28)
