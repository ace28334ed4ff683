"""QLoRA on the command line: one run on three frameworks in turn, then convert, merge, chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from unillava.training import state
from unillava.training.lora import LOW
from weight_convert.opening import open_source
from weight_convert.source import Options

ORDER = ("torch", "mindspore", "paddle")
STEPS = 2 * len(ORDER)


@pytest.fixture(scope="module")
def base(tiny) -> Path:
    return tiny("llava_next")


@pytest.fixture(scope="module")
def recipe(base, photo, tmp_path_factory) -> Path:
    """Adapters with dropout on 4-bit weights, and the whole projector at a rate of its own."""
    folder = tmp_path_factory.mktemp("lora")
    records = []
    for n in range(8):
        picture = {"image": str(photo)} if n % 2 else {}
        turns = [("human", "<image>\n" * (n % 2) + f"What is {n}?"), ("gpt", f"A thing, {n}.")]
        turns = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": f"number {n}", **picture, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    content = {
        "model": {"path": str(base)},
        "data": {
            "files": [{"path": str(folder / "data.json")}],
            "max_length": 512,
            "workers": 0,
            "pad_to": 512,
        },
        "rates": {"language": 1e-2, "projector": 1e-3},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "base": "nf4"},
        "steps": {"batch": 4, "micro_batch": 2, "max_steps": STEPS},
        "optimizer": {"warmup_ratio": 0},
        "running": {"compiled": False},
        "saving": {"every": 2},
        "output": str(folder / "never"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def moved(recipe, tmp_path_factory) -> Path:
    """The output of a run whose every third was computed by another framework."""
    from tests.cross.runs.test_train import train

    output = tmp_path_factory.mktemp("moved") / "out"
    for n, backend in enumerate(ORDER, 1):
        last = n == len(ORDER)
        options = [] if last else ["--stop-at", str(2 * n)]
        train(recipe, output, backend, *options, code=0 if last else 143)
    return output


@pytest.fixture
def final(moved) -> Path:
    return moved / "final"


def losses(output: Path) -> list[float]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_the_loss_does_not_notice_who_computes_it(run, recipe, moved, tmp_path):
    """Dropout and few bits included: the same as on torch from beginning to end."""
    run("train", recipe, f"output={tmp_path / 'out'}").succeeded()
    found, expected = losses(moved), losses(tmp_path / "out")
    assert len(found) == len(expected) == STEPS
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    quiet = tmp_path / "quiet"
    run("train", recipe, f"output={quiet}", "lora.dropout=0", "--stop-at", 2)
    assert abs(losses(quiet)[1] / expected[1] - 1) > 1e-3


def test_what_is_trained_is_shown_and_saved(run, recipe, moved):
    shown = run("train", recipe, "--dry-run").succeeded().out
    saved = state.find_latest(moved)
    parameters = {n.removeprefix("parameter/"): t for n, t in saved.tensors.items()
                  if n.startswith("parameter/")}  # fmt: skip
    low = [np.prod(t.shape) for n, t in parameters.items() if n.endswith(LOW)]
    rest = [np.prod(t.shape) for n, t in parameters.items() if not n.endswith(LOW)]
    assert f" {sum(low):,} " in shown and f" {sum(rest):,} " in shown
    assert len(low) == 2 * 21


def test_merge(run, final, base, moved, tmp_path):
    """Every matrix is W + (alpha / rank) B A on the base in full; nothing else changes."""
    done = run("merge", final, tmp_path / "merged").succeeded()
    assert "21 matrices were merged" in done.out
    merged, start = (open_source(path).tensors for path in (tmp_path / "merged", base))
    assert merged.keys() == start.keys()
    saved, changed = state.find_latest(moved), set()
    for name, tensor in start.items():
        module, before, after = name.removesuffix(".weight"), tensor.read(), merged[name].read()
        if f"parameter/{module}{LOW[0]}" in saved.tensors:
            a, b = (saved.read(module + end, "parameter") for end in LOW)
            np.testing.assert_allclose(after, before + 2 * b @ a, atol=1e-6)
            changed.add(name)
        elif f"parameter/{name}" in saved.tensors:
            np.testing.assert_array_equal(after, saved.read(name, "parameter"))
        else:
            np.testing.assert_array_equal(after, before)
    assert len(changed) == 21
    done = run("merge", final, tmp_path / "half", "--base", base, "--dtype", "bfloat16")
    done.succeeded()
    half = open_source(tmp_path / "half").tensors
    assert {tensor.dtype for tensor in half.values()} == {"BF16"}


def test_merge_refuses_what_is_no_adapter(run, base, final, tmp_path):
    assert "nothing to merge" in run("merge", base, tmp_path / "out").refused()
    nowhere = tmp_path / "nowhere"
    shutil.copytree(final, nowhere)
    settings = json.loads((nowhere / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (nowhere / "adapter_config.json").write_text(json.dumps(settings))
    assert "--base" in run("merge", nowhere, tmp_path / "out").refused()
    assert not (tmp_path / "out").exists()


def test_chat_with_an_adapter_is_chat_with_the_merged_model(run, final, base, photo, tmp_path):
    run("merge", final, tmp_path / "merged").succeeded()
    question = ("--image", photo, "--prompt", "What is 3?", "--max-new-tokens", "12")
    adapted = run("chat", final, "--base", base, *question).succeeded().out
    assert adapted == run("chat", tmp_path / "merged", *question).succeeded().out
    assert adapted != run("chat", base, *question).succeeded().out


def test_the_adapter_becomes_paddles_and_comes_back(run, final, base, tmp_path):
    paddle = tmp_path / "paddle"
    run("convert", final, paddle, "--to", "paddle-lora").succeeded()
    assert (paddle / "lora_config.json").is_file()
    first, second = (open_source(path, Options(base=base)).tensors for path in (final, paddle))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name].read(), tensor.read())
