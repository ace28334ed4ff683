"""`unillava data check`: every kind of finding, counts against the pipeline, page and copy."""

import functools
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from unillava.cli.app import main
from unillava.cli.data import open_pipeline
from unillava.data.check import PROBLEMS, REMARKS, Checker, Settings
from unillava.data.check_page import choose_samples, count_tokens, histogram, show, to_html
from unillava.data.check_report import check_records, write_clean
from unillava.data.collate import TEXT
from unillava.data.records import open_records
from unillava.errors import DataError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, photo):
    """A folder of pictures and a video, good and bad."""
    folder = tmp_path_factory.mktemp("pictures")
    whole = Image.open(photo)
    for name, size in (("a.jpg", (60, 40)), ("b.png", (40, 90)), ("c.jpg", (64, 64))):
        whole.resize(size).save(folder / name)
    (folder / "cut.jpg").write_bytes(photo.read_bytes()[:5000])
    (folder / "text.jpg").write_text("no picture")
    whole.resize((30, 20)).save(folder / "lie.jpg", "PNG")
    exif = whole.getexif()
    exif[0x0112] = 6
    whole.resize((60, 40)).save(folder / "turned.jpg", exif=exif)
    whole.resize((5, 40)).save(folder / "tiny.png")
    whole.resize((800, 20)).save(folder / "long.png")
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "green")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    (folder / "bad.mp4").write_bytes(b"no video")
    return folder


@functools.cache
def pipeline_of(model, template=None):
    return open_pipeline(str(model), None, None, template, 4)


def record(*turns, name="r", **media):
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": name, **media, "conversations": conversation}


def opened(folder, records, pictures, name="data.json"):
    path = folder / name
    path.write_text(json.dumps(records, indent=1))  # with escapes, also of half characters
    return open_records(path, pictures, allow_damage=True)


def checked(folder, records, pictures, model=None, **settings):
    make = None if model is None else functools.partial(pipeline_of, model, "vicuna_no_system")
    return check_records(opened(folder, records, pictures), Settings(**settings), make)


def kinds(report):
    return {kind for kind, count in report.counts.items() if count}


# --- every kind of finding ---------------------------------------------------------------------

GOOD = ("<image>\nWhat is this?", "A cat.")
SINGLE = [
    (record(*GOOD, image="a.jpg"), set()),
    (record("Who are you?", "A cat."), set()),
    (record("<video>\nQ", "A", video="film.gif"), set()),
    (record("<image>\nQ", "A", video="film.gif"), set()),
    ("no object", {"form"}),
    ({"id": 1}, {"form"}),
    ({"conversations": [{"from": "robot", "value": "Q"}]}, {"form"}),
    (record("Q \ud83d", "A"), {"form"}),
    (record("Q", "A", "") | {"image": 5}, {"form"}),
    (record("", "A"), {"form"}),
    (record("Q", "A", "R", "B")["conversations"][2:], {"form"}),
    ({"conversations": [["Q", "A"], ["R", "B"]]}, set()),
    (record(*GOOD), {"markers"}),
    (record("<image> <image>", "A", image="a.jpg"), {"markers"}),
    (record("<image>", "A", image=["a.jpg", "b.png"]), {"markers"}),
    (record("Q", "A", image="a.jpg"), {"unmarked"}),
    ({"conversations": [{"from": "human", "value": "Q"}] * 2}, {"order"}),
    (record(*GOOD, image="none.jpg"), {"image-missing"}),
    (record(*GOOD, image="a.png"), {"image-renamed"}),
    (record(*GOOD, image="cut.jpg"), {"image-damaged"}),
    (record(*GOOD, image="text.jpg"), {"image-damaged"}),
    (record(*GOOD, image="."), {"image-damaged"}),
    (record(*GOOD, image="lie.jpg"), {"suffix"}),
    (record(*GOOD, image="turned.jpg"), {"turned"}),
    (record(*GOOD, image="film.gif"), {"animated"}),
    (record(*GOOD, image="tiny.png"), {"tiny"}),
    (record(*GOOD, image="long.png"), {"elongated"}),
    (record(*GOOD, image="http://example.org/a.jpg"), {"not-fetched"}),
    (record("<video>", "A", video="none.mp4"), {"video-missing"}),
    (record("<video>", "A", video="bad.mp4"), {"video-damaged"}),
    (record("<video>", "A", video="http://example.org/a.mp4"), {"not-fetched"}),
    (record("<image><image>", "A", image=["none.jpg", "tiny.png"]), {"image-missing", "tiny"}),
    (record("<image> <image>", "A", image="none.jpg"), {"markers", "image-missing"}),
    (record("Q", "It is </s>."), {"spelt"}),
    (record("Q", "See <image>."), {"spelt"}),
    (record("Q", "A", "R", " "), {"no-answer"}),
    (record("Q", ""), {"unlearnt", "no-answer"}),
    (record("Q"), {"unlearnt"}),
    (record("Q", "word " * 4000), {"cut"}),
    (record("word " * 4000, "A"), {"cut-off"}),
]


