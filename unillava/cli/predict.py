"""`unillava predict`: answers to a file of questions, resumable."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unillava.cli import flags
from unillava.errors import RequestError

if TYPE_CHECKING:
    from unillava.inference.questions import Question


def register(app: typer.Typer) -> None:
    """Add the sub-command to `app`."""
    app.command("predict")(_predict)


def _predict(
    directory: flags.Directory = None,
    model_path: flags.ModelPath = None,
    base: flags.Base = None,
    vision: flags.Vision = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "--question-file", help="Questions: JSON lines or a JSON list."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--answers-file", help="Answers, as JSON lines.")
    ] = None,
    image_folder: Annotated[
        str | None,
        typer.Option(help="Where relative image paths begin; default: beside the questions."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Questions at a time; the answers do not depend on it.")
    ] = 8,
    num_chunks: Annotated[int, typer.Option(help="Cut the questions into this many parts,")] = 1,
    chunk_idx: Annotated[int, typer.Option(help="and answer this one (from 0).")] = 0,
    on_error: Annotated[
        str, typer.Option(help="A question that cannot be answered: stop, or skip and record it.")
    ] = "stop",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away answers that are there.")
    ] = False,
    backend: flags.Backend = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    template: flags.Template = None,
    temperature: flags.Temperature = None,
    top_p: flags.TopP = None,
    top_k: flags.TopK = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    max_new_tokens: flags.MaxNewTokens = None,
    seed: flags.Seed = None,
    stop: flags.Stop = None,
    compiled: flags.Compile = False,
    num_frames: flags.NumFrames = 8,
) -> None:
    """Answer a file of questions in batches; run it again after an interruption to continue."""
    import unillava
    from unillava.checkpoint import open_checkpoint
    from unillava.inference.answers import AnswerFile
    from unillava.inference.options import Options
    from unillava.inference.predict import predict, run_record
    from unillava.inference.questions import chunk, read_questions

    path = flags.checkpoint_path(directory, model_path)
    _check(data, out, on_error)
    options = Options().replace(
        **flags.given(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop=stop,
        )
    )
    questions = chunk(read_questions(data, image_folder), num_chunks, chunk_idx)
    if on_error == "stop":
        _refuse_problems(questions)
    checkpoint = open_checkpoint(path, base=base, vision=vision)
    run = run_record(
        data,
        checkpoint.directory,
        options,
        template=template,
        dtype=dtype,
        chunk=[num_chunks, chunk_idx],
        num_frames=num_frames,
    )
    answers = AnswerFile(out, [question.id for question in questions])
    answers.open(run, overwrite=overwrite)
    if answers.complete:
        print(f"{out}: complete already, {len(questions)} answers", file=sys.stderr)
        return
    try:
        model = unillava.load(
            path,
            backend=backend,
            device=device,
            dtype=dtype,
            template=template,
            compile=compiled,
            num_frames=num_frames,
            base=base,
            vision=vision,
        )
        started, kept = time.perf_counter(), answers.done
        with _progress(len(questions), kept) as progress:
            failed = predict(
                model,
                questions,
                answers,
                options,
                batch_size=batch_size,
                on_error=on_error,
                progress=progress,
            )
    finally:
        answers.close()
        if answers.done and not answers.complete:
            print(
                f"{answers.partial}: {answers.done} of {len(questions)} answers kept; "
                "the same command continues",
                file=sys.stderr,
            )
    _summary(out, len(questions) - kept, failed, time.perf_counter() - started)


def _check(data: Path | None, out: Path | None, on_error: str) -> None:
    if data is None or out is None:
        raise RequestError(
            "predict needs a file of questions and a file for the answers",
            fix="pass --data questions.jsonl --out answers.jsonl",
        )
    if on_error not in ("stop", "skip"):
        raise RequestError("unknown --on-error", given=on_error, expected="stop or skip")


def _refuse_problems(questions: list[Question]) -> None:
    """Before anything is loaded: what is known to fail."""
    wrong = [question for question in questions if question.problem is not None]
    if wrong:
        if len(wrong) > 1:
            print(f"{len(wrong)} questions cannot be asked; the first:", file=sys.stderr)
        raise wrong[0].failure(wrong[0].problem)


@contextlib.contextmanager
def _progress(total: int, kept: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with rate and remaining time; yields what to call with new answers."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.2f}/s")

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=kept)
        yield lambda count: bar.advance(task, count)


def _summary(out: Path, count: int, failed: int, seconds: float) -> None:
    note = f"; {failed} failed, see metadata.error" if failed else ""
    rate = count / seconds if seconds else 0.0
    print(f"{out}: {count} answers in {seconds:.1f} s ({rate:.2f}/s){note}", file=sys.stderr)
