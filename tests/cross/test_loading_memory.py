"""Loading streams: at the peak a process holds the model once, and one tensor besides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import json, sys
import backends
from backends.process import peak_resident_bytes
runtime = backends.select(sys.argv[1], device="cpu", dtype="float32")
import numpy as np
from unillava.checkpoint import open_checkpoint
from unillava.loading import load_network
from unillava.models.llava import Llava
checkpoint = open_checkpoint(sys.argv[2])
runtime.numpy(runtime.tensor(np.zeros(4, np.float32)))
before = peak_resident_bytes()
network = load_network(checkpoint)
after = peak_resident_bytes()
print(json.dumps({"grown": after - before}))
"""

MODEL = {
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 9,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
    }
}


@pytest.fixture(scope="module")
def checkpoint(tiny) -> Path:
    return tiny(config=MODEL, max_shard_bytes=50_000_000)


@pytest.mark.parametrize("backend", ["torch", "mindspore", "paddle"])
def test_the_model_is_never_held_twice(backend, checkpoint):
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", PROBE, backend, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])["grown"]
    assert size * 0.9 < grown < size * 1.15 + 60e6, f"{grown / size:.2f} times the weights"
