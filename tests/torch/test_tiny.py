"""Tiny checkpoints are what transformers takes for real ones."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaNextForConditionalGeneration,
)

from unillava.config import read_spec
from unillava.errors import ConfigError
from unillava.spec import parameter_table
from unillava.tiny import ARCHITECTURES, TEXTS, build_tiny

QUESTION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
]


def load(directory, **options):
    """The model and what transformers says about its keys."""
    return AutoModelForImageTextToText.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, **options
    )


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("text", list(TEXTS))
@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_every_key_is_known_to_transformers(tiny, family, text, vision, caplog):
    caplog.set_level(logging.WARNING)
    model, info = load(tiny(family, text, vision))
    assert not any(info.values()), info
    assert type(model).__name__ == ARCHITECTURES[family]
    assert not [record for record in caplog.records if "weights" in record.getMessage()]


def test_explicit_class_loads(tiny):
    model = LlavaNextForConditionalGeneration.from_pretrained(tiny())
    assert model.config.image_grid_pinpoints == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


@pytest.mark.parametrize("text", list(TEXTS))
def test_weights_arrive_as_written(tiny, text):
    """Count and bytes: nothing is initialised anew, nothing left out."""
    directory = tiny("llava_next", text)
    model, _ = load(directory)
    spec = read_spec(json.loads((directory / "config.json").read_text()))
    assert sum(p.numel() for p in model.parameters()) == sum(
        int(np.prod(shape)) for shape in parameter_table(spec).values()
    )


@pytest.mark.parametrize("text", list(TEXTS))
@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_tokenizer_files_agree(tiny, family, text):
    directory = tiny(family, text)
    config = json.loads((directory / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    sentence = "USER: <image>\nWhat is it? 안녕하세요 图片里 ☃ 🙂 ASSISTANT: x</s>"
    ids = tokenizer(sentence).input_ids
    assert ids == raw.encode(sentence).ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip().startswith("USER:")
    assert "안녕하세요 图片里 ☃ 🙂" in tokenizer.decode(ids)
    assert tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"]
    assert tokenizer.image_token_id == config["image_token_index"]
    assert tokenizer.pad_token_id == config["pad_token_id"]
    assert tokenizer.eos_token_id == config["text_config"]["eos_token_id"]
    assert len(tokenizer) <= config["text_config"]["vocab_size"]
    if family == "llava_next_video":
        assert tokenizer.convert_tokens_to_ids("<video>") == config["video_token_index"]


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("text", list(TEXTS))
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_greedy_reply_wanders_and_depends_on_the_picture(tiny, photo, family, text, vision):
    directory = tiny(family, text, vision)
    model, _ = load(directory)
    processor = AutoProcessor.from_pretrained(directory)
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    replies = []
    for image in (Image.open(photo), Image.new("RGB", (512, 600), (200, 30, 30))):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=16,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits_SV = torch.stack(out.logits)[:, 0]
        best_S2 = logits_SV.topk(2).values
        lead = (best_S2[:, 0] - best_S2[:, 1]).min() / logits_SV.abs().max()
        replies.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        # Backends may differ by 1e-5 of the largest logit, in either of the two best.
        assert lead > 2e-5, float(lead)
        assert len(replies[-1]) == 16
    assert len(set(replies[0])) >= 8
    assert replies[0] != replies[1]


def test_video_family_processes_images(tiny, photo):
    """Its whole processor needs torchvision; the image part does not."""
    processor = AutoImageProcessor.from_pretrained(tiny("llava_next_video"), backend="pil")
    pixels = processor(Image.open(photo), return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 5, 3, 28, 28)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_the_rounded_float32(tiny, dtype):
    full, _ = load(tiny())
    half = AutoModelForImageTextToText.from_pretrained(tiny(dtype=dtype), dtype="auto")
    assert half.dtype == getattr(torch, dtype)
    wanted = dict(full.named_parameters())
    for name, parameter in half.named_parameters():
        torch.testing.assert_close(parameter, wanted[name].to(half.dtype), rtol=0, atol=0)


def test_overrides_reach_the_files(tiny):
    directory = tiny(
        text="mistral",
        config={"text_config": {"sliding_window": 8}},
        processor={"image_mean": [0.5] * 3},
        image_size=42,
    )
    config = json.loads((directory / "config.json").read_text())
    assert config["text_config"]["sliding_window"] == 8
    assert config["text_config"]["model_type"] == "mistral"
    assert config["vision_config"]["image_size"] == 42
    images = json.loads((directory / "preprocessor_config.json").read_text())
    assert images["image_mean"] == [0.5] * 3 and images["size"] == {"shortest_edge": 42}
    load(directory)


def test_same_arguments_same_files(tiny, tmp_path):
    again = build_tiny(tmp_path / "again")
    for file in sorted(tiny().iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_refuses_a_directory_with_files(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is taken"):
        build_tiny(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_choices_are_named(tmp_path):
    with pytest.raises(ConfigError, match="gpt2"):
        build_tiny(tmp_path / "x", text="gpt2")
    assert not list(tmp_path.iterdir())
