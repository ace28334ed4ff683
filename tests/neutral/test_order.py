"""The order of training data: a pure function, resumable anywhere, packed without loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unillava.data.collate import IMAGE, TEXT, Sample, collate_rows, cut
from unillava.data.order import Order, best_fit


def numbers(rows: list[np.ndarray]) -> list[int]:
    return [int(n) for row in rows for n in row]


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 5), st.integers(0, 200))
def test_any_place_is_found_at_once(count: int, batch: int, seed: int, start: int) -> None:
    order = Order(count, batch, seed)
    whole = numbers(order.rows(0, start + 20))
    assert numbers(order.rows(start, start + 20)) == whole[start:]
    assert sorted(whole[:count]) == list(range(count)) if start + 20 >= count else True


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(60, 100), st.integers(0, 3)
)
def test_packing_keeps_every_sample_once(lengths: list[int], room: int, seed: int) -> None:
    order = Order(len(lengths), 2, seed, max_length=room, lengths=np.array(lengths))
    rows = order.rows_of_epoch(0)
    assert sorted(numbers(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= room for row in rows)
    assert numbers(order.rows(1, 3)) == numbers(order.rows(0, 3)[1:])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(30, 64))
def test_best_fit_is_best_fit(lengths: list[int], room: int) -> None:
    """Against the textbook's loop over all rows."""
    found = best_fit(range(len(lengths)), lengths, room)
    rows: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        rooms = [(room - sum(lengths[m] for m in row), k) for k, row in enumerate(rows)]
        fitting = [pair for pair in rooms if pair[0] >= lengths[n]]
        if fitting:
            rows[min(fitting)[1]].append(n)
        else:
            rows.append([n])
    fill = sorted(sum(lengths[n] for n in row) for row in rows)
    assert sorted(sum(lengths[n] for n in row) for row in found) == fill


def test_a_realistic_mix_is_packed_well() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6.3, 0.6, 20_000), 30, 2048).astype(int)
    order = Order(len(lengths), 128, 0, max_length=2048, lengths=lengths)
    assert order.fill() >= 0.97


def test_like_samples_come_together() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 500, 1000) * np.where(random.random(1000) < 0.7, 1, -1)
    order = Order(1000, 32, 0, lengths=lengths)
    rows = numbers(order.rows_of_epoch(0))
    assert sorted(rows) == list(range(1000))
    whole = [rows[k : k + 32] for k in range(0, 1000 - 64, 32)]
    kinds = [{bool(lengths[n] > 0) for n in batch} for batch in whole]
    assert all(len(kind) == 1 for kind in kinds[:-1])
    assert all(
        [abs(lengths[n]) for n in batch] == sorted((abs(lengths[n]) for n in batch), reverse=True)
        for batch in whole[:-1]
    )


def test_the_fingerprint_tells_orders_apart() -> None:
    prints = {Order(100, 8, seed).fingerprint() for seed in range(5)}
    assert len(prints) == 5 and Order(100, 8, 0).fingerprint() in prints


def test_updates_of_epochs() -> None:
    assert Order(100, 8, 0).updates(1) == 13 and Order(96, 8, 0).updates(2) == 24
    assert Order(100, 8, 0).updates(0.5) == 7 and Order(3, 8, 0).updates(1) == 1


# --- packed rows ---------------------------------------------------------------------------------


def sample(length: int, first: int, image: int = 0) -> Sample:
    kind = np.full(length, TEXT, np.int8)
    row = np.zeros(length, np.int64)
    kind[1 : 1 + image], row[1 : 1 + image] = IMAGE, np.arange(image)
    ids = np.where(kind == TEXT, np.arange(first, first + length), 0)
    learnt = np.arange(length) >= length - 2
    pixels = np.full((1, 3, 2, 2), first, np.float32) if image else None
    return Sample(ids, kind, row, learnt, pixels, image_rows=image)


def test_packed_rows_are_the_samples_side_by_side() -> None:
    samples = [sample(6, 100, image=3), sample(4, 200), sample(5, 300, image=2)]
    packed = collate_rows([samples[:2], samples[2:]], pad_to=4, pad_targets_to=8)
    alone = [collate_rows([[one]]) for one in samples]
    assert packed["segment_ids"].tolist() == [
        [1] * 6 + [2] * 4 + [0] * 2,
        [1] * 5 + [0] * 7,
    ]
    assert packed["position_ids"][0, :10].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    learnt = packed["targets"][packed["targets"] != -100]
    assert learnt.tolist() == [n for one in alone for n in one["targets"].tolist()]
    assert len(packed["targets"]) == 8
    flat = packed["input_ids"].reshape(-1)
    places = packed["target_index"][: len(learnt)]
    assert (flat[places + 1] == learnt).all()
    # Picture rows follow the text rows of the table, sample after sample.
    size = packed["input_ids"].size
    assert packed["merge_index"][0, 1:4].tolist() == [size, size + 1, size + 2]
    assert packed["merge_index"][1, 1:3].tolist() == [size + 3, size + 4]
    assert packed["pixel_values"][:, 0, 0, 0].tolist() == [100, 300]


def test_the_first_token_of_a_sample_is_nobodys_target() -> None:
    one = sample(3, 10)
    object.__setattr__(one, "learnt_S", np.ones(3, bool))
    batch = collate_rows([[one, one]])
    assert batch["targets"].tolist() == [11, 12, 11, 12]
    assert batch["target_index"].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("length", [2, 5, 9])
def test_a_long_sample_is_cut(length: int) -> None:
    one = sample(6, 10, image=3)
    shorter = cut(one, length)
    assert len(shorter) == min(6, length)
    assert shorter.pixels_T3HW is one.pixels_T3HW
