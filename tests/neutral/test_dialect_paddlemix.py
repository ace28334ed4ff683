"""PaddleMIX's LLaVA, both ways, against tests/paddle_layout.py.

Paddle's own files are judged in tests/paddle, PaddleNLP's classes in scripts/paddlenlp_check.sh.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import paddle_layout as layout
from unillava.config import read_spec
from weight_convert.contents import look
from weight_convert.convert import convert, open_source, plan
from weight_convert.dialects import registry
from weight_convert.errors import CheckpointError
from weight_convert.source import Options
from weight_convert.verify import compare, verify

Tiny = Callable[..., Path]
MANIFEST = "unillava_manifest.json"
NEWLINE = "llama.image_newline"

V1_5: dict[str, Any] = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": 64,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_length": 4096,
    "max_position_embeddings": 1024,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "paddlenlp_version": None,
    "pretrain_mm_mlp_adapter": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": 640,
}
"""The fields of a released config.json (without mm_patch_merge_type), the sizes of a tiny one."""
V1_6: dict[str, Any] = V1_5 | {
    "_name_or_path": "llava-v1.6-vicuna-7b",
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_tower_lr": 2e-06,
    "tokenizer_model_max_length": 1024,
    "tokenizer_padding_side": "right",
    "unfreeze_mm_vision_tower": True,
}
QWEN: dict[str, Any] = {
    **V1_6,
    "architectures": ["LlavaQwenForCausalLM"],
    "bos_token_id": None,
    "eos_token_id": 578,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_type": "llava_qwen",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
PROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 28},
}


def paddle_arrays(
    source: Path, base: str = "llama", *, rows: int | None = None, linear: bool = False
) -> layout.Arrays:
    """A tiny LLaVA's tensors as PaddleMIX has them; `rows` of the vocabulary, or all."""
    arrays = layout.read_all_safetensors(source)
    config = json.loads((source / "config.json").read_text())
    text, clip = config["text_config"], "clip" in config["vision_config"]["model_type"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        whole = f"language_model.{name}"
        if whole in arrays:
            arrays[whole] = arrays[whole][:rows]
    return {
        **layout.language(
            arrays,
            text["num_attention_heads"],
            text["num_key_value_heads"],
            base=base,
            tied=text["tie_word_embeddings"],
        ),
        **(layout.vision if clip else layout.siglip)(arrays, base),
        **layout.projector(arrays, base, linear=linear),
        **layout.newline(arrays, base),
    }


@pytest.fixture
def tower(tiny: Tiny, tmp_path: Path) -> Path:
    """The tiny CLIP alone: what --vision names, because nobody knows such a tower."""
    convert(tiny("llava"), tmp_path / "tower", "clip")
    return tmp_path / "tower"


@pytest.fixture
def siglip(tiny: Tiny, tmp_path: Path) -> Path:
    convert(tiny("llava_next", "qwen2", "siglip"), tmp_path / "siglip", "siglip")
    return tmp_path / "siglip"


def write_directory(
    target: Path, config: dict[str, Any], source: Path, arrays: layout.Arrays | None = None
) -> Path:
    """A PaddleMIX checkpoint with a tiny LLaVA's tokenizer, and its tensors if no others."""
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, target / name)
    arrays = paddle_arrays(source) if arrays is None else arrays
    (target / "config.json").write_text(json.dumps(config))
    layout.write_pdparams(target / "model_state.pdparams", arrays)
    for mode in ("train", "eval"):
        folder = target / "processor" / mode
        folder.mkdir(parents=True)
        # As PaddleMIX writes it: not sorted, four spaces.
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=4))
    return target


