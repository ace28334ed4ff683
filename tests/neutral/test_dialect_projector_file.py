"""`mm_projector.bin` and its like, under every prefix, in every format."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import original_layout as layout
from tests.original_layout import Raw, build_original, read_raw
from weight_convert import files
from weight_convert.canonical import EMBEDDING, MPT_EMBEDDING, NEWLINE
from weight_convert.contents import look
from weight_convert.convert import convert
from weight_convert.dialects import registry
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Options, Source

Tiny = Callable[..., Path]
Arrays = dict[str, np.ndarray]
LINEAR, MLP = (6, 4), (6, 4, 4)


def projector(*widths: int) -> Arrays:
    """Place in the Sequential (nothing for a single Linear) -> array, float32."""
    random = np.random.default_rng(len(widths))
    layers = list(itertools.pairwise(widths))
    made = {}
    for n, (inp, out) in enumerate(layers):
        place = "" if len(layers) == 1 else f"{2 * n}."
        made[f"{place}weight"] = random.standard_normal((out, inp)).astype(np.float32)
        made[f"{place}bias"] = random.standard_normal(out).astype(np.float32)
    return made


def canonical(arrays: Arrays) -> Arrays:
    """The same under llava-hf's names."""
    made = {}
    for place, array in arrays.items():
        number, _, kind = place.rpartition(".")
        made[f"multi_modal_projector.linear_{int(number or 0) // 2 + 1}.{kind}"] = array
    return made


def raw(arrays: Arrays) -> Raw:
    return {name: ("F32", array.shape, array.tobytes()) for name, array in arrays.items()}


