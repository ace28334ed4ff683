"""From a request to a sample: pictures, prompt, tokens, and the rows of the merged sequence.

Shape letters: S positions, T tiles, F frames, 3HW pixels.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unillava.data import layout, request
from unillava.data.collate import IMAGE, NEWLINE, TEXT, VIDEO, Sample
from unillava.data.conversation import render
from unillava.data.images import ImageProcessor, load_image
from unillava.data.tokens import encode
from unillava.data.video import load_frames
from unillava.errors import RequestError
from unillava.light import import_transformers_light
from unillava.spec import LlavaSpec


@dataclass(frozen=True)
class Pipeline:
    """Everything that turns a request into arrays for one checkpoint."""

    spec: LlavaSpec
    tokenizer: Any
    template: Any
    """What `unillava.data.conversation.choose_template` returned."""
    images: ImageProcessor
    num_frames: int
    """Frames taken from a video."""

    def prepare(
        self, chat_request: dict, *, generate: bool = True, limit: int | None = -1
    ) -> Sample:
        """One request (see `unillava.data.request.normalise`) as a sample.

        With `generate` the prompt ends where the assistant is to speak; without, the assistant
        turns are learnt. A sample of more positions than `limit` is refused; -1: than the model's
        context, None: no sample is.

        Raises:
            RequestError: malformed request, or a prompt that is too long.
            MediaError: an image or video cannot be read.
        """
        messages, images, videos = request.normalise(chat_request)
        self.refuse_unsupported(videos)
        rendered = render(self.template, messages, add_generation_prompt=generate)
        encoded = encode(self.tokenizer, rendered, self.spec)
        tiles = [self.images.tiles(load_image(source)) for source in images]
        frames = [self._frames(source) for source in videos]
        sample = expand(
            self.spec,
            encoded.ids,
            encoded.learnt,
            [pixels for pixels, _ in tiles],
            [size_hw for _, size_hw in tiles],
            frames,
        )
        limit = self.spec.text.max_position if limit == -1 else limit
        if limit is not None and len(sample) > limit:
            raise RequestError(
                "the prompt is longer than the model's context",
                given=f"{len(sample)} positions ({int((sample.kind_S == TEXT).sum())} of text)",
                expected=f"at most {limit}",
                fix="shorten the conversation, or give fewer or smaller images or frames",
            )
        return sample

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling a tokenizer imports transformers, and that would import torch: seconds and
        # hundreds of megabytes in each worker process.
        values = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return _revive, (pickle.dumps(values),)

    def refuse_unsupported(self, videos: Sequence[Any]) -> None:
        """Raise RequestError for videos that the model does not take."""
        if videos and self.spec.video is None:
            raise RequestError(
                "this model does not take videos",
                given=f"{len(videos)} video(s), model family {self.spec.family}",
                expected="images and text",
                fix="use a LLaVA-NeXT-Video checkpoint, or pass frames as images",
            )

    def _frames(self, source: Any) -> np.ndarray:
        pictures, _ = load_frames(source, self.num_frames)
        return self.images.frames(pictures)


def _revive(values: bytes) -> Pipeline:
    import_transformers_light()
    return Pipeline(*pickle.loads(values))


def expand(
    spec: LlavaSpec,
    ids_S: np.ndarray,
    learnt_S: np.ndarray,
    tiles: Sequence[np.ndarray],
    sizes_hw: Sequence[tuple[int, int]],
    frames: Sequence[np.ndarray],
) -> Sample:
    """Replace each image or video marker by the rows it stands for.

    Args:
        spec: the model.
        ids_S: int64 with one `image_token` per image and one `video_token` per video.
        learnt_S: bool.
        tiles: [T, 3, H, W] float32 of each image.
        sizes_hw: original height and width of each image, in pixels.
        frames: [F, 3, H, W] float32 of each video.

    Raises:
        RequestError: markers and media do not agree in number.
    """
    per_frame = layout.rows_per_frame(spec) if frames else 0
    image_bases = np.cumsum([0] + [len(t) * spec.rows_per_tile for t in tiles])
    video_bases = np.cumsum([0] + [len(f) * per_frame for f in frames])
    image_layouts = [layout.image_rows(spec, size) for size in sizes_hw]
    video_layouts = [layout.video_rows(spec, len(f)) for f in frames]
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    counts = {"image": 0, "video": 0}
    media = {spec.image_token: ("image", IMAGE, image_layouts, image_bases)}
    if spec.video_token is not None:
        media[spec.video_token] = ("video", VIDEO, video_layouts, video_bases)
    for place in np.flatnonzero(np.isin(ids_S, list(media))):
        pieces.append(_text_piece(ids_S[start:place], learnt_S[start:place]))
        name, kind, layouts, bases = media[int(ids_S[place])]
        n = counts[name]
        counts[name] += 1
        if n < len(layouts):
            pieces.append(_media_piece(layouts[n], kind, int(bases[n])))
        start = place + 1
    for name, given in (("image", len(tiles)), ("video", len(frames))):
        if counts[name] != given:
            raise RequestError(
                f"the number of {name}s contradicts the prompt",
                given=f"{given} {name}(s)",
                expected=f"{counts[name]}, as many as the prompt has <{name}> markers",
            )
    pieces.append(_text_piece(ids_S[start:], learnt_S[start:]))
    ids, kinds, rows, learnt = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return Sample(
        ids,
        kinds,
        rows,
        learnt,
        pixels_T3HW=np.concatenate(tiles) if tiles else None,
        frames_F3HW=np.concatenate(frames) if frames else None,
        image_rows=int(image_bases[-1]),
        video_rows=int(video_bases[-1]),
    )


def _text_piece(
    ids: np.ndarray, learnt: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    kind = np.full(len(ids), TEXT, np.int8)
    return ids.astype(np.int64), kind, np.zeros(len(ids), np.int64), learnt.astype(bool)


def _media_piece(
    rows: np.ndarray, kind: int, base: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    n, newline = len(rows), rows == layout.NEWLINE
    kinds = np.where(newline, NEWLINE, kind).astype(np.int8)
    return np.zeros(n, np.int64), kinds, np.where(newline, 0, rows + base), np.zeros(n, bool)
