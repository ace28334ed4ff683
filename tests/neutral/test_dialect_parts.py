"""Towers, language models and projectors on their own, composing and splitting."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import parts_layout as layout
from unillava.checkpoint import open_checkpoint
from unillava.config import read_spec
from unillava.data.images import ImageProcessor
from weight_convert.cast import to_float
from weight_convert.compose import compose
from weight_convert.contents import look
from weight_convert.convert import carry_out, convert, open_source, plan, rows
from weight_convert.dialects import registry
from weight_convert.dialects.language import halves
from weight_convert.errors import CheckpointError
from weight_convert.mapping import derive
from weight_convert.source import Options, Source
from weight_convert.storage.tensor import Tensor
from weight_convert.verify import compare, verify

Tiny = Callable[..., Path]
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXTS = ("llama", "llama3", "mistral", "qwen2")


def arrays_of(source: Source) -> layout.Arrays:
    return {name: tensor.read() for name, tensor in source.tensors.items()}


def recognised(path: Path) -> list[str]:
    """Every dialect whose evidence holds: there must be one alone."""
    contents = look(path)
    return [name for name, one in registry.dialects().items() if one.evidence(contents)]


def tower_directory(
    target: Path, source: Path, *, prefix: str = "vision_model.", whole: bool = False
) -> layout.Arrays:
    """A tower as transformers saves it: alone, or within the model of its text side."""
    vision = layout.read_json(source / "config.json")["vision_config"]
    kind = vision["model_type"].split("_")[0]
    stored = layout.vision_part(layout.read_all(source), prefix)
    config: dict[str, Any] = {"architectures": [f"{kind.title()}VisionModel"], **vision}
    if kind == "clip":
        config["architectures"] = ["CLIPVisionModel"]
    if whole:
        config = {"model_type": kind, "text_config": {"hidden_size": 8}, "vision_config": vision}
        extra = {
            "logit_scale": np.ones((), np.float32),
            "text_model.embeddings.token_embedding.weight": np.ones((9, 8), np.float32),
            "visual_projection.weight": np.ones((8, 32), np.float32),
            "vision_model.embeddings.position_ids": np.ones((1, 17), np.float32),
        }
        stored = stored | extra
    layout.write_json(target / "config.json", config | {"torch_dtype": "float32"})
    layout.write_safetensors(target / "model.safetensors", stored)
    return stored


def language_directory(target: Path, source: Path, *, weights: str = "safetensors") -> None:
    """A language model as transformers 4 saves it, with the tokenizer of the tiny LLaVA."""
    config = layout.read_json(source / "config.json")["text_config"]
    stored = layout.language_part(layout.read_all(source))
    if weights == "safetensors":
        layout.write_safetensors(target / "model.safetensors", stored)
    else:
        layout.write_bin(target / "pytorch_model.bin", stored)
    layout.write_json(target / "config.json", config)
    layout.copy_files(source, target)


# --- towers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_a_tower_is_read_and_written_bit_by_bit(
    tiny: Tiny, tmp_path: Path, kind: str, prefix: str
) -> None:
    source = tiny(vision=kind, family="llava")
    tower_directory(tmp_path / "a", source, prefix=prefix)
    assert recognised(tmp_path / "a") == [kind]
    opened = open_source(tmp_path / "a")
    expected = layout.part(layout.read_all(source), "vision_tower.", "vision_tower.")
    assert layout.same(arrays_of(opened), expected)
    assert opened.parts == {"vision"} and set(opened.config) == {"torch_dtype", "vision_config"}
    convert(tmp_path / "a", tmp_path / "b", kind)
    assert layout.same(layout.read_all(tmp_path / "b"), layout.vision_part(layout.read_all(source)))
    files = [(tmp_path / x / "config.json").read_bytes() for x in "ab"]
    assert files[0] == files[1]
    assert verify(tmp_path / "b").equal


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_text_side_is_left_out_and_named(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    source = tiny(vision=kind, family="llava")
    tower_directory(tmp_path / "a", source, whole=True)
    opened = open_source(tmp_path / "a")
    assert opened.dialect == kind
    assert sorted(opened.dropped) == [
        "logit_scale",
        "text_model.embeddings.token_embedding.weight",
        "vision_model.embeddings.position_ids",
        "visual_projection.weight",
    ]
    convert(tmp_path / "a", tmp_path / "b", kind)
    config = layout.read_json(tmp_path / "b" / "config.json")
    assert config["model_type"] == f"{kind}_vision_model" and "text_config" not in config
    assert config["num_channels"] == 3 and config["layer_norm_eps"] > 0  # complete


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_out_of_a_whole_model(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    source = tiny(vision=kind, family="llava_next")
    manifest = convert(source, tmp_path / "tower", kind)
    assert manifest["left_out"] and all("vision" not in name for name in manifest["left_out"])
    assert layout.same(
        layout.read_all(tmp_path / "tower"), layout.vision_part(layout.read_all(source))
    )
    processor = layout.read_json(tmp_path / "tower" / "preprocessor_config.json")
    whole = layout.read_json(source / "preprocessor_config.json")
    assert processor["image_mean"] == whole["image_mean"]
    assert processor["image_processor_type"] == (
        "CLIPImageProcessor" if kind == "clip" else "SiglipImageProcessor"
    )
    assert not {"image_grid_pinpoints", "do_pad", "aspect_ratio_setting"} & processor.keys()


def test_a_tower_of_the_other_kind_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot hold this vision tower") as caught:
        convert(tiny(vision="siglip", family="llava"), tmp_path / "x", "clip")
    assert caught.value.fix == "--to siglip"
    with pytest.raises(CheckpointError, match="no vision tower"):
        language_directory(tmp_path / "llm", tiny())
        convert(tmp_path / "llm", tmp_path / "y", "clip")


def test_a_bare_tower_file_borrows_its_configuration(tiny: Tiny, tmp_path: Path) -> None:
    tower_directory(tmp_path / "a", tiny())
    path = tmp_path / "a" / "model.safetensors"
    with pytest.raises(CheckpointError, match="nothing says what model"):
        open_source(path)
    opened = open_source(path, Options(base=tiny()))
    assert opened.dialect == "clip" and len(opened.tensors) == len(layout.read_all(path.parent))


def test_a_tower_that_does_not_fit_its_config(tiny: Tiny, tmp_path: Path) -> None:
    tower_directory(tmp_path / "a", tiny())
    config = layout.read_json(tmp_path / "a" / "config.json")
    layout.write_json(tmp_path / "a" / "config.json", config | {"num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match=r"layers\.3\."):
        open_source(tmp_path / "a")


# --- language models -------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_language_model_is_read_and_written(
    tiny: Tiny, tmp_path: Path, text: str, weights: str
) -> None:
    source = tiny(text=text, family="llava", dtype="bfloat16")
    language_directory(tmp_path / "a", source, weights=weights)
    assert recognised(tmp_path / "a") == ["llama"]
    opened = open_source(tmp_path / "a")
    whole = layout.read_all(source)
    assert layout.same(arrays_of(opened), layout.part(whole, "language_model.", "language_model."))
    convert(tmp_path / "a", tmp_path / "b", "llama", Options(max_shard_bytes=100_000))
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert layout.same(layout.read_all(tmp_path / "b"), layout.language_part(whole))
    for name in ("config.json", *layout.TOKENIZER):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = opened.config | {"model_type": "llava", "image_token_index": 3}
    assert read_spec(config).text == read_spec(layout.read_json(source / "config.json")).text


def test_a_head_that_repeats_a_tied_embedding(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(text="qwen2", family="llava")
    stored = layout.language_part(layout.read_all(source))
    config = layout.read_json(source / "config.json")["text_config"]
    layout.write_json(tmp_path / "a" / "config.json", config)
    twice = stored | {"lm_head.weight": stored["model.embed_tokens.weight"]}
    layout.write_safetensors(tmp_path / "a" / "model.safetensors", twice)
    assert "language_model.lm_head.weight" not in open_source(tmp_path / "a").tensors
    twice["lm_head.weight"] = twice["lm_head.weight"] + 1
    layout.write_safetensors(tmp_path / "a" / "model.safetensors", twice)
    with pytest.raises(CheckpointError, match="another head"):
        open_source(tmp_path / "a")


def test_the_spelling_of_transformers_5_comes_back(tiny: Tiny, tmp_path: Path) -> None:
    language_directory(tmp_path / "a", tiny(text="llama3"))
    config = layout.read_json(tmp_path / "a" / "config.json")
    rope = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    config |= {"rope_parameters": rope, "dtype": config.pop("torch_dtype")}
    layout.write_json(tmp_path / "a" / "config.json", config)
    text = open_source(tmp_path / "a").config["text_config"]
    assert text["rope_theta"] == 500000.0 and text["rope_scaling"]["factor"] == 8.0
    assert text["torch_dtype"] == "float32" and "rope_parameters" not in text
    convert(tmp_path / "a", tmp_path / "b", "llama")
    assert layout.read_json(tmp_path / "b" / "config.json") == config
    convert(tmp_path / "a", tmp_path / "c", "llama", Options(dtype="bfloat16"))
    changed = layout.read_json(tmp_path / "c" / "config.json")
    assert changed.pop("torch_dtype") == "bfloat16"
    assert changed == {key: value for key, value in config.items() if key != "torch_dtype"}


def test_what_is_no_plain_language_model_is_not_taken_for_one(tiny: Tiny, tmp_path: Path) -> None:
    language_directory(tmp_path / "a", tiny())
    stored = layout.read_all(tmp_path / "a")
    config = layout.read_json(tmp_path / "a" / "config.json")
    layout.write_json(tmp_path / "a" / "config.json", config | {"model_type": "mixtral"})
    assert "llama" not in recognised(tmp_path / "a")
    layout.write_json(tmp_path / "a" / "config.json", config)
    more = stored | {"model.mm_projector.weight": np.ones((4, 4), np.float32)}
    layout.write_safetensors(tmp_path / "a" / "model.safetensors", more)
    assert "llama" not in recognised(tmp_path / "a")
    lacking = {name: a for name, a in stored.items() if name != "model.norm.weight"}
    layout.write_safetensors(tmp_path / "a" / "model.safetensors", lacking)
    with pytest.raises(CheckpointError, match=r"missing: language_model\.model\.norm\.weight"):
        open_source(tmp_path / "a")
    surplus = stored | {"model.layers.0.self_attn.q_norm.weight": stored["model.norm.weight"]}
    layout.write_safetensors(tmp_path / "a" / "model.safetensors", surplus)
    with pytest.raises(CheckpointError, match=r"no rule for: .*q_norm"):
        open_source(tmp_path / "a")


# --- Meta's files ----------------------------------------------------------------------------

PARAMS = {
    "dim": 64,
    "multiple_of": 256,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": -1,
}


@pytest.fixture(scope="module")
def meta_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, layout.Arrays]:
    """A tiny LLaVA over a LLaMA with two key/value heads, and its arrays."""
    from unillava.tiny import build_tiny

    text = {"num_key_value_heads": 2, "rope_theta": 500000.0, "max_position_embeddings": 8192}
    path = tmp_path_factory.mktemp("meta") / "llava"
    build_tiny(path, "llava", "llama", config={"text_config": text})
    return path, layout.read_all(path)


def meta_directory(target: Path, ranks: list[layout.Arrays], params: dict[str, Any]) -> Path:
    for number, arrays in enumerate(ranks):
        layout.write_bin(target / f"consolidated.{number:02}.pth", arrays)
    layout.write_json(target / "params.json", params)
    return target


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("by_rows", [True, False])
def test_metas_files_are_read(
    tmp_path: Path, meta_model: tuple[Path, layout.Arrays], count: int, by_rows: bool
) -> None:
    source, arrays = meta_model
    stored = layout.meta_part(arrays, 4, 2)
    ranks = layout.meta_ranks(stored, count, rows_of_embedding=by_rows)
    for rank in ranks:
        rank["rope.freqs"] = np.ones(8, np.float32)
    path = meta_directory(tmp_path / "m", ranks, PARAMS)
    assert recognised(path) == ["meta"]
    opened = open_source(path)
    assert layout.same(arrays_of(opened), layout.part(arrays, "language_model.", "language_model."))
    whole = layout.read_json(source / "config.json")
    config = whole | {"text_config": opened.config["text_config"]}
    assert read_spec(config).text == read_spec(whole).text
    convert(path, tmp_path / "hf", "llama")
    assert layout.same(layout.read_all(tmp_path / "hf"), layout.language_part(arrays))
    with pytest.raises(CheckpointError, match="only be read"):
        convert(source, tmp_path / "x", "meta")


def test_metas_files_that_cannot_be_used(
    tmp_path: Path, meta_model: tuple[Path, layout.Arrays]
) -> None:
    _, arrays = meta_model
    stored = layout.meta_part(arrays, 4, 2)
    path = meta_directory(tmp_path / "a", [stored], PARAMS | {"use_scaled_rope": True})
    with pytest.raises(CheckpointError, match="use_scaled_rope"):
        open_source(path)
    base = tmp_path / "base"
    language_directory(base, meta_model[0])
    assert open_source(path, Options(base=base)).files.keys() == set(layout.TOKENIZER)
    path = meta_directory(tmp_path / "b", [stored], PARAMS | {"n_heads": 5})
    with pytest.raises(CheckpointError, match="cannot be 5 heads"):
        open_source(path)
    ranks = layout.meta_ranks(stored, 2, rows_of_embedding=True)
    del ranks[1]["norm.weight"]
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_source(meta_directory(tmp_path / "c", ranks, PARAMS))


@given(heads=st.integers(1, 5), half=st.integers(1, 6), tail=st.sampled_from([(), (3,)]))
def test_halves_and_pairs(heads: int, half: int, tail: tuple[int, ...]) -> None:
    array = np.arange(heads * 2 * half * math.prod(tail)).reshape(-1, *tail).astype(np.int32)
    tensor = Tensor("I32", array.shape, lambda: array, ())
    (stored,) = halves(heads).to_stored([derive([tensor], array.shape, lambda a: a, "x")])
    assert np.array_equal(stored.read(), layout.interleave(array, heads))
    (back,) = halves(heads).to_canonical([stored])
    assert np.array_equal(back.read(), array)


# --- splitting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, text, vision",
    [
        ("llava", "mistral", "siglip"),
        ("llava_next", "llama", "clip"),
        ("llava_next_video", "qwen2", "clip"),
    ],
)
def test_split_and_joined_nothing_has_changed(
    tiny: Tiny, tmp_path: Path, family: str, text: str, vision: str
) -> None:
    source = tiny(family, text, vision, dtype="bfloat16", max_shard_bytes=10**9)
    convert(source, tmp_path / "parts", "parts")
    assert recognised(tmp_path / "parts") == ["parts"]
    assert verify(tmp_path / "parts").equal and compare(source, tmp_path / "parts").equal
    whole = layout.read_all(source)
    parts = tmp_path / "parts"
    assert layout.same(layout.read_all(parts / "vision"), layout.vision_part(whole))
    assert layout.same(layout.read_all(parts / "language"), layout.language_part(whole))
    stored = layout.read_bin(parts / "projector" / "mm_projector.bin")
    assert layout.same(stored, layout.projector_part(whole))
    assert recognised(parts / "vision") == [vision] and recognised(parts / "language") == ["llama"]
    convert(parts, tmp_path / "back", "hf")
    held = {path.name for path in source.iterdir() if not path.name.startswith("model")}
    for name in held:
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    assert layout.same(layout.read_all(tmp_path / "back"), whole)
    convert(tmp_path / "back", tmp_path / "again", "parts")
    for path in parts.rglob("*.*"):
        if path.name != "unillava_manifest.json":
            other = tmp_path / "again" / path.relative_to(parts)
            assert other.read_bytes() == path.read_bytes(), path
    open_checkpoint(parts).check()


def test_parts_without_a_manifest_or_a_config(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next", "llama", "clip")
    parts = tmp_path / "parts"
    convert(source, parts, "parts")
    (parts / "unillava_manifest.json").unlink()
    expected = read_spec(layout.read_json(source / "config.json"))
    opened = open_source(parts)
    assert compare(source, parts).equal and read_spec(opened.config) == expected
    (parts / "config.json").unlink()
    for path in parts.glob("*processor_config.json"):
        path.unlink()
    opened = open_source(parts)
    assert compare(source, parts).equal and read_spec(opened.config) == expected
    shutil.rmtree(parts / "projector")
    with pytest.raises(CheckpointError, match="no projector"):
        open_source(parts)


def test_a_projector_from_elsewhere_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    """A new mm_projector.bin, its names wrapped as under LoRA, replaces the old one."""
    parts = tmp_path / "parts"
    convert(tiny("llava", "llama", "clip"), parts, "parts")
    path = parts / "projector" / "mm_projector.bin"
    new = {f"base_model.model.{name}": a + 1 for name, a in layout.read_bin(path).items()}
    layout.write_bin(path, new)
    tensor = open_source(parts).tensors["multi_modal_projector.linear_2.bias"]
    assert np.array_equal(tensor.read(), new["base_model.model.model.mm_projector.2.bias"])


@pytest.mark.parametrize("kind", ["linear", "identity", "mlp3x_gelu"])
def test_other_projectors_are_split_too(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    config: dict[str, Any] = {"unillava": {"projector": kind}}
    if kind == "identity":
        config["vision_config"] = {"hidden_size": 64}
    source = tiny("llava_next", "llama", "clip", config=config)
    convert(source, tmp_path / "parts", "parts")
    stored = layout.read_bin(tmp_path / "parts" / "projector" / "mm_projector.bin")
    assert layout.same(stored, layout.projector_part(layout.read_all(source)))
    convert(tmp_path / "parts", tmp_path / "back", "hf")
    assert compare(source, tmp_path / "back").equal


def test_only_a_whole_model_can_be_split(tiny: Tiny, tmp_path: Path) -> None:
    tower_directory(tmp_path / "tower", tiny())
    with pytest.raises(CheckpointError, match="cannot be split"):
        convert(tmp_path / "tower", tmp_path / "parts", "parts")


# --- composing -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, a SigLIP and a LLaMA without media tokens, each in its own directory."""
    from unillava.tiny import build_tiny

    root = tmp_path_factory.mktemp("pieces")
    for kind in ("clip", "siglip"):
        source = build_tiny(root / f"with_{kind}", "llava", "llama", kind)
        tower_directory(root / kind, source)
        layout.copy_files(source, root / kind, ("preprocessor_config.json",))
    language_directory(root / "llama", source)
    strip_tokens(root / "llama")
    return root


