"""Templates against golden renderings and an independent rendering by separator style."""

import hashlib
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conversations import (
    CHATML,
    FORGETFUL,
    HEADERS,
    IMAGE,
    NO_END,
    VIDEO,
    message,
    say,
)
from tests.tokenizers_tiny import llama3_like, llama_like, qwen_like
from unillava.data.conversation import (
    CheckpointTemplate,
    choose_template,
    get_template,
    render,
    template_names,
)
from unillava.data.messages import MARKERS
from unillava.errors import RequestError

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
KOREAN = (
    "당신은 유용한 언어 및 시각 도우미입니다. 사용자가 제공하는 시각적 콘텐츠를 이해할 수 "
    "있으며, 자연어를 사용하여 사용자에게 다양한 작업을 지원합니다."
)

# reference/llava_pytorch.md section 2.4: user Q, assistant A, user R, the assistant is to speak.
GOLDEN = {
    "vicuna_v1": f"{USER} USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "vicuna_no_system": "USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "llava_v0": f"{HUMAN}###Human: Q###Assistant: A###Human: R###Assistant:",
    "v0_training": f"{HUMAN}\n\n### Human: Q\n### Assistant: A\n### Human: R\n### Assistant:",
    "llava_llama_2": f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]",
    "mistral_instruct": "[INST] Q [/INST] A </s>[INST] R [/INST]",
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nQ<|im_end|>"
        "<|im_start|>assistant\nA<|im_end|><|im_start|>user\nR<|im_end|><|im_start|>assistant\n"
    ),
    "qwen_1_5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llava_llama_3": (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{VISION}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "kollava_mistral": (
        f"{KOREAN} <|im_start|>user\n: Q <|im_start|>assistant\n: A<|im_end|>"
        "<|im_start|>user\n: R <|im_start|>assistant\n:"
    ),
    "kollava_mistral_training": (
        f"{KOREAN}\n\n### <|im_start|>user\n: Q\n### <|im_start|>assistant\n: A\n"
        "### <|im_start|>user\n: R\n### <|im_start|>assistant\n:"
    ),
    "gemma_instruct": (
        "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n"
    ),
    "mistral_zephyr": (
        "<|system|>\nYou are a helpful AI assistant.</s><|user|>\nQ</s><|assistant|>\nA</s>"
        "<|user|>\nR</s><|assistant|>\n"
    ),
    "bair_v1": "BEGINNING OF CONVERSATION: USER: Q GPT: A</s>USER: R GPT:",
    "simple": (
        f"{HUMAN}###Human: Hi!###Assistant: Hi there! How can I help you today?"
        "###Human: Q###Assistant: A###Human: R###Assistant:"
    ),
    "moss2": (
        "<|im_start|>system\nYou are an AI assistant whose name is MOSS.<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    ),
}

# First 16 hexadecimal digits of the SHA-256 of each system text, from the reference's section 2.2.
SYSTEM_DIGESTS = {
    "bair_v1": "4b37861d7d2fb932",
    "chatml_direct": "b68d197976b909eb",
    "kollava_mistral": "54138b7ec2b5ba6b",
    "kollava_mistral_training": "54138b7ec2b5ba6b",
    "legacy_llava_v1": "845e5d64fced4486",
    "legacy_mpt": "f338017fa4a88c25",
    "llama_2": "d52c188a3c969c4e",
    "llava_llama_2": "790f4cfc05523b0e",
    "llava_llama_2_mmtag": "9baf4c763677cc43",
    "llava_llama_2_simple": "154023ccd935f3c0",
    "llava_llama_3": "790f4cfc05523b0e",
    "llava_v0": "ace78a978005f68a",
    "llava_v1": "ace78a978005f68a",
    "mistral_orca": "e6ac13374d587064",
    "mistral_zephyr": "c8472cd9daed5e7c",
    "moss2": "0c9d231affaa90f1",
    "mpt": "2bc9733b97827672",
    "mpt_multimodal": "78fee3bb377b9c1f",
    "mpt_text": "cbf9b32d0e1994fe",
    "multimodal": "845e5d64fced4486",
    "qwen_1_5": "75357d685f238b6a",
    "qwen_2_5": "66b9ea09bd5b7099",
    "simple": "ace78a978005f68a",
    "simple_legacy": "e7a77e57c886893a",
    "v0": "ace78a978005f68a",
    "v0_mmtag": "563c2a621b1102ed",
    "v0_training": "ace78a978005f68a",
    "v1_mmtag": "563c2a621b1102ed",
    "vicuna_v1": "1fa69e2371b762d1",
}

IM = ("<|im_start|>user\n", "<|im_start|>assistant\n")
# name -> (style, roles, sep, sep2, head), as section 2.3 lists them; head: what the original's
# system text begins with.
STYLES = {
    "vicuna_v1": ("TWO", ("USER", "ASSISTANT"), " ", "</s>", ""),
    "llava_v1": ("TWO", ("USER", "ASSISTANT"), " ", "</s>", ""),
    "v1_mmtag": ("TWO", ("USER", "ASSISTANT"), " ", "</s>", ""),
    "legacy_llava_v1": ("TWO", ("USER", "ASSISTANT"), " ", "</s>", ""),
    "bair_v1": ("TWO", ("USER", "GPT"), " ", "</s>", ""),
    "kollava_mistral": ("TWO", IM, " ", "<|im_end|>", ""),
    "llava_v0": ("SINGLE", ("Human", "Assistant"), "###", None, ""),
    "v0": ("SINGLE", ("Human", "Assistant"), "###", None, ""),
    "v0_mmtag": ("SINGLE", ("Human", "Assistant"), "###", None, ""),
    "multimodal": ("SINGLE", ("Human", "Assistant"), "###", None, ""),
    "simple": ("SINGLE", ("Human", "Assistant"), "###", None, ""),
    "simple_legacy": ("SINGLE", ("Human", "Assistant"), "###", None, ""),
    "llama_2": ("LLAMA_2", None, "<s>", "</s>", ""),
    "llava_llama_2": ("LLAMA_2", None, "<s>", "</s>", ""),
    "llava_llama_2_simple": ("LLAMA_2", None, "<s>", "</s>", ""),
    "llava_llama_2_mmtag": ("LLAMA_2", None, "<s>", "</s>", ""),
    "mistral_instruct": ("LLAMA_2", None, "", "</s>", ""),
    "mpt": ("MPT", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "chatml_direct": ("MPT", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "mistral_orca": ("MPT", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "legacy_mpt": ("MPT", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "mpt_multimodal": ("MPT", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "mpt_text": ("MPT", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "mistral_zephyr": ("MPT", ("<|user|>\n", "<|assistant|>\n"), "</s>", None, "<|system|>\n"),
    "llava_llama_3": (
        "MPT",
        tuple(f"<|start_header_id|>{who}<|end_header_id|>\n\n" for who in ("user", "assistant")),
        "<|eot_id|>",
        None,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
    ),
    "qwen_1_5": ("CHATML", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "qwen_2_5": ("CHATML", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "moss2": ("CHATML", IM, "<|im_end|>", None, "<|im_start|>system\n"),
    "gemma_instruct": (
        "GEMMA",
        ("<start_of_turn>user\n", "<start_of_turn>model\n"),
        "<end_of_turn>\n",
        None,
        "",
    ),
}
# Not of a separator style of LLaVA's conversation module.
OTHERS = {"plain", "vicuna_no_system", "v0_training", "kollava_mistral_training"}


def by_style(name, system, texts):
    """The original's rendering rule for each separator style (section 2.1), as a table of cases.

    An empty text is a turn to be generated.
    """
    style, roles, sep, sep2, head = STYLES[name]
    after_head = {"CHATML": sep + "\n", "LLAMA_2": "", "GEMMA": ""}.get(style, sep)
    out = "" if style == "LLAMA_2" else head + system + after_head
    for n, text in enumerate(texts):
        is_user = n % 2 == 0
        if style == "LLAMA_2":
            if not text:
                continue
            if is_user:
                block = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if n == 0 and system else ""
                out += f"{sep}[INST] {block}{text} [/INST]"
            else:
                out += f" {text} {sep2}"
            continue
        role = roles[not is_user]
        colon = ":" if style in ("SINGLE", "TWO") else ""
        if not text:
            out += role + colon
            continue
        end = sep2 if style == "TWO" and not is_user else sep
        out += f"{role}{colon}{' ' if colon else ''}{text}{end}"
        out += "\n" if style == "CHATML" else ""
    return out.lstrip("<s>") if style == "LLAMA_2" else out


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_renderings(name):
    assert render(get_template(name), say("Q", "A", "R"), True).text == GOLDEN[name]


def test_every_template_is_held_by_a_golden_text_or_a_style():
    assert set(template_names()) == STYLES.keys() | OTHERS
    assert OTHERS - GOLDEN.keys() == {"plain"}


def test_system_texts_are_exact():
    given = {name: get_template(name).system for name in template_names()}
    digests = {
        name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in given.items() if text
    }
    assert digests == SYSTEM_DIGESTS


words = st.text(st.sampled_from("AQR ab,.\n가你😀"), min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", STYLES)
@given(texts=st.lists(words, min_size=1, max_size=6), system=st.none() | words)
@settings(max_examples=25, deadline=None)
def test_renders_as_the_original_styles_do(name, texts, system):
    template = get_template(name)
    generate = len(texts) % 2 == 1
    own = template.system if system is None else system
    examples = [text for pair in template.examples for text in pair]
    expected = by_style(name, own, [*examples, *texts, *([""] if generate else [])])
    assert render(template, say(*texts, system=system), generate).text == expected


@pytest.mark.parametrize("name", [n for n in template_names() if n != "plain"])
@given(texts=st.lists(words, min_size=2, max_size=6), system=st.none() | st.just("") | words)
@settings(max_examples=20, deadline=None)
def test_spans_are_what_follows_the_generation_prompt(name, texts, system):
    template = get_template(name)
    messages = say(*texts, system=system)
    rendered = render(template, messages)
    first = 0 if system is None else 1
    learnt = []
    for n in range(first + 1, len(messages), 2):
        prompt = render(template, messages[:n], True)
        assert prompt.spans == ()
        assert rendered.text.startswith(prompt.text)
        turn = template.assistant
        answer = turn.before + texts[n - first] + turn.after
        assert rendered.text[len(prompt.text) :].startswith(answer)
        learnt.append((len(prompt.text), len(prompt.text) + len(answer)))
    assert list(rendered.spans) == learnt
    for stop in template.stop:
        assert all(stop in rendered.text[start:end] for start, end in rendered.spans)


@given(texts=st.lists(words, min_size=1, max_size=5), system=st.none() | words)
@settings(max_examples=50, deadline=None)
def test_literals_are_exactly_what_people_wrote(texts, system):
    rendered = render(get_template("vicuna_v1"), say(*texts, system=system))
    written = [*([] if system is None else [system]), *texts]
    assert [rendered.text[start:end] for start, end in rendered.literals] == written


def test_an_empty_turn_is_its_header_alone():
    text = render(get_template("vicuna_v1"), say("Q", "", "R"), True).text
    assert text == f"{USER} USER: Q ASSISTANT:USER: R ASSISTANT:"
    rendered = render(get_template("llava_llama_2"), say("Q", ""))
    assert rendered.text.endswith("Q [/INST]")
    assert rendered.spans == ()


def test_an_empty_system_message_removes_the_systems_block():
    messages = say("Q", system="")
    assert render(get_template("vicuna_v1"), messages, True).text == "USER: Q ASSISTANT:"
    assert render(get_template("llava_llama_2"), messages, True).text == "[INST] Q [/INST]"
    qwen = render(get_template("qwen_2"), messages, True).text
    assert qwen == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_plain_keeps_the_image_and_the_caption_only():
    template = get_template("plain")
    messages = [message("user", "Describe this.", IMAGE), message("assistant", "A cat.")]
    rendered = render(template, messages)
    assert rendered.text == "<image>A cat.\n"
    assert rendered.spans == ((7, 14),)
    assert render(template, messages[:1], True).text == "<image>"


@pytest.mark.parametrize(
    "messages",
    [
        say("no image", "A"),
        [message("user", IMAGE), *say("Q", "A", "R")[1:]],
    ],
)
def test_plain_refuses_conversations(messages):
    with pytest.raises(RequestError, match="caption template"):
        render(get_template("plain"), messages)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([IMAGE, "Q"], "<image>\nQ"),
        (["Q", IMAGE], "<image>\nQ"),
        (["Q", IMAGE, IMAGE], "<image>\n<image>\nQ"),
        ([IMAGE, IMAGE, "Q"], "<image>\n<image>\nQ"),
        ([IMAGE], "<image>"),
        ([IMAGE, VIDEO], "<image>\n<video>"),
        ([VIDEO, "Q"], "<video>\nQ"),
        (["first", IMAGE, "second", IMAGE], "first\n<image>\nsecond\n<image>"),
        (["Q", "R"], "Q\nR"),
        (["", IMAGE, ""], "<image>"),
        (
            ["What is ", IMAGE | {"inline": True}, {"type": "text", "text": "?", "inline": True}],
            "What is <image>?",
        ),
        (["A", IMAGE, {"type": "text", "text": "\nB", "inline": True}], "A\n<image>\nB"),
    ],
)
def test_where_media_stand(content, expected):
    text = render(get_template("mistral_instruct"), [message("user", *content)], True).text
    assert text == f"[INST] {expected} [/INST]"


def test_tagged_images():
    text = render(get_template("v1_mmtag"), [message("user", IMAGE, "Q")], True).text
    assert text.endswith("USER: <Image><image></Image>\nQ ASSISTANT:")


def test_aliases_and_clashing_names():
    assert get_template("v1") is get_template("vicuna_v1")
    assert get_template("mistral") is get_template("kollava_mistral")
    assert get_template("qwen_2").name == "qwen_1_5"
    assert get_template("llava_v1").system != get_template("legacy_llava_v1").system
    assert get_template("mpt").system != get_template("legacy_mpt").system


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(RequestError) as caught:
        get_template("vicuna_v2")
    assert "did you mean vicuna_v1" in str(caught.value)
    assert "chatml_direct" in str(caught.value)
    with pytest.raises(RequestError, match="choose one of these names"):
        get_template("§§§§")


@pytest.mark.parametrize(
    ("messages", "generate", "problem"),
    [
        (say("Q", "A"), True, "no question to answer"),
        ([], True, "no question to answer"),
        ([message("user", "Q"), message("user", "R")], True, r"messages\[1\] comes out of turn"),
        ([message("assistant", "A")], False, r"messages\[0\] comes out of turn"),
        (
            [message("system", "S"), message("user", "Q"), message("user", "R")],
            False,
            r"messages\[2\] comes out of turn",
        ),
    ],
)
def test_speakers_out_of_turn(messages, generate, problem):
    with pytest.raises(RequestError, match=problem):
        render(get_template("vicuna_v1"), messages, generate)


# --- the checkpoint's own chat template ---------------------------------------------------------


def own(source, tokenizer):
    return CheckpointTemplate(tokenizer, source)


def learnt(rendered):
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_own_template_with_parts():
    template = own(HEADERS, llama3_like())
    messages = [message("user", "Q", IMAGE), *say("", "A", "R")[1:]]
    rendered = render(template, messages, True)
    expected = GOLDEN["llava_llama_3"].replace("\n\nQ", "\n\n<image>\nQ")
    start = expected.index("<|start_header_id|>user")
    assert rendered.text == "<|begin_of_text|>" + expected[start:]
    assert rendered.spans == ()
    assert learnt(render(template, [*messages, message("assistant", "B")])) == [
        "A<|eot_id|>",
        "B<|eot_id|>",
    ]
    assert template.stop == ("<|eot_id|>",)


def test_own_template_with_strings():
    template = own(CHATML, qwen_like())
    rendered = render(template, [message("user", IMAGE, "Q"), message("assistant", " A \n")])
    assert rendered.text == (
        "<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert learnt(rendered) == ["A<|im_end|>"]
    assert template.stop == ("<|im_end|>",)


def test_own_template_without_end_mark():
    template = own(NO_END, llama_like())
    rendered = render(template, [message("user", IMAGE, "Q"), *say("", "A", "R", "B")[1:]])
    assert rendered.text == "USER: <image>\nQ ASSISTANT: A USER: R ASSISTANT: B "
    assert learnt(rendered) == [" A", " B"]
    assert template.stop == ()


def test_own_template_keeps_images_inside_the_text():
    inline = [IMAGE | {"inline": True}, {"type": "text", "text": "?", "inline": True}]
    messages = [message("user", "What is ", *inline)]
    rendered = render(own(HEADERS, llama3_like()), messages, True)
    assert "\n\nWhat is <image>?<|eot_id|>" in rendered.text


@given(texts=st.lists(words, min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_own_template_equals_ours_if_it_says_the_same(texts):
    tokenizer = llama3_like()
    template = get_template("llava_llama_3")
    messages = say(*texts, system=template.system)
    theirs, ours = render(own(HEADERS, tokenizer), messages), render(template, messages)
    assert theirs.text == ours.text
    assert theirs.spans == ours.spans


@given(st.lists(st.sampled_from(["</s>", "<s>", "<image>", "<", "s>", "A", " "]), min_size=1))
@settings(max_examples=60, deadline=None)
def test_own_template_marks_spelt_control_tokens_as_literals(fragments):
    text = "x" + "".join(fragments) + "y"
    rendered = render(own(NO_END, llama_like()), [*say("Q"), message("assistant", text)])
    assert rendered.text == f"USER: Q ASSISTANT: {text} "
    literal = {n for start, end in rendered.literals for n in range(start, end)}
    for control in ("</s>", "<s>", "<image>"):
        place = rendered.text.find(control)
        while place >= 0:
            assert set(range(place, place + len(control))) <= literal
            place = rendered.text.find(control, place + 1)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('only one question, please') }}", "only one question, please"),
        ("{% for m in messages %}", "cannot render"),
        ("{{ messages[0].content.pop() }}", "cannot render"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "cannot render"),
        ("no pictures", "does not write every image once"),
        ("<image><image>", "does not write every image once"),
    ],
)
def test_own_template_that_fails(source, problem):
    with pytest.raises(RequestError, match=problem):
        render(own(source, llama_like()), [message("user", IMAGE, "Q")], True)


def test_own_template_that_rewrites_the_past_can_answer_but_not_train():
    template = own(FORGETFUL, llama_like())
    messages = say("Q", "A", "R")
    assert render(template, messages, True).text == "Q: Q\nQ: R\nA:"
    with pytest.raises(RequestError, match=r"cannot tell which characters of messages\[1\]"):
        render(template, [*messages, message("assistant", "B")])
    with pytest.raises(RequestError, match="no question to answer"):
        render(template, messages[:2], True)


# --- which template -----------------------------------------------------------------------------


def model(kind="llama", template=None):
    return SimpleNamespace(text=SimpleNamespace(kind=kind), template=template)


@pytest.mark.parametrize(
    ("tokenizer", "kind", "expected"),
    [
        (llama_like, "llama", "vicuna_v1"),
        (llama_like, "mistral", "mistral_instruct"),
        (llama3_like, "llama", "llava_llama_3"),
        (qwen_like, "qwen2", "qwen_1_5"),
        (qwen_like, "llama", "chatml_direct"),
        (qwen_like, "mistral", "chatml_direct"),
    ],
)
def test_chosen_by_content(tokenizer, kind, expected):
    assert choose_template(model(kind), tokenizer(), None).name == expected


def test_order_of_choice():
    tokenizer = llama_like()
    named = model(template="llava_v0")
    assert choose_template(named, tokenizer, NO_END, "mpt").name == "mpt"
    assert choose_template(named, tokenizer, NO_END).name == "llava_v0"
    assert choose_template(model(), tokenizer, NO_END).name == "checkpoint"
    assert choose_template(named, tokenizer, NO_END, "checkpoint").name == "checkpoint"
    with pytest.raises(RequestError, match="brings no chat template"):
        choose_template(model(), tokenizer, None, "checkpoint")
    with pytest.raises(RequestError, match="no conversation template 'vicuna'"):
        choose_template(model(), tokenizer, NO_END, "vicuna")


def test_markers_are_what_templates_write():
    assert MARKERS == {"image": "<image>", "video": "<video>"}
