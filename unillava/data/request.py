"""Requests as people write them, made into normalised messages and lists of media.

A request is `{"messages": [{"role": ..., "content": str or [parts]}]}`. Media stand in parts, in
OpenAI's or Hugging Face's spelling, or in the lists `images` and `videos` of the request, which
are bound to the `<image>` and `<video>` markers of the user's text in order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from unillava.data.messages import MARKERS, ROLES, Message
from unillava.errors import RequestError

PART_TYPES = {
    "text": ("text", ("text",)),
    "input_text": ("text", ("text",)),
    "output_text": ("text", ("text",)),
    "image": ("image", ("image", "url", "path")),
    "image_url": ("image", ("image_url",)),
    "input_image": ("image", ("image_url",)),
    "video": ("video", ("video", "url", "path")),
    "video_url": ("video", ("video_url",)),
}
"""The `type` of a part: what it is, and the keys under one of which its content stands."""

RECORD_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

MARKER = re.compile("|".join(MARKERS.values()))
SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = {marker: kind for kind, marker in MARKERS.items()}


@dataclass
class _Slot:
    """A part while media are still being bound to it."""

    kind: str
    """text, image or video"""
    value: Any
    """The text, or where the medium comes from; None: from the lists of the request."""
    inline: bool = False
    """It continues the part before it."""
    is_marker: bool = False
    """It was written as a marker in the text."""

    def part(self) -> dict[str, Any]:
        part = {"type": self.kind} | ({"text": self.value} if self.kind == "text" else {})
        return part | ({"inline": True} if self.inline else {})


@dataclass
class _Turn:
    """A message while media are still being bound to it."""

    position: str
    role: str
    slots: list[_Slot] = field(default_factory=list)

    def media(self, kind: str) -> list[_Slot]:
        return [slot for slot in self.slots if slot.kind == kind]

    def content(self) -> str | list[dict[str, Any]]:
        """As it may stand in a request: with its media, and markers where they were written."""
        sources: list[dict[str, Any]] = []
        parts: list[dict[str, Any]] = []
        for slot in self.slots:
            medium = {"type": slot.kind, slot.kind: slot.value}
            if slot.kind != "text" and not slot.is_marker:
                parts.append(medium)
                continue
            text = MARKERS[slot.kind] if slot.is_marker else slot.value
            sources += [medium] if slot.is_marker else []
            if slot.inline and parts:
                parts[-1]["text"] += text
            else:
                parts.append({"type": "text", "text": text})
        only_text = len(parts) == 1 and parts[0]["type"] == "text" and not sources
        return parts[0]["text"] if only_text else sources + parts


def normalise(request: dict[str, Any]) -> tuple[list[Message], list[Any], list[Any]]:
    """Messages in the one form that templates take, and the media in the order of their markers.

    Args:
        request: `messages`, and optionally `image` or `images`, `video` or `videos`: one source or
            a list of them. Other keys (sampling options) are left alone. `<image>` in a user's
            text says where an image stands. If nothing says so, the request's images go before
            the first question.

    Returns:
        (messages, image sources, video sources); messages as in `unillava.data.messages`.

    Raises:
        RequestError: naming the message and part that cannot be understood, or the numbers of
            media and markers that contradict each other.
    """
    turns = _turns(request)
    media = {kind: [slot.value for turn in turns for slot in turn.media(kind)] for kind in MARKERS}
    messages = [{"role": t.role, "content": [s.part() for s in t.slots]} for t in turns]
    return messages, media["image"], media["video"]


def self_contained(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a request with all its media in them, so that they can be continued.

    Raises RequestError as `normalise` does.
    """
    return [{"role": turn.role, "content": turn.content()} for turn in _turns(request)]