def assert_equal(found: layout.Arrays, expected: layout.Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name


def read_all(path: Path, options: Options | None = None) -> layout.Arrays:
    return {name: t.read() for name, t in open_source(path, options).tensors.items()}


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def listed(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {MANIFEST}


# --- reading -------------------------------------------------------------------------------------


def test_llava_1_5_is_read(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    source = tiny("llava")
    path = write_directory(tmp_path / "p", V1_5, source)
    assert registry.recognise(look(path))[0].name == "paddlemix"
    assert_equal(read_all(path, Options(vision=tower)), layout.read_all_safetensors(source))
    config = open_source(path, Options(vision=tower)).config
    spec = read_spec(config)
    assert (spec.family, spec.image_mode, spec.has_newline) == ("llava", "pad", False)
    assert (spec.template, spec.feature_layers) == ("vicuna_v1", (-2,))
    assert config["text_config"]["rope_theta"] == 10000.0  # PaddleNLP's default
    assert spec.vision == read_spec(config_of(source)).vision


def test_llava_1_6_is_read(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    source = tiny("llava_next")
    path = write_directory(tmp_path / "p", V1_6, source)
    opened = open_source(path, Options(vision=tower))
    assert_equal(read_all(path, Options(vision=tower)), layout.read_all_safetensors(source))
    spec = read_spec(opened.config)
    assert (spec.family, spec.image_mode, spec.unpad, spec.has_newline) == (
        *("llava_next", "anyres", True, True),
    )
    assert spec.grid_pinpoints == ((56, 28), (28, 56), (56, 56), (28, 84), (84, 28))
    processor = json.loads(opened.files["preprocessor_config.json"])
    assert processor["image_grid_pinpoints"] == [list(pair) for pair in spec.grid_pinpoints]
    assert processor["image_processor_type"] == "LlavaNextImageProcessor"


def test_qwen_with_siglip_is_read(tiny: Tiny, siglip: Path, tmp_path: Path) -> None:
    source = tiny("llava_next", "qwen2", "siglip")
    path = write_directory(tmp_path / "p", QWEN, source, paddle_arrays(source, "qwen2"))
    opened = open_source(path, Options(vision=siglip))
    assert_equal(read_all(path, Options(vision=siglip)), layout.read_all_safetensors(source))
    spec = read_spec(opened.config)
    assert (spec.text.kind, spec.vision.kind, spec.template) == ("qwen2", "siglip", "qwen_1_5")
    assert spec.keep_class_token and spec.text.tie_embeddings


def test_the_newline_that_nothing_uses_is_left_out(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    arrays = paddle_arrays(tiny("llava"))
    garbage = np.frombuffer(np.random.default_rng(0).bytes(256), np.float32)
    path = write_directory(tmp_path / "p", V1_5, tiny("llava"), arrays | {NEWLINE: garbage})
    opened = open_source(path, Options(vision=tower))
    assert opened.dropped == (NEWLINE,) and NEWLINE in opened.notes[0]
    assert "image_newline" not in opened.tensors
    # PaddleMIX writes the class default into the file when it has trained.
    (path / "config.json").write_text(json.dumps(V1_5 | {"mm_patch_merge_type": "spatial_unpad"}))
    assert open_source(path, Options(vision=tower)).dropped == (NEWLINE,)


def test_tiles_without_a_stated_merge_have_a_newline(
    tiny: Tiny, tower: Path, tmp_path: Path
) -> None:
    """The class default, spatial_unpad, holds."""
    config = {key: value for key, value in V1_6.items() if key != "mm_patch_merge_type"}
    arrays = paddle_arrays(tiny("llava_next"))
    path = write_directory(tmp_path / "p", config, tiny("llava_next"), arrays)
    assert "image_newline" in open_source(path, Options(vision=tower)).tensors
    arrays.pop(NEWLINE)
    layout.write_pdparams(path / "model_state.pdparams", arrays)
    with pytest.raises(CheckpointError, match="missing: image_newline"):
        open_source(path, Options(vision=tower))


def test_a_linear_projector_is_read(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    source = tiny("llava", config={"unillava": {"projector": "linear"}})
    config = {key: value for key, value in V1_5.items() if key != "mm_projector_type"}
    path = write_directory(tmp_path / "p", config, source, paddle_arrays(source, linear=True))
    opened = open_source(path, Options(vision=tower))
    assert opened.config["unillava"]["projector"] == "linear"
    assert_equal(read_all(path, Options(vision=tower)), layout.read_all_safetensors(source))
    convert(source, tmp_path / "q", "paddlemix")
    found = layout.read_pdparams(tmp_path / "q" / "model_state.pdparams")
    assert_equal(found, paddle_arrays(source, linear=True))


@pytest.mark.parametrize("form", ["sharded", "safetensors", "no metadata", "ranks"])
def test_every_form_of_the_weights_is_read(
    tiny: Tiny, tower: Path, tmp_path: Path, form: str
) -> None:
    source = tiny("llava_next", dtype="bfloat16")
    arrays = paddle_arrays(source)
    path = write_directory(tmp_path / "p", V1_6 | {"dtype": "bfloat16"}, source)
    (path / "model_state.pdparams").unlink()
    if form == "sharded":
        layout.write_sharded_pdparams(path, arrays, 3)
    elif form == "ranks":
        for rank, part in enumerate(layout.split_ranks(arrays, 2, 4)):
            layout.write_pdparams(path / f"model_state.tp{rank:02d}.pdparams", part)
    else:
        metadata = {"format": "np"} if form == "safetensors" else None
        layout.write_safetensors(path / "model.safetensors", arrays, metadata)
    opened = open_source(path, Options(vision=tower))
    assert {tensor.dtype for tensor in opened.tensors.values()} == {"BF16"}
    assert_equal(read_all(path, Options(vision=tower)), layout.read_all_safetensors(source))


def test_fused_language_models_are_read(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    source = tiny("llava", "llama3")
    arrays = layout.read_all_safetensors(source)
    fused = layout.language(arrays, 4, 2, qkv=True, ffn=True)
    rest = {n: a for n, a in paddle_arrays(source).items() if "_tower" in n or "projector" in n}
    config = V1_5 | {"num_key_value_heads": 2, "dtype": "float32"}
    path = write_directory(tmp_path / "p", config, source, fused | rest)
    assert_equal(read_all(path, Options(vision=tower)), arrays)


def test_a_single_file_takes_the_rest_from_a_base(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next", "llama3")
    file = tmp_path / "checkpoint.pdparams"
    layout.write_pdparams(file, paddle_arrays(source))
    with pytest.raises(CheckpointError, match="--base"):
        open_source(file)
    opened = open_source(file, Options(base=source))
    assert_equal(read_all(file, Options(base=source)), layout.read_all_safetensors(source))
    assert opened.config == config_of(source)
    assert opened.files.keys() >= {"tokenizer.json", "preprocessor_config.json"}


def test_an_unknown_tower_asks_for_its_directory(tiny: Tiny, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "p", V1_5, tiny("llava"))
    with pytest.raises(CheckpointError, match="--vision"):
        open_source(path)


# --- vocabulary ----------------------------------------------------------------------------------


def bare_tokenizer(source: Path, target: Path) -> int:
    """The tokenizer of before llava-hf's conversion: no <image>, no <pad>. Returns its size."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    media = ("<image>", "<pad>")
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in media]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    decoder = settings["added_tokens_decoder"]
    kept = {n: t for n, t in decoder.items() if t["content"] not in media}
    settings |= {"added_tokens_decoder": kept, "pad_token": "<unk>", "extra_special_tokens": {}}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return config_of(source)["image_token_index"]


def test_rows_and_tokens_are_added_and_taken_away(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    source = tiny("llava")
    rows = config_of(source)["image_token_index"]
    arrays = paddle_arrays(source, rows=rows)
    path = write_directory(tmp_path / "p", V1_5 | {"vocab_size": rows}, source, arrays)
    assert bare_tokenizer(source, path) == rows
    convert(path, tmp_path / "hf", "hf", Options(vision=tower))
    config = config_of(tmp_path / "hf")
    assert config["image_token_index"] == rows and config["text_config"]["vocab_size"] == 640
    found = layout.read_all_safetensors(tmp_path / "hf")
    embedding = found["language_model.model.embed_tokens.weight"]
    assert np.array_equal(embedding[:rows], arrays["llama.embed_tokens.weight"])
    mean = arrays["llama.embed_tokens.weight"].astype(np.float64).mean(0)
    assert np.allclose(embedding[rows:], mean, atol=1e-7)
    read_spec(config)

    convert(tmp_path / "hf", tmp_path / "again", "paddlemix")
    assert config_of(tmp_path / "again") == config_of(path)
    assert_equal(layout.read_pdparams(tmp_path / "again" / "model_state.pdparams"), arrays)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        first, second = (
            json.loads((side / name).read_text()) for side in (path, tmp_path / "again")
        )
        assert first == second, name


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "safetensors"])
@pytest.mark.parametrize(
    "family, text, vision, base",
    [
        ("llava", "llama", "clip", "llama"),
        ("llava_next", "llama3", "clip", "llama"),
        ("llava_next", "mistral", "clip", "llama"),
        ("llava_next", "qwen2", "siglip", "qwen2"),
    ],
)
def test_what_is_written_is_paddlemix_s(
    tiny: Tiny,
    tmp_path: Path,
    weights: str | None,
    family: str,
    text: str,
    vision: str,
    base: str,
) -> None:
    source, target = tiny(family, text, vision), tmp_path / "p"
    convert(source, target, "paddlemix", Options(weights=weights, max_shard_bytes=10**9))
    if weights:
        found, _, metadata = layout.read_safetensors(target / "model.safetensors")
        assert metadata == {"format": "np"}
    else:
        found = layout.read_pdparams(target / "model_state.pdparams")
    assert_equal(found, paddle_arrays(source, base))
    assert verify(target).equal

    convert(target, tmp_path / "hf", "hf")
    assert compare(source, tmp_path / "hf").equal
    held = {name for name in listed(source) if "model" not in name}
    for name in held:
        assert (source / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    assert held == {name for name in listed(tmp_path / "hf") if "model" not in name}


def test_shards_are_written_with_their_index(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next")
    convert(source, tmp_path / "p", "paddlemix", Options(max_shard_bytes=200_000))
    index = json.loads((tmp_path / "p" / "model_state.pdparams.index.json").read_text())
    found: layout.Arrays = {}
    for file in sorted(set(index["weight_map"].values())):
        part = layout.read_pdparams(tmp_path / "p" / file)
        assert {index["weight_map"][name] for name in part} == {file}
        found |= part
    assert_equal(found, paddle_arrays(source))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())


READ_WITHOUT_DEFAULT = (
    *("mm_vision_tower", "mm_vision_select_layer", "mm_vision_select_feature", "mm_hidden_size"),
    *("pretrain_mm_mlp_adapter", "pretraining_tp", "image_aspect_ratio", "mm_use_im_start_end"),
    *("mm_patch_merge_type", "mm_projector_type", "mm_dense_connector_type"),
)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_configuration_is_complete(tiny: Tiny, tmp_path: Path, family: str) -> None:
    convert(tiny(family), tmp_path / "p", "paddlemix")
    config = config_of(tmp_path / "p")
    assert config.keys() >= set(READ_WITHOUT_DEFAULT)
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["model_type"] == "llava"
    # Whether PaddleMIX makes image_newline depends on it.
    assert ("unpad" in config["mm_patch_merge_type"]) == (family == "llava_next")
    processor = {
        mode: json.loads(
            (tmp_path / "p" / "processor" / mode / "preprocessor_config.json").read_text()
        )
        for mode in ("train", "eval")
    }
    assert processor["train"] == processor["eval"]
    assert processor["eval"]["image_processor_type"] == "CLIPImageProcessor"
    if family == "llava_next":
        pairs = config_of(tiny(family))["image_grid_pinpoints"]
        turned = [[width, height] for height, width in pairs]
        assert config["image_grid_pinpoints"] == turned
        assert processor["eval"]["image_grid_pinpoints"] == turned


def test_a_public_tower_gets_its_name_and_no_folder(tmp_path: Path, tiny: Tiny) -> None:
    """The shapes of CLIP-L/14-336 but for the number of layers."""
    vision = {"hidden_size": 1024, "image_size": 336, "patch_size": 14, "intermediate_size": 8}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 1}
    source = tiny(
        "llava",
        image_size=336,
        patch_size=14,
        config={"vision_config": vision, "vision_feature_layer": -1},
    )
    target = plan(open_source(source), "paddlemix", tmp_path / "p").target
    config = json.loads(target.documents["config.json"])
    assert config["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    assert not [name for name in target.documents if name.startswith("vision_tower/")]


def test_siglip_s_pooling_head_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(
        "llava_next", "qwen2", "siglip", config={"vision_config": {"vision_use_head": True}}
    )
    manifest = convert(source, tmp_path / "p", "paddlemix")
    assert manifest["left_out"]
    assert all(".vision_model.head." in name for name in manifest["left_out"])


@pytest.mark.parametrize(
    "family, config, word",
    [
        ("llava_next_video", {}, "video"),
        (
            "llava",
            {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}},
            "head",
        ),
        ("llava", {"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
        ("llava", {"vision_feature_layer": [-2, -1]}, "several layers"),
        ("llava", {"text_config": {"attention_bias": True}}, "attention_bias"),
    ],
)
def test_models_that_paddlemix_has_no_class_for_are_refused(
    tiny: Tiny, tmp_path: Path, family: str, config: dict[str, Any], word: str
) -> None:
    with pytest.raises(CheckpointError, match=word):
        plan(open_source(tiny(family, config=config)), "paddlemix", tmp_path / "p")


def test_a_part_is_refused(tower: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no language and no projector"):
        plan(open_source(tower), "paddlemix", tmp_path / "p")


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [V1_5, V1_6], ids=["1.5", "1.6"])
@pytest.mark.parametrize("weights", ["pdparams", "safetensors"])
def test_from_paddlemix_and_back(
    tiny: Tiny, tower: Path, tmp_path: Path, config: dict[str, Any], weights: str
) -> None:
    source = tiny("llava" if config is V1_5 else "llava_next")
    path = write_directory(tmp_path / "p", config, source)
    if weights == "safetensors":
        (path / "model_state.pdparams").unlink()
        layout.write_safetensors(path / "model.safetensors", paddle_arrays(source), None)
    template = '{"conversation": ["{{user}}", "{{bot}}"], "query": "{{query}}", "system": null}'
    (path / "chat_template.json").write_text(template)
    (path / "generation_config.json").write_text('{"max_length": 20}')
    convert(path, tmp_path / "hf", "hf", Options(vision=tower))
    assert "chat_template.json" not in listed(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again", "paddlemix")
    assert compare(path, tmp_path / "again", Options(vision=tower)).equal
    assert config_of(tmp_path / "again") == config
    settings = {"vision_tower/config.json", "vision_tower/preprocessor_config.json"}
    assert listed(tmp_path / "again") == listed(path) | settings
    for name in listed(path) - {"config.json", "model_state.pdparams", "model.safetensors"}:
        assert (path / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_from_the_original_and_back(tiny: Tiny, tmp_path: Path) -> None:
    """Two layouts without the tokens of llava-hf, with nothing canonical on the disk between."""
    source, original = tiny("llava_next", "llama3"), tmp_path / "original"
    convert(source, original, "original")
    convert(original, tmp_path / "p", "paddlemix")
    convert(tmp_path / "p", tmp_path / "again", "original")
    assert compare(original, tmp_path / "again").equal
    assert listed(original) == listed(tmp_path / "again")
    for name in listed(original):
        assert (original / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_what_was_changed_in_between_is_written(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "p", V1_6, tiny("llava_next"))
    convert(path, tmp_path / "hf", "hf", Options(vision=tower))
    config = config_of(tmp_path / "hf")
    config["image_grid_pinpoints"] = [[28, 84]]
    config["text_config"]["rope_theta"] = 500000.0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    options = Options(dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "again", "paddlemix", options)
    changed = {"image_grid_pinpoints": [[84, 28]], "rope_theta": 500000.0, "dtype": "bfloat16"}
    assert config_of(tmp_path / "again") == V1_6 | changed
    for mode in ("train", "eval"):
        file = tmp_path / "again" / "processor" / mode / "preprocessor_config.json"
        assert json.loads(file.read_text())["image_grid_pinpoints"] == [[84, 28]]


def test_a_changed_paddle_configuration_is_read(tiny: Tiny, tmp_path: Path) -> None:
    """The manifest's configuration is not taken for what the file says today."""
    convert(tiny("llava_next"), tmp_path / "p", "paddlemix")
    config = config_of(tmp_path / "p") | {"rope_theta": 500000.0, "image_aspect_ratio": "pad"}
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    spec = read_spec(open_source(tmp_path / "p").config)
    assert (spec.family, spec.image_mode, spec.has_newline) == ("llava", "pad", False)
    assert spec.text.rope.theta == 500000.0


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"mm_dense_connector_type": "dci"}, "dense connector"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature"),
        ({"image_grid_pinpoints": "none", "image_aspect_ratio": "anyres"}, "image_grid_pinpoints"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer"),
    ],
)
def test_configurations_that_cannot_be_used(
    tiny: Tiny, tower: Path, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    path = write_directory(tmp_path / "p", V1_5 | changes, tiny("llava_next"))
    with pytest.raises(CheckpointError, match=word):
        open_source(path, Options(vision=tower))


def test_unknown_and_missing_tensors_are_named(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    arrays = paddle_arrays(tiny("llava"))
    path = write_directory(
        tmp_path / "p", V1_5, tiny("llava"), arrays | {"llama.mm_projector.4.odd": np.zeros(2)}
    )
    with pytest.raises(CheckpointError, match=r"mm_projector\.4\.odd"):
        open_source(path, Options(vision=tower))
    lost = "llama.vision_tower.vision_tower.vision_model.transformer.layers.1.linear2.bias"
    layout.write_pdparams(
        path / "model_state.pdparams", {n: a for n, a in arrays.items() if n != lost}
    )
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.1\.mlp\.fc2\.bias"):
        open_source(path, Options(vision=tower))


def test_a_processor_that_is_no_json_is_named(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "p", V1_5, tiny("llava"))
    for data in (b"{", b"\xff\xfe", b"[1]"):
        (path / "processor" / "eval" / "preprocessor_config.json").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"eval/preprocessor_config\.json"):
            open_source(path, Options(vision=tower))


def test_old_processors_give_sizes_as_numbers(tiny: Tiny, tower: Path, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "p", V1_5, tiny("llava"))
    file = path / "processor" / "eval" / "preprocessor_config.json"
    file.write_text(json.dumps(PROCESSOR | {"size": 28, "crop_size": 28}))
    opened = open_source(path, Options(vision=tower))
    processor = json.loads(opened.files["preprocessor_config.json"])
    assert processor["size"] == {"shortest_edge": 28}
    assert processor["crop_size"] == {"height": 28, "width": 28}
