"""Work on large arrays by blocks of rows, in threads: NumPy lets go of the interpreter meanwhile.

It keeps temporary arrays small, and makes up for what NumPy computes slowly (float16 above all).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

VALUES = 1 << 20
"""Values in a block."""
THREADS = min(8, os.cpu_count() or 1)


def for_blocks(rows: int, row_size: int, work: Callable[[slice], None]) -> None:
    """Call `work` with slices that cover all rows.

    Args:
        rows: how many there are.
        row_size: values in each.
        work: must not touch rows outside its slice. What it raises is raised here.
    """
    step = max(1, VALUES // max(1, row_size))
    blocks = [slice(begin, begin + step) for begin in range(0, rows, step)]
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(work, blocks):
            pass
