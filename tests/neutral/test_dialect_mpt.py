"""LLaVA-Lightning-MPT both ways: names, bits, configuration, vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import parts_layout as layout
from tests.neutral.test_dialect_parts import JSON, arrays_of, recognised, tower_directory
from unillava.config import read_spec
from unillava.errors import ConfigError
from weight_convert.canonical import MPT_EMBEDDING
from weight_convert.compose import compose
from weight_convert.convert import carry_out, convert, open_source, plan
from weight_convert.errors import CheckpointError
from weight_convert.source import Options
from weight_convert.verify import compare, verify

ROWS = 50
"""Tokens of the tokenizer; the file of stage 2 has as many rows."""
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaMPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "triton",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 32,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "freeze_mm_mlp_adapter": False,
    "hidden_size": 32,
    "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in"},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "mm_hidden_size": 32,
    "mm_use_im_start_end": True,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14",
    "model_type": "llava_mpt",
    "n_heads": 4,
    "n_layers": 2,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "sep_image_conv_front": False,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "tune_mm_mlp_adapter": False,
    "use_cache": False,
    "use_mm_proj": True,
    "verbose": 0,
    "vocab_size": ROWS,
}
"""config.json in the form of LLaVA-Lightning-MPT-7B-preview's."""
TOKENIZER_JSON: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": ROWS - 1,
            "content": "<im_end>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    ],
    "model": {"type": "BPE", "vocab": {f"t{n}": n for n in range(ROWS - 1)}, "merges": []},
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a CLIP."""
    from unillava.tiny import build_tiny

    root = tmp_path_factory.mktemp("mpt")
    tower_directory(root / "clip", build_tiny(root / "tiny", "llava", "llama"))
    return root / "clip"


def mpt_directory(
    target: Path, *, rows: int = ROWS, config: dict[str, Any] | None = None
) -> layout.Arrays:
    """LLaVA-Lightning-MPT without its tower, as it was released."""
    random = np.random.default_rng(1)
    stored = layout.mpt_part(rows) | {
        "transformer.mm_projector.weight": random.standard_normal((32, 32)).astype(np.float16),
        "transformer.mm_projector.bias": random.standard_normal(32).astype(np.float16),
    }
    layout.write_bin(target / "pytorch_model.bin", stored)
    layout.write_json(target / "config.json", (config or CONFIG) | {"vocab_size": rows})
    layout.write_json(target / "tokenizer.json", TOKENIZER_JSON)
    layout.write_json(target / "tokenizer_config.json", {"unk_token": "t0"})
    return stored


def test_names_and_bits(towers: Path, tmp_path: Path) -> None:
    stored = mpt_directory(tmp_path / "a")
    assert recognised(tmp_path / "a") == ["mpt"]
    source = open_source(tmp_path / "a", Options(vision=towers))
    arrays = arrays_of(source)
    projector = "multi_modal_projector.linear_1."
    for name, array in stored.items():
        new = f"language_model.{name}".replace(
            "language_model.transformer.mm_projector.", projector
        )
        assert arrays[new][: len(array)].tobytes() == array.tobytes(), name
    vision = layout.part(arrays, "vision_tower.")
    assert layout.same(vision, layout.read_all(towers))
    assert len(arrays) == len(stored) + len(vision)
    config = source.config
    assert config["text_config"]["model_type"] == "mpt" and config["tie_word_embeddings"]
    assert config["unillava"]["projector"] == "linear"
    assert (config["model_type"], config["vision_feature_layer"]) == ("llava", -2)


def test_the_vocabulary_grows_and_shrinks_again(towers: Path, tmp_path: Path) -> None:
    """50282 rows become 50304: two tokens, and the next multiple of 64. Here 50 become 64."""
    stored = mpt_directory(tmp_path / "a")
    source = open_source(tmp_path / "a", Options(vision=towers))
    assert source.vocabulary and source.vocabulary.rows == ROWS
    assert source.vocabulary.tokens == {"<image>": ROWS, "<pad>": ROWS + 1}
    embedding = source.tensors[MPT_EMBEDDING].read()
    assert embedding.shape == (64, 32) and source.config["text_config"]["vocab_size"] == 64
    mean = stored["transformer.wte.weight"].astype(np.float64).mean(0).astype(np.float16)
    assert all(np.array_equal(row, mean) for row in embedding[ROWS:])
    padded = mpt_directory(tmp_path / "b", rows=64)
    source = open_source(tmp_path / "b", Options(vision=towers))
    assert source.tensors[MPT_EMBEDDING].shape == padded["transformer.wte.weight"].shape


def test_there_and_back(towers: Path, tmp_path: Path) -> None:
    stored = mpt_directory(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "hf", "hf", Options(vision=towers))
    assert verify(tmp_path / "hf").equal
    convert(tmp_path / "hf", tmp_path / "b", "mpt")
    assert layout.same(layout.read_bin(tmp_path / "b" / "pytorch_model.bin"), stored)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        one, other = (layout.read_json(tmp_path / x / name) for x in "ab")
        assert one == other, name
    convert(tmp_path / "b", tmp_path / "hf2", "hf", Options(max_shard_bytes=10**9))
    assert compare(tmp_path / "hf", tmp_path / "hf2").equal
    for path in (tmp_path / "hf").glob("*.json"):
        if path.name != "unillava_manifest.json":
            assert path.read_bytes() == (tmp_path / "hf2" / path.name).read_bytes(), path.name


def test_split_into_parts(towers: Path, tmp_path: Path) -> None:
    mpt_directory(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "hf", "hf", Options(vision=towers))
    convert(tmp_path / "hf", tmp_path / "parts", "parts")
    assert recognised(tmp_path / "parts" / "language") == ["mpt"]
    convert(tmp_path / "parts", tmp_path / "back", "hf")
    assert compare(tmp_path / "hf", tmp_path / "back").equal
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        one, other = (tmp_path / x / name for x in ("hf", "back"))
        assert one.read_bytes() == other.read_bytes(), name


def test_unillava_has_no_such_model(towers: Path, tmp_path: Path) -> None:
    mpt_directory(tmp_path / "a")
    config = open_source(tmp_path / "a", Options(vision=towers)).config
    with pytest.raises(ConfigError, match=r"text_config\.model_type") as caught:
        read_spec(config)
    assert "mpt" in str(caught.value)


def test_a_head_that_repeats_the_embedding(towers: Path, tmp_path: Path) -> None:
    """LLaVA 1.2 has a separate head, which must be the embedding."""
    stored = mpt_directory(tmp_path / "a")
    path, options = tmp_path / "a" / "pytorch_model.bin", Options(vision=towers)
    head = stored["transformer.wte.weight"]
    layout.write_bin(path, stored | {"lm_head.weight": head.copy()})
    assert "language_model.lm_head.weight" not in open_source(tmp_path / "a", options).tensors
    layout.write_bin(path, stored | {"lm_head.weight": head + np.float16(1)})
    with pytest.raises(CheckpointError, match="an output head of its own"):
        open_source(tmp_path / "a", options)
    options = Options(vision=towers, allow_unused=("lm_head.weight",))
    assert open_source(tmp_path / "a", options).dropped == ("lm_head.weight",)


def mpt_alone(target: Path) -> layout.Arrays:
    stored = layout.mpt_part(ROWS)
    kept = {key: value for key, value in CONFIG.items() if "mm_" not in key}
    changes = {"architectures": ["MPTForCausalLM"], "model_type": "mpt"}
    layout.write_json(target / "config.json", kept | changes)
    layout.write_bin(target / "pytorch_model.bin", stored)
    layout.write_json(target / "tokenizer.json", TOKENIZER_JSON)
    return stored


def test_mpt_alone_and_composed(towers: Path, tmp_path: Path) -> None:
    stored = mpt_alone(tmp_path / "a")
    assert recognised(tmp_path / "a") == ["mpt"]
    assert open_source(tmp_path / "a").parts == {"language"}
    convert(tmp_path / "a", tmp_path / "b", "mpt")
    assert layout.same(layout.read_bin(tmp_path / "b" / "pytorch_model.bin"), stored)
    one, other = (layout.read_json(tmp_path / x / "config.json") for x in "ab")
    assert one == other
    source = compose(vision=towers, language=tmp_path / "a", projector="linear")
    carry_out(plan(source, "mpt", tmp_path / "llava"))
    written = layout.read_json(tmp_path / "llava" / "config.json")
    assert written["model_type"] == "llava_mpt" and written["mm_projector_type"] == "linear"
    names = set(layout.read_bin(tmp_path / "llava" / "pytorch_model.bin"))
    projector = {"transformer.mm_projector.weight", "transformer.mm_projector.bias"}
    assert {name for name in names if "vision_tower" not in name} == stored.keys() | projector


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_layers": 3}, r"missing: .*blocks\.2\."),
        ({"no_bias": False}, r"missing: .*norm_1\.bias"),
        ({"attn_config": {"qk_ln": True}}, "qk_ln"),
        ({"d_model": -1}, "d_model"),
    ],
)
def test_a_config_that_does_not_fit(
    towers: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    mpt_directory(tmp_path / "a", config=CONFIG | changes)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "a", Options(vision=towers))


def test_another_language_model_is_no_mpt(towers: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds MPT alone"):
        convert(towers.parent / "tiny", tmp_path / "x", "mpt")


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_config_of_any_content_is_an_error_or_read(
    towers: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzz_mpt"
    if not root.exists():
        mpt_directory(root)
    config = dict(CONFIG)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(JSON)
    (root / "config.json").write_text(json.dumps(config))
    try:
        source = open_source(root, Options(vision=towers))
    except CheckpointError:
        return
    assert source.tensors
