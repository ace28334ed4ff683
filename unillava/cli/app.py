"""Assembles the sub-commands and turns errors into messages and exit codes.

Exit codes: 0 done, 1 the command ran and its answer is no (parity), 2 the user can mend it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys

import typer

from unillava.errors import UnillavaError

# grain misses a profiler, and would say so in each of its processes; they import this module.
logging.getLogger("absl").setLevel(logging.ERROR)

COMMANDS = (
    "chat",
    "predict",
    "info",
    "parity",
    "convert",
    "verify",
    "compose",
    "merge",
    "data",
    "train",
    "curves",
    "launch",
    "doctor",
    "tiny",
)
"""Each is a module of this package with `register(app)`."""


def build_app() -> typer.Typer:
    """The application with every sub-command."""
    app = typer.Typer(
        name="unillava",
        help="LLaVA on PyTorch, MindSpore and PaddlePaddle.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name in COMMANDS:
        importlib.import_module(f"unillava.cli.{name}").register(app)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never returns.

    `--debug` anywhere, or UNILLAVA_DEBUG=1, shows tracebacks.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("UNILLAVA_DEBUG") == "1"
    if "--debug" in arguments:
        arguments.remove("--debug")
        debug = True
    # Tokenizers would warn about forked workers, transformers about a missing framework.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        build_app()(args=arguments, prog_name="unillava")
    except UnillavaError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
