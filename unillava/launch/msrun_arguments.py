"""The arguments of MindFormers' msrun_launcher.sh: exactly 1, 2, 6 or 9, told apart by number.

Source: MindFormers r1.5, scripts/msrun_launcher.sh.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unillava.errors import RequestError
from unillava.launch.command import CLUSTER_TIMEOUT, PORTS, STALE, Launch

FORMS: Mapping[int, tuple[str, ...]] = {
    1: ("command",),
    2: ("command", "worker_num"),
    6: ("command", "worker_num", "master_port", "log_dir", "join", "cluster_time_out"),
    9: (
        *("command", "worker_num", "local_worker", "master_addr", "master_port", "node_rank"),
        *("log_dir", "join", "cluster_time_out"),
    ),
}
"""Number of arguments -> what they are."""
NUMBERS = ("worker_num", "local_worker", "master_port", "node_rank", "cluster_time_out")
USAGE = """msrun_launcher.sh "COMMAND" [WORKER_NUM]
msrun_launcher.sh "COMMAND" WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
msrun_launcher.sh "COMMAND" WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR \
JOIN CLUSTER_TIME_OUT"""


@dataclass(frozen=True)
class Form:
    """The arguments with their defaults."""

    command: str
    worker_num: int = 8
    local_worker: int = 8
    master_addr: str = "127.0.0.1"
    master_port: int = PORTS["mindspore"]
    node_rank: int = 0
    log_dir: str = "output/msrun_log"
    join: str = "False"
    cluster_time_out: int = CLUSTER_TIMEOUT

    @property
    def stays(self) -> bool:
        """Whether it waits for the workers; msrun otherwise leaves them in the background."""
        return self.worker_num == 1 or self.join == "True"


def read_form(arguments: Sequence[str]) -> Form:
    """The arguments by name.

    Raises:
        RequestError: another number of them, or no numbers where numbers belong.
    """
    if len(arguments) not in FORMS:
        raise RequestError(
            "msrun_launcher.sh takes 1, 2, 6 or 9 arguments",
            given=len(arguments),
            expected=f"\n{USAGE}",
        )
    values = dict(zip(FORMS[len(arguments)], arguments, strict=True))
    for name in NUMBERS:
        if name in values and not values[name].isdecimal():
            raise RequestError(
                f"{name.upper()} cannot be used", given=values[name], expected="a whole number"
            )
    if values.get("join", "False") not in ("True", "False"):
        raise RequestError("JOIN cannot be used", given=values["join"], expected="True or False")
    numbers = {name: int(values[name]) for name in NUMBERS if name in values}
    # On one machine all workers are local.
    local = {} if "local_worker" in values else {"local_worker": numbers.get("worker_num", 8)}
    form = Form(**{**values, **numbers, **local})
    if not 1 <= form.local_worker <= form.worker_num:
        raise RequestError(
            "LOCAL_WORKER and WORKER_NUM contradict each other",
            given=f"{form.local_worker} of {form.worker_num}",
        )
    return form


def build_form(form: Form, given: Mapping[str, str]) -> Launch:
    """The command of a form.

    `train RECIPE.yaml …` is unillava's; anything else is a script and its arguments, without
    `python`. One worker needs no msrun (MindFormers' script then does nothing at all).

    Args:
        form: what `read_form` gave.
        given: the present environment; MF_LOG_SUFFIX is appended to the log folder.

    Raises:
        RequestError: the command is empty.
    """
    words = shlex.split(form.command)
    if not words:
        raise RequestError("the command is empty", expected='"train RECIPE.yaml"')
    words = words[1:] if words[0] in ("python", "python3", "unillava") else words
    worker = ["-m", "unillava", *words] if words[:1] == ["train"] else words
    programs = Path(sys.executable).parent
    environment = {
        "PYTHONPATH": _joined(str(Path.cwd()), given.get("PYTHONPATH")),
        # msrun starts whatever `python` the path finds first.
        "PATH": _joined(str(programs), given.get("PATH", os.defpath)),
        "UNILLAVA_BACKEND": "mindspore",
    }
    unset = tuple(name for name in STALE if name in given)
    if form.worker_num == 1:
        return Launch((sys.executable, *worker), environment, unset)
    suffix = given.get("MF_LOG_SUFFIX")
    log_dir = f"{form.log_dir}_{suffix}" if suffix else form.log_dir
    program = programs / "msrun"
    command = [str(program) if program.exists() else "msrun"]
    command += ["--worker_num", str(form.worker_num), "--local_worker_num", str(form.local_worker)]
    if form.local_worker < form.worker_num:
        command += ["--master_addr", form.master_addr, "--node_rank", str(form.node_rank)]
    command += ["--master_port", str(form.master_port), "--log_dir", log_dir]
    command += ["--join", form.join, "--cluster_time_out", str(form.cluster_time_out)]
    return Launch((*command, "python", *worker), environment, unset)


def _joined(first: str, others: str | None) -> str:
    return os.pathsep.join([first, others]) if others else first
