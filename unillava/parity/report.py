"""The findings for people (terminal, HTML page) and for programs (JSON)."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

import unillava
from unillava.parity.compare import (
    GUIDES,
    PARTS,
    Difference,
    Judgement,
    or_null,
    part_of_tensor,
    short,
    worst,
    worst_by_part,
)
from unillava.parity.plots import Plot, Series, draw, mark
from unillava.parity.run import Candidate, Report

WIDE, NARROW = (960, 340), (380, 300)
"""Sizes of a plot on a desk and on a telephone, in pixels."""
LIKE_NOISE = 3.0
"""A difference of at most so many times the reference's own noise looks like rounding."""
MOST_ROWS = 12
"""Rows of the table of worst tensors, shared by the backends."""
THUMBNAIL = 320
"""Longer side of a picture in the report, in pixels."""


# --- words -----------------------------------------------------------------------------------


def number(value: float | bool | None) -> str:
    """A measured number, short."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "equal" if value else "different"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "not finite"
    return short(value) if abs(value) < 0.1 or abs(value) >= 1e4 else f"{value:.4g}"


def size(count: int) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def findings(candidate: Candidate, report: Report) -> list[str]:
    """What there is to say about one backend, most important first."""
    if candidate.passed:
        return [_agreement(candidate, report)]
    told = [*_output_findings(candidate, report)]
    failed = {j.rule.fact for j in candidate.judgements if j.rule.decides and j.passed is False}
    if "loss_relative" in failed:
        loss, wanted = candidate.run.loss, report.reference_result.runs[0].loss
        told.append(f"The loss is {loss:.7g} instead of {wanted:.7g}.")
    if "gradients_relative" in failed:
        told.append(_gradient_finding(candidate, report))
    if candidate.mismatch is not None:
        told.append(_token_finding(candidate, report))
    told += _noise_findings(candidate, report)
    return told


def _agreement(candidate: Candidate, report: Report) -> str:
    outputs, gradients = worst(candidate.run.outputs), worst(candidate.run.gradients)
    told = [f"outputs within {number(outputs.relative)}"]
    if gradients is not None:
        told.append(f"{len(candidate.run.gradients)} gradients within {number(gradients.relative)}")
    tokens = sum(map(len, candidate.result.tokens))
    if tokens:
        told.append(f"all {tokens} greedy tokens equal")
    noise = max(report.output_noise.values(), default=0.0)
    compared = f"; the reference against itself: outputs {number(noise)}" if noise else ""
    return (
        f"{candidate.label} computes what {report.reference} computes: {', '.join(told)} "
        f"(bar {short(report.tolerance)}{compared})."
    )


def _output_findings(candidate: Candidate, report: Report) -> Iterable[str]:
    found = candidate.divergence
    if found is None:
        yield f"All outputs of {candidate.label} are within the bar."
        return
    layer = f", in {found.layer}" if found.layer != found.name else ""
    yield (
        f"{candidate.label} parts from {report.reference} at {found.name}{layer}: "
        f"{number(found.relative)} of the tensor's largest value, the bar is "
        f"{short(report.tolerance)}. Computed there: {found.step}."
    )
    if found.before is not None:
        yield f"Up to {found.before} every output is within the bar."
    if found.jump is None:
        yield (
            "No layer stands out: the difference grows steadily, each no more than the ones "
            "before it explain."
        )
    else:
        where = "there" if found.jump == found.name else f"at {found.jump}"
        yield (
            f"It appears {where}: {found.jump_factor:.3g} times what rounding in the tensors "
            "before allows for."
        )


def _gradient_finding(candidate: Candidate, report: Report) -> str:
    over = [d for d in candidate.run.gradients if not d.relative <= report.tolerance]
    first = over[-1]  # gradients are computed from the end of the model to its beginning
    count = f"{len(over)} of {len(candidate.run.gradients)} gradients are over the bar"
    if candidate.divergence is not None:
        return f"{count}, which may follow from the outputs."
    noise = report.gradient_noise.get(first.name)
    compared = "" if noise is None else f"; the reference against itself: {number(noise)}"
    return (
        f"{count}. The first in the backward pass is that of {first.name}: "
        f"{number(first.relative)}{compared}."
    )


def _noise_findings(candidate: Candidate, report: Report) -> Iterable[str]:
    """Whether a bar is missed by no more than rounding can do to the reference itself."""
    for judgement in candidate.judgements:
        noise = judgement.noise
        missed = judgement.rule.decides and judgement.passed is False
        if not missed or isinstance(noise, bool) or noise is None:
            continue
        if judgement.measured <= LIKE_NOISE * noise:
            yield (
                f"For {judgement.rule.criterion}, {number(judgement.measured)} is no more than "
                f"{judgement.measured / noise:.1f} times what the reference differs from "
                f"itself ({number(noise)}): this looks like rounding. A model this deep or this "
                "sharp may need a larger --tolerance."
            )


def _token_finding(candidate: Candidate, report: Report) -> str:
    found = candidate.mismatch
    replies = report.rows[found.row].replies
    ours, theirs = replies[candidate.label][found.step], replies[report.reference][found.step]
    own = report.noise_facts is not None and report.noise_facts.tokens_equal is False
    return (
        f"Greedy tokens part in row “{report.rows[found.row].title}” at token {found.step + 1}: "
        f"{ours!r} instead of {theirs!r}. The reference's best logit led the second by "
        f"{number(found.gap)} there."
        + " The reference's own tokens change with threads and kernels, too."
        * own
    )


def absolute_note(report: Report) -> str:
    """Why absolute bars may fail where relative ones do not."""
    loss = report.reference_result.runs[0].loss
    outputs = {d.name: d for candidate in report.candidates for d in candidate.run.outputs}
    spacing = float(np.spacing(np.float32(loss))) if math.isfinite(loss) else math.nan
    return (
        "Absolute bars depend on how large a model's numbers are. Here logits reach "
        f"{outputs['logits'].scale:.3g}, and float32 numbers next to the loss of {loss:.4g} are "
        f"{number(spacing)} apart. The column “against itself” shows what the same bar says about "
        "the reference's own repeats. The verdict rests on the bars of unillava alone."
    )


# --- terminal --------------------------------------------------------------------------------


def terminal(report: Report) -> RenderableType:
    """The short form: a line per part, the verdict, and where each backend parts."""
    table = Table(title=f"against {report.reference}, largest relative difference")
    table.add_column("part")
    for candidate in report.candidates:
        table.add_column(candidate.label, justify="right")
    if report.output_noise:
        table.add_column(f"{report.reference} itself", justify="right", style="dim")
    noise = _worst_noise(report.output_noise)
    parts = [worst_by_part(candidate.run.outputs) for candidate in report.candidates]
    for part in PARTS:
        if any(part in found for found in parts):
            cells = [_cell(found.get(part), report.tolerance) for found in parts]
            table.add_row(part, *cells, *([number(noise.get(part))] * bool(noise)))
    table.add_section()
    by_candidate = [{j.rule.fact: j for j in c.judgements} for c in report.candidates]
    for label, fact in (
        ("loss", "loss_relative"),
        ("gradients", "gradients_relative"),
        ("greedy tokens", "tokens_equal"),
    ):
        judged = [judgements[fact] for judgements in by_candidate]
        if any(j.measured is not None for j in judged):
            cells = [_coloured(number(j.measured), j.passed) for j in judged]
            table.add_row(label, *cells, *([number(judged[0].noise)] * bool(noise)))
    lines = []
    for candidate in report.candidates:
        first, *others = map(escape, findings(candidate, report))
        badge = _coloured("PASS" if candidate.passed else "FAIL", candidate.passed)
        lines += [f"{badge} {first}", *(f"     {line}" for line in others)]
    return Group(table, *lines, "", _official(report))


def _cell(difference: Difference | None, tolerance: float) -> str:
    if difference is None:
        return "—"
    return _coloured(number(difference.relative), difference.relative <= tolerance)


def _coloured(text: str, passed: bool | None) -> str:
    colour = {True: "green", False: "bold red", None: "dim"}[passed]
    return f"[{colour}]{escape(text)}[/]"


def _worst_noise(noise: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in noise.items():
        part = part_of_tensor(name)
        found[part] = max(found.get(part, 0.0), value)
    return found


def _official(report: Report) -> str:
    """One line per guide: how many of its bars each backend meets."""
    lines = []
    for guide in GUIDES:
        if guide == "unillava":
            continue
        told = []
        for candidate in report.candidates:
            judged = [j for j in candidate.judgements if j.rule.guide == guide]
            met, counted = (sum(j.passed is x for j in judged) for x in (True, False))
            told.append(f"{escape(candidate.label)} {met} of {met + counted}")
        lines.append(f"[dim]bars of {guide} met: {', '.join(told)}[/]")
    return "\n".join(lines)


def print_report(report: Report, console: Console) -> None:
    """The short form on a console."""
    console.print(terminal(report))


# --- JSON ------------------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, Any]:
    """Everything, as JSON-able values; what is not finite is null."""
    reference = report.reference_result
    return {
        "format": 1,
        "unillava": unillava.__version__,
        "passed": report.passed,
        "checkpoint": report.checkpoint,
        "model": report.model,
        "dtype": report.settings.dtype,
        "tolerance": report.tolerance,
        "machine": report.machine,
        "batch": {name: list(shape) for name, shape in report.batch.items()},
        "rows": [
            {"title": row.title, "prompt": row.prompt, "replies": row.replies}
            for row in report.rows
        ],
        "reference": {
            "label": report.reference,
            "loss": or_null(reference.runs[0].loss),
            "gradient_norm": or_null(reference.runs[0].gradient_norm),
            **_process(reference),
            "noise": {
                "runs": [name for name, _ in report.noise_runs],
                "outputs": {k: or_null(v) for k, v in report.output_noise.items()},
                "gradients": {k: or_null(v) for k, v in report.gradient_noise.items()},
            },
        },
        "candidates": [_candidate_json(candidate, report) for candidate in report.candidates],
    }


def _candidate_json(candidate: Candidate, report: Report) -> dict[str, Any]:
    divergence, mismatch = candidate.divergence, candidate.mismatch
    run = candidate.run.to_json()
    del run["has_gradients"], run["kernels"]
    return {
        "label": candidate.label,
        "passed": candidate.passed,
        "checkpoint": candidate.checkpoint,
        "findings": findings(candidate, report),
        "first_divergence": None
        if divergence is None
        else {name: or_null(value) for name, value in asdict(divergence).items()},
        "first_mismatch": None if mismatch is None else asdict(mismatch),
        "thresholds": [judgement.to_json() for judgement in candidate.judgements],
        **_process(candidate.result),
        **run,
    }


def _process(result: Any) -> dict[str, Any]:
    return {
        "versions": result.versions,
        "device": result.device,
        "threads": result.threads,
        "peak_memory": result.peak_memory,
        "seconds": round(result.seconds, 3),
        "tokens": [list(tokens) for tokens in result.tokens],
    }


# --- HTML ------------------------------------------------------------------------------------


def to_html(report: Report) -> str:
    """A page that needs nothing beside itself: no script, no font, no picture from elsewhere."""
    environment = Environment(
        loader=PackageLoader("unillava.parity", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=lambda value: unbroken(number(value)),
        unbroken=unbroken,
        measured=measured,
        prose=prose,
        size=size,
        breakable=breakable,
    )
    now = datetime.now(timezone.utc)
    return environment.get_template("report.html").render(
        report=report,
        reference=report.reference_result,
        now=now.strftime("%Y-%m-%d %H:%M UTC"),
        version=unillava.__version__,
        findings={c.label: findings(c, report) for c in report.candidates},
        parts=_part_rows(report),
        output_plots=_plots(report, "outputs"),
        gradient_plots=_plots(report, "gradients") if report.settings.gradients else [],
        keys=[_key(n, candidate.label) for n, candidate in enumerate(report.candidates)],
        thresholds=_thresholds(report),
        summary=_summary(report),
        guides=GUIDES,
        absolute_note=absolute_note(report),
        rows=[_reply_row(report, n) for n in range(len(report.rows))],
        worst_outputs=_worst_rows(report, "outputs"),
        worst_gradients=_worst_rows(report, "gradients"),
        noise=_worst_noise(report.output_noise),
        unused=unused(report),
    )


def prose(text: str) -> Markup:
    """A sentence in which names of modules may be broken and exponents may not."""
    words = [
        Markup('<span class="name">{}</span>').format(breakable(word)) if "_" in word else word
        for word in unbroken(text).split(" ")
    ]
    return Markup(" ").join(words)


def measured(judgement: Judgement, of: str = "measured") -> str:
    """A judgement's number; cosines as their distance from 1."""
    value = getattr(judgement, of)
    if judgement.rule.fact == "outputs_cosine" and value is not None and 0.99 < value < 1:
        return unbroken(f"1 \N{MINUS SIGN} {short(1 - value)}")
    return unbroken(number(value))


