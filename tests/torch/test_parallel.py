"""Two processes (gloo) against one, for every strategy of the torch engine.

All jobs run in one launch of tests/training_workers/train.py; the tests look at what it left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import backends
from backends.contract import AdamW
from backends.errors import BackendError
from backends.torch import parallel, zero
from tests.training_cases import CASES, state_of
from tests.training_workers.train import saved_state

WORKER = Path(__file__).parents[1] / "training_workers" / "train.py"
SHARING = ("ddp", "fsdp", "zero2", "zero3")

JOBS: dict[str, dict] = {}
for name in SHARING:
    # Rows alternate between a picture and text alone, so one rank has all the pictures.
    recompute = name == "zero3"
    JOBS[f"{name}-llava"] = {"strategy": name, "case": "llava", "recompute": recompute}
    JOBS[f"{name}-whole"] = {"strategy": name, "steps": 4, "announce": True}
    JOBS[f"{name}-begun"] = {"strategy": name, "steps": 2}
    JOBS[f"{name}-resumed"] = {"strategy": name, "start": 2, "steps": 2, "restore": f"{name}-begun"}
    JOBS[f"{name}-spoilt"] = {"strategy": name, "steps": 3, "spoil": 1}
    JOBS[f"{name}-bfloat16"] = {"strategy": name, "dtype": "bfloat16", "steps": 1}
JOBS |= {
    "uneven": {"strategy": "ddp", "rows": 3, "announce": True},
    "uneven-llava": {"strategy": "fsdp", "case": "llava", "rows": 3, "recompute": True},
    "fsdp-to-zero3": {"strategy": "zero3", "start": 2, "steps": 2, "restore": "fsdp-begun"},
    "zero2-to-fsdp": {"strategy": "fsdp", "start": 2, "steps": 2, "restore": "zero2-begun"},
    "late": {"strategy": "fsdp", "late": True, "steps": 2},
    "unclipped": {"strategy": "zero3", "clip_norm": None},
    "kept-whole": {"strategy": "fsdp", "options": {"reshard_after_forward": False}},
    "configured": {
        "strategy": "zero2",
        "options": {
            "train_batch_size": "auto",
            "fp16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
            "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
        },
    },
    "offloaded": {
        "strategy": "zero3",
        "options": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    },
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads only wait for one another with modules as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("UNILLAVA_", "DS_"))}
    return kept | {"OMP_NUM_THREADS": "1", "UNILLAVA_BACKEND": "torch"} | changes


def written(folder: Path, jobs: dict[str, dict]) -> Path:
    """The jobs as a file; names of jobs become folders."""
    listed = [{"out": str(folder / name), **job} for name, job in jobs.items()]
    for job in listed:
        if "restore" in job:
            job["restore"] = str(folder / job["restore"])
    path = folder / "jobs.json"
    path.write_text(json.dumps(listed))
    return path


def torchrun(path: Path) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*run, str(WORKER), str(path)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    done = subprocess.run(
        torchrun(written(folder, JOBS)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not [line for line in done.stderr.splitlines() if "Warning" in line]
    return folder


class Outcome:
    """What a job left."""

    def __init__(self, folder: Path) -> None:
        self.state = saved_state(folder)
        files = [np.load(path) for path in sorted(folder.glob("rank-*.npz"))]
        self.books, self.steps = files[0]["books"], int(files[0]["steps"])
        for file in files[1:]:
            np.testing.assert_array_equal(file["books"], self.books)
        self.owned = [sum(file[n].nbytes for n in file if "/" in n) for file in files]


_EXPECTED: dict[tuple, tuple[np.ndarray, dict[str, np.ndarray]]] = {}


def expected(case_name="small", steps=3, rows=4, clip_norm=0.5, start=0):
    """Books and state of the same run in this process: one rank, the global batch."""
    key = (case_name, steps, rows, clip_norm, start)
    if key not in _EXPECTED:
        runtime, case, books = backends.runtime, CASES[case_name](), []
        settings = AdamW(beta2=0.95, clip_norm=clip_norm)
        module = case.build(runtime, case.trained)
        engine = backends.training.Engine(module, case.groups, settings)
        for step in range(start + steps):
            loss = sum(engine.accumulate(b, 1 / rows) for b in case.batches(step, rows))
            norms = engine.update(case.rates)
            books.append([loss, norms.total, *norms.groups.values(), 0.0])
        state = {f"{kind}/{name}": array for (name, kind), array in state_of(engine).items()}
        _EXPECTED[key] = np.array(books[start:]), state
    return _EXPECTED[key]


def assert_like(outcome: Outcome, books: np.ndarray, state: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(outcome.books, books, rtol=1e-5)
    assert outcome.state.keys() == state.keys()
    for name, value in state.items():
        # AdamW divides a gradient by its size: where that is near zero, rounding decides how
        # far a parameter goes, and the next gradients are taken there.
        bar = 5e-5 * np.abs(value).max()
        assert np.abs(outcome.state[name] - value).max() <= bar, name


# --- equal to one rank ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", SHARING)
def test_two_ranks_are_one(strategy, results):
    """A LLaVA, pictures on one rank only; then a module with a parameter that no loss uses."""
    assert_like(Outcome(results / f"{strategy}-llava"), *expected("llava"))
    assert_like(Outcome(results / f"{strategy}-whole"), *expected(steps=4))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("uneven", {"rows": 3}),
        ("uneven-llava", {"case_name": "llava", "rows": 3}),
        ("late", {"steps": 2}),
        ("unclipped", {"clip_norm": None}),
        ("kept-whole", {}),
        ("configured", {}),
        ("offloaded", {}),
    ],
)
def test_variants_are_one_rank(name, changes, results):
    assert_like(Outcome(results / name), *expected(**changes))


@pytest.mark.parametrize("strategy", SHARING)
def test_bfloat16_follows_float32(strategy, results):
    """To the 8 bits of bfloat16; the parameters keep more than that."""
    outcome = Outcome(results / f"{strategy}-bfloat16")
    books, state = expected(steps=1)
    np.testing.assert_allclose(outcome.books[:, :2], books[:, :2], rtol=0.02)
    name = "parameter/head.weight"
    moved = np.abs(outcome.state[name] - state[name]).max()
    assert moved <= 2 * 3e-3 + 1e-6, "one step at rate 3e-3, from the same float32 values"
    rounded = outcome.state[name].view(np.uint32) & 0xFFFF
    assert rounded.any(), "parameters were rounded to bfloat16"


# --- state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", SHARING)
def test_resumed_is_exact(strategy, results):
    """Two steps, state, two steps of another engine: bitwise the four steps of one."""
    whole, resumed = (Outcome(results / f"{strategy}-{part}") for part in ("whole", "resumed"))
    assert resumed.steps == 4
    np.testing.assert_array_equal(resumed.books, whole.books[2:])
    for name, value in whole.state.items():
        np.testing.assert_array_equal(resumed.state[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["fsdp-to-zero3", "zero2-to-fsdp"])
def test_strategies_take_each_others_state(name, results):
    assert_like(Outcome(results / name), *expected(steps=2, start=2))


@pytest.mark.parametrize("strategy", SHARING)
def test_one_rank_takes_the_state_of_two(strategy, results, runtime):
    saved = saved_state(results / f"{strategy}-begun")
    case = CASES["small"]()
    settings = AdamW(beta2=0.95, clip_norm=0.5)
    module = case.build(runtime, case.trained)
    engine = backends.training.Engine(module, case.groups, settings)
    engine.restore(2, lambda name, kind: saved[f"{kind}/{name}"])
    for name, kind, array in engine.state():
        np.testing.assert_array_equal(array, saved[f"{kind}/{name}"])
    books, _ = expected(steps=2, start=2)
    loss = sum(engine.accumulate(batch, 1 / 4) for batch in case.batches(2, 4))
    assert loss == pytest.approx(books[0, 0], rel=1e-5)


@pytest.mark.parametrize("strategy", SHARING)
def test_ranks_own_equal_shares(strategy, results):
    one, other = Outcome(results / f"{strategy}-llava").owned
    assert abs(one - other) <= 0.1 * (one + other)


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", SHARING)
def test_one_bad_rank_skips_on_all(strategy, results):
    """An infinite value on one rank: no rank takes the step, and the run goes on."""
    outcome = Outcome(results / f"{strategy}-spoilt")
    assert outcome.books[:, -1].tolist() == [0, 1, 0] and outcome.steps == 2
    assert not np.isfinite(outcome.books[1, 1]) and np.isfinite(outcome.books[2]).all()
    case = CASES["small"]()
    module = case.build(backends.runtime, case.trained)
    engine = backends.training.Engine(module, case.groups, AdamW(beta2=0.95, clip_norm=0.5))
    for step in (0, 2):
        loss = sum(engine.accumulate(batch, 1 / 4) for batch in case.batches(step, 4))
        engine.update(case.rates)
    assert outcome.books[2, 0] == pytest.approx(loss, rel=1e-5)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_death_of_a_rank_ends_the_other(tmp_path):
    """Without a launcher to clean up: the other rank fails by itself, at once."""
    path = written(tmp_path, {"job": {"strategy": "ddp", "die": 1, "steps": 5}})
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(path)],
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert ranks[1].wait(timeout=120) == -signal.SIGKILL
        died = time.monotonic()
        _, complaint = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode != 0 and time.monotonic() - died < 30
        assert "Traceback" in complaint
    finally:
        for rank in ranks:
            rank.kill()


def test_refusals(monkeypatch, runtime):
    case = CASES["small"]()

    def engine(**settings):
        module = case.build(runtime, case.trained)
        return backends.training.Engine(module, case.groups, AdamW(), **settings)

    with pytest.raises(BackendError, match="start"):
        engine(strategy="ddp")
    with pytest.raises(BackendError, match="telepathy"):
        parallel.start("telepathy")
    with pytest.raises(BackendError, match="zero3"):
        engine(strategy="zero3", compiled=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BackendError, match="'single' with 2"):
        parallel.start("single")
    monkeypatch.setenv("WORLD_SIZE", "1")
    parallel.start("fsdp")  # one process, no launcher
    try:
        with pytest.raises(BackendError, match="reshard_after_forwards"):
            engine(strategy="fsdp", options={"reshard_after_forwards": True})
        with pytest.raises(BackendError, match="stage 3"):
            engine(strategy="zero2", options={"zero_optimization": {"stage": 3}})
        assert isinstance(engine(strategy="fsdp").accumulate(case.batches(0, 1)[0], 1.0), float)
    finally:
        parallel.stop()


def test_deepspeed_configuration():
    """What the recipe decides and what is "auto" is not taken; the rest is merged in."""
    found = zero._configuration(
        3,
        AdamW(clip_norm=2.0),
        {
            "fp16": {"enabled": True, "loss_scale": 0},
            "bf16": {"enabled": "auto"},
            "gradient_clipping": "auto",
            "train_batch_size": 7,
            "scheduler": {"type": "WarmupLR"},
            "steps_per_print": 10,
            "zero_optimization": {
                "stage": 3, "sub_group_size": 1000, "stage3_prefetch_bucket_size": "auto",
                "offload_param": {"device": "cpu", "pin_memory": "auto"},
            },
        },
    )  # fmt: skip
    assert found["fp16"]["enabled"] is False and found["gradient_clipping"] == 2.0
    assert "train_batch_size" not in found and "scheduler" not in found
    assert found["steps_per_print"] == 10
    assert found["zero_optimization"] == {
        "stage": 3,
        "sub_group_size": 1000,
        "offload_param": {"device": "cpu"},
    }
