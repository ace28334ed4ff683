"""transformers judges towers, language models, composing, splitting and MPT; torch judges MOSS2.

What transformers saves must be read bit by bit, what is composed must load as a whole model with
the same weights inside, and what is split must load as the classes of the parts. LLaVA-MOSS2 and
Meta's LLaMA, which transformers does not have, are written down here once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import unillava
from tests import parts_layout as layout
from unillava.config import read_spec
from unillava.data.collate import collate
from weight_convert.compose import compose
from weight_convert.convert import carry_out, convert, open_source, plan
from weight_convert.source import Options

Tiny = Callable[..., Path]
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=56, image_size=24, num_attention_heads=4,
    num_hidden_layers=3, patch_size=6, projection_dim=16,
)  # fmt: skip
TEXT: dict[str, Any] = dict(
    vocab_size=99, hidden_size=48, intermediate_size=72, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SIDE: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    vocab_size=60, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def clip_model():
    config = transformers.CLIPConfig(vision_config=VISION, text_config=SIDE, projection_dim=16)
    return transformers.CLIPModel(config)


def siglip_model():
    vision = VISION | {"num_attention_heads": 4}
    config = transformers.SiglipConfig(vision_config=vision, text_config=SIDE)
    return transformers.SiglipModel(config)


def siglip_tower(head: bool):
    config = transformers.SiglipVisionConfig(**VISION, vision_use_head=head)
    return transformers.SiglipVisionModel(config)


TOWERS: dict[str, Callable[[], torch.nn.Module]] = {
    "CLIPModel": clip_model,
    "CLIPVisionModel": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**VISION)
    ),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**VISION)
    ),
    "SiglipModel": siglip_model,
    "SiglipVisionModel": lambda: siglip_tower(True),
    "SiglipVisionModel without head": lambda: siglip_tower(False),
}
LANGUAGES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "llama with biases and scaling": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **TEXT,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        )
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**TEXT, sliding_window=None, head_dim=24)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**TEXT, tie_word_embeddings=True)
    ),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases too, so that no two tensors are alike."""
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model.eval()


def reread(cls: type, directory: Path) -> torch.nn.Module:
    """What transformers loads, without anything missing, surplus or of another shape."""
    model, report = cls.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    return model.eval()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def tensors_of(source) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(t.read().copy()) for name, t in source.tensors.items()}


def tower_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tower's parameters under canonical names."""
    found = {}
    for name, value in model.state_dict().items():
        inner = name.removeprefix("vision_model.")
        parts = ("embeddings.", "encoder.", "pre_", "post_", "head.")
        if inner.startswith(parts) and not inner.endswith("position_ids"):
            found[f"vision_tower.vision_model.{inner}"] = value
    return found


def save(model: torch.nn.Module, directory: Path, form: str) -> None:
    if form == "bin":
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    else:
        model.save_pretrained(directory, max_shard_size="20KB" if form == "sharded" else "5GB")


# --- towers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, form",
    [
        *((name, "whole") for name in TOWERS),
        ("CLIPModel", "bin"),
        ("CLIPVisionModel", "sharded"),
        ("SiglipVisionModel", "bin"),
    ],
)
def test_towers_that_transformers_saves(tmp_path, name, form):
    model = randomised(TOWERS[name]())
    save(model, tmp_path / "a", form)
    assert (form != "sharded") or len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    source = open_source(tmp_path / "a")
    expected = tower_state(model)
    assert equal(tensors_of(source), expected)
    convert(tmp_path / "a", tmp_path / "b", source.dialect)
    clip = source.dialect == "clip"
    cls = transformers.CLIPVisionModel if clip else transformers.SiglipVisionModel
    again = reread(cls, tmp_path / "b")
    assert equal(tower_state(again), expected)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        states = again(pixels).last_hidden_state
        vision = model.vision_model if hasattr(model, "vision_model") else model
        assert torch.equal(states, vision(pixels).last_hidden_state)
    size = transformers.AutoImageProcessor.from_pretrained(tmp_path / "b").size
    assert (size.get("shortest_edge") or size.get("height")) == 24


