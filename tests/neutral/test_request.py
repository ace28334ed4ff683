"""Requests as people write them: every accepted spelling, and every error names its place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unillava.data.conversation import get_template, render
from unillava.data.request import from_record, normalise, self_contained
from unillava.errors import RequestError

IMAGE = {"type": "image"}


def ask(*content, **lists):
    content = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
    return {"messages": [{"role": "user", "content": content}], **lists}


def text(value, inline=False):
    return {"type": "text", "text": value} | ({"inline": True} if inline else {})


def parts(request):
    messages, *_ = normalise(request)
    return messages[0]["content"]


def prompt(request):
    """The user's turn as a template without any system text writes it."""
    rendered = render(get_template("mistral_instruct"), normalise(request)[0], True).text
    return rendered.removeprefix("[INST] ").removesuffix(" [/INST]")


def test_text():
    assert normalise(ask("Hello")) == ([{"role": "user", "content": [text("Hello")]}], [], [])


def test_roles_and_history():
    request = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "input_text", "text": "Q"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
            {"role": "user", "content": "R"},
        ],
        "temperature": 0.2,
    }
    messages, images, videos = normalise(request)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in messages] == [[text(t)] for t in "SQAR"]
    assert images == videos == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "url": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "high"}},
        {"type": "image_url", "image_url": "a.jpg"},
        {"type": "input_image", "image_url": "a.jpg"},
    ],
)
def test_spellings_of_an_image(part):
    messages, images, videos = normalise(ask(part, text("Q")))
    assert messages[0]["content"] == [IMAGE, text("Q")]
    assert (images, videos) == (["a.jpg"], [])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4"},
        {"type": "video", "path": "a.mp4"},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "video_url", "video_url": "a.mp4"},
    ],
)
def test_spellings_of_a_video(part):
    messages, images, videos = normalise(ask(part, text("Q")))
    assert messages[0]["content"] == [{"type": "video"}, text("Q")]
    assert (images, videos) == ([], ["a.mp4"])


def test_sources_may_be_objects():
    picture = object()
    assert normalise(ask({"type": "image", "image": picture}))[1] == [picture]


@pytest.mark.parametrize("lists", [{"images": ["a"]}, {"image": "a"}, {"images": ("a",)}])
def test_markers_are_bound_to_the_requests_lists(lists):
    request = ask("What is <image> here?", **lists)
    assert parts(request) == [
        text("What is "),
        IMAGE | {"inline": True},
        text(" here?", inline=True),
    ]
    assert prompt(request) == "What is <image> here?"
    assert normalise(request)[1] == ["a"]


def test_a_marker_at_the_beginning_keeps_its_line_break():
    assert prompt(ask("<image>\nQ", images=["a"])) == "<image>\nQ"
    assert prompt(ask("<image>Q", images=["a"])) == "<image>Q"
    assert prompt(ask("Q\n<image>", images=["a"])) == "Q\n<image>"


def test_lists_without_markers_go_before_the_first_question():
    request = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "R"},
        ],
        "images": ["a", "b"],
        "video": "v",
    }
    messages, images, videos = normalise(request)
    assert messages[1]["content"] == [{"type": "video"}, IMAGE, IMAGE, text("Q")]
    assert messages[3]["content"] == [text("R")]
    assert (images, videos) == (["a", "b"], ["v"])


def test_parts_without_a_source_take_from_the_list():
    request = ask({"type": "image"}, {"type": "image", "image": "b"}, text("Q"), images=["a"])
    assert normalise(request)[1] == ["a", "b"]


def test_markers_say_where_the_parts_of_their_message_stand():
    request = ask(
        {"type": "image", "image": "a"}, {"type": "image", "image": "b"}, text("<image> or <image>")
    )
    assert prompt(request) == "<image> or <image>"
    assert normalise(request)[1] == ["a", "b"]


