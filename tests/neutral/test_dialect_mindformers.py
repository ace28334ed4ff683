"""MindFormers' layouts and MindSpore's files, both ways, against tests/mindformers_layout.py.

MindSpore itself judges in tests/mindspore/test_dialect_mindformers.py.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import mindformers_layout as layout
from tests.mindformers_layout import Arrays, assert_equal
from tests.real_configs import REAL_CONFIGS
from unillava.checkpoint import open_checkpoint
from unillava.config import read_spec
from unillava.errors import ConfigError
from unillava.loading import load_pipeline
from weight_convert import files
from weight_convert.contents import look
from weight_convert.convert import convert, open_source, plan
from weight_convert.dialects import registry, yaml_file
from weight_convert.dialects.mindformers_config import (
    describes_a_model,
    read_document,
    write_document,
    write_language_document,
)
from weight_convert.errors import CheckpointError
from weight_convert.source import Options
from weight_convert.verify import compare, verify

Tiny = Callable[..., Path]
MANIFEST = "unillava_manifest.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FAMILIES = ("llava", "llava_next", "llava_next_video")
TEXTS = ("llama", "llama3", "mistral", "qwen2")
MODELS = [*((family, "llama") for family in FAMILIES), *(("llava_next", t) for t in TEXTS[1:])]


def hub_arrays(directory: Path) -> Arrays:
    return {name: t.read() for name, t in open_source(directory).tensors.items()}


def stored_arrays(path: Path) -> Arrays:
    return {name: np.asarray(t.read()) for name, t in files.open_weights(path).items()}


def read_back(path: Path, options: Options | None = None) -> Arrays:
    return {name: t.read() for name, t in open_source(path, options).tensors.items()}


def text_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["text_config"]


LLAVA_NEXT_YAML = """\
# as research/llava_next has it for prediction, with sizes of a tiny model
run_mode: &run_mode 'predict'
model:
  model_config:
    type: LlavaNextConfig
    auto_register: llava_next_config.LlavaNextConfig
    stage: {stage} #1--Pretrain Stage for Adapter only; 2--Finetune Stage for full
    seq_length: &seq_length 1024
    param_init_type: "bfloat16"
    ignore_token_id: &ignore_token_id -100
    add_newline: &add_newline {newline}
    spatial_pool_mode: "average"
    spatial_pool_stride: 2
    vision_model:
      arch:
        type: LlavaVisionEncoder
      model_config:
        type: LlavaNextVisionConfig
        hidden_size: 32
        intermediate_size: 64
        num_hidden_layers: 3
        num_attention_heads: 2
        image_size: &image_size 28
        patch_size: &patch_size 7
        hidden_act: "quick_gelu"
        vision_feature_layer: -2
        vision_feature_select_strategy: &strategy "default"
    text_model:
      arch:
        type: LlamaForCausalLM
      model_config:
        type: LlamaConfig
        hidden_size: 64
        num_layers: 3
        num_heads: 4
        vocab_size: 640
        intermediate_size: 128
        rms_norm_eps: 1.0e-5
        bos_token_id: 1
        eos_token_id: 2
        pad_token_id: 0
  arch:
    type: LlavaNextVlm
processor:
  model_transform_template:
    patch_size: *patch_size
    image_processor:
      size:
        shortest_edge: *image_size
      image_grid_pinpoints: [ [ 28,56 ],[ 56,28 ],[ 56,56 ] ]
