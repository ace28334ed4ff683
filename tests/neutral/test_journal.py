"""What a run tells: logs that hold each step once, bad samples, curves, and the diagnosis."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import pty
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends.contract import LossScale, Norms
from tests.real_configs import REAL_CONFIGS
from unillava.config import read_spec
from unillava.data.feed import MicroBatch
from unillava.errors import ConfigError
from unillava.training import journal as journal_module
from unillava.training import state
from unillava.training.diagnosis import PATIENCE, SKIPS, Pass, Watch, rank_report, suspects
from unillava.training.journal import BAD, LOG, PICTURE, TABLE, Journal, Machine
from unillava.training.loop import Run, TrainingError, Update, gather_text
from unillava.training.recipe import Logging, read_recipe
from unillava.training.schedule import Schedule

ROOT = Path(__file__).resolve().parents[2]
UPDATE = Update(
    step=1, loss=2.0, norm=1.5, norms={"language": 1.2, "projector": 0.9},
    rates={"language": 1e-3, "projector": 2e-3}, learnt=50, positions=1000, samples=4, bad=0,
    tiles=4, frames=0, pairs=10**6, seconds=0.5, waited=0.1, skipped=False,
)  # fmt: skip


def machine(backend: str = "torch", **facts: object) -> Machine:
    return Machine(backend, **facts)


def run(output: Path, start: int, stop: int, backend: str = "torch", **logging: object) -> None:
    """Updates `start` + 1 to `stop` with losses that tell the step."""
    output.mkdir(exist_ok=True)
    with Journal(output, Logging(**logging), machine(backend)) as told:
        told.begin(start, 10)
        for step in range(start + 1, stop + 1):
            told.add(replace(UPDATE, step=step, loss=10 / step))


def steps(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / LOG).read_text().splitlines()]


def table(output: Path) -> list[dict[str, str]]:
    with (output / TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


# --- files ---------------------------------------------------------------------------------------


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """Killed after step 7 with half a line written, gone on from the checkpoint of step 5."""
    run(tmp_path, 0, 7)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 8, "lo')
    with (tmp_path / TABLE).open("a") as file:
        file.write("8,0.1")
    run(tmp_path, 5, 10, "paddle")
    assert steps(tmp_path) == list(range(1, 11))
    rows = table(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert [row["backend"] for row in rows] == ["torch"] * 5 + ["paddle"] * 5
    assert float(rows[3]["loss"]) == 2.5 and float(rows[3]["rate.projector"]) == 2e-3
    assert float(rows[9]["norm.language"]) == 1.2


def test_a_run_that_begins_anew_begins_its_logs_anew(tmp_path: Path) -> None:
    run(tmp_path, 0, 7)
    run(tmp_path, 0, 2)
    assert steps(tmp_path) == [1, 2] and len(table(tmp_path)) == 2


def test_columns_that_come_later(tmp_path: Path) -> None:
    """A run that goes on where the device's peak is known has a column more."""
    run(tmp_path, 0, 2)
    with Journal(tmp_path, Logging(), machine(peak=1e12, cost=lambda work: 1e9)) as told:
        told.begin(2, 4)
        told.add(replace(UPDATE, step=3))
    rows = table(tmp_path)
    assert [row["mfu"] for row in rows[:2]] == ["", ""]
    assert float(rows[2]["mfu"]) == pytest.approx(1e9 / 0.5 / 1e12)


def test_speeds_are_means_over_updates_after_the_first(tmp_path: Path) -> None:
    facts = {"peak": 1e12, "cost": lambda work: 2e9 * work.positions / 1000, "world": 2}
    with Journal(tmp_path, Logging(), machine(**facts)) as told:
        told.begin(0, 10)
        for step, seconds in enumerate((100.0, 1.0, 3.0), 1):
            told.add(replace(UPDATE, step=step, seconds=seconds))
    last = json.loads((tmp_path / LOG).read_text().splitlines()[-1])
    assert last["tokens_per_second"] == pytest.approx(2000 / 4)
    assert last["samples_per_second"] == pytest.approx(8 / 4)
    assert last["mfu"] == pytest.approx(4e9 / (4 * 2 * 1e12))


