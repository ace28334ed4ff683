"""Question files, as LLaVA's evaluation scripts and other tools write them, made into requests.

One JSON object per line, or one JSON list. An object is one of

* `{"question_id", "text", "image"?, "video"?, "category"?}`: LLaVA's question line; `image` may
  be a list, and `<image>` in the text says where images stand (else they come first);
* `{"id", "messages"}`: a request as `unillava.data.request` takes it;
* `{"id", "conversations", "image"?}`: a LLaVA record; its first question is asked.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unillava.data import request as requests
from unillava.data.messages import MARKERS
from unillava.errors import MediaError, RequestError, UnillavaError

Json = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One question of a file."""

    where: str
    """Which line (or entry of the list), for messages."""
    id: Any
    prompt: str = ""
    """What the answer file repeats: the question without image markers."""
    request: Json | None = None
    problem: UnillavaError | None = None
    """Why there is no request."""

    def failure(self, error: UnillavaError) -> RequestError:
        """`error`, saying which question it is about."""
        return RequestError(
            f"{self.where} (id {self.id}): {error.problem}",
            given=error.given,
            expected=error.expected,
            fix=error.fix or "mend it and run again, or pass --on-error skip",
        )


def read_questions(path: str | os.PathLike[str], image_folder: str | None = None) -> list[Question]:
    """All questions of a file; those that cannot be asked have a `problem`.

    Args:
        path: JSON lines, or one JSON list.
        image_folder: where relative image and video paths begin; None: where the file lies.

    Raises:
        RequestError: the file cannot be read.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"the question file cannot be read: {error}",
            given=path,
            expected="JSON lines or a JSON list, in UTF-8",
        ) from error
    folder = Path(image_folder) if image_folder is not None else path.parent
    return [_question(f"{path.name} {where}", entry, folder) for where, entry in _entries(content)]


def chunk(questions: Sequence[Question], count: int, index: int) -> list[Question]:
    """Part `index` of `count`, as LLaVA's scripts cut it: ceil(N / count) questions each.

    The last parts may be empty.

    Raises:
        RequestError: no such part.
    """
    if count < 1 or not 0 <= index < count:
        raise RequestError(
            "there is no such chunk",
            given=f"--num-chunks {count} --chunk-idx {index}",
            expected="chunk-idx from 0 to num-chunks - 1",
        )
    size = -(-len(questions) // count)
    return list(questions[index * size : (index + 1) * size])


def _entries(content: str) -> Iterator[tuple[str, Any]]:
    """(which, entry); an entry that is no JSON is given as an error."""
    if content.lstrip().startswith("["):
        entries = _parsed(content)
        if isinstance(entries, UnillavaError):
            raise entries
        yield from ((f"entry {n}", entry) for n, entry in enumerate(entries))
        return
    # Not splitlines: inside of JSON strings its other line ends are allowed.
    for n, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"line {n}", _parsed(line)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return RequestError(f"this is not JSON: {error}", given=text.strip()[:100])


def _question(where: str, entry: Any, folder: Path) -> Question:
    number = entry.get("question_id", entry.get("id")) if isinstance(entry, dict) else None
    question = Question(where, number)
    try:
        if isinstance(entry, UnillavaError):
            raise entry
        if number is None:
            raise RequestError(
                "a question has no id", given=repr(entry)[:100], expected='"question_id" or "id"'
            )
        prompt, request = _read(entry)
        request = map_media(request, lambda kind, source: _found(source, folder))
        return dataclasses.replace(question, prompt=prompt, request=request)
    except UnillavaError as error:
        return dataclasses.replace(question, problem=error)


def _read(entry: Json) -> tuple[str, Json]:
    """(prompt for the answer file, request) of one object."""
    media = {key: entry[key] for key in ("image", "images", "video", "videos") if key in entry}
    if "messages" in entry:
        request = {"messages": entry["messages"], **media}
        messages, _, _ = requests.normalise(request)
        return _text(messages[-1]), request
    if "conversations" in entry:
        request = requests.from_record(entry)
        asked = [message["role"] for message in request["messages"]].index("user")
        request["messages"] = request["messages"][: asked + 1]
        # ScienceQA's scorer tells questions with a picture by the marker in the prompt.
        messages, images, _ = requests.normalise(request)
        return (f"{MARKERS['image']}\n" if images else "") + _text(messages[-1]), request
    if not isinstance(entry.get("text"), str) or not entry["text"]:
        raise RequestError(
            "a question has no text",
            given=f"keys {sorted(entry)}",
            expected='"text", "messages" or "conversations"',
        )
    request = {"messages": [{"role": "user", "content": entry["text"]}], **media}
    messages, _, _ = requests.normalise(request)
    return _text(messages[-1]), request


def _text(message: Json) -> str:
    return "".join(part.get("text", "") for part in message["content"]).strip()


# --- media -----------------------------------------------------------------------------------


def map_media(request: Json, change: Callable[[str, Any], Any]) -> Json:
    """The request with every source of a medium replaced by `change(kind, source)`.

    `kind` is image or video. The request must be one that `normalise` takes.
    """
    result = dict(request)
    for kind in MARKERS:
        for key in (kind, f"{kind}s"):
            if request.get(key) is not None:
                value = request[key]
                single = not isinstance(value, list | tuple)
                result[key] = (
                    change(kind, value) if single else [change(kind, source) for source in value]
                )
    result["messages"] = [_map_message(message, change) for message in request["messages"]]
    return result


def _map_message(message: Json, change: Callable[[str, Any], Any]) -> Json:
    if isinstance(message["content"], str):
        return message
    return message | {"content": [_map_part(part, change) for part in message["content"]]}


def _map_part(part: Json, change: Callable[[str, Any], Any]) -> Json:
    kind, keys = requests.PART_TYPES[part["type"]]
    key = next((key for key in keys if part.get(key) is not None), None)
    if kind == "text" or key is None:
        return part
    value = part[key]
    if isinstance(value, dict):
        return part | {key: value | {"url": change(kind, value.get("url"))}}
    return part | {key: change(kind, value)}


def _found(source: Any, folder: Path) -> Any:
    """A relative path as seen from `folder`; a file must be there."""
    if not isinstance(source, str) or "://" in source or source.startswith("data:"):
        return source
    path = folder / Path(source).expanduser()
    if not path.exists():
        raise MediaError(
            "there is no such file",
            given=path,
            fix=None if Path(source).is_absolute() else "check --image-folder",
        )
    return str(path)
