"""Plots as SVG, by hand: lines and points over axes, in the colours of the page's style sheet, with no script."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 38
MANY = 10.0
"""The largest over the smallest of values that are far apart."""
_MOST_POINTS = 600
"""Of a line; more are merged, each keeping its largest."""


class Line(NamedTuple):
    """`style`: a class of the style sheet, s0 to s5."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str
    filled: bool = False


class Axis(NamedTuple):
    low: float
    high: float
    ticks: list[float]
    log: bool

    def share(self, value: float) -> float:
        """0 at its low end, 1 at its high end."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def number(value: float) -> str:
    """Short, as people write it: 1.5, 20, 3 k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"


def linear(high: float, low: float = 0.0) -> Axis:
    """From `low` or a bit below, with about five round ticks."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(each for each in (1, 2, 2.5, 5, 10) if span / (step * each) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, [each * step for each in range(first, last + 1)], False)


def logarithmic(low: float, high: float) -> Axis:
    """Ticks at 1, 2 and 5 of each decade, or at the decades where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    marks = [each * 10.0**decade for decade in range(first, last + 1) for each in steps]
    bottom = max((each for each in marks if each <= low), default=low)
    top = min((each for each in marks if each >= high), default=high)
    return Axis(bottom, top, [each for each in marks if bottom <= each <= top], True)


def fitting(low: float, high: float) -> Axis:
    """Logarithmic where the values are far apart. `low` is above 0."""
    return logarithmic(low, high) if high > MANY * low else linear(max(high, low * 1.01), low)


def plot(
    lines: Sequence[Line], x: Axis, y: Axis, x_title: str, y_title: str, points: Sequence[tuple[float, float]] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:  # fmt: skip
    """`points` are drawn beneath the lines; `marks`: vertical lines at an x, with a word."""
    wide, high = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def at_x(value: float) -> float:
        return _LEFT + wide * min(max(x.share(value), 0.0), 1.0)

    def at_y(value: float) -> float:
        return _TOP + high * (1 - min(max(y.share(value), 0.0), 1.0))

    label = escape(f"{y_title} over {x_title}", quote=True)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    parts += [_grid(x, y, at_x, at_y)]
    base = _TOP + high
    for place, word in marks:
        if x.low <= place <= x.high:
            parts.append(f'<line class="mark" x1="{at_x(place):.1f}" x2="{at_x(place):.1f}" y1="{_TOP}" y2="{base}"/>')
            parts.append(f'<text class="marked" x="{at_x(place) + 4:.1f}" y="{_TOP + 10}">{escape(word)}</text>')
    if points:
        dots = "".join(f"M{at_x(a):.1f} {at_y(b):.1f}h0" for a, b in points)
        parts.append(f'<path class="dots s0" d="{dots}"/>')
    for line in lines:
        pairs = [f"{at_x(a):.1f} {at_y(b):.1f}" for a, b in _thinned(line.xs, line.ys)]
        if not pairs:
            continue
        path = "M" + "L".join(pairs)
        if line.filled:
            first, last = pairs[0].split()[0], pairs[-1].split()[0]
            parts.append(f'<path class="area {line.style}" d="{path}L{last} {base}L{first} {base}Z"/>')
        parts.append(f'<path class="line {line.style}" d="{path}"><title>{escape(line.name)}</title></path>')
    parts.append(
        f'<text class="axis" x="{_LEFT + wide / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_title)}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(13 {_TOP + high / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>"
    )
    return "".join([*parts, "</svg>"])


def _grid(x: Axis, y: Axis, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
    parts = []
    for tick in y.ticks:
        place = at_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks:
        place = at_x(tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{place:.1f}" y="{HEIGHT - _BOTTOM + 14}" text-anchor="middle">{number(tick)}</text>')
    return "".join(parts)


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    pairs = list(zip(xs, ys, strict=True))
    size = -(-len(pairs) // _MOST_POINTS)
    if size <= 1:
        return pairs
    return [max(pairs[at : at + size], key=lambda pair: pair[1]) for at in range(0, len(pairs), size)]


def legend(lines: Sequence[Line]) -> str:
    return "".join(f'<span><i class="key {line.style}"></i>{escape(line.name)}</span>' for line in lines)