def test_images_come_in_the_order_of_their_markers():
    request = {
        "messages": [
            {"role": "user", "content": "<image> and <image>"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": [{"type": "image", "image": "c"}, text("R")]},
        ],
        "images": ["a", "b"],
    }
    assert normalise(request)[1] == ["a", "b", "c"]


def test_what_the_assistant_and_the_system_write_is_text():
    request = {
        "messages": [
            {"role": "system", "content": "Say <image>."},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "<image>"},
            {"role": "user", "content": "R"},
        ]
    }
    messages, images, _ = normalise(request)
    assert messages[0]["content"] == [text("Say <image>.")]
    assert messages[2]["content"] == [text("<image>")]
    assert images == []


def test_an_empty_answer_is_kept():
    request = {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "R"},
        ]
    }
    assert normalise(request)[0][1] == {"role": "assistant", "content": []}


def test_the_request_is_not_changed():
    content = [{"type": "image", "image": "a"}, text("<image> Q")]
    request = {"messages": [{"role": "user", "content": content}]}
    normalise(request)
    assert request == {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a"}, text("<image> Q")]}
        ]
    }


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({}, "a request has no messages"),
        ({"messages": []}, "a request has no messages"),
        ({"messages": "Hello"}, "a request has no messages"),
        ("Hello", "a request has no messages"),
        ({"conversations": []}, "from_record"),
        ({"messages": ["Hello"]}, r"messages\[0\] has no known role"),
        ({"messages": [{"content": "Q"}]}, r"messages\[0\] has no known role"),
        ({"messages": [{"role": "bot", "content": "Q"}]}, r"messages\[0\] has no known role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\] has no content"),
        (ask("A \ud83d"), r"messages\[0\] has half a character"),
        (ask(text("Q"), text("\udc00")), r"messages\[0\].content\[1\] has half a character"),
        (ask(""), r"messages\[0\] is empty"),
        ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\] is empty"),
        (ask("Q", "R"), r"messages\[0\].content\[0\] is of an unknown type"),
        (ask(text("Q"), {"type": "audio"}), r"messages\[0\].content\[1\] is of an unknown type"),
        (ask(text("Q"), {"text": "R"}), r"messages\[0\].content\[1\] is of an unknown type"),
        (ask({"type": ["text"]}), r"messages\[0\].content\[0\] is of an unknown type"),
        (ask({"type": "text"}), r"messages\[0\].content\[0\] has no text"),
        (ask({"type": "text", "text": 3}), r"messages\[0\].content\[0\] has no text"),
        (ask({"type": "image_url"}), r"messages\[0\].content\[0\] does not say which image"),
        (
            ask({"type": "image_url", "image_url": {"detail": "low"}}),
            r"messages\[0\].content\[0\] does not say which image",
        ),
        (ask("<image>\nQ"), "the number of images contradicts the markers"),
        (ask("<video>\nQ"), "the number of videos contradicts the markers"),
        (ask({"type": "image"}), "the number of images contradicts the markers"),
        (ask("<image>\nQ", images=["a", "b"]), "the number of images contradicts the markers"),
        (ask("<image><image>\nQ", image="a"), "the number of images contradicts the markers"),
        (
            ask({"type": "image", "image": "a"}, text("<image> or <image>")),
            r"messages\[0\]: the number of images contradicts the markers",
        ),
        (
            ask({"type": "image", "image": "a"}, text("Q"), images=["b"]),
            "the number of images contradicts the markers",
        ),
        (
            {"messages": [{"role": "assistant", "content": "A"}], "images": ["a"]},
            "the number of images contradicts the markers",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
            r"messages\[0\].content\[0\]: only the user can show something",
        ),
        (
            {"messages": [ask("Q")["messages"][0], {"role": "system", "content": "S"}]},
            r"messages\[1\]: the system message comes first",
        ),
    ],
)
def test_errors_name_the_place(request_, problem):
    with pytest.raises(RequestError, match=problem):
        normalise(request_)


def test_long_input_is_shortened_in_errors():
    with pytest.raises(RequestError) as caught:
        normalise({"messages": [{"role": "x" * 10_000, "content": "Q"}]})
    assert len(str(caught.value)) < 400


# --- training records ---------------------------------------------------------------------------


