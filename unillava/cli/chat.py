"""`unillava chat`: talk with a model in the terminal, in a pipe, or with one question.

Only replies go to stdout when there is no conversation to look at (a question on the command
line, or a pipe); everything else goes to stderr.

The word `exit` leaves, as in LLaVA's cli. An empty line, on which that one left too, does
nothing: it is too easily typed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unillava.cli import flags
from unillava.errors import RequestError, UnillavaError

if TYPE_CHECKING:
    from rich.console import Console

    from unillava.inference.dialogue import Dialogue

HELP = """\
/image F   send a picture (path or URL) with the next turn; several are possible
/video F   send a video with the next turn
/reset     start again, with the pictures of the command line
/help      show this
/exit      leave (also: exit, quit, Ctrl-D)
Ctrl-C stops a reply; at the prompt, pressed twice, it leaves."""

CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""Not shown in a terminal: a reply could otherwise command it."""


class Leave(Exception):
    """The user has asked to leave the conversation."""


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("chat")(_chat)


def _chat(
    directory: flags.Directory = None,
    model_path: flags.ModelPath = None,
    base: flags.Base = None,
    vision: flags.Vision = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="Picture: path or URL; repeatable.")
    ] = None,
    image_file: Annotated[
        str | None, typer.Option(help="Pictures separated by --sep, as run_llava takes them.")
    ] = None,
    sep: Annotated[str, typer.Option(help="What separates the names in --image-file.")] = ",",
    video: Annotated[
        list[str] | None, typer.Option("--video", help="Video file or folder of frames.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "--query", help="Ask this, print the reply to stdout, end."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per reply: text, tokens, timing.")
    ] = False,
    system: flags.System = None,
    backend: flags.Backend = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    template: flags.Template = None,
    temperature: flags.Temperature = None,
    top_p: flags.TopP = None,
    top_k: flags.TopK = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    max_new_tokens: flags.MaxNewTokens = None,
    seed: flags.Seed = None,
    stop: flags.Stop = None,
    compiled: flags.Compile = False,
    num_frames: flags.NumFrames = 8,
) -> None:
    """Chat about pictures and videos: in the terminal, one-shot, or a turn per line of a pipe."""
    import unillava
    from unillava.inference.dialogue import Dialogue
    from unillava.inference.options import Options

    path = flags.checkpoint_path(directory, model_path)
    options = flags.given(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stop=stop,
    )
    Options().replace(**options)  # a wrong value is told before the model is loaded
    started = time.perf_counter()
    model = unillava.load(
        path,
        backend=backend,
        device=device,
        dtype=dtype,
        template=template,
        compile=compiled,
        num_frames=num_frames,
        base=base,
        vision=vision,
    )
    loaded = time.perf_counter() - started
    dialogue = Dialogue(model, system=system, options=options)
    for source in [*(image or []), *_image_files(image_file, sep)]:
        dialogue.attach("image", source, opening=True)
    for source in video or []:
        dialogue.attach("video", source, opening=True)
    if prompt is not None:
        _answer(dialogue, prompt, as_json, loaded)
    elif sys.stdin.isatty() and not as_json:
        _converse(dialogue, path)
    else:
        _pipe(dialogue, sys.stdin, as_json, loaded)


def _image_files(names: str | None, separator: str) -> list[str]:
    """The names in `--image-file`; a file that is there may have the separator in its name."""
    if not names or os.path.exists(names):
        return [names] if names else []
    return [name.strip() for name in names.split(separator) if name.strip()]


# --- one question, or a pipe -----------------------------------------------------------------


def _pipe(dialogue: Dialogue, lines: Iterable[str], as_json: bool, loaded: float) -> None:
    """Each line is a turn or a command; empty lines are skipped. The first error ends it."""
    for line in lines:
        text = line.rstrip()
        if not text:
            continue
        try:
            note = _command(dialogue, text)
        except Leave:
            return
        if note is None:
            _answer(dialogue, text, as_json, loaded)
        else:
            print(note, file=sys.stderr)


def _answer(dialogue: Dialogue, text: str, as_json: bool, loaded: float) -> None:
    """One turn whose reply goes to stdout, as text while it comes or as JSON at its end."""
    # Old scripts mark the picture's place this way; without it pictures come first.
    text = text.strip().replace("<image-placeholder>", "<image>")
    started = time.perf_counter()
    first = None
    with contextlib.closing(dialogue.say(text)) as pieces:
        for piece in pieces:
            first = first or time.perf_counter()
            if not as_json:
                _write(piece)
    ended = time.perf_counter()
    if as_json:
        seconds = {"load": loaded, "first": (first or ended) - started, "reply": ended - started}
        _write(json.dumps(_record(dialogue, seconds), ensure_ascii=False))
    _write("\n")


