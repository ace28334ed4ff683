"""Prefill and decode with a static key/value cache, on any backend.

Shape letters: B rows, S prompt positions, T cache positions, L rows of the rotary tables,
K key/value heads, E size of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends import ops, runtime
from unillava.inference.sampling import not_finite
from unillava.rope import rotary_tables
from unillava.spec import LlavaSpec

PROMPT_BUCKET = 64
"""Compiled prompts are padded to a multiple of this, so that few graphs are made."""
CACHE_BUCKET = 256
"""Compiled decoding reads the cache up to the next multiple of this: little more than is filled,
and few graphs. Eager decoding reads exactly what is filled."""


@dataclass
class State:
    """A batch that is being generated."""

    caches: tuple[Any, ...]
    lengths_B: np.ndarray
    """Positions filled so far, per row."""
    capacity: int
    cos: Any
    sin: Any
    table_start_B: np.ndarray
    """Where each row's part of the rotary tables begins (0 unless tables are per row)."""


class Engine:
    """Runs one network. All arrays in and out are NumPy."""

    def __init__(self, network: Any, spec: LlavaSpec, *, compiled: bool = False) -> None:
        self.network, self.spec, self.compiled = network, spec, compiled
        self._decoders: dict[int, Callable[..., Any]] = {}
        self._prefill = runtime.compile(self._prefill_step) if compiled else self._prefill_step

    @property
    def pad_to(self) -> int:
        """What the collator must pad prompts to."""
        return PROMPT_BUCKET if self.compiled else 1

    # --- whole sequences ----------------------------------------------------------------------

    def logits(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Logits of every position, float32 [B, S, V]."""
        with runtime.no_grad():
            hidden_BSD = self.network.hidden(self._embeds(batch), *self._whole_tables(batch))
            return runtime.numpy(self.network.logits(hidden_BSD))

    def _whole_tables(self, batch: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
        lengths_B = batch["lengths"]
        state = self._tables(lengths_B, int(batch["input_ids"].shape[1]))
        positions_BS = batch["position_ids"] + state[2][:, None]
        return runtime.tensor(positions_BS), state[0], state[1]

    def _embeds(self, batch: dict[str, np.ndarray]) -> Any:
        """The merged rows [B, S, D]."""
        pixels, frames = batch.get("pixel_values"), batch.get("pixel_values_videos")
        network = self.network
        return network.merge(
            runtime.tensor(batch["input_ids"]),
            runtime.tensor(batch["merge_index"]),
            None if pixels is None else network.image_rows(runtime.tensor(pixels)),
            None if frames is None else network.video_rows(runtime.tensor(frames)),
        )

    def _tables(self, lengths_B: np.ndarray, length: int) -> tuple[Any, Any, np.ndarray]:
        """cos, sin [L, E] on the device, and where each row's part of them begins."""
        if self.spec.text.rope.kind != "dynamic":
            cos, sin = rotary_tables(self.spec.text, length)
            return runtime.tensor32(cos), runtime.tensor32(sin), np.zeros_like(lengths_B)
        # The base depends on the prompt's length, so each row brings tables of its own.
        tables = [rotary_tables(self.spec.text, length, int(n)) for n in lengths_B]
        cos, sin = (np.concatenate(side) for side in zip(*tables, strict=True))
        return runtime.tensor32(cos), runtime.tensor32(sin), np.arange(len(lengths_B)) * length

    # --- generation ---------------------------------------------------------------------------

    def start(self, batch: dict[str, np.ndarray], new_tokens: int) -> tuple[State, Any]:
        """Read the prompts; room for `new_tokens` more. Logits [B, V] after them, native."""
        lengths_B = batch["lengths"]
        B, S = batch["input_ids"].shape
        wanted = max(S, int(lengths_B.max()) + new_tokens)
        capacity = -(-wanted // CACHE_BUCKET) * CACHE_BUCKET if self.compiled else wanted
        cos, sin, table_start_B = self._tables(lengths_B, capacity)
        with runtime.no_grad():
            logits_BV, *caches = self._prefill(
                self._embeds(batch),
                runtime.tensor(batch["position_ids"] + table_start_B[:, None]),
                cos,
                sin,
                runtime.tensor(np.zeros(B, np.int64)),
                runtime.tensor(np.arange(B) * S + lengths_B - 1),
                *self._empty_caches(B, capacity),
            )
        state = State(tuple(caches), lengths_B.copy(), capacity, cos, sin, table_start_B)
        return state, logits_BV

    def _empty_caches(self, B: int, capacity: int) -> list[Any]:
        text = self.spec.text
        shape = (B, capacity, text.num_kv_heads, text.head_dim)
        return [ops.zeros(shape, runtime.current()[1]) for _ in range(2 * text.num_layers)]

    def step(self, state: State, tokens_B: np.ndarray) -> Any:
        """Append one token per row; logits [B, V] after it, native. Changes `state`.

        A row that has run out of capacity must not be stepped; finished rows may be fed
        anything, as no row reads another's cache.
        """
        filled = int(state.lengths_B.max()) + 1
        bucket = CACHE_BUCKET if self.compiled else 1
        visible = min(state.capacity, -(-filled // bucket) * bucket)
        uneven = self.compiled or int(state.lengths_B.min()) + 1 < visible
        start_B = np.minimum(state.lengths_B, state.capacity - 1)
        with runtime.no_grad():
            logits_BV, *caches = self._decoder(visible, uneven)(
                runtime.tensor(tokens_B[:, None]),
                runtime.tensor((start_B + state.table_start_B)[:, None]),
                state.cos,
                state.sin,
                runtime.tensor(start_B),
                *state.caches,
            )
        state.caches, state.lengths_B = tuple(caches), state.lengths_B + 1
        return logits_BV

    def _prefill_step(
        self, embeds: Any, positions: Any, cos: Any, sin: Any, start: Any, last: Any, *caches: Any
    ) -> tuple[Any, ...]:
        logits_BV, filled = self.network.prefill(embeds, positions, cos, sin, start, last, caches)
        return (logits_BV, *filled)

    def _decoder(self, visible: int, uneven: bool) -> Callable[..., tuple[Any, ...]]:
        """The decode step that reads `visible` cache rows; compiled once per such number."""
        network = self.network

        def decode_step(
            ids: Any, positions: Any, cos: Any, sin: Any, start: Any, *caches: Any
        ) -> tuple[Any, ...]:
            logits_BV, filled = network.decode(
                ids, positions, cos, sin, start, caches, visible, uneven
            )
            return (logits_BV, *filled)

        if not self.compiled:
            return decode_step
        if visible not in self._decoders:
            self._decoders[visible] = runtime.compile(decode_step)
        return self._decoders[visible]


def greedy(logits_BV: Any) -> np.ndarray:
    """The most probable token of each row, int64 [B], chosen on the device.

    Raises RequestError if the logits of a row are no numbers.
    """
    tops_B = runtime.numpy(ops.reduce_max(logits_BV, axis=-1))
    if not np.isfinite(tops_B).all():
        raise not_finite(tops_B)
    return runtime.numpy(ops.argmax(logits_BV, axis=-1))
