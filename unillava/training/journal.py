"""What a training run tells: a progress bar or lines for people, and files for later.

    log.jsonl            one line per update
    log.csv              the same as a table
    bad_samples.jsonl    samples that were left out, and why
    tensorboard/         if asked
    loss.png             curves, drawn whenever the run ends, also by an error or a signal

A log holds each step once and in order: when a run goes on from a step, what an earlier process
wrote beyond it is dropped. Only rank 0 writes.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from unillava.data.files import as_json, written
from unillava.errors import ConfigError
from unillava.training.diagnosis import plain
from unillava.training.flops import Work
from unillava.training.loop import Update
from unillava.training.recipe import Logging

if TYPE_CHECKING:
    from rich.progress import Progress

LOG, TABLE, BAD, PICTURE = "log.jsonl", "log.csv", "bad_samples.jsonl", "loss.png"
SMOOTHED = 20
"""Updates over which speed is averaged."""
NAMED = 10
"""Bad samples that are named on the screen; the file names all."""

WRITERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Setting of `logging` -> the package that it needs."""


@dataclass(frozen=True)
class Machine:
    """What speeds are measured against."""

    backend: str
    device: str = ""
    world: int = 1
    peak: float | None = None
    """FLOP/s of one device; None: no MFU."""
    cost: Callable[[Work], float] | None = None
    """FLOPs of an update."""
    memory: Callable[[], int] | None = None
    """Most bytes held so far."""


def check_writers(logging: Logging) -> None:
    """Whether the packages that a recipe's logs need are here; to be asked before a run begins.

    Raises:
        ConfigError: one is not installed.
    """
    for name, package in WRITERS.items():
        if getattr(logging, name) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{name} needs the package {package}, which is not installed",
                fix=f"pip install {package}, or leave logging.{name} out",
            )


class Journal:
    """Open it as a context: at the end, however that comes, the curves are drawn."""

    def __init__(
        self,
        output: Path,
        logging: Logging,
        machine: Machine,
        *,
        active: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            output: folder of the run; it exists.
            logging: the recipe's.
            machine: of this process.
            active: False on every rank but 0; then nothing is written or shown.
            settings: the whole recipe, for wandb.
        """
        self.output, self.logging, self.machine = output, logging, machine
        self.active, self.settings = active, dict(settings or {})
        self.recent: deque[Update] = deque(maxlen=SMOOTHED)
        self.bad = 0
        self.total = self.start = 0
        self.began = time.monotonic()
        self._bar: Progress | None = None
        self._writers: list[Any] = []

    # --- beginning and end --------------------------------------------------------------------

    def __enter__(self) -> Journal:
        return self

    def begin(self, start: int, total: int) -> None:
        """The run goes on from `start` finished updates, to `total`."""
        self.start, self.total = start, total
        self.began = time.monotonic()
        if not self.active:
            return
        entries = keep_until(self.output / LOG, start)
        _rewrite_table(self.output / TABLE, entries)
        bad = keep_until(self.output / BAD, start, unique=False)
        self.bad = len(bad)
        self._writers = list(self._open_writers(start))
        self._bar = _progress_bar(start, total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.active:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for writer in self._writers:
            writer.close()
        if self.bad:
            verb = "sample was" if self.bad == 1 else "samples were"
            self.warn(f"{self.bad} {verb} left out; {self.output / BAD} names every one")
        self._draw()

    def _draw(self) -> None:
        entries = read_log(self.output / LOG)
        if not entries:
            return
        from unillava.training.curves import draw_run

        try:
            draw_run(entries, self.output / PICTURE, self.logging.name or self.output.name)
        except ModuleNotFoundError:
            self.warn(f"no {PICTURE}: matplotlib is not installed")

    def _open_writers(self, start: int) -> Iterable[Any]:
        if self.logging.tensorboard:
            yield _TensorBoard(self.output / "tensorboard", start)
        if self.logging.wandb:
            yield _Wandb(self.output, self.logging.name, self.settings)

    # --- what happens -------------------------------------------------------------------------

    def add(self, update: Update) -> None:
        """A finished update."""
        if not self.active:
            return
        self.recent.append(update)
        speed = self._speed()
        entry = plain({**asdict(update), "backend": self.machine.backend, **speed})
        _append(self.output / LOG, as_json(entry).decode() + "\n")
        _append_row(self.output / TABLE, entry)
        for writer in self._writers:
            writer.add(entry)
        told = _told(update, speed, self._left(update.step))
        if self._bar is not None:
            # A terminal of 80 columns has no room for norm and rate.
            words = " ".join(word for key, word in told.items() if key not in ("norm", "rate"))
            self._bar.update(self._bar.task_ids[0], completed=update.step, told=words)
        elif update.step % self.logging.every == 0 or update.step == self.total:
            print(f"step {update.step} of {self.total}  {'  '.join(told.values())}", flush=True)
        if update.skipped:
            self.warn(f"step {update.step}: skipped, a gradient is not finite")

    def add_bad(self, step: int, name: str, why: str) -> None:
        """A sample that was left out of an update."""
        if not self.active:
            return
        self.bad += 1
        line = as_json({"step": step, "sample": name, "why": why}).decode()
        _append(self.output / BAD, line + "\n")
        if self.bad <= NAMED:
            self.warn(f"step {step}: left out {name}: {why}")
        if self.bad == NAMED:
            self.warn(f"more samples that are left out are named in {self.output / BAD} only")

    def warn(self, text: str) -> None:
        """Something that a person should know."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    # --- speed --------------------------------------------------------------------------------

    def _speed(self) -> dict[str, float]:
        """Means over the last updates; `mfu` where the device's peak is known."""
        # The first update of a process compiles and warms up.
        counted = [u for u in self.recent if u.step > self.start + 1] or list(self.recent)
        seconds = max(sum(update.seconds for update in counted), 1e-9)
        found = {
            "tokens_per_second": sum(update.positions for update in counted) / seconds,
            "samples_per_second": sum(update.samples for update in counted) / seconds,
        }
        machine = self.machine
        if machine.peak and machine.cost:
            flops = sum(machine.cost(work_of(update)) for update in counted)
            found["mfu"] = flops / (seconds * machine.peak * machine.world)
        if machine.memory:
            found["memory"] = machine.memory()
        return found

    def _left(self, step: int) -> float:
        """Seconds to the end at the speed of the last updates."""
        counted = [u for u in self.recent if u.step > self.start + 1] or list(self.recent)
        return (self.total - step) * sum(update.seconds for update in counted) / len(counted)


def work_of(update: Update) -> Work:
    """What an update went through."""
    return Work(update.positions, update.pairs, update.learnt, update.tiles, update.frames)


def _told(update: Update, speed: Mapping[str, float], left: float) -> dict[str, str]:
    rate = max(update.rates.values(), default=0.0)
    words = {
        "loss": f"loss {update.loss:.4f}",
        "norm": f"norm {update.norm:.3g}",
        "rate": f"rate {rate:.2e}",
        "tokens": f"{_short(speed['tokens_per_second'])} tokens/s",
        "samples": f"{_short(speed['samples_per_second'])} samples/s",
    }
    if "mfu" in speed:
        words["mfu"] = f"MFU {100 * speed['mfu']:.0f} %"
    if "memory" in speed:
        words["memory"] = f"{speed['memory'] / 2**30:.1f} GiB"
    return words | {"left": f"ETA {clock(left)}"}


def _short(value: float) -> str:
    """Three digits, thousands as k."""
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """1:02:03, with days in front where there are any."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def _progress_bar(start: int, total: int) -> Progress | None:
    """A live bar on a terminal; None elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    bar = Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[told]}", markup=False),
        console=console,
        expand=True,
    )
    bar.add_task("train", total=total, completed=start, told="the first update takes longest")
    bar.start()
    return bar


