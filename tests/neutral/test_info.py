"""`unillava info`: facts, memory formulas, output, exit codes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real_configs import REAL_CONFIGS
from unillava.checkpoint import open_checkpoint
from unillava.cli.app import main
from unillava.cli.info import parse_size
from unillava.config import read_spec
from unillava.data.layout import image_rows, video_rows
from unillava.errors import RequestError
from unillava.info import TYPICAL_SIZES, as_json, examine
from unillava.memory import (
    ASSUMPTIONS,
    inference_memory,
    lora_parameters,
    most_tiles,
    training_memory,
)
from unillava.spec import parameter_table

Tiny = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(argument, …, columns=…)`: exit code, stdout and stderr of `unillava info`."""

    def call(*arguments: str | Path, columns: int = 160) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as caught:
            main(["info", *map(str, arguments)])
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


# --- memory --------------------------------------------------------------------------------------

GIB = 2**30
LLAVA_7B = read_spec(REAL_CONFIGS["LLaVA-1.5-7B"])
NEXT_MISTRAL = read_spec(REAL_CONFIGS["LLaVA-NeXT-Mistral-7B"])


def test_inference_memory_of_llava_15() -> None:
    need = inference_memory(LLAVA_7B, "float16")
    assert need.weights == 2 * 7_063_427_072
    assert need.cache == 2 * GIB  # 2 * 32 blocks * 32 heads * 128 * 4096 positions * 2 bytes
    assert need.total == need.weights + need.cache
    assert inference_memory(LLAVA_7B, "float32").total == 2 * need.total
    assert inference_memory(LLAVA_7B, "bfloat16", context=2048).cache == GIB


def test_grouped_heads_share_the_cache() -> None:
    assert inference_memory(NEXT_MISTRAL, "float16").cache == 32 * 32768 * 2 * 8 * 128 * 2


def test_lora_of_llava_15() -> None:
    """PEFT reports 319,815,680 parameters for rank 128 on all projections of a 7B LLaMA."""
    assert lora_parameters(LLAVA_7B) == 319_815_680


def test_kinds_of_training() -> None:
    projector, lora, language, everything = training_memory(LLAVA_7B)
    table = parameter_table(LLAVA_7B)
    assert projector.trained == 20_979_712
    assert lora.trained == 319_815_680 + 20_979_712
    assert everything.trained == sum(math.prod(shape) for shape in table.values())
    assert everything.trained - language.trained == 303_507_456  # CLIP-L/14-336
    assert everything.weights + everything.gradients == 4 * everything.trained
    assert (everything.moments, everything.master) == (
        8 * everything.trained,
        4 * everything.trained,
    )
    assert lora.weights == 2 * (everything.trained + 319_815_680)
    assert projector.activations == language.activations < everything.activations
    for need in (projector, lora, language, everything):
        parts = (need.weights, need.gradients, need.moments, need.master, need.activations)
        assert need.total == sum(parts)


def test_activations_grow_with_the_context() -> None:
    short, long = (training_memory(LLAVA_7B, context)[0].activations for context in (1024, 2048))
    assert long == 2 * short


def test_most_tiles() -> None:
    assert most_tiles(LLAVA_7B) == 1
    assert most_tiles(NEXT_MISTRAL) == 5


# --- facts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
def test_facts_are_those_of_the_files(tiny: Tiny, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family, "qwen2", "siglip", dtype="bfloat16"))
    spec = checkpoint.spec
    info = examine(checkpoint)
    assert (info.family, info.template, info.problem) == (family, "checkpoint", None)
    assert info.layout == "Hugging Face, names as on the hub"
    assert info.parameters == sum(math.prod(s) for s in parameter_table(spec).values())
    assert info.bytes == 2 * info.parameters
    assert info.dtypes == {"bfloat16": info.parameters}
    parts = [part.name for part in info.parts]
    newline = [] if family == "llava" else ["newline"]
    assert parts == ["vision", "projector", *newline, "language"]
    assert "tied head" in info.language and "siglip" in info.vision
    assert info.files == len(list(checkpoint.directory.glob("*.safetensors")))
    for image in info.images:
        assert image.tokens == len(image_rows(spec, (image.height, image.width)))
    for video in info.videos:
        assert video.tokens == len(video_rows(spec, video.frames))
    assert bool(info.videos) == (family == "llava_next_video")
    assert json.loads(json.dumps(as_json(info)))["parameters"] == info.parameters


def test_a_named_template_and_a_missing_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    named = tiny(config={"unillava": {"template": "vicuna_v1"}})
    assert examine(open_checkpoint(named)).template == "vicuna_v1"
    copy = Path(shutil.copytree(tiny(), tmp_path / "copy"))
    (copy / "tokenizer.json").unlink()
    info = examine(open_checkpoint(copy))
    assert info.template is None and "no tokenizer" in info.template_problem


def test_the_size_of_an_image_is_width_by_height() -> None:
    assert parse_size("640x480") == (640, 480)
    for wrong in ("640", "640x", "0x3", "-1x3", "640x480x3", "axb", "6.5x3"):
        with pytest.raises(RequestError, match="640x480"):
            parse_size(wrong)


# --- the command ---------------------------------------------------------------------------------


def test_the_tables_show_every_part(tiny: Tiny, run: Run) -> None:
    code, out, err = run(tiny("llava_next_video"), "--image-size", "500x100")
    pieces = ("vision", "projector", "newline", "language", "total", "500 x 100", "8 frames")
    trainings = ("stage 1: projector", "LoRA rank 128", "stage 2: everything", "float16")
    for piece in (*pieces, *trainings, "as config.json says", *ASSUMPTIONS):
        assert piece in out
    assert "640 x 480" not in out
    assert (code, err) == (0, "")


def test_the_tables_fit_into_80_columns(tiny: Tiny, run: Run) -> None:
    _, out, _ = run(tiny("llava_next_video"), columns=80)
    tables = [line for line in out.splitlines() if line.startswith(("│", "┃", "├"))]
    assert max(map(len, tables)) <= 80 and "…" not in "".join(tables)


def test_json_output(tiny: Tiny, run: Run) -> None:
    code, out, _ = run("--model-path", tiny(), "--json")
    facts = json.loads(out)
    sizes = [(image["width"], image["height"]) for image in facts["images"]]
    assert tuple(sizes) == TYPICAL_SIZES
    assert [need["dtype"] for need in facts["inference"]] == ["float32", "float16", "bfloat16"]
    assert all(need["total"] > need["weights"] for need in facts["training"])
    assert facts["assumptions"] == list(ASSUMPTIONS) and facts["problem"] is None
    assert code == 0


def test_weights_that_contradict_are_shown_and_refused(
    tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    copy = Path(shutil.copytree(tiny(), tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    (copy / "config.json").write_text(json.dumps(config))
    code, out, err = run(copy)
    assert code == 2
    assert "contradict config.json" in out
    assert "text_config.intermediate_size" in err and "Traceback" not in err


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, run: Run) -> None:
    for arguments in ([tmp_path], [tmp_path / "none"], []):
        code, _, err = run(*arguments)
        assert code == 2 and err.startswith("error: ") and "Traceback" not in err
