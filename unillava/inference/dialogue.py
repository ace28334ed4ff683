"""A conversation of several turns with one model: history, pictures still to be sent, new start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unillava.data.images import load_image
from unillava.data.sources import describe
from unillava.errors import MediaError

if TYPE_CHECKING:
    from unillava.inference.model import Model, Reply


class Dialogue:
    """Turns are recorded when a reply ends, also when the reader stops reading it halfway."""

    def __init__(
        self, model: Model, *, system: str | None = None, options: dict[str, Any] | None = None
    ) -> None:
        """`options`: fields of `unillava.inference.options.Options` for every reply."""
        self.model, self.options = model, options or {}
        self._system = [{"role": "system", "content": system}] if system else []
        self._opening: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget what was said. Media of the opening are sent again with the next turn."""
        self.messages: list[dict[str, Any]] = list(self._system)
        self.attached: list[dict[str, Any]] = list(self._opening)
        self.reply: Reply | None = None

    def attach(self, kind: str, source: str, *, opening: bool = False) -> None:
        """Send an image or a video with the next turn.

        An image is read at once (so an address is fetched only once).

        Args:
            kind: image or video.
            source: path or URL.
            opening: part of the opening, which `reset` returns to.

        Raises:
            MediaError: the file is absent, or the image cannot be read.
        """
        part: dict[str, Any] = {"type": kind, kind: source}
        if kind == "image":
            part[kind] = load_image(source)
        elif "://" not in source and not Path(source).expanduser().exists():
            raise MediaError("there is no such file", given=describe(source))
        self.attached.append(part)
        if opening:
            self._opening.append(part)

    def say(self, text: str) -> Iterator[str]:
        """One turn: the reply's text piece by piece; afterwards `reply` holds it whole.

        Closing the iterator early keeps what was said so far as the reply. After an error the
        turn is not recorded and the attached media stay attached.

        Raises:
            UnillavaError: the model cannot carry out this turn.
        """
        question = {"role": "user", "content": [*self.attached, {"type": "text", "text": text}]}
        before = self.messages
        self.reply = None
        said = ""
        try:
            stream = self.model.stream({"messages": [*before, question]}, **self.options)
            while True:
                try:
                    piece = next(stream)
                except StopIteration as end:
                    self.reply = end.value
                    break
                said += piece
                yield piece
        finally:
            if self.reply is not None:
                self.messages, self.attached = list(self.reply.history), []
            elif said:
                answer = {"role": "assistant", "content": said}
                self.messages, self.attached = [*before, question, answer], []
