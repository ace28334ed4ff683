"""What people get wrong: each time one clear message on stderr, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unillava.data.images import load_image
from unillava.errors import UnillavaError

ASK = ("--prompt", "What is this?", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def checkpoint(tiny) -> Path:
    return tiny()


@pytest.fixture
def broken(tiny, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny(), tmp_path / "broken"))


# --- the checkpoint --------------------------------------------------------------------------


def change_config(directory: Path, part: str, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (directory / "config.json").write_text(json.dumps(config))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def shard(directory: Path) -> Path:
    """The last of several weight files."""
    return sorted(directory.glob("model-*-of-*.safetensors"))[-1]


def remove(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda d: remove(d, "*"), "is empty"),
    "no config": (lambda d: remove(d, "config.json"), "config.json"),
    "config is no JSON": (lambda d: cut(d / "config.json", 100), "config.json"),
    "unknown model": (lambda d: change_config(d, "", model_type="blip"), "blip"),
    "missing shard": (lambda d: shard(d).unlink(), ".safetensors"),
    "no weights": (lambda d: remove(d, "*.safetensors", "*.index.json"), "safetensors"),
    "truncated weights": (lambda d: cut(shard(d), shard(d).stat().st_size - 1), ".safetensors"),
    "weights cut in the header": (lambda d: cut(shard(d), 100), ".safetensors"),
    "other width": (
        lambda d: change_config(d, "text_config", intermediate_size=160),
        "intermediate_size",
    ),
    "more layers": (lambda d: change_config(d, "text_config", num_hidden_layers=4), "layers"),
    "impossible heads": (
        lambda d: change_config(d, "text_config", num_key_value_heads=3),
        "num_key_value_heads",
    ),
    "no tokenizer": (lambda d: remove(d, "tokenizer*", "special_tokens*"), "tokenizer"),
    "damaged tokenizer": (lambda d: cut(d / "tokenizer.json", 1000), "tokenizer"),
    "damaged processor": (lambda d: cut(d / "preprocessor_config.json", 50), "preprocessor_config"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(run, broken, damage):
    spoil, told = DAMAGE[damage]
    spoil(broken)
    assert told in run("chat", broken, *ASK).refused()


def test_no_such_directory(run, tmp_path):
    assert "there is no directory" in run("chat", tmp_path / "none", *ASK).refused()


def test_a_file_is_no_checkpoint(run, photo):
    assert "photo.jpg" in run("chat", photo, *ASK).refused()


def test_in_a_process_of_its_own(spawn, tmp_path):
    done = spawn("chat", tmp_path, *ASK)
    assert str(tmp_path) in done.refused()
    assert done.out == ""


def test_debug_shows_where(checkpoint):
    from unillava.cli.app import main

    with pytest.raises(UnillavaError):
        main(["chat", str(checkpoint), *ASK, "--image", "/none.jpg", "--debug"])


# --- images ----------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """A web server whose pictures are late, large or absent."""

    def do_GET(self) -> None:
        if self.path == "/late.jpg":
            self.server.released.wait(30)
        if self.path in ("/absent.jpg", "/late.jpg"):
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        body = {"/large.jpg": bytes(2_000_000), "/page.jpg": b"<html>not a picture</html>"}
        self.wfile.write(body.get(self.path) or self.server.picture)

    def log_message(self, *arguments: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    """Says nothing when a client hangs up on a download that is too large."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture
def url(photo):
    """Address of the server, without the path."""
    server = QuietServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    server.released, server.picture = threading.Event(), photo.read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def small_limits(monkeypatch):
    """The limits of downloads, lowered so that the tests need not wait."""
    monkeypatch.setitem(load_image.__kwdefaults__, "max_bytes", 1_000_000)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/absent.jpg", "404"),
        ("/late.jpg", "not fetched within 0.5 s"),
        ("/large.jpg", "larger than allowed"),
        ("/page.jpg", "cannot be decoded"),
    ],
)
def test_failing_url(run, checkpoint, url, small_limits, path, told, monkeypatch):
    if path == "/late.jpg":
        monkeypatch.setitem(load_image.__kwdefaults__, "timeout", 0.5)
    message = run("chat", checkpoint, "--image", url + path, *ASK).refused()
    assert told in message
    assert url + path in message


def test_a_url_that_works(run, checkpoint, url, small_limits, photo):
    fetched = run("chat", checkpoint, "--image", url + "/good.jpg", *ASK).succeeded()
    assert fetched.out == run("chat", checkpoint, "--image", photo, *ASK).succeeded().out


def test_nobody_answers(run, checkpoint):
    address = "http://127.0.0.1:9/x.jpg"
    assert address in run("chat", checkpoint, "--image", address, *ASK).refused()


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"no picture at all", None])
def test_corrupt_image(run, checkpoint, photo, tmp_path, content):
    path = tmp_path / "corrupt.jpg"
    path.write_bytes(photo.read_bytes()[:3000] if content is None else content)
    message = run("chat", checkpoint, "--image", path, *ASK).refused()
    assert "cannot be decoded" in message
    assert str(path) in message


def test_missing_image(run, checkpoint):
    assert "no such file" in run("chat", checkpoint, "--image", "/none.jpg", *ASK).refused()


def test_image_count_contradicts_the_prompt(run, checkpoint, photo):
    query = ("--query", "<image> and <image>?")
    assert "image" in run("chat", checkpoint, "--image", photo, *query).refused()
    assert "image" in run("chat", checkpoint, *query).refused()


def test_a_video_for_a_model_without(run, checkpoint, photo):
    message = run("chat", checkpoint, "--video", photo.parent, *ASK).refused()
    assert "does not take videos" in message


# --- the request and the machine -------------------------------------------------------------


def test_prompt_longer_than_the_context(run, checkpoint):
    message = run("chat", checkpoint, "--prompt", "long " * 3000).refused()
    assert "longer than the model's context" in message
    assert "at most 1024" in message


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--backend", "jax", "mindspore"),
        ("--device", "abacus", "cpu"),
        ("--dtype", "float8", "bfloat16"),
        ("--template", "vicuna_v9", "vicuna_v1"),
        ("--temperature", "-1", "temperature"),
        ("--max-new-tokens", "0", "max_new_tokens"),
    ],
)
def test_unknown_choice_names_the_known_ones(run, checkpoint, flag, value, expected):
    message = run("chat", checkpoint, flag, value, *ASK[:2]).refused()
    assert value in message
    assert expected in message


def test_unknown_flag(run, checkpoint):
    done = run("chat", checkpoint, "--imgae", "x.jpg")
    assert done.code == 2
    assert "--imgae" in done.err
