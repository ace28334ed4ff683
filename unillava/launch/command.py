"""The command that starts all workers of one machine, and the environment it runs in.

The launchers: torchrun for torch (DeepSpeed reads its variables, too), msrun for MindSpore,
paddle.distributed.launch for Paddle. One process needs none of them.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unillava.errors import RequestError
from unillava.launch import devices
from unillava.training.recipe import Recipe, load_recipe

STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "torch": ("single", "ddp", "fsdp", "zero2", "zero3"),
    "mindspore": ("single", "ddp", "zero1"),
    "paddle": ("single", "ddp", "zero1"),
}
"""Backend -> how it spreads a run; as its `parallel` module has them."""
PORTS = {"torch": 29500, "mindspore": 8118, "paddle": 6070}
"""Where the processes of one machine meet, unless told; what each launcher takes by default."""
LOGS = "output/logs"
CLUSTER_TIMEOUT = 7200
"""Seconds that msrun waits for all workers, as MindFormers' script has it."""
STALE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_NODE_ID", "RANK_ID"),
    *("RANK_SIZE", "RANK_TABLE_FILE", "PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"),
    *("PADDLE_TRAINER_ENDPOINTS", "PADDLE_CURRENT_ENDPOINT", "PADDLE_MASTER", "PADDLE_NNODES"),
    *("PADDLE_GLOBAL_RANK", "PADDLE_LOCAL_RANK", "PADDLE_GLOBAL_SIZE", "PADDLE_LOCAL_SIZE"),
    *("PADDLE_RANK_IN_NODE", "PADDLE_NNODE", "PADDLE_NPROC_PER_NODE", "PADDLE_IPS"),
)
"""Left over from another run, these would make a worker take itself for one of that run."""
OPTIONS_WITH_VALUE = ("--stop-at",)
"""Those of `unillava train` that may follow `--`."""


@dataclass(frozen=True)
class Request:
    """What is started, and on what."""

    backend: str
    processes: int
    """On each machine."""
    arguments: tuple[str, ...]
    """What follows `unillava`: train RECIPE.yaml …"""
    nodes: int = 1
    node_rank: int = 0
    master: tuple[str, int] | None = None
    """(host, port) of machine 0, where all meet."""
    strategy: str | None = None
    """None: as the recipe says."""
    device: str | None = None
    """a100, ascend910b or cpu; None: each worker takes the best that is there."""
    logs: str = LOGS
    address: str | None = None
    interface: str | None = None
    """By which this machine reaches machine 0, where there are several. The launchers would ask
    for the address of this machine's name, which is often that of the machine for itself alone."""

    @property
    def world(self) -> int:
        """Workers on all machines."""
        return self.processes * self.nodes


@dataclass(frozen=True)
class Launch:
    """A command, and how its environment differs from the present one."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    unset: tuple[str, ...] = ()

    def applied(self, given: Mapping[str, str]) -> dict[str, str]:
        """The whole environment."""
        kept = {name: value for name, value in given.items() if name not in self.unset}
        return kept | dict(self.environment)

    def shell(self) -> str:
        """One line for a shell."""
        unset = [word for name in self.unset for word in ("-u", name)]
        values = [f"{name}={value}" for name, value in self.environment.items()]
        prefix = ["env", *unset, *values] if unset or values else []
        return shlex.join([*prefix, *self.command])


def parse_master(text: str) -> tuple[str, int]:
    """HOST:PORT, also [IPv6]:PORT.

    Raises:
        RequestError: it is not that.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RequestError(
            "--master cannot be used", given=text, expected="HOST:PORT, e.g. 10.0.0.1:29500"
        )
    return host, int(port)


# --- checks ----------------------------------------------------------------------------------


def check(request: Request, given: Mapping[str, str]) -> None:
    """Whether the pieces go together.

    Args:
        request: what is to be started.
        given: the present environment.

    Raises:
        RequestError: they do not.
    """
    if request.backend not in STRATEGIES:
        raise RequestError(
            "unknown --backend", given=request.backend, expected=f"one of {', '.join(STRATEGIES)}"
        )
    _check_device(request, given)
    _check_strategy(request)
    _check_nodes(request)
    _check_arguments(request.arguments)