def write(path: Path, arrays: Arrays) -> Path:
    """A file of the format that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        layout.write_raw(path, raw(arrays))
    elif path.suffix == ".pdparams":
        path.write_bytes(pickle.dumps(arrays, protocol=2))
    else:
        form = files.FORMATS["bin"]
        table = {name: ("F32", array.shape) for name, array in arrays.items()}
        form.write_file(path, table, arrays.items())
    return path


def arrays_of(source: Source) -> Arrays:
    return {name: tensor.read() for name, tensor in source.tensors.items()}


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def text_of(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


# --- reading -------------------------------------------------------------------------------------

PREFIXES = (
    "model.mm_projector.",
    "transformer.mm_projector.",
    "base_model.model.model.mm_projector.",
    "module.model.mm_projector.",
    "mm_projector.",
    "",
)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("widths", "prefix"),
    [
        (widths, prefix)
        for widths in (LINEAR, MLP, (6, 4, 4, 4))
        for prefix in PREFIXES
        if prefix or widths != LINEAR  # `weight` and `bias` alone are anything
    ],
)
def test_every_prefix(tmp_path: Path, widths: Any, prefix: str, suffix: str) -> None:
    arrays = projector(*widths)
    path = write(tmp_path / f"checkpoint-100{suffix}", {prefix + n: a for n, a in arrays.items()})
    source = open_source(path)
    assert source.dialect == "projector" and source.parts == {"projector"}
    assert_same(arrays_of(source), canonical(arrays))
    kinds = {2: "linear", 3: None, 4: "mlp3x_gelu"}
    assert source.config.get("unillava", {}).get("projector") == kinds[len(widths)]
    assert source.config["torch_dtype"] == "float32"


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".pdparams"])
def test_a_directory_of_stage_1(tiny: Tiny, tmp_path: Path, suffix: str) -> None:
    hf = json.loads((tiny(family="llava") / "config.json").read_text())
    config = layout.config_of(hf, mm_vision_select_feature="cls_patch", mm_vision_select_layer=-3)
    arrays = projector(*MLP)
    turned = {n: a.T if a.ndim == 2 else a for n, a in arrays.items()}
    paddle = suffix == ".pdparams"
    prefix = "llama.mm_projector." if paddle else "model.mm_projector."
    stored = {
        prefix + n: np.ascontiguousarray(a) for n, a in (turned if paddle else arrays).items()
    }
    directory = write(tmp_path / "stage1" / f"mm_projector{suffix}", stored).parent
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "trainer_state.json").write_text("{}")
    source = open_source(directory)
    assert_same(arrays_of(source), canonical(arrays))
    assert source.config["vision_feature_layer"] == -3
    assert source.config["vision_feature_select_strategy"] == "full"

    convert(directory, tmp_path / "again", "projector")
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    again = files.open_file(tmp_path / "again" / f"mm_projector{suffix}")
    assert_same({n: t.read() for n, t in again.items()}, stored)


def test_paddles_matrices_are_turned(tmp_path: Path) -> None:
    """A square matrix does not tell: the format does, and the name in safetensors."""
    arrays = projector(4, 4, 4)
    turned = {f"llama.mm_projector.{n}": np.ascontiguousarray(a.T) for n, a in arrays.items()}
    for suffix in (".pdparams", ".safetensors"):
        source = open_source(write(tmp_path / f"p{suffix}", turned))
        assert_same(arrays_of(source), canonical(arrays))


@pytest.mark.parametrize("rows", [2, 11], ids=["two rows", "whole matrix"])
@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("model.embed_tokens.weight", EMBEDDING),
        ("base_model.model.model.embed_tokens.weight", EMBEDDING),
        ("model.tok_embeddings.weight", EMBEDDING),
        ("transformer.wte.weight", MPT_EMBEDDING),
    ],
)
def test_embedding_rows_are_kept(tmp_path: Path, name: str, meaning: str, rows: int) -> None:
    stem = name.split("embed")[0].split("tok_")[0].split("wte")[0]
    arrays = projector(*LINEAR)
    extra = {
        name: np.arange(rows * 4, dtype=np.float32).reshape(rows, 4),
        f"{stem}image_newline": np.ones(4, np.float32),
    }
    stored = {f"{stem}mm_projector.{n}": a for n, a in arrays.items()} | extra
    path = write(tmp_path / "mm_projector.bin", stored)
    source = open_source(path)
    expected = canonical(arrays) | {meaning: extra[name], NEWLINE: np.ones(4, np.float32)}
    assert_same(arrays_of(source), expected)
    convert(path, tmp_path / "again.bin", "projector")
    assert_same(arrays_of(open_source(tmp_path / "again.bin")), expected)


def test_a_projector_without_biases(tmp_path: Path) -> None:
    arrays = {n: a for n, a in projector(*MLP).items() if n.endswith("weight")}
    path = write(tmp_path / "p.bin", {f"model.mm_projector.{n}": a for n, a in arrays.items()})
    source = open_source(path)
    assert source.config["multimodal_projector_bias"] is False
    assert_same(arrays_of(source), canonical(arrays))


# --- recognition ---------------------------------------------------------------------------------


def test_exactly_one_dialect_recognises_it(tiny: Tiny, tmp_path: Path) -> None:
    arrays = {f"model.mm_projector.{n}": a for n, a in projector(*MLP).items()}
    path = write(tmp_path / "stage1" / "mm_projector.bin", arrays)
    for place in (path, path.parent):
        found = [d.name for d in registry.dialects().values() if d.evidence(look(place))]
        assert found == ["projector"]
    # A whole model with a projector beside it is a whole model, an adapter stays one.
    original = build_original(tiny(family="llava"), tmp_path / "original")
    write(original.directory / "mm_projector.bin", arrays)
    assert registry.recognise(look(original.directory))[0].name == "original"
    (path.parent / "adapter_config.json").write_text("{}")
    assert registry.named("projector").evidence(look(path.parent)) == ""
    assert "holds no projector" in text_of(lambda: open_source(path.parent, dialect="projector"))


def test_other_files_are_not_taken_for_one(tmp_path: Path) -> None:
    evidence = registry.named("projector").evidence
    weight, bias = projector(*LINEAR).values()
    for names in (("weight", "bias"), ("0.weight", "fc.bias"), ("model.norm.weight", "0.bias")):
        path = write(
            tmp_path / f"{names[0]}{names[1]}.bin", dict(zip(names, (weight, bias), strict=True))
        )
        assert evidence(look(path)) == ""


def test_faults_are_named(tmp_path: Path) -> None:
    arrays = {f"model.mm_projector.{n}": a for n, a in projector(*MLP).items()}
    resampler = arrays | {"model.vision_resampler.query": np.ones((2, 2), np.float32)}
    path = write(tmp_path / "mm_projector.bin", resampler)
    assert "no rule for: model.vision_resampler.query" in text_of(lambda: open_source(path))
    assert open_source(path, Options(allow_unused=("*resampler*",))).dropped
    half = {n: a for n, a in arrays.items() if n != "model.mm_projector.2.bias"}
    path = write(tmp_path / "half.bin", half)
    assert "missing: multi_modal_projector.linear_2.bias" in text_of(lambda: open_source(path))
    gap = {n.replace(".2.", ".3."): a for n, a in arrays.items()}
    path = write(tmp_path / "gap.bin", gap)
    assert "no rule for: model.mm_projector.3.weight" in text_of(lambda: open_source(path))
    twice = arrays | {"mm_projector.0.bias": arrays["model.mm_projector.0.bias"]}
    path = write(tmp_path / "twice.bin", twice)
    assert "holds one tensor twice" in text_of(lambda: open_source(path))


# --- extracting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".pdparams"])
@pytest.mark.parametrize("place", ["hf", "original"])
def test_a_projector_is_extracted_into_one_file(
    tiny: Tiny, tmp_path: Path, place: str, suffix: str
) -> None:
    hf = tiny(family="llava_next", dtype="float32")
    original = build_original(hf, tmp_path / "original")
    path = hf if place == "hf" else original.directory
    target = tmp_path / f"mm_projector{suffix}"
    manifest = convert(path, target, "projector", Options(vision=original.tower))
    assert len(manifest["tensors"]) == 4
    found = {name: tensor.read() for name, tensor in files.open_file(target).items()}
    expected = {}
    for name, (_, shape, data) in read_raw(hf).items():
        if name.startswith("multi_modal_projector."):
            array = np.frombuffer(data, "<f4").reshape(shape)
            stored = layout.original_name(name)
            if suffix == ".pdparams":
                array, stored = array.T, stored.replace("model.", "llama.")
            expected[stored] = array
    assert_same(found, expected)
    back = open_source(target)
    assert_same(
        arrays_of(back),
        {n: t.read() for n, t in open_source(hf).tensors.items() if n.startswith("multi_modal")},
    )


def test_a_directory_gets_the_configuration_of_the_whole(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny(family="llava_next"), tmp_path / "out", "projector")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "mm_projector.bin", "unillava_manifest.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["hidden_size"] == 64
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    # One without a whole around it: what its shapes say.
    alone = write(
        tmp_path / "alone.bin", {f"mm_projector.{n}": a for n, a in projector(6, 4).items()}
    )
    convert(alone, tmp_path / "alone", "projector")
    assert json.loads((tmp_path / "alone/config.json").read_text()) == {
        "hidden_size": 4, "mm_hidden_size": 6, "mm_projector_type": "linear", "use_mm_proj": True,
    }  # fmt: skip


def test_what_has_no_projector(tiny: Tiny, tmp_path: Path) -> None:
    original = build_original(tiny(family="llava"), tmp_path / "original", inside=False)
    assert "has no projector to write" in text_of(
        lambda: convert(original.tower, tmp_path / "x", "projector")
    )
