"""An answer file that survives interruption at any moment, and is finished or not there.

While answers are made they are appended to `NAME.partial`; `NAME.run.json` records what they are
answers to. When the last one is there, the partial file is renamed to `NAME`. A run that was
interrupted continues after the last complete line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from unillava.errors import RequestError


class AnswerFile:
    """The answers to a fixed list of questions, in their order."""

    def __init__(self, path: str | os.PathLike[str], ids: Sequence[Any]) -> None:
        """`ids`: the question ids, one per answer; they need not be unique."""
        self.path, self.ids = Path(path), list(ids)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.record = self.path.with_name(self.path.name + ".run.json")
        self.done = 0
        """Answers that are kept."""
        self.complete = False
        """Whether the finished file is there."""
        self._file: IO[bytes] | None = None

    def open(self, run: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Begin, or continue where an interrupted run of the same kind stopped.

        Args:
            run: JSON-able; what the answers depend on. Other values: other answers.
            overwrite: throw away what is there.

        Raises:
            RequestError: there are answers of another run, or another process writes here.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._lock()
            self.path.unlink(missing_ok=True)
            self._file.truncate(0)
        elif self.path.exists():
            self._refuse_other(run, self.path)
            self.done, self.complete = len(self.ids), True
            return
        elif self.partial.exists():
            self._lock()
            self._refuse_other(run, self.partial)
            self._continue()
        _write_whole(self.record, json.dumps(run, indent=2, ensure_ascii=False) + "\n")
        if self._file is None:
            self._lock()

    def append(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Keep the next answers: on disk when this returns."""
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(answers)

    def finish(self) -> None:
        """Give the file its name; every question must have been answered."""
        if self.done != len(self.ids):
            raise ValueError(f"{self.done} of {len(self.ids)} answers")
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.partial, self.path)
        _sync_folder(self.path.parent)
        self.complete = True
        self.close()

    def close(self) -> None:
        """Let another process continue."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lock(self) -> None:
        """Open the partial file, for this process alone."""
        self._file = open(self.partial, "a+b")  # noqa: SIM115 (`close` closes it)
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise RequestError(
                "another process is writing these answers",
                given=self.partial,
                fix="wait for it, or name another file with --out",
            ) from error

    def _refuse_other(self, run: Mapping[str, Any], there: Path) -> None:
        """Raise unless the answers in `there` come from such a run."""
        try:
            before = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        # What the file says, not what is in memory: tuples have become lists.
        now = json.loads(json.dumps(run))
        if before == now:
            return
        self.close()
        raise RequestError(
            "there are already answers, from another run",
            given=f"{there}; {_difference(before, now)}",
            fix="name another file with --out, or pass --overwrite to throw them away",
        )

    def _continue(self) -> None:
        """Count the complete lines, cut off a half-written last one."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            answer = _answer(line)
            if answer is None or self.done == len(self.ids):
                break
            if answer.get("question_id") != self.ids[self.done]:
                self.close()
                raise RequestError(
                    f"line {self.done + 1} of the partial answers is for another question",
                    given=f"{self.partial}: {answer.get('question_id')}",
                    expected=self.ids[self.done],
                    fix="pass --overwrite to start again",
                )
            end += len(line)
            self.done += 1
        self._file.truncate(end)


def _answer(line: bytes) -> dict[str, Any] | None:
    """The answer in a line; None if it was not written to its end."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if line.endswith(b"\n") and isinstance(answer, dict) else None


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    """Which entries of two run records differ, in words."""
    if not isinstance(before, dict):
        return "how they were made is not recorded"
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return f"made with other {', '.join(different)}"


def _write_whole(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be synced."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
