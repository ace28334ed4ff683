"""The PaddlePaddle backend: cpu, gpu, and custom devices such as npu (Ascend).

Importing it imports paddle, quietly and fit for this processor: Paddle's libraries read some
environment variables once, when they are loaded.
"""

import os
import warnings
from pathlib import Path

QUIET = {
    # Users set it for MindSpore; Paddle would print hundreds of thousands of lines with it.
    "GLOG_v": None,
    # Errors only: at the default level each compiled function prints several lines.
    "GLOG_minloglevel": os.environ.get("GLOG_minloglevel", "2"),  # noqa: SIM112 (glog's spelling)
}
"""Variables while paddle is imported; None: absent."""


def _import_quietly() -> None:
    before = {name: os.environ.get(name) for name in QUIET}
    _set(QUIET)
    try:
        with warnings.catch_warnings():
            # Only who compiles custom operators needs ccache.
            warnings.filterwarnings("ignore", message="No ccache found")
            import paddle  # noqa: F401
    finally:
        # Child processes may run another framework: they see the environment as it was.
        _set(before)
    # Paddle's own to_static asks a graph for a device while it appends the backward pass.
    warnings.filterwarnings("ignore", message="Tensor do not have 'place' interface")


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _speed_up_amd() -> None:
    """The MKL that Paddle ships leaves AVX2 unused on AMD: matrix products take 3.4 times as long.

    The variable tells it to take its AVX2 code. Intel's processors are recognised without it.
    """
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if "AuthenticAMD" in processor and "avx2" in processor:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


_speed_up_amd()
_import_quietly()