def test_numbers_that_are_none_stay_json(tmp_path: Path) -> None:
    """JSON has no nan; what is written is read by strict readers, and as nan by ours."""
    with Journal(tmp_path, Logging(), machine()) as told:
        told.begin(0, 2)
        told.add(replace(UPDATE, loss=math.nan, norm=math.inf))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    entry = json.loads((tmp_path / LOG).read_text(), parse_constant=refuse)
    assert math.isnan(float(entry["loss"])) and math.isinf(float(entry["norm"]))
    assert (tmp_path / PICTURE).is_file()


def test_bad_samples_are_counted_and_named(tmp_path: Path, capsys) -> None:
    with Journal(tmp_path, Logging(), machine()) as told:
        told.begin(0, 20)
        for step in range(1, 13):
            told.add_bad(step, f"a.json record {step}", "no such file")
    errors = capsys.readouterr().err
    assert "a.json record 3: no such file" in errors and "12 samples were left out" in errors
    assert "record 12" not in errors  # the file names all
    lines = [json.loads(line) for line in (tmp_path / BAD).read_text().splitlines()]
    assert [line["sample"] for line in lines] == [f"a.json record {n}" for n in range(1, 13)]
    with Journal(tmp_path, Logging(), machine()) as told:
        told.begin(4, 20)
        assert told.bad == 4
    assert len((tmp_path / BAD).read_text().splitlines()) == 4


def test_other_ranks_write_nothing(tmp_path: Path, capsys) -> None:
    with Journal(tmp_path, Logging(tensorboard=True), machine(), active=False) as told:
        told.begin(0, 10)
        told.add(UPDATE)
        told.add_bad(1, "a", "b")
        told.warn("c")
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


# --- people --------------------------------------------------------------------------------------


