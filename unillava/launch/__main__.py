"""What the scripts of the old systems call, with their arguments.

python -m unillava.launch llava RECIPE.yaml [LAUNCH OPTIONS] [LLaVA's arguments]
python -m unillava.launch msrun "COMMAND" …
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from unillava.errors import RequestError, UnillavaError
from unillava.launch.command import Request, parse_master
from unillava.launch.llava_arguments import translate
from unillava.launch.msrun_arguments import build_form, read_form
from unillava.launch.start import Mode, carry_out, replace_process, watch
from unillava.training.recipe import load_recipe

OPTIONS = ("backend", "nproc", "nnodes", "node-rank", "master", "strategy", "device", "logs")
"""Options of `unillava launch` that may stand among LLaVA's arguments."""


def main(arguments: Sequence[str]) -> None:
    """Run one of the two forms; exit code 2 with a message if it cannot be."""
    forms = {"llava": _llava, "msrun": _msrun}
    try:
        if not arguments or arguments[0] not in forms:
            raise RequestError("which form?", expected=" or ".join(forms))
        forms[arguments[0]](list(arguments[1:]))
    except UnillavaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _msrun(arguments: list[str]) -> None:
    form = read_form(arguments)
    launch = build_form(form, os.environ)
    print(launch.shell(), file=sys.stderr, flush=True)
    if form.stays:
        watch(launch, alone=form.worker_num == 1)
    replace_process(launch)


def _llava(arguments: list[str]) -> None:
    recipe, *words = arguments
    request, mode, rest = read_options(recipe, words)
    carry_out(with_arguments(request, recipe, rest), mode)


def read_options(recipe: str, words: Sequence[str]) -> tuple[Request, Mode, list[str]]:
    """(request without overrides, mode, the arguments that are LLaVA's).

    Raises:
        RequestError: an option without a value, or a number that is none.
    """
    values: dict[str, str] = {}
    modes: list[Mode] = []
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("--print", "--slurm"):
            modes.append("print" if word == "--print" else "slurm")
        elif word.startswith("--") and name in OPTIONS:
            if not equals and not words:
                raise RequestError(f"{word} needs a value")
            values[name] = value if equals else words.pop(0)
        else:
            rest.append(word)
    request = Request(
        backend=values.get("backend") or os.environ.get("UNILLAVA_BACKEND") or "torch",
        processes=_whole(values, "nproc", 8),
        nodes=_whole(values, "nnodes", 1),
        node_rank=_whole(values, "node-rank", 0),
        master=parse_master(values["master"]) if "master" in values else None,
        strategy=values.get("strategy"),
        device=values.get("device"),
        logs=values.get("logs", Request.logs),
        arguments=("train", recipe),
    )
    return request, modes[-1] if modes else "run", rest


def with_arguments(request: Request, recipe: str, rest: Sequence[str]) -> Request:
    """The request with LLaVA's arguments as overrides; says which have no effect."""
    translation = translate(
        rest, load_recipe(recipe), backend=request.backend, processes=request.world
    )
    if translation.left_out:
        names = ", ".join(f"--{name}" for name in translation.left_out)
        print(f"without effect here: {names}", file=sys.stderr)
    return replace(request, arguments=("train", recipe, *translation.overrides))


def _whole(values: dict[str, str], name: str, otherwise: int) -> int:
    text = values.get(name, str(otherwise))
    if not text.isdecimal():
        raise RequestError(f"--{name} cannot be used", given=text, expected="a whole number")
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
