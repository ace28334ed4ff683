"""LLaVA-MOSS2 both ways, against a layout that is put together by loops over heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import parts_layout as layout
from tests.neutral.test_dialect_parts import JSON, arrays_of, recognised, tower_directory
from unillava.checkpoint import open_checkpoint
from unillava.config import read_spec
from unillava.errors import UnillavaError
from weight_convert.convert import convert, open_source
from weight_convert.errors import CheckpointError
from weight_convert.source import Options
from weight_convert.verify import compare, verify

Tiny = Callable[..., Path]
HEADS, KV_HEADS = 4, 2
DYNAMIC: dict[str, Any] = {
    "attention_bias": False,
    "num_key_value_heads": KV_HEADS,
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000.0,
}
README: dict[str, Any] = {
    "architectures": ["Moss2ForCausalLM"],
    "attn_implementation": "eager",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "image_mode_of_the_authors": "unknown fields stay",
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava_moss2",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 3,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_mm_proj": True,
    "vocab_size": 640,
}
"""config.json with the fields of LLaVA-MOSS2's README, at the size of the tests."""


@pytest.fixture(scope="module")
def moss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`: a tiny LLaVA with MOSS2's attention; `biased`: with biases; `clip`: their tower."""
    from unillava.tiny import build_tiny

    root = tmp_path_factory.mktemp("moss")
    for name, bias in (("hf", False), ("biased", True)):
        text = DYNAMIC | {"attention_bias": bias}
        config = {"text_config": text, "unillava": {"template": "llava_llama_2"}}
        build_tiny(root / name, "llava", "llama", config=config, max_shard_bytes=10**9)
    tower_directory(root / "clip", root / "hf")
    return root


def moss2_directory(
    target: Path, source: Path, *, tower: bool = True, config: dict[str, Any] | None = None
) -> layout.Arrays:
    """What LLaVA-MOSS2's stage 2 leaves, and config.json if one is given."""
    stored = layout.llava_moss2(layout.read_all(source), HEADS, KV_HEADS, tower=tower)
    layout.write_bin(target / "pytorch_model.bin", stored)
    if config is not None:
        layout.write_json(target / "config.json", config)
    return stored


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize("name", ["hf", "biased"])
def test_the_tensors_are_cut_apart_rightly(
    moss: Path, tmp_path: Path, name: str, tower: bool
) -> None:
    config = README | {"bias": name == "biased"}
    moss2_directory(tmp_path / "a", moss / name, tower=tower, config=config)
    layout.copy_files(moss / name, tmp_path / "a")
    assert recognised(tmp_path / "a") == ["moss2"]
    opened = open_source(tmp_path / "a", Options(vision=moss / "clip"))
    assert layout.same(arrays_of(opened), layout.read_all(moss / name))


def test_the_configuration_is_that_of_a_llama(moss: Path, tmp_path: Path) -> None:
    moss2_directory(tmp_path / "a", moss / "hf", config=README)
    layout.copy_files(moss / "hf", tmp_path / "a")
    source = open_source(tmp_path / "a", Options(vision=moss / "clip"))
    spec = read_spec(source.config)
    assert spec == read_spec(layout.read_json(moss / "hf" / "config.json"))
    assert (spec.text.kind, spec.text.rope.kind, spec.text.rope.factor) == ("llama", "dynamic", 2.0)
    assert spec.text.rope.original_max_position == 1024 and spec.text.rope.theta == 1e6
    assert spec.template == "llava_llama_2" and spec.image_mode == "square"
    checkpoint = open_checkpoint(tmp_path / "a", vision=moss / "clip")
    checkpoint.check()
    assert checkpoint.eos_token_ids == (2,)


def test_absent_fields_are_the_defaults_of_the_class(moss: Path, tmp_path: Path) -> None:
    """`bias` is true, and the rotary base 10000, if config.json does not say otherwise."""
    sparse = {
        key: value
        for key, value in README.items()
        if key not in ("bias", "rope_theta", "rope_scaling", "rms_norm_eps", "pad_token_id")
    }
    moss2_directory(tmp_path / "a", moss / "biased", config=sparse)
    source = open_source(tmp_path / "a", Options(vision=moss / "clip"))
    text = source.config["text_config"]
    assert (text["attention_bias"], text["rope_theta"], text["rope_scaling"]) == (True, 1e4, None)
    assert (text["rms_norm_eps"], text["pad_token_id"]) == (1e-6, 0)
    moss2_directory(tmp_path / "b", moss / "hf", config=sparse)
    with pytest.raises(CheckpointError, match=r"missing: .*q_proj\.bias"):
        open_source(tmp_path / "b", Options(vision=moss / "clip"))


def test_the_projector_is_what_the_weights_say(moss: Path, tmp_path: Path) -> None:
    """LLaVA-MOSS2's scripts leave `linear` in config.json; the file written says what is."""
    moss2_directory(tmp_path / "a", moss / "hf", config=README | {"mm_projector_type": "linear"})
    source = open_source(tmp_path / "a", Options(vision=moss / "clip"))
    assert read_spec(source.config).projector.depth == 2
    convert(tmp_path / "a", tmp_path / "hf", "hf", Options(vision=moss / "clip"))
    convert(tmp_path / "hf", tmp_path / "b", "moss2")
    assert layout.read_json(tmp_path / "b" / "config.json") == README


# --- a bare file -----------------------------------------------------------------------------


def moss2_alone(target: Path, source: Path, **changes: Any) -> layout.Arrays:
    """MOSS2's own directory: what its authors publish."""
    config = {key: value for key, value in README.items() if "mm_" not in key}
    stored = layout.moss2_part(layout.read_all(source), HEADS, KV_HEADS)
    layout.write_safetensors(target / "model.safetensors", stored)
    layout.write_json(target / "config.json", config | {"model_type": "moss2"} | changes)
    layout.copy_files(source, target)
    return stored


def test_stage_2_leaves_a_bare_file(moss: Path, tmp_path: Path) -> None:
    moss2_directory(tmp_path / "a", moss / "hf")
    with pytest.raises(CheckpointError, match="nothing says what model") as caught:
        open_source(tmp_path / "a")
    assert "--base" in str(caught.value)
    moss2_alone(tmp_path / "base", moss / "hf")
    options = Options(base=tmp_path / "base", vision=moss / "clip")
    expected = read_spec(layout.read_json(moss / "hf" / "config.json"))
    for path in (tmp_path / "a", tmp_path / "a" / "pytorch_model.bin"):
        source = open_source(path, options)
        assert read_spec(source.config) == expected
        assert set(layout.TOKENIZER) <= source.files.keys()
        assert layout.same(arrays_of(source), layout.read_all(moss / "hf"))
    convert(tmp_path / "a", tmp_path / "hf", "hf", options)
    open_checkpoint(tmp_path / "hf").check()
    # A base of another layout says as much.
    source = open_source(tmp_path / "a", Options(base=moss / "hf"))
    assert read_spec(source.config) == expected


def test_a_tower_that_is_nowhere(moss: Path, tmp_path: Path) -> None:
    moss2_directory(tmp_path / "a", moss / "hf", tower=False, config=README)
    with pytest.raises(CheckpointError, match="does not hold its vision tower") as caught:
        open_source(tmp_path / "a")
    assert "--vision" in str(caught.value)


# --- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("tower", [True, False])
def test_from_moss2_and_back(moss: Path, tmp_path: Path, tower: bool) -> None:
    """The directory comes back: the same tensors, config.json word for word, no other files."""
    stored = moss2_directory(tmp_path / "a", moss / "hf", tower=tower, config=README)
    layout.copy_files(moss / "hf", tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "hf", "hf", Options(vision=moss / "clip"))
    manifest = convert(tmp_path / "hf", tmp_path / "b", "moss2")
    assert layout.same(layout.read_bin(tmp_path / "b" / "pytorch_model.bin"), stored)
    names = {path.name for path in (tmp_path / "a").iterdir()} | {"unillava_manifest.json"}
    folder = set() if tower else {"vision_tower"}  # nothing is lost that was read from elsewhere
    assert {path.name for path in (tmp_path / "b").iterdir()} == names | folder
    for name in (*layout.TOKENIZER, "config.json"):
        one, other = ((tmp_path / x / name).read_text() for x in "ab")
        assert json.loads(one) == json.loads(other), name
    assert manifest["left_out"] == []
    options = Options(vision=moss / "clip") if tower else Options()
    assert verify(tmp_path / "b", options).equal
    if not tower:
        alone = layout.read_all(tmp_path / "b" / "vision_tower")
        assert layout.same(alone, layout.read_all(moss / "clip"))


def test_from_hf_and_back(moss: Path, tmp_path: Path) -> None:
    convert(moss / "hf", tmp_path / "a", "moss2")
    stored = layout.read_bin(tmp_path / "a" / "pytorch_model.bin")
    expected = layout.llava_moss2(layout.read_all(moss / "hf"), HEADS, KV_HEADS)
    assert layout.same(stored, expected)
    written = layout.read_json(tmp_path / "a" / "config.json")
    assert README.keys() - {"image_mode_of_the_authors"} <= written.keys()
    assert written["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    convert(tmp_path / "a", tmp_path / "hf", "hf")
    for path in (moss / "hf").iterdir():
        if path.suffix == ".json":
            assert path.read_bytes() == (tmp_path / "hf" / path.name).read_bytes(), path.name
    assert compare(moss / "hf", tmp_path / "hf").equal
    # Nothing of it hangs on the manifest but fields that change nothing.
    (tmp_path / "a" / "unillava_manifest.json").unlink()
    source = open_source(tmp_path / "a")
    assert read_spec(source.config) == read_spec(layout.read_json(moss / "hf" / "config.json"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tiny: Tiny, moss: Path, tmp_path: Path, dtype: str) -> None:
    source = tiny("llava", "llama", config={"text_config": DYNAMIC}, dtype=dtype)
    convert(source, tmp_path / "a", "moss2")
    expected = layout.llava_moss2(layout.read_all(source), HEADS, KV_HEADS)
    assert layout.same(layout.read_bin(tmp_path / "a" / "pytorch_model.bin"), expected)
    convert(source, tmp_path / "b", "moss2", Options(dtype="float32"))
    assert layout.read_json(tmp_path / "b" / "config.json")["torch_dtype"] == "float32"


# --- the language model alone ----------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["moss2", "internlm2"])
def test_the_language_model_alone(moss: Path, tmp_path: Path, model_type: str) -> None:
    stored = moss2_alone(tmp_path / "a", moss / "hf", model_type=model_type)
    assert recognised(tmp_path / "a") == ["moss2"]
    source = open_source(tmp_path / "a")
    assert source.parts == {"language"} and "vision_config" not in source.config
    convert(tmp_path / "a", tmp_path / "b", "moss2", Options(weights="safetensors"))
    assert layout.same(layout.read_all(tmp_path / "b"), stored)
    written = layout.read_json(tmp_path / "b" / "config.json")
    assert written == layout.read_json(tmp_path / "a" / "config.json")
    convert(tmp_path / "a", tmp_path / "llama", "llama")
    expected = layout.language_part(layout.read_all(moss / "hf"))
    assert layout.same(layout.read_all(tmp_path / "llama"), expected)
    convert(tmp_path / "llama", tmp_path / "c", "moss2", Options(weights="safetensors"))
    assert layout.same(layout.read_all(tmp_path / "c"), stored)


def test_what_is_left_out_is_named(tiny: Tiny, moss: Path, tmp_path: Path) -> None:
    options = Options(parts=frozenset({"language", "projector"}))
    manifest = convert(moss / "hf", tmp_path / "a", "moss2", options)
    assert manifest["left_out"] and all("vision_tower" in name for name in manifest["left_out"])
    stored = layout.read_bin(tmp_path / "a" / "pytorch_model.bin")
    assert not any("vision_tower" in name for name in stored)
    wide = {"vision_config": {"hidden_size": 64}, "unillava": {"projector": "identity"}}
    manifest = convert(tiny("llava", "llama", config=wide), tmp_path / "b", "moss2")
    assert any("vision_tower" in name for name in manifest["left_out"])
    assert layout.read_json(tmp_path / "b" / "config.json")["model_type"] == "moss2"


def test_a_projector_beside_the_weights_counts(moss: Path, tmp_path: Path) -> None:
    stored = moss2_directory(tmp_path / "a", moss / "hf", config=README)
    layout.copy_files(moss / "hf", tmp_path / "a")
    name = "model.mm_projector.0.weight"
    new = {name: stored[name] + 1, "model.tok_embeddings.weight": stored[name][:2]}
    layout.write_bin(tmp_path / "a" / "mm_projector.bin", new)
    expected = layout.read_all(moss / "hf")
    expected["multi_modal_projector.linear_1.weight"] = new[name]
    source = open_source(tmp_path / "a", Options(vision=moss / "clip"))
    assert layout.same(arrays_of(source), expected)


# --- what cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, text, changes, message",
    [
        ("llava", "qwen2", {}, "model_type 'qwen2'"),
        ("llava", "llama3", {}, "rope_scaling 'llama3'"),
        ("llava", "llama", {"text_config": {"mlp_bias": True}}, "mlp_bias True"),
        ("llava", "llama", {"text_config": {"head_dim": 32}}, "head_dim 32"),
        ("llava_next", "llama", {}, "tiles of large pictures"),
        ("llava", "llama", {"vision_feature_layer": [-2, -1]}, "features of several layers"),
        ("llava", "llama", {"projector_hidden_act": "silu"}, "another activation"),
        ("llava", "llama", {"multimodal_projector_bias": False}, "projectors without bias"),
    ],
)
def test_what_moss2_cannot_hold(
    tiny: Tiny, tmp_path: Path, family: str, text: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(tiny(family, text, config=changes), tmp_path / "x", "moss2")
    assert message in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_key_value_heads": 3}, "divide"),
        ({"num_hidden_layers": 4}, r"missing: .*layers\.3\."),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio"),
        ({"mm_vision_select_feature": "all"}, "mm_vision_select_feature"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_a_config_that_does_not_fit(
    moss: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    moss2_directory(tmp_path / "a", moss / "hf", config=README | changes)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "a", Options(vision=moss / "clip"))


def test_a_tensor_too_many_or_too_few(moss: Path, tmp_path: Path) -> None:
    stored = moss2_directory(tmp_path / "a", moss / "hf", config=README)
    options = Options(vision=moss / "clip")
    more = stored | {"model.layers.0.attention.wq.weight": stored["model.norm.weight"]}
    layout.write_bin(tmp_path / "a" / "pytorch_model.bin", more)
    with pytest.raises(CheckpointError, match=r"no rule for: model\.layers\.0\.attention\.wq"):
        open_source(tmp_path / "a", options)
    fewer = {name: a for name, a in stored.items() if name != "output.weight"}
    layout.write_bin(tmp_path / "a" / "pytorch_model.bin", fewer)
    with pytest.raises(CheckpointError, match=r"missing: language_model\.lm_head"):
        open_source(tmp_path / "a", options)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_config_of_any_content_is_an_error_or_read(
    moss: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzz_moss2"
    if not root.exists():
        moss2_directory(root, moss / "hf", config=README)
    config = dict(README)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(JSON)
    (root / "config.json").write_text(json.dumps(config))
    try:
        source = open_source(root, Options(vision=moss / "clip"))
    except CheckpointError:
        return
    assert source.tensors


@pytest.mark.parametrize("key", ["text_config", "vision_config", "model_type", "unillava"])
@pytest.mark.parametrize("value", [5, "x", [], {}, None, [{}]])
def test_a_damaged_manifest_changes_no_meaning(
    moss: Path, tmp_path: Path, key: str, value: Any
) -> None:
    moss2_directory(tmp_path / "a", moss / "hf", config=README)
    layout.copy_files(moss / "hf", tmp_path / "a")
    sound = layout.read_json(moss / "hf" / "config.json")
    manifest = {"config": sound | {key: value}, "memory": {}, "vocabulary": None}
    layout.write_json(tmp_path / "a" / "unillava_manifest.json", manifest)
    try:
        spec = read_spec(open_source(tmp_path / "a", Options(vision=moss / "clip")).config)
    except UnillavaError:
        return
    # Without a block "unillava" it stands for a model that names no template.
    assert replace(spec, template="llava_llama_2") == read_spec(sound)
