"""How the backend behaves in a process: quiet, first in line, errors where they are made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import backends
from backends.errors import BackendError
from backends.mindspore import nn, ops


def run(code: str, directory: Path) -> subprocess.CompletedProcess:
    """Run a script (a file: graphs are compiled from source) in an empty folder `work`."""
    script, work = directory / "script.py", directory / "work"
    script.write_text(code)
    work.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("GLOG_v", "MS_OM_PATH")}
    root = str(Path(backends.__file__).parents[1])
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=work,
        env=environment | {"PYTHONPATH": root},
    )


QUIET = """
import os
import backends
runtime = backends.select("mindspore", device="cpu", dtype="float32")
import numpy as np
def good(pair):
    return pair[0] + pair[1]
def bad(x):
    return nothing_of_this_name(x)
x = runtime.tensor(np.ones(2))
for _ in range(2):
    runtime.compile(good)((x, x))
try:
    runtime.compile(bad)(x)
except NameError:
    print("failed", os.environ.get("GLOG_v"))
"""


def test_quiet_and_leaves_no_files(tmp_path):
    """Compilation, also one that fails, prints no warnings and writes nothing where one works."""
    done = run(QUIET, tmp_path)
    assert done.stdout == "failed None\n", done.stderr
    assert done.stderr == ""
    assert list((tmp_path / "work").iterdir()) == []


def test_must_be_the_first_framework(tmp_path):
    done = run("import torch, backends; backends.select('mindspore', device='cpu')", tmp_path)
    assert "torch was imported before MindSpore" in done.stderr
    assert "BackendError" in done.stderr


def test_errors_surface_at_the_call(runtime):
    table, outside = runtime.tensor(np.zeros((3, 2))), runtime.tensor(np.array([7]))
    with pytest.raises((ValueError, RuntimeError)):
        ops.cache_update(
            runtime.tensor(np.zeros((1, 3, 1, 2))), runtime.tensor(np.ones((1, 1, 1, 2))), outside
        )
    with pytest.raises((ValueError, RuntimeError)):
        ops.take_rows(table, outside)


@pytest.mark.parametrize("device", ["npu:0", "Ascend", "ascend:7", "gpu", "cpu:1", "cpu:x"])
def test_devices_that_are_not_here(device, runtime):
    with pytest.raises(BackendError, match=device):
        runtime.setup(device, "float32")
    assert runtime.current() == ("cpu", "float32")


def test_spellings(runtime):
    for device in ("CPU", "cpu:0", "cpu"):
        runtime.setup(device, "float32")
        assert runtime.current() == ("cpu", "float32")
    assert runtime.supported_dtypes("npu:0") == runtime.supported_dtypes("Ascend:1")


def test_bfloat16_is_refused_on_cpu(runtime):
    with pytest.raises(BackendError, match="one of float32, float16"):
        runtime.setup("cpu", "bfloat16")


def test_models_are_built_without_memory(runtime):
    before = runtime.peak_memory()
    module = runtime.build(lambda: nn.Linear(100_000, 50_000, True))
    assert runtime.parameter_shapes(module)["weight"] == (50_000, 100_000)  # 20 GB
    assert runtime.peak_memory() - before < 50 * 2**20


def test_wrong_shape_is_refused(runtime):
    module = runtime.build(lambda: nn.Linear(2, 3, False))
    with pytest.raises(BackendError, match="weight"):
        runtime.assign(module, "weight", np.zeros((2, 3), np.float32))


def test_float16_runs(runtime):
    """Layers and the loss in the other dtype of CPU, near the float32 result."""
    results, rng = {}, np.random.default_rng(0)
    values = {"weight": rng.standard_normal((11, 16)), "x": rng.standard_normal((5, 16))}
    try:
        for dtype in runtime.supported_dtypes("cpu"):
            runtime.setup("cpu", dtype)
            head = runtime.build(lambda: nn.Linear(16, 11, False))
            runtime.assign(head, "weight", values["weight"].astype(np.float32))
            x = runtime.tensor(values["x"])
            x = ops.rms_norm(x, runtime.tensor(np.ones(16)), 1e-5)
            loss = ops.linear_cross_entropy(x, head.matrix(), runtime.tensor(np.arange(5)))
            q = ops.reshape(x, (1, 5, 2, 8))
            y = ops.attention(q, q, q, scale=0.3, causal=True)
            assert str(head(x).dtype).lower() == dtype and y.dtype == x.dtype
            results[dtype] = float(loss.asnumpy()), runtime.numpy(y)
    finally:
        runtime.setup("cpu", "float32")
    assert abs(results["float16"][0] - results["float32"][0]) < 1e-2 * results["float32"][0]
    np.testing.assert_allclose(results["float16"][1], results["float32"][1], atol=5e-3)
