"""From rendered text to token ids, and which of them are to be learnt.

A conversation is tokenised once, as a whole. A token is learnt iff its last character lies in one
of the spans that the template gave, so labels need no knowledge of any tokenizer's habits.

Text that people or the model wrote stays text: where it spells a control token (`</s>` in a
question about HTML) the spelling is cut after its first character, so that the tokenizer sees two
harmless pieces. (Tokenizers of the old LLaMA kind put a space at the cut.)

If the tokenizer does not know `<image>`, the original LLaVA's rule holds: what stands between the
markers is tokenised piece by piece, with one BOS at the very beginning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from unillava.data.messages import (
    MARKERS,
    Rendered,
    Span,
    control_strings,
    marker_places,
    occurrences,
    touches,
)
from unillava.errors import ConfigError, RequestError
from unillava.spec import LlavaSpec

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""How sentencepiece writes a byte that stands for part of a character."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids; every image and video is still one marker."""

    ids: np.ndarray
    """int64 [n]."""
    learnt: np.ndarray
    """bool [n]: the tokens that the assistant is to produce."""


def encode(tokenizer: Any, rendered: Rendered, spec: LlavaSpec) -> Encoded:
    """Tokenise a conversation once.

    Args:
        tokenizer: of transformers, fast or slow, with or without the markers in its vocabulary.
        rendered: what a template made of the messages.
        spec: gives the ids that images and videos have in the sequence.

    Raises:
        RequestError: a video for a model without video; or text that cannot be tokenised so that
            tokens and characters are known to correspond.
        ConfigError: tokenizer and config.json give a marker different ids.
    """
    marker_ids = _marker_ids(rendered, spec)
    added = tokenizer.get_added_vocab()
    _check_agreement(added, marker_ids)
    learnt = np.zeros(len(rendered.text), bool)
    for start, end in rendered.spans:
        learnt[start:end] = True
    cuts = _cuts(rendered, tokenizer, added)
    pieces: list[Encoded] = []
    start = 0
    for place, marker in [*_unknown_markers(rendered, added), (len(rendered.text), "")]:
        chunk = _Chunk(rendered.text, learnt, (start, place), cuts)
        pieces.append(chunk.encode(tokenizer, is_aligned=bool(rendered.spans)))
        if marker:
            pieces.append(Encoded(np.array([marker_ids[marker]], np.int64), np.zeros(1, bool)))
        start = place + len(marker)
    encoded = Encoded(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.learnt for piece in pieces]),
    )
    encoded = _with_bos(tokenizer, encoded)
    _check_markers(rendered, encoded, marker_ids)
    if rendered.segments:
        encoded = Encoded(encoded.ids, _learnt_by_segments(tokenizer, rendered, spec, encoded))
    if rendered.learnt_tokens:
        everywhere = np.isin(encoded.ids, _single_ids(tokenizer, rendered.learnt_tokens))
        encoded = Encoded(encoded.ids, encoded.learnt | everywhere)
    return encoded


def _learnt_by_segments(
    tokenizer: Any, rendered: Rendered, spec: LlavaSpec, encoded: Encoded
) -> np.ndarray:
    """LLaVA's first rule, to which all models of its kind v0 were trained.

    Each segment is tokenised on its own, BOS included, only to be counted; so the counts need not
    fit the whole. Of a masked turn the first two tokens are learnt; whatever follows the last
    segment is, too.
    """
    learnt = np.ones(len(encoded.ids), bool)
    start = cursor = 0
    for n, (end, is_masked) in enumerate(rendered.segments):
        count = len(encode(tokenizer, rendered.stretch(start, end), spec).ids)
        if is_masked:
            learnt[cursor + (2 if n else 0) : cursor + count] = False
        start, cursor = end, cursor + count
    return learnt


def _single_ids(tokenizer: Any, strings: tuple[str, ...]) -> list[int]:
    ids = []
    for string in strings:
        found = tokenizer(string, add_special_tokens=False).input_ids
        if len(found) != 1:
            raise RequestError(
                "this template does not fit the tokenizer",
                given=f"{string!r} is {len(found)} tokens",
                expected="one token",
                fix="choose a template that fits the language model",
            )
        ids += found
    return ids


def _marker_ids(rendered: Rendered, spec: LlavaSpec) -> dict[str, int]:
    """Marker -> id, of the markers that stand in the text."""
    known = {"image": spec.image_token, "video": spec.video_token}
    ids = {}
    for _, kind in marker_places(rendered):
        number = known[kind]
        if number is None:
            raise RequestError(
                f"this model has no token for a {kind}",
                given=f"a {kind} in the conversation, model family {spec.family}",
                fix=f"leave the {kind} out, or use a model that takes {kind}s",
            )
        ids[MARKERS[kind]] = number
    return ids


def _check_agreement(added: dict[str, int], marker_ids: dict[str, int]) -> None:
    for marker, number in marker_ids.items():
        if added.get(marker, number) != number:
            raise ConfigError(
                f"tokenizer and config.json disagree about {marker}",
                given=f"{added[marker]} in the tokenizer, {number} in config.json",
                expected="one id",
                fix="use the tokenizer files that belong to this checkpoint",
            )


