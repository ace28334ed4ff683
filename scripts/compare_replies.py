"""Compares replies token by token: the JSON lines that `unillava chat --json` prints.

    python scripts/compare_replies.py torch.json mindspore.json paddle.json

Exit code 1 if they differ.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(files: list[str]) -> int:
    """Print a table with a row for each position, and the verdict."""
    replies = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    names = [reply["backend"] for reply in replies]
    rows = list(itertools.zip_longest(*(reply["tokens"] for reply in replies), fillvalue="-"))
    table = Table("position", *names, "same")
    for position, row in enumerate(rows):
        table.add_row(str(position), *map(str, row), "yes" if len(set(row)) == 1 else "NO")
    Console().print(table)
    same = bool(rows) and all(len(set(row)) == 1 for row in rows)
    same = same and len({reply["text"] for reply in replies}) == 1
    print(
        f"The replies of {', '.join(names)} agree: {len(rows)} tokens, all equal."
        if same
        else f"The replies of {', '.join(names)} DIFFER."
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
