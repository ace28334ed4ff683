"""The one batch that every backend is given: pictures, conversations with answers, prompts.

Rows: one conversation for each image, one about a video if the model takes videos, and one of
text only, so that the merge, its padding and each kind of row are exercised. Everything is NumPy
and is made once, in the process that compares.

Shape letters: B rows, S positions, T tiles, F frames, N learnt positions, 3HW pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unillava.data import layout
from unillava.data.collate import IMAGE, NEWLINE, VIDEO, Sample, collate
from unillava.data.images import load_image
from unillava.data.pipeline import Pipeline
from unillava.errors import RequestError
from unillava.parity.job import Arrays, write_arrays
from unillava.spec import LlavaSpec

PROMPT = "Describe this picture in one sentence."
ANSWER = "The picture shows hills and a lake under a wide sky, and the sun stands low on the left."
TEXT_PROMPT = "How many days are there in a week?"
TEXT_ANSWER = "There are seven days in a week."
IGNORED = -100
"""Label of a position that is not learnt, as transformers has it."""


@dataclass(frozen=True)
class Row:
    """One conversation of the batch."""

    title: str
    """image 1, video, text."""
    prompt: str
    answer: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Path, ...] = ()

    def request(self, answered: bool) -> dict[str, Any]:
        """The conversation as a request, with or without the answer."""
        media = [{"type": "image", "image": image} for image in self.images]
        media += [{"type": "video", "video": str(video)} for video in self.videos]
        content = [*media, {"type": "text", "text": self.prompt}]
        messages = [{"role": "user", "content": content}]
        if answered:
            messages.append({"role": "assistant", "content": self.answer})
        return {"messages": messages}


@dataclass(frozen=True)
class Inputs:
    """What the backends compute on."""

    rows: tuple[Row, ...]
    batch: Arrays
    """The conversations with answers, as `unillava.data.collate` gives them."""
    prompts: tuple[Arrays, ...]
    """Each row's prompt as a batch of its own, for greedy decoding."""
    hf_batch: Arrays
    """`batch` in the form of transformers' processors, with labels."""
    hf_prompts: tuple[Arrays, ...]

    def write(self, directory: Path) -> None:
        """One folder of .npy files for each batch, native and transformers'."""
        for kind, batches in (
            ("native", (self.batch, *self.prompts)),
            ("transformers", (self.hf_batch, *self.hf_prompts)),
        ):
            names = ["batch", *(f"prompt{n}" for n in range(len(self.prompts)))]
            for name, arrays in zip(names, batches, strict=True):
                write_arrays(directory / kind / name, arrays)


def make_rows(
    pipeline: Pipeline,
    scratch: Path,
    *,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    prompt: str | None = None,
) -> tuple[Row, ...]:
    """The conversations. Without pictures of the user's, one is generated.

    Args:
        pipeline: of the checkpoint.
        scratch: an existing folder, where the generated video is put.
        images, videos: sources as `unillava chat` takes them.
        prompt: asked about each image and video.

    Raises:
        RequestError: a video for a model that takes none.
        MediaError: an image cannot be read.
    """
    if videos and pipeline.spec.video is None:
        raise RequestError(
            "this model does not take videos",
            given=", ".join(videos),
            fix="leave --video out",
        )
    prompt = prompt or PROMPT
    pictures = [load_image(source) for source in images] or [landscape()]
    titles = ["image"] if len(pictures) == 1 else [f"image {n + 1}" for n in range(len(pictures))]
    rows = [
        Row(title, prompt, ANSWER, images=(picture,))
        for title, picture in zip(titles, pictures, strict=True)
    ]
    if pipeline.spec.video is not None:
        paths = [Path(video) for video in videos]
        paths = paths or [write_frames(scratch / "frames", pictures[0], pipeline.num_frames)]
        rows += [Row("video", prompt, ANSWER, videos=(path,)) for path in paths]
    if not getattr(pipeline.template, "caption", False):  # a caption needs a picture
        rows.append(Row("text", TEXT_PROMPT, TEXT_ANSWER))
    return tuple(rows)


def make_inputs(pipeline: Pipeline, rows: Sequence[Row]) -> Inputs:
    """Prepare and collate the rows.

    Raises:
        RequestError: a row is longer than the context, or nothing in the batch is learnt.
        MediaError: an image or video cannot be read.
    """
    answered = [pipeline.prepare(row.request(answered=True), generate=False) for row in rows]
    asked = [pipeline.prepare(row.request(answered=False)) for row in rows]
    batch = collate(answered)
    if not len(batch["targets"]):
        raise RequestError(
            "no token of the conversations is learnt, so there is no loss to compare",
            given=f"template {pipeline.template.name!r}",
            expected="a template that marks the assistant's words",
            fix="name another with --template",
        )
    spec = pipeline.spec
    return Inputs(
        rows=tuple(rows),
        batch=batch,
        prompts=tuple(collate([sample]) for sample in asked),
        hf_batch=transformers_arrays(spec, answered, rows) | {"labels": _labels(batch)},
        hf_prompts=tuple(
            transformers_arrays(spec, [sample], [row])
            for sample, row in zip(asked, rows, strict=True)
        ),
    )


def _labels(batch: Arrays) -> np.ndarray:
    """[B, S]: the token itself where it is learnt, elsewhere IGNORED; the model shifts them."""
    labels = np.full(batch["input_ids"].shape, IGNORED, np.int64)
    labels.reshape(-1)[batch["target_index"] + 1] = batch["targets"]
    return labels


# --- the form that transformers' models take -------------------------------------------------