MEDIA = ("<image>", "<pad>")


def strip_tokens(directory: Path) -> None:
    """Take `<image>` and `<pad>`, and the rows behind the tokenizer, out of a language model."""
    tokenizer = layout.read_json(directory / "tokenizer.json")
    kept = [one for one in tokenizer["added_tokens"] if one["content"] not in MEDIA]
    layout.write_json(directory / "tokenizer.json", tokenizer | {"added_tokens": kept})
    settings = layout.read_json(directory / "tokenizer_config.json")
    decoder = settings["added_tokens_decoder"]
    names = {number: token["content"] for number, token in decoder.items()}
    settings |= {
        "added_tokens_decoder": {
            number: decoder[number]
            for number in decoder
            if names[number] not in ("<image>", "<pad>")
        },
        "extra_special_tokens": {},
    }
    settings.pop("pad_token")
    layout.write_json(directory / "tokenizer_config.json", settings)
    specials = layout.read_json(directory / "special_tokens_map.json")
    specials.pop("pad_token")
    layout.write_json(directory / "special_tokens_map.json", specials)
    rows = len(tokenizer["model"]["vocab"])
    stored = layout.read_all(directory)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        stored[name] = stored[name][:rows]
    layout.write_safetensors(directory / "model.safetensors", stored)
    config = layout.read_json(directory / "config.json")
    config |= {"vocab_size": rows, "pad_token_id": None}
    layout.write_json(directory / "config.json", config)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_composed_model_is_whole(pieces: Path, tmp_path: Path, family: str, tower: str) -> None:
    source = compose(vision=pieces / tower, language=pieces / "llama", family=family)
    manifest = carry_out(plan(source, "hf", tmp_path / "hf"))
    checkpoint = open_checkpoint(tmp_path / "hf")
    checkpoint.check()
    assert verify(tmp_path / "hf").equal
    spec = checkpoint.spec
    assert (spec.family, spec.vision.kind, spec.has_newline) == (family, tower, family != "llava")
    assert spec.image_mode == ("square" if family == "llava" else "anyres")
    ImageProcessor.from_config(spec, checkpoint.processor_config)
    whole = layout.read_all(tmp_path / "hf")
    assert layout.same(layout.vision_part(whole), layout.read_all(pieces / tower))
    language, alone = layout.language_part(whole), layout.read_all(pieces / "llama")
    count = manifest["vocabulary"]["rows"]
    tokens = manifest["vocabulary"]["tokens"]
    assert list(tokens) == (["<video>"] if spec.video else []) + ["<image>", "<pad>"]
    for name, array in alone.items():
        assert language[name][: len(array)].tobytes() == array.tobytes()
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert language[name].shape[0] == (
            math.ceil((count + 2) / 64) * 64 if grown else len(array)
        )
    assert spec.image_token == tokens["<image>"]
    convert(tmp_path / "hf", tmp_path / "llama", "llama")
    assert_same_files(pieces / "llama", tmp_path / "llama")
    assert verify(tmp_path / "llama").equal
    convert(tmp_path / "hf", tmp_path / "tower", tower)
    assert_same_files(pieces / tower, tmp_path / "tower")


