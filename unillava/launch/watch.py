"""Runs a launcher and watches its workers: hands signals on, and shows why one of them died.

The launchers treat a signal each in its own way: msrun kills its workers on Ctrl-C and leaves them
running on SIGTERM, the others kill theirs after some seconds, in which no large model is saved. So
a launcher gets a session of its own, where no signal of the terminal reaches it, and the workers
are told here. They save, exit, and the launcher sees that they are gone. SIGUSR1 asks for the same;
the others ignore it, because Slurm sends its warning to every process of a job at once.

Workers are the launcher's children that lead a session: all three launchers start them so (and
msrun's scheduler otherwise, which must outlive them). They are read from /proc; where there is
none, the launcher itself gets the signal.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from unillava.launch.command import Launch

STOPPED = 143
"""Exit code of a run that was asked to stop, saved its state and can go on."""
KILLED = 128 + signal.SIGKILL
PAUSE, SEARCH, SETTLED = 0.05, 0.2, 30.0
"""Seconds between two looks at the workers; between two searches for new ones; after the newest,
until no more are expected. How a worker ended can be read until its launcher has collected it,
which each of them does once in a second."""
GRACE = 30.0
"""Seconds that a launcher has to end after a worker has failed, or all are gone."""
LINES, SHOWN = 25, 3
"""How much of a failed worker's log is shown; of how many that failed together."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class Worker:
    """A process that trains."""

    pid: int
    log: Path | None
    """Where its errors go; None: to the terminal."""
    code: int | None = None
    """As a shell counts; None: it runs, or nobody has seen how it ended."""
    gone: bool = False


def supervise(launch: Launch, *, alone: bool = False) -> int:
    """Run a launcher to its end; returns the exit code of the run.

    That is 143 after a signal that was obeyed, else the code of the worker that failed first.

    Args:
        launch: what is run.
        alone: it is no launcher but the one worker itself.

    Raises:
        OSError: it cannot be started.
    """
    _allow_many_files()
    with _signals() as asked:
        process = _start(launch)
        watch = Watch(process.pid, alone)
        while process.poll() is None:
            watch.look()
            watch.act(asked)
            time.sleep(PAUSE)
    return watch.verdict(process.returncode, bool(asked))


def _start(launch: Launch) -> subprocess.Popen[bytes]:
    noted = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which is inherited
    try:
        return subprocess.Popen(
            launch.command,
            env=launch.applied(os.environ),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGUSR1, noted)


class Watch:
    """What is known of a launcher and its workers."""

    def __init__(self, launcher: int, alone: bool = False) -> None:
        self.launcher, self._alone = launcher, alone
        self.workers: dict[int, Worker] = {}
        self.failed: list[Worker] = []
        """Those that failed before all others; the others fail because of them."""
        self.lost: list[Worker] = []
        """Those that were gone before all others, while nobody saw how."""
        self._searched = self._newest = -math.inf
        self._answered = 0
        self._deadline: float | None = None

    def look(self) -> None:
        """See which workers there are, and which have ended."""
        if self._alone:
            return
        now = time.monotonic()
        expected = not self.workers or now - self._newest < SETTLED
        if expected and now - self._searched >= SEARCH:
            self._search()
        for worker in self.workers.values():
            if not worker.gone:
                child = _child(worker.pid, self.launcher)
                worker.code = child.code if child else None
                worker.gone = child is None or child.code is not None
        if not self.failed and not self.lost:
            self.failed = self._failures()
            self.lost = [w for w in self.workers.values() if w.gone and w.code is None]

    def _search(self) -> None:
        self._searched = time.monotonic()
        for child in _children(self.launcher):
            if child.leads and child.pid not in self.workers:
                self.workers[child.pid] = Worker(child.pid, _log_of(child.pid))
                self._newest = self._searched

    def _failures(self) -> list[Worker]:
        ended = [worker for worker in self.workers.values() if worker.code not in (None, 0)]
        # Once the first has left in order, msrun kills the others, which have saved, too.
        orderly = (STOPPED, KILLED) if any(w.code == STOPPED for w in ended) else ()
        return [worker for worker in ended if worker.code not in orderly]

    def act(self, asked: list[int]) -> None:
        """Hand signals on; end what does not end by itself."""
        if len(asked) > self._answered and not self._alone:
            self._search()
        alive = [worker.pid for worker in self.workers.values() if not worker.gone]
        if len(asked) > self._answered:
            again = self._answered > 0
            self._answered = len(asked)
            if again:
                self._kill(alive)
            else:
                _send(signal.SIGTERM, alive or [self.launcher])
        if self.failed or (self.workers and not alive):
            self._deadline = self._deadline or time.monotonic() + GRACE
            if time.monotonic() > self._deadline:
                self._kill(alive)

    def _kill(self, alive: list[int]) -> None:
        others = [child.pid for child in _children(self.launcher)]
        _send(signal.SIGKILL, [*alive, *others, self.launcher])

    def verdict(self, code: int, asked: bool) -> int:
        """The exit code of the run; says why if it failed.

        Args:
            code: the launcher's, negative for a signal.
            asked: whether a signal asked to stop.
        """
        codes = {worker.code for worker in self.workers.values()}
        in_order = asked or STOPPED in codes
        failed = self.failed or (self.lost if code != 0 and not in_order else [])
        for worker in failed[:SHOWN]:
            print(_obituary(worker), file=sys.stderr, flush=True)
        if self.failed:
            return self.failed[0].code or 1
        if in_order:
            return STOPPED
        return 128 - code if code < 0 else code


# --- processes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Child:
    pid: int
    leads: bool
    """A session."""
    code: int | None
    """None: it runs."""


def _children(parent: int) -> Iterator[_Child]:
    for folder in Path("/proc").glob("[0-9]*"):
        child = _child(int(folder.name), parent)
        if child is not None:
            yield child


def _child(pid: int, parent: int) -> _Child | None:
    """The process, if it is there and a child of `parent`."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # pid (name) state parent group session …; a name may have blanks and parentheses.
    fields = text.rpartition(")")[2].split()
    if int(fields[1]) != parent:
        return None
    code = _shell_code(int(fields[49])) if fields[0] in "ZX" else None
    return _Child(pid, int(fields[3]) == pid, code)


def _shell_code(status: int) -> int:
    """128 + N for a process that signal N has killed, as a shell says it."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _log_of(pid: int) -> Path | None:
    try:
        path = Path(os.readlink(f"/proc/{pid}/fd/2"))
    except OSError:
        return None
    return path if path.is_file() else None


def _send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _allow_many_files() -> None:
    """Records, shards and exchanges of many workers need more than the usual 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that have come, in order; SIGHUP stays ignored under nohup."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before: Mapping[int, object] = {number: signal.getsignal(number) for number in SIGNALS}
    wanted = [n for n in SIGNALS if n != signal.SIGHUP or before[n] != signal.SIG_IGN]
    for number in wanted:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number in wanted:
            signal.signal(number, before[number])


# --- words -----------------------------------------------------------------------------------


def _obituary(worker: Worker) -> str:
    how = f"exit code {worker.code}" if worker.code else "nobody saw how"
    if worker.code is not None and worker.code > 128:
        with suppress(ValueError):
            how = f"killed by {signal.Signals(worker.code - 128).name}"
    lines = [f"error: a worker failed before the others ({how})"]
    if worker.log is not None:
        lines.append(f"  the end of its log, {worker.log}:")
        lines += [f"  | {line}" for line in _tail(worker.log)]
    return "\n".join(lines)


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (64 << 10)))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return [f"it cannot be read: {error.strerror}"]
    return text.splitlines()[-LINES:] or ["(nothing)"]
