"""Runs a request, or shows what would be run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
from dataclasses import replace
from typing import Literal, NoReturn

from unillava.errors import RequestError
from unillava.launch.command import PORTS, Launch, Request, build, check_recipe
from unillava.launch.slurm import slurm_script
from unillava.launch.watch import supervise

SIOCGIFADDR = 0x8915
"""Linux: ask for the IPv4 address of an interface."""
Mode = Literal["run", "print", "slurm"]


def carry_out(request: Request, mode: Mode = "run") -> None:
    """Check the request and its recipe; then run it, or print the command or a Slurm script.

    A run does not come back: this process ends with its exit code.

    Raises:
        UnillavaError: the request cannot be carried out.
    """
    if mode == "slurm":
        text = slurm_script(request)
        check_recipe(request)
        print(text, end="")
        return
    launch = build(_with_own_address(_with_free_port(request)), os.environ)
    check_recipe(request)
    if mode == "print":
        print(launch.shell())
        return
    _check_port(request)
    watch(launch, alone=request.world == 1)


def watch(launch: Launch, *, alone: bool = False) -> NoReturn:
    """Run the launcher (or the only worker) and end with its exit code.

    Raises:
        RequestError: there is no such program.
    """
    try:
        code = supervise(launch, alone=alone)
    except OSError as error:
        raise _unstartable(launch, error) from None
    sys.exit(code)


def replace_process(launch: Launch) -> NoReturn:
    """Become the program, for one that leaves its workers to themselves.

    Raises:
        RequestError: there is no such program.
    """
    try:
        os.execvpe(launch.command[0], launch.command, launch.applied(os.environ))
    except OSError as error:
        raise _unstartable(launch, error) from None


def _unstartable(launch: Launch, error: OSError) -> RequestError:
    return RequestError(
        f"{launch.command[0]} cannot be started: {error.strerror}",
        fix="unillava doctor shows which launchers this machine has",
    )


def _check_port(request: Request) -> None:
    """Machine 0 must be able to listen where all are to meet; the launchers wait in vain for it."""
    if request.node_rank or request.master is None:
        return
    host, port = request.master
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RequestError(f"--master {host} is not known here: {error.strerror}") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            # Behind a forwarder the address may well be another machine's.
            if error.errno == errno.EADDRINUSE:
                raise RequestError(
                    f"port {port} of --master is taken by another program",
                    fix="give another port, on all machines",
                ) from None


def _with_free_port(request: Request) -> Request:
    """msrun does not look for a free port itself, and two runs may share a machine."""
    wanted = request.backend == "mindspore" and request.world > 1 and request.master is None
    if not wanted:
        return request
    return replace(request, master=("127.0.0.1", free_port(PORTS["mindspore"])))


def _with_own_address(request: Request) -> Request:
    if request.nodes == 1 or request.master is None:
        return request
    try:
        family, kind, _, _, place = socket.getaddrinfo(*request.master, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # which sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return request
    return replace(request, address=address, interface=_interface_of(address))


def _interface_of(address: str) -> str | None:
    """The network interface with an address; None where the system does not tell."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            question = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, question)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def free_port(preferred: int) -> int:
    """`preferred` if nobody listens there, else any other."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RequestError("this machine has no free port")
