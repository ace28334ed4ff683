"""What this machine has for unillava, and what does not fit together.

`examine` collects facts, `diagnose` judges them: facts are plain data, so the rules are tested
without the machines they are about. No framework is imported here. Each is asked in a process of
its own (frameworks disturb one another in one process), through `backends.<name>.runtime`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

DISTRIBUTIONS = {
    "torch": ("torch",),
    "mindspore": ("mindspore", "mindspore-gpu", "mindspore-ascend", "mindspore-dev"),
    "paddle": ("paddlepaddle", "paddlepaddle-gpu", "paddlepaddle-xpu"),
    "numpy": ("numpy",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "safetensors": ("safetensors",),
    "pillow": ("pillow",),
    "av": ("av",),
    "ml_dtypes": ("ml_dtypes",),
    "deepspeed": ("deepspeed",),
    "flash_attn": ("flash-attn",),
    "torch_npu": ("torch-npu",),
    "paddlenlp": ("paddlenlp",),
    "fastapi": ("fastapi",),
}
"""What is looked for -> the names under which it is distributed."""
BACKENDS = ("torch", "mindspore", "paddle")
LAUNCHERS = ("torchrun", "deepspeed", "msrun", "srun")
VARIABLES = (
    "UNILLAVA_BACKEND",
    "UNILLAVA_KERNELS",
    "CUDA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "GLOG_v",
    "OMP_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)
"""Environment variables that change what happens; shown when set."""
PROBE_SECONDS = 180
GIB = 2**30

_PROBE = """
import importlib, json, sys
name, extensions = sys.argv[1], sys.argv[2:]
runtime = importlib.import_module(f"backends.{name}.runtime")
broken = {}
for extension in extensions:
    try:
        importlib.import_module(extension)
    except Exception as error:
        broken[extension] = f"{type(error).__name__}: {error}"
devices = {device: list(runtime.supported_dtypes(device)) for device in runtime.devices()}
print("FOUND " + json.dumps({"devices": devices, "broken": broken}))
"""
"""Prints one line that starts with FOUND; whatever else a framework prints is passed over."""
_EXTENSIONS = {"torch": ("flash_attn", "torch_npu")}
"""Compiled packages that often do not fit the installed framework: importing them tells."""


@dataclass(frozen=True)
class Backend:
    """What one framework answered."""

    version: str | None
    devices: dict[str, list[str]] = field(default_factory=dict)
    """Device -> floating dtypes a model can run in there, best first."""
    error: str | None = None
    """Why it could not be asked."""
    broken: dict[str, str] = field(default_factory=dict)
    """Extension package that is installed but cannot be imported -> the error."""

    @property
    def usable(self) -> bool:
        """Whether a model can run on it."""
        return bool(self.devices)


@dataclass(frozen=True)
class Findings:
    """What was found on this machine. Sizes in bytes, None: unknown."""

    python: str
    prefix: str
    """Folder of the Python environment."""
    system: str
    machine: str
    memory: int | None
    shared_memory: int | None
    cache_free: int | None
    """Free space where the hub's files are kept."""
    packages: dict[str, str | None]
    backends: dict[str, Backend]
    launchers: dict[str, str | None]
    environment: dict[str, str]
    drivers: dict[str, str]
    """nvidia, ascend, cann, torch_npu … -> what is known of it."""


@dataclass(frozen=True)
class Problem:
    """Something that does not fit, or that is worth knowing."""

    level: Literal["error", "warning", "note"]
    what: str
    fix: str


# --- facts -----------------------------------------------------------------------------------


def examine() -> Findings:
    """Look at this machine; takes as long as the slowest framework takes to import."""
    packages = {name: _version(names) for name, names in DISTRIBUTIONS.items()}
    with ThreadPoolExecutor(len(BACKENDS)) as pool:
        answers = pool.map(lambda name: _ask(name, packages), BACKENDS)
        backends = dict(zip(BACKENDS, answers, strict=True))
    launchers = {name: _which(name) for name in LAUNCHERS}
    launchers["paddle.distributed.launch"] = (
        f"{sys.executable} -m paddle.distributed.launch" if packages["paddle"] else None
    )
    return Findings(
        python=platform.python_version(),
        prefix=sys.prefix,
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        memory=_memory(),
        shared_memory=_space(Path("/dev/shm"), "total"),
        cache_free=_space(_hub_cache(), "free"),
        packages=packages,
        backends=backends,
        launchers=launchers,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        drivers=_drivers(),
    )


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _ask(name: str, packages: dict[str, str | None]) -> Backend:
    """Import one backend in a fresh process and let it say what it can do here."""
    if packages[name] is None:
        return Backend(None)
    here = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    extensions = [e for e in _EXTENSIONS.get(name, ()) if packages[e]]
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _PROBE, name, *extensions],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Backend(packages[name], error=f"no answer within {PROBE_SECONDS} seconds")
    found = [line for line in answer.stdout.splitlines() if line.startswith("FOUND ")]
    if answer.returncode != 0 or not found:
        last = (answer.stderr.strip() or "no message").splitlines()[-1]
        return Backend(packages[name], error=f"exit code {answer.returncode}: {last}")
    return Backend(packages[name], **json.loads(found[-1].removeprefix("FOUND ")))