def _check_device(request: Request, given: Mapping[str, str]) -> None:
    known = devices.NAMES[request.backend]
    if request.device is None:
        return
    if request.device not in known:
        raise RequestError(
            f"--device {request.device} with --backend {request.backend}",
            expected=f"one of {', '.join(known)}",
        )
    variable = devices.VISIBLE.get(request.device, "")
    visible = [card for card in given.get(variable, "").split(",") if card.strip()]
    if variable in given and len(visible) < request.processes:
        raise RequestError(
            f"--nproc {request.processes} on a machine that shows fewer cards",
            given=f"{variable}={given[variable]}",
            fix=f"give --nproc {max(1, len(visible))}, or name more cards in {variable}",
        )


def _check_strategy(request: Request) -> None:
    known = STRATEGIES[request.backend]
    if request.strategy is None:
        return
    if request.strategy not in known:
        raise RequestError(
            f"--strategy {request.strategy} with --backend {request.backend}",
            expected=f"one of {', '.join(known)}",
        )
    if request.strategy == "single" and request.world > 1:
        raise RequestError(
            f"--strategy single with {request.world} processes",
            expected=f"one of {', '.join(known[1:])}",
        )


def _check_nodes(request: Request) -> None:
    if request.processes < 1 or request.nodes < 1:
        raise RequestError(
            "a run needs at least one process on one machine",
            given=f"--nproc {request.processes} --nnodes {request.nodes}",
        )
    if not 0 <= request.node_rank < request.nodes:
        raise RequestError(
            f"--node-rank {request.node_rank} of {request.nodes} machines",
            expected=f"0 to {request.nodes - 1}",
        )
    if request.nodes > 1 and request.master is None:
        raise RequestError(
            f"{request.nodes} machines do not know where to meet",
            fix="give --master HOST:PORT of the machine with --node-rank 0, on each of them",
        )


def _check_arguments(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] != "train":
        raise RequestError(
            "only training runs on many devices",
            given=shlex.join(arguments) or "nothing after --",
            expected="-- train RECIPE.yaml [KEY=VALUE]…",
        )
    for word in arguments:
        if word.split("=")[0] in ("--backend", "--device"):
            raise RequestError(
                f"{word} after --", fix="say it before --: unillava launch --backend … -- train …"
            )
    _recipe_of(arguments)


def check_recipe(request: Request) -> Recipe:
    """The recipe that would be trained, read once before many workers read it.

    Raises:
        UnillavaError: it cannot be used, or its batch cannot be shared by so many workers.
    """
    path, overrides = _recipe_of(request.arguments)
    recipe = load_recipe(path, overrides)
    strategy = request.strategy or recipe.running.strategy
    known = (*STRATEGIES[request.backend], "auto")
    if strategy not in known or (strategy == "single" and request.world > 1):
        raise RequestError(
            f"running.strategy of {path} with --backend {request.backend} and "
            f"{request.world} processes",
            given=strategy,
            fix=f"give --strategy: one of {', '.join(known[1:-1])}",
        )
    share = request.world * recipe.steps.micro_batch
    if recipe.steps.batch % share:
        raise RequestError(
            "steps.batch cannot be shared equally",
            given=f"{recipe.steps.batch} rows, {request.world} processes with "
            f"{recipe.steps.micro_batch} at a time",
            expected=f"a multiple of {share}",
            fix="change steps.micro_batch, steps.batch or --nproc",
        )
    return recipe


