"""The checkpoint's own chat template (Jinja), behind the interface of `conversation.Template`.

It is rendered by transformers, in Jinja's sandbox. Which characters are answers is found by
rendering the conversation up to each answer: what the template adds to the text that ends with the
generation prompt is what the assistant has to produce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from unillava.data.messages import (
    MARKERS,
    Message,
    Rendered,
    Span,
    check_generation,
    content_pieces,
    control_strings,
    marker_places,
    occurrences,
    text_of,
    union,
)
from unillava.errors import RequestError

PROBE = "probe"
FIRST_MARK = 0xE000
"""Where Unicode's private use area begins: the marks around literals are taken from there."""


class CheckpointTemplate:
    """A Jinja chat template as tokenizers and processors bring it."""

    name = "checkpoint"

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer, self.source = tokenizer, source
        self._controls = control_strings(tokenizer)
        self._takes_parts = self._accepts_parts()

    @cached_property
    def stop(self) -> tuple[str, ...]:
        """The control token that the template writes after an answer, if it writes one."""
        question = {"role": "user", "content": [{"type": "text", "text": PROBE}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
        try:
            text = self.render([question, answer]).text
        except RequestError:
            return ()  # a template that wants something else first: eos alone ends its replies
        found = occurrences(text[text.rindex(PROBE) :], self._controls)
        return (found[0][1],) if found else ()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The conversation as one string; see `conversation.Template.render`.

        Raises:
            RequestError: the template refuses the conversation, loses a medium, or (when there is
                something to learn) writes an answer differently than its beginning announces.
        """
        if add_generation_prompt:
            check_generation(messages)
        marks = _unused_characters(messages, self.source)
        shown = [self._shown(message, marks) for message in messages]
        rendered = _without_marks(self._apply(shown, add_generation_prompt), marks)
        _check_media(messages, rendered)
        if add_generation_prompt:
            return rendered
        spans = [
            self._answer_span(n, message, shown, rendered.text, marks)
            for n, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return Rendered(rendered.text, union(spans), rendered.literals)

    def _apply(self, shown: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                shown,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # the template is foreign code: it may raise anything
            raise RequestError(
                "the checkpoint's chat template cannot render this conversation",
                given=f"{type(error).__name__}: {error}",
                fix="mend the conversation, or choose another template by name",
            ) from error

    def _accepts_parts(self) -> bool:
        """Whether content is a list of parts to this template; to older ones it is a string."""
        parts = [{"type": "image"}, {"type": "text", "text": PROBE}]
        try:
            text = self._apply([{"role": "user", "content": parts}], False)
        except RequestError:
            return False
        return PROBE in text and text.count(MARKERS["image"]) == 1

    def _shown(self, message: Message, marks: str) -> Message:
        """The message in the form that the template takes, control strings in its text marked."""
        parts = message["content"]
        if self._takes_parts and not any(part.get("inline") for part in parts):
            content: Any = [
                {"type": "text", "text": self._marked(part["text"], marks)}
                if part["type"] == "text"
                else {"type": part["type"]}
                for part in parts
            ]
        else:
            content = "".join(
                self._marked(piece.text, marks) if piece.is_literal else piece.text
                for piece in content_pieces(parts)
            )
            if self._takes_parts:
                content = [{"type": "text", "text": content}]
        return {"role": message["role"], "content": content}

    def _marked(self, text: str, marks: str) -> str:
        """Marks around every stretch of `text` that spells control strings."""
        found = occurrences(text, self._controls)
        for start, end in reversed(union((start, start + len(string)) for start, string in found)):
            text = text[:start] + marks[0] + text[start:end] + marks[1] + text[end:]
        return text

    def _answer_span(
        self, n: int, message: Message, shown: list[Message], text: str, marks: str
    ) -> Span:
        """Characters of message `n` that the assistant has to produce."""
        prompt = _without_marks(self._apply(shown[:n], True), marks).text if n else ""
        upto = _without_marks(self._apply(shown[: n + 1], False), marks).text
        answer = text_of(message).strip()
        place = upto.find(answer, len(prompt))
        if not n or place < 0 or not upto.startswith(prompt) or not text.startswith(upto):
            raise RequestError(
                f"cannot tell which characters of messages[{n}] the assistant is to learn",
                given="a chat template that rewrites earlier text when the conversation goes on",
                fix="choose a template by name for training",
            )
        end = place + len(answer)
        for start, end_mark in occurrences(upto[end:], self._controls)[:1]:
            return len(prompt), end + start + len(end_mark)
        return len(prompt), max(end, len(upto.rstrip()))


def _unused_characters(messages: Sequence[Message], source: str) -> str:
    """Two private characters that occur neither in the conversation nor in the template."""
    used = set(source).union(*(text_of(message) for message in messages))
    free = (chr(code) for code in range(FIRST_MARK, 0xF900) if chr(code) not in used)
    return next(free) + next(free)


def _without_marks(text: str, marks: str) -> Rendered:
    """The text without marks, and what stood between them as literals."""
    opening, closing = marks
    clean, literals, start = [], [], None
    length = 0
    for character in text:
        if character == opening:
            start = length
        elif character == closing and start is not None:
            literals.append((start, length))
            start = None
        elif character not in marks:
            clean.append(character)
            length += 1
    return Rendered("".join(clean), literals=union(literals))


def _check_media(messages: Sequence[Message], rendered: Rendered) -> None:
    parts = Counter(part["type"] for m in messages for part in m["content"])
    written = Counter(kind for _, kind in marker_places(rendered))
    for kind, marker in MARKERS.items():
        if parts[kind] != written[kind]:
            raise RequestError(
                f"the checkpoint's chat template does not write every {kind} once",
                given=f"{parts[kind]} {kind}(s) in the conversation",
                expected=f"as many {marker} in its text, not {written[kind]}",
                fix="choose another template by name",
            )
