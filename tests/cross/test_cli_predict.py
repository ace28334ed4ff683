"""`unillava predict`: formats, batches, interruption at any moment, errors in the data."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cross.conftest import environment

COUNT = 10
SHORT = ("--max-new-tokens", "10")


@pytest.fixture(scope="module")
def checkpoint(tiny) -> Path:
    return tiny()


@pytest.fixture(scope="module")
def model(checkpoint):
    import unillava

    return unillava.load(str(checkpoint), backend="torch")


@pytest.fixture
def folder(tmp_path, photo) -> Path:
    """A folder with questions.jsonl, whose images lie in images/."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "photo.jpg").write_bytes(photo.read_bytes())
    write_questions(tmp_path)
    return tmp_path


def write_questions(folder: Path, count: int = COUNT, **changes: object) -> None:
    """Questions with and without an image; `changes`: q3={...} replaces entries of one."""
    lines = []
    for n in range(count):
        line = {"question_id": n * 10, "text": f"Question {n}: what is this?", "category": "conv"}
        line |= {"image": "photo.jpg"} if n % 3 else {}
        lines.append(line | changes.get(f"q{n}", {}))
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(content)


def arguments(checkpoint: Path, folder: Path, out: str = "answers.jsonl") -> list[object]:
    return [
        *("predict", checkpoint, "--data", folder / "questions.jsonl", "--out", folder / out),
        *("--image-folder", folder / "images", *SHORT),
    ]


