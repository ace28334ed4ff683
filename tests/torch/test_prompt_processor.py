"""Prompts and ids against transformers' own processors: the same chat template and tokenizer."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaNextProcessor, LlavaProcessor
from transformers.models.clip import CLIPImageProcessor
from transformers.models.llava_next import LlavaNextImageProcessor

from tests.conversations import HEADERS, NO_END, message
from tests.tokenizers_tiny import llama3_like, llama_like, qwen_like
from unillava.data.conversation import CheckpointTemplate, render
from unillava.data.request import normalise
from unillava.data.tokens import encode

IMAGE_ID = 800
SPEC = SimpleNamespace(image_token=IMAGE_ID, video_token=None, family="llava")
PICTURE = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))

CHATML = """
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\n' -}}
{%- for p in m['content'] -%}
{{- '<image>\n' if p['type'] == 'image' else p['text'] -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""With parts, in the order in which they are given."""


WORDS = "What is in this picture? 사진에 무엇이 있나요? 图片 😀"
SHOWN = {"type": "image", "image": PICTURE}
CONVERSATIONS = {
    "text": [message("user", WORDS)],
    "image": [message("user", SHOWN, WORDS)],
    "image last": [message("user", WORDS, SHOWN)],
    "two images": [message("user", SHOWN, SHOWN, WORDS)],
    "several turns": [
        message("system", "You are helpful."),
        message("user", SHOWN, WORDS),
        message("assistant", "A cat, 고양이."),
        message("user", WORDS, SHOWN),
    ],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    ("build", "source"),
    [
        (llama_like, NO_END),
        (lambda: llama_like(legacy=True), NO_END),
        (llama3_like, HEADERS),
        (qwen_like, CHATML),
    ],
    ids=["llama", "legacy llama", "llama 3", "qwen"],
)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_ids_equal_the_processors(family, build, source, messages):
    tokenizer = build()
    processor = _processor(family, tokenizer, source)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pictures = [PICTURE] * prompt.count("<image>")
    # The template writes LLaMA 3's BOS itself; the processor is told so, we find out.
    batch = processor(
        text=[prompt],
        images=pictures or None,
        return_tensors="np",
        add_special_tokens=not prompt.startswith("<|begin_of_text|>"),
    )
    theirs = batch["input_ids"][0]

    normal, images, _ = normalise({"messages": messages})
    rendered = render(CheckpointTemplate(tokenizer, source), normal, True)
    ours = encode(tokenizer, rendered, SPEC).ids

    assert rendered.text == prompt
    assert len(images) == len(pictures)
    # The processor repeats the marker for every row of the image; here it is still one.
    repeated = (theirs == IMAGE_ID) & (np.roll(theirs, 1) == IMAGE_ID)
    assert ours.tolist() == theirs[~repeated].tolist()


def _processor(family, tokenizer, source):
    size = {"height": 28, "width": 28}
    settings = {
        "tokenizer": tokenizer,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": source,
    }
    if family == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
        return LlavaProcessor(images, **settings)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=[[28, 56], [56, 28]]
    )
    return LlavaNextProcessor(images, **settings)
