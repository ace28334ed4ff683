"""Difference plots as SVG text: one mark per tensor and backend on a logarithmic scale.

Colours come from the page's style sheet (classes `s0`, `s1`, ...), so that light and dark pages
share one drawing; the shape of a mark tells backends apart without colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from unillava.parity.compare import short

TOP, RIGHT, BOTTOM, LEFT = 14, 10, 40, 46
"""Margins in pixels."""
LETTER = 5.6
"""Width of a letter of the labels, nearly."""
FLOOR = 1e-12
"""Smaller differences are drawn as this."""


@dataclass(frozen=True)
class Series:
    """One backend's differences by tensor name; a name may be missing."""

    label: str
    values: Mapping[str, float]
    ringed: str | None = None
    """The tensor at which this backend diverges."""


@dataclass(frozen=True)
class Plot:
    """What is drawn. `names` are in the order of execution, `part` names a tensor's part."""

    names: Sequence[str]
    part: Callable[[str], str]
    series: Sequence[Series]
    noise: Mapping[str, float]
    tolerance: float


def draw(plot: Plot, width: int, height: int) -> str:
    """The plot as an <svg> element of that many pixels."""
    scale = _Scale(plot, width, height)
    title = "Relative difference of each tensor; " + ", ".join(s.label for s in plot.series)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        *_parts(plot, scale),
        *_grid(scale),
        _noise(plot, scale),
        *_tolerance(plot, scale),
    ]
    for n, series in enumerate(plot.series):
        parts += _marks(plot, scale, series, n)
    return "\n".join([*parts, "</svg>"])


class _Scale:
    """From a tensor's place and difference to pixels."""

    def __init__(self, plot: Plot, width: int, height: int) -> None:
        values = [v for series in plot.series for v in series.values.values()]
        values += [*plot.noise.values(), plot.tolerance]
        shown = [max(v, FLOOR) for v in values if 0 < v < math.inf]
        self.low = math.floor(math.log10(min(shown)))
        self.high = max(math.ceil(math.log10(max(shown))), self.low + 1)
        self.width, self.height = width, height
        self.left, self.right, self.top = LEFT, width - RIGHT, TOP
        self.zero = height - BOTTOM
        """Zero has a line of its own below the scale."""
        self.bottom = self.zero - 20
        self.step = (self.right - self.left) / max(len(plot.names), 1)

    def x(self, place: float) -> float:
        return round(self.left + (place + 0.5) * self.step, 1)

    def y(self, value: float) -> float:
        if value == 0:
            return self.zero
        power = self.high if value == math.inf else math.log10(max(value, FLOOR))
        share = (power - self.low) / (self.high - self.low)
        return round(self.bottom - share * (self.bottom - self.top), 1)


def _parts(plot: Plot, scale: _Scale) -> list[str]:
    """A shaded column for every other part, and names where there is room for them."""
    shapes, end = [], 0
    for n, (part, count) in enumerate(_stretches([plot.part(name) for name in plot.names])):
        left, right = scale.x(end - 0.5), scale.x(end + count - 0.5)
        if n % 2:
            shapes.append(
                f'<rect class="part" x="{left}" y="{scale.top}" width="{right - left:.1f}" '
                f'height="{scale.zero + 6 - scale.top}"><title>{escape(part)}</title></rect>'
            )
        if right - left > LETTER * len(part):
            shapes.append(
                f'<text class="axis" text-anchor="middle" x="{(left + right) / 2:.1f}" '
                f'y="{scale.zero + 20}">{escape(part)}</text>'
            )
        end += count
    shapes.append(
        f'<text class="axis" text-anchor="end" x="{scale.right}" y="{scale.height - 4}">'
        "order of execution →</text>"
    )
    return shapes


def _stretches(items: Sequence[str]) -> list[tuple[str, int]]:
    """Equal neighbours counted."""
    found: list[tuple[str, int]] = []
    for item in items:
        if found and found[-1][0] == item:
            found[-1] = (item, found[-1][1] + 1)
        else:
            found.append((item, 1))
    return found


def _grid(scale: _Scale) -> list[str]:
    shapes = []
    every = 1 if scale.high - scale.low <= 8 else 2
    ticks = [(10.0**n, f"1e{n}") for n in range(scale.low, scale.high + 1, every)]
    for value, label in [(0.0, "0"), *ticks]:
        y = scale.y(value)
        shapes.append(
            f'<line class="grid" x1="{scale.left}" x2="{scale.right}" y1="{y}" y2="{y}"/>'
        )
        place = f'x="{scale.left - 5}" y="{y + 3.5}"'
        shapes.append(f'<text class="axis" text-anchor="end" {place}>{label}</text>')
    return shapes


def _noise(plot: Plot, scale: _Scale) -> str:
    """The reference's own differences as an area."""
    if not plot.noise:
        return ""
    corners = [f"M{scale.left},{scale.zero}"]
    for n, name in enumerate(plot.names):
        y = scale.y(plot.noise.get(name, 0.0))
        corners.append(f"L{scale.x(n - 0.5)},{y}H{scale.x(n + 0.5)}")
    corners.append(f"V{scale.zero}Z")
    return (
        f'<path class="noise" d="{"".join(corners)}">'
        "<title>the reference against itself</title></path>"
    )


def _tolerance(plot: Plot, scale: _Scale) -> list[str]:
    y = scale.y(plot.tolerance)
    return [
        f'<line class="bar" x1="{scale.left}" x2="{scale.right}" y1="{y}" y2="{y}"/>',
        f'<text class="bar-label" x="{scale.left + 4}" y="{y - 4}">'
        f"tolerance {short(plot.tolerance)}</text>",
    ]


def _marks(plot: Plot, scale: _Scale, series: Series, number: int) -> list[str]:
    shapes = []
    size = 3 if scale.step >= 5 else 2
    for n, name in enumerate(plot.names):
        if name not in series.values:
            continue
        value = series.values[name]
        x, y = scale.x(n), scale.y(value)
        over = " over" if not value <= plot.tolerance else ""
        if name == series.ringed:
            shapes.append(f'<circle class="ring" cx="{x}" cy="{y}" r="7"/>')
        told = f"{series.label}: {name}  {short(value)}"
        shapes.append(
            f'<path class="s{number}{over}" d="{mark(number, x, y, size)}">'
            f"<title>{escape(told)}</title></path>"
        )
    return shapes


def mark(number: int, x: float, y: float, size: float = 3) -> str:
    """The shape of a backend's marks: circle, square, triangle, diamond, in turn."""
    s = size
    shapes = (
        f"M{x - s:.1f},{y}a{s},{s} 0 1 0 {2 * s},0a{s},{s} 0 1 0 {-2 * s},0Z",
        f"M{x - s:.1f},{y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}Z",
        f"M{x:.1f},{y - s - 1:.1f}l{s + 0.6},{2 * s}h{-2 * s - 1.2}Z",
        f"M{x:.1f},{y - s - 1:.1f}l{s + 1},{s + 1}l{-s - 1},{s + 1}l{-s - 1},{-s - 1}Z",
    )
    return shapes[number % len(shapes)]
