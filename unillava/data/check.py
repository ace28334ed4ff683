"""What is wrong with a record, found before the accelerators start.

It is read as training will read it: form, speakers, pictures, prompt, tokens and what is learnt
of them. Findings are problems (the record cannot be trained on) or remarks.
`unillava.data.check_report` does it for all records.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unillava.data.conversation import render
from unillava.data.files import as_json
from unillava.data.forms import to_request
from unillava.data.inspection import Depth, Picture, inspect_image, inspect_video
from unillava.data.lengths import token_lengths
from unillava.data.messages import MARKERS, Message, check_alternation, control_strings
from unillava.data.pipeline import Pipeline
from unillava.data.records import Records
from unillava.data.request import normalise
from unillava.data.sources import describe
from unillava.data.tokens import Encoded, encode
from unillava.errors import DataError, RequestError, UnillavaError

PROBLEMS = {
    "damaged": ("not JSON", "download the file again; --fix leaves these places out"),
    "form": ("cannot be understood", "unillava/data/forms.py lists the forms"),
    "order": ("speakers out of turn", "join turns of one speaker, or add what is missing"),
    "markers": ("markers contradict the media", "write one <image> or <video> for each of them"),
    "prompt": ("no prompt can be made of it", "mend the record, or choose another template"),
    "unlearnt": ("nothing to learn", "add an answer, or drop the record"),
    "cut-off": ("every answer lies behind the longest length", "raise --max-length"),
    "image-missing": ("image not found", "check --image-folder, or download it again"),
    "image-renamed": ("image has another suffix", "--fix writes the suffix that it really has"),
    "image-damaged": ("image cannot be decoded", "download it again, or drop the record"),
    "video-missing": ("video not found", "check --image-folder, or download it again"),
    "video-damaged": ("video cannot be decoded", "download it again, or drop the record"),
}
REMARKS = {
    "cut": ("longer than the longest length", "raise --max-length, or shorten the record"),
    "unmarked": ("no marker says where the image stands", "it is put before the first question"),
    "spelt": ("text spells a control token", "it stays text: nothing to do"),
    "no-answer": ("an answer is empty", "nothing of that turn is learnt"),
    "suffix": ("type and suffix of an image differ", "it is read all the same"),
    "turned": ("image is turned by EXIF", "it is turned upright; LLaVA left it as it lay"),
    "animated": ("image is animated", "its first frame is used"),
    "tiny": ("image is tiny", "look at it"),
    "elongated": ("image is very elongated", "look at it"),
    "not-fetched": ("lies on the web, not looked at", "pass --fetch, or download it"),
    "video-unread": ("video not looked at", "pip install 'unillava[video]'"),
    "same-id": ("id of another record", "nothing to do, unless ids must be unique"),
    "duplicate": ("the same as another record", "--drop-duplicates, with --fix"),
}
"""Kind of finding: what it is, and what to do about it."""

UNKNOWN = -1


@dataclass(frozen=True)
class Settings:
    """How records are checked."""

    placement: str = "keep"
    max_length: int | None = None
    """Longest sample in tokens; None: the model's context."""
    depth: Depth = "whole"
    fetch: bool = False


@dataclass
class Checked:
    """What was found out about one record."""

    number: int
    id: Any = None
    findings: list[tuple[str, str]] = field(default_factory=list)
    """(kind, detail)."""
    tokens: int = UNKNOWN
    """Length of the merged sequence."""
    picture_tokens: int = UNKNOWN
    learnt: int = UNKNOWN
    lost: int = 0
    """Learnt tokens behind the longest length."""
    digest: bytes | None = None
    """Of its content without its id."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Media by the name that they really have."""

    @property
    def problems(self) -> set[str]:
        """Kinds of what makes it impossible to train on it."""
        return {kind for kind, _ in self.findings if kind in PROBLEMS}

    def note(self, kind: str, detail: object = "") -> None:
        """Add a finding."""
        self.findings.append((kind, str(detail)))

    def refuse(self, kind: str, error: UnillavaError) -> None:
        """Add an error as a finding."""
        given = "" if error.given is None else f": {error.given}"
        expected = "" if error.expected is None else f"; expected {error.expected}"
        self.note(kind, error.problem + given + expected)


