"""How a process chooses its backend, without importing any framework."""

from __future__ import annotations

import types

import pytest

import backends
from backends.errors import BackendError


@pytest.fixture
def choice(monkeypatch):
    """`select` with frameworks and devices made up; returns what was set up."""
    made: list[tuple] = []
    runtime = types.SimpleNamespace(
        current=lambda: (made[-1][0], made[-1][1]) if made else (None, "float32"),
        devices=lambda: ["best:0", "cpu"],
        setup=lambda device, dtype, kernels: made.append((device, dtype, kernels)),
    )
    monkeypatch.setattr(backends, "NAME", None)
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: runtime)
    for variable in ("UNILLAVA_BACKEND", "UNILLAVA_KERNELS"):
        monkeypatch.delenv(variable, raising=False)

    def with_installed(*names, paths=(), packages=()):
        monkeypatch.setattr(backends, "installed", lambda: list(names))
        monkeypatch.setattr(backends.os.path, "exists", lambda path: path in paths)
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name in packages)
        return made

    return with_installed


def test_name_argument_then_environment_then_automatic(choice, monkeypatch):
    choice("torch", "mindspore", "paddle")
    monkeypatch.setenv("UNILLAVA_BACKEND", "paddle")
    backends.select()
    assert backends.NAME == "paddle"
    monkeypatch.setattr(backends, "NAME", None)
    backends.select("mindspore")
    assert backends.NAME == "mindspore"
    monkeypatch.setattr(backends, "NAME", None)
    monkeypatch.delenv("UNILLAVA_BACKEND")
    backends.select("auto")
    assert backends.NAME == "torch"


@pytest.mark.parametrize(
    ("installed", "paths", "packages", "expected"),
    [
        (["paddle"], [], [], "paddle"),
        (["torch", "mindspore", "paddle"], [], [], "torch"),
        (["torch", "mindspore", "paddle"], ["/dev/davinci0"], [], "mindspore"),
        (["torch", "mindspore"], ["/dev/davinci_manager"], ["torch_npu"], "torch"),
        (["torch", "paddle"], ["/dev/davinci0"], [], "paddle"),
    ],
)
def test_automatic_choice(choice, installed, paths, packages, expected):
    choice(*installed, paths=paths, packages=packages)
    backends.select()
    assert backends.NAME == expected


def test_defaults_and_spellings(choice, monkeypatch):
    made = choice("torch")
    backends.select("torch")
    assert made == [("best:0", "float32", "auto")]
    monkeypatch.setenv("UNILLAVA_KERNELS", "portable")
    backends.select("torch", device="cpu", dtype="bf16")
    assert made[-1] == ("cpu", "bfloat16", "portable")
    backends.select("auto")  # nothing new is asked for: nothing changes
    assert len(made) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "jax"}, ["jax", "torch, mindspore, paddle, auto", "--backend"]),
        ({"name": "paddle"}, ["paddle", "not installed", "unillava[paddle]"]),
        ({"name": "torch", "dtype": "int4"}, ["int4", "bfloat16"]),
        ({"name": "torch", "kernels": "magic"}, ["magic", "portable"]),
    ],
)
def test_errors_say_what_to_do(choice, arguments, words):
    choice("torch")
    with pytest.raises(BackendError) as caught:
        backends.select(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_switching_is_refused(choice):
    choice("torch", "paddle")
    backends.select("torch")
    with pytest.raises(BackendError, match="already runs on 'torch'"):
        backends.select("paddle")


def test_nothing_installed(choice):
    choice()
    with pytest.raises(BackendError, match="no framework is installed"):
        backends.select()
