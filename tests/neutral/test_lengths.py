"""Lengths of samples, counted without decoding: those of the samples that are prepared."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unillava.checkpoint import open_checkpoint
from unillava.data import lengths
from unillava.data.compat import MODES, get_compat
from unillava.data.images import image_size, load_image
from unillava.data.index import CACHE
from unillava.data.lengths import Ranks, sample_lengths, setting_of
from unillava.data.pipeline import Pipeline
from unillava.data.records import open_records
from unillava.errors import ConfigError, DataError, UnillavaError
from unillava.loading import load_pipeline

FAMILIES = ("llava", "llava_next", "llava_next_video")


@pytest.fixture(scope="module")
def pipeline(tiny):
    """`pipeline(family)`: of a tiny checkpoint."""

    @cache
    def build(family: str, **options) -> Pipeline:
        return load_pipeline(open_checkpoint(str(tiny(family, **options))), num_frames=4)

    return build


def written(folder: Path, records: list, name: str = "data.json"):
    path = folder / name
    path.write_text(json.dumps(records))
    return open_records(path)


def talk(*texts: str, **media) -> dict:
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {**media, "conversations": turns}


def picture(path: Path, width: int, height: int, orientation: int = 1) -> str:
    image = Image.new("RGB", (width, height), (90, 120, 30))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path.name


def prepared(records, pipeline, number, placement="keep") -> tuple[int, int]:
    """(length, needed) of the sample itself; zeros if there is none."""
    try:
        request, _ = records.request(number, placement)
        sample = pipeline.prepare(request, generate=False, limit=None)
    except UnillavaError:
        return 0, 0
    targets = np.flatnonzero(sample.learnt_S[1:]) + 1
    return (len(sample), int(targets[0]) + 1) if len(targets) else (0, 0)


# --- what is counted ---------------------------------------------------------------------------

text = st.text(st.sampled_from("ab cd</s> \n你é🙂"), max_size=40)
shapes = st.tuples(
    st.integers(8, 900), st.integers(8, 900), st.integers(1, 8), st.sampled_from(["png", "jpg"])
)


@pytest.mark.parametrize("family", FAMILIES)
@given(pairs=st.lists(st.tuples(text, text), min_size=1, max_size=3),
       pictures=st.lists(shapes, max_size=2))  # fmt: skip
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_the_length_is_that_of_the_sample(family, pairs, pictures, pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    names = [picture(folder / f"{n}.{s[3]}", *s[:3]) for n, s in enumerate(pictures)]
    texts = [turn for pair in pairs for turn in pair]
    texts[0] = "<image>\n" * len(names) + texts[0].replace("<image>", "")
    records = written(folder, [talk(*texts, image=names)])
    (row,) = sample_lengths(records, pipeline(family))
    assert tuple(row) == prepared(records, pipeline(family), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_record(family, pipeline, tmp_path):
    picture(tmp_path / "wide.jpg", 700, 200)
    frames = tmp_path / "clip"
    frames.mkdir()
    for n in range(3):
        picture(frames / f"{n}.png", 64, 48)
    records = written(
        tmp_path,
        [
            talk("Hello.", "Hi."),
            talk("<image>\nWhat?", "This.", image="wide.jpg"),
            talk("<video>\nWhat?", "That.", video="clip"),
            talk("<image>\nWhat?", "Nothing.", image="absent.jpg"),
            talk("<image><image>\nWhat?", "Two.", image="wide.jpg"),
            talk("A question."),
            {"no": "conversation"},
        ],
    )
    found = sample_lengths(records, pipeline(family))
    expected = [prepared(records, pipeline(family), n) for n in range(len(records))]
    if family != "llava_next":
        # Where the size of a picture plays no part it is not looked for; the run finds out.
        assert found[3]["length"] > 0 or family == "llava_next_video"
        expected[3] = tuple(found[3])
    assert [tuple(row) for row in found] == expected
    assert found["length"][2] == 0 or family == "llava_next_video"
    assert found["length"][-3:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "llava_v0", "kollava_mistral"])
def test_lengths_in_every_compatibility_mode(mode, template, tiny, tmp_path):
    picture(tmp_path / "a.png", 60, 50)
    records = written(
        tmp_path,
        [talk("What?\n<image>", "This.", image="a.png"), talk("One", "Two", "Three", "Four")],
    )
    compat = get_compat(mode)
    checkpoint = open_checkpoint(str(tiny("llava_next")))
    own = compat.apply(load_pipeline(checkpoint, template=template))
    found = sample_lengths(records, own, compat.placement)
    expected = [prepared(records, own, n, compat.placement) for n in range(2)]
    assert [tuple(row) for row in found] == expected
    assert found["length"][0] > 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "gif", "bmp"])
def test_the_size_is_that_of_the_upright_picture(suffix, orientation, tmp_path):
    path = tmp_path / f"a.{suffix}"
    picture(path, 30, 20, orientation)
    height, width = image_size(str(path))
    assert (width, height) == load_image(str(path)).size
    turned = orientation >= 5 and suffix not in ("gif", "bmp")
    assert (width, height) == ((20, 30) if turned else (30, 20))


def test_an_orientation_behind_the_pixels_of_a_png(tmp_path):
    picture(tmp_path / "a.png", 30, 20, 6)
    data = (tmp_path / "a.png").read_bytes()
    place = data.index(b"eXIf") - 4
    end = place + 12 + int.from_bytes(data[place : place + 4], "big")
    chunk, rest = data[place:end], data[:place] + data[end:]
    last = rest.index(b"IEND") - 4
    (tmp_path / "b.png").write_bytes(rest[:last] + chunk + rest[last:])
    path = str(tmp_path / "b.png")
    assert image_size(path)[::-1] == load_image(path).size == (20, 30)


def test_sound_headers_are_not_decoded(tmp_path, monkeypatch):
    from PIL import ImageFile

    for suffix in ("jpg", "png", "webp", "gif"):
        picture(tmp_path / f"a.{suffix}", 30, 20)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    for suffix in ("jpg", "png", "webp", "gif"):
        assert image_size(str(tmp_path / f"a.{suffix}")) == (20, 30)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_has_no_size(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnillavaError):
        image_size(str(tmp_path / "a.png"))


# --- what is kept -----------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Numbers of records that are counted, as they are."""
    seen: list[int] = []
    original = lengths.sample_length

    def note(records, pipeline, placement, number):
        seen.append(number)
        return original(records, pipeline, placement, number)

    monkeypatch.setattr(lengths, "sample_length", note)
    return seen


