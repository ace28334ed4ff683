"""Conversation templates: from messages to one string and what of it is to be learnt.

The templates are data (`templates.yaml`, whose head explains the fields); `Template.render` is
the only rule that reads them. The checkpoint's own chat template has the same interface
(`unillava.data.chat_template`). The strings reproduce LLaVA, KoLLaVA, Open-LLaVA-NeXT, LLaVA-NeXT
and MOSS2, so that a model is prompted with exactly what it was trained on.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from unillava.data.chat_template import CheckpointTemplate
from unillava.data.messages import (
    MARKERS,
    Message,
    Piece,
    Rendered,
    Span,
    check_alternation,
    check_generation,
    content_pieces,
    split_system,
    union,
)
from unillava.errors import RequestError
from unillava.spec import LlavaSpec

__all__ = [
    "ChatTemplate",
    "CheckpointTemplate",
    "Rendered",
    "Template",
    "choose_template",
    "get_template",
    "historical_names",
    "render",
    "template_names",
]

CHECKPOINT = CheckpointTemplate.name
"""The name under which the checkpoint's own chat template is asked for."""

BY_CONTENT = (
    ("<|start_header_id|>", None, "llava_llama_3"),
    ("<|im_start|>", "qwen2", "qwen_1_5"),
    ("<|im_start|>", None, "chatml_direct"),
    (None, "mistral", "mistral_instruct"),
    (None, None, "vicuna_v1"),
)
"""(a token in the vocabulary, kind of language model, template): the first row that fits."""


class ChatTemplate(Protocol):
    """What every template offers."""

    name: str

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a reply."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The conversation as one string."""


@dataclass(frozen=True)
class Turn:
    """What stands around the content of one speaker's turns."""

    header: str = ""
    """The whole of a turn without content, and of the turn that is to be generated."""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Template:
    """One entry of templates.yaml; the head of that file explains the fields."""

    name: str
    system: str = ""
    around_system: tuple[str, str] = ("", "")
    system_in_user: bool = False
    user: Turn = Turn()
    assistant: Turn = Turn()
    after_answer: str = ""
    between: str = ""
    image: str = MARKERS["image"]
    examples: tuple[tuple[str, str], ...] = ()
    caption: bool = False
    closing: str = ""
    learns: Literal["answer", "turn", "segments"] = "answer"
    learnt_tokens: tuple[str, ...] = ()
    historical: bool = False
    stop: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    note: str = ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The conversation as one string.

        Args:
            messages: normalised (`unillava.data.messages`). A system message replaces the
                template's own text; an empty one removes it.
            add_generation_prompt: end where the assistant is to speak; nothing is learnt then.

        Raises:
            RequestError: speakers out of turn, or no question to answer.
        """
        check_alternation(messages)
        if add_generation_prompt:
            check_generation(messages)
        own_system, turns = split_system(messages)
        if self.caption:
            _check_caption(turns)
        page = _Page()
        system = [Piece(self.system, False)] if own_system is None else [Piece(own_system, True)]
        if not self.system_in_user:
            self._write_system(page, system)
        page.end_segment(is_masked=True)
        for n, (question, answer) in enumerate(self.examples):
            self._write_user(page, [Piece(question, False)], system, is_first=n == 0)
            self._write_assistant(page, [Piece(answer, False)])
        for n, message in enumerate(turns):
            pieces = content_pieces(message["content"])
            if message["role"] == "user":
                is_first = n == 0 and not self.examples
                self._write_user(page, self._media_as_here(pieces), system, is_first)
            else:
                page.learnt.append(self._write_assistant(page, pieces))
            page.end_segment(is_masked=message["role"] == "user")
        page.write(self.assistant.header if add_generation_prompt else self.closing)
        text, literals = "".join(page.strings), union(page.literals)
        if add_generation_prompt:
            return Rendered(text, literals=literals)
        if self.learns == "segments":
            return Rendered(text, (), literals, self.learnt_tokens, tuple(page.segments))
        return Rendered(text, union(page.learnt), literals, self.learnt_tokens)

    def _write_system(self, page: _Page, system: list[Piece]) -> None:
        if any(piece.text for piece in system):
            before, after = self.around_system
            page.write(before)
            page.write_pieces(system)
            page.write(after)

    def _write_user(
        self, page: _Page, pieces: list[Piece], system: list[Piece], is_first: bool
    ) -> None:
        page.write("" if is_first else self.between)
        page.write(self.user.header)
        if pieces:
            page.write(self.user.before)
        if is_first and self.system_in_user:
            self._write_system(page, system)
        if pieces:
            page.write_pieces(pieces)
            page.write(self.user.after)

    def _write_assistant(self, page: _Page, pieces: list[Piece]) -> Span:
        """Returns the characters that are learnt."""
        turn_start = page.length
        page.write(self.assistant.header)
        start = end = page.length
        if pieces:
            page.write(self.assistant.before)
            page.write_pieces(pieces)
            page.write(self.assistant.after)
            end = page.length
            page.write(self.after_answer)
        return (turn_start, page.length) if self.learns == "turn" else (start, end)

    def _media_as_here(self, pieces: list[Piece]) -> list[Piece]:
        """Image markers in this template's form; of a captioned image, the markers alone."""
        media = [Piece(marker, False) for marker in MARKERS.values()]
        if self.caption:
            pieces = [piece for piece in pieces if piece in media]
        image = Piece(MARKERS["image"], False)
        return [Piece(self.image, False) if piece == image else piece for piece in pieces]


