"""Ids and labels against the original rules, for every kind of tokenizer."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conversations import HEADERS, IMAGE, VIDEO, message, say
from tests.tokenizers_tiny import SAMPLE_TEXTS, llama3_like, llama_like, qwen_like, slow_llama
from unillava import tiny
from unillava.data.conversation import CheckpointTemplate, get_template, render, template_names
from unillava.data.messages import Rendered
from unillava.data.tokens import encode
from unillava.errors import ConfigError, RequestError

KNOWN, UNKNOWN = {}, {"image": None, "pad": None}
IMAGE_ID, VIDEO_ID = 800, 802
SPEC = SimpleNamespace(image_token=IMAGE_ID, video_token=VIDEO_ID, family="llava_next_video")
NO_VIDEO = SimpleNamespace(image_token=IMAGE_ID, video_token=None, family="llava")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return slow_llama(tmp_path_factory.mktemp("slow"))


@pytest.fixture(
    scope="module",
    params=[
        "llama",
        "llama without markers",
        "legacy llama",
        "legacy llama without markers",
        "slow llama",
        "llama 3",
        "qwen",
    ],
)
def tokenizer(request, slow):
    build = {
        "llama": lambda: llama_like(video=VIDEO_ID),
        "llama without markers": lambda: llama_like(**UNKNOWN),
        "legacy llama": lambda: llama_like(video=VIDEO_ID, legacy=True),
        "legacy llama without markers": lambda: llama_like(**UNKNOWN, legacy=True),
        "slow llama": lambda: slow,
        "llama 3": lambda: llama3_like(video=VIDEO_ID),
        "qwen": lambda: qwen_like(video=VIDEO_ID),
    }
    return build[request.param]()


def encoded_prompt(tokenizer, name, messages, generate=False):
    return encode(tokenizer, render(get_template(name), messages, generate), SPEC)


def original_ids(tokenizer, text):
    """The original's rule (section 3.1), with one BOS: marker-free pieces, tokenised apart."""
    pieces = [tokenizer(piece).input_ids for piece in text.split("<image>")]
    bos = pieces[0][:1] == [tokenizer.bos_token_id]
    ids = pieces[0][:1] if bos else []
    for n, piece in enumerate(pieces):
        ids += ([IMAGE_ID] if n else []) + piece[bos:]
    return ids


def original_labels(tokenizer, text, end, separator):
    """The original's v1 and llama_2 masks (section 3.4): which ids are learnt.

    Rounds are measured with the tokenizer and the answer is found by counting two ids back, BOS
    and the lone space that ends the separator.
    """
    legacy = tokenizer.tokenize("</s>USER")[1].startswith("▁")
    ids = original_ids(tokenizer, text)
    learnt, cursor = np.zeros(len(ids), bool), 1
    for n, round_ in enumerate(text.split(end)):
        if not round_:
            break
        question, _ = round_.split(separator)
        correction = int(n > 0 and not legacy and not round_.startswith("<s>"))
        length = len(original_ids(tokenizer, round_)) - correction
        masked = len(original_ids(tokenizer, question + separator)) - 2 - correction
        learnt[cursor + masked : cursor + length] = True
        cursor += length
    assert cursor == len(ids)
    return learnt


words = st.lists(
    st.sampled_from("the image cat what 사진 무엇 你好 图片 x, 3. 😀 한".split()), min_size=1
).map(" ".join)
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["new", "legacy", "slow"])
@pytest.mark.parametrize(
    ("name", "separator"),
    [("vicuna_v1", " ASSISTANT: "), ("llava_llama_2", "[/INST] ")],
)
@given(pairs=conversations, has_image=st.booleans())
@settings(max_examples=40, deadline=None)
def test_ids_and_labels_equal_the_original_rules(slow, kind, name, separator, pairs, has_image):
    tokenizer = slow if kind == "slow" else llama_like(**UNKNOWN, legacy=kind == "legacy")
    messages = say(*(text for pair in pairs for text in pair))
    if has_image:
        messages[0]["content"].insert(0, IMAGE)
    rendered = render(get_template(name), messages)
    encoded = encode(tokenizer, rendered, SPEC)
    assert encoded.ids.tolist() == original_ids(tokenizer, rendered.text)
    expected = original_labels(tokenizer, rendered.text, "</s>", separator)
    assert encoded.learnt.tolist() == expected.tolist()


