"""Torch and transformers as the independent reference, in one process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import backends

torch.set_num_threads(2)
RUNTIME = backends.select("torch", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def runtime():
    return RUNTIME