def _recipe_of(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe and the overrides among the arguments of `train`."""
    words = list(arguments[1:])
    for option in OPTIONS_WITH_VALUE:
        while option in words:
            place = words.index(option)
            del words[place : place + 2]
    plain = [word for word in words if not word.startswith("-")]
    if not plain:
        raise RequestError("no recipe is named", expected="-- train RECIPE.yaml [KEY=VALUE]…")
    return plain[0], plain[1:]


# --- commands --------------------------------------------------------------------------------


def build(request: Request, given: Mapping[str, str]) -> Launch:
    """The command for this machine.

    Args:
        request: what is to be started.
        given: the present environment; what it sets is kept, but for what would confuse workers.

    Raises:
        RequestError: the pieces do not go together.
    """
    check(request, given)
    builders = {"torch": _torchrun, "mindspore": _msrun, "paddle": _paddle_launch}
    builder = _python if request.world == 1 else builders[request.backend]
    wanted = {"OMP_NUM_THREADS": _threads(request), "TOKENIZERS_PARALLELISM": "false"}
    if request.device is not None:
        wanted |= devices.environment(
            request.backend, request.device, request.processes, request.nodes, request.logs
        )
    if request.interface is not None:
        wanted["GLOO_SOCKET_IFNAME"] = request.interface
    environment = {name: value for name, value in wanted.items() if name not in given}
    environment["UNILLAVA_BACKEND"] = request.backend
    if request.backend == "mindspore" and request.world > 1:
        # msrun starts whatever `python` the path finds first.
        environment["PATH"] = os.pathsep.join([_programs(), given.get("PATH", os.defpath)])
    unset = tuple(name for name in STALE if name in given)
    return Launch((*builder(request), *_worker(request)), environment, unset)


def _worker(request: Request) -> list[str]:
    words = list(request.arguments)
    if request.strategy is not None:
        words.append(f"running.strategy={request.strategy}")
    if request.device is not None:
        words += ["--device", devices.NAMES[request.backend][request.device]]
    return words


def _threads(request: Request) -> str:
    """The cores of the machine, shared by its workers; on accelerators the feed needs them."""
    cores = os.cpu_count() or 1
    return str(max(1, cores // request.processes)) if request.device == "cpu" else "1"


def _programs() -> str:
    """Where this Python lies; not resolved, so that an environment stays that environment."""
    return str(Path(sys.executable).parent)


def _python(request: Request) -> list[str]:
    return [sys.executable, "-m", "unillava"]


def _torchrun(request: Request) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run"]
    words += ["--nproc-per-node", str(request.processes)]
    if request.master is None:
        words.append("--standalone")
    else:
        host, port = request.master
        words += ["--nnodes", str(request.nodes), "--node-rank", str(request.node_rank)]
        words += ["--master-addr", host, "--master-port", str(port)]
    # Seldom enough for `watch` to see how a worker has ended.
    words += ["--monitor-interval", "1"]
    # Each rank's output goes to its file and to the terminal.
    return [*words, "--log-dir", f"{request.logs}/torchrun", "--tee", "3", "-m", "unillava"]


def _msrun(request: Request) -> list[str]:
    host, port = request.master or ("127.0.0.1", PORTS["mindspore"])
    program = Path(_programs(), "msrun")
    words = [str(program) if program.exists() else "msrun"]
    words += ["--worker_num", str(request.world), "--local_worker_num", str(request.processes)]
    words += ["--master_addr", host, "--master_port", str(port)]
    if request.nodes > 1:
        words += ["--node_rank", str(request.node_rank)]
    words += ["--log_dir", f"{request.logs}/msrun", "--join", "True"]
    words += ["--cluster_time_out", str(CLUSTER_TIMEOUT)]
    return [*words, "python", "-m", "unillava"]


def _paddle_launch(request: Request) -> list[str]:
    words = [sys.executable, "-m", "paddle.distributed.launch"]
    words += ["--nproc_per_node", str(request.processes), "--log_dir", f"{request.logs}/paddle"]
    if request.master is not None:
        host, port = request.master
        words += ["--nnodes", str(request.nodes), "--rank", str(request.node_rank)]
        words += ["--master", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    words += ["--host", request.address] if request.address else []
    # It runs what is no .py file as a program.
    return [*words, sys.executable, "-u", "-m", "unillava"]
