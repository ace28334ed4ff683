"""What is learnt, against the rules of the historical systems (reference, section 3.4).

Each rule is written down here as the original computed it: by measuring stretches of text with the
tokenizer and adding corrections. Ours only knows characters, so nothing is shared.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conversations import IMAGE, message, say
from tests.tokenizers_tiny import llama3_like, llama_like, qwen_like, slow_llama
from unillava.data.conversation import (
    get_template,
    historical_names,
    render,
    template_names,
)
from unillava.data.tokens import encode
from unillava.errors import RequestError

IMAGE_ID = 800
SPEC = SimpleNamespace(image_token=IMAGE_ID, video_token=None, family="llava")
UNKNOWN = {"image": None, "pad": None}

words = st.lists(
    st.sampled_from("the image cat what 사진 你好 图片 x, 3. 😀 한\n \n".split(" ")), min_size=1
).map(lambda found: " ".join(["a", *found, "b"]))
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return slow_llama(tmp_path_factory.mktemp("slow"))


def with_controls(tokenizer, *controls):
    """A tokenizer that knows these control tokens, too."""
    from tokenizers import AddedToken

    added = [AddedToken(control, normalized=False, special=True) for control in controls]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


CHATML, GEMMA = ("<|im_start|>", "<|im_end|>"), ("<start_of_turn>", "<end_of_turn>")
BUILD = {
    "llama": lambda slow: llama_like(**UNKNOWN),
    "legacy llama": lambda slow: llama_like(**UNKNOWN, legacy=True),
    "slow llama": lambda slow: slow,
    "llama with ChatML": lambda slow: with_controls(llama_like(**UNKNOWN), *CHATML),
    "llama 3": lambda slow: llama3_like(**UNKNOWN),
    "llama 3 with marker": lambda slow: llama3_like(),
    "qwen": lambda slow: qwen_like(**UNKNOWN),
    "qwen with marker": lambda slow: qwen_like(),
    "gemma": lambda slow: with_controls(llama_like(**UNKNOWN), *GEMMA),
}


def is_legacy(tokenizer):
    return tokenizer.tokenize("</s>USER")[1].startswith("▁")


def image_ids(tokenizer, text):
    """Section 3.1: pieces between markers are tokenised apart; the first BOS stays."""
    pieces = [tokenizer(piece).input_ids for piece in text.split("<image>")]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids = pieces[0][:1] if has_bos else []
    for n, piece in enumerate(pieces):
        ids += ([IMAGE_ID] if n else []) + piece[has_bos:]
    return ids


def messages_of(pairs, has_image):
    messages = say(*(text for pair in pairs for text in pair))
    if has_image:
        messages[0]["content"].insert(0, IMAGE)
    return messages


def ours(tokenizer, name, messages):
    encoded = encode(tokenizer, render(get_template(name), messages), SPEC)
    return encoded.ids.tolist(), encoded.learnt.tolist()


def by_rounds(tokenizer, text, rounds, separator, *, start, after_round, before_answer):
    """The rule that v1, llama_2, mpt, llama3 and gemma share.

    Args:
        rounds: the text cut into rounds, without their end marks.
        separator: what stands before an answer, to the last character.
        start: ids that no round counts.
        after_round, before_answer: corrections of the two counts; functions of the round's number.
    """
    ids = image_ids(tokenizer, text)
    learnt, cursor = np.zeros(len(ids), bool), start
    for n, round_ in enumerate(rounds):
        if not round_:
            break
        question, _ = round_.split(separator)
        length = len(image_ids(tokenizer, round_)) + after_round(n)
        masked = len(image_ids(tokenizer, question + separator)) + before_answer(n)
        learnt[cursor + masked : cursor + length] = True
        cursor += length
    assert cursor == len(ids), "the original would have ignored the sample: tokenization mismatch"
    return ids, learnt.tolist()


def pairs_of_rounds(text, end, first):
    """Rounds of the MPT kind: the first has `first` pieces, the others two."""
    pieces = text.split(end)
    rounds = [end.join(pieces[:first])]
    rounds += [end.join(pieces[n : n + 2]) for n in range(first, len(pieces), 2)]
    return [round_ for round_ in rounds if round_.strip()]


# --- the rule of each version ------------------------------------------------------------------


def v1(tokenizer, text, separator=" ASSISTANT: "):
    def correction(n):
        return -int(n > 0 and not is_legacy(tokenizer))

    return by_rounds(
        tokenizer,
        text,
        text.split("</s>"),
        separator,
        start=1,
        after_round=correction,
        before_answer=lambda n: correction(n) - 2,
    )


def llama_2(tokenizer, text):
    return by_rounds(
        tokenizer,
        text,
        text.split("</s>"),
        "[/INST] ",
        start=1,
        after_round=lambda n: 0,
        before_answer=lambda n: -2,
    )


def mpt_next(tokenizer, text):
    """LLaVA-NeXT's, for tokenizers with a BOS."""
    return by_rounds(
        tokenizer,
        text,
        pairs_of_rounds(text, "<|im_end|>", 3),
        "<|im_end|><|im_start|>assistant\n",
        start=1,
        after_round=lambda n: 0,
        before_answer=lambda n: -1,
    )