class Checker:
    """Checks records one by one; with a pipeline, also what becomes of them."""

    def __init__(self, records: Records, settings: Settings, pipeline: Pipeline | None) -> None:
        self.records, self.settings, self.pipeline = records, settings, pipeline
        self._controls = control_strings(pipeline.tokenizer) if pipeline else []

    @property
    def max_length(self) -> int | None:
        """Longest sample in tokens, if that is known."""
        own = self.pipeline.spec.text.max_position if self.pipeline else None
        return self.settings.max_length or own

    def check(self, number: int) -> Checked:
        """Everything there is to say about one record."""
        checked = Checked(number)
        try:
            record = self.records[number]
            checked.id = record_id(record)
            checked.digest = _digest(record)
            request = self._request(number, record, checked)
            messages, images, videos = self._messages(request, checked)
            sizes = self._look(images, videos, checked)
            self._read(messages, checked)
            if self.pipeline is not None:
                self._count(messages, sizes, len(videos), checked)
        except _Stop:
            pass
        return checked

    def _request(self, number: int, record: Any, checked: Checked) -> dict[str, Any]:
        file, _ = self.records.locate(number)
        with _noted(checked, "form"):
            return to_request(record, file.folders, self.settings.placement)[0]

    def _messages(
        self, request: dict[str, Any], checked: Checked
    ) -> tuple[list[Message], list[Any], list[Any]]:
        listed = [*request["images"], *request["videos"]]
        if listed and not _has_marker(request["messages"]):
            checked.note("unmarked", ", ".join(map(describe, listed)))
        try:
            return normalise(request)
        except RequestError as error:
            self._look(request["images"], request["videos"], checked)
            checked.refuse("markers" if "contradicts" in error.problem else "form", error)
            raise _Stop from error

    def _look(
        self, images: Sequence[Any], videos: Sequence[Any], checked: Checked
    ) -> list[tuple[int, int] | None]:
        """Sizes of the pictures; those that are not known are None."""
        depth, fetch = self.settings.depth, self.settings.fetch
        looked: list[Picture] = []
        for source in images:
            picture = inspect_image(source, depth, fetch)
            if picture.found_as is not None:
                checked.renamed[source] = picture.found_as
            looked.append(picture)
        films = [inspect_video(source, depth, fetch) for source in videos]
        checked.findings += [finding for one in looked + films for finding in one.findings]
        return [picture.size_hw for picture in looked]

    def _read(self, messages: list[Message], checked: Checked) -> None:
        """Look at the texts alone."""
        with _noted(checked, "order"):
            check_alternation(messages)
        for n, message in enumerate(messages):
            text = "".join(part.get("text", "") for part in message["content"])
            if message["role"] == "assistant" and not text.strip():
                checked.note("no-answer", f"messages[{n}]")
            spelt = [string for string in self._controls if string in text]
            if spelt:
                checked.note("spelt", f"messages[{n}]: {' '.join(spelt)}")

    def _count(
        self,
        messages: list[Message],
        sizes: list[tuple[int, int] | None],
        num_videos: int,
        checked: Checked,
    ) -> None:
        """Count tokens, and those that are learnt."""
        pipeline = self.pipeline
        with _noted(checked, "prompt"):
            rendered = render(pipeline.template, messages)
            encoded = encode(pipeline.tokenizer, rendered, pipeline.spec)
            lengths = token_lengths(pipeline, encoded, sizes, num_videos)
        targets = encoded.learnt[1:]  # nothing is asked for the first token
        checked.learnt = int(targets.sum())
        if not checked.learnt:
            checked.note("unlearnt")
        if lengths is None:
            return
        ends, longest = np.cumsum(lengths), self.max_length
        checked.tokens = int(ends[-1])
        checked.picture_tokens = int(lengths[_is_medium(pipeline, encoded)].sum())
        checked.lost = int((targets & (ends[1:] > longest)).sum())
        if checked.tokens > longest and checked.learnt:
            kind = "cut-off" if checked.lost == checked.learnt else "cut"
            checked.note(kind, f"{checked.tokens} tokens, {checked.lost} learnt ones are lost")


def _is_medium(pipeline: Pipeline, encoded: Encoded) -> np.ndarray:
    spec = pipeline.spec
    return np.isin(encoded.ids, [n for n in (spec.image_token, spec.video_token) if n is not None])


def _has_marker(messages: Sequence[Any]) -> bool:
    """Whether something in the messages says where a medium stands."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    texts = [content for content in contents if isinstance(content, str)]
    return len(texts) < len(contents) or any(m in text for text in texts for m in MARKERS.values())


class _Stop(Exception):
    """Nothing more can be found out about a record."""


@contextlib.contextmanager
def _noted(checked: Checked, kind: str) -> Iterator[None]:
    """What the block raises becomes a finding, and ends the check of the record."""
    try:
        yield
    except DataError:
        raise
    except UnillavaError as error:
        checked.refuse(kind, error)
        raise _Stop from error


def _digest(record: Any) -> bytes:
    content = {k: v for k, v in record.items() if k != "id"} if isinstance(record, dict) else record
    return hashlib.blake2b(as_json(content), digest_size=8).digest()


def record_id(record: Any) -> Any:
    """Its id, if it has one."""
    return record.get("id", record.get("question_id")) if isinstance(record, dict) else None
