"""The findings about training data as a page that needs nothing beside itself."""

from __future__ import annotations

import base64
import contextlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

import unillava
from unillava.data.check import PROBLEMS, REMARKS, Checker
from unillava.data.check_report import EXAMPLES, Report
from unillava.data.conversation import render
from unillava.data.images import load_image
from unillava.data.lengths import token_lengths
from unillava.data.records import MODALITIES
from unillava.data.request import normalise
from unillava.data.tokens import Encoded, encode
from unillava.data.video import load_frames
from unillava.errors import UnillavaError

THUMBNAIL = 240
"""Longer side of a picture on the page, in pixels."""
MOST_PICTURES = 4
"""Of one record."""
LONGEST_PIECE = 1200
"""Characters of a stretch of text that are shown."""
MOST_PIECES = 60
"""Stretches of a record that are shown."""
BINS = 40
WIDE, NARROW = (960, 260), (380, 240)
"""Sizes of a plot on a desk and on a telephone, in pixels."""
MARGINS = (16, 12, 34, 52)
"""Of a plot: top, right, bottom, left."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample's tokens."""

    text: str
    learnt: bool
    medium: bool = False


@dataclass(frozen=True)
class Shown:
    """A record with its pictures and what is learnt of it."""

    where: str
    id: Any
    pictures: list[str]
    """As data: URIs."""
    more_pictures: int
    pieces: list[Piece]
    tokens: int
    learnt: int


# --- samples ---------------------------------------------------------------------------------


def choose_samples(report: Report, count: int, seed: int = 0) -> list[int]:
    """Records for the page: the longest, the shortest, and others of every modality by chance."""
    sound = np.flatnonzero(report.mendable & (report.tokens > 0))
    if not len(sound) or not count:
        return []
    by_length = sound[np.argsort(report.tokens[sound], kind="stable")]
    chosen = [int(by_length[-1]), int(by_length[0])]
    source = random.Random(seed)
    pools = [sound[report.records.modality[sound] == n].tolist() for n in range(len(MODALITIES))]
    for pool in pools:
        source.shuffle(pool)
    while len(chosen) < count and any(pools):
        for pool in filter(None, pools):
            chosen.append(pool.pop())
    return list(dict.fromkeys(chosen))[:count]


def show(checker: Checker, number: int) -> Shown:
    """What training makes of a sound record.

    Raises:
        UnillavaError: it cannot be prepared.
    """
    pipeline, records = checker.pipeline, checker.records
    request, name = records.request(number, checker.settings.placement)
    messages, images, videos = normalise(request)
    encoded = encode(pipeline.tokenizer, render(pipeline.template, messages), pipeline.spec)
    pictures = [load_image(source) for source in images[:MOST_PICTURES]]
    for source in videos[: MOST_PICTURES - len(pictures)]:
        pictures += load_frames(source, 1)[0]
    sizes = [picture.size[::-1] for picture in pictures[: len(images)]]
    sizes += [load_image(source).size[::-1] for source in images[MOST_PICTURES:]]
    lengths = token_lengths(pipeline, encoded, sizes, len(videos))
    return Shown(
        where=records.where(number),
        id=name,
        pictures=[_data_uri(picture) for picture in pictures],
        more_pictures=len(images) + len(videos) - len(pictures),
        pieces=_shortened(_pieces(pipeline.tokenizer, encoded, lengths, pipeline.spec)),
        tokens=int(lengths.sum()),
        learnt=int(encoded.learnt[1:].sum()),
    )


def _pieces(tokenizer: Any, encoded: Encoded, lengths: np.ndarray, spec: Any) -> list[Piece]:
    """Neighbouring tokens that are treated alike, as text."""
    names = {spec.image_token: "image", spec.video_token: "video"}
    pieces: list[Piece] = []
    run: list[int] = []
    learnt = False
    for number, is_learnt, length in zip(encoded.ids, encoded.learnt, lengths, strict=True):
        name = names.get(int(number))
        if run and (name or is_learnt != learnt):
            pieces.append(Piece(_text(tokenizer, run), bool(learnt)))
            run = []
        if name:
            pieces.append(Piece(f"{name}: {length} tokens", False, medium=True))
        else:
            run, learnt = [*run, int(number)], is_learnt
    return [*pieces, Piece(_text(tokenizer, run), bool(learnt))] if run else pieces


