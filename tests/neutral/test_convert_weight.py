"""convert_weight.py: the command line of MindFormers' users."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests import mindformers_layout as layout
from tests.mindformers_layout import Arrays, assert_equal
from weight_convert import files, legacy_cli
from weight_convert.convert import convert, open_source
from weight_convert.errors import CheckpointError
from weight_convert.legacy_cli import main, read_arguments
from weight_convert.source import Options
from weight_convert.verify import compare

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "unillava_manifest.json"
Tiny = Callable[..., Path]


def hub_arrays(directory: Path) -> Arrays:
    return {name: np.asarray(t.read()) for name, t in open_source(directory).tensors.items()}


def stored_arrays(path: Path) -> Arrays:
    return {name: np.asarray(t.read()) for name, t in files.open_weights(path).items()}


def run(*arguments: object) -> None:
    assert main([str(one) for one in arguments]) == 0


def part(arrays: Arrays, prefix: str) -> Arrays:
    return {name: array for name, array in arrays.items() if name.startswith(prefix)}


# --- towards MindSpore ---------------------------------------------------------------------------


def test_the_command_of_the_readme(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next_video", dtype="bfloat16")
    out = tmp_path / "new" / "OUT.ckpt"
    run("--model", "llava_next", "--input_path", source, "--output_path", out)
    assert_equal(stored_arrays(out), layout.llava(hub_arrays(source)))
    assert {path.name for path in out.parent.iterdir()} == {out.name, f"{out.name}.{MANIFEST}"}


@pytest.mark.parametrize("name, made", [("m", "m.ckpt"), ("v1.5", "v1.5.ckpt"), ("d/", "d")])
def test_names_without_a_suffix(tiny: Tiny, tmp_path: Path, name: str, made: str) -> None:
    run("--model", "llava", "--input_path", tiny("llava"), "--output_path", f"{tmp_path}/{name}")
    found = tmp_path / made
    assert found.is_dir() == name.endswith("/")
    assert_equal(stored_arrays(found), layout.llava(hub_arrays(tiny("llava"))))
    if found.is_dir():
        names = {path.name for path in found.iterdir()}
        assert {"llava.ckpt", "predict_llava.yaml", "tokenizer.json"} <= names


@pytest.mark.parametrize("given, bits", [("fp32", "<f4"), ("fp16", "<f2"), ("bf16", "<u2")])
def test_dtypes(tiny: Tiny, tmp_path: Path, given: str, bits: str) -> None:
    out = tmp_path / "m.ckpt"
    run("--model", "llava", "--input_path", tiny("llava"), "--output_path", out, "--dtype", given)
    assert {array.dtype.str for array in stored_arrays(out).values()} == {bits}


@pytest.mark.parametrize("kind", ["alone", "whole"])
def test_two_models_into_one_folder(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    source = tiny("llava_next")
    tower, text = source, source
    if kind == "alone":
        tower, text = tmp_path / "clip", tmp_path / "vicuna"
        convert(source, tower, "clip")
        convert(source, text, "llama")
    folder = tmp_path / "folder"
    common = ("--model", "llava_next")
    run(*common, "--input_path", tower, "--output_path", folder / "v", "--from_vision", "True")
    run(*common, "--input_path", text, "--output_path", folder / "l", "--from_language=1")
    expected = layout.llava(hub_arrays(source))
    assert_equal(stored_arrays(folder / "v.ckpt"), part(expected, "vision_encoder."))
    assert_equal(stored_arrays(folder / "l.ckpt"), part(expected, "language_model."))
    opened = open_source(folder, Options(base=source))
    assert opened.parts == {"vision", "language"}


@pytest.mark.parametrize("no", ["False", "no", "0", "false"])
@pytest.mark.parametrize("flag", ["--from_vision", "--from_vison", "--from_language"])
def test_no_means_no(tiny: Tiny, tmp_path: Path, no: str, flag: str) -> None:
    job = read_arguments(
        ["--model", "llava", "--input_path", "a", "--output_path", "b", flag, no, "--layers=0"]
    )
    assert job.options.parts == {"vision", "projector", "newline", "language"}
    assert job.needed == ("vision", "projector", "language")


@pytest.mark.parametrize("yes", [["True"], ["yes"], []])
@pytest.mark.parametrize("flag", ["--from_vision", "--from_vison"])
def test_yes_means_yes(yes: list[str], flag: str) -> None:
    common = ["--model", "llava", "--input_path", "a", "--output_path", "b"]
    for arguments in ([flag, *yes], [f"{flag}={yes[0]}"] if yes else [flag]):
        job = read_arguments([*common, *arguments])
        assert job.options.parts == {"vision"} and job.to == "mindformers"


@pytest.mark.parametrize("flag", ["--qkv_concat", "--qkv_concat=True"])
def test_language_models(tiny: Tiny, tmp_path: Path, flag: str) -> None:
    source = tiny("llava", "llama3")
    convert(source, tmp_path / "hub", "llama")
    plain, fused = tmp_path / "plain.ckpt", tmp_path / "fused.ckpt"
    # MindFormers takes a file in the directory, which need not be there.
    hub = tmp_path / "hub" / "hf.bin"
    run("--model", "llama", "--input_path", hub, "--output_path", plain)
    expected = layout.llama(hub_arrays(source))
    assert_equal(stored_arrays(plain), expected)
    run("--model", "llama", "--input_path", hub, "--output_path", fused, flag)
    assert_equal(stored_arrays(fused), layout.fused(expected, 4, 2))


def test_fusing_a_checkpoint_of_mindspore(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava", "llama3")
    expected = layout.llama(hub_arrays(source))
    plain = layout.write_ckpt(tmp_path / "llama.ckpt", expected)
    convert(source, tmp_path / "with_yaml", "mindformers-llama")
    config = tmp_path / "with_yaml" / "predict_llama.yaml"
    out = tmp_path / "fused.ckpt"
    common = ("--model", "llama", "--qkv_concat", "True", "--mindspore_ckpt_path", out)
    run(*common, "--pre_ckpt_path", plain, "--config_path", config)
    assert_equal(stored_arrays(out), layout.fused(expected, 4, 2))


def test_clip(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny("llava"), tmp_path / "clip.ckpt"
    run("--model", "clip", "--input_path", source, "--output_path", out)
    expected = layout.clip(hub_arrays(source))
    expected = {n: a for n, a in expected.items() if n.startswith("visual.") and n != "visual.proj"}
    assert_equal(stored_arrays(out), expected)


def test_the_script_of_llava_next(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llava_next")
    monkeypatch.chdir(tmp_path)
    run("--torch_ckpt_path", source)
    assert_equal(stored_arrays(tmp_path / "llava_next.ckpt"), layout.llava(hub_arrays(source)))
    run("--torch_ckpt_path", source, "--mindspore_ckpt_path", tmp_path / "other.ckpt")
    assert (tmp_path / "other.ckpt").is_file()


def test_an_existing_file_is_replaced_and_a_directory_kept(tiny: Tiny, tmp_path: Path) -> None:
    common = ["--model", "llava", "--input_path", str(tiny("llava")), "--output_path"]
    (tmp_path / "m.ckpt").write_bytes(b"old")
    run(*common, tmp_path / "m")
    assert_equal(stored_arrays(tmp_path / "m.ckpt"), layout.llava(hub_arrays(tiny("llava"))))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "precious").write_text("x")
    assert main([*common, f"{tmp_path}/d/"]) == 2
    assert (tmp_path / "d" / "precious").is_file()
    run(*common, f"{tmp_path}/d/", "--overwrite")
    assert not (tmp_path / "d" / "precious").exists()


def test_an_interruption_can_be_resumed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "llava", "--input_path", str(tiny("llava"))]
    arguments += ["--output_path", str(tmp_path / "m.ckpt")]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.FORMATS["ckpt"].write_file.__globals__["os"], "replace", stop)
        assert main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "m.ckpt").exists()
    assert main(arguments) == 2
    run(*arguments, "--resume")
    assert_equal(stored_arrays(tmp_path / "m.ckpt"), layout.llava(hub_arrays(tiny("llava"))))


# --- back ----------------------------------------------------------------------------------------


def test_back_to_a_directory(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next")
    file = layout.write_ckpt(tmp_path / "m.ckpt", layout.llava(hub_arrays(source)))
    common = ("--model", "llava_next", "--reversed", "--input_path", file)
    assert main([*map(str, common), "--output_path", str(tmp_path / "no")]) == 2
    run(*common, "--output_path", tmp_path / "hub", "--base", source)
    assert compare(source, tmp_path / "hub").equal
    for path in source.glob("*.json"):
        if not path.name.endswith(".index.json"):
            found = json.loads((tmp_path / "hub" / path.name).read_text())
            assert found == json.loads(path.read_text())


def test_back_with_the_manifest(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, file = tiny("llava_next"), tmp_path / "m.ckpt"
    run("--model", "llava_next", "--input_path", source, "--output_path", file)
    run(
        "--model", "llava_next", "--reversed", "--input_path", file, "--output_path", tmp_path / "h"
    )
    assert compare(source, tmp_path / "h").equal
    assert "no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".bin", ".pth"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_back_to_weights_alone_needs_no_configuration(
    tiny: Tiny, tmp_path: Path, family: str, suffix: str
) -> None:
    source = tiny(family, "qwen2", dtype="bfloat16")
    file = layout.write_ckpt(tmp_path / "m.ckpt", layout.llava(hub_arrays(source)))
    out = tmp_path / f"out{suffix}"
    run("--model", "llava_next", "--reversed", "--mindspore_ckpt_path", file,
        "--torch_ckpt_path", out)  # fmt: skip
    assert_equal(stored_arrays(out), hub_arrays(source))


def test_a_language_model_back(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava")
    hub = part(hub_arrays(source), "language_model.")
    expected = {name.removeprefix("language_model."): array for name, array in hub.items()}
    inside = layout.write_ckpt(tmp_path / "inside.ckpt", layout.llava(hub))
    alone = layout.write_ckpt(tmp_path / "alone.ckpt", layout.llama(hub))
    out = tmp_path / "out.bin"
    for arguments in (
        ("--model", "llava_next", "--from_language", "True", "--input_path", inside),
        ("--model", "llama", "--input_path", alone),
    ):
        run(*arguments, "--reversed", "--output_path", out, "--dtype", "fp16")
        halves = {name: array.astype(np.float16) for name, array in expected.items()}
        assert_equal(stored_arrays(out), halves)


def test_what_cannot_be_told_without_a_configuration(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava", "llama3")
    arrays = layout.llama(hub_arrays(source))
    fused = layout.write_ckpt(tmp_path / "fused.ckpt", layout.fused(arrays, 4, 2))
    lacking = {n: a for n, a in arrays.items() if "layers.1.attention.wo" not in n}
    layout.write_ckpt(tmp_path / "lacking.ckpt", lacking)
    common = ["--model", "llama", "--reversed", "--output_path", str(tmp_path / "o.bin")]
    for name, message in (("fused", "how many heads"), ("lacking", "missing: language_model")):
        with pytest.raises(CheckpointError, match=message):
            legacy_cli.run(read_arguments([*common, "--input_path", f"{tmp_path}/{name}.ckpt"]))
    run(*common, "--input_path", fused, "--base", source)
    hub = part(hub_arrays(source), "language_model.")
    expected = {name.removeprefix("language_model."): array for name, array in hub.items()}
    assert_equal(stored_arrays(tmp_path / "o.bin"), expected)


# --- errors --------------------------------------------------------------------------------------

PATHS = ("--input_path", "IN", "--output_path", "OUT")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (PATHS, "--model is missing"),
        (("--model", "gpt2", *PATHS), "not converted here"),
        (("--model", "llava", "--input_path", "IN"), "--output_path is missing"),
        (("--model", "llava", "--output_path", "OUT"), "--input_path is missing"),
        (("--model", "llava", "--torch_ckpt_path", "X", *PATHS), "--input_path is given twice"),
        (("--model", "llava", *PATHS, "--from_visio", "True"), "unrecognized arguments"),
        (("--model", "llava", *PATHS, "--from_vision", "maybe"), "neither True nor False"),
        (("--model", "llava", *PATHS, "--reversed", "True"), "unrecognized arguments: True"),
        (("--model", "llava", *PATHS, "--dtype", "int8"), "no such dtype"),
        (("--model", "llava", *PATHS, "--layers", "12"), "--layers has no meaning"),
        (("--model", "llava", *PATHS, "--is_pretrain", "True"), "--is_pretrain has no meaning"),
        (("--model", "llava", *PATHS, "--telechat_type", "x"), "--telechat_type has no meaning"),
        (("--model", "llava_next", *PATHS, "--qkv_concat"), "--qkv_concat is for language"),
        (("--model", "llama", *PATHS, "--qkv_concat", "--reversed"), "--qkv_concat is for"),
        (("--model", "llama", "--pre_ckpt_path", "P", "--output_path", "O"), "--pre_ckpt_path is"),
        (("--model", "llava", *PATHS, "--from_vision", "--from_language"), "exclude each other"),
        (("--model", "llama", *PATHS, "--from_vision"), "for the parts of a LLaVA"),
        (("--model", "llava", "--input_path", "I", "--output_path", "o.bin"), "--reversed"),
        (("--model", "llava", "--reversed", "--input_path", "I", "--output_path", "o.ckpt"),
         "--reversed writes PyTorch's"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_wrong_parts(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(tiny("llava"), tmp_path / "clip", "clip")
    common = ["--input_path", str(tmp_path / "clip"), "--output_path", str(tmp_path / "o.ckpt")]
    assert main(["--model", "llava_next", *common]) == 2
    assert "--from_vision True" in capsys.readouterr().err
    assert main(["--model", "llama", *common]) == 2
    assert "has no language" in capsys.readouterr().err
    assert not (tmp_path / "o.ckpt").exists()


def test_notes(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input_path", str(tiny("llava_next")), "--output_path", str(tmp_path / "o")]
    run("--model", "llava", *arguments)
    assert "this is a llava_next" in capsys.readouterr().err
    run("--model", "vicuna", *arguments)
    assert "do not belong to it" in capsys.readouterr().err
    run("--model", "llava-next", *arguments)
    assert capsys.readouterr().err == ""


# --- where nothing is installed ------------------------------------------------------------------

ALONE = """
import runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"numpy", "weight_convert", "convert_weight"}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Finder())
sys.argv = ["convert_weight.py", *sys.argv[1:]]
runpy.run_path("convert_weight.py", run_name="__main__")
"""


def alone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process that has NumPy and the standard library, and nothing else."""
    command = [sys.executable, "-c", ALONE, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_numpy_is_enough(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llava_next", dtype="bfloat16")
    there = f"{tmp_path}/dir/"
    done = alone("--model", "llava_next", "--input_path", source, "--output_path", there)
    assert (done.returncode, done.stderr) == (0, "")
    assert_equal(stored_arrays(tmp_path / "dir"), layout.llava(hub_arrays(source)))
    back = ("--model", "llava_next", "--reversed", "--input_path", there)
    done = alone(*back, "--output_path", tmp_path / "hub")
    assert (done.returncode, done.stderr) == (0, "")
    assert compare(source, tmp_path / "hub").equal
    done = alone(*back, "--output_path", tmp_path / "hub.bin")
    assert (done.returncode, done.stderr) == (0, "")
    assert_equal(stored_arrays(tmp_path / "hub.bin"), hub_arrays(source))


def test_errors_have_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(b"\x0a\xff\xff\xff")
    output = tmp_path / "o.bin"
    for source in ("nowhere", tmp_path / "bad.ckpt", tmp_path):
        done = alone(
            "--model", "llava", "--reversed", "--input_path", source, "--output_path", output
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    done = alone("--help")
    assert done.returncode == 0 and "--model llava_next --input_path DIR" in done.stdout
