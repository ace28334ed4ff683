"""Bar 1: logits and greedy tokens equal transformers' own models, from saved directory on.

Random tiny models of many shapes are saved by transformers, opened by us from disk, and given
the same picture files; pixels go through transformers' Pillow processors on one side and ours
on the other.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import unillava.loading as loading
from unillava.checkpoint import open_checkpoint
from unillava.data import layout
from unillava.data.collate import collate
from unillava.data.images import ImageProcessor
from unillava.data.pipeline import expand
from unillava.inference.engine import Engine, greedy

V, IMAGE_TOKEN, VIDEO_TOKEN = 99, 97, 98
TOLERANCE = 1e-5
GRID = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]


def clip(**changes):
    fields = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=56, image_size=24,
        num_attention_heads=4, num_hidden_layers=3, patch_size=6, projection_dim=16,
    )  # fmt: skip
    return fields | changes


def siglip(**changes):
    fields = dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=56, image_size=24,
        num_attention_heads=4, num_hidden_layers=3, patch_size=6,
    )  # fmt: skip
    return fields | changes


def llama(**changes):
    fields = dict(
        model_type="llama", vocab_size=V, hidden_size=32, intermediate_size=72,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    return fields | changes


def mistral(**changes):
    return llama(model_type="mistral", num_key_value_heads=2, sliding_window=None) | changes


def qwen2(**changes):
    return llama(model_type="qwen2", num_key_value_heads=2) | changes


LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip

CASES = {
    "llava": ("Llava", clip(), llama(), {}),
    "llava-full-features": ("Llava", clip(), llama(), {"vision_feature_select_strategy": "full"}),
    "llava-last-layer": ("Llava", clip(), llama(), {"vision_feature_layer": -1}),
    "llava-two-layers": ("Llava", clip(), llama(), {"vision_feature_layer": [-2, 1]}),
    "llava-no-projector-bias": ("Llava", clip(), llama(), {"multimodal_projector_bias": False}),
    "llava-siglip": (
        "Llava", siglip(), llama(),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -2},
    ),
    "llava-siglip-last": (
        "Llava", siglip(), llama(),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "llava-siglip-no-head": (
        "Llava", siglip(vision_use_head=False), qwen2(),
        {"vision_feature_select_strategy": "full"},
    ),
    "llava-qwen2-tied": ("Llava", clip(), qwen2(tie_word_embeddings=True), {}),
    "llava-gelu-clip": ("Llava", clip(hidden_act="gelu", layer_norm_eps=1e-3), llama(), {}),
    "llava-wide-heads": ("Llava", clip(), llama(head_dim=16, num_key_value_heads=1), {}),
    "llava-attention-bias": ("Llava", clip(), llama(attention_bias=True, mlp_bias=True), {}),
    "llava-linear-rope": (
        "Llava", clip(), llama(rope_scaling={"rope_type": "linear", "factor": 4.0}), {},
    ),
    "llava-dynamic-rope": (
        "Llava", clip(),
        llama(max_position_embeddings=40, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        {},
    ),
    "next": ("LlavaNext", clip(), llama(), {}),
    "next-llama3": (
        "LlavaNext", clip(), llama(num_key_value_heads=2, rope_scaling=LLAMA3_ROPE), {},
    ),
    "next-mistral": ("LlavaNext", clip(), mistral(), {}),
    "next-mistral-window": ("LlavaNext", clip(), mistral(sliding_window=11), {}),
    "next-yi": (
        "LlavaNext", clip(),
        llama(rms_norm_eps=1e-5, rope_theta=5e6, num_attention_heads=8, num_key_value_heads=2),
        {},
    ),
    "next-qwen2": ("LlavaNext", clip(), qwen2(), {}),
    "next-siglip": (
        "LlavaNext", siglip(), llama(), {"vision_feature_select_strategy": "full"},
    ),
    "next-video": ("LlavaNextVideo", clip(), llama(), {}),
    "next-video-max": ("LlavaNextVideo", clip(), mistral(), {"spatial_pool_mode": "max"}),
    "next-video-odd": (
        "LlavaNextVideo", clip(image_size=30), llama(),
        {"image_grid_pinpoints": [[30, 60], [60, 30], [60, 60]]},
    ),
}  # fmt: skip

SIZES = [(40, 30), (24, 24), (200, 37), (9, 71), (1, 1), (48, 48)]
"""Width and height of the pictures."""


def hf_config(family: str, vision: dict, text: dict, extra: dict):
    fields = {"image_token_index": IMAGE_TOKEN}
    if family != "Llava":
        fields["image_grid_pinpoints"] = GRID
    if family == "LlavaNextVideo":
        fields |= {"video_token_index": VIDEO_TOKEN}
    tied = text.get("tie_word_embeddings", False)
    return getattr(transformers, f"{family}Config")(
        vision_config=vision, text_config=text, tie_word_embeddings=tied, **(fields | extra)
    )


def processor_dict(family: str, config) -> dict:
    side = config.vision_config.image_size
    fields = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
        "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
    }  # fmt: skip
    if family != "Llava":
        fields["image_processor_type"] = "LlavaNextImageProcessor"
        fields["image_grid_pinpoints"] = config.image_grid_pinpoints
    return fields


def hf_image_processor(fields: dict):
    name = fields["image_processor_type"] + "Pil"
    options = {k: v for k, v in fields.items() if k != "image_processor_type"}
    return getattr(transformers, name)(**options)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, runtime):
    """(transformers' model, its picture processor, our spec, network, picture processor)."""
    family, vision, text, extra = CASES[request.param]
    torch.manual_seed(0)
    config = hf_config(family, vision, text, extra)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for name, parameter in model.named_parameters():
        # Transformers' small initial values would hide errors behind the residual stream.
        scale = 0.2 if parameter.ndim == 1 else 1.2 / np.sqrt(parameter[0].numel())
        noise = torch.randn_like(parameter) * scale
        parameter.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, max_shard_size="50kB")
    checkpoint = open_checkpoint(str(directory))
    fields = processor_dict(family, config)
    ours = ImageProcessor.from_config(checkpoint.spec, fields)
    return (
        model,
        hf_image_processor(fields),
        checkpoint.spec,
        loading.load_network(checkpoint),
        ours,
    )


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (max(2, height // 7), max(2, width // 7), 3), np.uint8)
    return Image.fromarray(base).resize((width, height), Image.Resampling.BICUBIC)


def ids_with_markers(rng, markers: list[int]) -> np.ndarray:
    pieces = [rng.integers(0, 90, 3)]
    for marker in markers:
        pieces += [[marker], rng.integers(0, 90, rng.integers(1, 5))]
    return np.concatenate(pieces)


def hf_inputs(model, processor, spec, ids, pictures, frames):
    """What transformers' processors would hand to the model."""
    expanded, n_image, n_video = [], 0, 0
    for token in ids:
        repeat = 1
        if token == spec.image_token:
            size = pictures[n_image].size
            repeat, n_image = len(layout.image_rows(spec, (size[1], size[0]))), n_image + 1
        elif token == spec.video_token:
            repeat, n_video = len(layout.video_rows(spec, len(frames[n_video]))), n_video + 1
        expanded += [token] * repeat
    inputs = {"input_ids": torch.tensor([expanded]), "attention_mask": torch.ones(1, len(expanded))}
    if pictures:
        pixels = processor(images=pictures, return_tensors="pt")
        inputs["pixel_values"] = pixels["pixel_values"]
        if "image_sizes" in pixels:
            inputs["image_sizes"] = pixels["image_sizes"]
    if frames:
        inputs["pixel_values_videos"] = torch.from_numpy(np.stack(frames))
    return inputs


def requests_for(spec) -> list[tuple[list[tuple[int, int]], int]]:
    """(picture sizes, number of videos)."""
    cases = [([size], 0) for size in SIZES] + [([], 0), ([SIZES[0], SIZES[3]], 0)]
    if spec.video is not None:
        cases += [([], 1), ([SIZES[2]], 1), ([], 2)]
    return cases


def test_logits_and_greedy_tokens(pair):
    model, hf_processor, spec, network, ours = pair
    engine, rng = Engine(network, spec), np.random.default_rng(1)
    samples, expected_logits, expected_tokens = [], [], []
    for n, (sizes, videos) in enumerate(requests_for(spec)):
        pictures = [picture(*size, seed=10 * n + k) for k, size in enumerate(sizes)]
        side = spec.vision.image_size
        frames = [rng.standard_normal((4, 3, side, side)).astype(np.float32) for _ in range(videos)]
        markers = [spec.image_token] * len(sizes) + [spec.video_token] * videos
        ids = ids_with_markers(rng, markers)
        tiles = [ours.tiles(p) for p in pictures]
        samples.append(
            expand(
                spec, ids, np.zeros(len(ids), bool), [t for t, _ in tiles],
                [s for _, s in tiles], frames,
            )
        )  # fmt: skip
        inputs = hf_inputs(model, hf_processor, spec, ids, pictures, frames)
        with torch.no_grad():
            expected_logits.append(model(**inputs).logits[0].numpy())
            generated = model.generate(
                **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        expected_tokens.append(generated[0, inputs["input_ids"].shape[1] :].numpy())
    for sample, expected, tokens in zip(samples, expected_logits, expected_tokens, strict=True):
        found = engine.logits(collate([sample]))[0]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
        state, logits_BV = engine.start(collate([sample]), 6)
        ours_tokens = [int(greedy(logits_BV)[0])]
        for _ in range(5):
            ours_tokens.append(int(greedy(engine.step(state, np.array(ours_tokens[-1:])))[0]))
        np.testing.assert_array_equal(ours_tokens, tokens)
