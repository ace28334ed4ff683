"""`unillava train` on two processes of each framework's launcher: the same run as on one.

The order of the records is fixed, so that it is known which rank has no picture in which
micro-batch: a rank that waited for gradients of the tower would wait forever.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.cross.conftest import environment
from unillava.training import state

UPDATES = ("PTPT", "TPTP", "PPTT", "TTTT", "TTPT")
"""Kinds of the samples of each update: a picture or text alone. Rank 0 takes the first and third,
rank 1 the others, one in each pass."""
TOLERANCE = 1e-5
LAUNCH_SECONDS = 300

SHARED = {
    "torch": ("ddp", "fsdp", "zero2", "zero3"),
    "mindspore": ("ddp", "zero1"),
    "paddle": ("ddp", "zero1"),
}
WHOLE = [(backend, strategy) for backend, known in SHARED.items() for strategy in known]


@pytest.fixture(scope="module")
def recipe(tiny, photo, tmp_path_factory) -> Path:
    """All parts are trained, the vision tower too."""
    folder = tmp_path_factory.mktemp("train")
    records = []
    for n, kind in enumerate("".join(UPDATES)):
        asked = {"P": f"<image>\nWhat is number {n}?", "T": f"Say {n}."}[kind]
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"It is {n}."}]
        record = {"id": n, "conversations": turns}
        records.append(record | {"image": str(photo)} if kind == "P" else record)
    (folder / "data.json").write_text(json.dumps(records))
    # Few layers: MindSpore compiles them for each set of shapes.
    shallow = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 2}}
    content = {
        "model": {"path": str(tiny("llava_next", config=shallow))},
        "data": {
            "files": [{"path": str(folder / "data.json")}],
            "shuffle": False,
            "workers": 0,
            "pad_to": 64,
        },
        "rates": {"language": 1e-3, "projector": 1e-3, "vision": 1e-4},
        "steps": {"batch": 4, "micro_batch": 1, "max_steps": len(UPDATES)},
        "optimizer": {"weight_decay": 0.01},
        "saving": {"every": 100},
        "output": str(folder / "never"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def launcher(backend: str, processes: int, logs: Path) -> list[str]:
    """What stands before `unillava`."""
    python, programs = sys.executable, Path(sys.executable).parent
    if processes == 1:
        return [python, "-m"]
    count = str(processes)
    if backend == "torch":
        return [
            python,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            count,
            "-m",
        ]
    if backend == "paddle":
        words = [python, "-m", "paddle.distributed.launch", "--nproc_per_node", count]
        return [*words, "--log_dir", str(logs), python, "-u", "-m"]
    words = [str(programs / "msrun"), "--worker_num", count, "--local_worker_num", count]
    words += ["--master_port", str(free_port()), "--log_dir", str(logs), "--join", "True"]
    return [*words, "python", "-m"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def train(
    recipe: Path, output: Path, backend: str, strategy: str, *arguments: str, code: int | None = 0
) -> str:
    """Two processes, or one for `single`; returns what they said. `code` None: any failure."""
    processes = 1 if strategy == "single" else 2
    logs = output.parent / f"{output.name}-{strategy}-logs"
    words = ["unillava", "train", str(recipe), f"output={output}", f"running.strategy={strategy}"]
    done = subprocess.run(
        [*launcher(backend, processes, logs), *words, *arguments],
        capture_output=True,
        text=True,
        timeout=LAUNCH_SECONDS,
        # msrun starts the first `python` of the path.
        env=environment(
            UNILLAVA_BACKEND=backend,
            PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        ),
        cwd=output.parent,
        check=False,
    )
    told = done.stdout + done.stderr
    told += "".join(path.read_text() for path in sorted(logs.glob("*.log")))
    assert done.returncode == code or (code is None and done.returncode != 0), told[-6000:]
    return told


def books(output: Path) -> np.ndarray:
    """Loss, norm, and norms of the groups of each step."""
    entries = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return np.array([[e["loss"], e["norm"], *e["norms"].values()] for e in entries])


def tensors(output: Path) -> dict[str, np.ndarray]:
    saved = state.find_latest(output)
    return {name: tensor.read() for name, tensor in saved.tensors.items()}


def assert_same(output: Path, expected: Path) -> None:
    np.testing.assert_allclose(books(output), books(expected), rtol=TOLERANCE)
    found, wanted = tensors(output), tensors(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith("parameter/"):
            # AdamW divides a gradient by its size, however near to zero.
            assert np.abs(found[name] - value).max() <= 1e-3, name


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """`alone(backend)`: the output of the run on one process."""
    folder = tmp_path_factory.mktemp("alone")

    def run(backend: str) -> Path:
        output = folder / backend
        if not output.exists():
            train(recipe, output, backend, "single")
        return output

    return run


@pytest.mark.parametrize(("backend", "strategy"), WHOLE)
def test_two_ranks_are_one(backend, strategy, recipe, alone, tmp_path):
    """Mixed batches run to the end, and to the same model."""
    train(recipe, tmp_path / "out", backend, strategy)
    assert_same(tmp_path / "out", alone(backend))


def test_ranks_strategies_and_frameworks_change_midway(recipe, alone, tmp_path):
    """Two ranks, one, two again, each time of another framework."""
    output = tmp_path / "out"
    train(recipe, output, "torch", "fsdp", "--stop-at", "2", code=None)
    assert "written by torch" in train(
        recipe, output, "paddle", "single", "--stop-at", "3", code=143
    )
    assert "written by paddle" in train(recipe, output, "mindspore", "zero1")
    assert_same(output, alone("torch"))


@pytest.mark.parametrize("backend", SHARED)
def test_a_rank_that_fails_ends_the_run(backend, recipe, photo, tmp_path):
    """Rank 1 meets a picture that is not there; rank 0 does not wait for it."""
    content = yaml.safe_load(recipe.read_text())
    file = Path(content["data"]["files"][0]["path"])
    records = json.loads(file.read_text())
    records[5]["image"] = str(tmp_path / "gone.jpg")
    (tmp_path / "data.json").write_text(json.dumps(records))
    broken = tmp_path / "recipe.yaml"
    content["data"] |= {"files": [{"path": str(tmp_path / "data.json")}], "on_bad": "stop"}
    broken.write_text(yaml.safe_dump(content))
    began = time.monotonic()
    told = train(broken, tmp_path / "out", backend, "ddp", code=None)
    assert "gone.jpg" in told
    assert time.monotonic() - began < 150, "far from the 30 minutes that a rank may wait"
    assert not (tmp_path / "out" / "final").exists()
