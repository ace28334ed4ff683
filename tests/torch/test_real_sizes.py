"""Parameter tables and configurations against what transformers builds (meta device, no memory)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.real_configs import REAL_CONFIGS, Config
from unillava.checkpoint import open_checkpoint
from unillava.config import read_spec, write_config
from unillava.spec import LlavaSpec, parameter_table
from weight_convert.canonical import ARCHITECTURES, TEXT_DEFAULTS, TOP_DEFAULTS, VISION_DEFAULTS
from weight_convert.dialects import hf

TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
TINY_VISION = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def hf_config(config: Config) -> Any:
    """The configuration object that transformers reads from a config.json."""
    config = json.loads(json.dumps(config))  # transformers changes nested dicts in place
    return AutoConfig.for_model(**config)


def hf_model(config: Any) -> Any:
    """transformers' model without memory."""
    with torch.device("meta"):
        return getattr(transformers, ARCHITECTURES[config.model_type])(config)


def hf_table(config: Any) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter that transformers creates; tied ones once."""
    parameters = hf_model(config).named_parameters()
    return {hf.canonical_name(name): tuple(tensor.shape) for name, tensor in parameters}


def tiny_config(family: str, text: str, vision: str, **top: Any) -> Config:
    """A small config.json of every kind."""
    return {
        "model_type": family,
        "image_token_index": 3,
        "image_grid_pinpoints": [[28, 56], [56, 28]],
        "vision_feature_select_strategy": "full" if vision == "siglip" else "default",
        "text_config": {"model_type": text, **TINY_TEXT},
        "vision_config": {"model_type": f"{vision}_vision_model", **TINY_VISION},
        **({"video_token_index": 4} if family == "llava_next_video" else {}),
        **top,
    }


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_parameter_table_is_what_transformers_builds(name: str) -> None:
    config = REAL_CONFIGS[name]
    ours, theirs = parameter_table(read_spec(config)), hf_table(hf_config(config))
    assert ours == theirs
    assert sum(map(math.prod, ours.values())) == sum(map(math.prod, theirs.values()))


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_what_transformers_saves_reads_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    config = hf_config(REAL_CONFIGS[name])
    expected = read_spec(REAL_CONFIGS[name])
    config.save_pretrained(tmp_path)
    assert read_spec(json.loads((tmp_path / "config.json").read_text())) == expected
    assert read_spec(json.loads(config.to_json_string(use_diff=False))) == expected


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_what_we_write_is_the_same_model_for_transformers(name: str, tmp_path: Path) -> None:
    spec = read_spec(REAL_CONFIGS[name])
    for written in (write_config(spec), write_config(spec, REAL_CONFIGS[name])):
        config = hf_config(written)
        assert hf_table(config) == parameter_table(spec)
        assert read_spec(json.loads(config.to_json_string())) == spec


def as_json(value: Any) -> Any:
    """What a default looks like in a config.json."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("model_type", "defaults"),
    [*TEXT_DEFAULTS.items(), *VISION_DEFAULTS.items(), *TOP_DEFAULTS.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_defaults_are_those_of_the_classes(model_type: str, defaults: Config) -> None:
    config = AutoConfig.for_model(model_type)
    derived = {
        "rope_theta": lambda: config.rope_parameters["rope_theta"],
        # The classes replace null by what it means; our tables keep null.
        "num_key_value_heads": lambda: type(config).num_key_value_heads,
        "head_dim": lambda: getattr(type(config), "head_dim", None),
        "sliding_window": lambda: type(config).sliding_window,
    }
    theirs = {
        key: as_json(derived.get(key, lambda k=key: getattr(config, k))()) for key in defaults
    }
    assert theirs == defaults


def test_an_absent_nested_configuration_means_what_transformers_means() -> None:
    config = {"model_type": "llava", "image_token_index": 7}
    assert parameter_table(read_spec(config)) == hf_table(hf_config(config))


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_tied_embeddings_follow_what_transformers_saves(
    family: str, outer: bool, inner: bool, tmp_path: Path
) -> None:
    config = tiny_config(family, "qwen2", "clip", tie_word_embeddings=outer)
    config["text_config"]["tie_word_embeddings"] = inner
    model = getattr(transformers, ARCHITECTURES[family])(hf_config(config))
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert read_spec(config).text.tie_embeddings == tied
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert checkpoint.spec.text.tie_embeddings == tied


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_saved_weights_open_under_every_spelling(family: str, vision: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = getattr(transformers, ARCHITECTURES[family])(
        hf_config(tiny_config(family, "llama", vision))
    )
    model.save_pretrained(tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved")
    saved.check()
    assert hf.spelling_of(
        place.name for tensor in saved.stored.values() for place in tensor.places
    ) == ("saved by transformers 5")
    in_memory = {name: tensor.detach() for name, tensor in model.named_parameters()}
    assert hf.spelling_of(in_memory) == "in memory, transformers 5"
    for name, array, _ in saved.tensors():
        memory_name = hf.spelled_name(name, hf.MEMORY_OF_5)
        assert torch.equal(torch.from_numpy(array), in_memory[memory_name])

    (tmp_path / "memory").mkdir()
    save_file(in_memory, tmp_path / "memory" / "model.safetensors")
    model.config.save_pretrained(tmp_path / "memory")
    memory = open_checkpoint(tmp_path / "memory")
    memory.check()
    assert memory.shapes.keys() == saved.shapes.keys()


@pytest.mark.parametrize(
    ("kind", "fields", "window"),
    [
        ("llama", {"sliding_window": 8}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 8}, 8),
        ("qwen2", {}, None),
        ("qwen2", {"sliding_window": 8}, None),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, None),
    ],
)
def test_windows_are_those_of_the_layers(kind: str, fields: Config, window: int | None) -> None:
    config = tiny_config("llava", kind, "clip")
    config["text_config"] |= fields
    assert read_spec(config).text.sliding_window == window
    saved = json.loads(hf_config(config).to_json_string())
    assert read_spec(saved).text.sliding_window == window
    if kind == "mistral":  # keeps it in its configuration, for all layers
        assert hf_config(config).text_config.sliding_window == window
        return
    layers = hf_model(hf_config(config)).model.language_model.layers
    assert {getattr(layer.self_attn, "sliding_window", None) for layer in layers} == {window}


@st.composite
def configs(draw: Callable) -> Config:
    """A random small config.json, as somebody might write it."""
    family = draw(st.sampled_from(list(ARCHITECTURES)))
    vision = draw(st.sampled_from(["clip", "siglip"]))
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2"]))
    kv_heads, groups, head_dim = (draw(st.integers(1, 3)) for _ in range(3))
    heads = kv_heads * groups
    layers = draw(st.integers(1, 4))
    feature_layer = st.integers(-layers - 1, layers)
    config = tiny_config(family, kind, vision)
    config["vision_config"] |= {
        "num_hidden_layers": layers,
        "patch_size": draw(st.sampled_from([4, 5, 7, 14])),
        "hidden_size": 2 * draw(st.integers(1, 6)),
    }
    config["text_config"] |= {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * 2 * head_dim,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if draw(st.booleans()):
        config["text_config"]["head_dim"] = 2 * draw(st.integers(1, 5))
    if kind == "llama":
        config["text_config"] |= {
            "attention_bias": draw(st.booleans()),
            "mlp_bias": draw(st.booleans()),
        }
    config["vision_feature_layer"] = draw(
        st.one_of(feature_layer, st.lists(feature_layer, min_size=1, max_size=3))
    )
    config["multimodal_projector_bias"] = draw(st.booleans())
    if vision == "siglip":
        config["vision_config"]["vision_use_head"] = draw(st.booleans())
    return config


@settings(max_examples=40, deadline=None)
@given(configs())
def test_random_configurations_give_the_tables_of_transformers(config: Config) -> None:
    theirs = hf_config(config)
    spec: LlavaSpec = read_spec(config)
    assert parameter_table(spec) == hf_table(theirs)
    assert read_spec(json.loads(theirs.to_json_string())) == spec
    assert hf_table(hf_config(write_config(spec))) == parameter_table(spec)
