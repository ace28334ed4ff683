"""Training records in every form that people have them in, made into requests.

    {"id", "image" | "video": path, URL or a list, "conversations": [{"from", "value"}, ...]}
        LLaVA, LLaVA-NeXT, KoLLaVA, LLaVA-Video-178K; `role` and `content` are understood too
    {"image", "conversations": [[user, assistant], ...]}
        PaddleMIX
    {"conversations": [{"from", "value": "<|reserved_special_token_3|>path<|..._4|>text"}, ...]}
        what MindFormers' data_process.py writes; later turns begin with `<text>`
    {"id", "messages": [...]}
        a request, as `unillava.data.request` takes it

Where an image stands in its question differs between the systems that trained on such files;
`PLACEMENTS` are their rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unillava.data.messages import MARKERS
from unillava.data.request import PART_TYPES, RECORD_ROLES
from unillava.errors import RequestError

Json = dict[str, Any]
Turn = tuple[str, str]
"""(role: user, assistant or system; text)."""

OPEN_TAG, CLOSE_TAG = "<|reserved_special_token_3|>", "<|reserved_special_token_4|>"
"""MindFormers writes every medium of a record so, before the text of its first turn."""
TEXT_TAG = "<text>"
"""MindFormers writes this before the text of every other turn."""
TAGGED = re.compile(re.escape(OPEN_TAG) + "(.*?)" + re.escape(CLOSE_TAG), re.S)
VIDEO_SUFFIXES = frozenset("3gp wmv asf dot mpg mpeg mov mp4 avi flv f4v mkv webm mjpeg".split())
"""What follows the last dot of a video's name, in MindFormers and PaddleMIX."""

IMAGE, VIDEO = MARKERS["image"], MARKERS["video"]


@dataclass(frozen=True)
class Placement:
    """Where media markers go within the questions of a record."""

    front: Literal["", "lone", "all"] = ""
    """Which markers move to the beginning of their turn, followed by a line break: none, one that
    is alone in its turn and not there yet, or all of a turn, which become one."""
    first_turn_only: bool = False
    after: str = ""
    """Written behind every image marker."""
    removed: tuple[str, ...] = ()
    """Strings taken out of every turn,"""
    removed_later: tuple[str, ...] = ()
    """and of every turn but the first."""


PLACEMENTS = {
    "keep": Placement(),
    "llava": Placement(front="all"),
    "nx": Placement(front="lone", removed=("QA_GT_caption_based_noisy",)),
    "mindformers": Placement("lone", first_turn_only=True, after=" ", removed_later=(TEXT_TAG,)),
    "paddlemix": Placement(),
}
"""keep: as the person wrote it. llava: LLaVA, KoLLaVA, Open-LLaVA-NeXT, LLaVA-MOSS2. nx:
LLaVA-NeXT. mindformers: with the extra space that its prompts lack at inference. (None of them
puts in a marker that is missing; those samples were trained without their image.)"""


@dataclass(frozen=True)
class Parts:
    """What a record holds, whatever form it has."""

    turns: list[Turn]
    """As written, first turn that is not the user's included."""
    images: list[str]
    videos: list[str]


def read_parts(record: Any) -> Parts:
    """The turns and media of a record of any form but `messages`.

    Raises:
        RequestError: no conversation, a turn without a known speaker or text, or a medium that is
            no path.
    """
    written = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(written, list) or not written:
        raise RequestError(
            "a record has no conversation",
            given=f"keys {sorted(record)}" if isinstance(record, dict) else _shortened(record),
            expected='"conversations": [{"from": "human", "value": ...}, ...]',
        )
    if isinstance(written[0], list):
        turns = [turn for n, pair in enumerate(written) for turn in _read_pair(n, pair)]
    else:
        turns = [_read_turn(n, turn) for n, turn in enumerate(written)]
    images, videos = _read_media(record, "image"), _read_media(record, "video")
    if turns[0][1].startswith(OPEN_TAG):
        turns, tagged = _without_tags(turns)
        images += [path for path in tagged if not is_video(path)]
        videos += [path for path in tagged if is_video(path)]
    return Parts(turns, images, videos)


