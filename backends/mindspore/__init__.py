"""The MindSpore backend: CPU, Ascend, and GPU where the installed MindSpore has it.

Importing it imports MindSpore, quietly, and must happen before torch or Paddle are imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib import import_module

from backends.errors import BackendError

_RIVALS = ("torch", "paddle")
_LOG_LEVEL = "GLOG_v"
_ERRORS_ONLY = "3"


def _import_mindspore() -> None:
    """Import MindSpore first, with its warnings off and its failure reports in a temporary folder.

    Raises BackendError if torch or Paddle was first: their oneDNN hides symbols MindSpore needs.
    """
    first = [name for name in _RIVALS if name in sys.modules]
    if first and "mindspore" not in sys.modules:
        raise BackendError(
            f"{first[0]} was imported before MindSpore, which then cannot be loaded",
            expected="MindSpore as the first framework of the process",
            fix='call backends.select("mindspore") before anything that imports '
            f"{' or '.join(_RIVALS)}",
        )
    # A graph that fails to compile is dumped below this folder, by default the current one.
    os.environ.setdefault("MS_OM_PATH", os.path.join(tempfile.gettempdir(), "unillava-mindspore"))
    if _LOG_LEVEL in os.environ:
        import_module("mindspore")
        return
    # Read once, at import. Not left in the environment: child processes may run Paddle, which
    # takes the same variable for its verbosity.
    os.environ[_LOG_LEVEL] = _ERRORS_ONLY
    try:
        import_module("mindspore.log").get_level()
    finally:
        del os.environ[_LOG_LEVEL]


_import_mindspore()
