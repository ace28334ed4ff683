"""Scores answers of `unillava predict` against the questions' own `answer` entries.

    python scripts/score_answers.py held_out.jsonl answers.jsonl [--at-least 95]

An answer is right if it is exactly the expected text. Prints a table by `category`, and some wrong
answers; exit code 1 if fewer than `--at-least` percent are right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = 5
"""Wrong answers that are printed."""


def main() -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--at-least", type=float, default=0.0, metavar="PERCENT")
    options = parser.parse_args()
    questions, answers = read(options.questions), read(options.answers)
    given = {answer["question_id"]: answer["text"] for answer in answers}
    wrong = [q for q in questions if given.get(q["question_id"]) != q["answer"]]
    Console().print(table(questions, wrong))
    for question in wrong[:SHOWN]:
        print(
            f"{question['image']}: {question['text']} {given.get(question['question_id'])!r}, "
            f"not {question['answer']!r}"
        )
    percent = 100 * (1 - len(wrong) / len(questions))
    print(f"accuracy {percent:.1f} % of {len(questions)} questions")
    if percent < options.at_least:
        print(f"expected: at least {options.at_least:g} %", file=sys.stderr)
        return 1
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(questions: list[dict[str, Any]], wrong: list[dict[str, Any]]) -> Table:
    """How many are right, by category."""
    asked = Counter(question["category"] for question in questions)
    missed = Counter(question["category"] for question in wrong)
    rows = Table("questions about", "asked", "right", "%")
    for name, count in (*sorted(asked.items()), ("all", len(questions))):
        right = count - (len(wrong) if name == "all" else missed[name])
        rows.add_row(name, str(count), str(right), f"{100 * right / count:.1f}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
