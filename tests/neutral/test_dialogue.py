"""Turns of a conversation: what is recorded, sent, kept after a stop, and forgotten."""

import contextlib
from types import SimpleNamespace

import pytest

from unillava.errors import MediaError, RequestError
from unillava.inference.dialogue import Dialogue


class Parrot:
    """Stands in for a model: says the last text word by word."""

    def __init__(self):
        self.requests = []
        self.options = []
        self.error = None

    def stream(self, request, **options):
        self.requests.append(request)
        self.options.append(options)
        if self.error:
            raise self.error
        text = request["messages"][-1]["content"][-1]["text"]
        first, space, rest = text.partition(" ")
        yield from [piece for piece in (first, space + rest) if piece]
        history = [*request["messages"], {"role": "assistant", "content": text}]
        return SimpleNamespace(text=text, history=history)


@pytest.fixture
def dialogue():
    return Dialogue(Parrot(), system="Be brief.", options={"seed": 3})


def roles_and_texts(dialogue):
    return [
        (m["role"], m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"])
        for m in dialogue.messages
    ]


def test_pieces_joined_are_the_reply(dialogue):
    assert list(dialogue.say("one  two")) == ["one", "  two"]
    assert dialogue.reply.text == "one  two"
    assert "".join(dialogue.say("three")) == "three"
    assert roles_and_texts(dialogue) == [
        ("system", "Be brief."),
        ("user", "one  two"),
        ("assistant", "one  two"),
        ("user", "three"),
        ("assistant", "three"),
    ]
    assert dialogue.model.options == [{"seed": 3}] * 2


def test_a_stopped_reply_keeps_what_was_said(dialogue):
    with contextlib.closing(dialogue.say("one two")) as pieces:
        assert next(pieces) == "one"
    assert dialogue.reply is None
    assert roles_and_texts(dialogue)[1:] == [("user", "one two"), ("assistant", "one")]


def test_stopped_before_the_first_word(dialogue, photo):
    dialogue.attach("image", str(photo))
    dialogue.say("one").close()
    assert roles_and_texts(dialogue) == [("system", "Be brief.")]
    assert len(dialogue.attached) == 1


def test_an_error_changes_nothing(dialogue, photo):
    dialogue.attach("image", str(photo))
    dialogue.model.error = RequestError("too long")
    with pytest.raises(RequestError):
        list(dialogue.say("one"))
    assert roles_and_texts(dialogue) == [("system", "Be brief.")]
    dialogue.model.error = None
    list(dialogue.say("again"))
    assert [part["type"] for part in dialogue.messages[1]["content"]] == ["image", "text"]


def test_media_go_with_one_turn_and_stay_in_the_history(dialogue, photo, tmp_path):
    dialogue.attach("image", str(photo))
    dialogue.attach("video", str(tmp_path))
    list(dialogue.say("what?"))
    list(dialogue.say("and?"))
    first, second = dialogue.model.requests
    assert [part["type"] for part in first["messages"][1]["content"]] == ["image", "video", "text"]
    # Read once: a picture from the web is not fetched again at every turn.
    assert first["messages"][1]["content"][0]["image"].size == (512, 600)
    assert second["messages"][1] == first["messages"][1]
    assert [part["type"] for part in second["messages"][-1]["content"]] == ["text"]


def test_reset_returns_to_the_opening(dialogue, photo):
    dialogue.attach("image", str(photo), opening=True)
    list(dialogue.say("what?"))
    dialogue.attach("image", str(photo))
    dialogue.reset()
    assert roles_and_texts(dialogue) == [("system", "Be brief.")]
    assert len(dialogue.attached) == 1
    assert dialogue.reply is None


@pytest.mark.parametrize("kind", ["image", "video"])
def test_missing_files_are_told_at_once(dialogue, kind):
    with pytest.raises(MediaError, match="no such file"):
        dialogue.attach(kind, "/nowhere/picture")
    assert dialogue.attached == []