@pytest.fixture
def records(tmp_path):
    return written(tmp_path, [talk(f"Number {n}", "one " * (n + 1)) for n in range(6)])


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob(f".*{lengths.SUFFIX}"))


def test_lengths_are_counted_once(records, pipeline, counted, tmp_path):
    first = sample_lengths(records, pipeline("llava"))
    assert counted == list(range(6))
    again = sample_lengths(open_records(tmp_path / "data.json"), pipeline("llava"))
    assert counted == list(range(6))
    assert again.tobytes() == first.tobytes()
    assert not again.flags.writeable


def test_only_what_is_chosen_is_counted(records, pipeline, counted):
    chosen = sample_lengths(records.take([4, 1, 4]), pipeline("llava"))
    assert counted == [1, 4]
    whole = sample_lengths(records, pipeline("llava"))
    assert counted == [1, 4, 0, 2, 3, 5]
    assert whole[[4, 1, 4]].tolist() == chosen.tolist()


def test_a_file_that_stands_in_a_mixture_twice(records, pipeline, counted):
    both = type(records).join([records.take([0, 1]), records.take([5])])
    first = sample_lengths(both, pipeline("llava"))
    assert sample_lengths(both, pipeline("llava")).tolist() == first.tolist()
    assert len(counted) == 3


@pytest.mark.parametrize("damage", [b"", b"short", None, "longer"])
def test_damaged_lengths_are_counted_anew(damage, records, pipeline, counted, tmp_path):
    first = sample_lengths(records, pipeline("llava"))
    (place,) = kept(tmp_path)
    content = bytearray(place.read_bytes())
    if damage is None:
        content[-3] ^= 1
    place.write_bytes(content + b"12345678" if damage == "longer" else damage or content)
    if damage == b"":
        place.write_bytes(b"")
    assert sample_lengths(records, pipeline("llava")).tolist() == first.tolist()
    assert counted == [*range(6), *range(6)]


def test_lengths_of_a_changed_file_are_counted_anew(records, pipeline, counted, tmp_path):
    sample_lengths(records, pipeline("llava"))
    changed = written(tmp_path, [talk("Other", "words are here") for _ in range(6)])
    found = sample_lengths(changed, pipeline("llava"))
    assert len(counted) == 12
    assert len(kept(tmp_path)) == 1  # in the place of the old ones
    assert tuple(found[0]) == prepared(changed, pipeline("llava"), 0)


