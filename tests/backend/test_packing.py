"""Packed rows: the same loss and the same gradients as one sample per row, on this backend."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from unillava.checkpoint import open_checkpoint
from unillava.data.collate import collate_rows
from unillava.data.feed import Feed
from unillava.data.lengths import sample_lengths
from unillava.data.order import Order
from unillava.data.records import open_records
from unillava.loading import load_pipeline
from unillava.models.llava import LlavaForTraining
from unillava.rope import rotary_tables
from unillava.training.loop import INPUTS

MAX_LENGTH = 220
SAMPLES = (
    ("What is this?", "A wide thing.", (90, 30)),
    ("Say one.", "One.", None),
    ("And this?", "Something tall, and rather long to tell about.", (20, 110)),
    ("Hello there, how are you?", "I am well. And you are?", None),
    ("What colour?", "Green.", (64, 64)),
    ("Count to five.", "One two three four five.", None),
)


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def loaded(request, runtime, tiny):
    """(spec, pipeline, network) of a tiny checkpoint."""
    checkpoint = open_checkpoint(str(tiny(request.param)))
    network = runtime.build(lambda: LlavaForTraining(checkpoint.spec))
    for name, array, is_bfloat16 in checkpoint.tensors():
        runtime.assign(network, name, array, bfloat16=is_bfloat16)
    return checkpoint.spec, load_pipeline(checkpoint), network


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    random = np.random.default_rng(0)
    written = []
    for n, (question, answer, size) in enumerate(SAMPLES):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        record = {"id": f"s{n}", "conversations": turns}
        if size:
            pixels = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{n}.png")
            record["image"] = f"{n}.png"
            turns[0]["value"] = f"<image>\n{question}"
        written.append(record)
    (folder / "data.json").write_text(json.dumps(written))
    return open_records(folder / "data.json")


@pytest.fixture(params=["auto", "portable"])
def kernels(request, runtime):
    """The framework's own attention, and the one that every device has."""
    runtime.setup(*runtime.current(), request.param)
    yield request.param
    runtime.setup(*runtime.current(), "auto")


def inputs(runtime, spec, arrays):
    cos_LE, sin_LE = rotary_tables(spec.text, arrays["input_ids"].shape[1])
    given = arrays | {"cos": cos_LE, "sin": sin_LE}
    return [None if given.get(n) is None else runtime.tensor(given[n]) for n in INPUTS]


def judge(runtime, loaded):
    """Arrays -> (loss, gradients)."""
    spec, _, network = loaded
    run = runtime.value_and_grad(lambda *args: network(*args), network)
    return lambda arrays: run(*inputs(runtime, spec, arrays))


def total(judged):
    """The sums over some batches."""
    loss, sums = 0.0, {}
    for value, gradients in judged:
        loss += value
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, 0.0) + gradient.astype(np.float64)
    return loss, sums


def assert_close(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # A constant added to all scores of a softmax changes nothing: this one is rounding.
        judge = name.replace("k_proj.bias", "k_proj.weight")
        bar = 1e-5 * np.abs(expected[1][judge]).max()
        assert np.abs(found[1][name] - gradient).max() <= bar, name


def test_an_epoch_packed_equals_an_epoch_unpacked(loaded, records, runtime, kernels):
    """Through lengths, order and feed, as training does it."""
    spec, pipeline, _ = loaded
    lengths = sample_lengths(records, pipeline)["length"]
    assert lengths.max() <= MAX_LENGTH
    own = judge(runtime, loaded)
    found = {}
    for name, options in (
        ("packed", {"max_length": MAX_LENGTH, "lengths": lengths}),
        ("unpacked", {}),
    ):
        order = Order(len(records), batch=1, seed=3, **options)
        rows = order.rows_of_epoch(0)
        feed = Feed(records, pipeline, order, 1, MAX_LENGTH, pad_to=32)
        batches = [feed.micro(n) for n in range(len(rows))]
        seen = [sample for batch in batches for sample in batch.samples]
        assert sorted(seen) == [f"s{n}" for n in range(len(SAMPLES))]
        assert sum(batch.positions for batch in batches) == lengths.sum()
        found[name] = len(rows), total(own(batch.arrays) for batch in batches)
    assert found["packed"][0] < found["unpacked"][0] == len(SAMPLES)
    assert_close(found["packed"][1], found["unpacked"][1])


def prepared(records, pipeline):
    requests = [records.request(n)[0] for n in range(len(records))]
    return [pipeline.prepare(r, generate=False, limit=None) for r in requests]


def test_rows_of_several_samples(loaded, records, runtime, kernels):
    """In one batch, with padding between and behind them."""
    own = judge(runtime, loaded)
    a, b, c, d, *_ = prepared(records, loaded[1])
    expected = total(own(collate_rows([[s]])) for s in (a, b, c, d))
    rows = [[c], [b, a, d]]
    assert_close(total([own(collate_rows(rows, pad_to=16, pad_targets_to=8))]), expected)


def test_no_sample_sees_another(loaded, records, runtime, kernels):
    """Another text and another picture in one sample change the loss of that one alone."""
    samples = prepared(records, loaded[1])[:3]
    own = judge(runtime, loaded)
    random = np.random.default_rng(1)
    old = samples[0]
    ids = np.where(old.kind_S == 0, random.permutation(old.ids_S), 0)
    pixels = random.standard_normal(old.pixels_T3HW.shape).astype("f4")
    changed = [dataclasses.replace(old, ids_S=ids, pixels_T3HW=pixels), *samples[1:]]
    for learnt, bar in ((lambda segment: segment != 1, 1e-6), (lambda segment: segment == 1, None)):
        before, after = (own(only(each, learnt))[0] for each in (samples, changed))
        difference = abs(after - before) / before
        assert difference > 1e-3 if bar is None else difference <= bar


def only(samples, learnt):
    """All samples in one row, of which some are learnt."""
    arrays = collate_rows([samples])
    segment = arrays["segment_ids"].reshape(-1)[arrays["target_index"]]
    return arrays | {"targets": np.where(learnt(segment), arrays["targets"], -100)}
