"""Frames out of videos, folders and animations. Every frame's grey level tells its number."""

from __future__ import annotations

import builtins
import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.pictures import scene
from unillava.data.video import load_frames, paced_indices, uniform_indices
from unillava.errors import MediaError, RequestError

STEP = 6  # grey levels between frames; coding changes them by less than half of that
FPS = 10


def picture(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (number * STEP,) * 3)


def numbers(frames: Sequence[Image.Image]) -> list[int]:
    assert all(frame.mode == "RGB" for frame in frames)
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in frames]


def write_video(
    file: Path | io.BytesIO,
    count: int = 40,
    *,
    format: str | None = None,
    codec: str = "libx264",
    times_ms: Sequence[int] | None = None,
    frame=picture,
) -> None:
    """Short groups of pictures and (H.264) frames that are stored out of order."""
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=FPS)
        first = frame(0)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        stream.gop_size = 8
        stream.bit_rate = 2_000_000
        if codec == "libx264":
            stream.options = {"crf": "8"}
            stream.codec_context.max_b_frames = 2
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            coded = av.VideoFrame.from_image(frame(number))
            coded.time_base = Fraction(1, 1000) if times_ms else Fraction(1, FPS)
            coded.pts = times_ms[number] if times_ms else number
            container.mux(stream.encode(coded))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(path)
    return path


# --- which frames ----------------------------------------------------------------------------


def test_linspace_takes_both_ends():
    assert uniform_indices(100, 5).tolist() == [0, 24, 49, 74, 99]
    assert uniform_indices(10, 1).tolist() == [0]
    assert uniform_indices(3, 6).tolist() == [0, 0, 0, 1, 1, 2]


def test_floor_never_takes_the_last():
    assert uniform_indices(100, 5, "floor").tolist() == [0, 20, 40, 60, 80]
    assert uniform_indices(3, 6, "floor").tolist() == [0, 0, 1, 1, 2, 2]


def test_paced():
    assert paced_indices(100, 30.0, 1.0).tolist() == [0, 30, 60, 90]
    assert paced_indices(10, 25.0, 100.0).tolist() == list(range(10))  # no faster than it is
    assert paced_indices(100, 10.0, 10.0, 4).tolist() == uniform_indices(100, 4).tolist()
    assert paced_indices(100, 10.0, 1.0, 10).tolist() == list(range(0, 100, 10))


@given(st.integers(1, 10**6), st.integers(1, 300), st.sampled_from(["linspace", "floor"]))
def test_uniform_properties(total, count, sampling):
    indices = uniform_indices(total, count, sampling)
    assert len(indices) == count
    assert indices[0] == 0 and indices[-1] <= total - 1
    steps = np.diff(indices)
    assert np.all(steps >= 0) and (count == 1 or steps.max() - steps.min() <= 1)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.mp4", "libx264", FPS),
        ("a.mov", "libx264", FPS),
        ("a.mkv", "libx264", FPS),
        ("a.ts", "libx264", FPS),
        ("a.avi", "libx264", FPS),
        ("a.avi", "mpeg4", FPS),
        ("a.webm", "libvpx-vp9", FPS),
        ("a.h264", "libx264", 25),  # a raw stream tells no rate
    ],
)
@pytest.mark.parametrize("count", [1, 3, 7, 40, 55])
def test_containers(name, codec, rate, count, tmp_path):
    path = tmp_path / name
    write_video(path, codec=codec)
    frames, times_s = load_frames(path, count)
    indices = uniform_indices(40, count)
    assert numbers(frames) == indices.tolist()
    assert times_s == pytest.approx(indices / rate, abs=2e-3)


def test_sampling_rules_and_bytes(mp4):
    frames, times_s = load_frames(mp4.read_bytes(), 4, sampling="floor")
    assert numbers(frames) == [0, 10, 20, 30]
    assert times_s == pytest.approx([0, 1, 2, 3])
    frames, times_s = load_frames(str(mp4), fps=2)
    assert numbers(frames) == list(range(0, 40, 5))
    assert times_s == pytest.approx(np.arange(8) / 2)
    assert numbers(load_frames(mp4, fps=2, max_frames=3)[0]) == [0, 19, 39]


def test_variable_rate_tells_true_times(tmp_path):
    times_ms = np.cumsum([0, *([40, 200, 70] * 5)]).tolist()
    path = tmp_path / "a.mkv"
    write_video(path, 16, times_ms=times_ms)
    frames, times_s = load_frames(path, 16)
    assert numbers(frames) == list(range(16))
    assert times_s == pytest.approx(np.array(times_ms) / 1000, abs=2e-3)


def test_a_clip_that_begins_late(tmp_path):
    path = tmp_path / "a.mkv"
    write_video(path, 10, times_ms=list(range(5000, 6000, 100)))
    frames, times_s = load_frames(path, 3)
    assert numbers(frames) == [0, 4, 9]
    assert times_s == pytest.approx([0, 0.4, 0.9])


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((0, 1, 0, -1, 0, 0, 32, 0), "top right"),
        ((-1, 0, 0, 0, -1, 0, 64, 32), "bottom right"),
        ((0, -1, 0, 1, 0, 0, 0, 64), "bottom left"),
    ],
)
def test_telephone_videos_are_turned(matrix, corner, tmp_path):
    """The track header of an MP4 carries a matrix that a player applies."""

    def marked(_: int) -> Image.Image:
        image = Image.new("RGB", (64, 32))
        image.paste("white", (0, 0, 32, 16))
        return image

    path = tmp_path / "a.mp4"
    write_video(path, 3, frame=marked)
    content = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = content.index(upright, content.index(b"tkhd"))
    turned = struct.pack(">9i", *(value << 16 for value in matrix), 1 << 30)
    frame = load_frames(content[:place] + turned + content[place + len(upright) :], 1)[0][0]
    assert frame.size == ((64, 32) if corner == "bottom right" else (32, 64))
    levels = np.asarray(frame.convert("L"))
    corners = {
        "top left": levels[0, 0],
        "top right": levels[0, -1],
        "bottom left": levels[-1, 0],
        "bottom right": levels[-1, -1],
    }
    assert max(corners, key=corners.get) == corner