def _record(dialogue: Dialogue, seconds: dict[str, float]) -> dict[str, Any]:
    """What `--json` prints: times in seconds; `first` is the time to the first text."""
    import backends

    reply = dialogue.reply
    device, dtype = backends.runtime.current()
    return {
        "text": reply.text,
        "tokens": [int(token) for token in reply.tokens],
        "finish": reply.finish,
        "prompt_tokens": reply.prompt_tokens,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "backend": backends.NAME,
        "device": device,
        "dtype": dtype,
    }


def _write(text: str) -> None:
    """To stdout at once; control characters only where no terminal would obey them."""
    sys.stdout.write(text.translate(CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


# --- the terminal ----------------------------------------------------------------------------


def _converse(dialogue: Dialogue, path: str) -> None:
    """Ask, answer, until the user leaves. Errors end a turn, not the conversation."""
    from rich.console import Console

    # Importing it gives input() line editing and history.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(_headline(path, dialogue), style="bold", markup=False)
    console.print("/help shows the commands.", style="dim")
    for text in _turns(console):
        try:
            note = _command(dialogue, text)
            if note is None:
                _show(dialogue, text, console)
            else:
                console.print(note, style="dim", markup=False)
        except UnillavaError as error:
            console.print(f"error: {error}", style="red", markup=False)
        except Leave:
            return


def _headline(path: str, dialogue: Dialogue) -> str:
    import backends

    device, dtype = backends.runtime.current()
    pictures = f", {len(dialogue.attached)} attached" if dialogue.attached else ""
    return f"{path}: {backends.NAME} on {device}, {dtype}{pictures}"


def _turns(console: Console) -> Iterator[str]:
    """What the user types, line by line, without empty lines, until the end of the input."""
    interrupted = False
    while True:
        try:
            text = _ask().rstrip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            if interrupted:
                return
            interrupted = True
            console.print("Press Ctrl-C again, or type /exit, to leave.", style="dim")
            continue
        interrupted = False
        if text:
            yield text


def _ask() -> str:
    if sys.stdout.isatty():
        return input("user: ")
    # Replies go to a file: the prompt must not go with them.
    sys.stderr.write("user: ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _show(dialogue: Dialogue, text: str, console: Console) -> None:
    """Print one reply while it comes; Ctrl-C stops it and keeps what was said."""
    console.print("assistant: ", style="bold cyan", end="")
    try:
        with contextlib.closing(dialogue.say(text.strip())) as pieces:
            for piece in pieces:
                _write(piece)
    except KeyboardInterrupt:
        _write("\n")
        console.print("(stopped)", style="dim")
        return
    except UnillavaError:
        _write("\n")
        raise
    _write("\n")
    if dialogue.reply is not None and dialogue.reply.finish == "length":
        console.print("(cut at --max-new-tokens)", style="dim")


# --- commands inside the conversation --------------------------------------------------------


def _command(dialogue: Dialogue, text: str) -> str | None:
    """Carry out a command and say what was done; None: `text` is none.

    Raises:
        Leave: the user wants to.
        RequestError: an unknown command, or one without its file.
    """
    if text.strip().lower() in ("exit", "quit"):
        raise Leave
    if not text.startswith("/"):
        return None
    name, _, argument = text.partition(" ")
    argument = argument.strip()
    if name in ("/exit", "/quit"):
        raise Leave
    if name == "/help":
        return HELP
    if name == "/reset":
        dialogue.reset()
        return f"new conversation, {len(dialogue.attached)} attached"
    if name in ("/image", "/video"):
        return _attach(dialogue, name[1:], argument)
    raise RequestError(
        f"unknown command {name}",
        expected="/image, /video, /reset, /help or /exit",
        fix="put a space before text that begins with a slash",
    )


def _attach(dialogue: Dialogue, kind: str, source: str) -> str:
    if len(source) > 1 and source[0] == source[-1] and source[0] in "\"'":
        source = source[1:-1]  # terminals quote a file that is dropped on them
    if not source:
        raise RequestError(f"/{kind} needs a file", fix=f"type /{kind} and a path or URL")
    dialogue.attach(kind, source)
    return f"{kind} attached: it goes with the next turn"
