"""A session: a recipe that cannot fit, the loss scale over a resumption, old runs put aside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from unillava.training import state
from unillava.training.session import put_aside


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory) -> Path:
    """Text only, float16."""
    folder = tmp_path_factory.mktemp("session")
    turns = [{"from": "human", "value": "Say 1."}, {"from": "gpt", "value": "It is 1."}]
    records = [{"id": str(n), "conversations": turns} for n in range(8)]
    (folder / "data.json").write_text(json.dumps(records))
    content = {
        "model": {"path": str(tiny("llava"))},
        "data": {"files": [{"path": str(folder / "data.json")}], "max_length": 64, "workers": 0},
        "rates": {"projector": 1e-3},
        "steps": {"batch": 2, "max_steps": 4},
        "running": {"precision": "float16"},
        "output": str(folder / "never"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unillava", "train", str(recipe), "--backend", "torch",
         "--device", "cpu", *arguments],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_loss_scale_goes_on_where_it_was(recipe: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'out'}"
    assert train(recipe, output, "--stop-at", "1").returncode == 143
    file = tmp_path / "out" / "checkpoint-1" / "state.json"
    facts = json.loads(file.read_text())
    assert facts["loss_scale"] == {"size": 2.0**16, "good": 1}
    file.write_text(json.dumps(facts | {"loss_scale": {"size": 64.0, "good": 1998}}))
    done = train(recipe, output, "--stop-at", "3")
    assert done.returncode == 143, done.stderr
    # 1999 good ones, then 2000: the size doubles.
    assert state.find_latest(tmp_path / "out").facts["loss_scale"] == {"size": 128.0, "good": 0}


def test_a_recipe_that_cannot_fit_is_refused_before_it_begins(recipe: Path, tmp_path: Path) -> None:
    done = train(recipe, f"output={tmp_path / 'out'}", "running.memory=0.0001")
    assert done.returncode == 2 and "cannot fit" in done.stderr, done.stderr
    assert "running.recompute=true" in done.stderr or "smaller" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_put_aside(tmp_path: Path) -> None:
    assert put_aside(tmp_path) is None
    for number in (1, 2):
        (tmp_path / "checkpoint-8").mkdir()
        (tmp_path / "log.jsonl").write_text(str(number))
        assert put_aside(tmp_path) == tmp_path / f"before-{number}"
        assert not state.saved_steps(tmp_path) and not (tmp_path / "log.jsonl").exists()
    assert (tmp_path / "before-1" / "log.jsonl").read_text() == "1"
    assert (tmp_path / "before-2" / "checkpoint-8").is_dir()
