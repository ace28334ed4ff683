"""Mixtures: strategies against the original's arithmetic, both outputs, and what is refused."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unillava.data.mixture import (
    choose,
    open_mixture,
    parse_strategy,
    process,
    read_mixture,
    write_lines,
)
from unillava.data.records import open_records
from unillava.data.request import normalise
from unillava.errors import DataError, MediaError

ROOT = Path(__file__).resolve().parents[2]
OPEN, CLOSE = "<|reserved_special_token_3|>", "<|reserved_special_token_4|>"


def record(name, question="<image>\nQ", answer="A", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **more, "conversations": turns}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two data sets, a and b, with their pictures beside them; the working directory."""
    for name, count in (("a", 10), ("b", 7)):
        (tmp_path / name / "img").mkdir(parents=True)
        records = []
        for n in range(count):
            (tmp_path / name / "img" / f"{name}{n}.jpg").write_bytes(b"")
            records.append(record(f"{name}{n}", image=f"img/{name}{n}.jpg", extra=[n, 1.5]))
        (tmp_path / name / "data.json").write_text(json.dumps(records))
    lines = (tmp_path / "b" / "data.json").read_text()
    jsonl = "\n".join(json.dumps(entry) for entry in json.loads(lines))
    (tmp_path / "b" / "data.jsonl").write_text(jsonl)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mixture(folder, *entries, name="mix.yaml"):
    rows = [
        {"json_path": path, **({"sampling_strategy": strategy} if strategy else {}), **more}
        for path, strategy, *rest in entries
        for more in [rest[0] if rest else {}]
    ]
    path = folder / name
    path.write_text(json.dumps({"datasets": rows}))  # JSON is YAML
    return path


def ids(records):
    return [entry["id"] for entry in records]


# --- strategies ------------------------------------------------------------------------------


def original(items, strategy):
    """The original's arithmetic; the random choice with the module's own generator."""
    name, _, number = strategy.partition(":")
    if number.endswith("%"):
        count = math.ceil(float(number.split("%")[0]) * len(items) / 100)
    elif number:
        count = int(number)
    if name == "first":
        return items[:count]
    if name == "end":
        return items[-count:] if count else []  # the original: items[-0:], everything
    if name == "random":
        items = list(items)
        random.shuffle(items)
        return items[:count]
    return items


numbers = st.integers(0, 40).map(str) | st.one_of(
    st.integers(0, 120).map(lambda n: f"{n}%"),
    st.floats(0, 120).map(lambda n: f"{n:.3f}%"),
)
strategies = st.just("all") | st.builds(
    "{}:{}".format, st.sampled_from(["first", "end", "random"]), numbers
)


@given(st.integers(0, 30), st.lists(strategies, min_size=1, max_size=4), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_strategies_are_the_originals(total, listed, seed):
    items = list(range(total))
    random.seed(seed)
    expected = [original(items, strategy) for strategy in listed]
    source = random.Random(seed)
    found = [parse_strategy(strategy).numbers(total, source).tolist() for strategy in listed]
    assert found == expected


@pytest.mark.parametrize(
    ("strategy", "total", "count"),
    [
        ("first:10%", 11, 2),
        ("first:0.1%", 10, 1),
        ("first:33%", 3, 1),
        ("end:0", 5, 0),
        ("end:0%", 5, 0),
        ("end:100%", 5, 5),
        ("random:50%", 5, 3),
        ("first:99", 5, 5),
        ("all", 5, 5),
    ],
)
def test_counts(strategy, total, count):
    assert len(parse_strategy(strategy).numbers(total, random.Random(0))) == count


@pytest.mark.parametrize(
    "strategy",
    [
        *("frist:10%", "first", "first:", "first:0.5", "first:-1", "end:x%", "all:3", "first:1:2"),
        *("first:nan%", "first:inf%", "", "FIRST:1", None, 5, ["all"]),
    ],
)
def test_what_is_no_strategy(strategy):
    with pytest.raises(DataError, match="sampling_strategy") as caught:
        parse_strategy(strategy)
    assert "first:N" in str(caught.value)
    if strategy == "frist:10%":
        assert "did you mean first" in str(caught.value)


# --- the file --------------------------------------------------------------------------------


def test_a_mixture_is_read_without_copying(folder):
    path = mixture(
        folder, ("a/data.json", "first:20%"), ("b/data.jsonl", "end:3"), ("a/data.json", None)
    )
    records = open_mixture(path)
    assert ids(records) == ["a0", "a1", "b4", "b5", "b6", *(f"a{n}" for n in range(10))]
    request, name = records.request(2)
    assert (request["images"], name) == (["b/img/b4.jpg"], "b4")
    assert records.where(2) == "data.jsonl record 4 (line 5)"


def test_random_is_seeded(folder):
    path = mixture(folder, ("a/data.json", "random:4"), ("b/data.json", "random:50%"))
    first = ids(open_mixture(path, seed=1))
    assert first == ids(open_mixture(path, seed=1))
    assert first != ids(open_mixture(path, seed=2))
    random.seed(1)
    expected = []
    for name, strategy in (("a", "random:4"), ("b", "random:50%")):
        records = json.loads((folder / name / "data.json").read_text())
        expected += ids(original(records, strategy))
    assert first == expected


def test_paths_are_also_looked_for_beside_the_mixture(folder, monkeypatch):
    path = mixture(folder / "a", ("data.json", "first:1"))
    assert ids(open_mixture(path)) == ["a0"]
    (folder / "c").mkdir()
    other = mixture(folder / "c", ("../a/data.json", "all", {"image_folder": "/elsewhere"}))
    assert open_mixture(other).request(0)[0]["images"] == ["/elsewhere/img/a0.jpg"]
    braces = mixture(folder, (str(folder / "{a,b}" / "data.json"), "end:1"))
    assert ids(open_mixture(braces)) == ["b6"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("datasets: [", "cannot be read"),
        ("", "lists no datasets"),
        ("datasets: {}", "lists no datasets"),
        ("- json_path: x", "lists no datasets"),
        ("datasets: [17]", r"datasets\[0\] names no file"),
        ("datasets: [{sampling_strategy: all}]", r"datasets\[0\] names no file"),
        ("datasets: [{json_pth: x.json}]", "did you mean json_path"),
        ("datasets: [{json_path: a/data.json, sampling_strategy: 5}]", r"datasets\[0\]"),
        ("datasets: [{json_path: none.json}]", "cannot be read"),
    ],
)
def test_mixtures_that_cannot_be_read(folder, content, told):
    path = folder / "mix.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        open_mixture(path)
    with pytest.raises(DataError, match="cannot be read"):
        open_mixture(folder / "none.yaml")


