"""Opening checkpoint directories: what is read, and what each fault says."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from unillava.checkpoint import Checkpoint, open_checkpoint
from unillava.errors import CheckpointError, ConfigError
from unillava.spec import parameter_table
from weight_convert.canonical import EMBEDDING, HEAD
from weight_convert.dialects import hf
from weight_convert.storage.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    open_directory,
    write_shards,
)
from weight_convert.storage.tensor import Tensor

Tiny = Callable[..., Path]


@pytest.fixture
def directory(tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny checkpoint that may be changed."""
    return Path(shutil.copytree(tiny(), tmp_path / "checkpoint"))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    """Replace the weights by `change(name -> stored)`, giving name -> stored or array."""
    tensors = {
        name: (value.dtype, value.read().copy()) if isinstance(value, Tensor) else value
        for name, value in change(open_directory(directory)).items()
    }
    for path in directory.glob("model*"):
        path.unlink()
    table = {name: (code, array.shape) for name, (code, array) in tensors.items()}
    write_shards(directory, table, ((name, array) for name, (_, array) in tensors.items()))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def failure(path: Path | str, call: Callable[[Checkpoint], Any] = lambda c: c.check()) -> str:
    """The text of the CheckpointError of opening and then calling."""
    with pytest.raises(CheckpointError) as caught:
        call(open_checkpoint(path))
    return str(caught.value)


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_those_of_the_library(tiny: Tiny, dtype: str) -> None:
    checkpoint = open_checkpoint(tiny(dtype=dtype))
    checkpoint.check()
    assert checkpoint.shapes == parameter_table(checkpoint.spec)
    assert checkpoint.spec.dtype == dtype
    theirs = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        theirs |= dict(safetensors.deserialize(path.read_bytes()))
    seen = set()
    for name, array, is_bfloat16 in checkpoint.tensors():
        seen.add(name)
        assert is_bfloat16 == (dtype == "bfloat16")
        assert array.dtype == (np.uint16 if is_bfloat16 else np.dtype(dtype))
        assert array.tobytes() == bytes(theirs[name]["data"])
    assert seen == theirs.keys()


def test_a_directory_is_given_as_text_or_path(tiny: Tiny) -> None:
    assert open_checkpoint(str(tiny())).directory == open_checkpoint(tiny()).directory == tiny()


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("spelling", hf.SPELLINGS)
def test_every_spelling_is_read(tiny: Tiny, tmp_path: Path, vision: str, spelling: str) -> None:
    original = open_checkpoint(tiny(vision=vision))
    copy = Path(shutil.copytree(original.directory, tmp_path / "copy"))
    table = hf.SPELLINGS[spelling]
    rewrite(copy, lambda old: {hf.spelled_name(name, table): old[name] for name in old})
    assert hf.spelling_of(open_directory(copy)) == spelling
    respelled = open_checkpoint(copy)
    respelled.check()
    assert respelled.spec == original.spec
    arrays = {name: array for name, array, _ in respelled.tensors()}
    assert all(np.array_equal(arrays[name], array) for name, array, _ in original.tensors())


def test_buffers_of_old_files_are_left_out(directory: Path) -> None:
    inv_freq = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    position_ids = "vision_tower.vision_model.embeddings.position_ids"
    rewrite(
        directory,
        lambda old: (
            old
            | {
                inv_freq: ("F32", np.zeros(4, np.float32)),
                position_ids: ("I64", np.zeros((1, 5), np.int64)),
            }
        ),
    )
    checkpoint = open_checkpoint(directory)
    checkpoint.check()
    assert not {inv_freq, position_ids} & checkpoint.shapes.keys()


def test_one_tensor_in_two_spellings_is_refused(directory: Path) -> None:
    rewrite(directory, lambda old: old | {"model.image_newline": old["image_newline"]})
    assert "stored twice: image_newline" in failure(directory)


def test_a_repeated_tied_head_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny(text="qwen2"), tmp_path / "copy"))
    rewrite(copy, lambda old: old | {HEAD: old[EMBEDDING]})
    checkpoint = open_checkpoint(copy)
    checkpoint.check()
    assert HEAD not in checkpoint.shapes and checkpoint.spec.text.tie_embeddings


def test_another_head_than_the_tied_one_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny(text="qwen2"), tmp_path / "copy"))
    rewrite(copy, lambda old: old | {HEAD: ("F32", old[EMBEDDING].read() + 1)})
    text = failure(copy)
    assert "tie_word_embeddings" in text and "text_config" in text


