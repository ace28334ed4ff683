"""Tests of the MindSpore backend alone: `pytest tests/mindspore`, in a process of their own."""

import pytest

import backends

RUNTIME = backends.select("mindspore", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def runtime():
    return RUNTIME
