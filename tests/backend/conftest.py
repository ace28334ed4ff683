"""These tests run once per backend, in a process of its own, named by UNILLAVA_BACKEND."""

import os

import pytest

import backends

NAME = os.environ.get("UNILLAVA_BACKEND", "torch")
RUNTIME = backends.select(NAME, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def runtime():
    return RUNTIME


@pytest.fixture(scope="session")
def ops():
    return backends.ops


@pytest.fixture(scope="session")
def nn():
    return backends.nn