def breakable(name: str) -> Markup:
    """A dotted name that may be broken behind its dots."""
    return Markup(".<wbr>").join(name.split("."))


def unbroken(text: str) -> str:
    """Exponents with a minus sign, at which no line is broken."""
    return re.sub(r"(?<=\de)-(?=\d)", "\N{MINUS SIGN}", text)


def unused(report: Report) -> int:
    """Parameters whose gradient is zero on both sides."""
    gradients = report.candidates[0].run.gradients
    return sum(d.scale == 0 and d.max_abs == 0 for d in gradients)


def _part_rows(report: Report) -> list[tuple[str, list[Difference | None], float | None]]:
    """(part, each candidate's worst tensor, the noise there)."""
    found = [worst_by_part(candidate.run.outputs) for candidate in report.candidates]
    noise = _worst_noise(report.output_noise)
    return [
        (part, [by_part.get(part) for by_part in found], noise.get(part))
        for part in PARTS
        if any(part in by_part for by_part in found)
    ]


def _plots(report: Report, kind: str) -> list[Markup]:
    """The wide and the narrow form of one plot."""
    noise = report.output_noise if kind == "outputs" else report.gradient_noise
    lists = [
        [d for d in getattr(candidate.run, kind) if d.scale or d.max_abs]
        for candidate in report.candidates
    ]
    plot = Plot(
        names=merged_names([[d.name for d in differences] for differences in lists]),
        part=part_of_tensor,
        series=[
            Series(
                candidate.label,
                {d.name: d.relative for d in differences},
                ringed=candidate.divergence.name if candidate.divergence else None,
            )
            for candidate, differences in zip(report.candidates, lists, strict=True)
        ],
        noise=noise,
        tolerance=report.tolerance,
    )
    return [Markup(draw(plot, *shape)) for shape in (WIDE, NARROW)]