def _which(program: str) -> str | None:
    """On PATH, or beside the running Python (an environment that is not activated)."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def _memory() -> int | None:
    """Main memory, or the container's limit where that is lower."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    texts = [_read(Path(limit)).strip() for limit in limits]
    return min([physical, *(int(text) for text in texts if text.isdigit())])


def _space(path: Path, kind: Literal["total", "free"]) -> int | None:
    try:
        return getattr(shutil.disk_usage(path), kind)
    except OSError:
        return None


def _hub_cache() -> Path:
    """The nearest existing folder of where transformers keeps downloaded files."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return next(folder for folder in (home, *home.parents) if folder.exists())


def _drivers() -> dict[str, str]:
    """Accelerators as the system shows them, before any framework is asked."""
    drivers = {}
    nvidia = _read(Path("/proc/driver/nvidia/version"))
    if nvidia:
        version = re.search(r"\b\d+\.\d+(\.\d+)?\b", nvidia)
        drivers["nvidia"] = version.group() if version else "present"
    cards = sorted(Path("/dev").glob("davinci[0-9]*"))
    if cards:
        drivers["ascend"] = f"{len(cards)} devices"
    toolkit = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if toolkit:
        drivers["cann"] = toolkit
    return drivers


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# --- judgement -------------------------------------------------------------------------------

_RULES: list[Callable[[Findings], Iterator[Problem]]] = []


def diagnose(findings: Findings) -> list[Problem]:
    """Everything that does not fit together, errors first."""
    problems = [problem for rule in _RULES for problem in rule(findings)]
    return sorted(problems, key=lambda problem: ("error", "warning", "note").index(problem.level))


def usable(findings: Findings) -> list[str]:
    """The backends a model can run on here."""
    return [name for name, backend in findings.backends.items() if backend.usable]


def as_json(findings: Findings) -> dict[str, Any]:
    """Findings, usable backends and problems as plain data."""
    problems = [asdict(problem) for problem in diagnose(findings)]
    return asdict(findings) | {"usable": usable(findings), "problems": problems}


def _rule(function: Callable[[Findings], Iterator[Problem]]) -> Callable:
    _RULES.append(function)
    return function


def _numbers(version: str | None) -> tuple[int, ...]:
    """`5.23.0rc1` -> (5, 23, 0); () if absent."""
    return tuple(int(n) for n in re.findall(r"\d+", (version or "").split("+")[0])[:3])


@_rule
def _nothing_usable(f: Findings) -> Iterator[Problem]:
    if not usable(f):
        yield Problem(
            "error",
            "no framework can be used here",
            'install one: pip install "unillava[torch]" (or mindspore, paddle)',
        )


@_rule
def _broken_backend(f: Findings) -> Iterator[Problem]:
    for name, backend in f.backends.items():
        if backend.error:
            yield Problem(
                "error",
                f"{name} {backend.version} is installed but does not start: {backend.error}",
                f"see the whole message with: python -c 'import backends.{name}.runtime'",
            )
        for extension, error in backend.broken.items():
            yield Problem(
                "warning",
                f"{extension} is installed but cannot be imported: {error}",
                f"install a build of {extension} for {name} {backend.version}, or uninstall it",
            )


@_rule
def _numpy_two(f: Findings) -> Iterator[Problem]:
    if f.packages["mindspore"] and _numbers(f.packages["numpy"]) >= (2,):
        yield Problem(
            "error",
            f"MindSpore {f.packages['mindspore']} is built against numpy 1, "
            f"and numpy {f.packages['numpy']} is installed: arithmetic and bfloat16 will fail",
            'pip install "numpy<2", and keep that constraint in later installs '
            "(pip install -c constraints.txt ...)",
        )


@_rule
def _ml_dtypes(f: Findings) -> Iterator[Problem]:
    old_numpy = () < _numbers(f.packages["numpy"]) < (2,)
    if old_numpy and _numbers(f.packages["ml_dtypes"]) >= (0, 6):
        yield Problem(
            "warning",
            f"ml_dtypes {f.packages['ml_dtypes']} does not fit numpy {f.packages['numpy']}",
            'pip install "ml_dtypes<0.6"',
        )


@_rule
def _transformers(f: Findings) -> Iterator[Problem]:
    version = _numbers(f.packages["transformers"])
    if not (4, 45) <= version < (6,):
        yield Problem(
            "error",
            f"transformers {f.packages['transformers'] or 'is not installed'}: "
            "tokenizers and chat templates need 4.45 to 5.x",
            'pip install "transformers>=4.45,<6"',
        )


@_rule
def _import_order(f: Findings) -> Iterator[Problem]:
    others = [name for name in ("torch", "paddle") if f.packages[name]]
    if f.packages["mindspore"] and others:
        yield Problem(
            "note",
            f"MindSpore cannot be imported after {' or '.join(others)} in one process",
            "unillava uses one framework per process and imports MindSpore first; in scripts of "
            "your own, import mindspore before everything else (transformers imports torch)",
        )


@_rule
def _python(f: Findings) -> Iterator[Problem]:
    wheels = (3, 9) <= _numbers(f.python) < (3, 13)
    if not f.packages["mindspore"] and not wheels:
        yield Problem(
            "note",
            f"there is no MindSpore wheel for Python {f.python}",
            "use Python 3.10, 3.11 or 3.12 if you want the MindSpore backend",
        )


@_rule
def _spaces(f: Findings) -> Iterator[Problem]:
    if " " in f.prefix and f.packages["torch"]:
        yield Problem(
            "note",
            "the path of the Python environment has a space in it, and torch.compile (--compile) "
            "then fails to link on the CPU",
            "make the environment in a folder without spaces if you want --compile",
        )


@_rule
def _paddlenlp(f: Findings) -> Iterator[Problem]:
    if f.packages["paddlenlp"] and _numbers(f.packages["transformers"]) >= (5,):
        yield Problem(
            "warning",
            f"paddlenlp {f.packages['paddlenlp']} needs transformers below 5, "
            f"{f.packages['transformers']} is installed",
            "keep PaddleNLP in an environment of its own; unillava itself does not need it",
        )


@_rule
def _video(f: Findings) -> Iterator[Problem]:
    if not f.packages["av"]:
        yield Problem(
            "note",
            "av (PyAV) is not installed: video files cannot be read, folders of frames can",
            'pip install "unillava[video]"',
        )


@_rule
def _glog(f: Findings) -> Iterator[Problem]:
    if f.environment.get("GLOG_v", "0") != "0" and f.packages["paddle"]:
        yield Problem(
            "warning",
            f"GLOG_v={f.environment['GLOG_v']} quietens MindSpore, but makes Paddle print "
            "hundreds of thousands of lines",
            "unset GLOG_v when running on Paddle",
        )


@_rule
def _idle_accelerator(f: Findings) -> Iterator[Problem]:
    devices = [device for backend in f.backends.values() for device in backend.devices]
    if "nvidia" in f.drivers and not any(d.startswith(("cuda", "gpu")) for d in devices):
        yield Problem(
            "warning",
            f"an NVIDIA driver ({f.drivers['nvidia']}) is here, but no framework sees a GPU",
            "install CUDA builds (torch with CUDA, paddlepaddle-gpu), "
            "and look at CUDA_VISIBLE_DEVICES",
        )
    if "ascend" in f.drivers and not any(d.lower().startswith(("npu", "asc")) for d in devices):
        missing = (
            "" if "cann" in f.drivers else "source the CANN toolkit's set_env.sh, then "
        ) + "install mindspore, torch_npu or Paddle's npu plug-in for this CANN version"
        yield Problem(
            "warning",
            f"Ascend NPUs are here ({f.drivers['ascend']}), but no framework sees one",
            missing,
        )


@_rule
def _small(f: Findings) -> Iterator[Problem]:
    if f.shared_memory is not None and f.shared_memory < GIB:
        yield Problem(
            "warning",
            f"/dev/shm has {f.shared_memory / GIB:.2f} GiB: data workers exchange batches there",
            "start the container with --shm-size=8g or --ipc=host",
        )
    if f.cache_free is not None and f.cache_free < 20 * GIB:
        yield Problem(
            "warning",
            f"{f.cache_free / GIB:.1f} GiB are free where hub files are kept: "
            "a 7B checkpoint takes about 14",
            "free some space, or set HF_HOME to a larger disk",
        )
    if f.memory is not None and f.memory < 4 * GIB:
        yield Problem(
            "warning",
            f"{f.memory / GIB:.1f} GiB of memory: enough for tiny checkpoints only",
            "`unillava info DIR` says what a checkpoint needs",
        )
