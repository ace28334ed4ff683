"""`unillava launch … -- train RECIPE.yaml`: training on many devices and machines."""

from __future__ import annotations

from typing import Annotated

import typer

from unillava.errors import RequestError


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("launch")(_launch)


def _launch(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="-- train RECIPE.yaml [KEY=VALUE]…", help="What is started."),
    ],
    backend: Annotated[str, typer.Option(help="torch, mindspore or paddle.")],
    nproc: Annotated[int, typer.Option("--nproc", help="Processes on each machine.")] = 1,
    nnodes: Annotated[int, typer.Option("--nnodes", help="Machines.")] = 1,
    node_rank: Annotated[
        int, typer.Option("--node-rank", help="Number of this machine, from 0.")
    ] = 0,
    master: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of machine 0, where all meet.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="single, ddp, fsdp, zero1, zero2, zero3; default: the recipe's."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="a100, ascend910b or cpu: sets its environment.")
    ] = None,
    logs: Annotated[
        str, typer.Option(metavar="DIR", help="Where each process writes its log.")
    ] = "output/logs",
    show: Annotated[bool, typer.Option("--print", help="Show the command and stop.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Show a batch script and stop.")] = False,
) -> None:
    """Start training with the framework's own launcher; its exit code is passed on."""
    from unillava.launch import Request, carry_out
    from unillava.launch.command import parse_master

    if show and slurm:
        raise RequestError("--print and --slurm show different things", fix="give one of them")
    request = Request(
        backend=backend,
        processes=nproc,
        arguments=tuple(arguments),
        nodes=nnodes,
        node_rank=node_rank,
        master=parse_master(master) if master else None,
        strategy=strategy,
        device=device,
        logs=logs,
    )
    carry_out(request, "slurm" if slurm else "print" if show else "run")
