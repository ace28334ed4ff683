"""From a video to a few RGB frames and their times. PyAV reads files (extra `video`).

A folder of frames, a list of frames, and an animated GIF, PNG, WebP or AVIF need Pillow only.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from unillava.data.images import MAX_IMAGE_BYTES, TIMEOUT_S, load_image, to_rgb
from unillava.data.sources import Source, describe, locate
from unillava.errors import MediaError, RequestError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

Sampling = Literal["linspace", "floor"]

MAX_VIDEO_BYTES = 1 << 30
FOLDER_FPS = 2.0
"""A folder of frames has no clock; LLaVA-NeXT takes its frames for two per second."""

_ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")
_FRAME_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


# --- which frames ----------------------------------------------------------------------------


def uniform_indices(total: int, count: int, sampling: Sampling = "linspace") -> np.ndarray:
    """`count` frame numbers out of `total`, evenly spread; repeated where the clip is shorter.

    `linspace`: from the first frame to the last, both included, cut to integers (LLaVA-NeXT with
    `force_sample`, MindFormers). `floor`: i * total // count, which never takes the last frame
    (transformers' video processors and examples).

    Returns:
        int64 [count], ascending.
    """
    if sampling == "floor":
        return np.arange(count) * total // count
    return np.linspace(0, total - 1, count).astype(np.int64)


def paced_indices(
    total: int, source_fps: float, fps: float, max_frames: int | None = None
) -> np.ndarray:
    """Frame numbers at about `fps` per second: every round(source_fps / fps)-th frame.

    More than `max_frames` are replaced by that many evenly spread ones (LLaVA-NeXT).

    Returns:
        int64, ascending.
    """
    indices = np.arange(0, total, max(1, round(source_fps / fps)))
    if max_frames is not None and len(indices) > max_frames:
        return uniform_indices(total, max_frames)
    return indices


def load_frames(
    source: Source | Sequence[Source | Image.Image],
    num_frames: int | None = None,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    sampling: Sampling = "linspace",
    folder_fps: float = FOLDER_FPS,
    timeout: float = TIMEOUT_S,
    max_bytes: int = MAX_VIDEO_BYTES,
) -> tuple[list[Image.Image], np.ndarray]:
    """Take frames out of a video, upright and as RGB.

    Give either `num_frames` (always so many; a shorter clip repeats frames) or `fps`, with
    `max_frames` as its upper bound.

    Args:
        source: path, `file://`, `http(s)://` or `data:` URI or bytes of a video or an animated
            picture; a folder of frames (in natural order: 2 before 10); or a list of pictures.
        num_frames: how many frames.
        fps: about how many frames per second.
        max_frames: upper bound with `fps`.
        sampling: see `uniform_indices`.
        folder_fps: frames per second of a folder or a list.
        timeout: seconds that a download may take in all.
        max_bytes: largest download or data: URI.

    Returns:
        The frames, and float64 [F]: when each is shown, in seconds after the first frame of the
        video. Files tell the time of every frame (also of variable rate); original LLaVA code
        divides the frame number by the average rate instead.

    Raises:
        MediaError: absent, damaged, without frames, or PyAV is not installed.
        RequestError: `num_frames` and `fps` contradict each other or are not positive.
    """
    _check_request(num_frames, fps, max_frames)
    with contextlib.ExitStack() as stack:
        clip = _open_clip(source, stack, folder_fps, timeout, max_bytes)
        total = len(clip.times_s)
        if not total:
            raise MediaError("the video has no frames", given=_name(source))
        if fps is None:
            indices = uniform_indices(total, num_frames, sampling)
        else:
            indices = paced_indices(total, clip.fps, fps, max_frames)
        wanted = [int(index) for index in np.unique(indices)]
        frames = dict(zip(wanted, clip.read(wanted), strict=True))
    return [frames[int(index)] for index in indices], clip.times_s[indices]


def _check_request(num_frames: int | None, fps: float | None, max_frames: int | None) -> None:
    if (num_frames is None) == (fps is None):
        raise RequestError(
            "frames are chosen either by their number or by their rate",
            given=f"num_frames {num_frames}, fps {fps}",
            expected="exactly one of the two",
        )
    for name, value in (("num_frames", num_frames), ("fps", fps), ("max_frames", max_frames)):
        if value is not None and value <= 0:
            raise RequestError(f"{name} must be positive", given=value)


# --- what a clip is --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clip:
    """An opened video."""

    times_s: np.ndarray
    """float64: when each frame is shown, in seconds after the first."""
    fps: float
    read: Callable[[list[int]], list[Image.Image]]
    """The frames of these ascending numbers."""


def _open_clip(
    source: Any, stack: contextlib.ExitStack, folder_fps: float, timeout: float, max_bytes: int
) -> _Clip:
    if isinstance(source, list | tuple):
        return _picture_clip(source, folder_fps, timeout)
    place = locate(source, timeout=timeout, max_bytes=max_bytes)
    if isinstance(place, Path) and place.is_dir():
        return _picture_clip(_frame_files(place), folder_fps, timeout)
    name = describe(source)
    with _readable(name):
        stream = io.BytesIO(place) if isinstance(place, bytes) else place.open("rb")
        file = stack.enter_context(stream)
        return _animation(file, name) or _video_file(file, name)


def _name(source: Any) -> str:
    return f"{len(source)} pictures" if isinstance(source, list | tuple) else describe(source)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Whatever Pillow or FFmpeg raises becomes a MediaError about `name`."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:  # both raise many kinds for damaged files
        raise MediaError(
            f"the video cannot be decoded: {error or type(error).__name__}",
            given=name,
            expected="a whole MP4, MKV, WebM, AVI, MOV or other file that FFmpeg reads",
            fix="play it in a video player, or convert it to MP4",
        ) from error


def _picture_clip(pictures: Sequence[Any], fps: float, timeout: float) -> _Clip:
    def read(wanted: list[int]) -> list[Image.Image]:
        return [
            load_image(pictures[index], timeout=timeout, max_bytes=MAX_IMAGE_BYTES)
            for index in wanted
        ]

    return _Clip(np.arange(len(pictures)) / fps, fps, read)


def _frame_files(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.suffix.lower() in _FRAME_SUFFIXES]
    if not files:
        raise MediaError(
            "the folder holds no frames",
            given=os.fspath(folder),
            expected=f"files ending in {', '.join(sorted(_FRAME_SUFFIXES))}",
        )
    return sorted(files, key=lambda path: (_natural_order(path), path.name))


def _natural_order(path: Path) -> list[str | int]:
    # Splitting by a group yields text and digits in turn, so equal places compare equal types.
    parts = re.split(r"(\d+)", path.name.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


# --- animated pictures -----------------------------------------------------------------------


def _animation(file: BinaryIO, name: str) -> _Clip | None:
    """The clip of an animated picture; None if Pillow knows no animation in this file."""
    try:
        image = Image.open(file, formats=_ANIMATIONS)
    except Image.UnidentifiedImageError:
        file.seek(0)
        return None
    durations_s = np.empty(getattr(image, "n_frames", 1))
    for index in range(len(durations_s)):
        image.seek(index)
        image.load()  # AVIF and WebP know the duration of a frame once it is decoded
        # Browsers, too, show a frame without a duration for a tenth of a second.
        durations_s[index] = (image.info.get("duration") or 100) / 1000

    def read(wanted: list[int]) -> list[Image.Image]:
        frames = []
        with _readable(name):
            for index in wanted:
                image.seek(index)
                frames.append(to_rgb(image.copy()))
        return frames

    starts_s = np.cumsum(durations_s) - durations_s
    return _Clip(starts_s, float(1 / durations_s.mean()), read)


# --- video files -----------------------------------------------------------------------------

# Stores no times of presentation: FFmpeg invents some in the order of decoding.
_WITHOUT_CLOCK = {"avi"}


@dataclass(frozen=True)
class _Index:
    """The frames of a video file in the order of presentation."""

    stamps: list[int]
    """When each is shown, in ticks; in a file without a clock: its number."""
    keys: list[int]
    """The stamps at which decoding can start; empty: only at the beginning."""
    tick_s: float
    fps: float
    has_clock: bool


def _video_file(file: BinaryIO, name: str) -> _Clip:
    """Two passes: one lists the frames without decoding them, one decodes what is wanted."""
    index = _index(file, name)
    first = index.stamps[0] if index.stamps else 0
    times_s = (np.array(index.stamps, dtype=np.float64) - first) * index.tick_s

    def read(wanted: list[int]) -> list[Image.Image]:
        stamps = [index.stamps[number] for number in wanted]
        with _readable(name):
            pictures = _decode(file, name, index, stamps, index.keys)
            pictures = pictures or _decode(file, name, index, stamps, [])
        if not pictures:
            raise MediaError("no frame of the video can be decoded", given=name)
        return pictures

    return _Clip(times_s, index.fps, read)


def _index(file: BinaryIO, name: str) -> _Index:
    with _video_stream(file, name) as (container, stream):
        packets = [
            (packet.pts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        tick_s, kind = float(stream.time_base), container.format.name
    if kind in _WITHOUT_CLOCK or any(pts is None for pts, _ in packets):
        return _Index(list(range(len(packets))), [], 1 / fps, fps, has_clock=False)
    keys = sorted(pts for pts, is_key in packets if is_key)
    return _Index(sorted(pts for pts, _ in packets), keys, tick_s, fps, has_clock=True)


def _decode(
    file: BinaryIO, name: str, index: _Index, stamps: list[int], keys: list[int]
) -> list[Image.Image]:
    """One picture for each of the ascending stamps, jumping between them from key to key.

    A frame that the decoder leaves out is replaced by the next one, at the end by the last.
    Nothing is returned if nothing can be decoded, or if a jump lands behind its stamp, as it does
    in some files; without keys there are no jumps.
    """
    pictures: list[Image.Image] = []
    with _video_stream(file, name) as (container, stream):
        frames = _stamped_frames(container, stream, index.has_clock)
        reached, frame = index.stamps[0], None
        for stamp in stamps:
            place = bisect.bisect_right(keys, stamp) - 1
            if place >= 0 and keys[place] > reached:
                container.seek(keys[place], stream=stream)
                frames = _stamped_frames(container, stream, index.has_clock)
                reached, frame = next(frames, (reached, frame))
                if reached > stamp:
                    return []
            while frame is None or reached < stamp:
                following = next(frames, None)
                if following is None:
                    break
                reached, frame = following
            if frame is not None:
                pictures.append(_upright(frame))
    return pictures


def _stamped_frames(
    container: InputContainer, stream: VideoStream, has_clock: bool
) -> Iterator[tuple[int, VideoFrame]]:
    for number, frame in enumerate(container.decode(stream)):
        if not has_clock:
            yield number, frame
        elif frame.pts is not None:
            yield frame.pts, frame


def _upright(frame: VideoFrame) -> Image.Image:
    """Telephones store the turn that a player is to make, in steps of 90 degrees."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


@contextlib.contextmanager
def _video_stream(file: BinaryIO, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first video stream, from the beginning of the file.

    Playlists and other files that name further files or addresses are not followed: the source
    may come from a stranger.
    """
    try:
        import av
    except ImportError as error:
        raise MediaError(
            "reading a video needs PyAV, which is not installed",
            given=name,
            fix="pip install 'unillava[video]', or pass a folder of frames",
        ) from error
    file.seek(0)
    with av.open(file, options={"protocol_whitelist": "none"}) as container:
        if not container.streams.video:
            raise MediaError("the file has no video in it", given=name)
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream
