"""Two processes of paddle.distributed.launch on cpu, by gloo, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

# Read when the worker is imported here.
os.environ["UNILLAVA_BACKEND"] = "paddle"

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests/training_workers/train.py"
TOLERANCE = 1e-5
STRATEGIES = ("ddp", "zero1")

RUNS = {
    # Rank 0 has the pictures, rank 1 text alone and the spare tile.
    "even": {"case": "llava", "rows": 4},
    # Rank 1 has one row less.
    "uneven": {"case": "llava", "rows": 3, "announce": True, "clip_norm": None},
    "spoilt": {"case": "small", "rows": 4, "spoil": 1},
    "recomputed": {"case": "llava", "rows": 2, "steps": 2, "recompute": True},
}
"""Name -> job, run by one process and by two with each strategy."""


def launch(tmp: Path, script: Path, *args: str) -> subprocess.CompletedProcess:
    """The script in two processes."""
    options = ["--nproc_per_node", "2", "--log_dir", str(tmp / "log")]
    command = [sys.executable, "-m", "paddle.distributed.launch", *options]
    keys = {"UNILLAVA_BACKEND": "paddle", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PADDLE_", "FLAGS_"))}
    return subprocess.run(
        [*command, str(script), *args],
        env=clean | keys,
        cwd=tmp,
        capture_output=True,
        text=True,
        timeout=120,
    )


def train(tmp: Path, jobs: list[dict], processes: int) -> None:
    """One process is this one: it saves the time that Paddle takes to be imported."""
    file = tmp / "jobs.json"
    file.write_text(json.dumps(jobs))
    if processes == 1:
        from tests.training_workers import train

        train.main(str(file))
        return
    done = launch(tmp, WORKER, str(file))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The folder in which each run left `<name>-<strategy>`; two processes start only once."""
    tmp = tmp_path_factory.mktemp("parallel")

    def jobs(strategy: str) -> list[dict]:
        return [
            {**job, "strategy": strategy, "out": str(tmp / f"{name}-{strategy}")}
            for name, job in RUNS.items()
        ]

    def going_on(strategy: str, earlier: str) -> dict:
        return {
            **RUNS["even"], "start": 3, "steps": 2, "strategy": strategy,
            "restore": str(tmp / f"even-{earlier}"),
            "out": str(tmp / f"even-{earlier}-{strategy}"),
        }  # fmt: skip

    train(tmp, [*jobs("single"), going_on("single", "single")], 1)
    pairs = [going_on("ddp", "ddp"), going_on("zero1", "ddp"), going_on("ddp", "single")]
    train(tmp, [*jobs("ddp"), *jobs("zero1"), *pairs], 2)
    train(tmp, [going_on("single", strategy) for strategy in STRATEGIES], 1)
    return tmp


def left(folder: Path) -> tuple[dict[str, np.ndarray], list[np.ndarray], list[int]]:
    """State put together from all ranks; the books of each rank; how many bytes each rank owns."""
    state, books, sizes = {}, [], []
    for path in sorted(folder.glob("rank-*.npz")):
        with np.load(path) as arrays:
            mine = {name: arrays[name] for name in arrays if "/" in name}
            books.append(arrays["books"])
        assert not mine.keys() & state.keys(), "a tensor has two owners"
        sizes.append(sum(array.nbytes for array in mine.values()))
        state |= mine
    return state, books, sizes


def assert_same_run(found: Path, expected: Path) -> None:
    state, books, _ = left(found)
    wanted, (wanted_books,), _ = left(expected)
    for book in books:
        np.testing.assert_allclose(book, wanted_books, rtol=TOLERANCE)
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        # This gradient is rounding alone: a constant added to all scores of a softmax.
        if not name.endswith("k_proj.bias"):
            bar = TOLERANCE * max(float(np.abs(value).max()), 1e-3)
            assert float(np.abs(state[name] - value).max()) <= bar, name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(name, strategy, outcomes):
    """Losses, norms, skipped updates, parameters and moments; the ranks agree on the books."""
    assert_same_run(outcomes / f"{name}-{strategy}", outcomes / f"{name}-single")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_state_is_spread_evenly(strategy, outcomes):
    _, books, sizes = left(outcomes / f"even-{strategy}")
    assert len(books) == 2
    assert max(sizes) < 1.1 * min(sizes)


def test_a_spoilt_gradient_on_one_rank_skips_on_all(outcomes):
    for strategy in STRATEGIES:
        _, books, _ = left(outcomes / f"spoilt-{strategy}")
        for book in books:
            assert book[:, -1].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "name",
    ["even-ddp-single", "even-zero1-single", "even-ddp-ddp", "even-ddp-zero1", "even-single-ddp"],
)
def test_a_run_goes_on_with_another_number_of_ranks(name, outcomes):
    """Named `even-<strategy before>-<strategy after>`."""
    assert_same_run(outcomes / name, outcomes / "even-single-single")


EXCHANGES = """
import sys, time
import numpy as np
import backends

backends.select("paddle", device="cpu")
parallel = backends.parallel
parallel.start("ddp", timeout=3.0)
rank, size = parallel.world()
assert size == 2
integers = np.array([[2**60 + 1, -3, rank], [rank, 7, -(2**61)]])
found = parallel.sum_over_ranks(integers)
assert found.dtype == np.int64
assert found.tolist() == [[2**61 + 2, -6, 1], [1, 14, -(2**62)]]
found = parallel.sum_over_ranks(np.array([0.1, 1e300 * rank]))
assert found.dtype == np.float64 and found.tolist() == [0.2, 1e300]
assert parallel.sum_over_ranks(np.zeros((0, 3))).shape == (0, 3)
parallel.barrier()
time.sleep(1.5 * rank)
start = time.monotonic()
parallel.barrier()
assert rank == 1 or time.monotonic() - start > 1.0
try:
    backends.parallel.start("single")
except backends.errors.BackendError as error:
    assert "'single' with 2 processes" in str(error)
else:
    raise AssertionError
if rank == 1:
    time.sleep(4.5)
    sys.exit(0)
try:
    parallel.barrier()
except backends.errors.BackendError as error:
    assert "waited 3 s for the others in vain" in str(error)
else:
    raise AssertionError
"""


def test_exchanges(tmp_path):
    """Sums are exact in 64 bits, a barrier waits, and no longer than it was told."""
    script = tmp_path / "exchanges.py"
    script.write_text(EXCHANGES)
    done = launch(tmp_path, script)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_rank_that_dies_ends_the_run(tmp_path):
    """Within seconds, with a failure, and the launcher names the rank."""
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"out": str(tmp_path / "out"), "strategy": "ddp", "die": 1}]))
    start = time.monotonic()
    done = launch(tmp_path, WORKER, str(jobs))
    assert done.returncode != 0
    assert "Container rank 1 status failed" in done.stdout + done.stderr
    assert time.monotonic() - start < 60, "far from the 30 minutes that a rank may wait"