def answers(folder: Path, name: str = "answers.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_answer_lines(run, model, checkpoint, folder):
    done = run(*arguments(checkpoint, folder), "--batch-size", "4").succeeded()
    found = answers(folder)
    assert [line["question_id"] for line in found] == [n * 10 for n in range(COUNT)]
    photo = str(folder / "images" / "photo.jpg")
    for n, line in enumerate(found):
        assert list(line) == "question_id prompt text answer_id model_id metadata".split()
        assert line["prompt"] == f"Question {n}: what is this?"
        assert line["model_id"] == checkpoint.name
        assert line["metadata"] == {}
        assert re.fullmatch("[2-9A-HJ-NP-Za-km-z]{22}", line["answer_id"])
        reply = model.chat(line["prompt"], image=photo if n % 3 else None, max_new_tokens=10)
        assert line["text"] == reply.text
    assert len({line["answer_id"] for line in found}) == COUNT
    assert f"{COUNT} answers" in done.err
    assert done.out == ""


def test_batches_and_old_flags_change_nothing(run, checkpoint, folder):
    run(*arguments(checkpoint, folder), "--batch-size", "7").succeeded()
    for chunk in range(3):
        run(
            *("predict", "--model-path", checkpoint, "--image-folder", folder / "images"),
            *("--question-file", folder / "questions.jsonl"),
            *("--answers-file", folder / f"part{chunk}.jsonl"),
            *("--num-chunks", 3, "--chunk-idx", chunk, "--batch-size", 1),
            *("--temperature", "0", "--max_new_tokens", "10"),
        ).succeeded()
    parts = "".join((folder / f"part{chunk}.jsonl").read_text() for chunk in range(3))
    assert parts == (folder / "answers.jsonl").read_text()


def test_sampling_does_not_depend_on_the_batch(run, checkpoint, folder):
    sampling = ("--temperature", "1.5", "--top-p", "0.9", "--seed", "4")
    run(*arguments(checkpoint, folder, "one.jsonl"), *sampling, "--batch-size", "1").succeeded()
    run(*arguments(checkpoint, folder, "five.jsonl"), *sampling, "--batch-size", "5").succeeded()
    assert (folder / "one.jsonl").read_text() == (folder / "five.jsonl").read_text()


# --- interruption ----------------------------------------------------------------------------


def test_killed_and_continued(run, checkpoint, folder):
    count = 6
    write_questions(folder, count)
    slow = ("--max-new-tokens", "50", "--batch-size", "1")
    whole = [*arguments(checkpoint, folder, "whole.jsonl"), *slow]
    run(*whole).succeeded()
    command = [*arguments(checkpoint, folder), *slow]
    process = subprocess.Popen(
        [sys.executable, "-m", "unillava", *map(str, command)],
        env=environment(),
        stderr=subprocess.PIPE,
    )
    partial = folder / "answers.jsonl.partial"
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = partial.read_bytes()
    assert not (folder / "answers.jsonl").exists(), "it ended before it was killed"
    partial.write_bytes(kept + b'{"question_id": 30, "te')
    done = run(*command).succeeded()
    text = (folder / "answers.jsonl").read_bytes()
    assert text.startswith(kept), "the answers that were there are kept"
    assert text == (folder / "whole.jsonl").read_bytes()
    assert f"{count - kept.count(bytes([10]))} answers" in done.err
    assert not partial.exists()
    assert "complete already" in run(*command).succeeded().err


@pytest.mark.parametrize("what", ["questions", "model", "options"])
def test_another_run_is_refused(run, tiny, checkpoint, folder, what):
    command = arguments(checkpoint, folder)
    run(*command).succeeded()
    before = (folder / "answers.jsonl").read_bytes()
    if what == "questions":
        write_questions(folder, q3={"text": "Something else?"})
    elif what == "model":
        # Same configuration and sizes: only the weights differ.
        command[1] = tiny(seed=1)
    else:
        command += ["--temperature", "0.5"]
    message = run(*command).refused()
    assert f"made with other {'temperature' if what == 'options' else what}" in message
    assert "--overwrite" in message
    assert (folder / "answers.jsonl").read_bytes() == before
    run(*command, "--overwrite").succeeded()
    assert (folder / "answers.jsonl").read_bytes() != before


# --- errors in the data ----------------------------------------------------------------------


def test_a_damaged_image_stops_and_keeps_what_is_done(run, checkpoint, folder, photo):
    (folder / "images" / "damaged.jpg").write_bytes(photo.read_bytes()[:5000])
    write_questions(folder, q5={"image": "damaged.jpg"})
    command = [*arguments(checkpoint, folder), "--batch-size", "4"]
    message = run(*command).refused()
    assert "questions.jsonl line 6 (id 50): the image cannot be decoded" in message
    assert "5 of 10 answers kept" in message
    assert not (folder / "answers.jsonl").exists()
    kept = (folder / "answers.jsonl.partial").read_bytes()
    assert kept.count(b"\n") == 5
    (folder / "images" / "damaged.jpg").write_bytes(photo.read_bytes())
    run(*command).succeeded()
    assert (folder / "answers.jsonl").read_bytes().startswith(kept)
    assert len(answers(folder)) == COUNT


def test_skipping_records_the_error(run, checkpoint, folder, photo):
    run(*arguments(checkpoint, folder, "good.jsonl")).succeeded()
    (folder / "images" / "damaged.jpg").write_bytes(photo.read_bytes()[:5000])
    write_questions(
        folder,
        q1={"image": "absent.jpg"},
        q4={"image": "damaged.jpg"},
        q6={"text": "long " * 2000},
        q8={"text": None},
    )
    done = run(*arguments(checkpoint, folder), "--on-error", "skip").succeeded()
    assert "4 failed" in done.err
    told = {1: "no such file", 4: "cannot be decoded", 6: "context", 8: "no text"}
    pairs = zip(answers(folder), answers(folder, "good.jsonl"), strict=True)
    for n, (line, good) in enumerate(pairs):
        if n in told:
            assert told[n] in line["metadata"]["error"]
            assert line["text"] == ""
        else:
            assert line == good


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"question_id": 1, "text": "?"}\n{"question_id": 2, "text"', "line 2"),
        ('{"question_id": 1, "text": "?", "image": "no.jpg"}\n', "line 1 (id 1): there is no such"),
        ("[1, ", "not JSON"),
    ],
)
def test_bad_lines_are_told_before_the_model_is_loaded(run, folder, content, told):
    (folder / "questions.jsonl").write_text(content)
    message = run(*arguments(Path("/no/model"), folder)).refused()
    assert told in message


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--on-error", "ignore"], "on-error"),
        (["--num-chunks", "2", "--chunk-idx", "2"], "chunk"),
        (["--top-p", "2"], "top_p"),
    ],
)
def test_wrong_options(run, folder, extra, told):
    assert told in run(*arguments(Path("/no/model"), folder), *extra).refused()


def test_missing_arguments(run, checkpoint):
    assert "--data" in run("predict", checkpoint).refused()
    assert "no checkpoint" in run("predict").refused()
