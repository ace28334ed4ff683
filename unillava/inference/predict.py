"""Answers to a whole file of questions, in batches, with pictures read ahead."""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unillava.data.images import load_image
from unillava.errors import UnillavaError
from unillava.inference.answers import AnswerFile
from unillava.inference.options import Options
from unillava.inference.questions import Question, map_media

if TYPE_CHECKING:
    from unillava.inference.model import Model, Reply

OnError = Literal["stop", "skip"]

READERS = 4
"""Threads that fetch and decode pictures while the model works."""

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
"""Of answer ids: digits and letters that are not mistaken for one another."""

SAMPLE_BYTES, SAMPLES = 1 << 16, 16
"""Weight files are recognised by their size and this many blocks, spread over the file."""


def predict(
    model: Model,
    questions: Sequence[Question],
    answers: AnswerFile,
    options: Options,
    *,
    batch_size: int = 8,
    on_error: OnError = "stop",
    progress: Callable[[int], None] = lambda count: None,
) -> int:
    """Answer what `answers` does not hold yet, in the order of the questions.

    Args:
        model: what answers.
        questions: those that `answers` was opened for.
        answers: an opened file; finished when this returns.
        options: of every reply.
        batch_size: questions at a time; answers do not depend on it.
        on_error: stop: raise at the first question that cannot be answered, with the answers
            before it kept; skip: record the error in its `metadata` and go on.
        progress: called with the number of answers that have been added.

    Returns:
        How many of the questions answered by this call failed.

    Raises:
        UnillavaError: naming the question, with on_error stop.
    """
    failed = 0
    name = model_name(model.checkpoint.directory)
    for batch in _read_ahead(questions[answers.done :], batch_size):
        for group in _replies(model, batch, options, on_error):
            answers.append([_answer(question, result, name) for question, result in group])
            failed += sum(isinstance(result, UnillavaError) for _, result in group)
            progress(len(group))
    answers.finish()
    return failed


def model_name(directory: Path) -> str:
    """As LLaVA names models in answer files: the folder, with its parent for `checkpoint-N`."""
    directory = Path(directory).resolve()
    if directory.name.startswith("checkpoint-"):
        return f"{directory.parent.name}_{directory.name}"
    return directory.name


def model_digest(directory: Path) -> str:
    """A fingerprint of a checkpoint's content: small files whole, of weights size and samples."""
    digest = hashlib.sha256()
    directory = Path(directory)
    for path in sorted(directory.iterdir()) if directory.is_dir() else [directory]:
        if path.is_file() and not path.name.startswith(".") and path.suffix.lower() != ".md":
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            stride = max(SAMPLE_BYTES, size // SAMPLES)
            with open(path, "rb") as file:
                for start in range(0, size, stride):
                    file.seek(start)
                    digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


Ready = tuple[Question, dict[str, Any] | UnillavaError]
"""A question with its pictures read, or why that failed."""


def _read_ahead(questions: Sequence[Question], batch_size: int) -> Iterator[list[Ready]]:
    """Batches whose pictures are loaded; the next batch is read while one is worked on."""
    with ThreadPoolExecutor(READERS) as pool:
        reading: list[Future[Ready]] = []
        for start in range(0, len(questions), batch_size):
            following = [pool.submit(_read, q) for q in questions[start : start + batch_size]]
            if reading:
                yield [future.result() for future in reading]
            reading = following
        if reading:
            yield [future.result() for future in reading]


def _read(question: Question) -> Ready:
    if question.problem is not None:
        return question, question.problem
    try:
        return question, map_media(question.request, _decoded)
    except UnillavaError as error:
        return question, error


def _decoded(kind: str, source: Any) -> Any:
    return load_image(source) if kind == "image" else source


def _replies(
    model: Model, batch: list[Ready], options: Options, on_error: OnError
) -> Iterator[list[tuple[Question, Reply | UnillavaError]]]:
    """The results of a batch: in one group, or one by one if a question spoils the whole."""
    if on_error == "stop":
        for n, (question, request) in enumerate(batch):
            if isinstance(request, UnillavaError):
                yield from _replies(model, batch[:n], options, on_error)
                raise question.failure(request) from request
    good = [request for _, request in batch if not isinstance(request, UnillavaError)]
    try:
        replies = iter(model.generate(good, options, batch_size=max(1, len(good))))
    except UnillavaError:
        for question, request in batch:
            result = _single(model, request, options)
            if isinstance(result, UnillavaError) and on_error == "stop":
                raise question.failure(result) from result
            yield [(question, result)]
        return
    yield [
        (question, request if isinstance(request, UnillavaError) else next(replies))
        for question, request in batch
    ]


def _single(
    model: Model, request: dict[str, Any] | UnillavaError, options: Options
) -> Reply | UnillavaError:
    if isinstance(request, UnillavaError):
        return request
    try:
        return model.generate([request], options)[0]
    except UnillavaError as error:
        return error


def _answer(question: Question, result: Reply | UnillavaError, name: str) -> dict[str, Any]:
    """A line of the answer file."""
    failed = isinstance(result, UnillavaError)
    text = "" if failed else result.text
    return {
        "question_id": question.id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": _answer_id(name, question, text),
        "model_id": name,
        "metadata": {"error": str(result)} if failed else {},
    }


def _answer_id(name: str, question: Question, text: str) -> str:
    """22 characters like those of LLaVA's files, but the same whenever the answer is the same."""
    content = "\0".join((name, question.where, str(question.id), question.prompt, text))
    number = uuid.uuid5(uuid.NAMESPACE_URL, content).int
    digits = []
    for _ in range(22):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def run_record(
    questions_path: Path, checkpoint: Path, options: Options, **settings: Any
) -> dict[str, Any]:
    """What answers depend on, for `AnswerFile.open`."""
    return {
        "questions": hashlib.sha256(Path(questions_path).read_bytes()).hexdigest(),
        "model": model_digest(checkpoint),
        **dataclasses.asdict(options),
        **settings,
    }
