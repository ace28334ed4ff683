"""Adds up what scripts/test.sh ran; the last line is `N passed, N failed`.

    python scripts/total.py FOLDER NAME...

Reads, for each NAME, FOLDER/NAME.code (exit code of the command) and, for pytest,
FOLDER/NAME.xml (JUnit). An error in a fixture or an import counts as failed, and so does a group
that crashed, ran no test, or left nothing behind.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS_FAILED = 1
"""pytest's exit code when it ran to its end and some tests failed."""


def count(folder: Path, name: str) -> tuple[int, int, int]:
    """(passed, failed, skipped) of one group."""
    code_file = folder / f"{name}.code"
    code = int(code_file.read_text()) if code_file.exists() else None
    if name.startswith("ruff"):
        return (1, 0, 0) if code == 0 else (0, 1, 0)
    try:
        cases = list(ElementTree.parse(folder / f"{name}.xml").getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return 0, 1, 0
    outcomes = [_outcome(case) for case in cases]
    passed, failed, skipped = (outcomes.count(kind) for kind in ("passed", "failed", "skipped"))
    # A crash after the report was written shows in the exit code only.
    explained = cases and code == (TESTS_FAILED if failed else 0)
    return passed, failed if explained else failed + 1, skipped


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def main(folder: Path, names: list[str]) -> int:
    """Print each group's result and the total; 1 if anything failed or nothing ran."""
    counts = [count(folder, name) for name in names]
    for name, (passed, failed, skipped) in zip(names, counts, strict=True):
        more = f", {skipped} skipped" if skipped else ""
        print(f"{name:20} {passed:5} passed, {failed:3} failed{more}")
    passed, failed = (sum(numbers[n] for numbers in counts) for n in (0, 1))
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
