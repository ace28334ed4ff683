"""The rules of `unillava doctor`, on machines that are made up."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from unillava import doctor
from unillava.cli import doctor as command
from unillava.doctor import GIB, Backend, Findings, diagnose, usable

SOUND = Findings(
    python="3.11.7",
    prefix="/opt/env",
    system="Linux 6.1",
    machine="x86_64",
    memory=64 * GIB,
    shared_memory=8 * GIB,
    cache_free=500 * GIB,
    packages={name: None for name in doctor.DISTRIBUTIONS}
    | {"torch": "2.13.0", "numpy": "2.1.0", "transformers": "5.23.0", "av": "18.1.0"},
    backends={
        "torch": Backend("2.13.0", {"cuda:0": ["bfloat16", "float16", "float32"]}),
        "mindspore": Backend(None),
        "paddle": Backend(None),
    },
    launchers={"torchrun": "/bin/torchrun"},
    environment={},
    drivers={"nvidia": "570.1"},
)


def with_packages(**packages):
    return replace(SOUND, packages=SOUND.packages | packages)


def test_a_sound_machine_has_no_problems():
    assert diagnose(SOUND) == []
    assert usable(SOUND) == ["torch"]


CASES = {
    "numpy 2 with MindSpore": (
        with_packages(mindspore="2.10.0", torch=None),
        "error",
        "numpy 2.1.0",
    ),
    "import order": (with_packages(mindspore="2.10.0", numpy="1.26.4"), "note", "after torch"),
    "old transformers": (with_packages(transformers="4.37.2"), "error", "4.37.2"),
    "future transformers": (with_packages(transformers="6.0.0"), "error", "6.0.0"),
    "no transformers": (with_packages(transformers=None), "error", "not installed"),
    "python without MindSpore": (replace(SOUND, python="3.14.0"), "note", "Python 3.14.0"),
    "space in the path": (replace(SOUND, prefix="/my env"), "note", "torch.compile"),
    "paddlenlp": (with_packages(paddlenlp="3.0.0b4"), "warning", "needs transformers below 5"),
    "no av": (with_packages(av=None), "note", "PyAV"),
    "ml_dtypes": (with_packages(numpy="1.26.4", ml_dtypes="0.6.0"), "warning", "ml_dtypes 0.6.0"),
    "GLOG_v": (
        replace(with_packages(paddle="3.3.1"), environment={"GLOG_v": "3"}),
        "warning",
        "GLOG_v=3",
    ),
    "small shared memory": (replace(SOUND, shared_memory=64 * 2**20), "warning", "0.06 GiB"),
    "small disk": (replace(SOUND, cache_free=3 * GIB), "warning", "3.0 GiB are free"),
    "small memory": (replace(SOUND, memory=2 * GIB), "warning", "2.0 GiB of memory"),
    "idle GPU": (
        replace(SOUND, backends=SOUND.backends | {"torch": Backend("2.13.0", {"cpu": []})}),
        "warning",
        "no framework sees a GPU",
    ),
    "idle NPU": (replace(SOUND, drivers={"ascend": "8 devices"}), "warning", "8 devices"),
    "backend does not start": (
        replace(SOUND, backends=SOUND.backends | {"paddle": Backend("3.3.1", error="boom")}),
        "error",
        "paddle 3.3.1 is installed but does not start: boom",
    ),
    "broken extension": (
        replace(
            SOUND,
            backends={
                "torch": Backend(
                    "2.13.0", {"cuda:0": ["float32"]}, broken={"flash_attn": "undefined symbol"}
                )
            },
        ),
        "warning",
        "flash_attn is installed but cannot be imported",
    ),
    "nothing": (replace(SOUND, backends={}, drivers={}), "error", "no framework"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_misfit_is_named_once_with_what_to_do(case):
    findings, level, text = CASES[case]
    (problem,) = diagnose(findings)
    assert problem.level == level
    assert text in problem.what
    assert problem.fix


def test_errors_come_first():
    findings = replace(with_packages(mindspore="2.10.0", av=None), shared_memory=0)
    levels = [problem.level for problem in diagnose(findings)]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    assert levels[0] == "error" and levels[-1] == "note"


@pytest.mark.parametrize(
    "version, numbers",
    [("5.23.0", (5, 23, 0)), ("2.13.0+cpu", (2, 13, 0)), ("4.45.0.dev0", (4, 45, 0)), (None, ())],
)
def test_version_numbers(version, numbers):
    assert doctor._numbers(version) == numbers


def answer(monkeypatch, outcome):
    """Let the framework's process end with `outcome`."""

    def run(command, **options):
        if isinstance(outcome, Exception):
            raise outcome
        return subprocess.CompletedProcess(command, *outcome)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    return doctor._ask("torch", dict.fromkeys(doctor.DISTRIBUTIONS) | {"torch": "2.13.0"})


def test_noise_of_a_framework_is_passed_over(monkeypatch):
    found = {"devices": {"cpu": ["float32"]}, "broken": {}}
    out = f"[WARNING] hello\nFOUND {json.dumps(found)}\nbye\n"
    backend = answer(monkeypatch, (0, out, "warnings\n"))
    assert backend.devices == {"cpu": ["float32"]} and backend.error is None


@pytest.mark.parametrize(
    "outcome, text",
    [
        ((1, "", "Traceback\nImportError: libfoo.so\n"), "exit code 1: ImportError: libfoo.so"),
        ((-11, "", ""), "exit code -11: no message"),
        ((0, "nothing said", ""), "no message"),
        (subprocess.TimeoutExpired("python", 180), "no answer within 180 seconds"),
    ],
)
def test_a_framework_that_fails_is_reported(monkeypatch, outcome, text):
    backend = answer(monkeypatch, outcome)
    assert text in backend.error and not backend.usable


def run_command(monkeypatch, findings, *arguments):
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    app = typer.Typer()
    command.register(app)
    return CliRunner().invoke(app, list(arguments))


def test_command_prints_devices_and_problems(monkeypatch):
    result = run_command(monkeypatch, with_packages(mindspore="2.10.0"))
    assert result.exit_code == 0
    for text in ("cuda:0", "bfloat16, float16, float32", "error: MindSpore", "numpy<2"):
        assert text in result.stdout


def test_command_json_is_complete(monkeypatch):
    result = run_command(monkeypatch, SOUND, "--json")
    report = json.loads(result.stdout)
    assert report["usable"] == ["torch"] and report["problems"] == []
    assert report["backends"]["torch"]["devices"] == {"cuda:0": ["bfloat16", "float16", "float32"]}


def test_exit_code_tells_that_nothing_is_usable(monkeypatch):
    assert run_command(monkeypatch, replace(SOUND, backends={})).exit_code == 1
