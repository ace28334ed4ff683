"""Tokens to text while they are being generated.

Text leaves only when later tokens can no longer change it: never half a character, never a lost
space, never the beginning of a stop string. What has left, joined, is what decoding all tokens at
once would give.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from unillava.data.messages import control_strings

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
REPLACEMENT = "\ufffd"


def decode(tokenizer: Any, ids: Iterable[int]) -> str:
    """Tokens as text without special tokens; spaces are left as the model wrote them."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_token_ids(tokenizer: Any, stop: Iterable[str] = ()) -> set[int]:
    """Ids that end a reply: the tokenizer's end of sequence, and stop strings that are tokens."""
    controls = set(control_strings(tokenizer))
    ids = {tokenizer.convert_tokens_to_ids(string) for string in stop if string in controls}
    return (ids | {tokenizer.eos_token_id}) - {None, tokenizer.unk_token_id}


class IncrementalDecoder:
    """Turns tokens into text one by one; joined, it equals `decode` of all of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._skipped = _special_ids(tokenizer)
        # Only the newest tokens are decoded again. The first `sent` of them have become text
        # already, `known`; they are the context that decides about spaces.
        self._window: list[int] = []
        self._sent = 0
        self._known = ""

    def push(self, token: int) -> str:
        """The text that this token completes; empty while it is not certain."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        if BYTE_PIECE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            # A run of bytes is decoded as a whole, and one wrong byte spoils all of it.
            return ""
        text = decode(self._tokenizer, self._window)
        return "" if text.endswith(REPLACEMENT) else self._send(text)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return self._send(decode(self._tokenizer, self._window))

    def _send(self, text: str) -> str:
        """What the text of the window has beyond the known."""
        new = text[len(self._known) :]
        if new.strip():
            # What was context is not needed any more; the new text is enough of it.
            del self._window[: self._sent]
            text = decode(self._tokenizer, self._window)
        self._sent, self._known = len(self._window), text
        return new


class StopChecker:
    """Cuts a stream of text before the first stop string.

    First is the one that is complete first, and of those the longest; so the result does not
    depend on how the text is divided among the calls.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._strings = sorted({string for string in strings if string})
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may leave; what could still become a stop string is held back."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [
            (place + len(string), place)
            for string in self._strings
            if (place := text.find(string)) >= 0
        ]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = len(text) - max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


class ReplyStream:
    """The text of one reply while its tokens are generated, up to where it ends."""

    def __init__(
        self, tokenizer: Any, stop: Iterable[str] = (), stop_ids: Iterable[int] | None = None
    ) -> None:
        """
        Args:
            tokenizer: of the model.
            stop: strings that end the reply; they may be spread over several tokens.
            stop_ids: tokens that end it; by default `stop_token_ids(tokenizer, stop)`.
        """
        stop = tuple(stop)
        self._decoder = IncrementalDecoder(tokenizer)
        self._checker = StopChecker(stop)
        self._stop_ids = stop_token_ids(tokenizer, stop) if stop_ids is None else set(stop_ids)
        self._ended = False

    @property
    def stopped(self) -> bool:
        """Whether a stop token or a stop string has come: no further tokens are wanted."""
        return self._ended or self._checker.stopped

    def push(self, token: int) -> str:
        """The text that this token sets free. Stop tokens and strings are not part of it."""
        if self.stopped:
            return ""
        if token in self._stop_ids:
            self._ended = True
            return ""
        return self._checker.push(self._decoder.push(token))

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        text = self._checker.push(self._decoder.finish())
        return text + self._checker.finish()


def _special_ids(tokenizer: Any) -> set[int]:
    """The tokens that `decode` leaves out."""
    if tokenizer.is_fast:
        return {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids)


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