def _check_markers(rendered: Rendered, encoded: Encoded, marker_ids: dict[str, int]) -> None:
    places = [MARKERS[kind] for _, kind in marker_places(rendered)]
    for marker, number in marker_ids.items():
        written, expected = int((encoded.ids == number).sum()), places.count(marker)
        if written != expected:
            raise RequestError(
                f"the tokenizer did not keep every {marker} as one token",
                given=f"{written} tokens of id {number}",
                expected=f"{expected}",
                fix="check the tokenizer's added tokens",
            )


def _unknown_markers(rendered: Rendered, added: dict[str, int]) -> list[tuple[int, str]]:
    """(start, marker) of those that the tokenizer does not know, in order."""
    places = ((start, MARKERS[kind]) for start, kind in marker_places(rendered))
    return [(start, marker) for start, marker in places if marker not in added]


def _with_bos(tokenizer: Any, encoded: Encoded) -> Encoded:
    """With the BOS that the tokenizer would put first, unless the template has written one."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("").input_ids[:1] != [bos] or encoded.ids[:1].tolist() == [bos]:
        return encoded
    return Encoded(np.insert(encoded.ids, 0, bos), np.insert(encoded.learnt, 0, False))


def _cuts(rendered: Rendered, tokenizer: Any, added: dict[str, int]) -> dict[int, str]:
    """Place -> control string: literals that spell it are cut there, after its first character."""
    spelt = occurrences(rendered.text, control_strings(tokenizer))
    return {
        start + 1: string
        for start, string in spelt
        if string in added and touches(start, start + len(string), rendered.literals)
    }


class _Chunk:
    """A stretch of text that is tokenised in one go.

    A cut is made by writing the control string itself there: whatever the tokenizer is, it splits
    at its own control tokens. The token of each is dropped afterwards.
    """

    def __init__(self, text: str, learnt: np.ndarray, span: Span, cuts: dict[int, str]) -> None:
        start, end = span
        strings, flags, self._dropped = [], [], {}
        written = 0
        for cut in [*(place for place in sorted(cuts) if start < place < end), end]:
            strings.append(text[start:cut])
            flags.append(learnt[start:cut])
            written += cut - start
            if cut < end:
                strings.append(cuts[cut])
                flags.append(np.zeros(len(cuts[cut]), bool))
                self._dropped[written + len(cuts[cut]) - 1] = cuts[cut]
                written += len(cuts[cut])
            start = cut
        self._text = "".join(strings)
        self._learnt = np.concatenate(flags)

    def encode(self, tokenizer: Any, is_aligned: bool) -> Encoded:
        """The tokens of this stretch, without those that made the cuts."""
        if not self._text:
            return Encoded(np.empty(0, np.int64), np.empty(0, bool))
        ids, last = _tokenise(tokenizer, self._text, is_aligned or bool(self._dropped))
        kept = np.ones(len(ids), bool)
        for place, string in self._dropped.items():
            cut = (last == place) & (ids == tokenizer.convert_tokens_to_ids(string))
            if cut.sum() != 1:
                raise RequestError(
                    "the text spells a control token that cannot be kept from the tokenizer",
                    given=string,
                    fix="write it differently in the message",
                )
            kept &= ~cut
        return Encoded(ids[kept], self._learnt[last[kept]])


def _tokenise(tokenizer: Any, text: str, is_aligned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and for each the place of the last character that it stands for; both int64 [n]."""
    if tokenizer.is_fast:
        encoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = np.array(encoding.offset_mapping, np.int64).reshape(-1, 2)
        return np.array(encoding.input_ids, np.int64), np.maximum(offsets[:, 1] - 1, offsets[:, 0])
    pieces = tokenizer.tokenize(text)
    ids = np.array(tokenizer.convert_tokens_to_ids(pieces), np.int64)
    return ids, _align(pieces, text) if is_aligned else np.zeros(len(ids), np.int64)


def _align(pieces: list[str], text: str) -> np.ndarray:
    """For each piece of a slow sentencepiece tokenizer the place of its last character.

    Pieces are matched with the text byte by byte; a space that the tokenizer put before a piece,
    or dropped from the text, is allowed for.
    """
    data = text.replace("▁", " ").encode()  # sentencepiece does not tell the two apart
    # character_at[b]: the character that byte b belongs to
    character_at = np.cumsum([(byte & 0xC0) != 0x80 for byte in data]) - 1
    places, cursor = [], 0
    for piece in pieces:
        start, length = _match(piece, data, cursor)
        cursor = start + length
        # A piece that stands for no character (an added space) belongs to the next one.
        place = cursor - 1 if length else cursor
        places.append(min(place, len(data) - 1))
    return character_at[np.array(places, np.int64)]


def _match(piece: str, data: bytes, cursor: int) -> tuple[int, int]:
    """Where in `data`, from `cursor` on, the piece stands: (start, length)."""
    byte = BYTE_PIECE.fullmatch(piece)
    written = bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
    spaces = len(data[cursor:]) - len(data[cursor:].lstrip(b" "))
    for start in (cursor, cursor + spaces):
        for form in (written, written.lstrip(b" ")):
            if data.startswith(form, start):
                return start, len(form)
    raise RequestError(
        "cannot tell which characters this tokenizer's tokens stand for",
        given=f"the piece {piece!r} at {data[cursor : cursor + 20].decode(errors='replace')!r}",
        fix="use the checkpoint's fast tokenizer (tokenizer.json)",
    )
