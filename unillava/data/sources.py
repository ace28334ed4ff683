"""Where an image or a video lies: a path, a URL, a data: URI or bytes. Standard library only."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from unillava.errors import MediaError

Source = str | os.PathLike | bytes | bytearray | memoryview

_CHUNK = 1 << 16


def locate(source: Source, *, timeout: float, max_bytes: int) -> Path | bytes:
    """A local file stays a path; everything else is fetched or decoded into memory.

    Args:
        source: a path, `file://`, `http://`, `https://` or `data:` URI, or the bytes themselves.
        timeout: seconds that a download may take in all.
        max_bytes: largest download or data: URI.

    Raises:
        MediaError: no such file, the server fails or is too slow, too large, bad base64, or an
            unknown kind of source.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, os.PathLike):
        return _file(Path(source))
    if not isinstance(source, str):
        raise MediaError(
            "this is not something an image or a video can be read from",
            given=type(source).__name__,
            expected="a path, URL, data: URI, bytes or (image) a PIL image",
        )
    scheme = source.partition(":")[0].lower()
    if scheme in ("http", "https"):
        return _download(source, timeout, max_bytes)
    if scheme == "data":
        return _data_uri(source, max_bytes)
    if scheme == "file":
        return _file(Path(urllib.request.url2pathname(urlsplit(source).path)))
    return _file(Path(source))


def describe(source: object) -> str:
    """A short name of a source for messages; never the whole of a data: URI."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"
    return type(source).__name__


def _file(path: Path) -> Path:
    # Longer than the system allows, a null character, or the home of an unknown user.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = path.expanduser()
        if path.exists():
            return path
    raise MediaError(
        "there is no such file",
        given=describe(str(path)),
        expected="an existing path, or a http://, https://, file:// or data: URI",
    )


def _data_uri(uri: str, max_bytes: int) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise MediaError("a data: URI has no comma before its data", given=describe(uri))
    if len(payload) > 2 * max_bytes:  # base64 makes 4 characters of 3 bytes; checked again below
        raise _too_large(describe(uri), max_bytes)
    content = unquote_to_bytes(payload)
    if header.lower().endswith(";base64"):
        try:
            content = base64.b64decode(content)
        except binascii.Error as error:
            raise MediaError(
                f"the base64 of a data: URI cannot be decoded: {error}", given=describe(uri)
            ) from error
    if len(content) > max_bytes:
        raise _too_large(describe(uri), max_bytes)
    return content


def _opener() -> urllib.request.OpenerDirector:
    """urllib without its file: and ftp: handlers, so that no redirect leads off the web."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _download(url: str, timeout: float, max_bytes: int) -> bytes:
    deadline = time.monotonic() + timeout
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "unillava"})
        with _opener().open(request, timeout=timeout) as response:
            return _read_body(response, url, deadline, timeout, max_bytes)
    except urllib.error.HTTPError as error:
        raise MediaError(
            f"the server answered {error.code} {error.reason}", given=describe(url)
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _too_slow(url, timeout) from error
        raise MediaError(
            f"the URL cannot be fetched: {reason}",
            given=describe(url),
            fix="check the address and the network, or pass a local file",
        ) from error


def _read_body(
    response: http.client.HTTPResponse, url: str, deadline: float, timeout: float, max_bytes: int
) -> bytes:
    announced = response.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(describe(url), max_bytes)
    body = bytearray()
    # read1 returns what one receive brought, so a server that trickles meets the deadline too.
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(describe(url), max_bytes)
        if time.monotonic() > deadline:
            raise _too_slow(url, timeout)
    if announced.isdigit() and len(body) < int(announced):
        raise MediaError(
            "the connection ended before the whole file had arrived",
            given=f"{len(body)} bytes of {describe(url)}",
            expected=f"{announced} bytes",
        )
    return bytes(body)


def _too_slow(url: str, timeout: float) -> MediaError:
    return MediaError(
        f"the URL was not fetched within {timeout:g} s",
        given=describe(url),
        fix="pass a larger timeout, or a local file",
    )


def _too_large(name: str, max_bytes: int) -> MediaError:
    return MediaError(
        "the file is larger than allowed",
        given=name,
        expected=f"at most {max_bytes} bytes",
        fix="pass a larger max_bytes",
    )
