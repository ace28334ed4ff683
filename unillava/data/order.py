"""The order of training data: a pure function of seed and settings, with any place found at once.

A run sees an endless sequence of rows, epoch after epoch. A row is one sample, or with packing
several that share a row. Update u takes the rows u * batch to (u + 1) * batch - 1, however many
ranks there are, so the number of ranks does not change what is learnt and nothing has to be
replayed to resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

WINDOW = 4096
"""Samples that are packed together: enough to fill rows well, few enough to stay random."""
WELL_FILLED = 0.97
"""Share of a row."""
CARRIED = 8
"""One in so many rows of a window may be packed again with the next."""


@dataclass(frozen=True, eq=False)
class Order:
    """What decides the order."""

    count: int
    """Samples."""
    batch: int
    """Rows per update, over all ranks."""
    seed: int
    shuffle: bool = True
    max_length: int = 0
    """Positions of a packed row; 0: no packing, each sample is a row."""
    lengths: np.ndarray | None = None
    """int [count]. With packing the positions of each sample; without, rough lengths, negative
    for samples without pictures, by which like samples are grouped into batches; None: neither."""

    def rows_of_epoch(self, epoch: int) -> Sequence[np.ndarray]:
        """The rows of one epoch: arrays of sample numbers."""
        return _rows_of_epoch(self, epoch)

    def rows(self, start: int, stop: int) -> list[np.ndarray]:
        """Rows `start` to `stop` of the endless sequence."""
        found: list[np.ndarray] = []
        epoch, first = 0, 0
        while len(found) < stop - start:
            count = self._rows_in(epoch)
            if start >= first + count:
                # Without packing every epoch has as many.
                skipped = 1 if self.max_length else (start - first) // count
                epoch, first = epoch + skipped, first + skipped * count
                continue
            lower = max(start, first) - first
            found += self.rows_of_epoch(epoch)[lower : stop - first]
            epoch, first = epoch + 1, first + count
        return found

    def _rows_in(self, epoch: int) -> int:
        return _packed_count(self, epoch) if self.max_length else self.count

    def updates(self, epochs: float) -> int:
        """Updates that take so many epochs, the last one filled from the next epoch."""
        rows: float = sum(map(self._rows_in, range(int(epochs))))
        part = epochs - int(epochs)
        rows += part * self._rows_in(int(epochs)) if part else 0
        return max(1, -int(-rows // self.batch))

    def fill(self) -> float:
        """With packing, the share of positions of the first epoch's rows that samples fill."""
        rows = self.rows_of_epoch(0)
        return int(self.clipped.sum()) / (len(rows) * self.max_length)

    def described(self) -> str:
        """With packing, the first epoch in words."""
        rows, unusable = len(self.rows_of_epoch(0)), int((self.lengths == 0).sum())
        told = f"{rows:,} rows of {self.max_length:,} positions per epoch, {self.fill():.1%} full"
        return told + (f"; {unusable:,} samples cannot be used" if unusable else "")

    @property
    def clipped(self) -> np.ndarray:
        """Lengths as they count: a sample that is longer than a row is cut."""
        return np.minimum(np.abs(self.lengths), self.max_length)

    def fingerprint(self, epochs: float = 1.0) -> str:
        """Of the rows of that many epochs: equal iff the data come in the same order."""
        digest = hashlib.sha256()
        for row in self.rows(0, self.updates(epochs) * self.batch):
            digest.update(row.astype("<i8").tobytes() + b"|")
        return digest.hexdigest()[:16]


class _Rows(Sequence[np.ndarray]):
    """Rows of different lengths in two arrays: hundreds of thousands of small ones are heavy."""

    def __init__(self, samples: np.ndarray, ends: np.ndarray) -> None:
        self._samples, self._bounds = samples, np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        n = range(len(self))[place]
        return self._samples[self._bounds[n] : self._bounds[n + 1]]