def mpt_early(tokenizer, text):
    """LLaVA 1.1's and KoLLaVA's, for tokenizers without a BOS."""
    return by_rounds(
        tokenizer,
        text,
        pairs_of_rounds(text, "<|im_end|>", 3),
        "<|im_end|><|im_start|>assistant\n",
        start=0,
        after_round=lambda n: 1,
        before_answer=lambda n: 0,
    )


def llama_3(tokenizer, text):
    """Open-LLaVA-NeXT's; the text begins with a BOS, and the tokenizer adds one."""
    return by_rounds(
        tokenizer,
        text,
        pairs_of_rounds(text, "<|eot_id|>", 3),
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        start=0,
        after_round=lambda n: 1 - (n > 0),
        before_answer=lambda n: -(n > 0),
    )


def gemma(tokenizer, text):
    return by_rounds(
        tokenizer,
        text,
        pairs_of_rounds(text, "<end_of_turn>\n", 2),
        "<end_of_turn>\n<start_of_turn>model\n",
        start=1,
        after_round=lambda n: 1,
        before_answer=lambda n: -1,
    )


def plain(tokenizer, caption):
    ids = image_ids(tokenizer, "<image>" + caption + "\n")
    masked = len(image_ids(tokenizer, "<image>"))
    return ids, [n >= masked for n in range(len(ids))]


def v0(tokenizer, system, turns):
    """Every segment measured with a BOS of its own; of human turns two ids stay learnt."""
    header = f"{system}\n\n"
    segments = [f"### {role}: {text}\n" for role, text in turns]
    ids = image_ids(tokenizer, header + "".join(segments) + "### ")
    learnt = np.ones(len(ids), bool)
    cursor = len(image_ids(tokenizer, header))
    learnt[:cursor] = False
    for n, segment in enumerate(segments):
        length = len(image_ids(tokenizer, segment))
        if n % 2 == 0:
            learnt[cursor + 2 : cursor + length] = False
        cursor += length
    return ids, learnt.tolist()


def next_by_messages(tokenizer, blocks, exposed):
    """LLaVA-NeXT's on Qwen and LLaMA 3: (role, block) after block; some ids are learnt anywhere."""
    ids, learnt = [], []
    for role, block in blocks:
        own = tokenizer(block, add_special_tokens=False).input_ids
        ids += own
        learnt += [role == "assistant"] * len(own)
    always = {tokenizer(string, add_special_tokens=False).input_ids[-1] for string in exposed}
    return ids, [flag or number in always for number, flag in zip(ids, learnt, strict=True)]


# --- every template that was trained with --------------------------------------------------------

TWO = ("vicuna_v1", "llava_v1", "vicuna_no_system", "v1_mmtag", "legacy_llava_v1", "bair_v1")
LLAMA_2 = ("llama_2", "llava_llama_2", "llava_llama_2_simple", "llava_llama_2_mmtag")
MPT = ("mpt", "chatml_direct", "mistral_orca", "legacy_mpt", "mpt_multimodal", "mpt_text")