def test_plain_lines_are_limited(tmp_path: Path, capsys) -> None:
    run(tmp_path, 0, 10, every=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {n} of 10" for n in (4, 8, 10)]
    assert "loss 2.5000" in lines[0] and "2k tokens/s" in lines[0] and "ETA 0:00:03" in lines[0]


TERMINAL = """
from pathlib import Path; import sys
from dataclasses import replace
from tests.neutral.test_journal import UPDATE, machine
from unillava.training.journal import Journal
from unillava.training.recipe import Logging
with Journal(Path(sys.argv[1]), Logging(), machine(memory=lambda: 2**31)) as told:
    told.begin(0, 3)
    for step in range(1, 4):
        told.add(replace(UPDATE, step=step))
        told.warn(f"[warning] {step} " + "x" * 100)
"""


def test_a_bar_on_a_terminal_is_not_torn_by_warnings(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "140", "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in environment.items() if k not in ("NO_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, str(tmp_path)], stdout=theirs, stderr=theirs,
        env=environment, cwd=ROOT,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.wait(60) == 0, text
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    for step in (1, 2, 3):  # whole lines of their own, markup untouched
        assert lines.count(f"[warning] {step} " + "x" * 100) == 1, text
    last = [line for line in lines if line.startswith("3/3")][-1]
    assert "loss 2.0000" in last and "2.0 GiB" in last and "ETA 0:00:00" in last


# --- writers -------------------------------------------------------------------------------------


def test_a_missing_package_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = {"wandb", "tensorboardX"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    with pytest.raises(ConfigError, match="wandb, which is not installed"):
        journal_module.check_writers(Logging(wandb=True))
    with pytest.raises(ConfigError, match="tensorboardX"):
        journal_module.check_writers(Logging(tensorboard=True))
    journal_module.check_writers(Logging())


def test_tensorboard_files_hold_the_losses(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    run(tmp_path, 0, 3, tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # records: length, checksum of it, content, checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
        data = data[16 + size :]
    assert found[2, "train/loss"] == 5.0
    assert found[3, "train/rate/projector"] == pytest.approx(2e-3)


# --- curves at the end ---------------------------------------------------------------------------


def test_curves_are_drawn_when_a_run_breaks(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Journal(tmp_path, Logging(), machine()) as told,
    ):
        told.begin(0, 10)
        told.add(UPDATE)
        raise KeyboardInterrupt
    with Image.open(tmp_path / PICTURE) as picture:
        assert min(picture.size) > 400 and len(picture.convert("L").getcolors()) > 10


# --- diagnosis -----------------------------------------------------------------------------------

VOCABULARY = 32000


def verdicts(losses: list[float], watch: Watch | None = None) -> list[str | None]:
    watch = watch or Watch(VOCABULARY)
    return [watch.judge(loss, False) for loss in losses]


@pytest.mark.parametrize(
    "losses",
    [
        [0.01] * 60 + [0.9, 0.01, 0.02, 2.0, 3.0, 4.0, 0.01] * 5,  # a learnt set with hard samples
        [0.05] * 60 + [2.5] * 60,  # the next file is harder, and comes unshuffled
        [10.4] * 5 + [8.0, 7.0, 6.5, 6.0] * 10 + [1.2] * 50 + [4.0, 5.5, 1.0] * 10,
        [120.0, 90.0, 60.0, 30.0, 12.0, 11.0] * 2,  # a random model before it settles
        [1.0] * 60 + [20.0] + [1.0] * 20,  # one broken sample
    ],
)
def test_noise_is_no_explosion(losses: list[float]) -> None:
    assert set(verdicts(losses)) == {None}


def test_random_noise_is_no_explosion() -> None:
    noise = random.Random(0)
    for median, width in ((0.003, 1.0), (0.05, 1.0), (0.5, 0.8), (1.5, 0.5), (3.0, 0.5)):
        losses = [median * math.exp(noise.gauss(0, width)) for _ in range(3000)]
        assert set(verdicts(losses)) == {None}, median


def test_explosions_are_found_soon() -> None:
    diverged = verdicts([1.0] * 60 + [7.5] * 10)
    assert diverged.index("the loss explodes") == 60 + PATIENCE - 1
    assert verdicts([1.0] * 60 + [1e4])[-1] == "the loss explodes"
    assert verdicts([0.01] * 60 + [6.0, 7.0, 9.0, 11.0, 12.0])[-1] == "the loss explodes"
    assert verdicts([math.nan]) == verdicts([math.inf]) == ["the loss is no number"]


def test_nothing_is_saved_while_it_may_be_exploding() -> None:
    watch = Watch(VOCABULARY)
    verdicts([1.0] * 60 + [9.0], watch)
    assert not watch.calm
    verdicts([1.0], watch)
    assert watch.calm


def test_only_many_skipped_updates_are_wrong() -> None:
    watch = Watch(VOCABULARY)
    for _ in range(3):
        assert all(watch.judge(2.0, True) is None for _ in range(SKIPS - 1))
        assert watch.judge(2.0, False) is None
    found = [watch.judge(2.0, True) for _ in range(SKIPS)]
    assert found[:-1] == [None] * (SKIPS - 1) and "in a row" in found[-1]


def test_the_rank_without_a_loss_is_named() -> None:
    fine = Pass(("a", "b"), 10, 100, 2.0)
    broken = Pass(tuple(f"s{n}" for n in range(12)), 10, 100, math.nan)
    ranks = [json.loads(rank_report(0, [fine])), json.loads(rank_report(1, [fine, broken]))]
    told = suspects(ranks)
    assert told.startswith("rank 1, loss nan: s0, s1") and "and 4 more" in told
    assert "a, b" not in told
    worst = replace(broken, loss=9.0)
    ranks = [json.loads(rank_report(0, [fine])), json.loads(rank_report(1, [worst]))]
    assert suspects(ranks).startswith("rank 1, loss 9: s0")


class TwoRanks:
    """A group of two, of which the other one's numbers are given."""

    def __init__(self, rank: int, others: list[np.ndarray]) -> None:
        self.rank, self.others = rank, others

    def world(self) -> tuple[int, int]:
        return self.rank, 2

    def sum_over_ranks(self, array: np.ndarray) -> np.ndarray:
        return array + self.others.pop(0)


def test_text_of_every_rank() -> None:
    own, other = "mine: ä 한", "theirs"
    size = len(own.encode())
    sizes = np.array([len(other), 0])
    codes = np.concatenate([np.frombuffer(other.encode(), np.uint8), np.zeros(size)]).astype(int)
    assert gather_text(TwoRanks(1, [sizes, codes]), own) == [other, own]


# --- the loop ------------------------------------------------------------------------------------


class Alone:
    """A group of one."""

    def world(self) -> tuple[int, int]:
        return 0, 1

    def sum_over_ranks(self, array: np.ndarray) -> np.ndarray:
        return array

    def barrier(self) -> None:
        pass


class Engine:
    """Gives the losses and norms that it is told to."""

    def __init__(self, losses: list[float], skips: set[int] = frozenset()) -> None:
        self.losses, self.skips, self.steps = losses, skips, 0
        self.loss_scale: LossScale | None = LossScale()

    def accumulate(self, inputs: object, scale: float, last: bool = False) -> float:
        return self.losses[self.steps]

    def update(self, rates: dict[str, float]) -> Norms:
        self.steps += 1
        skipped = self.steps in self.skips
        self.loss_scale = self.loss_scale.after(skipped)
        size = math.inf if skipped else 1.0
        return Norms(size, {"language": size, "projector": 1.0}, skipped)

    def state(self):
        yield "a", "parameter", np.ones(2, np.float32)


class FakeFeed:
    def updates(self, start: int, stop: int):
        for step in range(start, stop):
            ids = np.ones((1, 4), np.int64)
            arrays = {"input_ids": ids, "segment_ids": ids, "pixel_values": np.zeros((2, 3, 4, 4))}
            bad = (("data.json record 7", "no such file"),) if step == 1 else ()
            yield [MicroBatch(arrays, 3, 4, (f"sample {step}",), bad)]


def make_run(output: Path, engine: Engine) -> Run:
    recipe = read_recipe(
        {
            "output": str(output),
            "model": {"path": "model"},
            "data": {"files": [{"path": "train.json"}]},
            "rates": {"projector": 1e-3},
            "steps": {"batch": 1},
            "saving": {"every": 5, "keep": 9},
        }
    )
    return Run(
        recipe=recipe, spec=read_spec(REAL_CONFIGS["LLaVA-1.5-7B"]), engine=engine,
        feed=FakeFeed(), groups=[], rates={"projector": 1e-3},
        schedule=Schedule("constant", 30), parallel=Alone(), output=output,
    )  # fmt: skip


def test_a_failure_names_everything(tmp_path: Path) -> None:
    run = make_run(tmp_path, Engine([1.0] * 14 + [math.nan], skips={15}))
    seen: list[Update] = []
    run.report = seen.append
    named: list[tuple[int, str, str]] = []
    run.report_bad = lambda *told: named.append(told)
    with pytest.raises(TrainingError) as caught:
        run.train(0, 30)
    text = str(caught.value)
    assert "the loss is no number at step 15" in text and "rank 0, loss nan: sample 14" in text
    assert "gradient norms: language inf, projector 1" in text and "usually 1" in text
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["ranks"][0]["passes"][0]["samples"] == ["sample 14"]
    assert failure["ranks_without_a_loss"] == [0] and failure["step"] == 15
    assert failure["groups_without_a_norm"] == ["language"]
    assert sorted(state.saved_steps(tmp_path)) == [5, 10]
    assert named == [(2, "data.json record 7", "no such file")]
    assert (seen[0].tiles, seen[0].pairs, seen[0].samples, seen[1].bad) == (2, 16, 1, 1)


def test_skipped_updates_do_not_end_a_run_but_many_do(tmp_path: Path) -> None:
    assert make_run(tmp_path / "a", Engine([1.0] * 30, set(range(2, 19)))).train(0, 30) == 30
    with pytest.raises(TrainingError, match="updates in a row"):
        make_run(tmp_path / "b", Engine([1.0] * 30, set(range(2, 29)))).train(0, 30)


def test_an_exploding_state_is_not_saved(tmp_path: Path) -> None:
    losses = [1.0] * 12 + [9.0] * 10
    with pytest.raises(TrainingError, match="explodes at step 17"):
        make_run(tmp_path, Engine(losses)).train(0, 22)
    assert sorted(state.saved_steps(tmp_path)) == [5, 10]  # 15 was in the explosion


def test_the_loss_scale_is_saved(tmp_path: Path) -> None:
    make_run(tmp_path, Engine([1.0] * 5, skips={2, 3})).train(0, 5)
    facts = state.find_latest(tmp_path).facts
    assert LossScale(**facts["loss_scale"]) == LossScale(2.0**14, 2)
    engine = Engine([1.0] * 5)
    engine.loss_scale = None
    engine.update = lambda rates: Norms(1.0, {}, False)
    make_run(tmp_path / "float32", engine).train(0, 1)
    assert state.find_latest(tmp_path / "float32").facts["loss_scale"] is None
