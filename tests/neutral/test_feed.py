"""Training batches: deterministic, shared out among ranks, resumed without looking back."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unillava.checkpoint import as_checkpoint, open_checkpoint
from unillava.data import feed as feeds
from unillava.data import pipeline as pipelines
from unillava.data.feed import Feed, spare_sample
from unillava.data.lengths import sample_lengths
from unillava.data.order import Order
from unillava.data.records import open_records
from unillava.errors import ConfigError, DataError, UnillavaError
from unillava.loading import load_pipeline
from unillava.training.recipe import read_recipe
from unillava.training.run import make_order, make_pipeline, open_model, read_records

COUNT = 24
MAX_LENGTH = 512


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(open_checkpoint(str(tiny("llava_next"))))


def talk(n: int, **media) -> dict:
    question = f"{'<image>' * bool(media)}\nWhat is number {n}?"
    turns = [("human", question), ("gpt", f"It is number {n}." * (1 + n % 3))]
    return {"id": f"s{n}", **media, "conversations": [{"from": w, "value": v} for w, v in turns]}


def write(folder: Path, records: list) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Every third record has no picture."""
    folder = tmp_path_factory.mktemp("feed")
    records = []
    for n in range(COUNT):
        media = {}
        if n % 3:
            Image.new("RGB", (30 + n, 40), (n, 2 * n, 3 * n)).save(folder / f"{n}.png")
            media = {"image": f"{n}.png"}
        records.append(talk(n, **media))
    return write(folder, records)


def make(path: Path, pipeline, *, batch=4, packing=False, seed=5, group=False, **options) -> Feed:
    records = open_records(path)
    lengths = sample_lengths(records, pipeline)["length"] if packing else None
    if group:
        lengths = records.modality_lengths
    order = Order(
        len(records), batch, seed, max_length=MAX_LENGTH if packing else 0, lengths=lengths
    )
    return Feed(records, pipeline, order, **({"micro_batch": 2} | options), max_length=MAX_LENGTH)


def contents(updates) -> list:
    """Everything that the micro-batches hold, comparable."""
    return [
        (b.samples, b.bad, b.learnt, b.positions, {k: a.tolist() for k, a in b.arrays.items()})
        for update in updates
        for b in update
    ]


def names(updates) -> list[str]:
    return [name for update in updates for batch in update for name in batch.samples]


