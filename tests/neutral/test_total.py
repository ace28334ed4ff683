"""The last line of scripts/test.sh: nothing that failed is counted as passed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/total.py"
PASSED = '<testcase name="a"/>'
FAILED = '<testcase name="b"><failure/></testcase>'
ERROR = '<testcase name="c"><error/></testcase>'
SKIPPED = '<testcase name="d"><skipped/></testcase>'


def total(folder, *groups):
    """Exit code and last line for groups of (exit code, test cases)."""
    for n, (code, cases) in enumerate(groups):
        if code is not None:
            (folder / f"g{n}.code").write_text(str(code))
        if cases is not None:
            text = f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"
            (folder / f"g{n}.xml").write_text(text)
    names = [f"g{n}" for n in range(len(groups))]
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, *names], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "groups, code, line",
    [
        ([(0, [PASSED]), (0, [PASSED, PASSED])], 0, "3 passed, 0 failed"),
        ([(0, [PASSED]), (1, [PASSED, FAILED, ERROR])], 1, "2 passed, 2 failed"),
        ([(0, [PASSED, SKIPPED])], 0, "1 passed, 0 failed"),
        ([(0, [PASSED]), (139, None)], 1, "1 passed, 1 failed"),
        ([(0, [PASSED]), (139, [PASSED])], 1, "2 passed, 1 failed"),
        ([(0, [PASSED]), (5, [])], 1, "1 passed, 1 failed"),
        ([(0, [PASSED]), (0, [])], 1, "1 passed, 1 failed"),
        ([(0, [PASSED]), (None, None)], 1, "1 passed, 1 failed"),
        ([(0, [PASSED]), (1, [PASSED])], 1, "2 passed, 1 failed"),
    ],
)
def test_last_line_and_exit_code(tmp_path, groups, code, line):
    assert total(tmp_path, *groups) == (code, line)
