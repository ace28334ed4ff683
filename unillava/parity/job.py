"""Jobs for the worker processes: what each is asked, how it is started, and what it answers.

A job is a folder. `job.json` says what to do; the worker appends a line per step to `progress`,
writes `result.json` when it is done (or has a reason why not), and everything that it or its
framework prints goes to `log`. Tensors lie as .npy files in a store that several jobs share: one
job fills it, the others compare theirs with it as they go, so that however many backends take
part one copy of the tensors is on disk.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unillava.errors import UnillavaError
from unillava.parity.compare import Run, or_null
from unillava.spec import LlavaSpec, parameter_table

POLL_S = 0.1
"""How often a worker's progress is looked at."""
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
"""Where `unillava` and `backends` are imported from; workers run in a folder of their own."""


Arrays = dict[str, np.ndarray]


class ParityError(UnillavaError):
    """A comparison cannot be carried out."""


@dataclass(frozen=True)
class Job:
    """What one worker does. Paths are absolute."""

    label: str
    """How this computation is called in the report."""
    engine: Literal["native", "transformers"]
    """Our model on a backend, or transformers' own model (on torch)."""
    backend: str
    device: str | None
    dtype: str
    checkpoint: str
    base: str | None
    vision: str | None
    """As in `unillava.checkpoint.open_checkpoint`."""
    inputs: str
    """What `unillava.parity.batch.Inputs.write` wrote."""
    store: str
    """The reference's tensors."""
    fills_store: bool
    """Whether the first run writes the store instead of being compared with it."""
    runs: tuple[str, ...]
    """Kernels (auto or portable) of each forward and backward pass."""
    watch: tuple[str, ...]
    """Names of the modules whose outputs are compared."""
    gradients: bool
    new_tokens: int
    """Greedy tokens for each row's prompt; 0: none."""

    @property
    def steps(self) -> int:
        """Steps that the worker reports: loading, passes, replies."""
        return 1 + len(self.runs) * (1 + self.gradients) + (self.new_tokens > 0)

    def write(self, directory: Path) -> None:
        """Make the job's folder."""
        directory.mkdir(parents=True)
        (directory / "job.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Job:
        """The inverse of `write`."""
        fields = json.loads((directory / "job.json").read_text(encoding="utf-8"))
        return cls(**fields | {"runs": tuple(fields["runs"]), "watch": tuple(fields["watch"])})


@dataclass(frozen=True)
class Result:
    """What a worker answers."""

    versions: dict[str, str]
    device: str
    threads: str
    """Value of OMP_NUM_THREADS, "default" if it is not set."""
    order: tuple[str, ...]
    """Outputs in the order in which they were computed."""
    runs: tuple[Run, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Greedy tokens of each row."""
    gaps: tuple[tuple[float | None, ...], ...]
    """By how much the best logit led the second, for each of `tokens`; None: not finite."""
    peak_memory: int
    """Bytes; of the device, on cpu of the process."""
    stored: int
    """Bytes written to the store."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return vars(self) | {
            "runs": [run.to_json() for run in self.runs],
            "gaps": [[or_null(gap) for gap in gaps] for gaps in self.gaps],
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Result:
        """The inverse of `to_json`."""
        return cls(
            **fields
            | {"order": tuple(fields["order"])}
            | {"runs": tuple(Run.from_json(run) for run in fields["runs"])}
            | {name: tuple(map(tuple, fields[name])) for name in ("tokens", "gaps")}
        )


def write_arrays(directory: Path, arrays: Arrays) -> None:
    """Each array as a .npy file, so that readers can map it."""
    directory.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)


def read_arrays(directory: Path) -> Arrays:
    """What `write_arrays` wrote."""
    return {file.stem: np.load(file) for file in sorted(directory.glob("*.npy"))}


# --- which outputs are compared --------------------------------------------------------------

_BLOCK_LEVEL = (
    "vision_tower",
    "vision_tower.vision_model.embeddings",
    "vision_tower.vision_model.pre_layrnorm",
    "multi_modal_projector",
    "language_model.model.embed_tokens",
    "language_model.model.norm",
)
_CONTAINERS = {
    "vision_tower.vision_model",
    "vision_tower.vision_model.encoder",
    "vision_tower.vision_model.encoder.layers",
    "language_model",
    "language_model.model",
    "language_model.model.layers",
}
"""Modules that only pass on what a module inside them gave."""


def module_names(spec: LlavaSpec) -> list[str]:
    """Every module that LLaVA calls and that computes something of its own, in file order.

    Modules are the owners of parameters and what these lie in. Not called are what comes behind
    the last vision layer that is used, and position embeddings, whose table is read. The output
    head is not among them: its output is recorded as `logits`.
    """
    found: dict[str, None] = {}
    for parameter in parameter_table(spec):
        owner = parameter.rpartition(".")[0]
        while owner:
            found[owner] = None
            owner = owner.rpartition(".")[0]
    return [name for name in found if name not in _CONTAINERS and _is_called(spec, name)]


def _is_called(spec: LlavaSpec, name: str) -> bool:
    vision = "vision_tower.vision_model."
    if name.startswith(f"{vision}encoder.layers."):
        count = spec.vision.num_layers + 1
        called = max(layer % count for layer in spec.feature_layers)
        return int(name.split(".")[4]) < called
    never = (f"{vision}post_layernorm", f"{vision}head", f"{vision}embeddings.position_embedding")
    return not name.startswith((*never, "language_model.lm_head"))


def block_names(spec: LlavaSpec) -> list[str]:
    """The modules that make up the main path: embeddings, blocks, projector, final norm."""
    names = module_names(spec)
    return [n for n in names if n in _BLOCK_LEVEL or n.rsplit(".", 1)[-1].isdigit()]


def names_inside(spec: LlavaSpec, layer: str) -> list[str]:
    """The modules inside one of `block_names`."""
    if layer == "vision_tower":
        return []  # beside other blocks it has the choice of rows alone, which no module makes
    return [name for name in module_names(spec) if name.startswith(f"{layer}.")]


def output_bytes(spec: LlavaSpec, names: Sequence[str], vision_rows: int, text_rows: int) -> int:
    """Bytes of the float32 outputs of these modules, nearly.

    Args:
        spec: the model.
        names: modules.
        vision_rows: rows that the vision tower computes, over all tiles and frames.
        text_rows: positions that are not padding.
    """
    table = parameter_table(spec)
    total = 0
    for name in names:
        is_text = name.startswith("language_model.")
        width = spec.text.hidden_size if is_text else spec.vision.hidden_size
        if name.startswith("multi_modal_projector"):
            width = spec.projector.output_size
        shape = table.get(f"{name}.weight", ())
        if len(shape) == 2 and not name.endswith("embed_tokens"):
            width = shape[0]
        total += 4 * width * (text_rows if is_text else vision_rows)
    return total


# --- running ---------------------------------------------------------------------------------


def run_job(
    job: Job,
    directory: Path,
    on_progress: Callable[[int, str], None],
    *,
    threads: int | None = None,
) -> Result:
    """Run a job in a process of its own and wait for it; the process never outlives the call.

    Args:
        job: what to do.
        directory: its folder; must not exist.
        on_progress: called with the number of finished steps and what is done now.
        threads: CPU threads for the framework; None: as in this process.

    Raises:
        UnillavaError: what the worker found wrong, or that it died (with the end of its log).
    """
    job.write(directory)
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "unillava.parity.worker", str(directory)],
            cwd=directory,  # MindSpore leaves files in the current folder
            env=_environment(job, threads),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            seen = 0
            while process.poll() is None:
                seen = _report(directory / "progress", seen, on_progress)
                time.sleep(POLL_S)
            _report(directory / "progress", seen, on_progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return _read_result(job, directory, process.returncode)


def _environment(job: Job, threads: int | None) -> dict[str, str]:
    paths = [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "UNILLAVA_BACKEND": job.backend,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if threads is not None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment |= {name: str(threads) for name in names}
    return environment


def _report(path: Path, seen: int, on_progress: Callable[[int, str], None]) -> int:
    """Hand on the last line of a growing file; returns the number of lines."""
    if not path.exists():
        return seen
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > seen:
        on_progress(len(lines) - 1, lines[-1])
    return len(lines)


def _read_result(job: Job, directory: Path, returncode: int) -> Result:
    path = directory / "result.json"
    if not path.exists():
        raise ParityError(
            f"the process of {job.label} ended without a result",
            given=f"{_cause(returncode)}; the last lines of its log:\n{_tail(directory / 'log')}",
            fix="run it alone (`unillava chat DIR --backend …`) to see whether the backend works "
            "on this machine; leave it out with --backends",
        )
    fields = json.loads(path.read_text(encoding="utf-8"))
    if "error" in fields:
        error = fields["error"]
        raise ParityError(
            f"{job.label}: {error['problem']}",
            given=error["given"],
            expected=error["expected"],
            fix=error["fix"],
        )
    return Result.from_json(fields)


def _cause(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    name = signal.Signals(-returncode).name
    hint = " (as the system does when memory runs out)" if name == "SIGKILL" else ""
    return f"it died of {name}{hint}"


def _tail(path: Path, lines: int = 15) -> str:
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in text[-lines:])