# --- unillava's own output -------------------------------------------------------------------


def test_lines_keep_every_field_and_add_the_root(folder):
    text_only = record("t", "Q", answer="half: \ud83d")
    (folder / "a" / "more.json").write_text(json.dumps([text_only, record("v", video="v.mp4")]))
    path = mixture(folder, ("a/more.json", "all"), ("b/data.json", "first:2"))
    write_lines(open_mixture(path), folder / "out.jsonl")
    lines = (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    assert written[0] == text_only
    root = str(folder / "b")
    expected = json.loads((folder / "b" / "data.json").read_text())[0] | {"image_root": root}
    assert written[2] == expected
    assert written[1]["image_root"] == str(folder / "a")
    # Wherever it is read, its pictures are found.
    (folder / "deep").mkdir()
    moved = (folder / "out.jsonl").rename(folder / "deep" / "out.jsonl")
    request, _ = open_records(moved, image_folder="wrong").request(2)
    assert request["images"] == [str(folder / "b" / "img" / "b0.jpg")]


def test_nothing_is_overwritten(folder):
    path = mixture(folder, ("a/data.json", "all"))
    before = (folder / "a" / "data.json").read_bytes()
    for out in (folder / "a" / "data.json", path):
        with pytest.raises(DataError, match="there is a file of that name"):
            write_lines(open_mixture(path), out)
        with pytest.raises(DataError, match="there is a file of that name"):
            process(read_mixture(path), out)
    assert (folder / "a" / "data.json").read_bytes() == before


def test_an_interrupted_mixture_leaves_nothing(folder):
    path = mixture(folder, ("a/data.json", "all"))

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(open_mixture(path), folder / "out.jsonl", stop)
    assert not [p.name for p in folder.iterdir() if "out" in p.name]
    with pytest.raises(DataError, match="cannot be written"):
        write_lines(open_mixture(path), folder / "none" / "out.jsonl")


def test_a_record_that_is_no_object(folder):
    (folder / "x.json").write_text("[17]")
    with pytest.raises(DataError, match=r"x.json record 0 \(line 1\) is no object"):
        write_lines(open_mixture(mixture(folder, ("x.json", "all"))), folder / "out.jsonl")


# --- MindFormers' output ---------------------------------------------------------------------


def test_mindformers_form(folder):
    """As section A3 describes it, built by hand."""
    (folder / "b" / "img" / "b1.jpg").unlink()
    two = record("two", "<image> <image>?", image=["img/a1.jpg", "img/a2.jpg"])
    four = record("four", "Q", answer="가 \u2028 <text>")
    four["conversations"] += [{"from": "human", "value": "R"}, {"from": "gpt", "value": "B"}]
    (folder / "a" / "more.jsonl").write_text(json.dumps(two) + "\n" + json.dumps(four))
    path = mixture(folder, ("a/more.jsonl", "all"), ("b/data.json", "first:3"))
    told = []
    done = process(read_mixture(path), folder / "out.json", tell=told.append)
    text = (folder / "out.json").read_text(encoding="utf-8")
    written = json.loads(text)
    assert text == json.dumps(written, indent=2, ensure_ascii=False)

    def turn(speaker, value):
        return {"from": speaker, "value": value}

    assert written == [
        {
            "conversations": [
                turn(
                    "human",
                    f"{OPEN}a/img/a1.jpg{CLOSE}{OPEN}a/img/a2.jpg{CLOSE}<image> <image>?",
                ),
                turn("gpt", "<text>A"),
            ]
        },
        {
            "conversations": [
                turn("human", f"{OPEN}{CLOSE}Q"),
                turn("gpt", "<text>가 \u2028 <text>"),
                turn("human", "<text>R"),
                turn("gpt", "<text>B"),
            ]
        },
        *(
            {
                "conversations": [
                    turn("human", f"{OPEN}b/img/b{n}.jpg{CLOSE}<image>\nQ"),
                    turn("gpt", "<text>A"),
                ]
            }
            for n in (0, 2)
        ),
    ]
    assert told[-2:] == ["4", "max frames is 2"]
    skipped = [line for line in told if "skip" in line]
    assert skipped == ["Image files: a/img/b1.jpg, b/img/b1.jpg are/is not exists, skip!!!"]
    assert (done.samples, done.dropped, done.max_frames) == (4, 1, 2)


def test_media_are_looked_for_under_every_root(folder):
    """The first root that has them decides; all of a sample must be there."""
    (folder / "a" / "other.json").write_text(
        json.dumps(
            [
                record("x", image="img/b3.jpg"),
                record("y", image=["img/b3.jpg", "img/none.jpg"]),
                record("z", image="http://h/x.jpg"),
            ]
        )
    )
    path = mixture(folder, ("a/other.json", "all"), ("b/data.json", "end:0"))
    process(read_mixture(path), folder / "out.json", tell=lambda line: None)
    written = json.loads((folder / "out.json").read_text())
    values = [entry["conversations"][0]["value"] for entry in written]
    assert values == [
        f"{OPEN}b/img/b3.jpg{CLOSE}<image>\nQ",
        f"{OPEN}http://h/x.jpg{CLOSE}<image>\nQ",
    ]


def test_videos_must_play(folder, monkeypatch):
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(folder / "a" / "good.gif", save_all=True, append_images=frames[1:])
    (folder / "a" / "bad.mp4").write_bytes(b"no video")
    videos = ("good.gif", ["bad.mp4", "good.gif"], "none.mp4")
    records = [record(n, video=video) for n, video in enumerate(videos)]
    (folder / "a" / "v.json").write_text(json.dumps(records))
    path = mixture(folder, ("a/v.json", "all"))
    told = []
    process(read_mixture(path), folder / "out.json", tell=told.append)
    (sample,) = json.loads((folder / "out.json").read_text())
    assert sample["conversations"][0]["value"] == f"{OPEN}a/good.gif{CLOSE}<image>\nQ"
    assert "a/bad.mp4" in told
    # Without PyAV nothing is said about videos: they are not simply left out.
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match="PyAV"):
        process(read_mixture(path), folder / "again.json", tell=told.append)
    assert not (folder / "again.json").exists()


