"""Question files: every accepted shape, paths, chunks, and what is wrong with a line."""

import json

import pytest

from unillava.data.request import normalise
from unillava.errors import MediaError, RequestError
from unillava.inference.questions import chunk, map_media, read_questions


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg", "clip.mp4"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def written(folder, lines, name="questions.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return path


def asked(question):
    messages, images, videos = normalise(question.request)
    return messages, images, videos


def test_question_lines_of_llava(folder):
    lines = [
        {"question_id": 7, "image": "a.jpg", "text": "What?\nOne word.", "category": "conv"},
        {"question_id": "x/1", "text": "사과는?\u2028 no picture"},
        {"question_id": 9, "image": ["a.jpg", "b.jpg"], "text": "<image> or <image>?"},
        {"question_id": 10, "video": "clip.mp4", "text": "What happens?"},
    ]
    questions = read_questions(written(folder, lines))
    assert [question.problem for question in questions] == [None] * 4
    assert [question.id for question in questions] == [7, "x/1", 9, 10]
    assert questions[0].prompt == "What?\nOne word."
    assert questions[1].prompt == "사과는?\u2028 no picture"
    assert "<image>" not in questions[2].prompt
    assert [asked(q)[1:] for q in questions] == [
        ([str(folder / "a.jpg")], []),
        ([], []),
        ([str(folder / "a.jpg"), str(folder / "b.jpg")], []),
        ([], [str(folder / "clip.mp4")]),
    ]


def test_requests_and_records(folder):
    parts = [
        {"type": "image", "image": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "https://example.org/b.jpg"}},
        {"type": "text", "text": "Compare."},
    ]
    science = {
        "id": "5",
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"},
            {"from": "gpt", "value": "A"},
        ],
    }
    lines = [{"id": 1, "messages": [{"role": "user", "content": parts}]}, science]
    first, second = read_questions(written(folder, lines))
    assert first.prompt == "Compare."
    assert asked(first)[1] == [str(folder / "a.jpg"), "https://example.org/b.jpg"]
    # The marker tells ScienceQA's scorer that there was a picture.
    assert second.prompt == "<image>\nWhich?\nA. x\nB. y"
    messages, images, _ = asked(second)
    assert [message["role"] for message in messages] == ["user"]
    assert images == [str(folder / "a.jpg")]


def test_json_list_and_byte_order_mark(folder):
    path = folder / "list.json"
    lines = [{"question_id": n, "text": "?"} for n in range(3)]
    path.write_text("\ufeff" + json.dumps(lines, indent=1), encoding="utf-8")
    assert [question.where for question in read_questions(path)] == [
        "list.json entry 0",
        "list.json entry 1",
        "list.json entry 2",
    ]


def test_image_folder(folder, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("elsewhere"), [{"id": 1, "image": "a.jpg", "text": "?"}])
    assert read_questions(path, str(folder))[0].problem is None
    (question,) = read_questions(path)
    assert isinstance(question.problem, MediaError)
    with pytest.raises(RequestError, match=r"questions.jsonl line 1 \(id 1\).*no such file"):
        raise question.failure(question.problem)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"question_id": 1, "text": "?"', "not JSON"),
        ("[1, 2", "not JSON"),
        ('"text"', "no id"),
        ('{"text": "?"}', "no id"),
        ('{"question_id": 1}', "no text"),
        ('{"question_id": 1, "text": ""}', "no text"),
        ('{"id": 1, "messages": []}', "no messages"),
        ('{"id": 1, "messages": [{"role": "robot", "content": "?"}]}', "no known role"),
        ('{"id": 1, "image": "a.jpg", "text": "<image> <image>"}', "contradicts"),
        ('{"id": 1, "conversations": []}', "no conversation"),
    ],
)
def test_bad_lines_are_named(folder, line, told):
    path = folder / "questions.jsonl"
    path.write_text('{"question_id": 0, "text": "good"}\n\n' + line + "\n")
    good, bad = read_questions(path)
    assert good.problem is None
    assert bad.where == "questions.jsonl line 3"
    assert told in bad.problem.problem


def test_a_broken_list_and_a_missing_file(folder):
    path = folder / "list.json"
    path.write_text('[{"question_id": 1, "text": "?"}')
    with pytest.raises(RequestError, match="not JSON"):
        read_questions(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_questions(folder / "none.jsonl")


@pytest.mark.parametrize(("total", "count"), [(10, 1), (10, 3), (5, 4), (0, 2), (2, 8)])
def test_chunks_are_llavas(folder, total, count):
    questions = read_questions(written(folder, [{"id": n, "text": "?"} for n in range(total)]))
    parts = [chunk(questions, count, index) for index in range(count)]
    assert [q.id for part in parts for q in part] == list(range(total))
    assert all(len(part) <= -(-total // count) for part in parts)
    with pytest.raises(RequestError, match="chunk"):
        chunk(questions, count, count)


def test_map_media_reaches_every_source():
    request = {
        "images": ["a", "b"],
        "video": "c",
        "messages": [
            {"role": "user", "content": "<image> text"},
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": "d"},
                    {"type": "image_url", "image_url": {"url": "e", "detail": "low"}},
                    {"type": "video", "video": "f"},
                    {"type": "image"},
                    {"type": "text", "text": "a"},
                ],
            },
        ],
    }
    seen = []

    def change(kind, source):
        seen.append((kind, source))
        return source.upper()

    changed = map_media(request, change)
    assert seen == [
        ("image", "a"),
        ("image", "b"),
        ("video", "c"),
        ("image", "d"),
        ("image", "e"),
        ("video", "f"),
    ]
    assert changed["images"] == ["A", "B"]
    assert changed["messages"][1]["content"][1]["image_url"] == {"url": "E", "detail": "low"}
    assert request["images"] == ["a", "b"], "the request itself is not changed"
