"""scripts/quickstart.sh, the short way: the whole path with few steps, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

from PIL import Image

from tests.cross.conftest import environment

ROOT = Path(__file__).resolve().parents[3]


def test_the_short_quickstart(tmp_path):
    for folder in ("configs", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    own = environment() | {"UNILLAVA_QUICKSTART": "short", "UNILLAVA_QUICKSTART_IN": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh")],
        cwd=os.sep,
        env=own,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    made = tmp_path / "quickstart"
    assert takers(made / "pretrain") == {"mindspore": 2, "torch": 4}
    assert takers(made / "finetune") == {"paddle": 3, "torch": 5}
    for picture in (made / "pretrain/loss.png", made / "finetune/loss.png"):
        assert Image.open(picture).size[0] > 400
    assert "accuracy" in done.stdout and "of 24 questions" in done.stdout
    assert done.stdout.count("EQUAL:") == 2
    assert "agree: " in done.stdout and "PASS paddle computes what torch computes" in done.stdout
    assert (made / "parity.html").stat().st_size > 10_000


def takers(run: Path) -> Counter[str]:
    """How many updates of a run each framework took."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return Counter(entry["backend"] for entry in entries)
