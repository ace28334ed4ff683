"""What templates and tokenisation share: normalised messages, markers, and rendered text.

A normalised message is `{"role": "system" | "user" | "assistant", "content": [part, ...]}`. A part
is `{"type": "text", "text": str}`, `{"type": "image"}` or `{"type": "video"}`. A part with
`"inline": True` continues the part before it: so stands a medium in running text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from unillava.errors import RequestError

Message = dict[str, Any]
Span = tuple[int, int]

ROLES = ("system", "user", "assistant")
MARKERS = {"image": "<image>", "video": "<video>"}
"""How a medium is written in the rendered text, whatever the tokenizer makes of it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as one string."""

    text: str
    spans: tuple[Span, ...] = ()
    """[start, end) in characters: what the assistant is to produce, answers and end marks."""
    literals: tuple[Span, ...] = ()
    """[start, end) of characters that people or the model wrote: never markers or control tokens,
    even if they spell one."""
    learnt_tokens: tuple[str, ...] = ()
    """Each is one token, which is learnt wherever it stands."""
    segments: tuple[tuple[int, bool], ...] = ()
    """(end, whether it is masked) of the stretches that LLaVA's first rule measures, beginning
    with what precedes the first turn; empty: that rule is not used."""

    def stretch(self, start: int, end: int) -> Rendered:
        """The text from `start` to `end` with its literals, nothing learnt."""
        inside = [(max(a, start) - start, min(b, end) - start) for a, b in self.literals]
        return Rendered(self.text[start:end], literals=tuple((a, b) for a, b in inside if a < b))


@dataclass(frozen=True)
class Piece:
    """A stretch of a message's content."""

    text: str
    is_literal: bool


def content_pieces(parts: Sequence[dict[str, Any]]) -> list[Piece]:
    """The content of a message in the order in which it is written.

    Media given as parts of their own are joined with line breaks. They go first if all the text
    comes before them (LLaVA was trained with the image first); interleaved parts keep their order.
    """
    blocks = _blocks(parts)
    is_medium = [not block[0].is_literal and len(block) == 1 for block in blocks]
    if True in is_medium and is_medium == sorted(is_medium):
        first = is_medium.index(True)
        blocks = blocks[first:] + blocks[:first]
    pieces: list[Piece] = []
    for block in blocks:
        pieces += ([Piece("\n", False)] if pieces else []) + block
    return pieces


def _blocks(parts: Sequence[dict[str, Any]]) -> list[list[Piece]]:
    """Stretches of parts that continue one another."""
    blocks: list[list[Piece]] = []
    for part in parts:
        is_text = part["type"] == "text"
        piece = Piece(part["text"], True) if is_text else Piece(MARKERS[part["type"]], False)
        if blocks and part.get("inline"):
            blocks[-1].append(piece)
        elif piece.text:
            blocks.append([piece])
    return blocks


def text_of(message: Message) -> str:
    """The text of a message, without its media."""
    return "".join(piece.text for piece in content_pieces(message["content"]) if piece.is_literal)


def split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The conversation's own system text, None if it has none, and the other messages."""
    if messages and messages[0]["role"] == "system":
        return text_of(messages[0]), messages[1:]
    return None, messages


def check_generation(messages: Sequence[Message]) -> None:
    """Raise RequestError if there is nothing to answer."""
    if not messages or messages[-1]["role"] != "user":
        raise RequestError(
            "there is no question to answer",
            given=f"the last message is from {messages[-1]['role']!r}" if messages else "nothing",
            expected="a last message from 'user'",
            fix="end the conversation with a user message",
        )


def check_alternation(messages: Sequence[Message]) -> None:
    """Raise RequestError unless user and assistant speak in turn, the user first."""
    first = 0 if not messages or messages[0]["role"] != "system" else 1
    for n, message in enumerate(messages[first:]):
        expected = ("user", "assistant")[n % 2]
        if message["role"] != expected:
            raise RequestError(
                f"messages[{n + first}] comes out of turn",
                given=f"role {message['role']!r}",
                expected=f"{expected!r}: user and assistant alternate, and the user begins",
                fix="join messages of one speaker into one, or add what is missing",
            )


def control_strings(tokenizer: Any) -> list[str]:
    """Strings that the tokenizer turns into control tokens, and the markers."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*special, *map(str, tokenizer.all_special_tokens), *MARKERS.values()})


def occurrences(text: str, wanted: Iterable[str]) -> list[tuple[int, str]]:
    """(start, string) of every occurrence, overlapping ones too, by start."""
    found = []
    for string in wanted:
        start = text.find(string)
        while start >= 0:
            found.append((start, string))
            start = text.find(string, start + 1)
    return sorted(found)


def touches(start: int, end: int, spans: Iterable[Span]) -> bool:
    """Whether [start, end) has a character in common with any of the spans."""
    return any(start < span_end and span_start < end for span_start, span_end in spans)


def marker_places(rendered: Rendered) -> list[tuple[int, str]]:
    """(start, "image" or "video") of the markers of a rendered text, without those in literals."""
    kinds = {marker: kind for kind, marker in MARKERS.items()}
    return [
        (start, kinds[marker])
        for start, marker in occurrences(rendered.text, kinds)
        if not touches(start, start + len(marker), rendered.literals)
    ]


def union(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans sorted, without empty ones, those that touch or overlap made one."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        elif start < end:
            made.append((start, end))
    return tuple(made)
