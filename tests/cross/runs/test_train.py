"""Training on the command line: one recipe, three frameworks, and a run that changes them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import yaml

from tests.cross.conftest import environment
from unillava.training import state

BACKENDS = ("torch", "mindspore", "paddle")
STEPS = 50
STATIONS = ("torch", "mindspore", "paddle", "torch", "paddle", "mindspore", "torch")
"""Where a run goes on: every framework takes over from every other."""


@pytest.fixture(scope="module")
def recipe(tiny, photo, tmp_path_factory) -> Path:
    """A recipe with pictures and text-only samples; both parts are trained."""
    folder = tmp_path_factory.mktemp("train")
    records = []
    for n in range(20):
        turns = [("human", f"<image>\nWhat is number {n}?"), ("gpt", f"A thing, number {n}.")]
        records.append({"id": f"picture {n}", "image": str(photo), "conversations": turns})
    for n in range(6):
        turns = [("human", f"Say {n}."), ("gpt", f"It is {n}.")]
        records.append({"id": f"text {n}", "conversations": turns})
    for record in records:
        record["conversations"] = [{"from": w, "value": v} for w, v in record["conversations"]]
    (folder / "data.json").write_text(json.dumps(records))
    content = {
        "model": {"path": str(tiny("llava_next"))},
        "data": {
            "files": [{"path": str(folder / "data.json")}],
            "max_length": 512,
            "workers": 0,
            "pad_to": 64,
        },
        "rates": {"language": 1e-3, "projector": 1e-3},
        "steps": {"batch": 4, "micro_batch": 2, "max_steps": STEPS},
        "optimizer": {"weight_decay": 0.01},
        "saving": {"every": 5},
        "output": str(folder / "never"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(recipe: Path, output: Path, backend: str, *arguments: str) -> list[str]:
    base = [sys.executable, "-m", "unillava", "train", str(recipe), f"output={output}"]
    return [*base, *arguments, "--backend", backend]


def train(recipe: Path, output: Path, backend: str, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        command(recipe, output, backend, *arguments),
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(),
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(output: Path) -> list[float]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines)]


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> Callable[[str], Path]:
    """Backend -> the output of a run from beginning to end."""

    @cache
    def of(backend: str) -> Path:
        output = tmp_path_factory.mktemp(backend) / "out"
        train(recipe, output, backend)
        return output

    return of


@pytest.fixture(scope="module")
def whole(uninterrupted) -> Path:
    """The uninterrupted run on torch."""
    return uninterrupted("torch")


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_loss_is_the_same_on_every_backend(whole, uninterrupted, backend):
    found, expected = losses(uninterrupted(backend)), losses(whole)
    assert len(found) == len(expected) == STEPS
    assert max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)) <= 1e-4


def test_a_run_changes_frameworks_midway(recipe, whole, tmp_path):
    output = tmp_path / "out"
    assert {*pairwise(STATIONS)} == {*permutations(BACKENDS, 2)}
    for n, backend in enumerate(STATIONS[:-1], start=1):
        text = train(recipe, output, backend, "--stop-at", str(7 * n), code=143)
        assert n == 1 or f"written by {STATIONS[n - 2]}" in text
    assert "written by mindspore" in train(recipe, output, STATIONS[-1])
    found, expected = losses(output), losses(whole)
    assert len(found) == STEPS
    assert max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)) <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_kill_9_and_resume_is_bit_identical(recipe, uninterrupted, tmp_path, backend):
    output, expected = tmp_path / "out", uninterrupted(backend)
    process = subprocess.Popen(
        command(recipe, output, backend), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment(),
    )  # fmt: skip
    while not state.saved_steps(output):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.5))  # anywhere: between updates, in one, while saving
    process.kill()
    process.wait()
    begun = max(state.saved_steps(output))
    assert f"going on from {output / f'checkpoint-{begun}'}" in train(recipe, output, backend)
    assert losses(output) == losses(expected)
    theirs = state.open_saved(state.saved_steps(expected)[STEPS])
    ours = state.open_saved(state.saved_steps(output)[STEPS])
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert tensor.read().tobytes() == theirs.tensors[name].read().tobytes(), name


def test_sigterm_saves_and_ends(recipe, tmp_path):
    output = tmp_path / "out"
    process = subprocess.Popen(
        command(recipe, output, "torch", "steps.max_steps=100000", "saving.every=100000"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 2 "):
            process.send_signal(signal.SIGTERM)
            break
    text = process.stdout.read()
    assert process.wait(60) == 143 and "stopped by SIGTERM" in text, text
    assert state.find_latest(output).step == len(losses(output))


def test_the_result_is_a_model(run, recipe, whole, photo):
    final = whole / "final"
    assert "EQUAL" in run("verify", final).succeeded().out
    run("chat", final, "--image", photo, "--prompt", "What?", "--max-new-tokens", "4").succeeded()
    assert (final / "mm_projector.bin").is_file()


def test_stage_one_then_stage_two(recipe, tmp_path, tiny):
    """The projector that stage 1 learnt is what stage 2 begins with."""
    first, second = tmp_path / "one", tmp_path / "two"
    train(recipe, first, "torch", "rates.language=null", "steps.max_steps=2")
    projector = first / "final" / "mm_projector.bin"
    adapter = f"model.pretrain_mm_mlp_adapter={projector}"
    train(recipe, second, "torch", adapter, "rates={language: 1.0e-12}", "steps.max_steps=2")
    from weight_convert.opening import open_source

    trained, given = open_source(second / "final"), open_source(first / "final")
    for name, tensor in given.tensors.items():
        if name.startswith("multi_modal_projector"):
            assert trained.tensors[name].read().tobytes() == tensor.read().tobytes()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stesp.batch=2", "did you mean steps?"),
        ("steps.batch=3", "a multiple"),
        ("model.path=/nowhere", "/nowhere"),
        ("data.files=[{path: /nowhere.json}]", "/nowhere.json"),
        ("running.strategy=magic", "magic"),
    ],
)
def test_bad_input(run, recipe, tmp_path, override, told):
    text = run("train", recipe, f"output={tmp_path / 'out'}", override).refused()
    assert told in text


def test_a_checkpoint_of_another_run_is_refused(run, recipe, whole):
    text = run("train", recipe, f"output={whole}", "rates={projector: 1.0e-3}").refused()
    assert "another run" in text and os.path.isdir(whole / "final")


def test_a_changed_recipe_is_named_on_resume(recipe, tmp_path):
    output = tmp_path / "out"
    train(recipe, output, "torch", "steps.max_steps=2", "--stop-at", "1", code=143)
    changes = ("steps.max_steps=2", "running.seed=7", "data.max_length=300", "saving.keep=1")
    text = train(recipe, output, "torch", *changes)
    assert "began with: data.max_length, running.seed changed" in " ".join(text.split())


def test_dry_run_says_what_would_be_trained(run, recipe, tmp_path):
    shown = run("train", recipe, f"output={tmp_path / 'out'}", "--dry-run").succeeded().out
    assert "language" in shown and "projector" in shown and "updates" in shown
    assert not (tmp_path / "out").exists()
