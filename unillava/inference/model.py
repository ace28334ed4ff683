"""The model object that people use: chat, generate, stream, logits."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import backends
from backends import runtime
from unillava.checkpoint import Checkpoint
from unillava.data.collate import TEXT, Sample, collate
from unillava.data.pipeline import Pipeline
from unillava.data.request import self_contained
from unillava.inference.engine import Engine, greedy
from unillava.inference.options import Options
from unillava.inference.sampling import Sampler
from unillava.inference.text import ReplyStream, stop_token_ids


@dataclass(frozen=True)
class Reply:
    """What the assistant said."""

    text: str
    tokens: list[int]
    """Generated ids, with the token that ended the reply, if one did."""
    finish: str
    """`stop`: the model or a stop string ended it; `length`: the limit did."""
    prompt_tokens: int
    """Positions of the merged prompt, picture rows included."""
    history: list[dict] = field(default_factory=list)
    """The messages of the conversation, this reply last; the next `chat` takes it."""


class Model:
    """A checkpoint on the chosen backend."""

    def __init__(
        self, checkpoint: Checkpoint, network: Any, pipeline: Pipeline, *, compiled: bool = False
    ) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.spec
        self.network, self.pipeline = network, pipeline
        self.engine = Engine(network, checkpoint.spec, compiled=compiled)
        self.stop_ids = stop_token_ids(pipeline.tokenizer, pipeline.template.stop)
        self.stop_ids |= set(checkpoint.eos_token_ids)

    def __repr__(self) -> str:
        device, dtype = runtime.current()
        return (
            f"<unillava {self.spec.family}: {self.checkpoint.directory} on {backends.NAME} "
            f"({device}, {dtype}), template {self.pipeline.template.name}>"
        )

    def logits(self, request: dict) -> np.ndarray:
        """Logits of every position of the merged sequence, float32 [S, V].

        Raises RequestError or MediaError as `Pipeline.prepare` does.
        """
        sample = self.pipeline.prepare(request, generate=_asks_for_reply(request))
        batch = collate([sample], pad_to=self.engine.pad_to)
        return self.engine.logits(batch)[0, : len(sample)]

    def chat(
        self,
        text: str,
        image: Any = None,
        video: Any = None,
        history: Sequence[dict] | None = None,
        **options: Any,
    ) -> Reply:
        """One turn of a conversation.

        Args:
            text: what the user says; `<image>` places a picture, else pictures come first.
            image: a path, URL or PIL image, or a list of them.
            video: a path, folder of frames or URL, or a list of them.
            history: `Reply.history` of the turn before.
            options: fields of `Options`.
        """
        request = {"messages": [*(history or []), user_message(text, image, video)]}
        return self.generate([request], **options)[0]

    def generate(
        self,
        requests: Sequence[dict],
        options: Options | None = None,
        *,
        batch_size: int = 8,
        **overrides: Any,
    ) -> list[Reply]:
        """A reply to each request, in order. What a reply is does not depend on its batch."""
        options = (options or Options()).replace(**overrides)
        replies: list[Reply] = []
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            samples = [self.pipeline.prepare(request) for request in part]
            replies += _drain(self._run(part, samples, options))
        return replies

    def stream(
        self, request: dict, options: Options | None = None, **overrides: Any
    ) -> Generator[str, None, Reply]:
        """The reply's text piece by piece; the generator's return value is the Reply."""
        options = (options or Options()).replace(**overrides)
        running = self._run([request], [self.pipeline.prepare(request)], options)
        replies = yield from _texts(running)
        return replies[0]

    def _run(
        self, requests: Sequence[dict], samples: Sequence[Sample], options: Options
    ) -> Generator[tuple[int, str], None, list[Reply]]:
        """Generate for one batch; yields (row, piece of text), returns the replies."""
        rows = [self._row(sample, options) for sample in samples]
        batch = collate(samples, pad_to=self.engine.pad_to)
        state, logits_BV = self.engine.start(batch, max(row.room for row in rows))
        plain = options.temperature == 0 and options.repetition_penalty == 1
        while True:
            tokens_B = greedy(logits_BV) if plain else _sample(rows, runtime.numpy(logits_BV))
            for n, row in enumerate(rows):
                text = row.take(int(tokens_B[n]))
                if text:
                    yield n, text
            if all(row.finish for row in rows):
                break
            logits_BV = self.engine.step(state, tokens_B)
        return [row.reply(r, s) for row, r, s in zip(rows, requests, samples, strict=True)]

    def _row(self, sample: Sample, options: Options) -> _Row:
        # The last token chosen needs no position of its own.
        room = self.spec.text.max_position - len(sample) + 1
        prompt_ids = sample.ids_S[sample.kind_S == TEXT]
        stops = (*options.stop, *self.pipeline.template.stop)
        return _Row(
            Sampler(options, prompt_ids.tolist()),
            ReplyStream(self.pipeline.tokenizer, stops, self.stop_ids),
            min(options.max_new_tokens, room),
        )


@dataclass
class _Row:
    """One reply while it is generated."""

    sampler: Sampler
    stream: ReplyStream
    room: int
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    held: str = ""
    finish: str = ""

    def take(self, token: int) -> str:
        """Record a token; the text it sets free. Nothing once the reply is finished."""
        if self.finish:
            return ""
        self.tokens.append(token)
        text = self.stream.push(token)
        if self.stream.stopped:
            self.finish = "stop"
        elif len(self.tokens) == self.room:
            self.finish = "length"
        if self.finish:
            text += self.stream.finish()
        # White space leaves with what follows it, so that the pieces, joined, are the reply:
        # without any at its beginning and end.
        text = self.held + text
        ready = text.rstrip()
        self.held = text[len(ready) :]
        ready = ready if self.pieces else ready.lstrip()
        if ready:
            self.pieces.append(ready)
        return ready

    def reply(self, request: dict, sample: Sample) -> Reply:
        text = "".join(self.pieces)
        history = [*self_contained(request), {"role": "assistant", "content": text}]
        return Reply(text, self.tokens, self.finish, len(sample), history)


def user_message(text: str, image: Any = None, video: Any = None) -> dict:
    """A user message with pictures; they come first unless `text` places them."""
    images, videos = _as_list(image), _as_list(video)
    media = [{"type": "image", "image": source} for source in images]
    media += [{"type": "video", "video": source} for source in videos]
    return {"role": "user", "content": [*media, {"type": "text", "text": text}] if media else text}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _asks_for_reply(request: dict) -> bool:
    messages = request.get("messages") or [{}]
    return messages[-1].get("role") != "assistant"


def _sample(rows: Sequence[_Row], logits_BV: np.ndarray) -> np.ndarray:
    picks = [
        0 if row.finish else row.sampler.pick(logits_V)
        for row, logits_V in zip(rows, logits_BV, strict=True)
    ]
    return np.array(picks, np.int64)


def _texts(
    running: Generator[tuple[int, str], None, list[Reply]],
) -> Generator[str, None, list[Reply]]:
    """The texts alone; hands on the return value."""
    while True:
        try:
            yield next(running)[1]
        except StopIteration as finished:
            return finished.value


def _drain(running: Generator[Any, None, list[Reply]]) -> list[Reply]:
    while True:
        try:
            next(running)
        except StopIteration as finished:
            return finished.value