def test_an_empty_mixture_is_an_empty_list(folder):
    path = mixture(folder, ("a/data.json", "first:0"))
    process(read_mixture(path), folder / "out.json", tell=lambda line: None)
    assert (folder / "out.json").read_text() == json.dumps([], indent=2)


def test_records_that_mindformers_cannot_take(folder):
    (folder / "x.json").write_text(json.dumps([{"conversations": [{"from": "x", "value": "y"}]}]))
    with pytest.raises(DataError, match=r"x.json record 0 \(line 1\): conversations\[0\]"):
        process(read_mixture(mixture(folder, ("x.json", "all"))), folder / "out.json")


def test_what_it_writes_is_read_back(folder):
    """Our reader of MindFormers' files, over our writer of them: the same requests."""
    path = mixture(folder, ("a/data.json", "random:5"), ("b/data.jsonl", "all"))
    process(read_mixture(path), folder / "out.json", tell=lambda line: None)
    before, after = choose(read_mixture(path)), open_records(folder / "out.json", ".")
    assert len(before) == len(after) == 12
    for n in range(12):
        (first, _), (second, _) = before.request(n), after.request(n)
        assert normalise(first)[0] == normalise(second)[0]
        assert [Path(p).name for p in first["images"]] == [Path(p).name for p in second["images"]]


def test_pairs_become_turns(folder):
    (folder / "p.json").write_text(json.dumps([{"conversations": [["Q", "A"], ["R", "B"]]}]))
    process(read_mixture(mixture(folder, ("p.json", "all"))), "out.json", tell=lambda line: None)
    (sample,) = json.loads(Path("out.json").read_text())
    assert [turn["from"] for turn in sample["conversations"]] == ["human", "gpt"] * 2
    assert sample["conversations"][0]["value"] == f"{OPEN}{CLOSE}Q"


def test_the_script(folder):
    path = mixture(folder, ("a/data.json", "random:3"))
    script = [sys.executable, str(ROOT / "scripts" / "data_process.py")]
    options = ["--data_yaml", str(path), "--output_file", "out.json"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["3", "max frames is 1"]
    assert len(json.loads((folder / "out.json").read_text())) == 3
    again = subprocess.run([*script, *options], capture_output=True, text=True)
    assert again.returncode == 2
    assert "there is a file of that name" in again.stderr
    assert "Traceback" not in again.stderr