def assert_same_files(one: Path, other: Path) -> None:
    """Every file of `one` is in `other`: weights to the bit, JSON to its values."""
    assert layout.same(layout.read_all(one), layout.read_all(other))
    for path in one.glob("*.json"):
        assert layout.read_json(path) == layout.read_json(other / path.name), path.name


def new_arrays(source: Source) -> layout.Arrays:
    return {
        name: tensor.read()
        for name, tensor in source.tensors.items()
        if name.startswith(("multi_modal_projector", "image_newline"))
    }


def test_new_weights_follow_from_the_seed(pieces: Path) -> None:
    def made(seed: int, projector: str = "mlp2x_gelu") -> layout.Arrays:
        return new_arrays(
            compose(
                vision=pieces / "clip",
                language=pieces / "llama",
                projector=projector,
                family="llava_next",
                seed=seed,
            )
        )

    first = made(0)
    assert layout.same(first, made(0))
    other = made(1)
    assert all(first[name].tobytes() != other[name].tobytes() for name in first)
    assert {n: a.shape for n, a in made(0, "mlp3x_gelu").items() if n.endswith("weight")} == {
        "multi_modal_projector.linear_1.weight": (64, 32),
        "multi_modal_projector.linear_2.weight": (64, 64),
        "multi_modal_projector.linear_3.weight": (64, 64),
    }
    assert set(made(0, "linear")) == {
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_1.bias",
        "image_newline",
    }
    # The same numbers on every machine: these were written down once.
    assert first["multi_modal_projector.linear_1.weight"][0, :3].tolist() == EXPECTED_WEIGHTS
    assert first["image_newline"][:3].tolist() == EXPECTED_NEWLINE