CASES = [
    *((name, kind, v1) for name in TWO for kind in ("llama", "legacy llama", "slow llama")),
    *((name, kind, llama_2) for name in LLAMA_2 for kind in ("llama", "legacy llama")),
    ("llava_llama_2", "slow llama", llama_2),
    # Its rule fits tokenizers of the legacy kind, as Mistral's was.
    ("mistral_instruct", "legacy llama", llama_2),
    *((name, "llama with ChatML", mpt_next) for name in MPT),
    *((name, "qwen", mpt_early) for name in MPT),
    ("gemma_instruct", "gemma", gemma),
]


@pytest.mark.parametrize(("name", "kind", "rule"), CASES)
@given(pairs=conversations, has_image=st.booleans())
@settings(max_examples=12, deadline=None)
def test_labels_are_the_originals(slow, name, kind, rule, pairs, has_image):
    tokenizer = BUILD[kind](slow)
    messages = messages_of(pairs, has_image)
    text = render(get_template(name), messages).text
    separator = {"bair_v1": (" GPT: ",)}.get(name, ())
    assert ours(tokenizer, name, messages) == rule(tokenizer, text, *separator)


@given(pairs=conversations, has_image=st.booleans())
@settings(max_examples=40, deadline=None)
def test_open_llava_next_on_llama_3(pairs, has_image):
    """The text with one BOS, to which its tokenizer adds another."""
    messages = messages_of(pairs, has_image)
    tokenizer = BUILD["llama 3"](None)
    text = render(get_template("llava_llama_3"), messages).text
    ids, learnt = llama_3(tokenizer, text)
    assert ids[:2] == [tokenizer.bos_token_id] * 2
    assert ours(tokenizer, "oln_llama_3", messages) == (ids, learnt)
    # The template for new work differs in the one BOS alone.
    assert ours(tokenizer, "llava_llama_3", messages) == (ids[1:], learnt[1:])


@pytest.mark.parametrize("kind", ["llama", "legacy llama", "slow llama"])
@given(caption=words)
@settings(max_examples=20, deadline=None)
def test_stage_one_throws_the_question_away(slow, kind, caption):
    tokenizer = BUILD[kind](slow)
    for question in ([IMAGE, "Describe."], ["Describe.", IMAGE], [IMAGE]):
        messages = [message("user", *question), message("assistant", caption)]
        assert ours(tokenizer, "plain", messages) == plain(tokenizer, caption)