def merged_names(lists: Sequence[Sequence[str]]) -> list[str]:
    """All names in an order that agrees with every list: unknown ones go behind their neighbour."""
    merged: list[str] = []
    for names in lists:
        place = 0
        for name in names:
            if name in merged:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                place += 1
    return merged


def _key(n: int, label: str) -> tuple[str, Markup]:
    """A backend's mark for the legend."""
    path = f'<path class="s{n}" d="{mark(n, 6, 6, 4)}"/>'
    return label, Markup(f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true">{path}</svg>')


def _thresholds(report: Report) -> list[tuple[str, list[list[Judgement]]]]:
    """(guide, its rules; each as applied to every backend)."""
    rules = list(zip(*(candidate.judgements for candidate in report.candidates), strict=True))
    return [
        (guide, [list(judged) for judged in rules if judged[0].rule.guide == guide])
        for guide in GUIDES
    ]


def _summary(report: Report) -> list[list[Judgement]]:
    """What decides beside the outputs, which have lines of their own; as measured."""
    own = dict(_thresholds(report))["unillava"]
    return [j for j in own if j[0].rule.fact != "outputs_relative" and j[0].measured is not None]


def _worst_rows(report: Report, kind: str) -> list[tuple[str, Difference, float | None]]:
    """(backend, tensor, the reference's own noise in it), worst first."""
    noise = report.output_noise if kind == "outputs" else report.gradient_noise
    rows, most = [], max(MOST_ROWS // len(report.candidates), 4)
    for candidate in report.candidates:
        own: dict[tuple[float, ...], Difference] = {}
        for d in getattr(candidate.run, kind):
            if d.relative > 0:
                # The last linear of a module gives the module's own output: one line for both.
                own.setdefault((d.max_abs, d.mean_abs, d.scale), d)
        chosen = sorted(own.values(), key=lambda d: -d.relative)[:most]
        rows += [(candidate.label, d, noise.get(d.name)) for d in chosen]
    return sorted(rows, key=lambda row: -row[1].relative)


def _reply_row(report: Report, n: int) -> dict[str, Any]:
    """One conversation: its picture, and the replies with their first differing token."""
    row = report.rows[n]
    results = {c.label: c.result for c in report.candidates}
    results[report.reference] = report.reference_result
    replies = []
    for label, pieces in row.replies.items():
        pairs = zip(results[label].tokens[n], report.reference_result.tokens[n], strict=True)
        same = [a == b for a, b in pairs]
        first = same.index(False) if False in same else None
        replies.append({"label": label, "pieces": pieces, "first": first})
    picture = None if row.picture is None else data_uri(row.picture)
    return {"title": row.title, "prompt": row.prompt, "picture": picture, "replies": replies}


def data_uri(picture: Image.Image) -> str:
    """A small JPEG of a picture, to stand in the page itself."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


# --- files -----------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there entirely or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
