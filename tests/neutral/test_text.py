"""Streaming of text: nothing broken, nothing lost, nothing of a stop string."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tokenizers_tiny import SAMPLE_TEXTS, llama3_like, llama_like, qwen_like, slow_llama
from unillava.inference.text import (
    IncrementalDecoder,
    ReplyStream,
    StopChecker,
    decode,
    stop_token_ids,
)


@pytest.fixture(scope="module", params=["llama", "legacy llama", "slow llama", "llama 3", "qwen"])
def tokenizer(request, tmp_path_factory):
    build = {
        "llama": llama_like,
        "legacy llama": lambda: llama_like(legacy=True),
        "slow llama": lambda: slow_llama(tmp_path_factory.mktemp("slow")),
        "llama 3": llama3_like,
        "qwen": qwen_like,
    }
    return build[request.param]()


def stream(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(number) for number in ids]
    return [*pieces, decoder.finish()]


characters = st.sampled_from([*"aA .,\n\t", "가", "각", "힣", "你", "猫", "😀", "👩‍🚀", "é", "½"])


@given(text=st.lists(characters | st.text(), max_size=12).map("".join))
@example("  two  spaces ")
@example(" 가 각 ")
@example("\n\n 猫")
@settings(max_examples=150, deadline=None)
def test_streamed_text_equals_the_whole(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = stream(tokenizer, ids)
    whole = decode(tokenizer, ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_tokens_are_streamed_to_what_they_decode_to(tokenizer, data):
    """Also wrong bytes, special tokens in between, and pieces no text leads to."""
    number = st.integers(0, min(len(tokenizer), 420) - 1)
    ids = data.draw(st.lists(number | st.integers(3, 258), max_size=30))
    decoder = IncrementalDecoder(tokenizer)
    text, whole = "", decode(tokenizer, ids)
    for token in ids:
        text += decoder.push(token)
        assert whole.startswith(text)
    assert text + decoder.finish() == whole


@pytest.mark.parametrize("text", SAMPLE_TEXTS[2:4])
def test_text_comes_soon(text):
    """Byte-level: as soon as a character is whole. Byte fallback: when the run of bytes ends."""
    tokenizer = qwen_like()
    decoder, seen = IncrementalDecoder(tokenizer), []
    ids = tokenizer(text).input_ids
    for n, token in enumerate(ids):
        seen.append(decoder.push(token))
        certain = decode(tokenizer, ids[: n + 1]).rstrip("\ufffd")
        # A space may share its token with the first byte of what follows.
        assert "".join(seen).rstrip() == certain.rstrip()
    llama = llama_like()
    decoder = IncrementalDecoder(llama)
    pieces = [decoder.push(token) for token in llama(text, add_special_tokens=False).input_ids]
    assert max(map(len, pieces)) <= 8


def test_one_character_at_a_time():
    tokenizer = llama_like()
    ids = tokenizer.convert_tokens_to_ids(
        ["▁사진", "▁", "<0xEA>", "<0xB0>", "<0x81>", "이", "▁the"]
    )
    assert stream(tokenizer, ids) == ["사진", " ", "", "", "", "각이", " the", ""]


# --- stop strings -------------------------------------------------------------------------------


def cut(text, stops):
    """What is left if one looks after every character whether a stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


letters = st.text("ab#", max_size=20)


@given(
    pieces=st.lists(letters, max_size=8),
    stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
)
@example(["ab", "ca"], ["abcd", "bc"])
@settings(max_examples=300, deadline=None)
def test_text_is_cut_before_the_first_stop_string(pieces, stops):
    checker = StopChecker(stops)
    sent = ""
    for piece in pieces:
        sent += checker.push(piece)
        assert not any(stop in sent for stop in stops)
    sent += checker.finish()
    text = "".join(pieces)
    assert sent == cut(text, stops)
    assert checker.stopped == any(stop in text for stop in stops)


def test_only_what_could_become_a_stop_string_is_held_back():
    checker = StopChecker(["###"])
    assert [checker.push(piece) for piece in ("A", "#", "B##", "C", "##")] == [
        "A",
        "",
        "#B",
        "##C",
        "",
    ]
    assert checker.finish() == "##"
    assert StopChecker([""]).push("A#") == "A#"


def test_replies_end_at_stop_strings_spread_over_tokens():
    tokenizer = llama_like()
    ids = tokenizer("the cat ###Human: what", add_special_tokens=False).input_ids
    reply = ReplyStream(tokenizer, ["###"])
    pieces = []
    for token in ids:
        pieces.append(reply.push(token))
        if reply.stopped:
            break
    assert "".join(pieces) + reply.finish() == "the cat "
    assert len(pieces) < len(ids)


def test_replies_end_at_stop_tokens():
    tokenizer = llama_like()
    ids = tokenizer("the cat", add_special_tokens=False).input_ids
    reply = ReplyStream(tokenizer)
    text = "".join(reply.push(token) for token in [*ids, tokenizer.eos_token_id, *ids])
    assert reply.stopped
    assert text + reply.finish() == "the cat"
    endless = ReplyStream(tokenizer, stop_ids=())
    text = "".join(endless.push(token) for token in [*ids, tokenizer.eos_token_id, *ids])
    assert not endless.stopped
    assert text + endless.finish() == "the cat the cat"


def test_the_rest_is_searched_for_stop_strings_too():
    tokenizer = llama_like()
    reply = ReplyStream(tokenizer, ["\n"])
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<0x0A>"])
    assert [reply.push(token) for token in ids] == ["the", ""]
    assert reply.finish() == ""
    assert reply.stopped


def test_stop_strings_that_are_tokens_stop_by_their_id():
    tokenizer = qwen_like()
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_token_ids(tokenizer) == {end}
    assert stop_token_ids(tokenizer, ["<|endoftext|>", "###", "cat"]) == {end, text_end}
    assert stop_token_ids(llama_like(), ["###"]) == {2}
