"""What a backend asks the operating system."""

from __future__ import annotations

import platform
import re
import resource
import sys
from pathlib import Path

CONTROL_GROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Files of cgroup 2 and 1: what a container may take, and what it has taken."""


def peak_resident_bytes() -> int:
    """Most memory that this process has held, in bytes.

    Linux's `ru_maxrss` of a child starts from what its parent held when it was started, so there
    the process's own high-water mark is read.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    # In bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes(root: str = "/") -> int | None:
    """Memory that processes can still take here, in bytes: the machine's, and in a container what
    it is allowed; None where the system does not say.

    Args:
        root: where `proc` and `sys` lie.
    """
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(Path(root, "proc/meminfo")))
    known = [int(found[1]) * 1024] if found else []
    for limit, used in CONTROL_GROUPS:
        folder = Path(root, "sys/fs/cgroup")
        allowed, taken = _text(folder / limit).strip(), _text(folder / used).strip()
        if allowed.isdigit() and taken.isdigit():
            known.append(max(0, int(allowed) - int(taken)))
    return min(known, default=None)


def processor_name() -> str:
    """The processor's model as the system names it, else its architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