def test_plain_learns_the_caption_and_its_line_break():
    tokenizer = llama_like(**UNKNOWN)
    messages = [message("user", "Describe.", IMAGE), message("assistant", "A cat.")]
    encoded = encoded_prompt(tokenizer, "plain", messages)
    caption = tokenizer("A cat.\n", add_special_tokens=False).input_ids
    assert encoded.ids.tolist() == [1, IMAGE_ID, *caption]
    assert encoded.learnt.tolist() == [False, False, *[True] * len(caption)]


def test_spaces_around_the_image_are_those_of_the_original():
    """`USER: <image>⏎q`: a lone space piece before the marker and, chunk by chunk, after it."""
    messages = [message("user", IMAGE, "q")]
    for build, expected in (
        ({}, ["▁", "<image>", "<0x0A>", "q"]),
        (UNKNOWN, ["▁", None, "▁", "<0x0A>", "q"]),
    ):
        tokenizer = llama_like(**build)
        ids = encoded_prompt(tokenizer, "vicuna_no_system", messages, True).ids.tolist()
        place = ids.index(IMAGE_ID)
        pieces = tokenizer.convert_ids_to_tokens(ids)[place - 1 : place - 1 + len(expected)]
        assert pieces == expected


@pytest.mark.parametrize("name", template_names())
def test_learnt_tokens_are_the_answers(tokenizer, name):
    """For every template and tokenizer: what is learnt, decoded, is the answer and its end."""
    template = get_template(name)
    turns = [message("user", IMAGE, SAMPLE_TEXTS[0]), *say("", SAMPLE_TEXTS[2])[1:]]
    if not template.caption:
        turns += say(SAMPLE_TEXTS[3], SAMPLE_TEXTS[1].strip())
    rendered = render(template, turns)
    encoded = encode(tokenizer, rendered, SPEC)
    assert (encoded.ids == IMAGE_ID).sum() == 1
    assert encoded.ids.dtype == np.int64
    assert encoded.learnt.dtype == bool
    spans = _runs(encoded)
    assert len(spans) == len(rendered.spans)
    for ids, (start, end) in zip(spans, rendered.spans, strict=True):
        expected = rendered.text[start:end]
        assert _letters(tokenizer.decode(ids)) == _letters(expected)


def _runs(encoded):
    runs, before = [], False
    for number, learnt in zip(encoded.ids.tolist(), encoded.learnt.tolist(), strict=True):
        if learnt:
            runs += [] if before else [[]]
            runs[-1].append(number)
        before = learnt
    return runs


def _letters(text):
    """Without spaces: where those go is compared with the original's rule above."""
    return "".join(text.split()).replace("▁", "")


def test_whole_prompts_are_tokenised_as_the_tokenizer_does(tokenizer):
    for name in ("vicuna_v1", "chatml_direct", "mistral_instruct", "llava_v0"):
        text = render(get_template(name), say(*SAMPLE_TEXTS[:5]), True)
        encoded = encode(tokenizer, text, SPEC)
        assert encoded.ids.tolist() == tokenizer(text.text).input_ids
        assert not encoded.learnt.any()


@pytest.mark.parametrize("spec", [SPEC, NO_VIDEO])
def test_images_and_videos_are_single_tokens(spec):
    messages = [message("user", IMAGE, IMAGE, "Q"), *say("", "A")[1:], message("user", IMAGE)]
    for build in (KNOWN, UNKNOWN):
        rendered = render(get_template("vicuna_v1"), messages, True)
        ids = encode(llama_like(**build), rendered, spec).ids
        assert (ids == IMAGE_ID).sum() == 3
    rendered = render(get_template("vicuna_v1"), [message("user", IMAGE, VIDEO, "Q")], True)
    if spec.video_token is None:
        with pytest.raises(RequestError, match="no token for a video"):
            encode(llama_like(), rendered, spec)
    else:
        # The tokenizer knows one of the markers only.
        ids = encode(llama_like(), rendered, spec).ids.tolist()
        assert ids.index(IMAGE_ID) < ids.index(VIDEO_ID)


