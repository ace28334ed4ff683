"""Samples to a batch. Where every row of the merged sequence comes from is settled here.

Shape letters: B rows, S positions, T tiles of all images, F frames of all videos, N learnt
positions, 3HW pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unillava.errors import RequestError

TEXT, IMAGE, VIDEO, NEWLINE = range(4)
"""Kinds of rows of the table that the model gathers from, in the table's order."""


@dataclass(frozen=True)
class Sample:
    """One conversation, ready to be collated."""

    ids_S: np.ndarray
    """int64. Text ids; 0 where an image or a video row stands."""
    kind_S: np.ndarray
    """int8. TEXT, IMAGE, VIDEO or NEWLINE."""
    row_S: np.ndarray
    """int64. Which row of this sample's images (or videos); 0 for text and newline."""
    learnt_S: np.ndarray
    """bool. The tokens that are to be learnt."""
    pixels_T3HW: np.ndarray | None = None
    """float32, all tiles of all images of this sample."""
    frames_F3HW: np.ndarray | None = None
    image_rows: int = 0
    """Projected rows that all tiles of this sample yield."""
    video_rows: int = 0

    def __len__(self) -> int:
        return len(self.ids_S)


def collate(
    samples: Sequence[Sample], *, pad_to: int = 1, spare: Sample | None = None
) -> dict[str, np.ndarray]:
    """A right-padded batch of one sample per row; see `collate_rows`."""
    return collate_rows([[sample] for sample in samples], pad_to=pad_to, spare=spare)


def collate_rows(
    rows: Sequence[Sequence[Sample]],
    *,
    pad_to: int = 1,
    pad_targets_to: int = 1,
    spare: Sample | None = None,
) -> dict[str, np.ndarray]:
    """A right-padded batch. The samples of a row do not see one another: each is a segment, and its
    positions begin at 0.

    Args:
        rows: at least one, of at least one sample each.
        pad_to: S becomes a multiple of this (buckets for compiled graphs).
        pad_targets_to: N becomes a multiple of this; the targets added are -100, which adds
            nothing to a loss.
        spare: whose tiles and frames a batch without any carries unused (training: every rank
            then runs the vision path, so that nobody waits for gradients that never come).

    Returns:
        input_ids, position_ids, segment_ids, merge_index [B, S] int64; lengths [B] int64;
        target_index, targets [N] int64; pixel_values [T, 3, H, W] and pixel_values_videos
        [F, 3, H, W] float32 where there are any.

    Raises:
        RequestError: no samples.
    """
    if not rows or not all(rows):
        raise RequestError("nothing to collate", given="0 samples", expected="at least one")
    samples = [sample for row in rows for sample in row]
    B = len(rows)
    lengths_B = np.array([sum(len(sample) for sample in row) for row in rows], np.int64)
    S = -(-int(lengths_B.max()) // pad_to) * pad_to
    with_images = [s for s in samples if s.pixels_T3HW is not None]
    with_videos = [s for s in samples if s.frames_F3HW is not None]
    if spare is not None:
        with_images = with_images or [s for s in [spare] if s.pixels_T3HW is not None]
        with_videos = with_videos or [s for s in [spare] if s.frames_F3HW is not None]
    batch = {"lengths": lengths_B}
    if with_images:
        batch["pixel_values"] = np.concatenate([s.pixels_T3HW for s in with_images])
    if with_videos:
        batch["pixel_values_videos"] = np.concatenate([s.frames_F3HW for s in with_videos])
    image_rows = sum(s.image_rows for s in with_images)
    video_rows = sum(s.video_rows for s in with_videos)

    input_ids_BS = np.zeros((B, S), np.int64)
    segment_ids_BS = np.zeros((B, S), np.int64)
    position_ids_BS = np.broadcast_to(np.arange(S, dtype=np.int64), (B, S)).copy()
    learnt_BS = np.zeros((B, S), bool)
    merge_index_BS = np.arange(B * S, dtype=np.int64).reshape(B, S)
    # First row of this sample's images and videos, and of the newline, in the model's table.
    first = {IMAGE: B * S, VIDEO: B * S + image_rows, NEWLINE: B * S + image_rows + video_rows}
    for b, row in enumerate(rows):
        begin = 0
        for segment, sample in enumerate(row, 1):
            place = slice(begin, begin + len(sample))
            input_ids_BS[b, place], segment_ids_BS[b, place] = sample.ids_S, segment
            position_ids_BS[b, place] = np.arange(len(sample))
            # Position s is asked for token s + 1, so the first token of a sample is no target.
            learnt_BS[b, place] = sample.learnt_S
            learnt_BS[b, begin] = False
            for kind, base in first.items():
                places = np.flatnonzero(sample.kind_S == kind)
                merge_index_BS[b, begin + places] = base + sample.row_S[places]
            first[IMAGE] += sample.image_rows
            first[VIDEO] += sample.video_rows
            begin += len(sample)
    target_index_N = np.flatnonzero(learnt_BS) - 1
    targets_N = input_ids_BS.reshape(-1)[target_index_N + 1]
    spare_targets = -len(targets_N) % pad_targets_to
    return batch | {
        "input_ids": input_ids_BS,
        "position_ids": position_ids_BS,
        "segment_ids": segment_ids_BS,
        "merge_index": merge_index_BS,
        "target_index": np.pad(target_index_N, (0, spare_targets)),
        "targets": np.pad(targets_N, (0, spare_targets), constant_values=-100),
    }


def cut(sample: Sample, length: int) -> Sample:
    """The first `length` positions; pictures stay whole, unused rows of them cost nothing more."""
    if len(sample) <= length:
        return sample
    return dataclasses.replace(
        sample,
        ids_S=sample.ids_S[:length],
        kind_S=sample.kind_S[:length],
        row_S=sample.row_S[:length],
        learnt_S=sample.learnt_S[:length],
    )
