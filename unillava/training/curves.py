"""Loss curves: read from logs of several systems, drawn, and judged by the official criteria.

A run is compared with the first one over the steps that both have. The criteria are MindSpore's
for migrated large models (mindspore-ai/docs, "precision_optimization": first loss, mean loss, mean
gradient norm) and the threshold of the loss log in Paddle's guide for reproductions
(PaddlePaddle/models, docs/lwfx, `reprod_log`).
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unillava.data.files import written
from unillava.errors import DataError

SMOOTHING = 0.05
"""Updates over which a smoothed curve averages, as a share of the run."""
COLOURS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626", "#0891b2", "#65a30d", "#7c3aed")


@dataclass(frozen=True)
class Curve:
    """One run: step -> number."""

    name: str
    loss: Mapping[int, float]
    norm: Mapping[int, float] = field(default_factory=dict)
    rate: Mapping[int, float] = field(default_factory=dict)


# --- reading -------------------------------------------------------------------------------------

FOLDER_FILES = ("log.jsonl", "log.csv", "trainer_state.json")
"""What a run's folder is read from; of transformers' checkpoints the newest."""
FIELDS = {
    "loss": ("loss", "train/loss"),
    "norm": ("norm", "grad_norm", "global_norm"),
    "rate": ("rate", "learning_rate", "lr"),
}
"""Number -> its names in logs of JSON and in tables."""
STEPS = ("step", "global_step")


def read_curve(path: Path, name: str | None = None) -> Curve:
    """A run's curve.

    Args:
        path: a run's folder; or log.jsonl, log.csv, trainer_state.json (transformers, PaddleNLP),
            or a text log of MindFormers or PaddleNLP.
        name: for the legend; None: after the path.

    Raises:
        DataError: it cannot be read, or has no losses.
    """
    file = _log_in(path) if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{file} cannot be read", given=error.strerror) from error
    entries = _reader(file)(text)
    columns = {
        kind: {step: v for step, entry in entries.items() if (v := _value(entry, kind)) is not None}
        for kind in FIELDS
    }
    if not columns["loss"]:
        raise DataError(
            f"{file} has no losses",
            expected="log.jsonl or log.csv of a run, trainer_state.json, or a text log with lines "
            "such as `step:[ 1/ 100], loss: 2.5` or `loss: 2.5, ..., global_step: 1`",
        )
    return Curve(name or (path.name if path.is_dir() else f"{path.parent.name}/{path.name}"),
                 **columns)  # fmt: skip


def _log_in(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = list(folder.glob("checkpoint-*/trainer_state.json"))
    if not found:
        raise DataError(f"{folder} holds no log", expected=f"one of {', '.join(FOLDER_FILES)}")
    return max(found, key=lambda path: int(re.sub(r"\D", "", path.parent.name) or 0))


Entries = dict[int, Mapping[str, Any]]


def _reader(file: Path) -> Callable[[str], Entries]:
    readers = {".jsonl": _json_lines, ".csv": _table, ".json": _trainer_state}
    return readers.get(file.suffix, _text_log)


def _json_lines(text: str) -> Entries:
    entries = []
    for line in text.splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # half a line, of a process that was killed
            continue
    return _by_step(entry for entry in entries if isinstance(entry, dict))


def _table(text: str) -> Entries:
    return _by_step(csv.DictReader(io.StringIO(text)))


def _trainer_state(text: str) -> Entries:
    try:
        history = json.loads(text)["log_history"]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            "this JSON is no trainer_state.json", expected="log_history in it"
        ) from None
    # Evaluations and the summary at the end have no loss of a step.
    return _by_step(entry for entry in history if "loss" in entry)


def _by_step(entries: Any) -> Entries:
    found: Entries = {}
    for entry in entries:
        step = next((entry[key] for key in STEPS if entry.get(key) not in (None, "")), None)
        if step is not None:
            found[int(step)] = entry
    return found


_NUMBER = r"(?P<{}>[-+]?(?:[\d.]+(?:e[-+]?\d+)?|nan|inf))"
_MINDFORMERS = re.compile(
    r"Epoch:\[\s*(?P<epoch>\d+)/\s*\d+\],\s*step:\[\s*(?P<step>\d+)/\s*(?P<steps>\d+)\],"
    r"\s*loss:\s*" + _NUMBER.format("loss"),
    re.IGNORECASE,
)
_PADDLE = re.compile(r"\bloss:\s*" + _NUMBER.format("loss"), re.IGNORECASE)
_NAMED = {
    "learning_rate": re.compile(r"\b(?:learning_rate|lr):\s*" + _NUMBER.format("value"), re.I),
    "global_norm": re.compile(r"\bglobal_norm:\s*\[?\s*" + _NUMBER.format("value"), re.I),
    "global_step": re.compile(r"\bglobal_step:\s*(?P<value>\d+)", re.I),
}


def _text_log(text: str) -> Entries:
    """MindFormers' and PaddleNLP's lines; of others, whatever has `loss: x`, counted from 1."""
    found: Entries = {}
    for line in text.splitlines():
        mindformers = _MINDFORMERS.search(line)
        match = mindformers or _PADDLE.search(line)
        if match is None:
            continue
        entry: dict[str, Any] = {"loss": match["loss"]}
        for key, pattern in _NAMED.items():
            if value := pattern.search(line):
                entry[key] = value["value"]
        if mindformers:
            done = (int(match["epoch"]) - 1) * int(match["steps"])
            step = done + int(match["step"])
        else:
            step = int(entry.get("global_step", len(found) + 1))
        found[step] = entry
    return found


def _value(entry: Mapping[str, Any], kind: str) -> float | None:
    for key in FIELDS[kind]:
        if entry.get(key) not in (None, ""):
            return float(entry[key])
    if kind == "rate":  # ours: one for each group, the largest is shown
        groups = entry.get("rates") or {k: v for k, v in entry.items() if k.startswith("rate.")}
        return max((float(value) for value in groups.values()), default=None)
    return None


# --- judging -------------------------------------------------------------------------------------

Guide = Literal["MindSpore", "Paddle"]


@dataclass(frozen=True)
class Criterion:
    """One thing that a guide demands, and whether a run meets it."""

    guide: Guide
    name: str
    demands: str
    absolute: float
    relative: float
    passed: bool


@dataclass(frozen=True)
class Judgement:
    """A run against the first one."""

    name: str
    common: int
    """Steps that both have."""
    left_out: int
    """Steps that only one of them has."""
    largest: float
    """Absolute difference of the losses."""
    worst: int
    """The step at which that is."""
    criteria: tuple[Criterion, ...]

    def passed(self, guides: Sequence[str]) -> bool:
        """Whether every criterion of these guides is met."""
        return all(one.passed for one in self.criteria if one.guide in guides)


def judge(reference: Curve, run: Curve) -> Judgement:
    """Compare a run with another, step by step.

    Raises:
        DataError: they have no step in common.
    """
    steps = sorted(reference.loss.keys() & run.loss.keys())
    if not steps:
        raise DataError(
            f"{run.name} and {reference.name} have no step in common",
            given=f"steps {_span(run.loss)} and {_span(reference.loss)}",
        )
    pairs = [(reference.loss[step], run.loss[step]) for step in steps]
    absolute = [abs(a - b) for a, b in pairs]
    relative = [_relative(a, b) for a, b in pairs]
    # nan is never below a bar; for `max` it has to be made the largest.
    sizes = [math.inf if math.isnan(value) else value for value in absolute]
    mean, mean_relative = statistics.fmean(absolute), statistics.fmean(relative)
    criteria = [
        Criterion(
            "MindSpore", "first loss", "difference < 0.005 or < 0.5 %", absolute[0], relative[0],
            absolute[0] < 0.005 or relative[0] < 0.005,
        ),
        Criterion(
            "MindSpore", "mean loss", "mean difference < 0.01 or < 1 %", mean, mean_relative,
            mean < 0.01 or mean_relative < 0.01,
        ),
    ]  # fmt: skip
    shared = [s for s in steps if s in reference.norm and s in run.norm]
    if shared:
        norms = [(reference.norm[step], run.norm[step]) for step in shared]
        difference = statistics.fmean(abs(a - b) for a, b in norms)
        share = statistics.fmean(_relative(a, b) for a, b in norms)
        criteria.append(
            Criterion(
                "MindSpore",
                "gradient norm",
                "mean difference ≤ 10 %",
                difference,
                share,
                share <= 0.1,
            )
        )
    criteria.append(
        Criterion("Paddle", "loss log", "mean difference ≤ 1e-6", mean, mean_relative, mean <= 1e-6)
    )
    worst = max(range(len(steps)), key=sizes.__getitem__)
    union = len(reference.loss.keys() | run.loss.keys())
    return Judgement(
        run.name, len(steps), union - len(steps), absolute[worst], steps[worst], tuple(criteria)
    )


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(a) if a else (0.0 if a == b else math.inf)


def _span(column: Mapping[int, float]) -> str:
    return f"{min(column)} to {max(column)}"


# --- drawing -------------------------------------------------------------------------------------


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Mean of `span` numbers around each place, fewer at the ends; those that are no numbers do
    not count."""
    found = []
    for place in range(len(values)):
        begin = max(0, place - span // 2)
        window = [v for v in values[begin : place + (span + 1) // 2] if math.isfinite(v)]
        found.append(sum(window) / len(window) if window else math.nan)
    return found


def _figure(heights: Sequence[float]) -> tuple[Any, Any]:
    """A figure without a screen, and its axes below one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 1.6 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    return figure, axes


def _plot(axis: Any, column: Mapping[int, float], **style: Any) -> None:
    marker = "." if len(column) < 3 else None
    axis.plot(list(column), list(column.values()), marker=marker, **style)


def _plot_loss(axis: Any, curve: Curve, colour: str, span: int, width: float = 1.6) -> None:
    """Raw values pale, their mean over `span` steps strong."""
    steps, values = list(curve.loss), list(curve.loss.values())
    if span > 1:
        _plot(axis, curve.loss, color=colour, alpha=0.3, linewidth=0.8)
    smoothed = dict(zip(steps, smooth(values, span), strict=True))
    suffix = f" (mean of {span})" if span > 1 else ""
    _plot(axis, smoothed, color=colour, linewidth=width, label=curve.name + suffix)


def _span_of(curves: Sequence[Curve]) -> int:
    """The same for all that are compared."""
    return max(1, round(SMOOTHING * max(len(curve.loss) for curve in curves)))


def _save(figure: Any, path: Path) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    with written(path) as file:
        file.write(content.getvalue())
    return content.getvalue()


def draw_run(entries: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Loss, gradient norms and learning rates of one run as a PNG.

    Args:
        entries: of log.jsonl, in order; `backend` tells where a run changed frameworks.
        path: the file.
        title: above the picture.
    """
    figure, (loss, norm, rate) = _figure((3, 1.4, 1.2))
    curve = Curve("loss", {e["step"]: float(e["loss"]) for e in entries})
    _plot_loss(loss, curve, COLOURS[0], _span_of([curve]))
    for axis, key in ((norm, "norms"), (rate, "rates")):
        drawn: list[dict[int, float]] = []
        for n, group in enumerate(dict.fromkeys(g for e in entries for g in e.get(key, {}))):
            column = {e["step"]: float(e[key][group]) for e in entries if group in e.get(key, {})}
            if column in drawn:  # groups with the same rate hide one another
                continue
            drawn.append(column)
            _plot(axis, column, color=COLOURS[n % len(COLOURS)], linewidth=1.2, label=group)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper right", fontsize="small")
    for begin, backend in _backends(entries):
        for axis in (loss, norm, rate):
            axis.axvline(begin - 0.5, color="black", linestyle=":", linewidth=1)
        place = {"transform": loss.get_xaxis_transform(), "va": "bottom", "fontsize": "small"}
        loss.text(begin - 0.5, 1.0, f" {backend}", **place)
    loss.set_ylabel("loss")
    norm.set_ylabel("gradient norm")
    rate.set_ylabel("learning rate")
    if any(float(e["norm"]) > 0 for e in entries):
        norm.set_yscale("log")
    loss.legend(loc="upper right", fontsize="small")
    figure.suptitle(title)
    _save(figure, path)


def _backends(entries: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """(first step, backend) of each stretch on one framework; [] if there was only one."""
    found: list[tuple[int, str]] = []
    for entry in entries:
        backend = entry.get("backend")
        if backend and (not found or found[-1][1] != backend):
            found.append((entry["step"], backend))
    return found if len(found) > 1 else []


def draw_overlay(curves: Sequence[Curve], path: Path) -> bytes:
    """All runs in one picture, and below it how far each is from the first; returns the PNG."""
    figure, (loss, difference) = _figure((3, 1.6))
    for n, curve in enumerate(curves):
        # The first one wider, so that it is seen below one that is equal to it.
        _plot_loss(loss, curve, COLOURS[n % len(COLOURS)], _span_of(curves), 1.4 if n else 3.0)
    first = curves[0]
    for n, curve in enumerate(curves[1:], 1):
        steps = sorted(first.loss.keys() & curve.loss.keys())
        gaps = {step: abs(first.loss[step] - curve.loss[step]) for step in steps}
        # A logarithm has no place for equality.
        shown = {step: gap if gap else math.nan for step, gap in gaps.items()}
        _plot(difference, shown, color=COLOURS[n % len(COLOURS)], linewidth=1.2)
    if any(line.get_ydata().size and (line.get_ydata() > 0).any() for line in difference.lines):
        difference.set_yscale("log")
    difference.axhline(0.01, color="black", linestyle=":", linewidth=1)
    difference.annotate(
        "0.01", (1, 0.01), xycoords=("axes fraction", "data"), fontsize="small", ha="right",
        va="bottom",
    )  # fmt: skip
    loss.set_ylabel("loss")
    difference.set_ylabel(f"|loss - {first.name}|" if len(first.name) < 16 else "difference")
    loss.legend(loc="upper right", fontsize="small")
    return _save(figure, path)


# --- the page ------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; background: white; border-radius: 6px; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #8884; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.yes { color: #059669; } .no { color: #dc2626; font-weight: 600; }
"""


def write_page(
    curves: Sequence[Curve], judgements: Sequence[Judgement], picture: bytes, path: Path
) -> None:
    """A page with the picture and the judgements that needs no other file."""
    image = base64.b64encode(picture).decode()
    name = html.escape(curves[0].name)
    rows = "".join(
        f"<tr><td>{html.escape(run.name)}</td><td>{one.guide}</td><td>{one.name}</td>"
        f"<td>{html.escape(one.demands)}</td><td class=n>{one.absolute:.3g}</td>"
        f"<td class=n>{100 * one.relative:.3g} %</td>"
        f"<td class={'yes' if one.passed else 'no'}>{'met' if one.passed else 'not met'}</td></tr>"
        for run in judgements
        for one in run.criteria
    )
    notes = "".join(f"<li>{html.escape(describe(run, curves[0].name))}</li>" for run in judgements)
    content = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Loss curves</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<h1>Loss curves against {name}</h1>"
        f"<img alt='The loss of every run over the steps, and its distance from {name}'"
        f" src='data:image/png;base64,{image}'>"
        f"<table><thead><tr><th>run<th>guide<th>criterion<th>demands<th>absolute<th>relative<th>"
        f"</thead><tbody>{rows}</tbody></table><ul>{notes}</ul>"
    )
    with written(path) as file:
        file.write(content.encode())


def describe(judgement: Judgement, reference: str) -> str:
    """What was compared, in words."""
    text = f"{judgement.name}: {judgement.common} steps in common with {reference}"
    if judgement.left_out:
        text += f", {judgement.left_out} that only one of them has are left out"
    return f"{text}; largest difference {judgement.largest:.3g}, at step {judgement.worst}"
