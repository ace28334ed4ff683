"""Planning, streaming, interruption, resuming, manifests and comparison of conversions."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.real_configs import REAL_CONFIGS
from unillava.config import read_spec
from unillava.errors import CheckpointError
from unillava.spec import parameter_table
from weight_convert import cast, files
from weight_convert.canonical import expected_names
from weight_convert.convert import convert, open_source, plan, rows
from weight_convert.source import Options
from weight_convert.verify import compare, verify

Tiny = Callable[..., Path]


# --- the canonical names -------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_expected_names_are_those_of_the_spec(name: str) -> None:
    config = REAL_CONFIGS[name]
    head = [n for n in parameter_table(read_spec(config)) if "vision_model.head." in n]
    names = expected_names(config, vision_head=bool(head))
    assert names == list(parameter_table(read_spec(config)))


# --- a conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("shard", [10**9, 200_000])
def test_the_result_is_equal_and_has_a_manifest(
    tiny: Tiny, tmp_path: Path, weights: str, shard: int
) -> None:
    source, target = tiny("llava_next"), tmp_path / "out"
    seen: list[tuple[str, int]] = []
    manifest = convert(
        source,
        target,
        "hf",
        Options(weights=weights, max_shard_bytes=shard),
        progress=lambda name, count: seen.append((name, count)),
    )
    outcome = compare(source, target)
    assert outcome.equal and outcome.tensors == len(manifest["tensors"]) == len(seen)
    assert sum(count for _, count in seen) == outcome.bytes
    assert verify(target).equal
    assert manifest == json.loads((target / "unillava_manifest.json").read_text())
    held = {path.name for path in target.iterdir()}
    assert {path.name for path in source.iterdir() if "model" not in path.name} <= held
    assert (shard > 10**6) != any(name.endswith(".index.json") for name in held)
    assert not list(tmp_path.glob("*.partial"))


def test_the_plan_says_what_would_be_done(tiny: Tiny, tmp_path: Path) -> None:
    options = Options(spelling="saved by transformers 5", dtype="bfloat16")
    chosen = plan(open_source(tiny()), "hf", tmp_path / "out", options)
    table = {row.source: row for row in rows(chosen)}
    row = table["vision_tower.vision_model.embeddings.class_embedding"]
    assert row.target == "vision_tower.embeddings.class_embedding"
    assert row.operation == "cast to BF16" and row.dtype == "BF16"
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_an_existing_destination_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(tiny(), tmp_path / "out", "hf")
    convert(tiny(), tmp_path / "out", "hf", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert verify(tmp_path / "out").equal


class Stop(Exception):
    """Stands for a signal or a power cut."""


@pytest.mark.parametrize("after", [0, 70, 85])
def test_an_interruption_leaves_the_old_state_and_can_be_resumed(
    tiny: Tiny, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tiny("llava_next"), tmp_path / "out"
    options = Options(max_shard_bytes=200_000)
    count = 0

    def stop(name: str, size: int) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Stop

    with pytest.raises(Stop):
        convert(source, target, "hf", options, progress=stop)
    assert not target.exists()
    with pytest.raises(CheckpointError, match="interrupted"):
        convert(source, target, "hf", options)
    written: list[str] = []
    form = files.FORMATS["safetensors"]

    def write(path: Path, *arguments: object, **settings: object) -> None:
        written.append(path.name)
        form.write_file(path, *arguments, **settings)

    monkeypatch.setitem(files.FORMATS, "safetensors", replace(form, write_file=write))
    convert(source, target, "hf", options, resume=True)
    assert compare(source, target).equal and verify(target).equal
    shards = len(list(target.glob("*.safetensors")))
    assert len(written) < shards if after else len(written) == shards


def test_another_plan_cannot_resume(tiny: Tiny, tmp_path: Path) -> None:
    def stop(name: str, size: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        convert(tiny(), tmp_path / "out", "hf", progress=stop)
    (tmp_path / "out.partial" / ".progress.json").write_text('{"plan": "x", "files": {}}')
    with pytest.raises(CheckpointError, match="another conversion"):
        convert(tiny(), tmp_path / "out", "hf", resume=True)


def test_a_full_disk_is_told_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="too small"):
        convert(tiny(), tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["missing", "unused"])
def test_a_conversion_is_total(tiny: Tiny, tmp_path: Path, pattern: str) -> None:
    copy = Path(shutil.copytree(tiny(), tmp_path / "copy"))
    opened = open_source(copy)
    tensors = {name: tensor.read() for name, tensor in opened.tensors.items()}
    if pattern == "missing":
        del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["language_model.model.layers.1.mlp.upp_proj.weight"] = np.zeros(3, np.float32)
    for path in copy.glob("model*"):
        path.unlink()
    table = {name: ("F32", array.shape) for name, array in tensors.items()}
    from weight_convert.storage.safetensors import write_shards

    write_shards(copy, table, tensors.items())
    with pytest.raises(CheckpointError, match="not those that") as caught:
        convert(copy, tmp_path / "out", "hf")
    text = str(caught.value)
    assert "layers.1.mlp.up" in text and "--allow-" in text
    allowed = {f"allow_{pattern}": ("*.layers.1.mlp.up*",)}
    manifest = convert(copy, tmp_path / "out", "hf", Options(**allowed))
    assert len(manifest["tensors"]) == len(tensors)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["F32", "F16", "BF16"])
def test_casts_round_to_nearest_even(code: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    random = np.random.default_rng(0)
    values = random.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 65519, 65520])])
    reference = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[code]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(reference)
    found = cast.from_float(values, code)
    numbers = ~np.isnan(values)
    assert np.array_equal(found.view(np.uint8).reshape(len(values), -1)[numbers],
                          expected.view(np.uint8).reshape(len(values), -1)[numbers])  # fmt: skip
    assert np.isnan(cast.to_float(found, code)[~numbers]).all()


def test_bfloat16_is_widened_without_loss() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    wide = cast.to_float(bits, "BF16")
    back = cast.from_float(wide, "BF16")
    number = ~np.isnan(wide)
    assert np.array_equal(back[number], bits[number])
    assert np.isnan(cast.to_float(back, "BF16")[~number]).all()


# --- verifying -----------------------------------------------------------------------------------


def damage(directory: Path, change: Callable[[bytearray], None]) -> None:
    path = next(directory.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def test_one_flipped_bit_is_found(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny(), tmp_path / "out", "hf")

    def flip(data: bytearray) -> None:
        data[-1] ^= 1

    damage(tmp_path / "out", flip)
    for outcome in (verify(tmp_path / "out"), compare(tiny(), tmp_path / "out")):
        assert [finding.verdict for finding in outcome.findings] == ["differs"]
    assert re.search(r"^1 of \d+ values differ", outcome.findings[0].detail)


def test_values_that_are_no_numbers_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny(), tmp_path / "out", "hf")

    def poison(data: bytearray) -> None:
        data[-8:] = np.float32([np.nan, np.inf]).tobytes()

    damage(tmp_path / "out", poison)
    assert list(compare(tmp_path / "out", tmp_path / "out").not_numbers.values()) == [(1, 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"memory": {"original": 3}},
        {"memory": []},
        {"config": "x"},
        {"vocabulary": {"rows": "many", "tokens": {}}},
        {"vocabulary": {"rows": 3, "tokens": {"<image>": "x"}}},
        {"tensors": {"a": {"dtype": "F32"}}},
        {"tensors": {"a": {"dtype": "F32", "shape": ["x"], "sha256": ""}}},
    ],
)
def test_an_edited_manifest_is_not_believed(tiny: Tiny, tmp_path: Path, change: dict) -> None:
    convert(tiny(), tmp_path / "out", "original")
    path = tmp_path / "out" / "unillava_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="no manifest that a conversion wrote"):
        convert(tmp_path / "out", tmp_path / "back", "hf")