def _shortened(pieces: list[Piece]) -> list[Piece]:
    left_out = len(pieces) - MOST_PIECES
    if left_out <= 0:
        return pieces
    return [*pieces[: MOST_PIECES - 1], Piece(f"{left_out + 1} more pieces", False, medium=True)]


def _text(tokenizer: Any, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    first = tokenizer.convert_ids_to_tokens(ids[:1])[0]
    # sentencepiece drops the space before the first word.
    text = " " + text if first.startswith("▁") and not text.startswith(" ") else text
    if len(text) <= LONGEST_PIECE:
        return text
    half = LONGEST_PIECE // 2
    return f"{text[:half]} […{len(text) - 2 * half} characters…] {text[-half:]}"


def _data_uri(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


# --- numbers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens of all samples whose length is known."""

    samples: int
    total: int
    of_media: int
    learnt: int
    shortest: int
    median: int
    percentile_95: int
    longest: int
    max_length: int | None
    too_long: int
    """Samples that are longer than `max_length`."""
    lost: int
    """Learnt tokens of theirs behind it."""

    def words(self) -> dict[str, str]:
        """The same for people."""
        told = {
            "tokens": f"{self.total:,} in {self.samples:,} samples",
            "of images and videos": f"{self.of_media:,} ({self.of_media / self.total:.1%})",
            "learnt": f"{self.learnt:,} ({self.learnt / self.total:.1%})",
            "tokens per sample": f"{self.shortest:,} to {self.longest:,}; half of them up to "
            f"{self.median:,}, 95 % up to {self.percentile_95:,}",
        }
        if self.max_length is not None:
            told["longest length"] = f"{self.max_length:,}: {self.too_long:,} samples are longer"
        if self.lost:
            share = self.lost / self.learnt
            told["lost by cutting"] = f"{self.lost:,} learnt tokens ({share:.2%})"
        return told


def count_tokens(report: Report) -> Tokens | None:
    """None if no sample's length is known."""
    known = report.is_counted
    lengths = report.tokens[known]
    if not len(lengths):
        return None
    limit = report.max_length
    quarters = np.percentile(lengths, [0, 50, 95, 100]).astype(int).tolist()
    return Tokens(
        len(lengths),
        int(lengths.sum(dtype=np.int64)),
        int(report.picture_tokens[known].sum(dtype=np.int64)),
        int(report.learnt[known].sum(dtype=np.int64)),
        *quarters,
        max_length=limit,
        too_long=0 if limit is None else int((lengths > limit).sum()),
        lost=report.lost,
    )


@dataclass(frozen=True)
class Histogram:
    """Lengths of samples in tokens."""

    counts: np.ndarray
    """int64 [modalities, bins]."""
    edges: np.ndarray
    """float64 [bins + 1], from 0."""
    is_open: bool
    """The last bin holds everything that is longer, too."""


def histogram(report: Report, bins: int = BINS) -> Histogram:
    """A few samples that are far longer than the others share the last bin."""
    lengths = report.tokens[report.is_counted]
    modality = report.records.modality[report.is_counted]
    usual, most = (max(int(n), 1) for n in np.percentile(lengths, [99, 100]))
    is_open = most > 4 * usual
    top = _round_up(2 * usual if is_open else most, bins)
    edges = np.linspace(0, top, bins + 1)
    inside = np.minimum(lengths, top)
    rows = [np.histogram(inside[modality == n], edges)[0] for n in range(len(MODALITIES))]
    return Histogram(np.stack(rows), edges, is_open)


def _round_up(value: int, bins: int) -> int:
    """So that every bin is a round number of tokens wide."""
    width = max(-(-value // bins), 1)
    unit = 10 ** (len(str(width)) - 1)
    return next(unit * n for n in range(1, 11) if unit * n >= width) * bins


def plot(report: Report, width: int, height: int) -> Markup:
    """The histogram as an <svg> element; colours come from the page's style sheet."""
    found = histogram(report)
    counts, edges = found.counts, found.edges
    top, right, bottom, left = MARGINS
    across, down = width - left - right, height - top - bottom
    highest = int(counts.sum(0).max(initial=1)) or 1
    span = edges[-1]

    def x(tokens: float) -> float:
        return round(left + across * tokens / span, 1)

    def y(count: float) -> float:
        return round(top + down * (1 - count / highest), 1)

    shapes = []
    for share in (0, 0.5, 1):
        at = y(highest * share)
        shapes.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at}" y2="{at}"/>')
        shapes.append(_label(left - 6, at + 4, f"{round(highest * share):,}", "end"))
    below = np.zeros(len(edges) - 1, np.int64)
    for n, row in enumerate(counts):
        for k in np.flatnonzero(row):
            low, high = y(below[k]), y(below[k] + row[k])
            told = f"{edges[k]:,.0f} to {edges[k + 1]:,.0f} tokens: {row[k]:,} {MODALITIES[n]}"
            shapes.append(
                f'<rect class="m{n}" x="{x(edges[k])}" y="{high}" '
                f'width="{max(across / len(row) - 1, 1):.1f}" height="{max(low - high, 0.5):.1f}">'
                f"<title>{escape(told)}</title></rect>"
            )
        below += row
    for share in np.linspace(0, 1, 5 if width > 600 else 3):
        anchor = {0: "start", 1: "end"}.get(share, "middle")
        more = " and more" if share == 1 and found.is_open else ""
        shapes.append(_label(x(span * share), height - 16, f"{span * share:,.0f}{more}", anchor))
    shapes.append(_label(left + across / 2, height - 2, "tokens per sample", "middle"))
    if report.max_length is not None and report.max_length <= span:
        at = x(report.max_length)
        shapes.append(f'<line class="limit" x1="{at}" x2="{at}" y1="{top}" y2="{top + down}"/>')
    told = "Histogram of sample lengths in tokens"
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{told}">'
    return Markup("\n".join([head, *shapes, "</svg>"]))


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="axis" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
    )


# --- the page --------------------------------------------------------------------------------


def to_html(report: Report, checker: Checker, samples: Sequence[int], seconds: float) -> str:
    """The page. Records that cannot be shown are left out."""
    environment = Environment(
        loader=PackageLoader("unillava.data", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = []
    for number in samples:
        with contextlib.suppress(UnillavaError):  # a picture on the web may have gone meanwhile
            shown.append(show(checker, number))
    tokens = count_tokens(report)
    pipeline = checker.pipeline
    return environment.get_template("check_page.html").render(
        report=report,
        files=[(str(file.path), len(file)) for file in report.records.files],
        findings={
            "problem": _findings(report, PROBLEMS),
            "remark": _findings(report, REMARKS),
        },
        most_examples=EXAMPLES,
        facts=tokens.words() if tokens else {},
        plots=[plot(report, *shape) for shape in (WIDE, NARROW)] if tokens else [],
        modalities=MODALITIES,
        shown=shown,
        template=pipeline.template.name if pipeline else None,
        family=pipeline.spec.family if pipeline else None,
        seconds=seconds,
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=unillava.__version__,
    )


def _findings(report: Report, kinds: dict[str, tuple[str, str]]) -> list[tuple[Any, ...]]:
    """(title, advice, count, examples) of the kinds that were found, most frequent first."""
    rows = [
        (title, advice, report.counts[kind], report.examples.get(kind, []))
        for kind, (title, advice) in kinds.items()
        if report.counts[kind]
    ]
    return sorted(rows, key=lambda row: -row[2])
