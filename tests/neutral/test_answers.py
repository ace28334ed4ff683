"""The answer file under interruption: at every byte, in every state, by another process."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unillava.errors import RequestError
from unillava.inference.answers import AnswerFile

IDS = [3, "b", 3, 5]
RUN = {"model": "m", "options": [1, 2]}


def answer(n):
    return {"question_id": IDS[n], "text": f"답 {n}\nline"}


def opened(path, run=RUN, **options):
    answers = AnswerFile(path, IDS)
    answers.open(run, **options)
    return answers


def finished(path):
    answers = opened(path)
    for n in range(answers.done, len(IDS)):
        answers.append([answer(n)])
    answers.finish()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    answers = opened(path)
    answers.append([answer(0), answer(1)])
    assert not path.exists()
    with pytest.raises(ValueError, match="2 of 4"):
        answers.finish()
    answers.close()
    assert finished(path) == [answer(n) for n in range(4)]
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "answers.jsonl",
        "answers.jsonl.run.json",
    ]


@settings(max_examples=60, deadline=None)
@given(lost=st.integers(0, 400), garbage=st.binary(max_size=5))
def test_continues_from_any_byte(tmp_path_factory, lost, garbage):
    """After a crash any number of last bytes may be missing, or be something else."""
    path = tmp_path_factory.mktemp("cut") / "answers.jsonl"
    answers = opened(path)
    answers.append([answer(n) for n in range(4)])
    answers.close()
    content = answers.partial.read_bytes()
    kept = content[: max(0, len(content) - lost)]
    answers.partial.write_bytes(kept + garbage.replace(b"\n", b"\0"))
    again = opened(path)
    assert again.done == kept.count(b"\n")
    assert again.partial.read_bytes() == content[: content[: len(kept)].rfind(b"\n") + 1]
    again.close()
    assert finished(path) == [answer(n) for n in range(4)]


def test_complete_answers_are_recognised(tmp_path):
    path = tmp_path / "answers.jsonl"
    finished(path)
    again = opened(path)
    assert again.complete
    assert again.done == 4


@pytest.mark.parametrize("complete", [False, True])
def test_answers_of_another_run_are_kept(tmp_path, complete):
    path = tmp_path / "answers.jsonl"
    if complete:
        finished(path)
    else:
        answers = opened(path)
        answers.append([answer(0)])
        answers.close()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RequestError, match="made with other model"):
        opened(path, {**RUN, "model": "another"})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    answers = opened(path, {**RUN, "model": "another"}, overwrite=True)
    assert answers.done == 0
    assert not path.exists()
    answers.close()


def test_answers_of_unknown_origin_are_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("precious\n")
    with pytest.raises(RequestError, match="not recorded"):
        opened(path)
    assert path.read_text() == "precious\n"


def test_a_partial_file_of_other_questions(tmp_path):
    path = tmp_path / "answers.jsonl"
    answers = opened(path)
    answers.append([answer(0)])
    answers.close()
    line = json.dumps({"question_id": 99}) + "\n"
    answers.partial.write_text(line)
    with pytest.raises(RequestError, match=r"line 1 .* another question"):
        opened(path)
    assert answers.partial.read_text() == line


def test_two_writers_exclude_each_other(tmp_path):
    path = tmp_path / "answers.jsonl"
    answers = opened(path)
    answers.append([answer(0)])
    with pytest.raises(RequestError, match="another process"):
        opened(path)
    with pytest.raises(RequestError, match="another process"):
        opened(path, overwrite=True)
    answers.append([answer(1)])
    answers.close()
    assert opened(path).done == 2


def test_no_questions_make_an_empty_file(tmp_path):
    answers = AnswerFile(tmp_path / "answers.jsonl", [])
    answers.open(RUN)
    answers.finish()
    assert answers.path.read_bytes() == b""