@lru_cache(maxsize=2)
def _rows_of_epoch(order: Order, epoch: int) -> Sequence[np.ndarray]:
    random = np.random.default_rng([order.seed, epoch])
    if order.max_length:
        rows = packed_rows(order, random)
        return _Rows(
            np.fromiter((n for row in rows for n in row), np.int64, order.count),
            np.cumsum([len(row) for row in rows], dtype=np.int64),
        )
    if order.lengths is not None:
        sequence = grouped_by_modality(order.lengths, order.batch, random)
    else:
        sequence = random.permutation(order.count) if order.shuffle else np.arange(order.count)
    return _Rows(sequence, np.arange(1, order.count + 1))


@lru_cache(maxsize=1024)
def _packed_count(order: Order, epoch: int) -> int:
    return len(_rows_of_epoch(order, epoch))


# --- packing ---------------------------------------------------------------------------------


def packed_rows(order: Order, random: np.random.Generator) -> list[list[int]]:
    """Fill rows window by window, best fit of decreasing lengths; rows in random order.

    The emptiest rows of a window are packed again with the next one.
    """
    sequence = random.permutation(order.count) if order.shuffle else np.arange(order.count)
    sizes: list[int] = order.clipped.tolist()
    rows: list[list[int]] = []
    left: list[int] = []
    for start in range(0, order.count, WINDOW):
        window = [*left, *sequence[start : start + WINDOW].tolist()]
        filled = best_fit(window, sizes, order.max_length)
        left = []
        if start + WINDOW < order.count:
            filled, left = _without_emptiest(filled, sizes, order.max_length)
        if order.shuffle:
            filled = [filled[k] for k in random.permutation(len(filled))]
        rows += filled
    return rows


def best_fit(samples: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of samples, none longer than `capacity`: each sample goes, longest first, into the row
    with the least room that still holds it (best fit decreasing).

    Args:
        samples: numbers of samples.
        sizes: of all samples, none above `capacity`.
        capacity: positions of a row.
    """
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    """Bit r: some row has room r. The smallest that is large enough is found by a shift."""
    rows: list[list[int]] = []
    for sample in sorted(samples, key=lambda n: (-sizes[n], n)):
        need = sizes[sample]
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room = [], capacity
            rows.append(row)
        row.append(sample)
        if not by_room[room - need]:
            rooms |= 1 << (room - need)
        by_room[room - need].append(row)
    return rows


def _without_emptiest(
    rows: list[list[int]], sizes: Sequence[int], capacity: int
) -> tuple[list[list[int]], list[int]]:
    """The rows that are well filled, and the samples of the others: of few, so that a kind of
    samples that fills no row does not gather at the end of the epoch."""
    fills = [sum(sizes[n] for n in row) for row in rows]
    emptiest = sorted(range(len(rows)), key=fills.__getitem__)[: len(rows) // CARRIED]
    again = {k for k in emptiest if fills[k] < WELL_FILLED * capacity}
    kept = [row for k, row in enumerate(rows) if k not in again]
    return kept, [n for k in sorted(again) for n in rows[k]]


# --- grouping --------------------------------------------------------------------------------


def grouped_by_modality(lengths: np.ndarray, batch: int, random: np.random.Generator) -> np.ndarray:
    """LLaVA's order: batches of like length and of one modality, in random order.

    Source: LLaVA's LengthGroupedSampler with `group_by_modality_length`, whose groups are global
    batches too. Its random draws are torch's; these are NumPy's, so batches are made by the same
    rule and are not the same batches.

    Args:
        lengths: int [count], positive with a picture, negative without.
        batch: rows of a global batch.
        random: decides the order.
    """
    kinds = [np.flatnonzero(lengths > 0), np.flatnonzero(lengths <= 0)]
    groups: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for members in kinds:
        shuffled = members[random.permutation(len(members))]
        whole = len(shuffled) // batch * batch
        for start in range(0, whole, batch):
            group = shuffled[start : start + batch]
            groups.append(group[np.argsort(-np.abs(lengths[group]), kind="stable")])
        rest.append(shuffled[whole:])
    ordered = [groups[k] for k in random.permutation(len(groups))]
    return np.concatenate([*ordered, np.sort(np.concatenate(rest))]).astype(np.int64)