# --- language models -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, form",
    [*((name, "whole") for name in LANGUAGES), ("llama", "sharded"), ("qwen2", "bin")],
)
def test_language_models_that_transformers_saves(tmp_path, name, form):
    model = randomised(LANGUAGES[name]())
    save(model, tmp_path / "a", form)
    source = open_source(tmp_path / "a")
    expected = {f"language_model.{key}": value for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["language_model.lm_head.weight"]
    assert equal(tensors_of(source), expected)
    # Written anew, without the file that transformers saved to lean on.
    source = replace(source, memory={})
    carry_out(plan(source, "llama", tmp_path / "b", Options(max_shard_bytes=20_000)))
    again = reread(type(model), tmp_path / "b")
    assert equal(again.state_dict(), model.state_dict())
    ids = torch.randint(0, 99, (2, 17))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_mpt_that_transformers_saves(tmp_path):
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=70)
    model = randomised(transformers.MptForCausalLM(config))
    model.save_pretrained(tmp_path / "a")
    source = open_source(tmp_path / "a")
    expected = {f"language_model.{key}": value for key, value in model.state_dict().items()}
    del expected["language_model.lm_head.weight"]
    assert equal(tensors_of(source), expected)
    carry_out(plan(replace(source, memory={}), "mpt", tmp_path / "b"))
    state = torch.load(tmp_path / "b" / "pytorch_model.bin", weights_only=True)
    names = {f"language_model.{name}": value for name, value in state.items()}
    assert equal(names, expected)
    again = reread(transformers.MptForCausalLM, tmp_path / "b")
    ids = torch.randint(0, 70, (1, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


# --- composing and splitting -----------------------------------------------------------------

FAMILIES = {
    "llava": transformers.LlavaForConditionalGeneration,
    "llava_next": transformers.LlavaNextForConditionalGeneration,
    "llava_next_video": transformers.LlavaNextVideoForConditionalGeneration,
}


@pytest.mark.parametrize(
    "family, tower, text",
    [
        ("llava", "CLIPModel", "llama"),
        ("llava", "SiglipVisionModel without head", "qwen2"),
        ("llava_next", "CLIPVisionModel", "mistral"),
        ("llava_next", "SiglipModel", "llama with biases and scaling"),
        ("llava_next_video", "CLIPVisionModelWithProjection", "qwen2"),
    ],
)
def test_composed_and_split(tmp_path, family, tower, text):
    vision, language = randomised(TOWERS[tower]()), randomised(LANGUAGES[text]())
    vision.save_pretrained(tmp_path / "vision")
    language.save_pretrained(tmp_path / "language")
    source = compose(vision=tmp_path / "vision", language=tmp_path / "language", family=family)
    carry_out(plan(source, "hf", tmp_path / "hf"))
    model = reread(FAMILIES[family], tmp_path / "hf")
    assert equal(tower_state(model.model.vision_tower), tower_state(vision))
    state = model.state_dict()
    for name, value in language.state_dict().items():
        mine = name.replace("model.", "model.language_model.", 1)
        assert torch.equal(state[mine][: len(value)], value), name
    ids = torch.randint(0, 99, (1, 13))
    with torch.no_grad():
        found = model(input_ids=ids).logits[..., :99]
        torch.testing.assert_close(found, language(ids).logits, rtol=0, atol=1e-5)
    kinds = [type(one).__name__ for one in model.model.multi_modal_projector.children()]
    assert kinds == ["Linear", "GELUActivation", "Linear"]

    convert(tmp_path / "hf", tmp_path / "parts", "parts")
    cls = transformers.CLIPVisionModel if "CLIP" in tower else transformers.SiglipVisionModel
    assert equal(tower_state(reread(cls, tmp_path / "parts" / "vision")), tower_state(vision))
    alone = reread(type(language), tmp_path / "parts" / "language")
    with torch.no_grad():
        again = alone(ids).logits[..., :99]
        torch.testing.assert_close(again, language(ids).logits, rtol=0, atol=1e-5)
    projector = torch.load(tmp_path / "parts" / "projector" / "mm_projector.bin", weights_only=True)
    place = {"0": "linear_1", "2": "linear_2"}
    for name, value in projector.items():
        if "mm_projector" in name:
            number, kind = name.split(".")[-2:]
            mine = f"model.multi_modal_projector.{place[number]}.{kind}"
        else:
            mine = "model.image_newline"
        assert torch.equal(state[mine], value), name

    # The language model's own rows and configuration come back when it is taken out again.
    convert(tmp_path / "hf", tmp_path / "back", "llama")
    back = reread(type(language), tmp_path / "back")
    assert equal(back.state_dict(), language.state_dict())
    files = [(tmp_path / x / "config.json").read_bytes() for x in ("language", "back")]
    assert files[0] == files[1]


def test_new_linear_layers_are_distributed_as_torchs(tmp_path):
    """Quantiles of many new weights and of torch.nn.Linear's, within their sampling error."""
    vision, language = randomised(TOWERS["CLIPVisionModel"]()), randomised(LANGUAGES["llama"]())
    vision.save_pretrained(tmp_path / "vision")
    language.save_pretrained(tmp_path / "language")
    found, expected = [], []
    for seed in range(12):
        source = compose(vision=tmp_path / "vision", language=tmp_path / "language", seed=seed)
        for number, inputs in ((1, 32), (2, 48)):
            layer = torch.nn.Linear(inputs, 48)
            for kind in ("weight", "bias"):
                name = f"multi_modal_projector.linear_{number}.{kind}"
                value = source.tensors[name].read()
                assert value.shape == tuple(getattr(layer, kind).shape)
                found.append(value.ravel() * math.sqrt(inputs))
                expected.append(getattr(layer, kind).detach().numpy().ravel() * math.sqrt(inputs))
    one, other = np.sort(np.concatenate(found)), np.sort(np.concatenate(expected))
    # Two-sample Kolmogorov-Smirnov: the largest distance at a level of one in a thousand.
    grid = np.linspace(-1, 1, 2001)
    distance = np.abs(
        np.searchsorted(one, grid) / one.size - np.searchsorted(other, grid) / other.size
    ).max()
    assert distance < 1.95 * math.sqrt(2 / one.size)


def test_a_projector_that_torch_saved(tmp_path):
    vision, language = randomised(TOWERS["CLIPVisionModel"]()), randomised(LANGUAGES["llama"]())
    vision.save_pretrained(tmp_path / "vision")
    language.save_pretrained(tmp_path / "language")
    layers = {"0": torch.nn.Linear(32, 48), "2": torch.nn.Linear(48, 48)}
    state = {
        f"model.mm_projector.{place}.{kind}": getattr(layer, kind).detach()
        for place, layer in layers.items()
        for kind in ("weight", "bias")
    }
    torch.save(state, tmp_path / "mm_projector.bin")
    source = compose(
        vision=tmp_path / "vision",
        language=tmp_path / "language",
        projector=tmp_path / "mm_projector.bin",
    )
    carry_out(plan(source, "hf", tmp_path / "hf"))
    projector = reread(FAMILIES["llava"], tmp_path / "hf").model.multi_modal_projector
    for place, name in (("0", "linear_1"), ("2", "linear_2")):
        assert torch.equal(getattr(projector, name).weight, layers[place].weight)
        assert torch.equal(getattr(projector, name).bias, layers[place].bias)


def test_parts_are_loaded_as_they_are(runtime, tiny: Tiny, tmp_path, photo):
    source = tiny("llava_next", "llama", "clip")
    convert(source, tmp_path / "parts", "parts")
    request = {"messages": [{"role": "user", "content": "What is this?"}], "images": [str(photo)]}
    logits = [unillava.load(str(path)).logits(request) for path in (source, tmp_path / "parts")]
    assert np.array_equal(*logits)


# --- Meta ------------------------------------------------------------------------------------


def meta_logits(state: dict[str, torch.Tensor], params: dict[str, Any], ids: torch.Tensor):
    """Meta's LLaMA: neighbouring pairs of each head are complex numbers that are turned."""
    heads, kv_heads, theta = params["n_heads"], params["n_kv_heads"], params["rope_theta"]
    size, length = params["dim"] // heads, len(ids)

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    state = {name: value.double() for name, value in state.items()}
    x = state["tok_embeddings.weight"][ids]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    for n in range(params["n_layers"]):
        layer = {k.removeprefix(f"layers.{n}."): v for k, v in state.items()}
        h = norm(x, layer["attention_norm.weight"])
        q, k, v = (
            (h @ layer[f"attention.w{one}.weight"].T).view(length, -1, size) for one in "qkv"
        )
        q, k = turned(q), turned(k)
        k, v = (one.repeat_interleave(heads // kv_heads, 1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size) + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        gate = F.silu(h @ layer["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_files_compute_the_same(tmp_path, ranks):
    params = dict(
        dim=48, n_heads=4, n_kv_heads=2, n_layers=2, norm_eps=1e-5, rope_theta=10000.0,
        vocab_size=99, multiple_of=8,
    )  # fmt: skip
    size = 48 // 4
    shapes = {"tok_embeddings": (98, 48), "norm": (48,), "output": (98, 48)}
    for n in range(2):
        shapes |= {
            f"layers.{n}.attention.wq": (48, 48),
            f"layers.{n}.attention.wk": (2 * size, 48),
            f"layers.{n}.attention.wv": (2 * size, 48),
            f"layers.{n}.attention.wo": (48, 48),
            f"layers.{n}.feed_forward.w1": (72, 48),
            f"layers.{n}.feed_forward.w2": (48, 72),
            f"layers.{n}.feed_forward.w3": (72, 48),
            f"layers.{n}.attention_norm": (48,),
            f"layers.{n}.ffn_norm": (48,),
        }
    state = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    arrays = {name: value.numpy() for name, value in state.items()}
    for number, rank in enumerate(layout.meta_ranks(arrays, ranks, rows_of_embedding=False)):
        tensors = {name: torch.from_numpy(array) for name, array in rank.items()}
        tensors["rope.freqs"] = torch.ones(size // 2)
        (tmp_path / "meta").mkdir(exist_ok=True)
        torch.save(tensors, tmp_path / "meta" / f"consolidated.{number:02}.pth")
    layout.write_json(tmp_path / "meta" / "params.json", params)
    convert(tmp_path / "meta", tmp_path / "hf", "llama")
    model = reread(transformers.LlamaForCausalLM, tmp_path / "hf")
    ids = torch.randint(0, 98, (23,))
    expected = meta_logits(state, params, ids)
    with torch.no_grad():
        found = model(ids[None]).logits[0].double()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- MOSS2 -----------------------------------------------------------------------------------


def moss2_logits(state: dict[str, torch.Tensor], config: dict[str, Any], ids: torch.Tensor):
    """MOSS2 from its fused layout, in float64: halves are turned, the base grows with length."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, length, limit = (
        config["hidden_size"] // heads,
        len(ids),
        config["max_position_embeddings"],
    )
    base = float(config["rope_theta"])
    if length > limit:
        factor = config["rope_scaling"]["factor"]
        base *= (factor * length / limit - (factor - 1)) ** (size / (size - 2))
    frequencies = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def turned(x):
        one, other = x.chunk(2, -1)
        return x * cos + torch.cat([-other, one], -1) * sin

    def norm(x, weight):
        variance = x.pow(2).mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(variance + config["rms_norm_eps"]))

    state = {name: value.double() for name, value in state.items()}
    zero = torch.zeros((), dtype=torch.float64)
    x = state["model.tok_embeddings.weight"][ids]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    for n in range(config["num_hidden_layers"]):
        part = {k.removeprefix(f"model.layers.{n}."): v for k, v in state.items()}
        h = norm(x, part["attention_norm.weight"])
        fused = h @ part["attention.wqkv.weight"].T + part.get("attention.wqkv.bias", zero)
        fused = fused.view(length, groups, heads // groups + 2, size)
        q = turned(fused[:, :, :-2].reshape(length, heads, size))
        k, v = turned(fused[:, :, -2]), fused[:, :, -1]
        mixed = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, head] @ k[:, group].T / math.sqrt(size) + mask
            mixed.append(scores.softmax(-1) @ v[:, group])
        attended = torch.cat(mixed, -1) @ part["attention.wo.weight"].T
        x = x + attended + part.get("attention.wo.bias", zero)
        h = norm(x, part["ffn_norm.weight"])
        inner = F.silu(h @ part["feed_forward.w1.weight"].T) * (
            h @ part["feed_forward.w3.weight"].T
        )
        x = x + inner @ part["feed_forward.w2.weight"].T
    return norm(x, state["model.norm.weight"]) @ state["output.weight"].T


def _with_context(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"text_config": config["text_config"] | {"max_position_embeddings": 1024}}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("limit", [1024, 24])
def test_moss2_computes_the_same(runtime, tiny: Tiny, tmp_path, bias, limit):
    text = {
        "attention_bias": bias,
        "max_position_embeddings": limit,
        "num_key_value_heads": 2,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000.0,
    }
    source = tiny("llava", "llama", "clip", config={"text_config": text})
    stored = layout.llava_moss2(layout.read_all(source), 4, 2)
    state = {name: torch.from_numpy(array.copy()) for name, array in stored.items()}
    (tmp_path / "moss2").mkdir()
    torch.save(state, tmp_path / "moss2" / "pytorch_model.bin")
    config = dict(
        model_type="llava_moss2", bias=bias, hidden_size=64, intermediate_size=128,
        max_position_embeddings=limit, num_attention_heads=4, num_hidden_layers=3,
        num_key_value_heads=2, pad_token_id=2, rms_norm_eps=1e-5, rope_theta=1000000,
        rope_scaling={"type": "dynamic", "factor": 2.0}, vocab_size=640,
        mm_vision_tower="openai/clip-vit-large-patch14-336", mm_projector_type="linear",
    )  # fmt: skip
    layout.write_json(tmp_path / "moss2" / "config.json", config)
    layout.copy_files(source, tmp_path / "moss2")
    convert(source, tmp_path / "clip", "clip")
    convert(tmp_path / "moss2", tmp_path / "hf", "hf", Options(vision=tmp_path / "clip"))
    request = {"messages": [{"role": "user", "content": "Describe the photo, and count to ten."}]}
    models = [
        unillava.load(str(tmp_path / "hf")),
        unillava.load(str(tmp_path / "moss2"), vision=str(tmp_path / "clip")),
    ]
    # Beyond the context, where the rotary base grows, a prompt is refused: go round the check.
    patient = replace(
        models[0].pipeline, spec=read_spec(_with_context(models[0].checkpoint.config))
    )
    sample = patient.prepare(request, generate=True)
    expected = moss2_logits(state, config, torch.from_numpy(sample.ids_S)).numpy()
    assert len(sample) > 24
    for model in models:
        assert model.pipeline.template.name == "llava_llama_2"
        found = model.engine.logits(collate([sample]))[0]
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_is_written_for_moss2_is_loaded_by_torch(tiny: Tiny, tmp_path):
    text = {"num_key_value_heads": 2}
    source = tiny("llava", "llama", "clip", config={"text_config": text}, dtype="bfloat16")
    convert(source, tmp_path / "moss2", "moss2")
    found = torch.load(tmp_path / "moss2" / "pytorch_model.bin", weights_only=True)
    expected = layout.llava_moss2(layout.read_all(source), 4, 2)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert np.array_equal(value.view(torch.uint16).numpy(), expected[name]), name
