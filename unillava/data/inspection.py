"""What is wrong with the picture or video that a record names, and how large it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from unillava.data.forms import is_url
from unillava.data.images import image_size, load_image, orientation
from unillava.data.sources import describe
from unillava.data.video import load_frames
from unillava.errors import MediaError

Depth = Literal["whole", "size", "none"]
"""How far pictures are read: decoded, opened for their size, or not at all."""

SUFFIXES = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "jpeg", "mpo"),
    "PNG": ("png", "apng"),
    "GIF": ("gif",),
    "WEBP": ("webp",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
    "JPEG2000": ("jp2", "j2k", "jpx"),
}
"""Format, as Pillow calls it: the suffixes of its files."""
OTHER_SUFFIXES = (".jpg", ".png", ".gif", ".jpeg", ".webp", ".JPG", ".PNG", ".JPEG")
"""Under which a picture is looked for that is not there (OCR-VQA's .gif may be saved as .jpg)."""
PATCH = 14
"""Pixels: a picture with a shorter side is hardly one."""
ELONGATED = 30.0
"""Longer side over shorter from which a picture is pointed out."""


@dataclass
class Picture:
    """What was found out about one picture or video."""

    size_hw: tuple[int, int] | None = None
    """Of the upright picture, in pixels; None: not known."""
    findings: list[tuple[str, str]] = field(default_factory=list)
    """(kind, detail); the kinds are those of `unillava.data.check`."""
    found_as: str | None = None
    """Where a picture was found that is not where its record says."""


def inspect_image(source: Any, depth: Depth, fetch: bool = False) -> Picture:
    """Look at a picture.

    Args:
        source: path, URL or data: URI.
        depth: how far it is read.
        fetch: read those that lie on the web, too.
    """
    picture = Picture()
    if not isinstance(source, str):
        picture.findings.append(("image-damaged", f"{describe(source)} is no path"))
        return picture
    if is_url(source) and not (fetch or source.startswith(("data:", "file:"))):
        picture.findings.append(("not-fetched", describe(source)))
        return picture
    if not is_url(source) and not os.path.exists(source):
        picture.found_as = _elsewhere(source)
        if picture.found_as is None:
            picture.findings.append(("image-missing", source))
            return picture
        picture.findings.append(("image-renamed", f"{source} is there as {picture.found_as}"))
        source = picture.found_as
    if depth == "none":
        return picture
    try:
        picture.size_hw = load_image(source).size[::-1] if depth == "whole" else None
        if not is_url(source):
            size_hw = _header(source, picture)
            picture.size_hw = picture.size_hw or size_hw
    except MediaError as error:
        picture.findings.append(("image-damaged", f"{describe(source)}: {error.problem}"))
        return picture
    picture.findings += _shape_findings(describe(source), picture.size_hw)
    return picture


def inspect_video(source: Any, depth: Depth, fetch: bool = False) -> Picture:
    """Look at a video: its first and its last frame. See `inspect_image`."""
    video = Picture()
    if not isinstance(source, str):
        video.findings.append(("video-damaged", f"{describe(source)} is no path"))
    elif is_url(source) and not fetch:
        video.findings.append(("not-fetched", describe(source)))
    elif not is_url(source) and not os.path.exists(source):
        video.findings.append(("video-missing", source))
    elif depth == "whole":
        try:
            (first, *_), _ = load_frames(source, 2)
            video.size_hw = first.size[::-1]
        except MediaError as error:
            kind = "video-unread" if "PyAV" in error.problem else "video-damaged"
            video.findings.append((kind, f"{describe(source)}: {error.problem}"))
    return video


def _header(path: str, picture: Picture) -> tuple[int, int]:
    """The size, after the turn that EXIF asks for; looks at type and suffix on the way."""
    try:
        with closing(Image.open(path)) as image:
            turned = orientation(image)
            kind = image.format or ""
            frames = getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow's plug-ins raise many kinds for damaged files
        raise MediaError(f"the image cannot be opened: {error or type(error).__name__}") from error
    suffix = Path(path).suffix[1:].lower()
    if suffix not in SUFFIXES.get(kind, (suffix,)):
        picture.findings.append(("suffix", f"{path} is {kind}"))
    if turned > 1:
        picture.findings.append(("turned", f"{path}: EXIF orientation {turned}"))
    if frames > 1 and kind != "MPO":
        picture.findings.append(("animated", f"{path}: {frames} frames, the first is used"))
    return image_size(path)


def _shape_findings(name: str, size_hw: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    if size_hw is None:
        return
    height, width = size_hw
    if min(size_hw) < PATCH:
        yield "tiny", f"{name}: {width} x {height}"
    elif max(size_hw) > ELONGATED * min(size_hw):
        yield "elongated", f"{name}: {width} x {height}"


def _elsewhere(path: str) -> str | None:
    """The same picture under another suffix."""
    stem = os.path.splitext(path)[0]
    return next((stem + s for s in OTHER_SUFFIXES if os.path.exists(stem + s)), None)