EXPECTED_WEIGHTS = [-0.1093188002705574, 0.1669268012046814, 0.05165040120482445]
EXPECTED_NEWLINE = [-0.054466865956783295, 0.15104615688323975, 0.07426611334085464]


def test_new_weights_are_distributed_as_torchs(pieces: Path) -> None:
    source = compose(vision=pieces / "clip", language=pieces / "llama", family="llava_next")
    arrays = new_arrays(source)
    for name, inputs in (("linear_1", 32), ("linear_2", 64)):
        values = np.concatenate(
            [arrays[f"multi_modal_projector.{name}.{kind}"].ravel() for kind in ("weight", "bias")]
        )
        bound = 1 / math.sqrt(inputs)
        assert np.abs(values).max() <= bound and np.abs(values).max() > 0.99 * bound
        # Moments of a uniform distribution, within four of their standard errors.
        error = bound / math.sqrt(3 * values.size)
        assert abs(values.mean()) < 4 * error
        assert abs((values**2).mean() / (bound**2 / 3) - 1) < 4 * math.sqrt(0.8 / values.size)
    newline = arrays["image_newline"] * math.sqrt(64)
    assert 0.6 < newline.std() < 1.4 and np.abs(newline).max() < 4.5


def test_the_plan_of_a_composed_model_names_what_is_new(pieces: Path, tmp_path: Path) -> None:
    source = compose(vision=pieces / "clip", language=pieces / "llama", seed=7)
    table = {row.target: row for row in rows(plan(source, "hf", tmp_path / "x"))}
    row = table["multi_modal_projector.linear_1.weight"]
    assert row.source == "" and row.operation == "new: uniform ± 0.177, seed 7"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_dtype_for_all(pieces: Path, dtype: str) -> None:
    source = compose(vision=pieces / "clip", language=pieces / "llama", dtype=dtype)
    assert {t.dtype for t in source.tensors.values()} == {
        {"float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    assert read_spec(source.config).dtype == dtype
    name = "multi_modal_projector.linear_1.weight"
    whole = compose(vision=pieces / "clip", language=pieces / "llama").tensors[name].read()
    near = to_float(source.tensors[name].read(), source.tensors[name].dtype)
    assert np.abs(near - whole).max() <= np.abs(whole).max() / 256


def test_a_given_projector_is_taken_as_it_is(pieces: Path, tiny: Tiny, tmp_path: Path) -> None:
    other = tiny("llava_next", "llama", "clip", seed=9)
    stored = layout.projector_part(layout.read_all(other))
    layout.write_bin(tmp_path / "mm_projector.bin", stored)
    for family in ("llava_next", "llava"):
        source = compose(
            vision=pieces / "clip",
            language=pieces / "llama",
            projector=tmp_path / "mm_projector.bin",
            family=family,
        )
        expected = dict(stored)
        if family == "llava":
            del expected["model.image_newline"]
            assert source.dropped == ("image_newline",)
        assert layout.same(layout.projector_part(new_arrays(source)), expected)
    # Any checkpoint with a projector, a tower or a language model gives it.
    source = compose(vision=other, language=pieces / "llama", projector=str(other))
    assert np.array_equal(
        source.tensors["multi_modal_projector.linear_1.weight"].read(),
        stored["model.mm_projector.0.weight"],
    )


def test_stage_1_leaves_a_projector_that_composes_to_the_next_start(
    pieces: Path, tmp_path: Path
) -> None:
    source = compose(vision=pieces / "clip", language=pieces / "llama", projector="linear")
    carry_out(plan(source, "hf", tmp_path / "hf"))
    convert(tmp_path / "hf", tmp_path / "projector", "projector")
    again = compose(
        vision=pieces / "clip", language=pieces / "llama", projector=tmp_path / "projector"
    )
    assert again.config == source.config
    assert layout.same(arrays_of(again), arrays_of(source))


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"projector": "mlp2x_tan"}, "no such kind of projector"),
        ({"projector": "identity"}, "as wide as the language model"),
        ({"family": "llava_two"}, "no such family"),
        ({"image_mode": "anyres"}, "no such image mode of llava"),
        ({"family": "llava_next", "image_mode": "pad"}, "no such image mode of llava_next"),
        ({"strategy": "half"}, "no such feature selection strategy"),
        ({"vision": "siglip", "strategy": "default"}, "no class token"),
        ({"seed": -1}, "seed cannot be used"),
        ({"seed": 2**32}, "seed cannot be used"),
        ({"vision": "llama"}, "cannot be the vision part"),
        ({"language": "clip"}, "cannot be the language part"),
        ({"projector": Path("clip")}, "cannot be the projector part"),
        ({"projector": Path("absent")}, "there is nothing at"),
        ({"dtype": "int8"}, "no such dtype"),
    ],
)
def test_what_cannot_be_composed(pieces: Path, choices: dict[str, Any], message: str) -> None:
    chosen: dict[str, Any] = {"vision": "clip", "language": "llama"} | choices
    for key in ("vision", "language"):
        chosen[key] = pieces / chosen[key]
    if isinstance(chosen.get("projector"), Path):
        chosen["projector"] = pieces / chosen["projector"]
    with pytest.raises(CheckpointError, match=message):
        compose(**chosen)