def test_markers_that_contradict_the_configuration():
    rendered = render(get_template("vicuna_v1"), [message("user", IMAGE, "Q")], True)
    with pytest.raises(ConfigError, match="disagree about <image>"):
        encode(llama_like(image=801, pad=800), rendered, SPEC)


def test_a_marker_that_the_tokenizer_swallows():
    tokenizer = llama_like()
    twice = SimpleNamespace(image_token=tokenizer.convert_tokens_to_ids("▁"), video_token=None)
    rendered = render(get_template("vicuna_v1"), [message("user", IMAGE, "Q")], True)
    with pytest.raises(RequestError, match="did not keep every <image> as one token"):
        encode(llama_like(**UNKNOWN), rendered, twice)


@pytest.mark.parametrize(
    ("build", "source"),
    [
        (llama_like, tiny.VICUNA),
        (lambda: llama_like(legacy=True), tiny.VICUNA),
        (llama_like, tiny.INST),
        (llama3_like, tiny.HEADER),
        (qwen_like, tiny.CHATML),
    ],
    ids=["vicuna", "legacy vicuna", "mistral", "llama 3", "qwen"],
)
@given(answers=st.lists(words, min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_ids_and_labels_equal_transformers_own(build, source, answers):
    """transformers marks what a template puts into `{% generation %}`; we do not look at that."""
    tokenizer, source = build(), tiny.PARTS + source
    messages = [turn for answer in answers for turn in say("What?", answer)]
    messages[0]["content"].insert(0, IMAGE)
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template=source,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = encode(tokenizer, render(CheckpointTemplate(tokenizer, source), messages), SPEC)
    # They leave the BOS to the template.
    start = len(ours.ids) - len(theirs["input_ids"])
    assert ours.ids.tolist() == [tokenizer.bos_token_id] * start + theirs["input_ids"]
    assert ours.learnt.tolist() == [False] * start + [bool(m) for m in theirs["assistant_masks"]]


# --- BOS ----------------------------------------------------------------------------------------


def test_bos_is_never_doubled():
    llama3 = llama3_like()
    bos = llama3.bos_token_id
    for template in (get_template("llava_llama_3"), CheckpointTemplate(llama3, HEADERS)):
        ids = encode(llama3, render(template, say("Q"), True), SPEC).ids
        assert ids[0] == bos
        assert (ids == bos).sum() == 1
    # Without BOS in the template the tokenizer's own is kept, and there is none if it has none.
    assert encoded_prompt(llama3, "vicuna_v1", say("Q"), True).ids[0] == bos
    qwen = qwen_like()
    ids = encoded_prompt(qwen, "qwen_1_5", say("Q"), True).ids
    assert ids[0] == qwen.convert_tokens_to_ids("<|im_start|>")


def test_later_turns_of_llama_2_keep_their_bos():
    tokenizer = llama_like()
    ids = encoded_prompt(tokenizer, "llava_llama_2", say("Q", "A", "R"), True).ids.tolist()
    assert ids[0] == 1
    assert ids.count(1) == 2
    assert ids[ids.index(2) + 1] == 1


def test_a_tokenizer_that_ends_texts_does_not_end_prompts():
    from tokenizers import processors

    tokenizer = llama_like()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = encoded_prompt(tokenizer, "vicuna_v1", say("Q"), True).ids.tolist()
    assert ids[0] == 1
    assert 2 not in ids


# --- literals that spell control tokens ---------------------------------------------------------

FRAGMENTS = [
    "</s>", "<s>", "<", "/s>", "s>", "<unk>", "<image>", "<im", "age>", "<|im_end|>", "<|im_",
    "end|>", "<|eot_id|>", "<|begin_of_text|>", "A", " ", "가", "<pad>", "<video>",
]  # fmt: skip
BUILDERS = (llama_like, lambda: llama_like(**UNKNOWN, legacy=True), llama3_like, qwen_like)


@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6),
    build=st.sampled_from(BUILDERS),
)
@example(["</s>"], BUILDERS[0])
@example(["<", "</s>", "/s>"], BUILDERS[0])
@settings(max_examples=150, deadline=None)
def test_what_people_write_never_becomes_a_control_token(fragments, build):
    tokenizer = build()
    text = "".join(fragments)
    rendered = Rendered(text, spans=((0, len(text)),), literals=((0, len(text)),))
    encoded = encode(tokenizer, rendered, SPEC)
    bos = int(tokenizer.bos_token is not None)
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert not special & set(encoded.ids[bos:].tolist())
    assert encoded.learnt[bos:].all()
    spelt = tokenizer.decode(encoded.ids[bos:], skip_special_tokens=False)
    # The old tokenizers put a space after the cut.
    is_exact = tokenizer.backend_tokenizer.normalizer is None or build is qwen_like
    assert spelt.strip() == text.strip() if is_exact else _letters(spelt) == _letters(text)