@pytest.mark.parametrize(("entry", "expected"), SINGLE, ids=map(str, range(len(SINGLE))))
def test_findings(tmp_path, tiny, pictures, entry, expected):
    report = checked(tmp_path, [entry], pictures, tiny("llava_next_video"))
    assert kinds(report) == expected
    assert report.problems == bool(expected & PROBLEMS.keys())
    assert report.mendable.tolist() == [not (expected & PROBLEMS.keys()) - {"image-renamed"}]
    for kind in expected:
        (example,) = report.examples[kind]
        assert example.where == "data.json record 0 (line 2)"


def test_every_kind_is_tested():
    found = set().union(*(expected for _, expected in SINGLE))
    elsewhere = {"damaged", "prompt", "video-unread", "same-id", "duplicate"}
    assert found | elsewhere == PROBLEMS.keys() | REMARKS.keys()
    assert not found & elsewhere


def test_a_model_without_video(tmp_path, tiny, pictures):
    report = checked(
        tmp_path, [record("<video>\nQ", "A", video="film.gif")], pictures, tiny("llava")
    )
    assert kinds(report) == {"prompt"}
    assert "no token for a video" in report.examples["prompt"][0].detail


def test_without_pyav_videos_are_a_remark(tmp_path, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    report = checked(tmp_path, [record("<video>", "A", video="bad.mp4")], pictures)
    assert (kinds(report), report.problems) == ({"video-unread"}, 0)


def test_without_a_model_forms_and_pictures_are_checked(tmp_path, pictures):
    entries = [entry for entry, _ in SINGLE]
    report = checked(tmp_path, entries, pictures)
    needs_model = {"spelt", "unlearnt", "cut", "cut-off"}
    expected = set().union(*(found for _, found in SINGLE)) - needs_model
    assert kinds(report) - {"duplicate", "same-id"} == expected
    assert count_tokens(report) is None


def test_how_far_pictures_are_read(tmp_path, tiny, pictures):
    entries = [record(*GOOD, image=name, name=name) for name in ("cut.jpg", "text.jpg", "none.jpg")]
    model = tiny("llava_next")
    found = {depth: checked(tmp_path, entries, pictures, model, depth=depth) for depth in DEPTHS}
    assert found["whole"].counts["image-damaged"] == 2
    # The size of a picture that is cut off is known.
    assert found["size"].counts["image-damaged"] == 1
    assert found["none"].counts["image-damaged"] == 0
    assert all(report.counts["image-missing"] == 1 for report in found.values())
    # Lengths depend on sizes for anyres models only.
    assert found["size"].is_counted.tolist() == [True, False, False]
    assert not found["none"].is_counted.any()
    assert checked(tmp_path, entries, pictures, tiny("llava"), depth="none").is_counted.all()


DEPTHS = ("whole", "size", "none")


def test_pictures_of_the_web_are_read_if_asked(tmp_path, tiny, pictures, monkeypatch):
    content = (pictures / "a.jpg").read_bytes()
    monkeypatch.setattr("unillava.data.images.locate", lambda source, **limits: content)
    entry = record(*GOOD, image="http://example.org/a.jpg")
    report = checked(tmp_path, [entry], pictures, tiny("llava_next"), fetch=True)
    assert (kinds(report), report.is_counted.tolist()) == (set(), [True])


# --- counts ------------------------------------------------------------------------------------

TALK = [
    record(*GOOD, image="a.jpg"),
    record(*GOOD, "And this?", "A dog, not a cat.", image="b.png"),
    record("<image> or <image>?", "The first.", image=["c.jpg", "turned.jpg"]),
    record("사진에 무엇이 있나요?", "고양이가 있습니다."),
    record("Q", "word " * 60),
]


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
@pytest.mark.parametrize("template", [None, "vicuna_v1", "v0_original"])
def test_counts_are_those_of_the_pipeline(tmp_path, tiny, pictures, family, template):
    """The samples that training would be given are the judge."""
    pipeline = pipeline_of(tiny(family), template)
    films = [record("<video>\nQ", "A", video="film.gif")] if family == "llava_next_video" else []
    records = opened(tmp_path, TALK + films, pictures)
    limit = 120
    report = check_records(records, Settings(max_length=limit), lambda: pipeline)
    assert kinds(report) <= {"cut", "cut-off", "turned", "same-id"}
    lost = 0
    for number in range(len(records)):
        request, _ = records.request(number)
        sample = pipeline.prepare(request, generate=False)
        learnt = sample.learnt_S.copy()
        learnt[0] = False
        assert report.tokens[number] == len(sample)
        assert report.picture_tokens[number] == (sample.kind_S != TEXT).sum()
        assert report.learnt[number] == learnt.sum()
        lost += learnt[limit:].sum()
    assert report.lost == lost > 0
    too_long = report.counts["cut"] + report.counts["cut-off"]
    assert too_long == (report.tokens > limit).sum()
    numbers = count_tokens(report)
    assert (numbers.total, numbers.too_long) == (report.tokens.sum(), too_long)
    assert (numbers.shortest, numbers.longest) == (report.tokens.min(), report.tokens.max())


def test_placement_changes_what_is_sound(tmp_path, tiny, pictures):
    entry = record("<image> and <image>", "A", image="a.jpg")
    model = tiny("llava")
    assert kinds(checked(tmp_path, [entry], pictures, model)) == {"markers"}
    assert kinds(checked(tmp_path, [entry], pictures, model, placement="llava")) == set()


def test_repeated_records(tmp_path, pictures):
    first, other = record("Q", "A", name=1), record("Q", "B", name=1)
    entries = [first, other, record("Q", "A", name=2), {**record("Q", "A"), "id": None}, first]
    report = checked(tmp_path, entries, pictures)
    assert report.repeated.tolist() == [False, False, True, True, True]
    assert (report.counts["duplicate"], report.counts["same-id"]) == (3, 2)
    assert report.examples["duplicate"][0].detail == "data.json record 0"
    assert report.problems == 0


def test_examples_are_few_and_counts_are_not(tmp_path, pictures):
    entries = [record(*GOOD, image="none.jpg", name=n) for n in range(50)]
    report = checked(tmp_path, entries, pictures)
    assert (report.counts["image-missing"], len(report.examples["image-missing"])) == (50, 10)


def test_workers_find_the_same(tmp_path, tiny, pictures):
    entries = [entry for entry, _ in SINGLE] * 3
    records = opened(tmp_path, entries, pictures)
    make = functools.partial(open_pipeline, str(tiny("llava_next")), None, None, None, 4)
    told = []
    alone = check_records(records, Settings(), make)
    several = check_records(records, Settings(), make, workers=2, progress=told.append)
    assert sum(told) == len(entries)
    assert alone.counts == several.counts
    assert alone.examples == several.examples
    for name in ("tokens", "picture_tokens", "learnt", "mendable", "repeated"):
        assert np.array_equal(getattr(alone, name), getattr(several, name))


def _dies_in_a_worker(folder):
    """A pipeline for the first process that asks, death for the next."""
    if (folder / "asked").exists():
        os._exit(3)
    (folder / "asked").touch()
    return pipeline_of(folder / "model")


def test_a_worker_that_dies_is_reported(tmp_path, tiny, pictures):
    records = opened(tmp_path, TALK, pictures)
    (tmp_path / "model").symlink_to(tiny("llava"))
    make = functools.partial(_dies_in_a_worker, tmp_path)
    with pytest.raises(DataError, match="worker process has died"):
        check_records(records, Settings(), make, workers=1)


# --- damaged files -----------------------------------------------------------------------------


def test_damaged_files(tmp_path, pictures):
    text = json.dumps([record("Q", "A", name=n) for n in range(3)])
    cut, lines = tmp_path / "cut.json", tmp_path / "lines.jsonl"
    cut.write_text(text[: text.index('"id": 2') + 20])
    lines.write_text(json.dumps(record("Q", "B")) + '\n{"id": \n' + json.dumps(record("Q", "C")))
    records = open_records([cut, lines], pictures, allow_damage=True)
    report = check_records(records, Settings())
    assert (len(records), report.counts["damaged"], report.problems) == (4, 2, 2)
    first, second = (example.detail for example in report.examples["damaged"])
    assert re.match(r"cut.json, line 1, column \d+ \(record 2\): the file ends inside", first)
    assert second == "lines.jsonl, line 2, column 8 (record 1): the line ends inside a record"
    assert write_clean(report, tmp_path / "clean.jsonl") == 4
    assert len(open_records(tmp_path / "clean.jsonl")) == 4


# --- the clean copy ----------------------------------------------------------------------------


def test_the_clean_copy(tmp_path, tiny, pictures):
    entries = [entry for entry, _ in SINGLE]
    records = opened(tmp_path, entries, pictures)
    source = tmp_path / "data.json"
    before, status = source.read_bytes(), source.stat()
    make = functools.partial(pipeline_of, tiny("llava_next_video"), "vicuna_no_system")
    report = check_records(records, Settings(), make)
    kept = write_clean(report, tmp_path / "clean.jsonl")
    clean = open_records(tmp_path / "clean.jsonl", pictures)
    sound = [entry for entry, found in SINGLE if not (found & PROBLEMS.keys()) - {"image-renamed"}]
    expected = [json.loads(json.dumps(entry).replace('"a.png"', '"a.jpg"')) for entry in sound]
    assert list(clean) == expected
    assert kept == len(expected)
    again = check_records(clean, Settings(), make)
    assert again.problems == 0
    assert (source.read_bytes(), source.stat().st_mtime_ns) == (before, status.st_mtime_ns)


def test_the_clean_copy_keeps_the_bytes_of_lines(tmp_path, pictures):
    lines = [
        '{"id":1.0,  "conversations":[["Q","\\u00e9"]]}',
        '{"id": 2}',
        '{"conversations": [["Q", "B"]]}',
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    report = check_records(open_records(path, pictures), Settings())
    write_clean(report, tmp_path / "clean.jsonl")
    assert (tmp_path / "clean.jsonl").read_text() == f"{lines[0]}\n{lines[2]}\n"


def test_repeated_records_are_left_out_if_asked(tmp_path, pictures):
    entries = [record("Q", "A", name=n // 2) for n in range(4)] + [record("Q", "B")]
    report = checked(tmp_path, entries, pictures)
    assert write_clean(report, tmp_path / "all.jsonl") == 5
    assert write_clean(report, tmp_path / "few.jsonl", drop_repeated=True) == 2


def test_the_copy_overwrites_nothing(tmp_path, pictures):
    report = checked(tmp_path, TALK, pictures)
    (tmp_path / "link.json").symlink_to("nowhere")
    for name in ("data.json", "link.json"):
        with pytest.raises(DataError, match="a file of that name"):
            write_clean(report, tmp_path / name)
    assert (tmp_path / "link.json").is_symlink()


# --- the page ----------------------------------------------------------------------------------

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are closed, and collects what a page refers to and marks."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.references, self.marked, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), "a script"
            if name in ("src", "href", "srcset", "data", "action"):
                self.references.append(value)
        if tag == "mark":
            self.marked.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "mark" in self.open:
            self.marked[-1] += data


def page_of(folder, entries, pictures, model=None, count=8, **settings):
    report = checked(folder, entries, pictures, model, **settings)
    pipeline = None if model is None else pipeline_of(model, "vicuna_no_system")
    checker = Checker(report.records, report.settings, pipeline)
    return report, to_html(report, checker, choose_samples(report, count), 1.0)


def test_the_page_stands_alone(tmp_path, tiny, pictures):
    entries = [entry for entry, _ in SINGLE]
    report, text = page_of(tmp_path, entries, pictures, tiny("llava_next_video"))
    page = Page(text)
    assert page.references
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert 'name="viewport"' in text
    for kind in kinds(report):
        assert {**PROBLEMS, **REMARKS}[kind][0] in text


def test_what_people_write_stays_text(tmp_path, tiny, pictures):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    entries = [
        record(f"Q {evil}", f"A {evil}", name=evil),
        record(f"<image>{evil}", "A", name=evil, image=f"{evil}.jpg"),
        {"id": evil, "conversations": [{"from": evil, "value": evil}]},
    ]
    _, text = page_of(tmp_path, entries, pictures, tiny("llava"))
    page = Page(text)
    assert "script" not in page.tags
    assert page.references == []
    assert evil.replace("<", "&lt;").replace(">", "&gt;") in text


def test_learnt_text_is_marked(tmp_path, tiny, pictures):
    entry = record(*GOOD, "And <image>?", "A dog.", image=["a.jpg", "b.png"])
    _, text = page_of(tmp_path, [entry], pictures, tiny("llava_next"))
    page = Page(text)
    # The first is the legend.
    assert page.marked[1:] == [" A cat.</s>", " A dog.</s>"]
    assert len(page.references) == 2
    assert text.count('<span class="medium">image: ') == 2


def test_a_shown_record_is_what_is_trained_on(tmp_path, tiny, pictures):
    pipeline = pipeline_of(tiny("llava_next"))
    records = opened(tmp_path, TALK, pictures)
    checker = Checker(records, Settings(), pipeline)
    for number in range(len(records)):
        shown = show(checker, number)
        sample = pipeline.prepare(records.request(number)[0], generate=False)
        assert (shown.tokens, shown.learnt) == (len(sample), sample.learnt_S[1:].sum())
        assert len(shown.pictures) == records.images[number]
        written = "".join(piece.text for piece in shown.pieces if not piece.medium)
        told = "".join(turn["value"] for turn in TALK[number]["conversations"])
        assert set(re.sub(r"<image>|\s", "", told)) <= set(written)


def test_samples_are_long_short_and_of_every_modality(tmp_path, tiny, pictures):
    entries = [record("Q", "word " * n, name=n) for n in range(1, 30)]
    entries += [record(*GOOD, image="a.jpg"), record("<video>", "A", video="film.gif"), "no object"]
    report = checked(tmp_path, entries, pictures, tiny("llava_next_video"))
    chosen = choose_samples(report, 6)
    assert len(set(chosen)) == 6
    assert {report.tokens.argmax(), report.tokens[:-1].argmin()} <= set(chosen)
    assert set(report.records.modality[chosen]) == {0, 1, 2}
    assert 31 not in chosen
    assert chosen == choose_samples(report, 6)
    assert choose_samples(report, 0) == []
    assert len(choose_samples(report, 1000)) == 31


def test_the_histogram_holds_every_sample(tmp_path, tiny, pictures):
    model = tiny("llava_next_video")
    entries = [record("Q", "word " * n, name=n) for n in range(1, 200)]
    report = checked(tmp_path, entries, pictures, model)
    found = histogram(report)
    assert found.counts.sum() == 199
    assert not found.is_open
    assert found.edges[0] == 0
    assert found.edges[-1] >= report.tokens.max()
    outlier = [*entries, record("Q", "word " * 3000)]
    report = checked(tmp_path, outlier, pictures, model)
    found = histogram(report)
    assert (found.counts.sum(), found.is_open) == (200, True)
    assert found.counts[:, -1].sum() == 1
    assert found.edges[-1] < report.tokens.max()


def test_a_page_without_a_model(tmp_path, pictures):
    _, text = page_of(tmp_path, TALK, pictures)
    Page(text)
    assert "CLEAN" in text
    assert "were not checked" in text


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def data(tmp_path, pictures):
    opened(tmp_path, [entry for entry, _ in SINGLE], pictures)
    return tmp_path / "data.json"


def test_the_command(tmp_path, tiny, pictures, data, run):
    page, copy = tmp_path / "report.html", tmp_path / "clean.jsonl"
    options = ("--model", tiny("llava_next_video"), "--image-folder", pictures)
    code, out, err = run("check", data, *options, "--out", page, "--fix", copy)
    assert code == 1
    assert f"{len(SINGLE)} records" in out
    assert "image not found" in out
    assert "PROBLEMS" in out
    Page(page.read_text(encoding="utf-8"))
    assert f"of {len(SINGLE)} records" in err
    code, out, _ = run("check", copy, *options)
    assert code == 0
    assert "CLEAN" in out
    code, _, err = run("check", data, *options, "--fix", copy)
    assert code == 2
    assert "file of that name" in err


def test_the_command_for_programs(tiny, pictures, data, run):
    options = ("--model", tiny("llava"), "--image-folder", pictures, "--json", "--max-length", 200)
    code, out, _ = run("check", data, *options)
    found = json.loads(out)
    assert (code, found["records"]) == (1, len(SINGLE))
    counts = {finding["kind"]: finding["count"] for finding in found["findings"]}
    assert counts["image-damaged"] == 3
    assert found["tokens"]["max_length"] == 200
    assert all(finding["problem"] == (finding["kind"] in PROBLEMS) for finding in found["findings"])


def test_a_mixture_is_checked(tmp_path, pictures, run):
    opened(tmp_path, TALK[:4], pictures)
    mixture = tmp_path / "mix.yaml"
    entry = {"json_path": str(tmp_path / "data.json"), "sampling_strategy": "end:1"}
    mixture.write_text(json.dumps({"datasets": [entry]}))
    code, out, _ = run("check", mixture)
    assert (code, "1 records (1 text)" in out) == (0, True)
    code, _, err = run("mix", mixture, "--out", tmp_path / "mixed.jsonl")
    assert code == 0
    assert "1 records" in err
    (mixed,) = open_records(tmp_path / "mixed.jsonl")
    assert mixed == TALK[3]
    code, out, _ = run("mix", mixture, "--out", tmp_path / "mf.json", "--mindformers")
    assert (code, "max frames is 0" in out) == (0, True)
    assert run("mix", mixture, "--out", tmp_path / "mf.json")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.json"], "cannot be read"),
        (["{data}", "--compat", "front"], "no such compatibility mode"),
        (["{data}", "--images", "half"], "unknown --images"),
        (["{data}", "--model", "/nowhere"], "no directory"),
        (["{data}", "--template", "vicuna_v9", "--model", "{model}"], "no conversation template"),
        (["{data}", "--out", "/nowhere/r.html"], "cannot be written"),
    ],
)
def test_what_the_command_refuses(tmp_path, tiny, pictures, run, arguments, told):
    opened(tmp_path, TALK, pictures)
    names = {"data": tmp_path / "data.json", "model": tiny("llava")}
    code, _, err = run("check", *(argument.format(**names) for argument in arguments))
    assert code == 2
    assert told in err


NO_FRAMEWORK = """
import sys
from unillava.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code or 0
print(code, [name for name in ("torch", "mindspore", "paddle") if name in sys.modules])
"""


def test_no_framework_is_loaded(tmp_path, tiny, pictures):
    opened(tmp_path, TALK, pictures)
    command = ["data", "check", tmp_path / "data.json", "--model", tiny("llava_next")]
    command += ["--image-folder", pictures, "--out", tmp_path / "r.html"]
    done = subprocess.run(
        [sys.executable, "-c", NO_FRAMEWORK, *map(str, command)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []"