# --- files ---------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log of JSON lines that are whole; [] if there is no file.

    A process that is killed may leave half a line at the end.
    """
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def keep_until(path: Path, step: int, unique: bool = True) -> list[dict[str, Any]]:
    """Drop from a log what is beyond a step, and write it anew; returns what is left, in order.

    Args:
        path: a log of JSON lines; may be absent.
        step: the last that is kept.
        unique: of several entries of one step only the last is kept.
    """
    entries = [entry for entry in read_log(path) if entry["step"] <= step]
    if unique:
        entries = list({entry["step"]: entry for entry in entries}.values())
    entries.sort(key=lambda entry: entry["step"])
    if path.exists():
        with written(path) as file:
            file.writelines(as_json(entry) + b"\n" for entry in entries)
    return entries


def flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry as a row of the table: norms and rates of groups become columns."""
    row: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            row |= {f"{key[:-1]}.{name}": item for name, item in value.items()}
        else:
            row[key] = value
    return row


def _rewrite_table(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    if not entries:
        path.unlink(missing_ok=True)
        return
    rows = [flat(entry) for entry in entries]
    # A run that goes on elsewhere may have columns (MFU) that it did not have before.
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with written(path) as file:
        file.write(_csv_line(columns).encode())
        file.writelines(_csv_line([row.get(key, "") for key in columns]).encode() for row in rows)


def _append_row(path: Path, entry: Mapping[str, Any]) -> None:
    row = flat(entry)
    if not path.exists():
        _append(path, _csv_line(list(row)))
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file))
    if set(row) - set(columns):
        _rewrite_table(path, read_log(path.with_name(LOG)))
        return
    _append(path, _csv_line([row.get(key, "") for key in columns]))


def _csv_line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _append(path: Path, line: str) -> None:
    # One write of a whole line: a process that is killed leaves at most half of the last one.
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


# --- other people's viewers ----------------------------------------------------------------------


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of an entry, by names that viewers group: `train/loss`."""
    row = flat(entry)
    del row["step"]
    numbers = {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return {f"train/{key.replace('.', '/')}": value for key, value in numbers.items()}


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        from tensorboardX import SummaryWriter

        # What an earlier process wrote beyond the step is hidden by viewers.
        purge = start + 1 if start else None
        self.writer = SummaryWriter(str(folder), purge_step=purge)

    def add(self, entry: Mapping[str, Any]) -> None:
        for name, value in scalars(entry).items():
            self.writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, output: Path, name: str | None, settings: Mapping[str, Any]) -> None:
        import wandb

        # The run's own name in wandb, so that a resumed run goes on in the same curve.
        known = output / "wandb_id.txt"
        if not known.exists():
            with written(known) as file:
                file.write(secrets.token_hex(8).encode())
        self.run = wandb.init(
            project="unillava",
            name=name or output.name,
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(output),
            config=dict(settings),
        )

    def add(self, entry: Mapping[str, Any]) -> None:
        self.run.log(scalars(entry), step=entry["step"])

    def close(self) -> None:
        self.run.finish()