def test_a_projector_of_other_parts_is_refused(pieces: Path, tiny: Tiny) -> None:
    wide = tiny("llava", "llama", "clip", config={"vision_config": {"hidden_size": 48}})
    with pytest.raises(CheckpointError, match="belongs to other parts") as caught:
        compose(vision=pieces / "clip", language=pieces / "llama", projector=wide)
    assert "32 columns" in str(caught.value) and "[64, 48]" in str(caught.value)


@pytest.mark.parametrize("layers", [(-2, -1), (1, 2, 3)])
def test_features_of_several_layers(pieces: Path, layers: tuple[int, ...]) -> None:
    source = compose(vision=pieces / "clip", language=pieces / "llama", feature_layer=layers)
    assert read_spec(source.config).feature_layers == layers
    shape = source.tensors["multi_modal_projector.linear_1.weight"].shape
    assert shape == (64, 32 * len(layers))


# --- what is hostile or broken ---------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", ["clip", "siglip", "llama", "parts", "meta"])
@FUZZ
@given(data=st.data())
def test_a_config_of_any_content_is_an_error_or_read(
    tiny: Tiny,
    meta_model: tuple[Path, layout.Arrays],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    data: st.DataObject,
) -> None:
    root = tmp_path_factory.getbasetemp() / f"fuzz_{kind}"
    name = "params.json" if kind == "meta" else "config.json"
    if not root.exists():
        if kind in ("clip", "siglip"):
            tower_directory(root, tiny("llava", "llama", kind))
        elif kind == "llama":
            language_directory(root, tiny())
        elif kind == "meta":
            meta_directory(root, [layout.meta_part(meta_model[1], 4, 2)], PARAMS)
        else:
            convert(tiny(), root, "parts")
            (root / "unillava_manifest.json").unlink()
        shutil.copy(root / name, root / "sound.txt")
    config = json.loads((root / "sound.txt").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(JSON)
    (root / name).write_text(json.dumps(config))
    try:
        opened = open_source(root)
    except CheckpointError:
        return
    assert opened.tensors