def test_answers_that_spell_control_tokens_are_learnt_as_text(tokenizer):
    controls = ["</s>", "<|im_end|>", "<|eot_id|>", "<image>"]
    clean = encoded_prompt(tokenizer, "vicuna_no_system", say("Q", "A"))
    for control in controls:
        messages = say(f"What is {control}?", f"It is {control}.")
        encoded = encoded_prompt(tokenizer, "vicuna_no_system", messages)
        number = tokenizer.get_added_vocab().get(control)
        assert (encoded.ids == number).sum() == (clean.ids == number).sum()
        (learnt,) = _runs(encoded)
        assert _letters(tokenizer.decode(learnt)).startswith(_letters(f"It is {control}."))


def test_the_templates_own_control_tokens_stay():
    qwen = qwen_like()
    messages = say("Say <|im_end|>!", "<|im_end|>")
    ids = encoded_prompt(qwen, "qwen_1_5", messages).ids
    start, end = qwen.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ((ids == start).sum(), (ids == end).sum()) == (3, 3)


def test_a_control_token_that_swallows_its_surroundings_is_refused():
    from tokenizers import AddedToken

    tokenizer = llama_like()
    # After the cut the tokenizer would see "<" and "</s>" as this token.
    tokenizer.add_tokens([AddedToken("<</s>", special=True)], special_tokens=True)
    with pytest.raises(RequestError, match="cannot be kept from the tokenizer"):
        encoded_prompt(tokenizer, "vicuna_v1", say("</s>"), True)


# --- slow tokenizers ----------------------------------------------------------------------------


@given(texts=st.lists(st.text(), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_slow_tokenizers_are_aligned_exactly(slow, texts):
    rendered = render(get_template("vicuna_no_system"), say(*(f"x{text}y" for text in texts)))
    encoded = encode(slow, rendered, SPEC)
    is_plain = not any(control in "".join(texts) for control in ("<s>", "</s>", "<unk>"))
    if is_plain:
        assert encoded.ids.tolist() == slow(rendered.text).input_ids
    written = [rendered.text[start:end] for start, end in rendered.spans]
    spelt = [slow.decode(ids) for ids in _runs(encoded)]
    assert [_letters(text) for text in spelt] == [_letters(text) for text in written]


def test_slow_tokenizers_that_change_the_text_are_refused(slow):
    class Shouting(type(slow)):
        def _tokenize(self, text, **kwargs):
            return super()._tokenize(text.upper(), **kwargs)

    shouting = Shouting(vocab_file=slow.vocab_file, bos_token="<s>", eos_token="</s>")
    rendered = render(get_template("vicuna_v1"), say("Q", "an answer"))
    with pytest.raises(RequestError, match="fast tokenizer"):
        encode(shouting, rendered, SPEC)
    # With nothing to learn there is nothing to align.
    prompt = render(get_template("vicuna_v1"), say("Q"), True)
    assert encode(shouting, prompt, SPEC).ids[0] == 1
