"""The quickstart's pictures and questions: what is asked is true, balanced, and really held out."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import draw_shapes, score_answers
from scripts.draw_shapes import Scene

SCENE = Scene(3, "blue", "square", "bottom left")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes.write(folder, 120, 40, seed=3)
    return folder


def records(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_what_is_said_is_true():
    assert draw_shapes.caption(SCENE) == "3 blue squares at the bottom left."
    pair = Scene(2, "red", "cross", "top right")
    assert draw_shapes.caption(pair) == "2 red crosses at the top right."
    assert {turn.kind: turn.answer for turn in draw_shapes.turns(SCENE)} == {
        "colour": "blue",
        "shape": "square",
        "count": "3",
        "position": "bottom left",
    }


@pytest.mark.parametrize("count", draw_shapes.COUNTS)
def test_a_picture_shows_its_scene(count):
    """So many squares of the colour in the middle of the place's cells, nothing anywhere else."""
    scene = Scene(count, "blue", "square", "bottom left")
    pixels = np.asarray(draw_shapes.draw(scene, random.Random(count)), np.float64)
    middles = pixels[14::28, 14::28]
    blue = np.abs(middles - draw_shapes.COLOURS["blue"]).max(-1) <= 16
    assert blue.sum() == blue[2:, :2].sum() == count
    empty = pixels[~np.kron(blue, np.ones((28, 28), bool))]
    # Shrinking leaves faint rings along the edges.
    assert np.quantile(np.abs(empty - draw_shapes.GREY), 0.98) <= 9


def test_held_out_combinations_are_not_learnt():
    learnt, held = draw_shapes.scenes(500, 60, random.Random(1))
    assert (len(learnt), len(held)) == (500, 60)
    assert not set(learnt) & set(held) and len(set(held)) > 15


def test_answers_are_balanced(drawn):
    given: dict[str, Counter] = {}
    for record in records(drawn, "questions.json"):
        for question, answer in zip(*[iter(record["conversations"])] * 2, strict=True):
            kind = question["value"].removeprefix("<image>\n").split()[0]
            given.setdefault(kind, Counter())[answer["value"]] += 1
    assert given.keys() == {"What", "Which", "How", "Where"}
    for counts in given.values():
        assert max(counts.values()) < 2 * min(counts.values()), counts


def test_the_same_seed_draws_the_same(drawn, tmp_path):
    draw_shapes.write(tmp_path / "again", 120, 40, seed=3)
    files = [path.relative_to(drawn) for path in drawn.rglob("*") if path.is_file()]
    assert len(files) == 160 + 4
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (drawn / file).read_bytes(), file
    draw_shapes.write(tmp_path / "other", 120, 40, seed=4)
    one, other = (
        (folder / "questions.json").read_bytes() for folder in (drawn, tmp_path / "other")
    )
    assert one != other


def test_every_picture_of_the_files_is_there(drawn):
    named = {
        r["image"] for name in ("captions.json", "questions.json") for r in records(drawn, name)
    }
    lines = (drawn / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    held = {json.loads(line)["image"] for line in lines}
    assert (len(named), len(held), len(named & held)) == (120, 40, 0)
    for name in named | held:
        with Image.open(drawn / name) as image:
            assert image.size == (draw_shapes.SIDE, draw_shapes.SIDE)


def test_scores(drawn, tmp_path, monkeypatch, capsys):
    questions = drawn / "held_out.jsonl"
    read = score_answers.read(questions)
    answers = [{"question_id": q["question_id"], "text": q["answer"]} for q in read]
    answers[0]["text"] += "."
    answers.pop(1)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    for least, code in ((95, 0), (95.1, 1)):
        arguments = ["score", str(questions), str(path), "--at-least", str(least)]
        monkeypatch.setattr("sys.argv", arguments)
        assert score_answers.main() == code
        assert "accuracy 95.0 % of 40 questions" in capsys.readouterr().out