def transformers_arrays(spec: LlavaSpec, samples: Sequence[Sample], rows: Sequence[Row]) -> Arrays:
    """A batch as transformers' processors would make it of the same pixels.

    Returns:
        input_ids, attention_mask [B, S] int64, with one media token for each picture row;
        pixel_values [images, 3, H, W] (LLaVA) or [images, most tiles, 3, H, W] padded with
        zeros and image_sizes [images, 2] (LLaVA-NeXT); pixel_values_videos
        [videos, F, 3, H, W].
    """
    S = max(map(len, samples))
    ids_BS, mask_BS = (np.zeros((len(samples), S), np.int64) for _ in range(2))
    for b, sample in enumerate(samples):
        ids_BS[b, : len(sample)] = _ids_with_media(spec, sample)
        mask_BS[b, : len(sample)] = 1
    arrays = {"input_ids": ids_BS, "attention_mask": mask_BS}
    sizes_hw = [(image.height, image.width) for row in rows for image in row.images]
    tiles = [sample.pixels_T3HW for sample in samples if sample.pixels_T3HW is not None]
    if tiles:
        arrays |= _transformers_pixels(spec, np.concatenate(tiles), sizes_hw)
    frames = [sample.frames_F3HW for sample in samples if sample.frames_F3HW is not None]
    if frames:
        arrays["pixel_values_videos"] = np.stack(frames)
    return arrays


def _ids_with_media(spec: LlavaSpec, sample: Sample) -> np.ndarray:
    # transformers counts newline rows of an image as image tokens; its videos have none.
    token_of = {IMAGE: spec.image_token, NEWLINE: spec.image_token, VIDEO: spec.video_token}
    ids_S = sample.ids_S.copy()
    for kind, token in token_of.items():
        if token is not None:
            ids_S[sample.kind_S == kind] = token
    return ids_S


def _transformers_pixels(
    spec: LlavaSpec, tiles_T3HW: np.ndarray, sizes_hw: Sequence[tuple[int, int]]
) -> Arrays:
    if spec.family == "llava":
        return {"pixel_values": tiles_T3HW}
    counts = [layout.num_tiles(spec, size) for size in sizes_hw]
    padded = np.zeros((len(counts), max(counts), *tiles_T3HW.shape[1:]), np.float32)
    ends = np.cumsum(counts)
    for n, (end, count) in enumerate(zip(ends, counts, strict=True)):
        padded[n, :count] = tiles_T3HW[end - count : end]
    return {"pixel_values": padded, "image_sizes": np.array(sizes_hw, np.int64)}


def why_not_transformers(spec: LlavaSpec) -> str | None:
    """What of this model transformers' LLaVA classes cannot express; None: they can."""
    if spec.projector.depth != 2:
        return f"its projector has {spec.projector.depth} linear layers, not 2"
    if spec.family != "llava" and not (spec.image_mode == "anyres" and spec.unpad):
        return "it does not lay out images as anyres with spatial_unpad"
    if spec.anyres_variant != "hf":
        return f"it rounds anyres sizes as {spec.anyres_variant!r} does"
    if spec.family == "llava" and spec.image_mode == "anyres":
        return "it tiles images, which transformers' LlavaForConditionalGeneration does not"
    video = spec.video
    if video is not None and (
        video.newline != "no_token"
        or video.pool_position != "before_projector"
        or video.pool_mode not in ("average", "max")
    ):
        return "its videos are pooled or laid out in a way of the original repository"
    return None


# --- pictures for those who give none --------------------------------------------------------


def landscape(width: int = 640, height: int = 480, shift: int = 0) -> Image.Image:
    """A picture with a photograph's statistics: gradients, edges, soft texture at all scales.

    `shift` moves the scene to the left by so many pixels (frames of a video).
    """
    x_W = (np.arange(width) + shift) / width
    y_H1 = np.arange(height)[:, None] / height
    sky_HW3 = np.stack([0.55 + 0.35 * y_H1, 0.65 + 0.2 * y_H1, 0.95 - 0.15 * y_H1], -1) * np.ones(
        (1, width, 1)
    )
    sun_HW = np.exp(-(((x_W - 0.25) * 4) ** 2 + ((y_H1 - 0.3) * 5) ** 2) * 6)
    picture = sky_HW3 + sun_HW[..., None] * np.array([0.5, 0.35, 0.0])
    for n, (level, colour) in enumerate(
        [(0.55, (0.45, 0.55, 0.6)), (0.65, (0.25, 0.45, 0.3)), (0.78, (0.2, 0.3, 0.45))]
    ):
        ridge_W = level + 0.06 / (n + 1) * np.sin(x_W * (5 + 4 * n) + n) * np.cos(x_W * 17 + 2 * n)
        picture = np.where((y_H1 > ridge_W)[..., None], np.array(colour), picture)
    random = np.random.default_rng(0)
    texture_HW = np.zeros((height, width))
    for cell in (4, 16, 64):
        grid = random.standard_normal((-(-height // cell) + 1, -(-width // cell) + 1))
        texture = Image.fromarray(grid.astype(np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        texture_HW += np.asarray(texture) * 0.02
    picture = np.clip(picture + np.roll(texture_HW, -shift, 1)[..., None], 0, 1)
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def write_frames(directory: Path, picture: Image.Image, count: int) -> Path:
    """A folder of frames that pan over the picture, as `unillava.data.video` reads it."""
    directory.mkdir()
    step = max(1, picture.width // (4 * count))
    pixels = np.asarray(picture)
    for n in range(count):
        Image.fromarray(np.roll(pixels, -n * step, 1)).save(directory / f"{n:03}.png")
    return directory
