"""From messages and a picture file to the reply, against transformers' processor and generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import unillava
from unillava.inference.model import user_message

CASES = [
    ("llava", "llama", "clip"),
    ("llava", "qwen2", "siglip"),
    ("llava_next", "llama", "clip"),
    ("llava_next", "llama3", "clip"),
    ("llava_next", "mistral", "siglip"),
    ("llava_next_video", "llama", "clip"),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def both(request, tiny):
    directory = tiny(*request.param)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    # AutoProcessor of a video model asks for torchvision; its picture half is LLaVA-NeXT's.
    kind = "LlavaNextProcessor" if request.param[0] == "llava_next_video" else "AutoProcessor"
    processor = getattr(transformers, kind).from_pretrained(directory)
    return unillava.load(directory, backend="torch", device="cpu"), reference, processor


def reference_tokens(reference, processor, messages, pictures) -> list[int]:
    shown = [
        {**m, "content": [{"type": p["type"], **({"text": p["text"]} if "text" in p else {})}
                          for p in as_parts(m["content"])]}
        for m in messages
    ]  # fmt: skip
    prompt = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    # Tokenizers of the LLaMA kind add BOS; a template that writes it must not get a second one.
    bos = processor.tokenizer.bos_token or ""
    if bos and prompt.startswith(bos) and processor.tokenizer("").input_ids:
        prompt = prompt[len(bos) :]
    inputs = processor(text=prompt, images=pictures or None, return_tensors="pt")
    with torch.no_grad():
        out = reference.generate(**inputs, max_new_tokens=12, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def as_parts(content) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def test_replies_are_transformers_replies(both, photo, tmp_path):
    model, reference, processor = both
    wide = tmp_path / "wide.png"
    Image.open(photo).resize((300, 71)).save(wide)
    conversations = [
        [user_message("What is shown here?", str(photo))],
        [user_message("Compare the two.", [str(photo), str(wide)])],
        [user_message("안녕하세요, 누구세요?")],
        [
            user_message("What is this?", str(wide)),
            {"role": "assistant", "content": "A harbour at noon."},
            user_message("And in Chinese? 中文"),
        ],
    ]
    replies = model.generate([{"messages": m} for m in conversations], max_new_tokens=12)
    for messages, reply in zip(conversations, replies, strict=True):
        pictures = [
            Image.open(part["image"])
            for m in messages
            for part in as_parts(m["content"])
            if part["type"] == "image"
        ]
        expected = reference_tokens(reference, processor, messages, pictures)
        assert reply.tokens == expected
        assert reply.text == processor.decode(expected, skip_special_tokens=True).strip()


def test_video_reply(tiny, photo, tmp_path):
    """A folder of frames through both: pixels are compared too, then tokens."""
    directory = tiny("llava_next_video")
    frames = tmp_path / "frames"
    frames.mkdir()
    picture = Image.open(photo)
    for n in range(4):
        picture.rotate(20 * n).save(frames / f"{n}.png")
    model = unillava.load(directory, backend="torch", device="cpu", num_frames=4)
    request = {"messages": [user_message("What happens?", video=str(frames))]}
    sample = model.pipeline.prepare(request)
    reply = model.generate([request], max_new_tokens=12)[0]
    reference = transformers.LlavaNextVideoForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    ids = np.where(sample.kind_S == 0, sample.ids_S, model.spec.video_token)
    inputs = {
        "input_ids": torch.from_numpy(ids)[None],
        "pixel_values_videos": torch.from_numpy(sample.frames_F3HW)[None],
    }
    with torch.no_grad():
        out = reference.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert reply.tokens == out[0, len(ids) :].tolist()


def test_the_reply_does_not_depend_on_batch_or_route(both, photo):
    """Alone, in a batch of unequal rows, streamed, sampled with a seed: the same reply."""
    model, _, _ = both
    requests = [
        {"messages": [user_message("A?")]},
        {"messages": [user_message("What is shown here, in many words?", str(photo))]},
        {"messages": [user_message("And these?", [str(photo), str(photo)])]},
    ]
    for options in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1}):
        together = model.generate(requests, max_new_tokens=10, **options)
        for request, reply in zip(requests, together, strict=True):
            alone = model.generate([request], max_new_tokens=10, **options)[0]
            assert alone == reply
            streamed = "".join(model.stream(request, max_new_tokens=10, **options))
            assert streamed == reply.text
        pairs = model.generate(requests, max_new_tokens=10, batch_size=2, **options)
        assert pairs == together