def from_record(record: dict[str, Any]) -> dict[str, Any]:
    """A LLaVA training record as a request.

    `{"conversations": [{"from": "human" | "gpt", "value": str}, ...], "image": ...}`; `image` and
    `video` may be lists. As in LLaVA's training, a first turn that is not the human's is dropped,
    and the only image marker of a turn moves to its beginning, followed by a line break.

    Raises:
        RequestError: no conversation, or a turn without a known speaker or text.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RequestError(
            "a training record has no conversation",
            given=f"keys {sorted(record)}",
            expected='"conversations": [{"from": "human", "value": ...}, ...]',
        )
    messages = [_read_record_turn(n, turn) for n, turn in enumerate(turns)]
    first = 0 if messages[0]["role"] != "system" else 1
    if len(messages) > first and messages[first]["role"] == "assistant":
        del messages[first]
    request: dict[str, Any] = {"messages": messages}
    for kind in MARKERS:
        request[f"{kind}s"] = _listed(record, kind)
    return request


def _read_record_turn(n: int, turn: Any) -> Message:
    turn_dict = turn if isinstance(turn, dict) else {}
    speaker, value = turn_dict.get("from"), turn_dict.get("value")
    if speaker not in RECORD_ROLES or not isinstance(value, str):
        raise RequestError(
            f"conversations[{n}] cannot be understood",
            given=_shortened(turn),
            expected=f'"from": one of {", ".join(RECORD_ROLES)}; "value": text',
        )
    role = RECORD_ROLES[speaker]
    return {"role": role, "content": _image_first(value) if role == "user" else value}


def _image_first(text: str) -> str:
    """The only image marker of a text moves to its beginning; several stay where they are."""
    marker = MARKERS["image"]
    if text.count(marker) != 1:
        return text
    return f"{marker}\n{text.replace(marker, '').strip()}".strip()


def _messages(request: Any) -> list[Any]:
    messages = request.get("messages") if isinstance(request, dict) else None
    if isinstance(messages, list) and messages:
        return messages
    is_record = isinstance(request, dict) and "conversations" in request
    raise RequestError(
        "a request has no messages",
        given=_shortened(request),
        expected='{"messages": [{"role": "user", "content": "..."}]}',
        fix="convert a training record with unillava.data.request.from_record"
        if is_record
        else None,
    )


def _turns(request: Any) -> list[_Turn]:
    """The messages with every medium bound to its place."""
    turns = [_read_turn(n, message) for n, message in enumerate(_messages(request))]
    _check_system(turns)
    for kind in MARKERS:
        _bind(turns, kind, _listed(request, kind))
    for turn in turns:
        if turn.role == "user" and not turn.slots:
            raise RequestError(
                f"{turn.position} is empty",
                expected="text, an image or a video in every user message",
                fix="leave the message out, or give it content",
            )
    return turns


def _read_turn(n: int, message: Any) -> _Turn:
    position = f"messages[{n}]"
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise RequestError(
            f"{position} has no known role",
            given=_shortened(message if role is None else role),
            expected=f"one of {', '.join(ROLES)}",
        )
    content = message.get("content")
    turn = _Turn(position, role)
    if isinstance(content, str):
        turn.slots = _split_text(position, content, role)
    elif isinstance(content, list):
        for place, part in enumerate(content):
            turn.slots += _read_part(f"{position}.content[{place}]", part, role)
    else:
        raise RequestError(
            f"{position} has no content",
            given=_shortened(content),
            expected="text, or a list of parts",
        )
    _prefer_markers(turn)
    return turn


def _read_part(position: str, part: Any, role: str) -> list[_Slot]:
    written_type = part.get("type") if isinstance(part, dict) else None
    if not isinstance(written_type, str) or written_type not in PART_TYPES:
        raise RequestError(
            f"{position} is of an unknown type",
            given=_shortened(part if written_type is None else written_type),
            expected=f'a dict whose "type" is one of {", ".join(PART_TYPES)}',
        )
    kind, keys = PART_TYPES[written_type]
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if kind == "text":
        if not isinstance(value, str):
            raise RequestError(f"{position} has no text", given=_shortened(part))
        return _split_text(position, value, role)
    if role != "user":
        raise RequestError(
            f"{position}: only the user can show something",
            given=f"{kind} in a message of {role!r}",
            fix="move it to a user message",
        )
    if isinstance(value, dict):
        value = value.get("url")
    if value is None and written_type != kind:
        raise RequestError(
            f"{position} does not say which {kind} it means",
            given=_shortened(part),
            expected=f'"{keys[0]}": {{"url": ...}} or an address',
        )
    return [_Slot(kind, value)]


def _split_text(position: str, text: str, role: str) -> list[_Slot]:
    """Text and markers; what system and assistant write is text whatever it spells."""
    if SURROGATE.search(text):
        raise RequestError(
            f"{position} has half a character",
            given="a lone surrogate, for example from cutting an emoji in UTF-16",
            expected="text that can be written as UTF-8",
        )
    slots: list[_Slot] = []
    start = 0
    for marker in MARKER.finditer(text) if role == "user" else ():
        slots.append(_Slot("text", text[start : marker.start()]))
        slots.append(_Slot(KINDS[marker[0]], None, is_marker=True))
        start = marker.end()
    slots.append(_Slot("text", text[start:]))
    slots = [slot for slot in slots if slot.kind != "text" or slot.value]
    for slot in slots[1:]:
        slot.inline = True
    return slots


def _prefer_markers(turn: _Turn) -> None:
    """If one message has markers and parts of a kind, the markers say where the parts stand."""
    for kind in MARKERS:
        markers = [slot for slot in turn.media(kind) if slot.is_marker]
        sources = [slot for slot in turn.media(kind) if not slot.is_marker]
        if not (markers and sources):
            continue
        if len(markers) != len(sources):
            raise RequestError(
                f"{turn.position}: the number of {kind}s contradicts the markers",
                given=f"{len(sources)} {kind}(s)",
                expected=f"{len(markers)}, as many as it has {MARKERS[kind]} markers",
                fix=f"remove the markers, or write one {MARKERS[kind]} for each {kind}",
            )
        for marker, source in zip(markers, sources, strict=True):
            marker.value = source.value
        turn.slots = [slot for slot in turn.slots if slot.kind != kind or slot.is_marker]


def _check_system(turns: list[_Turn]) -> None:
    for turn in turns[1:]:
        if turn.role == "system":
            raise RequestError(
                f"{turn.position}: the system message comes first",
                given="a system message inside the conversation",
                fix="make it the first message, and the only one of its kind",
            )


def _listed(request: dict[str, Any], kind: str) -> list[Any]:
    """The media that the request names outside its messages."""
    given = [request[key] for key in (kind, f"{kind}s") if request.get(key) is not None]
    return [
        source
        for value in given
        for source in (value if isinstance(value, (list, tuple)) else [value])
    ]


def _bind(turns: list[_Turn], kind: str, listed: list[Any]) -> None:
    """Give the listed media to the slots that wait for one."""
    slots = [slot for turn in turns for slot in turn.media(kind)]
    asking = next((turn for turn in turns if turn.role == "user"), None)
    if asking and not slots:
        slots = [_Slot(kind, None) for _ in listed]
        asking.slots = slots + asking.slots
    waiting = [slot for slot in slots if slot.value is None]
    if len(waiting) != len(listed):
        marker = MARKERS[kind]
        raise RequestError(
            f"the number of {kind}s contradicts the markers",
            given=f"{len(listed)} {kind}(s) besides those inside the messages",
            expected=f"{len(waiting)}, one for every {marker} or {kind} part that names none",
            fix=f"give one {kind} for each {marker}; if that is meant as text, "
            f"write it differently, for example < {kind} >",
        )
    for slot, source in zip(waiting, listed, strict=True):
        slot.value = source


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
