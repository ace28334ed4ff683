"""`unillava chat`: one-shot, piped, old flags, in a terminal, on every backend."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

SHORT = ("--max-new-tokens", "12")


@pytest.fixture(scope="module")
def checkpoint(tiny) -> Path:
    return tiny()


@pytest.fixture(scope="module")
def model(checkpoint):
    import unillava

    return unillava.load(str(checkpoint), backend="torch")


@pytest.fixture(scope="module")
def picture(photo, tmp_path_factory) -> Path:
    """Its name has a comma, which is what separates names in `--image-file`."""
    path = tmp_path_factory.mktemp("pictures") / "a, b.jpg"
    path.write_bytes(photo.read_bytes())
    return path


# --- one question ----------------------------------------------------------------------------


def test_only_the_reply_goes_to_stdout(run, model, checkpoint, photo):
    done = run("chat", checkpoint, "--image", photo, "--prompt", "What is this?", *SHORT)
    reply = model.chat("What is this?", image=str(photo), max_new_tokens=12)
    assert done.succeeded().out == reply.text + "\n"


def test_old_flags_mean_the_same(run, model, checkpoint, photo, picture):
    done = run(
        *("chat", "--model-path", checkpoint, "--image-file", f"{photo};{photo}", "--sep", ";"),
        *("--query", "<image-placeholder> or <image-placeholder>?", "--conv-mode", "vicuna_v1"),
        *("--temperature", "0.2", "--top_p", "0.9", "--max_new_tokens", "12"),
    )
    new = run(
        *("chat", checkpoint, "--image", photo, "--image", photo, "--template", "vicuna_v1"),
        *("--prompt", "<image> or <image>?", "--temperature", "0.2", "--top-p", "0.9", *SHORT),
    )
    assert done.succeeded().out == new.succeeded().out != "\n"
    alone = run(
        "chat", checkpoint, "--image-file", picture, "--prompt", "What is this?", *SHORT, "--json"
    )
    reply = model.chat("What is this?", image=str(picture), max_new_tokens=12)
    assert json.loads(alone.succeeded().out)["text"] == reply.text


def test_json(run, model, checkpoint, photo):
    done = run(
        *("chat", checkpoint, "--image", photo, "--prompt", "왜?", "--json", *SHORT),
        *("--temperature", "1", "--top-k", "5", "--seed", "7", "--repetition-penalty", "1.2"),
    )
    options = {"temperature": 1.0, "top_k": 5, "seed": 7, "repetition_penalty": 1.2}
    reply = model.chat("왜?", image=str(photo), max_new_tokens=12, **options)
    record = json.loads(done.succeeded().out)
    assert record["text"] == reply.text
    assert record["tokens"] == reply.tokens
    assert (record["finish"], record["prompt_tokens"]) == (reply.finish, reply.prompt_tokens)
    assert (record["backend"], record["dtype"]) == ("torch", "float32")
    assert 0 < record["seconds"]["first"] <= record["seconds"]["reply"]


def test_stop_and_system(run, model, checkpoint):
    plain = model.chat("Why?", max_new_tokens=12).text
    mark = plain[3:5]
    done = run("chat", checkpoint, "--prompt", "Why?", "--stop", mark, *SHORT)
    assert done.succeeded().out == plain[: plain.index(mark)].strip() + "\n"
    other = run("chat", checkpoint, "--prompt", "Why?", "--system", "Count numbers.", *SHORT)
    assert other.succeeded().out != plain + "\n"


@pytest.mark.parametrize("backend", ["torch", "mindspore", "paddle"])
def test_every_backend_answers_the_same(spawn, model, checkpoint, photo, backend):
    done = spawn(
        *("chat", checkpoint, "--backend", backend, "--device", "cpu", "--image", photo),
        *("--prompt", "What is this?", "--json", *SHORT),
    )
    # All of stdout is the one JSON object: whatever a framework prints went to stderr.
    record = json.loads(done.succeeded().out)
    reply = model.chat("What is this?", image=str(photo), max_new_tokens=12)
    assert record["tokens"] == reply.tokens
    assert record["text"] == reply.text


# --- a pipe ----------------------------------------------------------------------------------


def test_every_line_is_a_turn(run, model, checkpoint, photo):
    lines = ["What is this?", "", "And why?", "/reset", f"/image {photo}", "And why?", "exit", "x"]
    done = run("chat", checkpoint, "--image", photo, *SHORT, stdin="\n".join(lines) + "\n")
    first = model.chat("What is this?", image=str(photo), max_new_tokens=12)
    second = model.chat("And why?", history=first.history, max_new_tokens=12)
    third = model.chat("And why?", image=[str(photo)] * 2, max_new_tokens=12)
    assert done.succeeded().out == f"{first.text}\n{second.text}\n{third.text}\n"
    assert "new conversation, 1 attached" in done.err


def test_json_lines(run, checkpoint):
    done = run("chat", checkpoint, "--json", *SHORT, stdin="Why?\nHow?")
    records = [json.loads(line) for line in done.succeeded().out.splitlines()]
    assert len(records) == 2
    assert records[1]["prompt_tokens"] > records[0]["prompt_tokens"]


def test_nothing_to_say(run, checkpoint):
    assert run("chat", checkpoint, stdin="\n\n").succeeded().out == ""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/picture x.jpg", "unknown command /picture"),
        ("/image", "/image needs a file"),
        ("/image '/nowhere/x.jpg'", "no such file"),
        ("/video /nowhere/x.mp4", "no such file"),
    ],
)
def test_a_bad_line_of_a_pipe_ends_it(run, checkpoint, line, told):
    done = run("chat", checkpoint, *SHORT, stdin=f"{line}\nWhy?\n")
    assert told in done.refused()
    assert done.out == ""


# --- a terminal ------------------------------------------------------------------------------


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        outer, inner = pty.openpty()
        changes = {"OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unillava", *map(str, arguments)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=os.environ | changes,
            # Ctrl-C reaches the process only if this is its controlling terminal.
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)
        self.outer, self.text, self.read_up_to = outer, "", 0

    def expect(self, pattern: str, timeout: float = 120) -> str:
        """Wait until `pattern` has come since the last match; everything up to its end."""
        deadline = time.monotonic() + timeout
        while not (match := re.compile(pattern).search(self.text, self.read_up_to)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} has not come after:\n{self.text}"
            if select.select([self.outer], [], [], min(left, 1))[0]:
                self.text += os.read(self.outer, 65536).decode("utf-8", "replace")
        start, self.read_up_to = self.read_up_to, match.end()
        return self.text[start : match.end()]

    def send(self, text: str) -> None:
        os.write(self.outer, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once the process waits for input.

        Between printing the prompt and waiting there is a moment in which Python's input()
        notices a signal only at the next key.
        """
        asleep = 0
        while asleep < 5:
            time.sleep(0.05)
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0
        self.send("\x03")

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self.outer)
        return code