# --- the order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_every_sample_once_per_epoch(path, pipeline, packing):
    feed = make(path, pipeline, packing=packing, batch=1, micro_batch=1)
    rows = len(feed.order.rows_of_epoch(0))
    assert (rows < COUNT) == packing
    for epoch in range(2):
        start = 0 if epoch == 0 else rows
        count = len(feed.order.rows_of_epoch(epoch))
        seen = names(feed.updates(start, start + count))
        assert sorted(seen) == sorted(f"s{n}" for n in range(COUNT))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_order(path, pipeline, packing, world):
    options = {"packing": packing, "batch": 8}
    alone = make(path, pipeline, micro_batch=8, **options)
    own = [
        make(path, pipeline, micro_batch=1, rank=r, world=world, **options) for r in range(world)
    ]
    for update in range(3):
        (whole,) = next(alone.updates(update, update + 1))
        shared = [next(feed.updates(update, update + 1)) for feed in own]
        in_order = [shared[rank][turn] for turn in range(8 // world) for rank in range(world)]
        assert [n for batch in in_order for n in batch.samples] == list(whole.samples)
        assert sum(batch.learnt for batch in in_order) == whole.learnt


def test_a_batch_that_cannot_be_shared_out(path, pipeline):
    with pytest.raises(DataError, match="shared out evenly"):
        make(path, pipeline, batch=6, world=2)


@pytest.mark.parametrize("packing", [False, True])
def test_resuming_gives_the_same_batches(path, pipeline, packing):
    feed = make(path, pipeline, packing=packing)
    whole = contents(feed.updates(0, 6))
    again = make(path, pipeline, packing=packing)
    assert contents(again.updates(4, 6)) == whole[4 * feed.passes :]


def test_worker_processes_give_the_same_batches(path, pipeline):
    alone = contents(make(path, pipeline).updates(1, 5))
    assert contents(make(path, pipeline, workers=2).updates(1, 5)) == alone


def test_resuming_opens_no_picture_before_its_place(path, pipeline, monkeypatch):
    opened: list[str] = []
    original = pipelines.load_image

    def note(source):
        opened.append(Path(source).stem)
        return original(source)

    monkeypatch.setattr(pipelines, "load_image", note)
    feed = make(path, pipeline)
    whole = names(feed.updates(0, 6))
    with_picture = [name[1:] for name in whole if int(name[1:]) % 3]
    assert opened == with_picture  # each once, and none beyond the end
    opened.clear()
    rest = names(make(path, pipeline).updates(4, 6))
    assert rest == whole[16:]
    assert opened == [name[1:] for name in rest if int(name[1:]) % 3]


def test_like_samples_come_together(path, pipeline):
    feed = make(path, pipeline, group=True, micro_batch=4)
    batches = [batch for update in feed.updates(0, 4) for batch in update]
    kinds = [{int(name[1:]) % 3 > 0 for name in batch.samples} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)


def test_the_order_of_the_files_without_shuffling(path, pipeline):
    feed = make(path, pipeline)
    feed = dataclasses.replace(feed, order=dataclasses.replace(feed.order, shuffle=False))
    assert names(feed.updates(0, 3)) == [f"s{n}" for n in range(12)]


# --- what a batch holds ---------------------------------------------------------------------------


def test_a_batch_without_pictures_carries_one_tile(tmp_path, pipeline):
    feed = make(write(tmp_path, [talk(n) for n in range(4)]), pipeline)
    (batch, _) = next(feed.updates(0, 1))
    assert len(batch.arrays["pixel_values"]) == 1
    text = batch.arrays["input_ids"].size
    assert batch.arrays["merge_index"].max() < text  # nothing points at it


def test_the_spare_of_a_model_with_videos_has_a_frame(tiny):
    spare = spare_sample(load_pipeline(open_checkpoint(str(tiny("llava_next_video")))))
    assert len(spare.pixels_T3HW) == len(spare.frames_F3HW) == 1
    spare = spare_sample(load_pipeline(open_checkpoint(str(tiny("llava"))), template="plain"))
    assert len(spare.pixels_T3HW) == 1 and spare.frames_F3HW is None


def test_shapes_are_rounded_up(path, pipeline):
    feed = make(path, pipeline, pad_to=64)
    for batch in next(feed.updates(0, 1)):
        assert batch.arrays["input_ids"].shape[1] % 64 == 0
        assert len(batch.arrays["targets"]) % feeds.TARGETS_STEP == 0
        assert batch.learnt == (batch.arrays["targets"] != -100).sum()


# --- what cannot be used -----------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path) -> Path:
    """Records 1, 2 and 4 of 8 cannot be used."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    records = [talk(n, image="a.png") for n in range(8)]
    records[1]["image"] = "absent.png"
    records[2]["image"] = "bad.png"
    records[4]["conversations"][0]["from"] = "nobody"
    return write(tmp_path, records)


@pytest.mark.parametrize("packing", [False, True])
def test_bad_samples_are_left_out_and_named(broken, pipeline, packing):
    feed = make(broken, pipeline, batch=1, micro_batch=1, packing=packing)
    batches = [b for u in feed.updates(0, len(feed.order.rows_of_epoch(0))) for b in u]
    assert sorted(n for b in batches for n in b.samples) == ["s0", "s3", "s5", "s6", "s7"]
    told = dict(bad for b in batches for bad in b.bad)
    assert sorted(told) == [f"data.json record {n} (line 1)" for n in (1, 2, 4)]
    assert "absent.png" in told["data.json record 1 (line 1)"]
    assert "nobody" in told["data.json record 4 (line 1)"]


def test_stopping_at_a_bad_sample(broken, pipeline):
    feed = make(broken, pipeline, on_bad="stop", workers=1)
    with pytest.raises(UnillavaError, match=r"data\.json record [124] \(line 1\)"):
        list(feed.updates(0, 2))


def test_without_grain_it_says_what_to_install(path, pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(DataError, match=r"unillava\[train\]"):
        next(make(path, pipeline).updates(0, 1))


def test_a_micro_batch_with_nothing_left_learns_nothing(broken, pipeline):
    feed = make(broken, pipeline, batch=1, micro_batch=1)
    feed = dataclasses.replace(feed, order=dataclasses.replace(feed.order, shuffle=False))
    (batch,) = next(feed.updates(1, 2))
    assert (batch.samples, batch.learnt, batch.positions) == ((), 0, 0)
    assert set(batch.arrays["targets"].tolist()) == {-100}
    assert len(batch.arrays["pixel_values"]) == 1


def test_a_run_whose_pictures_are_all_absent_stops(tmp_path, pipeline):
    records = [talk(n, image=f"{n}.png") for n in range(100)]
    feed = make(write(tmp_path, records), pipeline)
    with pytest.raises(DataError, match="64 samples in a row") as caught:
        list(feed.updates(0, 25))
    assert ".png" in caught.value.given and "unillava data check" in caught.value.fix


def test_a_sample_that_grew_leaves_a_hole(tmp_path, pipeline):
    Image.new("RGB", (56, 20)).save(tmp_path / "a.png")
    path = write(tmp_path, [talk(0, image="a.png"), talk(1), talk(2)])
    feed = make(path, pipeline, packing=True, batch=1, micro_batch=1)
    room = int(feed.order.lengths.sum())
    feed = dataclasses.replace(feed, order=dataclasses.replace(feed.order, max_length=room))
    ((batch,),) = feed.updates(0, 1)
    assert set(batch.samples) == {"s0", "s1", "s2"} and batch.positions == room
    # A picture of another shape takes more positions than were counted.
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    ((batch,),) = feed.updates(0, 1)
    assert len(batch.samples) + len(batch.bad) == 3 and batch.positions <= room
    assert "longer than it was when the rows were filled" in batch.bad[0][1]


def test_a_data_file_that_changes_stops_the_run(tmp_path, pipeline):
    path = write(tmp_path, [talk(n) for n in range(8)])
    feed = make(path, pipeline)
    path.write_text("[]")
    with pytest.raises(DataError, match="changed"):
        list(feed.updates(0, 2))


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import unillava.data.feed as feeds
from tests.neutral.test_feed import Dying, make
from unillava.checkpoint import open_checkpoint
from unillava.errors import DataError
from unillava.loading import load_pipeline
from pathlib import Path

if __name__ == "__main__":
    pipeline = load_pipeline(open_checkpoint({model!r}))
    feed = make(Path({path!r}), pipeline, workers=1)
    feed = Dying(**{{f: getattr(feed, f) for f in feed.__dataclass_fields__ if f != "spare"}})
    try:
        list(feed.updates(0, 6))
    except DataError as error:
        print(error)
        sys.exit(3)
"""


class Dying(Feed):
    """Is killed as the system kills what takes too much memory."""

    def micro(self, number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().micro(number)


def test_a_worker_that_is_killed_ends_the_run(tiny, path, tmp_path):
    root = str(Path(__file__).parents[2])
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=root, model=str(tiny("llava_next")), path=str(path)))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "a worker process that prepares samples has died" in done.stdout
    assert "-9" in done.stdout and "lower data.workers" in done.stdout


# --- from a recipe -----------------------------------------------------------------------------


def recipe(path: Path, model: Path, settings=(), **data):
    settings = dict(settings)
    files = data.pop("files", [{"path": str(path)}])
    return read_recipe(
        {
            "model": {"path": str(model), **settings},
            "data": {"files": files, "max_length": MAX_LENGTH, **data},
            "rates": {"projector": 1e-3},
            "steps": {"batch": 2},
            "output": "never",
        }
    )


def order_of(chosen, pipeline):
    records = read_records(chosen)
    return records, make_order(chosen, records, pipeline)


def test_a_recipe_that_packs(path, tiny, pipeline):
    chosen = recipe(path, tiny("llava_next"), packing=True, row_length=2 * MAX_LENGTH)
    records, order = order_of(chosen, pipeline)
    assert order.max_length == 2 * MAX_LENGTH
    assert order.lengths.tolist() == sample_lengths(records, pipeline)["length"].tolist()
    assert f"{len(order.rows_of_epoch(0))} rows of {2 * MAX_LENGTH:,} " in order.described()


def test_samples_that_are_cut_count_as_what_is_left(path, tiny, pipeline):
    short = 40
    chosen = recipe(path, tiny("llava_next"), packing=True, max_length=short)
    records, order = order_of(chosen, pipeline)
    feed = Feed(records, pipeline, order, 1, short)
    batches = [feed.micro(n) for n in range(len(order.rows_of_epoch(0)))]
    assert sum(b.positions for b in batches) == order.lengths.sum()
    lost = {f"s{n}" for n in np.flatnonzero(order.lengths == 0)}
    kept = {f"s{n}" for n in range(COUNT)} - lost
    assert lost and {n for b in batches for n in b.samples} == kept
    assert sum(len(b.bad) for b in batches) == len(lost)
    assert f"{len(lost)} samples cannot be used" in order.described()


def test_packing_with_on_bad_stop_names_the_record(broken, tiny, pipeline):
    chosen = recipe(broken, tiny("llava_next"), packing=True, on_bad="stop")
    with pytest.raises(UnillavaError, match=r"data\.json record 1 \(line 1\)"):
        order_of(chosen, pipeline)


@pytest.mark.parametrize("data", [{"group_by": "modality_length"}, {"row_length": 100}])
def test_settings_that_packing_contradicts(path, tiny, pipeline, data):
    with pytest.raises(ConfigError, match="packing contradicts"):
        order_of(recipe(path, tiny("llava_next"), packing=True, **data), pipeline)


def test_grouping_and_shuffling_are_honoured(path, tiny, pipeline):
    model = tiny("llava_next")
    _, order = order_of(recipe(path, model, shuffle=False), pipeline)
    assert [row.tolist() for row in order.rows(0, 3)] == [[0], [1], [2]]
    records, order = order_of(recipe(path, model, group_by="modality_length"), pipeline)
    assert order.lengths.tolist() == records.modality_lengths.tolist()


@pytest.mark.parametrize(
    ("sample", "taken"), [("first:3", [0, 1, 2]), ("end:2", [22, 23]), ("first:10%", [0, 1, 2])]
)
def test_a_part_of_a_file(path, tiny, sample, taken):
    files = [{"path": str(path), "sample": sample}]
    records = read_records(recipe(path, tiny("llava"), files=files))
    assert [record["id"] for record in records] == [f"s{n}" for n in taken]


def test_a_mixture_in_a_recipe(path, tiny, tmp_path):
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"datasets: [{{json_path: {path}, sampling_strategy: 'end:1'}}]")
    files = [{"path": str(mixture)}, {"path": str(path), "sample": "first:1"}]
    records = read_records(recipe(path, tiny("llava"), files=files))
    assert [record["id"] for record in records] == ["s23", "s0"]
    files = [{"path": str(mixture), "sample": "first:1"}]
    with pytest.raises(ConfigError, match="says itself"):
        read_records(recipe(path, tiny("llava"), files=files))


def test_a_missing_folder_of_pictures(path, tiny):
    files = [{"path": str(path), "images": "/nowhere"}]
    with pytest.raises(DataError, match="folder of pictures does not exist") as caught:
        read_records(recipe(path, tiny("llava"), files=files))
    assert caught.value.given == "/nowhere"


def test_image_mode_frames_and_compatibility_of_a_recipe(path, tiny):
    settings = {"image_mode": "pad", "template": "llava_v0"}
    chosen = recipe(path, tiny("llava"), settings, num_frames=5, compat="llava")
    own = make_pipeline(chosen, as_checkpoint(open_model(chosen.model, 0)))
    assert (own.images.mode, own.num_frames, own.template.name) == ("pad", 5, "v0_original")
    with pytest.raises(ConfigError, match="did you mean kollava"):
        make_pipeline(
            recipe(path, tiny("llava"), compat="kolava"), open_checkpoint(str(tiny("llava")))
        )