def test_wanted_frames_are_reached_by_jumps(mp4, monkeypatch):
    """Two frames at the ends of 40, a key every 8: most of the file is never decoded."""
    decoded = []
    seeks = []

    class Watched:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def __enter__(self):
            self._container.__enter__()
            return self

        def __exit__(self, *error):
            return self._container.__exit__(*error)

        def seek(self, *args, **options):
            seeks.append(args)
            return self._container.seek(*args, **options)

        def decode(self, *args):
            for frame in self._container.decode(*args):
                decoded.append(frame.pts)
                yield frame

    open_container = av.open
    monkeypatch.setattr(av, "open", lambda *args, **kw: Watched(open_container(*args, **kw)))
    frames, _ = load_frames(mp4, 2)
    assert numbers(frames) == [0, 39]
    assert len(seeks) == 1 and len(decoded) < 12


# --- folders, lists, animations --------------------------------------------------------------


def test_folder_in_natural_order(tmp_path):
    for number in range(12):
        picture(number).save(tmp_path / f"Frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames, times_s = load_frames(tmp_path, 12)
    assert numbers(frames) == list(range(12))
    assert times_s == pytest.approx(np.arange(12) / 2)  # two per second
    frames, times_s = load_frames(tmp_path, fps=1, folder_fps=4)
    assert numbers(frames) == [0, 4, 8] and times_s == pytest.approx([0, 1, 2])


def test_list_of_pictures(tmp_path):
    path = tmp_path / "second.png"
    picture(1).save(path)
    content = io.BytesIO()
    picture(2).save(content, "PNG")
    frames, _ = load_frames([picture(0), path, content.getvalue()], 3)
    assert numbers(frames) == [0, 1, 2]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations(format):
    file = io.BytesIO()
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(format, {})
    durations_ms = [100, 300, 200, 400, 100]
    later = [picture(number) for number in range(1, 5)]
    picture(0).save(
        file, format, save_all=True, append_images=later, duration=durations_ms, **options
    )
    frames, times_s = load_frames(file.getvalue(), 5)
    assert numbers(frames) == [0, 1, 2, 3, 4]
    assert times_s == pytest.approx([0, 0.1, 0.4, 0.6, 1.0])
    assert numbers(load_frames(file.getvalue(), 2)[0]) == [0, 4]


def test_a_still_picture_is_a_video_of_one_frame(tmp_path):
    for name in ("a.png", "a.jpg"):
        picture(7).save(tmp_path / name)
        frames, times_s = load_frames(tmp_path / name, 3)
        assert numbers(frames) == [7, 7, 7] and times_s.tolist() == [0, 0, 0]


# --- errors ----------------------------------------------------------------------------------


def test_damaged_files(mp4, tmp_path):
    content = mp4.read_bytes()
    gif = io.BytesIO()
    scene(60, 40).save(gif, "GIF", save_all=True, append_images=[scene(60, 40, 1)])
    for damaged in (
        b"",
        b"no video at all",
        content[: len(content) // 2],  # without the table at its end
        gif.getvalue()[: len(gif.getvalue()) * 2 // 3],
    ):
        with pytest.raises(MediaError, match="cannot be decoded"):
            load_frames(damaged, 2)


def test_a_file_cut_short_gives_what_is_there(tmp_path):
    path = tmp_path / "a.mkv"
    write_video(path)
    content = path.read_bytes()
    frames, times_s = load_frames(content[: len(content) * 2 // 3], 5)
    shown = numbers(frames)
    assert shown[0] == 0 and 5 < shown[-1] < 35
    assert times_s[-1] == pytest.approx(shown[-1] / FPS, abs=0.11)


def test_sound_without_pictures():
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    with pytest.raises(MediaError, match="no video in it"):
        load_frames(file.getvalue(), 2)


def test_playlists_are_not_followed(mp4, tmp_path):
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{mp4}\n#EXT-X-ENDLIST\n")
    concat = tmp_path / "list.txt"
    concat.write_text(f"ffconcat version 1.0\nfile {mp4}\n")
    for path in (playlist, concat):
        with pytest.raises(MediaError, match="cannot be decoded"):
            load_frames(path, 2)


def test_sources_that_hold_nothing(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        load_frames(tmp_path / "absent.mp4", 2)
    with pytest.raises(MediaError, match="no frames"):
        load_frames(tmp_path, 2)
    with pytest.raises(MediaError, match="no frames"):
        load_frames([], 2)
    with pytest.raises(MediaError, match="not something"):
        load_frames(None, 2)


@pytest.mark.parametrize(
    "options", [{}, {"num_frames": 2, "fps": 1}, {"num_frames": 0}, {"fps": -1.0}]
)
def test_requests_that_cannot_be(options, mp4):
    with pytest.raises(RequestError):
        load_frames(mp4, **options)
    with pytest.raises(RequestError):
        load_frames(mp4, fps=1, max_frames=0)


def test_without_pyav(mp4, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(MediaError, match=r"unillava\[video\]"):
        load_frames(mp4, 2)
    picture(3).save(tmp_path / "0.png")
    assert numbers(load_frames(tmp_path, 1)[0]) == [3]