def record(*values, **extra):
    names = ("human", "gpt") * len(values)
    return {
        "id": "1",
        "conversations": [{"from": n, "value": v} for n, v in zip(names, values, strict=False)],
        **extra,
    }


def test_a_record_becomes_a_request():
    request = from_record(record("<image>\nQ", "A", "R", "B", image="coco/1.jpg"))
    messages, images, videos = normalise(request)
    assert (images, videos) == (["coco/1.jpg"], [])
    text_ = render(get_template("vicuna_no_system"), messages).text
    assert text_ == "USER: <image>\nQ ASSISTANT: A</s>USER: R ASSISTANT: B</s>"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Q\n<image>", "<image>\nQ"),
        ("<image>\nQ", "<image>\nQ"),
        ("<image>Q", "<image>\nQ"),
        ("What is <image> this?", "<image>\nWhat is  this?"),
        ("<image>", "<image>"),
    ],
)
def test_the_only_marker_of_a_record_goes_first(value, expected):
    assert prompt(from_record(record(value, image="a"))) == expected


def test_records_with_several_images_a_video_or_text_alone():
    request = from_record(record("<image> or <image>?", image=["a", "b"]))
    assert prompt(request) == "<image> or <image>?"
    assert normalise(from_record(record("<video>\nQ", "A", video="v")))[2] == ["v"]
    assert normalise(from_record(record("Q", "A")))[1:] == ([], [])
    # The key says that there is an image; the original would have lost it without a marker.
    assert prompt(from_record(record("Q", image="a"))) == "<image>\nQ"


def test_a_first_turn_that_is_not_the_humans_is_dropped():
    turns = [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]
    system = {"from": "system", "value": "S"}
    assert from_record({"conversations": turns})["messages"] == [{"role": "user", "content": "Q"}]
    messages = from_record({"conversations": [system, *turns]})["messages"]
    assert [m["role"] for m in messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("given_record", "problem"),
    [
        ({"id": 1}, "has no conversation"),
        ({"conversations": []}, "has no conversation"),
        ({"conversations": ["Q"]}, r"conversations\[0\] cannot be understood"),
        ({"conversations": [{"from": "bot", "value": "Q"}]}, r"conversations\[0\]"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\]"),
    ],
)
def test_records_that_cannot_be_understood(given_record, problem):
    with pytest.raises(RequestError, match=problem):
        from_record(given_record)


@given(
    st.lists(
        st.sampled_from(["<image>", "<video>", "<im", "age>", "Q", " ", "\n"]), min_size=1
    ).filter(lambda fragments: "".join(fragments))
)
@settings(deadline=None)
def test_text_with_markers_is_rendered_as_it_was_written(fragments):
    written = "".join(fragments)
    images, videos = written.count("<image>"), written.count("<video>")
    request = ask(written, images=["a"] * images, videos=["v"] * videos)
    messages, bound_images, bound_videos = normalise(request)
    assert (len(bound_images), len(bound_videos)) == (images, videos)
    rendered = render(get_template("mistral_instruct"), messages, True).text
    assert rendered == f"[INST] {written} [/INST]"


@pytest.mark.parametrize(
    "request_dict",
    [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a"},
                        {"type": "text", "text": "see <image> here"},
                    ],
                }
            ]
        },
        {"messages": [{"role": "user", "content": "<image>\nsee <image> here"}], "images": "ab"},
        {
            "messages": [
                {"role": "system", "content": "Be brief: <image> is a marker."},
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "An <image>."},
                {"role": "user", "content": "Why?"},
            ],
            "images": ["a", "b"],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "one"},
                        {"type": "image"},
                        {"type": "text", "text": "two"},
                        {"type": "video", "video": "v"},
                    ],
                }
            ],
            "image": "a",
        },
    ],
)
def test_self_contained_messages_mean_the_same(request_dict):
    if isinstance(request_dict.get("images"), str):
        request_dict = {**request_dict, "images": list(request_dict["images"])}
    messages = self_contained(request_dict)
    assert normalise({"messages": messages}) == normalise(request_dict)
    assert self_contained({"messages": messages}) == messages
