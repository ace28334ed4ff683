"""`unillava doctor`: what this machine has, and what does not fit together."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from unillava.doctor import Findings

COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("doctor")(_doctor)


def _doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show frameworks, devices, dtypes and launchers here, and what does not fit together.

    Exit code 1 only if no framework can be used.
    """
    from rich.console import Console

    from unillava import doctor

    findings = doctor.examine()
    if as_json:
        print(json.dumps(doctor.as_json(findings), indent=2))
    else:
        console = Console(soft_wrap=True)
        _print_machine(console, findings)
        _print_backends(console, findings)
        _print_problems(console, findings)
    if not doctor.usable(findings):
        raise typer.Exit(1)


def _print_machine(console: Console, findings: Findings) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_row("python", findings.python)
    table.add_row("system", f"{findings.system}, {findings.machine}")
    sizes = {
        "memory": findings.memory,
        "shared memory": findings.shared_memory,
        "free for hub files": findings.cache_free,
    }
    for name, size in sizes.items():
        table.add_row(name, "unknown" if size is None else f"{size / 2**30:.1f} GiB")
    for name, driver in findings.drivers.items():
        table.add_row(name, driver)
    packages = ", ".join(f"{n} {v}" for n, v in findings.packages.items() if v)
    absent = ", ".join(name for name, version in findings.packages.items() if not version)
    table.add_row("packages", packages)
    table.add_row("not installed", absent or "-")
    launchers = ", ".join(name for name, path in findings.launchers.items() if path)
    table.add_row("launchers", launchers or "-")
    for name, value in findings.environment.items():
        table.add_row(name, value)
    console.print(table)


def _print_backends(console: Console, findings: Findings) -> None:
    from rich.table import Table

    table = Table("backend", "version", "device", "dtypes (best first)")
    for name, backend in findings.backends.items():
        if not backend.devices:
            state = "does not start" if backend.error else "not installed"
            table.add_row(name, backend.version or "-", state, "-")
        for device, dtypes in backend.devices.items():
            table.add_row(name, backend.version, device, ", ".join(dtypes))
    console.print(table)


def _print_problems(console: Console, findings: Findings) -> None:
    from rich.markup import escape

    from unillava import doctor

    problems = doctor.diagnose(findings)
    for problem in problems:
        colour = COLOURS[problem.level]
        console.print(f"[{colour}]{problem.level}[/]: {escape(problem.what)}")
        console.print(f"  what to do: {escape(problem.fix)}")
    if not problems:
        console.print("Everything fits together.")
