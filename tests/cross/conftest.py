"""Running the command line: in this process (torch, fast) and in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def succeeded(self) -> Outcome:
        assert self.code == 0, self.err
        return self

    def refused(self) -> str:
        """Standard error of a command that ended with one clear message and exit code 2."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        assert self.err.count("error: ") == 1, self.err
        return self.err


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """`run("chat", …, stdin="…")`: the command line in this process, on the torch backend."""
    from unillava.cli.app import main

    monkeypatch.setenv("UNILLAVA_BACKEND", "torch")

    def run(*arguments: Any, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return run


def environment(**changes: str) -> dict[str, str]:
    """Of a process of its own: no colours, few threads, nothing inherited that chooses."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UNILLAVA_")}
    return kept | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "NO_COLOR": "1"} | changes


@pytest.fixture
def spawn() -> Callable[..., Outcome]:
    """`spawn("chat", …, stdin="…")`: the command line in a process of its own."""

    def spawn(*arguments: Any, stdin: str = "", timeout: float = 300) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "unillava", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(),
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return spawn