def test_each_way_to_prepare_has_its_own_lengths(tiny, tmp_path, pipeline):
    one = pipeline("llava")
    others = [
        setting_of(one, "keep"),
        setting_of(one, "llava"),
        setting_of(dataclasses.replace(one, num_frames=9), "keep"),
        setting_of(pipeline("llava_next"), "keep"),
        setting_of(pipeline("llava", text="qwen2"), "keep"),
        setting_of(get_compat("none").apply(load_pipeline(open_checkpoint(str(tiny("llava"))),
                                                          template="llava_v0")), "keep"),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    again = load_pipeline(open_checkpoint(str(tiny("llava"))), num_frames=4)
    assert setting_of(again, "keep") == others[0]
    again.tokenizer.add_tokens(["zebra"])
    assert setting_of(again, "keep") not in others


def test_what_cannot_be_used_is_tried_again(pipeline, counted, tmp_path):
    records = written(tmp_path, [talk("<image>\nA", "b", image="late.jpg"), talk("a", "b")])
    own = pipeline("llava_next")
    assert sample_lengths(records, own)["length"][0] == 0
    picture(tmp_path / "late.jpg", 50, 40)
    found = sample_lengths(records, own)
    assert tuple(found[0]) == prepared(records, own, 0) != (0, 0)
    assert counted == [0, 1, 0]


def test_lengths_that_cannot_be_kept_beside_the_file(
    records, pipeline, counted, tmp_path, monkeypatch
):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    real = lengths.written

    def refuse(path, **options):
        if Path(path).parent == tmp_path:
            raise DataError("a read-only folder")
        return real(path, **options)

    monkeypatch.setattr(lengths, "written", refuse)
    first = sample_lengths(records, pipeline("llava"))
    assert len(kept(tmp_path)) == 0
    assert sample_lengths(records, pipeline("llava")).tolist() == first.tolist()
    assert len(counted) == 6
    monkeypatch.setattr(lengths, "written", lambda path, **o: refuse(tmp_path / "x"))
    shutil.rmtree(tmp_path / "cache")
    assert sample_lengths(records, pipeline("llava")).tolist() == first.tolist()


# --- who counts -------------------------------------------------------------------------------


class World:
    """Ranks as threads of this process."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world)
        self.given: list = [None] * world

    def ranks(self, rank: int) -> Ranks:
        def total(array):
            self.given[rank] = array.copy()
            self.barrier.wait(20)
            summed = sum(self.given)
            self.barrier.wait(20)
            return summed

        return Ranks(rank, self.world, total)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_share_the_counting(world, records, pipeline, counted, tmp_path):
    """Each sees a disk of its own; the first one's is kept, and all have the same."""
    own = pipeline("llava")
    expected = [prepared(records, own, n) for n in range(6)]
    found: dict[int, np.ndarray] = {}
    for time in range(2):
        ranks = World(world)
        threads = []
        for rank in range(world):
            folder = tmp_path / f"disk {rank}"
            folder.mkdir(exist_ok=True)
            if time == 0:
                shutil.copy2(tmp_path / "data.json", folder)
            theirs = open_records(folder / "data.json")

            def count(rank=rank, theirs=theirs, ranks=ranks):
                found[rank] = sample_lengths(theirs, own, ranks=ranks.ranks(rank))

            threads.append(threading.Thread(target=count))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [[tuple(row) for row in found[r]] for r in range(world)] == [expected] * world
        assert sorted(counted) == list(range(6))  # the second time nothing is counted
    assert [len(kept(tmp_path / f"disk {r}")) for r in range(world)] == [1] + [0] * (world - 1)


def test_worker_processes_count_the_same(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "FEW", 0)
    records = written(tmp_path, [talk(f"Number {n}", "one " * (n % 7)) for n in range(70)])
    own = pipeline("llava_next")
    told: list[int] = []

    class Bar:
        def __init__(self, total):
            told.append(-total)

        def __enter__(self):
            return told.append

        def __exit__(self, *error):
            pass

    found = sample_lengths(records, own, workers=2, progress=Bar)
    assert told == [-70, *[1] * 70]
    assert [tuple(row) for row in found] == [prepared(records, own, n) for n in range(70)]


def test_a_changed_file_is_an_error(records, pipeline, tmp_path):
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(DataError, match="changed"):
        sample_lengths(records, pipeline("llava"))


# --- compatibility modes ------------------------------------------------------------------------


def test_an_unknown_mode_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean llava_next"):
        get_compat("llava_nxt")


@pytest.mark.parametrize(
    ("mode", "template", "trained_as"),
    [
        ("llava", "vicuna_v1", "vicuna_v1"),
        ("llava", "v0", "v0_original"),
        ("llava", "v0_mmtag", "v0_mmtag_original"),
        ("llava", "llava_llama_3", "llava_llama_3"),
        ("kollava", "kollava_mistral", "kollava_mistral_original"),
        ("open_llava_next", "llava_llama_3", "oln_llama_3"),
        ("llava_next", "llava_llama_3", "nx_llama_3"),
        ("llava_next", "qwen_1_5", "nx_qwen_1_5"),
        ("llava_next", "qwen_2_5", "nx_qwen_2_5"),
        ("llava_next", "plain", "plain"),
        ("moss2", "llava_llama_2", "llava_llama_2"),
        ("mindformers", "vicuna_v1", "vicuna_v1"),
        ("paddlemix", "vicuna_v1", "vicuna_v1"),
        ("none", "v0", "v0"),
        (None, "qwen_1_5", "qwen_1_5"),
    ],
)
def test_templates_of_the_modes(mode, template, trained_as, tiny):
    checkpoint = open_checkpoint(str(tiny("llava")))
    own = get_compat(mode).apply(load_pipeline(checkpoint, template=template))
    assert own.template.name == trained_as
