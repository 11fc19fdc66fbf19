"""Small plots of differences and means with their intervals, as inline SVG that fits any width.

Places are percentages of the width, so that text and points keep their size on a phone. Colours are those of the text,
so that a dark page shows them too.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from hloss.study.tables import signed

ROW, AXIS = 16, 16  # heights in pixels
GREEN = "#1b9e77"


class Interval(NamedTuple):
    """A value with its interval.

    Attributes:
        value: the value.
        low: lower bound; NaN without an interval.
        high: upper bound; NaN without an interval.
        is_open: whether the point is an open circle.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    is_open: bool = False


class Scale:
    """Places of values in percent of the width.

    Args:
        values: values that the scale includes; NaN and infinity are left out.
    """

    def __init__(self, values: Sequence[float]) -> None:
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite), max(finite)
        space = 0.08 * (high - low) or 1.0
        self.low, self.high = low - space, high + space

    def place(self, value: float) -> float:
        """The place of a value.

        Args:
            value: the value; one outside of the scale gets the place of the nearest end.

        Returns:
            Percent of the width, in [0, 100].
        """
        clipped = min(max(value, self.low), self.high)
        return round(100 * (clipped - self.low) / (self.high - self.low), 2)


def difference_plot(rows: Sequence[Interval], holds: tuple[float, float], margin: float, description: str) -> str:
    """SVG of differences with zero, their margin, and the region in which a claim holds.

    Args:
        rows: the differences, one per line.
        holds: bounds of the shaded region; NaN or infinity: no bound. A line marks each bound.
        margin: largest negligible difference, marked at both signs if 0 bounds the region; NaN: no margin.
        description: what the plot shows, for screen readers.
    """
    bounds = [bound for bound in holds if math.isfinite(bound)]
    marks = {bound for bound in bounds if bound}
    if 0 in bounds and math.isfinite(margin):
        marks |= {-margin, margin}
    scale = Scale([0.0, *marks, *(value for row in rows for value in row[:3])])
    height = ROW * len(rows)
    first, last = (scale.place(edge) for edge in _edges(holds, scale))
    parts = [f'<rect class="holds" x="{first}%" width="{last - first:.2f}%" height="{height}" fill="{GREEN}" '
             'fill-opacity="0.18"/>']  # fmt: skip
    parts += [_line(scale.place(mark), height, ' stroke-dasharray="3 2"') for mark in sorted(marks)]
    parts += [_line(scale.place(0), height)]
    parts += [_interval(row, scale, ROW * (i + 0.5)) for i, row in enumerate(rows)]
    parts += _labels([0.0, *sorted(marks, key=abs), *_ticks(scale.low, scale.high)], scale, height + AXIS - 3)
    return _svg(parts, height + AXIS, description)


def mean_plot(mean: Interval, scale: Scale, earlier: Sequence[float], description: str) -> str:
    """SVG of a mean with its interval; means of shorter training are small points, the shortest the smallest.

    Args:
        mean: the mean.
        scale: the scale that all rows share.
        earlier: means after shorter training, the shortest first; NaN: unknown.
        description: what the plot shows, for screen readers.
    """
    parts = [f'<line x1="0" x2="100%" y1="{ROW / 2}" y2="{ROW / 2}" stroke="currentColor" stroke-opacity="0.15"/>']
    for i, value in enumerate(earlier):
        if math.isfinite(value):
            radius = 2 + 1.2 * i / max(1, len(earlier) - 1)
            parts += [f'<circle cx="{scale.place(value)}%" cy="{ROW / 2}" r="{radius:g}" fill="currentColor" '
                      'fill-opacity="0.75"/>']  # fmt: skip
    return _svg([*parts, _interval(mean, scale, ROW / 2)], ROW, description)


def axis_plot(scale: Scale) -> str:
    """SVG of the axis below rows of `mean_plot`, in percent: it has ticks from 0 to 100 only.

    Args:
        scale: the scale of the rows.
    """
    ticks = _ticks(max(scale.low, 0.0), min(scale.high, 100.0))
    texts = [f"{tick:g}" for tick in ticks]
    parts = [_line(scale.place(tick), 3) for tick in ticks]
    parts += [_text(scale.place(tick), AXIS - 2, text) for tick, text in zip(ticks, texts, strict=True)]
    return _svg(parts, AXIS, f"Axis from {texts[0]} to {texts[-1]} %" if texts else "Axis in %")


def _ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers at equal distances."""
    step = next((s for s in (0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= 6), math.inf)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)] if math.isfinite(step) else []


def _edges(holds: tuple[float, float], scale: Scale) -> tuple[float, float]:
    low, high = holds
    return low if math.isfinite(low) else scale.low, high if math.isfinite(high) else scale.high


def _interval(row: Interval, scale: Scale, y: float) -> str:
    parts = []
    if math.isfinite(row.low):
        low, high = scale.place(row.low), scale.place(row.high)
        parts = [f'<line x1="{low}%" x2="{high}%" y1="{y}" y2="{y}" stroke="currentColor" stroke-width="2.5"/>']
        parts += [
            f'<line x1="{end}%" x2="{end}%" y1="{y - 5}" y2="{y + 5}" stroke="currentColor"/>' for end in (low, high)
        ]
    open_circle = ' style="fill: var(--page, Canvas)" stroke="currentColor" stroke-width="2"'
    inside = open_circle if row.is_open else ' fill="currentColor"'
    return "".join([*parts, f'<circle cx="{scale.place(row.value)}%" cy="{y}" r="4"{inside}/>'])


def _line(place: float, height: float, style: str = "") -> str:
    return f'<line x1="{place}%" x2="{place}%" y1="0" y2="{height}" stroke="currentColor" stroke-opacity="0.6"{style}/>'


def _labels(values: Sequence[float], scale: Scale, y: float) -> list[str]:
    """Labels of the values; a value too near to an earlier one gets none."""
    shown: list[float] = []
    for value in values:
        if all(abs(scale.place(value) - scale.place(other)) >= 12 for other in shown):
            shown.append(value)
    return [_text(scale.place(value), y, signed(value, 0 if value == round(value) else 1)) for value in shown]


def _text(place: float, y: float, text: str) -> str:
    return f'<text x="{place}%" y="{y}" text-anchor="middle" font-size="11" fill="currentColor">{text}</text>'


def _svg(parts: Sequence[str], height: float, description: str) -> str:
    label = html.escape(description, quote=True)
    style = f'width="100%" height="{height}" style="overflow: visible"'
    return f'<svg role="img" aria-label="{label}" {style}>{"".join(parts)}</svg>'
