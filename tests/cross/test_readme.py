"""The commands and the code of README.md and docs/training.md do what they show.

A block after `<!-- run -->` is run, all of them in order in one folder: `console` blocks line by
line, their output compared with what is printed there (`...` stands for anything), `python`
blocks as scripts.
"""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- run -->\n```(\w+)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^\$ (.*)$", re.MULTILINE)


def run(command: list[str], folder: Path) -> str:
    """The standard output of a command that must succeed, with this environment's programs."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": programs, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def session(block: str) -> list[tuple[str, str]]:
    """(command, output) pairs of a console block."""
    parts = COMMAND.split(block)[1:]
    return [
        (command, output.strip()) for command, output in zip(parts[::2], parts[1::2], strict=True)
    ]


@pytest.mark.parametrize(
    ("page", "kinds"),
    [("README.md", {"console", "python"}), ("docs/training.md", {"console"})],
)
def test_every_marked_block_runs_as_shown(tmp_path, photo, page, kinds):
    shutil.copy(photo, tmp_path / "photo.jpg")
    for folder in ("configs", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    same = doctest.OutputChecker().check_output
    assert {kind for kind, _ in blocks} == kinds
    for kind, text in blocks:
        if kind == "python":
            run([sys.executable, "-c", text], tmp_path)
            continue
        for command, shown in session(text):
            printed = run(["bash", "-c", command], tmp_path)
            assert same(shown, printed.strip(), doctest.ELLIPSIS), f"{command}\n{printed}"