def test_in_a_terminal(checkpoint, photo):
    terminal = Terminal("chat", checkpoint, "--image", photo, "--max-new-tokens", 900)
    head = terminal.expect("user: ")
    assert "torch on cpu, float32, 1 attached" in head
    terminal.send("What is this?\n")
    terminal.expect("assistant: .{20}")
    terminal.send("\x03")  # Ctrl-C stops the reply, not the program
    terminal.expect(r"\(stopped\)")
    terminal.expect("user: ")
    terminal.send("/image /nowhere.jpg\n")
    terminal.expect("error: there is no such file")
    terminal.expect("user: ")
    terminal.send("\n")
    terminal.expect("user: ")
    terminal.send("/help\n")
    terminal.expect("/reset .*start again")
    terminal.send("/reset\n")
    terminal.expect("new conversation, 1 attached")
    terminal.expect("user: ")
    terminal.interrupt()  # at the prompt it asks first
    terminal.expect("Ctrl-C again")
    terminal.expect("user: ")
    terminal.interrupt()
    assert terminal.close() == 0


def test_end_of_input_leaves_a_terminal(checkpoint):
    terminal = Terminal("chat", checkpoint)
    terminal.expect("user: ")
    terminal.send("\x04")  # Ctrl-D
    assert terminal.close() == 0