def test_chat_templates_in_every_place(directory: Path) -> None:
    def template() -> str | None:
        return open_checkpoint(directory).chat_template

    (directory / "chat_template.json").unlink()
    assert template() is None
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    edit(directory / "tokenizer_config.json", lambda c: c.update(chat_template=named))
    assert template() == "D"
    edit(directory / "tokenizer_config.json", lambda c: c.update(chat_template="tokenizer's"))
    assert template() == "tokenizer's"
    edit(directory / "processor_config.json", lambda c: c.update(chat_template="processor's"))
    assert template() == "processor's"
    (directory / "chat_template.json").write_text('{"chat_template": "json"}')
    assert template() == "json"
    (directory / "chat_template.jinja").write_text("jinja 한글", encoding="utf-8")
    assert template() == "jinja 한글"


def test_processor_settings_of_both_generations(directory: Path) -> None:
    old = open_checkpoint(directory).processor_config
    image = json.loads((directory / "preprocessor_config.json").read_text())
    assert image.items() <= old.items()
    assert "patch_size" in old  # of processor_config.json
    nested = {"image_processor": {"do_resize": False}, "video_processor": {"size": 3}}
    edit(directory / "processor_config.json", lambda c: c.update(nested))
    new = open_checkpoint(directory).processor_config
    assert new["do_resize"] is False and new["video_processor"] == {"size": 3}
    assert "image_mean" not in new  # transformers 5 reads no other file then


def test_the_image_processor_tells_that_images_are_padded(tiny: Tiny, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("llava"), tmp_path / "copy"))
    assert open_checkpoint(copy).spec.image_mode == "square"
    pads = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    edit(copy / "preprocessor_config.json", lambda c: c.update(pads))
    assert open_checkpoint(copy).spec.image_mode == "pad"


def test_the_tokenizer_is_read_from_the_directory(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny())
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.convert_tokens_to_ids("<image>") == checkpoint.spec.image_token


def test_opening_loads_no_framework(tiny: Tiny) -> None:
    script = (
        "import sys\n"
        "from unillava.checkpoint import open_checkpoint\n"
        f"open_checkpoint({str(tiny())!r}).check()\n"
        "assert not {'torch', 'mindspore', 'paddle', 'transformers'} & sys.modules.keys()"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)


# --- not a checkpoint ----------------------------------------------------------------------------


def test_no_such_directory(tmp_path: Path) -> None:
    text = failure(tmp_path / "none")
    assert "there is no directory" in text and "llava-hf/llava-1.5-7b-hf" in text


def test_a_file_instead_of_a_directory(directory: Path) -> None:
    text = failure(directory / "config.json")
    assert "is a file without weights" in text and f"give {directory}" in text


def test_an_empty_directory(tmp_path: Path) -> None:
    assert "is empty" in failure(tmp_path)


def test_a_directory_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8\xff")
    text = failure(tmp_path)
    assert "cat.jpg" in text and "no known layout" in text and "mindformers" in text


def test_the_checkpoint_one_level_deeper_is_suggested(directory: Path) -> None:
    text = failure(directory.parent)
    assert f"did you mean {directory}?" in text


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x": 1}, protocol=4))