def to_request(
    record: Any, folders: Sequence[str] = (), placement: str = "keep"
) -> tuple[Json, Any]:
    """A record as a request for `Pipeline.prepare(request, generate=False)`.

    A first turn that is not the user's is dropped (a system text stays), as every LLaVA does. In
    a record with a video and no image, `<image>` means the video, as in LLaVA-Video-178K and in
    MindFormers. Media stand before the first question if no marker says where. If there are
    markers, but too many or too few, `prepare` raises.

    Args:
        record: in one of the forms of this module.
        folders: where relative paths of media begin; of several, the first that has the file. A
            record with its own `image_root` (`unillava data mix`) uses that.
        placement: a name of `PLACEMENTS`.

    Returns:
        The request, and the record's id (None if it has none).

    Raises:
        RequestError: the record cannot be understood, or there is no such placement.
    """
    rule = get_placement(placement)
    if is_request(record):
        media = {kind: _read_media(record, kind) for kind in MARKERS}
        messages = record["messages"]
    else:
        parts = read_parts(record)
        media = {"image": parts.images, "video": parts.videos}
        messages = _placed(_from_user(parts.turns), rule, media)
    folders = root_of(record) or folders

    def found(source: str) -> str:
        return resolve(source, folders)

    request: Json = {"messages": [_with_paths(message, found) for message in messages]}
    for kind, sources in media.items():
        request[f"{kind}s"] = list(map(found, sources))
    return request, record.get("id", record.get("question_id"))


def root_of(record: Any) -> tuple[str, ...]:
    """The record's own folder of media, `image_root`, if it has one."""
    root = record.get("image_root") if isinstance(record, dict) else None
    return (root,) if isinstance(root, str) else ()


def map_media(record: Any, change: Callable[[str], str]) -> Any:
    """The record with `change(source)` in place of each of its media, whatever its form."""
    if not isinstance(record, dict):
        return record
    changed = dict(record)
    for key in ("image", "images", "video", "videos"):
        value = record.get(key)
        if isinstance(value, str) and value:
            changed[key] = change(value)
        elif isinstance(value, list):
            changed[key] = [change(source) for source in value]
    turns = record.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        first = {
            key: TAGGED.sub(lambda tag: f"{OPEN_TAG}{change(tag[1])}{CLOSE_TAG}", value)
            if isinstance(value, str) and value.startswith(OPEN_TAG)
            else value
            for key, value in turns[0].items()
        }
        changed["conversations"] = [first, *turns[1:]]
    if is_request(record):
        changed["messages"] = [_with_paths(message, change) for message in record["messages"]]
    return changed


def is_request(record: Any) -> bool:
    """Whether it has the form of a request rather than of a training record."""
    return (
        isinstance(record, dict)
        and "conversations" not in record
        and isinstance(record.get("messages"), list)
    )


def measure(record: Any) -> tuple[int, int, int, int]:
    """(words, characters, images, videos); all 0 if the record cannot be understood.

    Words are what white space separates, over all turns, as LLaVA counts them to group samples.
    """
    try:
        if is_request(record):
            texts, images, videos = _measurable(record)
        else:
            parts = read_parts(record)
            texts = [text for _, text in parts.turns]
            images, videos = len(parts.images), len(parts.videos)
    except RequestError:
        return 0, 0, 0, 0
    # Joined by white space, the texts have as many words as one by one.
    return len(" ".join(texts).split()), sum(map(len, texts)), images, videos


def get_placement(name: str) -> Placement:
    """Raises RequestError for an unknown name."""
    if name in PLACEMENTS:
        return PLACEMENTS[name]
    raise RequestError(
        "there is no such placement of images",
        given=name,
        expected=f"one of {', '.join(PLACEMENTS)}",
    )


def resolve(source: str, folders: Sequence[str]) -> str:
    """The path of a medium; URLs and absolute paths stay as they are.

    Of several folders, the first in which it exists (else the first); a single one is not looked
    into.
    """
    if is_url(source) or os.path.isabs(source) or not folders:
        return source
    places = [os.path.join(folder, source) for folder in folders]
    if len(places) == 1:
        return places[0]
    return next(filter(os.path.exists, places), places[0])


def is_url(source: str) -> bool:
    """Whether it names no file of this machine by path."""
    return "://" in source or source.startswith("data:")


def is_video(path: str) -> bool:
    """By its suffix."""
    return path.rpartition(".")[2].lower() in VIDEO_SUFFIXES


# --- reading ---------------------------------------------------------------------------------


