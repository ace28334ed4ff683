"""A batch script for Slurm that starts a run on several machines."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace

from unillava.launch.command import Request, check

GRES = {"a100": "gpu", "ascend910b": "npu"}
"""Device -> Slurm's name of it."""
GRACE = 120
"""Seconds before the end of its time in which a run is asked to save its state."""


def slurm_script(request: Request) -> str:
    """The text of the script; `sbatch` takes partition, time and account on its command line.

    Each machine runs `unillava launch` with its own number; they meet on the first of the job.
    Before its time is over, and at `scancel --signal=USR1 JOB`, the run saves its state and ends.

    Args:
        request: what is to be started; the machines' numbers and meeting place are the job's.

    Raises:
        RequestError: the pieces do not go together.
    """
    # The machine that submits is none of the job's: its environment says nothing.
    check(replace(request, node_rank=0, master=("127.0.0.1", 1)), {})
    options = ["--backend", request.backend, "--nproc", str(request.processes)]
    options += ["--nnodes", str(request.nodes), "--logs", request.logs]
    options += ["--strategy", request.strategy] if request.strategy else []
    options += ["--device", request.device] if request.device else []
    head = shlex.join([sys.executable, "-m", "unillava", "launch", *options])
    place = '--node-rank "$SLURM_NODEID" --master "$MASTER:$PORT"'
    inner = f"exec {head} {place} -- {shlex.join(request.arguments)}"
    cards = GRES.get(request.device or "")
    lines = [
        "#!/usr/bin/env bash",
        "#SBATCH --job-name=unillava",
        f"#SBATCH --nodes={request.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH --gres={cards}:{request.processes}"] if cards else []),
        f"#SBATCH --signal=USR1@{GRACE}",
        "#SBATCH --output=%x-%j.log",
        "set -eu",
        'MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "PORT=$((20000 + SLURM_JOB_ID % 20000))",
        "export MASTER PORT",
        f"exec srun --kill-on-bad-exit=1 bash -c {shlex.quote(inner)}",
    ]
    return "\n".join(lines) + "\n"
