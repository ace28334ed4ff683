"""LLaVA 1.0, 1.5, NeXT and NeXT-Video: vision tower, projector, one gather, decoder.

Shape letters: T tiles of all images, F frames of all videos, P rows of a tile, R rows of a
pooled frame, Q rows per side, C vision width, B batch rows, S positions, D text width,
E size of a head, L rows of the rotary tables, N learnt positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

from backends import nn, ops
from unillava.models.decoder import LanguageModel
from unillava.models.lora import Noise
from unillava.models.projector import Projector
from unillava.models.vision import VisionTower
from unillava.spec import AdapterSpec, LlavaSpec

Tensor = Any


class Llava(nn.Module):
    """Its parameter names and shapes are `unillava.spec.parameter_table(spec)`.

    With `adapters` those of `unillava.training.lora.adapter_table` come beside them.
    """

    def __init__(self, spec: LlavaSpec, adapters: AdapterSpec | None = None) -> None:
        super().__init__()
        self.vision_tower = VisionTower(spec.vision, spec.feature_layers, spec.keep_class_token)
        self.multi_modal_projector = Projector(spec.projector)
        self.has_newline = spec.has_newline
        if spec.has_newline:
            self.image_newline = nn.parameter((spec.text.hidden_size,))
        self.language_model = LanguageModel(spec.text, adapters)
        video = spec.video
        self.pool_mode = "none" if video is None else video.pool_mode
        self.pool_stride = 1 if video is None else video.pool_stride
        self.pools_first = video is not None and video.pool_position == "before_projector"

    # --- from pixels to rows of the merged sequence -------------------------------------------

    def image_rows(self, pixels_T3HW: Tensor) -> Tensor:
        """Projected rows of all tiles, [T * P, D]."""
        x_TPD = self.multi_modal_projector(self.vision_tower(pixels_T3HW))
        return ops.reshape(x_TPD, (-1, tuple(x_TPD.shape)[-1]))

    def video_rows(self, pixels_F3HW: Tensor) -> Tensor:
        """Projected and pooled rows of all frames, [F * R, D]."""
        x_FPC = self.vision_tower(pixels_F3HW)
        if self.pools_first:
            x_FRD = self.multi_modal_projector(self.pool(x_FPC))
        else:
            x_FRD = self.pool(self.multi_modal_projector(x_FPC))
        return ops.reshape(x_FRD, (-1, tuple(x_FRD.shape)[-1]))

    def pool(self, x_FPC: Tensor) -> Tensor:
        """Each frame's square map, `stride` times smaller per side, [F, R, C]."""
        if self.pool_mode == "none":
            return x_FPC
        F, P, C = tuple(x_FPC.shape)
        side, stride = math.isqrt(P), self.pool_stride
        x_FQQC = ops.reshape(x_FPC, (F, side, side, C))
        if self.pool_mode == "bilinear":
            smaller = -(-side // stride)
            x_FQQC = resample_rows(x_FQQC, smaller)
            x_FQQC = resample_rows(ops.transpose(x_FQQC, (0, 2, 1, 3)), smaller)
            return ops.reshape(ops.transpose(x_FQQC, (0, 2, 1, 3)), (F, smaller * smaller, C))
        smaller = side // stride
        x_FQQC = x_FQQC[:, : smaller * stride, : smaller * stride]
        blocks = ops.reshape(x_FQQC, (F, smaller, stride, smaller, stride, C))
        if self.pool_mode == "average":
            pooled = ops.reduce_mean(blocks, axis=(2, 4))
        else:
            pooled = ops.reduce_max(ops.reduce_max(blocks, axis=4), axis=2)
        return ops.reshape(pooled, (F, smaller * smaller, C))

    def merge(
        self,
        input_ids_BS: Tensor,
        merge_index_BS: Tensor,
        image_rows_ND: Tensor | None = None,
        video_rows_ND: Tensor | None = None,
    ) -> Tensor:
        """The merged sequence [B, S, D]: one gather from one table of rows.

        The table is text embeddings (row b * S + s), image rows, video rows, newline; the
        collator's `merge_index` points into it.
        """
        text_BSD = self.language_model.model.embed_tokens(input_ids_BS)
        D = tuple(text_BSD.shape)[-1]
        table = [ops.reshape(text_BSD, (-1, D))]
        if image_rows_ND is not None:
            table.append(image_rows_ND)
        if video_rows_ND is not None:
            table.append(video_rows_ND)
        if self.has_newline:
            newline_D = ops.cast(self.image_newline, text_BSD.dtype)
            table.append(ops.reshape(newline_D, (1, D)))
        return ops.take_rows(ops.concat(table, axis=0), merge_index_BS)

    # --- the decoder --------------------------------------------------------------------------

    def hidden(
        self,
        embeds_BSD: Tensor,
        position_ids_BS: Tensor,
        cos_LE: Tensor,
        sin_LE: Tensor,
        segment_ids_BS: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """Final hidden states [B, S, D] of the whole sequence at once."""
        cos_BSE = ops.take_rows(cos_LE, position_ids_BS)
        sin_BSE = ops.take_rows(sin_LE, position_ids_BS)
        return self.language_model(embeds_BSD, cos_BSE, sin_BSE, segment_ids_BS, noise)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """[..., V] in the dtype of the model."""
        return self.language_model.logits(hidden_BSD)

    def hidden_states(
        self,
        input_ids_BS: Tensor,
        merge_index_BS: Tensor,
        position_ids_BS: Tensor,
        cos_LE: Tensor,
        sin_LE: Tensor,
        segment_ids_BS: Tensor | None = None,
        pixels_T3HW: Tensor | None = None,
        frames_F3HW: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """Final hidden states [B, S, D] from text, pixels and frames."""
        images = None if pixels_T3HW is None else self.image_rows(pixels_T3HW)
        videos = None if frames_F3HW is None else self.video_rows(frames_F3HW)
        embeds_BSD = self.merge(input_ids_BS, merge_index_BS, images, videos)
        return self.hidden(embeds_BSD, position_ids_BS, cos_LE, sin_LE, segment_ids_BS, noise)

    def forward(
        self,
        input_ids_BS: Tensor,
        merge_index_BS: Tensor,
        position_ids_BS: Tensor,
        cos_LE: Tensor,
        sin_LE: Tensor,
        segment_ids_BS: Tensor | None = None,
        pixels_T3HW: Tensor | None = None,
        frames_F3HW: Tensor | None = None,
    ) -> Tensor:
        """The same as `hidden_states`."""
        return self.hidden_states(
            input_ids_BS,
            merge_index_BS,
            position_ids_BS,
            cos_LE,
            sin_LE,
            segment_ids_BS,
            pixels_T3HW,
            frames_F3HW,
        )

    def loss(self, hidden_BSD: Tensor, target_index_N: Tensor, targets_N: Tensor) -> Tensor:
        """Sum of the token losses, float32; divide by the number of learnt tokens.

        `target_index` points into the B * S positions; the head is computed only there.
        """
        D = tuple(hidden_BSD.shape)[-1]
        rows_ND = ops.take_rows(ops.reshape(hidden_BSD, (-1, D)), target_index_N)
        return ops.linear_cross_entropy(rows_ND, self.language_model.head_matrix(), targets_N)

    # --- generation ---------------------------------------------------------------------------

    def prefill(
        self,
        embeds_BSD: Tensor,
        position_ids_BS: Tensor,
        cos_LE: Tensor,
        sin_LE: Tensor,
        start_B: Tensor,
        last_B: Tensor,
        caches: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Read right-padded prompts into empty caches.

        `start_B` is all zero; `last_B` points at each row's last token among the B * S
        positions. Returns its logits [B, V] and the caches.
        """
        cos_BSE = ops.take_rows(cos_LE, position_ids_BS)
        sin_BSE = ops.take_rows(sin_LE, position_ids_BS)
        hidden_BSD, caches = self.language_model.model.cached(
            embeds_BSD, cos_BSE, sin_BSE, start_B, caches, 0, False
        )
        D = tuple(hidden_BSD.shape)[-1]
        last_BD = ops.take_rows(ops.reshape(hidden_BSD, (-1, D)), last_B)
        return self.logits(last_BD), caches

    def decode(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor,
        cos_LE: Tensor,
        sin_LE: Tensor,
        start_B: Tensor,
        caches: tuple[Tensor, ...],
        visible: int,
        uneven: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next token of each row: logits [B, V] after it, and the caches.

        Row b is written at cache position `start_b`; the first `visible` cache rows are read,
        and if some rows have filled less than that, they are `uneven` and need a mask.
        """
        embeds_BSD = self.language_model.model.embed_tokens(input_ids_BS)
        cos_BSE = ops.take_rows(cos_LE, position_ids_BS)
        sin_BSE = ops.take_rows(sin_LE, position_ids_BS)
        hidden_BSD, caches = self.language_model.model.cached(
            embeds_BSD, cos_BSE, sin_BSE, start_B, caches, visible, uneven
        )
        return self.logits(hidden_BSD[:, -1]), caches


class LlavaForTraining(Llava):
    """The same parameters; `forward` is what training minimises."""

    def forward(
        self,
        input_ids_BS: Tensor,
        merge_index_BS: Tensor,
        position_ids_BS: Tensor,
        segment_ids_BS: Tensor,
        cos_LE: Tensor,
        sin_LE: Tensor,
        target_index_N: Tensor,
        targets_N: Tensor,
        pixels_T3HW: Tensor | None = None,
        frames_F3HW: Tensor | None = None,
        noise_rows_BS: Tensor | None = None,
        noise_columns_W: Tensor | None = None,
    ) -> Tensor:
        """Sum of the token losses over the batch, float32; a target of -100 adds nothing.

        The noise is what dropout in adapters is decided by; without it nothing is dropped.
        """
        hidden_BSD = self.hidden_states(
            input_ids_BS,
            merge_index_BS,
            position_ids_BS,
            cos_LE,
            sin_LE,
            segment_ids_BS,
            pixels_T3HW,
            frames_F3HW,
            None if noise_rows_BS is None else (noise_rows_BS, noise_columns_W),
        )
        return self.loss(hidden_BSD, target_index_N, targets_N)


def resample_rows(x_FQQC: Tensor, smaller: int) -> Tensor:
    """Axis 1 bilinearly resampled to `smaller` (half-pixel centres, no antialiasing)."""
    side = tuple(x_FQQC.shape)[1]
    rows = []
    for n in range(smaller):
        centre = max((n + 0.5) * side / smaller - 0.5, 0.0)
        low = int(centre)
        high, share = min(low + 1, side - 1), centre - low
        rows.append(x_FQQC[:, low : low + 1] * (1 - share) + x_FQQC[:, high : high + 1] * share)
    return ops.concat(rows, axis=1)