def _read_turn(n: int, turn: Any) -> Turn:
    written = turn if isinstance(turn, dict) else {}
    speaker = written.get("from", written.get("role"))
    text = written.get("value", written.get("content"))
    role = RECORD_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None or not isinstance(text, str):
        raise RequestError(
            f"conversations[{n}] cannot be understood",
            given=_shortened(turn),
            expected=f'"from": one of {", ".join(RECORD_ROLES)}; "value": text',
        )
    return role, text


def _read_pair(n: int, pair: Any) -> list[Turn]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
        raise RequestError(
            f"conversations[{n}] cannot be understood",
            given=_shortened(pair),
            expected="[what the user says, what the assistant answers]",
        )
    return [("user", pair[0]), ("assistant", pair[1])]


def _read_media(record: Json, kind: str) -> list[str]:
    """Under `image` or `images`, `video` or `videos`; empty values count as none."""
    found: list[str] = []
    for key in (kind, f"{kind}s"):
        value = record.get(key)
        for source in value if isinstance(value, list) else [value] if value else []:
            if not isinstance(source, str) or not source:
                raise RequestError(
                    f"what a record names under {key!r} is no path",
                    given=_shortened(value),
                    expected="a path, a URL, or a list of them",
                )
            found.append(source)
    return found


def _kind_and_keys(part: Any) -> tuple[str, tuple[str, ...]]:
    """What a part of a message is, and under which keys its content stands; "" if unknown."""
    written = part.get("type") if isinstance(part, dict) else None
    return PART_TYPES.get(written, ("", ())) if isinstance(written, str) else ("", ())


def _without_tags(turns: list[Turn]) -> tuple[list[Turn], list[str]]:
    """MindFormers' form: the turns as they were before, and the media."""
    role, text = turns[0]
    tagged: list[str] = []
    place = 0
    while match := TAGGED.match(text, place):
        tagged += [match[1]] if match[1] else []
        place = match.end()
    others = [(role, text.removeprefix(TEXT_TAG)) for role, text in turns[1:]]
    return [(role, text[place:]), *others], tagged


def _measurable(record: Json) -> tuple[list[str], int, int]:
    """Texts, number of images, number of videos of a request."""
    texts, counts = [], {kind: len(_read_media(record, kind)) for kind in MARKERS}
    for message in record["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind, _ = _kind_and_keys(part)
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif kind in counts:
                counts[kind] += 1
    return texts, counts["image"], counts["video"]


# --- placing ---------------------------------------------------------------------------------


def _from_user(turns: list[Turn]) -> list[Turn]:
    """Without a first turn that is the assistant's."""
    first = 1 if turns[0][0] == "system" else 0
    if turns[first:] and turns[first][0] == "assistant":
        return turns[:first] + turns[first + 1 :]
    return turns


def _placed(turns: list[Turn], rule: Placement, media: dict[str, list[str]]) -> list[Json]:
    """The messages, with every marker where the rule wants it."""
    if not any(media.values()):
        return [{"role": role, "content": text} for role, text in turns]
    marker = VIDEO if media["video"] and not media["image"] else IMAGE
    messages, asked = [], False
    for n, (role, text) in enumerate(turns):
        for string in rule.removed + (rule.removed_later if n else ()):
            text = text.replace(string, "")
        if role == "user":
            text = text.replace(IMAGE, marker)
            if not (asked and rule.first_turn_only):
                text = _to_front(text, marker, rule.front)
            text = text.replace(marker, marker + rule.after)
            asked = True
        messages.append({"role": role, "content": text})
    return messages


def _to_front(text: str, marker: str, front: str) -> str:
    count = text.count(marker)
    moves = {"all": count > 0, "lone": count == 1 and not text.startswith(marker)}
    if not moves.get(front, False):
        return text
    return f"{marker}\n{text.replace(marker, '').strip()}".strip()


def _with_paths(message: Any, change: Callable[[str], str]) -> Any:
    """The message with other paths of the media that stand inside it."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return message | {"content": [_with_path(part, change) for part in content]}


def _with_path(part: Any, change: Callable[[str], str]) -> Any:
    kind, keys = _kind_and_keys(part)
    for key in keys if kind in MARKERS else ():
        if isinstance(part.get(key), str):
            return part | {key: change(part[key])}
    return part


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