@dataclass
class _Page:
    """A text being written, with its spans."""

    strings: list[str] = field(default_factory=list)
    length: int = 0
    learnt: list[Span] = field(default_factory=list)
    literals: list[Span] = field(default_factory=list)
    segments: list[tuple[int, bool]] = field(default_factory=list)

    def end_segment(self, is_masked: bool) -> None:
        self.segments.append((self.length, is_masked))

    def write(self, text: str) -> None:
        self.strings.append(text)
        self.length += len(text)

    def write_pieces(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            start = self.length
            self.write(piece.text)
            if piece.is_literal:
                self.literals.append((start, self.length))


def _check_caption(turns: Sequence[Message]) -> None:
    media = sum(part["type"] != "text" for part in turns[0]["content"]) if turns else 0
    if len(turns) > 2 or not media:
        raise RequestError(
            "a caption template takes one user message with an image, and its caption",
            given=f"{len(turns)} message(s), {media} image(s) in the first",
            expected="user with an image, then assistant",
            fix="use a conversation template, for example vicuna_v1",
        )


def render(
    template: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool = False
) -> Rendered:
    """The conversation as one string; see `Template.render`."""
    return template.render(messages, add_generation_prompt)


def template_names() -> list[str]:
    """Names of all templates, without aliases and historical ones, sorted."""
    return sorted({t.name for t in _templates().values() if not t.historical})


def historical_names() -> list[str]:
    """Names of those that reproduce what a historical system trained on, sorted."""
    return sorted({t.name for t in _templates().values() if t.historical})


def get_template(name: str) -> Template:
    """The template of that name or alias.

    Raises:
        RequestError: there is none; the message has the nearest names and all of them.
    """
    templates = _templates()
    if name in templates:
        return templates[name]
    nearest = difflib.get_close_matches(name, templates, n=3, cutoff=0.4)
    raise RequestError(
        f"there is no conversation template {name!r}",
        expected=f"one of {', '.join(template_names())}; or {CHECKPOINT}, the checkpoint's own",
        fix=f"did you mean {' or '.join(nearest)}?" if nearest else "choose one of these names",
    )


def choose_template(
    spec: LlavaSpec, tokenizer: Any, chat_template: str | None, name: str | None = None
) -> ChatTemplate:
    """The template to talk to a checkpoint with.

    In this order: the one asked for by name, the one that the checkpoint names, the checkpoint's
    own Jinja template, and the one that fits its vocabulary and kind of language model. The name
    of its folder plays no part.

    Args:
        spec: the model.
        tokenizer: its tokenizer.
        chat_template: its Jinja chat template, if it brings one.
        name: a template's name or alias, or "checkpoint" for the Jinja template.

    Raises:
        RequestError: no template of that name.
    """
    wanted = name or spec.template
    if wanted and wanted != CHECKPOINT:
        return get_template(wanted)
    if chat_template:
        return CheckpointTemplate(tokenizer, chat_template)
    if wanted:
        raise RequestError(
            "this checkpoint brings no chat template of its own",
            expected=f"one of {', '.join(template_names())}",
            fix="leave the template out, and it is chosen from the checkpoint's content",
        )
    vocabulary = tokenizer.get_vocab()
    for token, kind, fitting in BY_CONTENT:
        if (token is None or token in vocabulary) and kind in (None, spec.text.kind):
            return get_template(fitting)
    raise AssertionError("the last row of BY_CONTENT fits everything")


@cache
def _templates() -> dict[str, Template]:
    """Every template under its name and each of its aliases."""
    source = Path(__file__).with_name("templates.yaml")
    sections = yaml.safe_load(source.read_text(encoding="utf-8"))
    tables = {False: sections["templates"], True: sections["historical"]}
    entries = [
        (name, f | {"historical": h}) for h, table in tables.items() for name, f in table.items()
    ]
    templates: dict[str, Template] = {}
    for name, fields in entries:
        template = _read_template(name, fields)
        for known_as in (name, *template.aliases):
            if templates.setdefault(known_as, template) is not template:
                raise ValueError(f"templates.yaml gives the name {known_as!r} twice")
    return templates


def _read_template(name: str, fields: dict[str, Any]) -> Template:
    """YAML lists become tuples and turns."""
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    values["examples"] = tuple(map(tuple, fields.get("examples", ())))
    for speaker in ("user", "assistant"):
        values[speaker] = Turn(*fields.get(speaker, ()))
    return Template(name=name, **values)
