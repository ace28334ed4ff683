"""Two processes of msrun on cpu against one."""

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

from tests.training_workers.train import saved_state

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests/training_workers/train.py"
TOLERANCE = 1e-5
STRATEGIES = ("ddp", "zero1")

RUNS = {
    # Rank 0 has the pictures, rank 1 text alone and the spare tile.
    "even": {"case": "llava", "rows": 4, "compiled": True},
    # Rank 1 has one row less.
    "uneven": {"case": "small", "rows": 3, "announce": True, "clip_norm": None, "compiled": True},
    "spoilt": {"case": "small", "rows": 4, "spoil": 1},
}
"""Name -> job, run by one process and by two with each strategy."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(tmp: Path, script: Path, *args: str) -> subprocess.CompletedProcess:
    """The script in two processes."""
    programs = Path(sys.executable).parent
    options = ["--worker_num", "2", "--local_worker_num", "2", "--join", "True"]
    options += ["--master_port", str(free_port()), "--log_dir", str(tmp / "log")]
    keys = {
        "UNILLAVA_BACKEND": "mindspore", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        # msrun starts the first `python` of the path.
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
    }  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MS_", "RANK_"))}
    return subprocess.run(
        [str(programs / "msrun"), *options, str(script), *args],
        env=clean | keys,
        cwd=tmp,
        capture_output=True,
        text=True,
        timeout=300,
    )


def told(done: subprocess.CompletedProcess, tmp: Path) -> str:
    """What the launcher and the workers said."""
    logs = "".join(path.read_text()[-3000:] for path in sorted((tmp / "log").glob("*.log")))
    return done.stdout[-3000:] + done.stderr[-3000:] + logs


def train(tmp: Path, jobs: list[dict], processes: int) -> None:
    """One process is this one: it saves the time that MindSpore takes to be imported."""
    file = tmp / "jobs.json"
    file.write_text(json.dumps(jobs))
    if processes == 1:
        from tests.training_workers import train

        train.main(str(file))
        return
    done = launch(tmp, WORKER, str(file))
    assert done.returncode == 0, told(done, tmp)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The folder in which each run left `<name>-<strategy>`; two processes start only once."""
    tmp = tmp_path_factory.mktemp("parallel")

    def job(name: str, strategy: str, **changes) -> dict:
        return {
            **RUNS[name],
            "strategy": strategy,
            "out": str(tmp / f"{name}-{strategy}"),
        } | changes

    def going_on(strategy: str, earlier: str) -> dict:
        """The last step of `spoilt`, from what its first two left."""
        begun = {
            "restore": str(tmp / f"begun-{earlier}"),
            "out": str(tmp / f"{earlier}-{strategy}"),
        }
        return job("spoilt", strategy, start=2, steps=1, spoil=-1, **begun)

    def begun(strategy: str) -> dict:
        return job("spoilt", strategy, steps=2, spoil=-1, out=str(tmp / f"begun-{strategy}"))

    def whole(strategy: str) -> dict:
        return job("spoilt", strategy, spoil=-1, out=str(tmp / f"whole-{strategy}"))

    singles = [job(name, "single") for name in RUNS]
    train(tmp, [*singles, begun("single"), whole("single")], 1)
    pairs = [job(name, strategy) for name in RUNS for strategy in STRATEGIES]
    pairs += [make(strategy) for strategy in STRATEGIES for make in (begun, whole)]
    pairs += [going_on(after, before) for after, before in CHANGES if after != "single"]
    train(tmp, pairs, 2)
    train(tmp, [going_on(after, before) for after, before in CHANGES if after == "single"], 1)
    return tmp


CHANGES = [
    ("ddp", "ddp"), ("zero1", "zero1"), ("zero1", "ddp"), ("ddp", "single"),
    ("single", "ddp"), ("single", "zero1"),
]  # fmt: skip
"""(strategy after, strategy before) a run is resumed."""


def books_of(folder: Path) -> list[np.ndarray]:
    return [np.load(path)["books"] for path in sorted(folder.glob("rank-*.npz"))]


def assert_same_run(found: Path, expected: Path, steps: slice = slice(None)) -> None:
    (wanted_books, *_), wanted = books_of(expected), saved_state(expected)
    for book in books_of(found):
        np.testing.assert_allclose(book, wanted_books[steps], rtol=TOLERANCE)
    state = saved_state(found)
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
    sizes = []
    for path in sorted((outcomes / f"even-{strategy}").glob("rank-*.npz")):
        with np.load(path) as arrays:
            sizes.append(sum(arrays[name].nbytes for name in arrays if "/" in name))
    assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_spoilt_gradient_on_one_rank_skips_on_all(strategy, outcomes):
    for book in books_of(outcomes / f"spoilt-{strategy}"):
        assert book[:, -1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_is_exact(strategy, outcomes):
    """Two steps, state, one step of another engine: bitwise the three steps of one."""
    whole, resumed = outcomes / f"whole-{strategy}", outcomes / f"{strategy}-{strategy}"
    for one, other in zip(books_of(whole), books_of(resumed), strict=True):
        np.testing.assert_array_equal(one[2:], other)
    state = saved_state(resumed)
    for name, value in saved_state(whole).items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


@pytest.mark.parametrize(("after", "before"), CHANGES)
def test_a_run_goes_on_with_another_number_of_ranks(after, before, outcomes):
    assert_same_run(outcomes / f"{before}-{after}", outcomes / "whole-single", slice(2, None))


EXCHANGES = """
import time
import numpy as np
import backends

backends.select("mindspore", device="cpu")
parallel = backends.parallel
parallel.start("ddp")
rank, size = parallel.world()
assert size == 2
integers = np.array([[2**60 + 1, -3, rank], [rank, 7, -(2**61)]])
found = parallel.sum_over_ranks(integers)
assert found.dtype == np.int64
assert found.tolist() == [[2**61 + 2, -6, 1], [1, 14, -(2**62)]]
found = parallel.sum_over_ranks(np.array([0.1, 1e300 * rank]))
assert found.dtype == np.float64 and found.tolist() == [0.2, 1e300]
parallel.barrier()
time.sleep(1.5 * rank)
start = time.monotonic()
parallel.barrier()
assert rank == 1 or time.monotonic() - start > 1.0
try:
    parallel.start("single")
except backends.errors.BackendError as error:
    assert "'single'" in str(error)
else:
    raise AssertionError
if rank == 1:
    raise RuntimeError("a rank fails alone")
parallel.barrier()
"""


def test_exchanges_and_a_rank_that_fails(tmp_path):
    """Sums are exact in 64 bits, a barrier waits; an exception on one rank ends the other."""
    script = tmp_path / "exchanges.py"
    script.write_text(EXCHANGES)
    start = time.monotonic()
    done = launch(tmp_path, script)
    said = told(done, tmp_path)
    assert done.returncode != 0 and "a rank fails alone" in said, said
    assert "AssertionError" not in said
    assert time.monotonic() - start < 150, "far from the 30 minutes that a rank may wait"


def test_a_rank_that_dies_ends_the_run(tmp_path):
    """Within seconds, with a failure."""
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"out": str(tmp_path / "out"), "strategy": "ddp", "die": 1}]))
    start = time.monotonic()
    done = launch(tmp_path, WORKER, str(jobs))
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - start < 150, "far from the 30 minutes that a rank may wait"