def gguf(path: Path) -> None:
    path.write_bytes(b"GGUF\x03")


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "GGUF": ({"model.gguf": gguf}, "GGUF holds quantised weights"),
    "another Hugging Face model": ({"config.json": {"model_type": "bert"}}, "model_type 'bert'"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_dialect_is_named(tmp_path: Path, name: str) -> None:
    files, message = FOREIGN[name]
    for file, content in files.items():
        if callable(content):
            content(tmp_path / file)
        else:
            (tmp_path / file).write_text(json.dumps(content))
    text = failure(tmp_path)
    assert message in text and "no known layout" in text


def test_a_pickle_that_calls_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "posix.mkdir" in failure(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_what_a_training_run_leaves_does_not_disturb(directory: Path) -> None:
    zipped(directory / "optimizer.pt")
    pickled(directory / "training_args.bin")
    open_checkpoint(directory).check()


# --- the hub -------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options["allow_patterns"]))
        return str(tiny())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    open_checkpoint("llava-hf/llava-1.5-7b-hf").check()
    ((hub_id, patterns),) = asked
    assert hub_id == "llava-hf/llava-1.5-7b-hf"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in patterns)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, **options: Any) -> str:
        raise OSError("We couldn't connect\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    text = failure("llava-hf/llava-1.5-7b-hf")
    assert "OSError: We couldn't connect" in text and "more" not in text.split("what to do")[0]
    assert "check the name and the network" in text


@pytest.mark.parametrize("path", ["/no/such/place", "./a/b", "a/b/c", "name", "../a/b"])
def test_what_looks_like_a_path_is_not_asked_for(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", pytest.fail)
    assert f"there is no directory {Path(path)}" in failure(path)


# --- damaged, incomplete, contradictory ----------------------------------------------------------


def test_a_missing_shard(directory: Path) -> None:
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    shard.unlink()
    assert shard.name in failure(directory)


def test_a_truncated_shard(directory: Path) -> None:
    shard = sorted(directory.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-4])
    text = failure(directory)
    assert f"{shard} is truncated" in text


def test_a_missing_index(directory: Path) -> None:
    (directory / INDEX_FILE).unlink()
    text = failure(directory)
    assert "holds no weights" in text and SINGLE_FILE in text


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", INDEX_FILE])
@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_json_that_cannot_be_read(directory: Path, name: str, content: str) -> None:
    (directory / name).write_text(content, errors="surrogateescape")
    assert name in failure(directory)


def test_an_unusable_configuration_names_directory_and_field(directory: Path) -> None:
    edit(directory / "config.json", lambda c: c["text_config"].update(hidden_act="mish"))
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(directory)
    assert f"{directory}: config.json: text_config.hidden_act" in str(caught.value)


SHAPES = {
    "vocabulary": ("text_config", {"vocab_size": 999}, EMBEDDING, ["text_config.vocab_size"]),
    "key heads": (
        "text_config",
        {"num_key_value_heads": 1},
        "language_model.model.layers.0.self_attn.k_proj.weight",
        ["text_config.num_key_value_heads * head_dim"],
    ),
    "feed-forward": (
        "text_config",
        {"intermediate_size": 4},
        "language_model.model.layers.0.mlp.gate_proj.weight",
        ["text_config.intermediate_size"],
    ),
    "image size": (
        "vision_config",
        {"image_size": 14},
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        ["vision_config.image_size / patch_size"],
    ),
    "tower width": (
        "vision_config",
        {"intermediate_size": 4},
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        ["vision_config.intermediate_size"],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_shapes_name_the_field(directory: Path, name: str) -> None:
    section, changes, tensor, fields = SHAPES[name]
    found = open_checkpoint(directory).shapes[tensor]
    edit(directory / "config.json", lambda c: c[section].update(changes))
    checkpoint = open_checkpoint(directory)
    expected = parameter_table(checkpoint.spec)[tensor]
    text = failure(directory)
    line = next(line for line in text.splitlines() if tensor in line)
    assert f"stored {list(found)}, config.json says {list(expected)}" in line
    assert line.endswith(f"see {', '.join(fields)}")


def test_missing_and_surplus_tensors_come_with_the_nearest_name(directory: Path) -> None:
    gate = "language_model.model.layers.1.mlp.gate_proj.weight"
    typo = gate.replace("gate_proj", "gates_proj")
    rewrite(
        directory,
        lambda old: {(typo if n == gate else n): t for n, t in old.items() if n != "image_newline"},
    )
    text = failure(directory)
    assert f"missing: {gate} (nearest: {typo})" in text
    assert f"surplus: {typo} (nearest: {gate})" in text
    assert "missing: image_newline\n" in text


@pytest.mark.parametrize(
    ("section", "layers"), [("text_config", 2), ("text_config", 5), ("vision_config", 2)]
)
def test_another_depth_is_said_in_one_line(directory: Path, section: str, layers: int) -> None:
    spec = open_checkpoint(directory).spec
    found = (spec.text if section == "text_config" else spec.vision).num_layers
    edit(directory / "config.json", lambda c: c[section].update(num_hidden_layers=layers))
    text = failure(directory)
    assert f"the weights have {found} blocks, {section}.num_hidden_layers says {layers}" in text
    assert text.count("\n") < 15


def test_a_projector_of_another_depth(directory: Path) -> None:
    edit(directory / "config.json", lambda c: c.update(unillava={"projector": "linear"}))
    assert "surplus: multi_modal_projector.linear_2.weight" in failure(directory)


@pytest.mark.parametrize("left", [[], ["vocab.json"], ["tokenizer_config.json"]])
def test_a_missing_tokenizer(directory: Path, left: list[str]) -> None:
    (directory / "tokenizer.json").unlink()
    for name in left:
        (directory / name).write_text("{}")
    open_checkpoint(directory).check()
    text = failure(directory, lambda checkpoint: checkpoint.tokenizer())
    assert "has no tokenizer" in text and "vocab.json + merges.txt" in text


def test_a_broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": 3}')
    text = failure(directory, lambda checkpoint: checkpoint.tokenizer())
    assert f"the tokenizer in {directory} cannot be used" in text


def test_a_weight_file_that_is_something_else(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / SINGLE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "not a sound safetensors file" in failure(directory)


def test_a_header_without_tensors(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / SINGLE_FILE).write_bytes(struct.pack("<Q", 2) + b"{}")
    text = failure(directory)
    assert "missing: vision_tower" in text and "more" in text