"""


def mindformers_directory(
    target: Path, source: Path, arrays: Arrays | None = None, stage: int = 2, newline: bool = True
) -> Arrays:
    """A MindFormers LLaVA-NeXT with the weights and tokenizer of a tiny one."""
    arrays = layout.llava(hub_arrays(source)) if arrays is None else arrays
    layout.write_ckpt(target / "llava.ckpt", arrays)
    text = LLAVA_NEXT_YAML.format(stage=stage, newline=newline)
    (target / "predict_tiny.yaml").write_text(text)
    for name in TOKENIZER:
        shutil.copy(source / name, target / name)
    return arrays


# --- reading -------------------------------------------------------------------------------------


def test_a_directory_as_mindformers_has_it(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next", dtype="bfloat16")
    mindformers_directory(tmp_path / "m", source)
    opened = open_source(tmp_path / "m")
    assert opened.dialect == "mindformers" and opened.dropped == ()
    assert_equal(read_back(tmp_path / "m"), hub_arrays(source))
    spec, ours = read_spec(opened.config), read_spec(open_source(source).config)
    assert spec.grid_pinpoints == ((28, 56), (56, 28), (56, 56))
    assert spec.image_token == ours.image_token and spec.dtype == "bfloat16"
    assert (spec.vision, spec.text, spec.projector) == (ours.vision, ours.text, ours.projector)
    assert {"preprocessor_config.json", "processor_config.json"} <= opened.files.keys()


def test_a_video_model_that_mindformers_trained(tiny: Tiny, tmp_path: Path) -> None:
    """No newline, one vision block less than the tower has, and the state of the optimizer."""
    source = tiny("llava_next_video")
    hub = hub_arrays(source)
    lost = [n for n in hub if n == "image_newline" or "encoder.layers.2." in n]
    left = {name: array for name, array in hub.items() if name not in lost}
    arrays = layout.llava(left)
    state = {f"{kind}.{n}": a + 1 for n, a in arrays.items() for kind in ("adam_m", "adam_v")}
    state |= {"accu_grads.image": np.zeros(3, np.float32), "loss_scale": np.float32([2])}
    state |= {n: np.array([7]) for n in ("global_step", "epoch_num", "step_num")}
    mindformers_directory(tmp_path / "m", source, arrays | state, stage=3, newline=False)
    opened = open_source(tmp_path / "m")
    assert set(opened.dropped) == set(state)
    assert_equal({n: t.read() for n, t in opened.tensors.items()}, left)
    spec = read_spec(opened.config)
    assert spec.family == "llava_next_video" and not spec.has_newline and not spec.unpad
    assert spec.vision.num_layers == 2 and spec.feature_layers == (-1,)
    assert spec.video is not None and spec.video.pool_position == "after_projector"
    assert spec.video_token == read_spec(open_source(source).config).video_token

    convert(tmp_path / "m", tmp_path / "hub", "hf")
    assert_equal(hub_arrays(tmp_path / "hub"), left)
    convert(tmp_path / "hub", tmp_path / "again", "mindformers")
    assert_equal(stored_arrays(tmp_path / "again"), arrays)
    name = "predict_tiny.yaml"
    assert (tmp_path / "again" / name).read_text() == (tmp_path / "m" / name).read_text()


def test_a_base_of_more_blocks_fits_too(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava")
    left = {n: a for n, a in hub_arrays(source).items() if "encoder.layers.2." not in n}
    file = layout.write_ckpt(tmp_path / "a.ckpt", layout.llava(left))
    opened = open_source(file, Options(base=source))
    assert opened.config["vision_config"]["num_hidden_layers"] == 2
    assert_equal({n: t.read() for n, t in opened.tensors.items()}, left)


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_single_files_take_their_configuration_from_a_base(
    tiny: Tiny, tmp_path: Path, form: str
) -> None:
    source = tiny("llava_next", dtype="float16")
    mindformers_directory(tmp_path / "m", source)
    file = tmp_path / "m" / "llava.ckpt"
    if form == "safetensors":
        convert(tmp_path / "m", tmp_path / "x.safetensors", "mindformers")
        file = tmp_path / "x.safetensors"
        Path(f"{file}.{MANIFEST}").unlink()
    with pytest.raises(CheckpointError, match="--base"):
        open_source(file)
    opened = open_source(file, Options(base=source))
    assert opened.config == open_source(source).config
    assert_equal(read_back(file, Options(base=source)), hub_arrays(source))
    named = open_source(file, Options(base=tmp_path / "m" / "predict_tiny.yaml"))
    assert named.config["text_config"]["num_attention_heads"] == 4


def test_partial_files_in_a_folder_are_merged(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next")
    hub = hub_arrays(source)
    parts = {
        "vision": {n: a for n, a in hub.items() if n.startswith("vision_tower.")},
        "language": {n: a for n, a in hub.items() if n.startswith("language_model.")},
    }
    for name, arrays in parts.items():
        file = layout.write_ckpt(tmp_path / "m" / f"{name}.ckpt", layout.llava(arrays))
        opened = open_source(file, Options(base=source))
        assert opened.parts == {name} and "model_type" not in opened.config
        assert_equal({n: t.read() for n, t in opened.tensors.items()}, arrays)
    (tmp_path / "m" / "ckpt_strategy.ckpt").write_bytes(b"\x08\x01a strategy file")
    opened = open_source(tmp_path / "m", Options(base=source))
    assert opened.parts == {"vision", "language"}
    assert_equal(
        read_back(tmp_path / "m", Options(base=source)), parts["vision"] | hub_language(hub)
    )
    shutil.copy(tmp_path / "m" / "vision.ckpt", tmp_path / "m" / "zwei.ckpt")
    with pytest.raises(CheckpointError, match="hold the same tensor"):
        open_source(tmp_path / "m", Options(base=source))


def hub_language(hub: Arrays) -> Arrays:
    return {name: array for name, array in hub.items() if name.startswith("language_model.")}


def test_a_projector_alone(tiny: Tiny, tmp_path: Path) -> None:
    """What stage 1 trains."""
    source = tiny("llava_next")
    hub = {n: a for n, a in hub_arrays(source).items() if n.startswith("multi_modal_projector.")}
    file = layout.write_ckpt(tmp_path / "stage1.ckpt", layout.llava(hub))
    opened = open_source(file, Options(base=source))
    assert opened.parts == {"projector"} and opened.config == open_source(source).config
    assert_equal({n: t.read() for n, t in opened.tensors.items()}, hub)


def test_a_whole_file_without_projector_is_incomplete(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next")
    arrays = layout.llava(hub_arrays(source))
    arrays = {n: a for n, a in arrays.items() if not n.startswith("adapter.")}
    mindformers_directory(tmp_path / "m", source, arrays)
    with pytest.raises(CheckpointError, match=r"missing: multi_modal_projector\.linear_1"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("form", ["plain", "grouped", "older"])
def test_language_models_alone(tiny: Tiny, tmp_path: Path, text: str, form: str) -> None:
    source = tiny("llava", text)
    heads, kv_heads = (text_of(source)[f"num_{k}_heads"] for k in ("attention", "key_value"))
    arrays = layout.llama(hub_arrays(source))
    if form != "plain":
        arrays = layout.fused(arrays, heads, kv_heads, plain=form == "older")
    file = layout.write_ckpt(tmp_path / "llama.ckpt", arrays)
    name = "mindformers-llama-plain" if form == "older" else None
    opened = open_source(file, Options(base=source), name)
    assert opened.dialect == (name or "mindformers-llama") and opened.parts == {"language"}
    expected = hub_language(hub_arrays(source))
    assert_equal({n: t.read() for n, t in opened.tensors.items()}, expected)


def test_fused_tensors_inside_a_llava(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next", "llama3")
    arrays = layout.fused(layout.llava(hub_arrays(source)), 4, 2)
    file = layout.write_ckpt(tmp_path / "a.ckpt", arrays)
    assert_equal(read_back(file, Options(base=source)), hub_arrays(source))


def test_the_tower_of_clip(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava")
    arrays = layout.clip(hub_arrays(source))
    file = layout.write_ckpt(tmp_path / "clip.ckpt", arrays)
    opened = open_source(file, Options(base=source))
    assert opened.dialect == "mindformers-clip" and len(opened.dropped) == 9
    tower = {n: a for n, a in hub_arrays(source).items() if n.startswith("vision_tower.")}
    assert_equal({n: t.read() for n, t in opened.tensors.items()}, tower)
    convert(file, tmp_path / "hub", "clip", Options(base=source))
    convert(tmp_path / "hub", tmp_path / "back.ckpt", "mindformers-clip")
    assert_equal(
        stored_arrays(tmp_path / "back.ckpt"),
        {n: a for n, a in arrays.items() if n.startswith("visual.") and n != "visual.proj"},
    )


def test_a_tied_head_that_is_stored_again_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava", "qwen2")
    arrays = layout.llama(hub_arrays(source))
    arrays["lm_head.weight"] = arrays["model.tok_embeddings.embedding_weight"]
    file = layout.write_ckpt(tmp_path / "q.ckpt", arrays)
    assert_equal(read_back(file, Options(base=source)), hub_language(hub_arrays(source)))
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    layout.write_ckpt(file, arrays)
    with pytest.raises(CheckpointError, match="another head"):
        open_source(file, Options(base=source))


# --- ranks ---------------------------------------------------------------------------------------


def save_ranks(output: Path, arrays: Arrays, folder: str = "checkpoint_network") -> None:
    """Two ranks: matrices cut by rows, everything else on both."""
    items: dict[str, Any] = {}
    for name, array in arrays.items():
        halves = array.ndim == 2 and len(array) % 2 == 0
        items[name] = {
            "dev_matrix": [2],
            "tensor_map": [0 if halves and axis == 0 else -1 for axis in range(array.ndim)],
            "param_split_shape": [],
            "field": 0,
            "opt_weight_shard_step": 0,
            "opt_weight_shard_size": 0,
        }
    for rank in range(2):
        part = {
            name: np.split(array, 2)[rank] if 0 in items[name]["tensor_map"] else array
            for name, array in arrays.items()
        }
        name = f"llava_rank_{rank}-network-1_10.ckpt"
        layout.write_ckpt(output / folder / f"rank_{rank}" / name, part)
    (output / "strategy").mkdir()
    document = {"parallel_strategy_item": {}, "parallel_layout_item": items}
    (output / "strategy" / "ckpt_strategy_rank_0.json").write_text(json.dumps(document))


def test_ranks_and_their_strategy(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next")
    hub = hub_arrays(source)
    save_ranks(tmp_path / "output", layout.llava(hub))
    network = tmp_path / "output" / "checkpoint_network"
    base = Options(base=source)
    for path in (tmp_path / "output", network):
        assert registry.recognise(look(path))[0].name == "mindformers"
        assert_equal(read_back(path, base), hub)
    strategy = (tmp_path / "output" / "strategy").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"(?s)2 ranks.*--strategy") as caught:
        open_source(network, base)
    assert "rank_0" in str(caught.value)
    assert_equal(read_back(network, Options(base=source, strategy=strategy)), hub)


def test_a_single_rank_needs_no_strategy(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava")
    layout.write_ckpt(tmp_path / "m" / "rank_0" / "a.ckpt", layout.llava(hub_arrays(source)))
    assert_equal(read_back(tmp_path / "m", Options(base=source)), hub_arrays(source))


def test_ranks_of_native_cells(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava")
    save_ranks(tmp_path / "output", hub_arrays(source), "checkpoint")
    opened = open_source(tmp_path / "output", Options(base=source))
    assert opened.dialect == "mindspore"
    assert_equal({n: t.read() for n, t in opened.tensors.items()}, hub_arrays(source))


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, text", MODELS)
def test_what_is_written_is_mindformers_s(
    tiny: Tiny, tmp_path: Path, family: str, text: str
) -> None:
    source = tiny(family, text)
    convert(source, tmp_path / "m", "mindformers")
    assert_equal(stored_arrays(tmp_path / "m"), layout.llava(hub_arrays(source)))
    document = yaml.safe_load((tmp_path / "m" / f"predict_{family}.yaml").read_text())
    assert describes_a_model(document)
    assert set(TOKENIZER) <= {path.name for path in (tmp_path / "m").iterdir()}
    assert verify(tmp_path / "m").equal and compare(source, tmp_path / "m").equal


@pytest.mark.parametrize("dtype, bits", [("float16", np.float16), ("bfloat16", np.uint16)])
def test_dtypes(tiny: Tiny, tmp_path: Path, dtype: str, bits: type) -> None:
    convert(tiny("llava"), tmp_path / "m", "mindformers", Options(dtype=dtype))
    assert {array.dtype for array in stored_arrays(tmp_path / "m").values()} == {np.dtype(bits)}
    document = yaml.safe_load((tmp_path / "m" / "predict_llava.yaml").read_text())
    assert document["model"]["model_config"]["param_init_type"] == dtype


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("form", ["plain", "grouped", "older"])
def test_language_models_are_written(tiny: Tiny, tmp_path: Path, text: str, form: str) -> None:
    source = tiny("llava", text)
    to = "mindformers-llama-plain" if form == "older" else "mindformers-llama"
    convert(source, tmp_path / "m", to, Options(qkv_concat=form != "plain"))
    expected = layout.llama(hub_arrays(source))
    if form != "plain":
        settings = text_of(source)
        heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
        expected = layout.fused(expected, heads, kv_heads, plain=form == "older")
    assert_equal(stored_arrays(tmp_path / "m"), expected)
    document = yaml.safe_load((tmp_path / "m" / "predict_llama.yaml").read_text())
    model = document["model"]["model_config"]
    assert model["qkv_concat"] == (form != "plain")
    assert model["qkv_has_bias"] == (text == "qwen2")
    opened = open_source(tmp_path / "m", dialect=to)
    assert opened.config["text_config"] == text_of(source)
    assert verify(tmp_path / "m", dialect=to).equal


@pytest.mark.parametrize("part", ["vision", "language"])
def test_partial_files_are_written(tiny: Tiny, tmp_path: Path, part: str) -> None:
    source = tiny("llava_next")
    options = Options(parts=frozenset({part}))
    for name in ("part.ckpt", "folder"):
        manifest = convert(source, tmp_path / name, "mindformers", options)
        assert manifest["left_out"]
    prefix = {"vision": "vision_encoder.", "language": "language_model."}[part]
    whole = layout.llava(hub_arrays(source))
    expected = {n: a for n, a in whole.items() if n.startswith(prefix)}
    assert_equal(stored_arrays(tmp_path / "part.ckpt"), expected)
    assert {p.name for p in tmp_path.glob("part*")} == {"part.ckpt", f"part.ckpt.{MANIFEST}"}
    assert (tmp_path / "folder" / f"llava_next_{part}.ckpt").is_file()
    (tmp_path / "folder" / MANIFEST).unlink()
    opened = open_source(tmp_path / "folder")
    assert opened.parts == {part} and f"{'text' if part == 'language' else part}_config" in (
        opened.config
    )


def test_shards_are_files_that_mindformers_merges(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny("llava"), tmp_path / "m", "mindformers", Options(max_shard_bytes=300_000))
    assert len(list((tmp_path / "m").glob("llava-0000?-of-0000?.ckpt"))) > 2
    assert compare(tiny("llava"), tmp_path / "m").equal


def test_safetensors_of_mindspore(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava", dtype="bfloat16")
    for to, expected in (
        ("mindformers", layout.llava(hub_arrays(source))),
        ("mindspore", hub_arrays(source)),
    ):
        convert(source, tmp_path / to, to, Options(weights="safetensors"))
        (path,) = (tmp_path / to).glob("*.safetensors")
        header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
        names = list(json.loads(header))
        assert json.loads(header)["__metadata__"] == {"format": "ms"}
        assert names == ["__metadata__", *sorted(expected)]
        assert_equal(stored_arrays(path), expected)
        assert open_source(tmp_path / to).dialect == to


# --- there and back ------------------------------------------------------------------------------


def small_files(directory: Path) -> dict[str, bytes]:
    skipped = (".safetensors", ".ckpt", ".index.json")
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if not path.name.endswith(skipped) and path.name != MANIFEST
    }


@pytest.mark.parametrize("to", ["mindformers", "mindspore"])
@pytest.mark.parametrize("family, text", MODELS)
def test_from_the_hub_and_back(tiny: Tiny, tmp_path: Path, to: str, family: str, text: str) -> None:
    source = tiny(family, text)
    convert(source, tmp_path / "m", to)
    convert(tmp_path / "m", tmp_path / "hub", "hf")
    config = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "hub" / "config.json").read_text()) == config
    assert small_files(tmp_path / "hub").keys() == small_files(source).keys()
    for name, data in small_files(source).items():
        assert name == "config.json" or small_files(tmp_path / "hub")[name] == data
    assert_equal(hub_arrays(tmp_path / "hub"), hub_arrays(source))
    convert(tmp_path / "hub", tmp_path / "again", to)
    assert small_files(tmp_path / "again") == small_files(tmp_path / "m")
    assert_equal(stored_arrays(tmp_path / "again"), stored_arrays(tmp_path / "m"))


def test_from_mindformers_and_back(tiny: Tiny, tmp_path: Path) -> None:
    arrays = mindformers_directory(tmp_path / "m", tiny("llava_next"))
    convert(tmp_path / "m", tmp_path / "hub", "hf")
    convert(tmp_path / "hub", tmp_path / "again", "mindformers")
    assert_equal(stored_arrays(tmp_path / "again"), arrays)
    given, got = small_files(tmp_path / "m"), small_files(tmp_path / "again")
    assert given.items() <= got.items()
    assert set(got) - set(given) == {"preprocessor_config.json", "processor_config.json"}


def test_a_manifest_of_something_else(tiny: Tiny, tmp_path: Path) -> None:
    """What cannot be in a YAML file was not written from there: the file itself counts."""
    source = tiny("llava_next")
    mindformers_directory(tmp_path / "m", source)
    plain = open_source(tmp_path / "m").config
    changes: list[Any] = [
        {"text_config": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}},
        {"text_config": {"model_type": "mpt"}},
        {"model_type": "other"},
        {"vision_config": {"model_type": "siglip_vision_model"}},
    ]
    for change in changes:
        (tmp_path / "m" / MANIFEST).write_text(json.dumps({"config": plain | change}))
        assert open_source(tmp_path / "m").config == plain


def test_unillava_opens_it(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next")
    mindformers_directory(tmp_path / "m", source)
    checkpoint = open_checkpoint(tmp_path / "m")
    checkpoint.check()
    assert checkpoint.dialect == "mindformers" and checkpoint.tokenizer().get_vocab()["<image>"]
    assert load_pipeline(checkpoint).images is not None


def test_a_change_reaches_the_yaml_file_that_was_read(tiny: Tiny, tmp_path: Path) -> None:
    mindformers_directory(tmp_path / "m", tiny("llava_next"))
    convert(tmp_path / "m", tmp_path / "hub", "hf")
    path = tmp_path / "hub" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rms_norm_eps"] = 1e-6
    path.write_text(json.dumps(config))
    convert(tmp_path / "hub", tmp_path / "again", "mindformers", Options(dtype="float16"))
    before = yaml.safe_load((tmp_path / "m" / "predict_tiny.yaml").read_text())
    after = yaml.safe_load((tmp_path / "again" / "predict_tiny.yaml").read_text())
    expected = copy.deepcopy(before)
    model = expected["model"]["model_config"]
    model["text_model"]["model_config"]["rms_norm_eps"] = 1e-6
    model |= dict.fromkeys(("param_init_type", "compute_dtype", "rotary_dtype"), "float16")
    assert after == expected


def test_each_is_recognised_by_one_dialect(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next")
    for to in ("mindformers", "mindspore", "mindformers-llama", "mindformers-clip"):
        convert(source, tmp_path / to, to)
        convert(source, tmp_path / f"{to}.ckpt", to)
        convert(source, tmp_path / f"{to}.safetensors", to)
        for path in tmp_path.glob(f"{to}*"):
            if not path.name.endswith(MANIFEST):
                found = [d.name for d in registry.dialects().values() if d.evidence(look(path))]
                assert found == [to], path


# --- configurations ------------------------------------------------------------------------------


def test_the_yaml_file_of_llava_next_video() -> None:
    """research/llava_next/llava_next_video_v1_7b/predict_…_stage3.yaml, what matters of it."""
    document = yaml.safe_load(
        """
        model:
          model_config:
            type: LlavaNextConfig
            stage: 3
            seq_length: 8192
            add_newline: False
            video_contains_pooler: True
            spatial_pool_mode: "average"
            spatial_pool_out_channels: 1024
            spatial_pool_stride: 2
            vision_model:
              model_config: {type: LlavaNextVisionConfig, hidden_size: 1024,
                intermediate_size: 4096, num_hidden_layers: 24, num_attention_heads: 16,
                image_size: 336, patch_size: 14, hidden_act: quick_gelu, num_queries: 576,
                vision_feature_layer: -2, vision_feature_select_strategy: default}
            text_model:
              model_config: {type: LlamaConfig, hidden_size: 4096, num_layers: 32, num_heads: 32,
                vocab_size: 32064, intermediate_size: 11008, rms_norm_eps: 1.0e-5,
                bos_token_id: 1, eos_token_id: 2, pad_token_id: 0, extend_method: "linear",
                scaling_factor: {factor: 2.5}, theta: 10000.0, max_position_embedding: 4096}
        """
    )
    config = read_document(document, "bfloat16", "the file")
    spec = read_spec(config | {"image_token_index": 32001, "video_token_index": 32000})
    hub = read_spec(REAL_CONFIGS["LLaVA-NeXT-Video-7B"])
    assert (spec.vision, spec.text, spec.projector) == (hub.vision, hub.text, hub.projector)
    assert (spec.feature_layers, spec.grid_pinpoints, spec.dtype) == (
        hub.feature_layers,
        hub.grid_pinpoints,
        "bfloat16",
    )


@pytest.mark.parametrize("name", [n for n in REAL_CONFIGS if "SigLIP" not in n])
def test_real_configurations_there_and_back(name: str) -> None:
    config = REAL_CONFIGS[name]
    document = write_document(config, ("vision", "projector", "newline", "language"))
    assert yaml.safe_load(yaml_file.dump(document)) == document
    back = read_document(document, config["torch_dtype"], name)
    media = {k: config[k] for k in ("image_token_index", "video_token_index") if k in config}
    found, expected = read_spec(back | media), read_spec(config)
    same = ("family", "vision", "projector", "feature_layers", "grid_pinpoints", "dtype")
    for field in same:
        assert getattr(found, field) == getattr(expected, field), field
    text = "llama" if expected.text.kind == "mistral" else expected.text.kind
    assert found.text == type(expected.text)(**{**vars(expected.text), "kind": text})


@pytest.mark.parametrize(
    "given, theta, scaling",
    [
        ({}, 1e4, None),
        ({"extend_method": "None", "scaling_factor": 1.0}, 1e4, None),
        ({"extend_method": "PI", "scaling_factor": 2}, 1e4, {"rope_type": "linear", "factor": 2.0}),
        ({"extend_method": "NTK", "scaling_factor": 4.0}, 4e4, None),
    ],
)
def test_extended_contexts(given: dict[str, Any], theta: float, scaling: Any) -> None:
    model = {"type": "LlamaConfig", "hidden_size": 64, "num_heads": 4, **given}
    config = read_document({"model": {"model_config": model}}, "float32", "x")
    text = config["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (theta, scaling)
    assert text["intermediate_size"] == 256  # 2/3 of four times the width, rounded up


def test_defaults_of_mindformers_classes() -> None:
    config = read_document({"model": {"model_config": {"type": "LlamaConfig"}}}, "float16", "x")
    text = config["text_config"]
    assert text["intermediate_size"] == 11008 and text["num_key_value_heads"] == 32
    assert text["max_position_embeddings"] == 2048 and text["vocab_size"] == 32000
    assert write_language_document(config)["model"]["model_config"]["num_layers"] == 32


DOCUMENT = yaml.safe_load(LLAVA_NEXT_YAML.format(stage=3, newline=True))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70000),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["factor", "type"]), st.integers(), max_size=2),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [path, *(place for key in value for place in _places(value[key], (*path, key)))]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_places(DOCUMENT)[1:]), VALUES), max_size=3), st.data())
def test_a_damaged_yaml_file_is_a_clear_error(
    changes: list[tuple[tuple[Any, ...], Any]], data: st.DataObject
) -> None:
    document = copy.deepcopy(DOCUMENT)
    for path, value in changes:
        inner = document
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[path[-1]] = value
    if data.draw(st.booleans()):
        extended = {"extend_method": "linear", "scaling_factor": data.draw(VALUES)}
        text = document["model"]
        for key in ("model_config", "text_model", "model_config"):
            text = text.get(key) if isinstance(text, dict) else None
        if isinstance(text, dict):
            text |= extended
    if not describes_a_model(document):
        return
    try:
        config = read_document(document, "float32", "x")
        if "model_type" in config:
            read_spec(config | {"image_token_index": 1, "video_token_index": 2})
    except (CheckpointError, ConfigError):
        pass


KEYS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=("Cs",))),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=5))
def test_pyyaml_reads_what_is_dumped(document: dict[str, Any]) -> None:
    assert yaml.safe_load(yaml_file.dump(document)) == document
    assert yaml_file.parse(yaml_file.dump(document), "x") == document


def test_yaml_that_is_none() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(8))}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text in (
        "a: [",
        "- 1",
        "!!python/object/apply:os.system ['true']",
        "a: 1\n" * 300_000,
        bomb,
    ):
        with pytest.raises(CheckpointError, match=r"^x (is|cannot)"):
            yaml_file.parse(text, "x")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, names",
    [
        ({"text_config": {"head_dim": 32}}, "head_dim 32"),
        ({"text_config": {"mlp_bias": True}}, "mlp_bias"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu'"),
        ({"text_config": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}}, "dynamic"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"unillava": {"projector": "linear"}}, "projector 'linear'"),
    ],
)
def test_what_mindformers_would_compute_otherwise(
    tiny: Tiny, tmp_path: Path, config: dict[str, Any], names: str
) -> None:
    with pytest.raises(CheckpointError, match="no class for this model") as caught:
        convert(tiny("llava", config=config), tmp_path / "m", "mindformers")
    assert names in str(caught.value) and not list(tmp_path.iterdir())


def test_a_sliding_window_and_siglip_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    window = tiny("llava", "mistral", config={"text_config": {"sliding_window": 8}})
    for source in (window, tiny("llava", vision="siglip")):
        with pytest.raises(CheckpointError, match="no class for this model"):
            convert(source, tmp_path / "m", "mindformers")
    convert(tiny("llava", vision="siglip"), tmp_path / "ours", "mindspore")
    assert compare(tiny("llava", vision="siglip"), tmp_path / "ours").equal


def test_options_that_do_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    opened = open_source(tiny("llava"))
    for options, message in (
        (Options(qkv_concat=True), "no fused form"),
        (Options(weights="bin"), "MindSpore does not read"),
        (Options(parts=frozenset({"newline"})), "none of the parts"),
    ):
        with pytest.raises(CheckpointError, match=message):
            plan(opened, "mindformers", tmp_path / "m", options)
    with pytest.raises(CheckpointError, match="none of the parts"):
        plan(opened, "mindspore", tmp_path / "m", Options(parts=frozenset({"newline"})))
    with pytest.raises(CheckpointError, match="MindSpore does not read"):
        plan(opened, "mindformers", tmp_path / "m.bin")


def test_a_file_needs_one_file_of_weights(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not written as one file") as caught:
        plan(open_source(tiny("llava")), "hf", tmp_path / "m.ckpt", Options(weights="bin"))
    assert "m.ckpt" in str(caught.value)
    convert(tiny("llava"), tmp_path / "m.bin", "hf", Options(max_shard_bytes=1000))
    assert_equal(stored_arrays(tmp_path / "m.bin"), hub_arrays(tiny("llava")))


@pytest.mark.parametrize("damage", ["missing", "unknown"])
def test_a_conversion_is_total(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    source = tiny("llava_next")
    arrays = layout.llava(hub_arrays(source))
    name = "vision_encoder.transformer.resblocks.1.attn.in_proj.weight"
    if damage == "missing":
        del arrays[name]
    else:
        arrays[f"{name}s"] = arrays[name]
    mindformers_directory(tmp_path / "m", source, arrays)
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "m")
    wanted = "encoder.layers.1.self_attn" if damage == "missing" else f"no rule for: {name}s"
    assert wanted in str(caught.value)
    pattern = {"missing": {"allow_missing": ("*.layers.1.self_attn.*",)}}.get(
        damage, {"allow_unused": (f"{name}s",)}
    )
    assert open_source(tmp_path / "m", Options(**pattern)).tensors


def test_several_yaml_files(tiny: Tiny, tmp_path: Path) -> None:
    mindformers_directory(tmp_path / "m", tiny("llava_next"))
    shutil.copy(tmp_path / "m" / "predict_tiny.yaml", tmp_path / "m" / "finetune_tiny.yaml")
    (tmp_path / "m" / "unrelated.yml").write_text("a: 1\n")
    with pytest.raises(CheckpointError, match=r"(?s)several YAML files.*--base") as caught:
        open_source(tmp_path / "m")
    assert "finetune_tiny.yaml, predict_tiny.yaml" in str(caught.value)
    opened = open_source(tmp_path / "m", Options(base=tmp_path / "m" / "finetune_tiny.yaml"))
    assert opened.memory["mindformers"]["name"] == "finetune_tiny.yaml"
    with pytest.raises(CheckpointError, match="no model of MindFormers"):
        open_source(tmp_path / "m", Options(base=tmp_path / "m" / "unrelated.yml"))


def test_without_pyyaml_a_manifest_serves(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    source = tiny("llava")
    convert(source, tmp_path / "m", "mindformers")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert open_source(tmp_path / "m").config == open_source(source).config
    convert(tmp_path / "m", tmp_path / "hub", "hf")
    convert(tmp_path / "hub", tmp_path / "again", "mindformers")
    (tmp_path / "m" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="PyYAML is not installed"):
        open_source(tmp_path / "m")
