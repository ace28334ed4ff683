"""convert, verify and compose on the command line; chat on checkpoints of every dialect."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from weight_convert.dialects import registry

PROMPT = ["--prompt", "What is this?", "--max-new-tokens", "6"]
WHOLE = ("original", "mindformers", "mindspore", "paddlemix", "parts")


def test_list_shows_every_dialect(run):
    shown = run("convert", "--list").succeeded().out
    for name in registry.dialects():
        assert name in shown
    for name in ("hf", "original", "mindformers", "mindspore", "paddlemix", "peft", "paddle-lora"):
        assert name in registry.dialects()
    assert {"delta", "parts", "moss2", "mpt"} <= registry.dialects().keys()


@pytest.mark.parametrize("dialect", WHOLE)
def test_chat_is_the_same_from_every_dialect(run, tiny, photo, tmp_path, dialect):
    """`unillava.load` opens any dialect without converting first."""
    source, there = tiny("llava_next"), tmp_path / "there"
    reply = run("chat", source, "--image", photo, *PROMPT).succeeded().out
    run("convert", source, there, "--to", dialect, "--verify").succeeded()
    assert run("chat", there, "--image", photo, *PROMPT).succeeded().out == reply
    assert dialect in run("info", there).succeeded().out


def test_a_bare_file_needs_a_base(run, tiny, photo, tmp_path):
    source, file = tiny("llava_next"), tmp_path / "llava_next.ckpt"
    run("convert", source, file, "--to", "mindformers").succeeded()
    assert file.is_file()
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "model.ckpt"
    file.rename(moved)  # without its manifest
    assert "--base" in run("chat", moved, *PROMPT).refused()
    reply = run("chat", source, "--image", photo, *PROMPT).succeeded().out
    assert run("chat", moved, "--base", source, "--image", photo, *PROMPT).succeeded().out == reply


def test_the_plan_is_a_table(run, tiny, tmp_path):
    shown = run("convert", tiny(), tmp_path / "x", "--to", "paddlemix", "--dry-run").succeeded().out
    lines = [line.split("\t") for line in shown.splitlines() if "\t" in line]
    assert lines[0] == ["source", "operation", "target", "shape", "dtype", "file"]
    table = {line[0]: line[1:] for line in lines[1:]}
    assert table["language_model.lm_head.weight"][:2] == ["transpose", "lm_head.weight"]
    assert not (tmp_path / "x").exists()


def test_verify_says_equal_or_different(run, tiny, tmp_path):
    source, there = tiny(), tmp_path / "there"
    run("convert", source, there, "--to", "original").succeeded()
    assert "EQUAL" in run("verify", there).succeeded().out
    assert "EQUAL" in run("verify", source, there).succeeded().out
    other = tiny(seed=1)
    different = run("verify", other, there)
    assert different.code == 1 and "DIFFERENT" in different.out
    assert "no manifest" in run("verify", other).refused()


def test_compose_from_parts(run, tiny, tmp_path):
    source = tiny("llava")
    for part, dialect in (("v", "clip"), ("l", "llama"), ("p.bin", "projector")):
        run("convert", source, tmp_path / part, "--to", dialect).succeeded()
    run(
        "compose", tmp_path / "whole", "--vision", tmp_path / "v", "--language", tmp_path / "l",
        "--projector", tmp_path / "p.bin",
    ).succeeded()  # fmt: skip
    assert "EQUAL" in run("verify", source, tmp_path / "whole").succeeded().out
    fresh = [tmp_path / name for name in ("new", "again")]
    for place in fresh:
        run(
            "compose", place, "--vision", tmp_path / "v", "--language", tmp_path / "l",
            "--projector", "mlp2x_gelu", "--seed", "7",
        ).succeeded()  # fmt: skip
    assert "EQUAL" in run("verify", *fresh).succeeded().out
    assert run("verify", source, fresh[0]).code == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{source}"], "--to DIALECT"),
        (["{source}", "{out}", "--to", "nonesuch"], "mindformers"),
        (["{source}", "{out}", "--to", "hf", "--dtype", "int4"], "bfloat16"),
        (["{source}", "{out}", "--to", "hf", "--shard-size", "many"], "5GB"),
        (["{source}", "{out}", "--to", "hf", "--weights", "zip"], "safetensors"),
        (["{source}", "{out}", "--to", "hf", "--parts", "brain"], "vision"),
        (["{source}", "{out}", "--to", "hf", "--spelling", "odd"], "hub"),
        (["{source}", "{out}", "--to", "peft"], "adapter"),
        (["{source}", "{out}", "--to", "delta"], "--base"),
        (["{source}", "{out}", "--to", "mpt"], "MPT"),
        (["/nowhere", "{out}", "--to", "hf"], "/nowhere"),
        (["{source}", "{source}", "--to", "hf"], "exists already"),
    ],
)
def test_bad_input(run, tiny, tmp_path, arguments, told):
    names = {"source": tiny(), "out": tmp_path / "out"}
    told_text = run("convert", *(text.format(**names) for text in arguments)).refused()
    assert told in told_text
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_an_index_that_leaves_its_folder(run, tiny, tmp_path):
    copy = Path(shutil.copytree(tiny(), tmp_path / "copy"))
    weights = next(copy.glob("*.safetensors"))
    names = ["language_model.lm_head.weight"]
    weights.rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" in run("convert", copy, tmp_path / "out", "--to", "original").refused()


def test_convert_loads_no_framework(tiny, tmp_path):
    code = (
        "import sys; from unillava.cli.app import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded = {'torch', 'mindspore', 'paddle', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    arguments = ["convert", str(tiny()), str(tmp_path / "o"), "--to", "paddlemix", "--verify"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
