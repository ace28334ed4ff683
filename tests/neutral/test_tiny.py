"""Tiny checkpoints open as checkpoints, and the command writes them."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from unillava.checkpoint import open_checkpoint
from unillava.cli import tiny as command
from unillava.errors import DataError
from unillava.spec import parameter_table
from unillava.tiny import ARCHITECTURES, TEXTS, VISIONS


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("text", list(TEXTS))
@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_every_combination_is_a_sound_checkpoint(tiny, family, text, vision):
    checkpoint = open_checkpoint(str(tiny(family, text, vision)))
    checkpoint.check()
    spec = checkpoint.spec
    assert (spec.family, spec.vision.kind) == (family, vision)
    assert spec.text.kind == TEXTS[text].model_type
    assert spec.text.rope.kind == ("llama3" if text == "llama3" else "default")
    assert spec.text.tie_embeddings == (text == "qwen2")
    assert (spec.video is not None) == (family == "llava_next_video")
    assert dict(checkpoint.shapes) == parameter_table(spec)


def invoke(*arguments):
    app = typer.Typer()
    command.register(app)
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_command_writes_a_checkpoint(tmp_path):
    result = invoke(tmp_path / "new", "--family", "llava", "--text", "qwen2", "--dtype", "bfloat16")
    assert result.exit_code == 0 and "llava, qwen2, clip" in result.stdout
    assert open_checkpoint(str(tmp_path / "new")).spec.dtype == "bfloat16"
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_small_is_a_million_parameters_and_knows_the_words_of_its_corpus(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the purple hexagon\na purple octagon\n" * 20)
    result = invoke(tmp_path / "new", "--family", "llava", "--size", "small", "--corpus", corpus)
    assert result.exit_code == 0
    checkpoint = open_checkpoint(str(tmp_path / "new"))
    checkpoint.check()
    assert 0.9e6 < sum(math.prod(shape) for shape in checkpoint.shapes.values()) < 1.1e6
    assert checkpoint.tokenizer().tokenize("the purple octagon") == ["▁the", "▁purple", "▁octagon"]
    for name, array, _ in checkpoint.tensors():
        if name.endswith(".bias"):
            assert not array.any(), name
        elif "norm" in name:
            assert (array == 1).all(), name


def test_a_corpus_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="corpus cannot be read"):
        command.read_corpus(tmp_path / "corpus.txt")


def test_a_mistake_is_exit_code_2_and_a_message(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = subprocess.run(
        [sys.executable, "-m", "unillava", "tiny", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 2, done.stderr
    assert "is taken" in done.stderr and "what to do" in done.stderr
    assert "Traceback" not in done.stderr
