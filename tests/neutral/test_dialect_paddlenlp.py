"""PaddleNLP's language models, both ways, against tests/paddle_layout.py.

PaddleNLP itself judges in scripts/paddlenlp_check.sh.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import paddle_layout as layout
from weight_convert.canonical import LANGUAGE, text_config
from weight_convert.contents import look
from weight_convert.convert import convert, open_source, plan
from weight_convert.dialects import registry
from weight_convert.dialects.paddlenlp import flat_from_text, text_from_flat
from weight_convert.errors import CheckpointError
from weight_convert.source import Options
from weight_convert.verify import compare, verify

Tiny = Callable[..., Path]
FORMS = {"plain": (False, False), "qkv": (True, False), "ffn": (False, True), "both": (True, True)}
CONFIG: dict[str, Any] = {
    "alibi": False,
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "dpo_config": None,
    "dtype": "float32",
    "eos_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "long_sequence_init_args": {},
    "max_position_embeddings": 1024,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "paddlenlp_version": "3.0.0b4",
    "rms_norm_eps": 1e-05,
    "rope_scaling_factor": 1.0,
    "rope_scaling_type": None,
    "rope_theta": 10000.0,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "vocab_size": 640,
}
"""config.json as PaddleNLP 3.0.0b4 saves it: fields of its own, and not all of the others."""


def canonical_arrays(directory: Path) -> layout.Arrays:
    arrays = layout.read_all_safetensors(directory)
    return {name: array for name, array in arrays.items() if name.startswith(LANGUAGE)}


def paddle_directory(
    target: Path, source: Path, form: str = "plain", base: str = "llama", **changes: Any
) -> layout.Arrays:
    """A PaddleNLP checkpoint with the language model of a tiny LLaVA; returns its arrays."""
    target.mkdir()
    text = json.loads((source / "config.json").read_text())["text_config"]
    own = {key: text[key] for key in CONFIG.keys() & text.keys() - {"architectures"}}
    config = CONFIG | own | changes
    if base == "qwen2":
        config["architectures"] = ["Qwen2ForCausalLM"]
    (target / "config.json").write_text(json.dumps(config))
    qkv, ffn = FORMS[form]
    arrays = layout.language(
        canonical_arrays(source),
        text["num_attention_heads"],
        text["num_key_value_heads"],
        base=base,
        qkv=qkv,
        ffn=ffn,
        tied=text["tie_word_embeddings"],
    )
    layout.write_pdparams(target / "model_state.pdparams", arrays)
    return arrays


def assert_equal(found: layout.Arrays, expected: layout.Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


def read_back(path: Path) -> layout.Arrays:
    return {name: t.read() for name, t in open_source(path).tensors.items()}


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["llama", "llama3"])
def test_every_form_is_read(tiny: Tiny, tmp_path: Path, text: str, form: str) -> None:
    source = tiny("llava", text)
    paddle_directory(tmp_path / "p", source, form)
    assert registry.recognise(look(tmp_path / "p"))[0].name == "paddlenlp"
    assert_equal(read_back(tmp_path / "p"), canonical_arrays(source))


@pytest.mark.parametrize("form", ["plain", "both"])
def test_qwen2_with_its_biases_and_tied_head_is_read(tiny: Tiny, tmp_path: Path, form: str) -> None:
    source = tiny("llava", "qwen2")
    paddle_directory(tmp_path / "p", source, form, "qwen2")
    opened = open_source(tmp_path / "p")
    assert_equal(read_back(tmp_path / "p"), canonical_arrays(source))
    assert opened.dropped == ("lm_head.weight",)
    assert opened.config["text_config"]["tie_word_embeddings"] is True


@pytest.mark.parametrize("metadata", [None, {"format": "np"}])
def test_the_tag_u16_is_bfloat16(
    tiny: Tiny, tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    source = tiny("llava", dtype="bfloat16")
    arrays = paddle_directory(tmp_path / "p", source, dtype="bfloat16")
    (tmp_path / "p" / "model_state.pdparams").unlink()
    layout.write_safetensors(tmp_path / "p" / "model.safetensors", arrays, metadata)
    opened = open_source(tmp_path / "p")
    assert {t.dtype for t in opened.tensors.values()} == {"BF16"}
    assert_equal(read_back(tmp_path / "p"), canonical_arrays(source))
    assert opened.config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("text, base", [("llama3", "llama"), ("qwen2", "qwen2")])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_of_tensor_parallelism_are_put_together(
    tiny: Tiny, tmp_path: Path, text: str, base: str, ranks: int
) -> None:
    source = tiny("llava", text)
    degree = {"tensor_parallel_degree": ranks, "tensor_parallel_output": True}
    arrays = paddle_directory(tmp_path / "p", source, base=base, **degree)
    (tmp_path / "p" / "model_state.pdparams").unlink()
    kv_heads = json.loads((tmp_path / "p" / "config.json").read_text())["num_key_value_heads"]
    parts = layout.split_ranks(arrays, ranks, kv_heads)
    for rank, part in enumerate(parts):
        if base == "qwen2":  # the head is the embedding, and split like it
            part["lm_head.weight"] = part[f"{base}.embed_tokens.weight"]
        layout.write_pdparams(tmp_path / "p" / f"model_state.tp{rank:02d}.pdparams", part)
    assert_equal(read_back(tmp_path / "p"), canonical_arrays(source))
    convert(tmp_path / "p", tmp_path / "whole", "paddlenlp")
    assert not degree.keys() & config_of(tmp_path / "whole").keys()
    assert_equal(layout.read_pdparams(tmp_path / "whole" / "model_state.pdparams"), arrays)


def test_a_trainer_checkpoint_is_read_without_its_optimizer(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava")
    paddle_directory(tmp_path / "p", source)
    for name in ("optimizer.pdopt", "scheduler.pdparams", "training_args.bin", "rng_state.pth"):
        (tmp_path / "p" / name).write_bytes(b"\x80\x04never read")
    assert_equal(read_back(tmp_path / "p"), canonical_arrays(source))


def test_shards_are_read(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava")
    arrays = paddle_directory(tmp_path / "p", source)
    (tmp_path / "p" / "model_state.pdparams").unlink()
    layout.write_sharded_pdparams(tmp_path / "p", arrays, 3)
    assert_equal(read_back(tmp_path / "p"), canonical_arrays(source))


def test_a_single_file_takes_its_configuration_from_a_base(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava", "llama3")
    paddle_directory(tmp_path / "p", source, "both")
    file = shutil.copy(tmp_path / "p" / "model_state.pdparams", tmp_path / "lm.pdparams")
    with pytest.raises(CheckpointError, match="--base"):
        open_source(file)
    opened = open_source(file, Options(base=source))
    assert opened.parts == {"language"} and "vision_config" not in opened.config
    assert_equal({n: t.read() for n, t in opened.tensors.items()}, canonical_arrays(source))


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weights", [None, "safetensors"])
@pytest.mark.parametrize(
    "text, base", [("llama", "llama"), ("llama3", "llama"), ("qwen2", "qwen2")]
)
def test_what_is_written_is_paddlenlp_s(
    tiny: Tiny, tmp_path: Path, text: str, base: str, weights: str | None, fused: bool
) -> None:
    source = tiny("llava", text)
    options = Options(weights=weights, qkv_concat=fused, max_shard_bytes=10**9)
    convert(source, tmp_path / "p", "paddlenlp", options)
    sizes = json.loads((source / "config.json").read_text())["text_config"]
    expected = layout.language(
        canonical_arrays(source),
        sizes["num_attention_heads"],
        sizes["num_key_value_heads"],
        base=base,
        qkv=fused,
        ffn=fused,
        tied=sizes["tie_word_embeddings"],
    )
    if weights:
        found, _, metadata = layout.read_safetensors(tmp_path / "p" / "model.safetensors")
        assert metadata == {"format": "np"}
    else:
        found = layout.read_pdparams(tmp_path / "p" / "model_state.pdparams")
    assert_equal(found, expected)
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config.get("fuse_attention_qkv", False) is fused
    assert config.get("fuse_attention_ffn", False) is fused
    assert verify(tmp_path / "p").equal


def test_bfloat16_is_written_under_its_own_tag(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava", dtype="bfloat16")
    convert(source, tmp_path / "p", "paddlenlp", Options(weights="safetensors"))
    _, tags, _ = layout.read_safetensors(tmp_path / "p" / "model.safetensors")
    assert set(tags.values()) == {"BF16"}
    assert json.loads((tmp_path / "p" / "config.json").read_text())["dtype"] == "bfloat16"


def test_other_parts_are_left_out_and_said_to_be(tiny: Tiny, tmp_path: Path) -> None:
    manifest = convert(tiny("llava_next"), tmp_path / "p", "paddlenlp")
    parts = {name.split(".")[0] for name in manifest["left_out"]}
    assert parts == {"vision_tower", "multi_modal_projector", "image_newline"}
    assert not (tmp_path / "p" / "llava_hf" / "preprocessor_config.json").exists()


def test_files_that_paddlenlp_would_misread_are_put_aside(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(tiny("llava"), source)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{% generation %}x{% endgeneration %}"
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer.model").write_bytes(b"pieces")
    convert(source, tmp_path / "p", "paddlenlp")
    assert (tmp_path / "p" / "sentencepiece.bpe.model").read_bytes() == b"pieces"
    assert not (tmp_path / "p" / "chat_template.json").exists()
    own = json.loads((tmp_path / "p" / "tokenizer_config.json").read_text())
    assert "chat_template" not in own and own["tokenizer_class"] == tokenizer["tokenizer_class"]
    convert(tmp_path / "p", tmp_path / "llama", "llama")
    for name in ("tokenizer_config.json", "tokenizer.model", "chat_template.json"):
        assert (tmp_path / "llama" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("weights", ["bin", "ckpt"])
def test_other_formats_are_refused(tiny: Tiny, tmp_path: Path, weights: str) -> None:
    with pytest.raises(CheckpointError, match="pdparams or safetensors"):
        plan(open_source(tiny("llava")), "paddlenlp", tmp_path / "p", Options(weights=weights))


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 32}, "head_dim"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        (
            {"model_type": "qwen2", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling",
        ),
        ({"model_type": "mpt", "n_heads": 4, "d_model": 64}, "mpt"),
    ],
)
def test_models_that_paddlenlp_does_not_compute_are_refused(
    changes: dict[str, Any], word: str
) -> None:
    text = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, **changes}
    with pytest.raises(CheckpointError, match=word):
        flat_from_text({"text_config": text})


# --- there and back ------------------------------------------------------------------------------


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("text", ["llama", "llama3", "mistral", "qwen2"])
@pytest.mark.parametrize("fused", [False, True])
def test_from_hugging_face_and_back(tiny: Tiny, tmp_path: Path, text: str, fused: bool) -> None:
    convert(tiny("llava", text), tmp_path / "llama", "llama")
    convert(tmp_path / "llama", tmp_path / "p", "paddlenlp", Options(qkv_concat=fused))
    convert(tmp_path / "p", tmp_path / "again", "llama")
    assert compare(tmp_path / "llama", tmp_path / "again").equal
    held = {path.name for path in (tmp_path / "llama").iterdir()} - {"unillava_manifest.json"}
    assert held == {path.name for path in (tmp_path / "again").iterdir()} - {
        "unillava_manifest.json"
    }
    for name in held:
        first, second = ((tmp_path / side / name).read_bytes() for side in ("llama", "again"))
        assert first == second, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
        {"rope_scaling_type": "ntk", "rope_scaling_factor": 4.0},
        {"rope_scaling_type": "dynamic_ntk", "rope_scaling_factor": 2},
        {"torch_dtype": "float32", "use_cache": True},
    ],
)
def test_from_paddlenlp_and_back(tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    arrays = paddle_directory(tmp_path / "p", tiny("llava"), **changes)
    template = '{"conversation": ["{{user}}", "{{bot}}"], "query": "{{query}}", "system": null}'
    (tmp_path / "p" / "chat_template.json").write_text(template)
    (tmp_path / "p" / "sentencepiece.bpe.model").write_bytes(b"pieces")
    convert(tmp_path / "p", tmp_path / "llama", "llama")
    assert not (tmp_path / "llama" / "chat_template.json").exists()
    convert(tmp_path / "llama", tmp_path / "again", "paddlenlp")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "p")
    assert (tmp_path / "again" / "chat_template.json").read_text() == template
    assert (tmp_path / "again" / "sentencepiece.bpe.model").read_bytes() == b"pieces"
    assert_equal(layout.read_pdparams(tmp_path / "again" / "model_state.pdparams"), arrays)


def test_another_dtype_is_said_in_every_field(tiny: Tiny, tmp_path: Path) -> None:
    paddle_directory(tmp_path / "p", tiny("llava"), torch_dtype="float32")
    convert(tmp_path / "p", tmp_path / "half", "paddlenlp", Options(dtype="float16"))
    config = config_of(tmp_path / "half")
    assert config["dtype"] == config["torch_dtype"] == "float16"
    arrays = layout.read_pdparams(tmp_path / "half" / "model_state.pdparams")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}


# --- configurations ------------------------------------------------------------------------------


def test_absent_fields_are_paddlenlp_s_defaults() -> None:
    text = text_from_flat({"model_type": "llama"}, "llama", "x")
    assert (text["vocab_size"], text["num_key_value_heads"]) == (32000, 32)
    assert (text["rms_norm_eps"], text["rope_scaling"]) == (1e-6, None)
    assert (text["bos_token_id"], text["eos_token_id"], text["pad_token_id"]) == (1, 2, 0)
    text = text_from_flat({"model_type": "qwen2"}, "qwen2", "x")
    assert (text["vocab_size"], text["rope_theta"]) == (151936, 10000.0)


def test_ntk_is_a_larger_theta() -> None:
    flat = CONFIG | {"rope_scaling_type": "ntk", "rope_scaling_factor": 4.0}
    text = text_from_flat(flat, "llama", "x")
    assert text["rope_scaling"] is None
    assert text["rope_theta"] == pytest.approx(10000.0 * 4.0 ** (16 / 14), rel=1e-15)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"alibi": True}, "alibi"),
        ({"rope_scaling_type": "yarn"}, "yarn"),
        ({"rope_scaling_type": "linear", "rope_scaling_factor": "2"}, "rope_scaling_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        text_from_flat(CONFIG | changes, "llama", "config.json")


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "rope_scaling", "torch_dtype"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-2, 70000),
            st.floats(),
            st.text(max_size=5),
            st.sampled_from(["linear", "ntk", "dynamic_ntk", "llama3"]),
            st.lists(st.integers(), max_size=2),
            st.dictionaries(st.sampled_from(["rope_type", "factor"]), st.just("llama3")),
        ),
    ),
    st.sampled_from(["llama", "qwen2"]),
)
def test_any_configuration_is_read_or_refused(changes: dict[str, Any], base: str) -> None:
    with contextlib.suppress(CheckpointError):
        text = text_from_flat(CONFIG | changes, base, "config.json")
        json.dumps(text)
        assert text["model_type"] == base and text["num_hidden_layers"] > 0


SIZES = st.sampled_from([16, 64, 640, 4096])
TEXTS = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["llama", "qwen2"]),
        "num_attention_heads": st.sampled_from([1, 4, 8]),
        "num_key_value_heads": st.sampled_from([1, None]),
        "hidden_size": SIZES,
        "intermediate_size": SIZES,
        "vocab_size": SIZES,
        "num_hidden_layers": st.integers(1, 80),
        "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
        "rope_theta": st.floats(1e3, 1e7),
        "max_position_embeddings": st.integers(1, 2**20),
        "tie_word_embeddings": st.booleans(),
        "bos_token_id": st.integers(0, 15),
    },
)
SCALINGS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": st.floats(1, 16)}
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1, 16),
            "low_freq_factor": st.just(1.0),
            "high_freq_factor": st.just(4.0),
            "original_max_position_embeddings": st.integers(64, 8192),
        }
    ),
)


@settings(max_examples=150, deadline=None)
@given(TEXTS, SCALINGS)
def test_every_language_model_comes_back(text: dict[str, Any], scaling: dict | None) -> None:
    if text["model_type"] == "llama":
        text = text | {"rope_scaling": scaling}
    base, flat = flat_from_text({"text_config": text, "torch_dtype": "bfloat16"})
    again = text_from_flat(json.loads(json.dumps(flat)), base, "config.json")
    assert text_config({"text_config": again}) | {"architectures": None} == text_config(
        {"text_config": text}
    ) | {
        "architectures": None,
        "initializer_range": 0.02,
        "eos_token_id": again["eos_token_id"],
        "pad_token_id": 0,
    }


# --- damage --------------------------------------------------------------------------------------


def rewrite(path: Path, arrays: layout.Arrays) -> None:
    layout.write_pdparams(path / "model_state.pdparams", arrays)


def test_an_unknown_tensor_stops_it(tiny: Tiny, tmp_path: Path) -> None:
    arrays = paddle_directory(tmp_path / "p", tiny("llava"))
    rewrite(tmp_path / "p", arrays | {"llama.layers.0.self_attn.r_proj.weight": np.zeros(3)})
    with pytest.raises(CheckpointError, match="r_proj"):
        open_source(tmp_path / "p")
    options = Options(allow_unused=("*r_proj*",))
    assert open_source(tmp_path / "p", options).dropped == (
        "llama.layers.0.self_attn.r_proj.weight",
    )


@pytest.mark.parametrize(
    "absent, form", [("down_proj", "plain"), ("gate_up_fused_proj", "both"), ("qkv_proj", "qkv")]
)
def test_a_missing_tensor_stops_it(tiny: Tiny, tmp_path: Path, absent: str, form: str) -> None:
    arrays = paddle_directory(tmp_path / "p", tiny("llava"), form)
    rewrite(
        tmp_path / "p",
        {
            n: a
            for n, a in arrays.items()
            if f"layers.1.mlp.{absent}" not in n and f"layers.1.self_attn.{absent}" not in n
        },
    )
    with pytest.raises(CheckpointError, match=r"missing: language_model\.model\.layers\.1"):
        open_source(tmp_path / "p")


def test_a_fused_matrix_that_cannot_be_cut_stops_it(tiny: Tiny, tmp_path: Path) -> None:
    arrays = paddle_directory(tmp_path / "p", tiny("llava", "llama3"), "qkv")
    name = "llama.layers.2.self_attn.qkv_proj.weight"
    rewrite(tmp_path / "p", arrays | {name: arrays[name][:, :-1]})
    with pytest.raises(CheckpointError, match="groups"):
        open_source(tmp_path / "p")


def test_a_tied_head_that_is_another_is_found_when_it_is_read(tiny: Tiny, tmp_path: Path) -> None:
    arrays = paddle_directory(tmp_path / "p", tiny("llava", "qwen2"), base="qwen2")
    other = arrays["lm_head.weight"].copy()
    other[-1, -1] += 1
    rewrite(tmp_path / "p", arrays | {"lm_head.weight": other})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        convert(tmp_path / "p", tmp_path / "llama", "llama")
    assert not (tmp_path / "llama").exists()
    rewrite(tmp_path / "p", arrays | {"lm_head.weight": other.T})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_source(tmp_path / "p")
