"""bfloat16 and float16 round where transformers' models round, so replies agree there too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import backends
import unillava


@pytest.fixture
def restore():
    yield
    backends.select("torch", device="cpu", dtype="float32")


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounds_like_transformers(dtype, text, tiny, photo, restore):
    directory = tiny(text=text)
    model = unillava.load(directory, backend="torch", device="cpu", dtype=dtype)
    reference = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    ).eval()
    for content in (
        "Tell me about bread and tea.",
        [{"type": "image", "image": str(photo)}, {"type": "text", "text": "What is this?"}],
    ):
        request = {"messages": [{"role": "user", "content": content}]}
        found = model.logits(request)
        sample = model.pipeline.prepare(request)
        ids = np.where(sample.kind_S == 0, sample.ids_S, model.spec.image_token)
        inputs = {"input_ids": torch.from_numpy(ids)[None]}
        if sample.pixels_T3HW is not None:
            pixels = torch.from_numpy(sample.pixels_T3HW)[None]
            inputs["pixel_values"] = pixels.to(reference.dtype)
            inputs["image_sizes"] = torch.tensor([[600, 512]])
        with torch.no_grad():
            expected = reference(**inputs).logits[0].float().numpy()
        step = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
        assert np.abs(found - expected).max() <= step * np.abs(expected).max()
        assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.98