HUMAN = ("Human", "Assistant")
IM = ("<|im_start|>user\n", "<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("name", "roles", "image"),
    [
        ("v0_original", HUMAN, "<image>"),
        ("v0_mmtag_original", HUMAN, "<Image><image></Image>"),
        ("kollava_mistral_original", IM, "<image>"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "legacy llama", "slow llama", "llama with ChatML"])
@given(pairs=conversations, has_image=st.booleans())
@settings(max_examples=12, deadline=None)
def test_the_first_rule(slow, name, roles, image, kind, pairs, has_image):
    tokenizer = BUILD[kind](slow)
    turns = [(roles[n % 2], text) for n, text in enumerate(t for pair in pairs for t in pair)]
    if has_image:
        turns[0] = (roles[0], f"{image}\n{turns[0][1]}")
    expected = v0(tokenizer, get_template(name).system, turns)
    assert ours(tokenizer, name, messages_of(pairs, has_image)) == expected


def test_the_first_rule_learns_prefixes_and_the_end(slow):
    tokenizer = llama_like(**UNKNOWN)
    ids, learnt = ours(tokenizer, "v0_original", say("what is this", "a cat"))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    found = "".join(piece for piece, flag in zip(pieces, learnt, strict=True) if flag)
    assert "Assistant:" in found
    assert "Human" not in found
    assert found.endswith("###▁")
    modern = ours(tokenizer, "v0_training", say("what is this", "a cat"))
    assert modern[0] == ids
    assert sum(modern[1]) < sum(learnt)


@given(pairs=conversations, has_image=st.booleans())
@settings(max_examples=40, deadline=None)
def test_llava_next_on_llama_3(pairs, has_image):
    messages = messages_of(pairs, has_image)
    tokenizer = BUILD["llama 3 with marker"](None)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    system = get_template("llava_llama_3").system
    blocks = [("system", "<|begin_of_text|>" + header.format("system", system))]
    blocks += [(m["role"], header.format(m["role"], text_of(m))) for m in messages]
    exposed = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    expected = next_by_messages(tokenizer, blocks, exposed)
    assert ours(tokenizer, "nx_llama_3", messages) == expected


@pytest.mark.parametrize("name", ["nx_qwen_1_5", "nx_qwen_2_5"])
@given(pairs=conversations, has_image=st.booleans())
@settings(max_examples=40, deadline=None)
def test_llava_next_on_qwen(name, pairs, has_image):
    messages = messages_of(pairs, has_image)
    tokenizer = BUILD["qwen with marker"](None)
    block = "<|im_start|>{}\n{}<|im_end|>\n"
    blocks = [("system", block.format("system", get_template(name).system))]
    blocks += [(m["role"], block.format(m["role"], text_of(m))) for m in messages]
    expected = next_by_messages(tokenizer, blocks, ["\n", "<|im_start|>", "<|im_end|>"])
    assert ours(tokenizer, name, messages) == expected


def text_of(message_):
    parts = ["<image>" if part == IMAGE else part["text"] for part in message_["content"]]
    return "\n".join(parts)


def test_llava_next_learns_line_breaks_of_questions():
    tokenizer = qwen_like()
    ids, learnt = ours(tokenizer, "nx_qwen_1_5", say("what\nis this", "a cat"))
    line_break = tokenizer("\n").input_ids[0]
    flags = [flag for number, flag in zip(ids, learnt, strict=True) if number == line_break]
    assert flags == [True] * 7
    _, modern = ours(tokenizer, "qwen_1_5", say("what\nis this", "a cat"))
    assert sum(modern) < sum(learnt)


def test_a_historical_template_needs_its_tokenizer():
    with pytest.raises(RequestError, match="does not fit the tokenizer"):
        ours(llama_like(), "nx_qwen_1_5", say("Q", "A"))


def test_historical_templates_ask_as_their_models_were_trained():
    """At inference they are templates like any other: the same text, nothing learnt."""
    same_text = {
        "v0_original": "v0_training",
        "kollava_mistral_original": "kollava_mistral_training",
        "nx_llama_3": "llava_llama_3",
        "nx_qwen_1_5": "qwen_1_5",
        "nx_qwen_2_5": "qwen_2_5",
    }
    for name, other in same_text.items():
        for messages, generate in ((say("Q", "A", "R"), True), (say("Q", "A", "R", "B"), False)):
            rendered = render(get_template(name), messages, generate)
            assert rendered.text == render(get_template(other), messages, generate).text
            if generate:
                assert (rendered.spans, rendered.segments, rendered.learnt_tokens) == ((), (), ())
    doubled = render(get_template("oln_llama_3"), say("Q"), True).text
    assert (
        doubled == "<|begin_of_text|>" + render(get_template("llava_llama_3"), say("Q"), True).text
    )
    assert set(historical_names()) == {*same_text, "oln_llama_3", "v0_mmtag_original"}
    assert not set(historical_names()) & set(template_names())
    assert get_template("nx_qwen_2").name == "nx_qwen_1_5"


def test_every_template_is_compared_with_its_rule_or_was_never_trained():
    compared = {name for name, _, _ in CASES} | {"plain", "llava_llama_3"}
    other_text = {
        # Trained in the form of v0_original, prompted in this one.
        *("v0", "llava_v0", "v0_mmtag", "multimodal", "simple", "simple_legacy"),
        "v0_training",
        # Trained in the form of kollava_mistral_original.
        *("kollava_mistral", "kollava_mistral_training"),
        # By LLaVA-NeXT's rule for Qwen: nx_qwen_1_5 and nx_qwen_2_5.
        *("qwen_1_5", "qwen_2_5"),
        # The language model's own; LLaVA-MOSS2 was trained with llava_llama_2.
        "moss2",
        # In LLaVA-NeXT's table, without a recipe.
        "mistral_zephyr",
    }
    assert compared | other_text == set(template_names())
