"""One self-contained HTML page of what an evaluation found: tables, and pictures as inline SVG.

Nothing is loaded from elsewhere, so the page can be mailed and still opens. Colours follow the
reader's light or dark setting.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.model.quality import ConfidenceBin

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 320, 72, 44, 16, 24

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --dim: #66788a; --line: #d5dde5; --mark: #0b6e99;
  --second: #c05a1c; --page: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #93a4b5; --line: #35424f;
  --mark: #58b4d8; --second: #e5935b; --page: #12181e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 760px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
svg .label { fill: var(--ink); } svg line { stroke: var(--line); }
svg .front { stroke: var(--mark); fill: none; stroke-dasharray: 4 4; }
.wide { overflow-x: auto; } p { color: var(--dim); }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """How far the residual stream behind one layer is from the checkpoint's."""

    layer: int
    error: float
    """Root mean square of the difference over that of the checkpoint's stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One bundle of a comparison."""

    name: str
    size_mb: float
    """Weights, 10^6 bytes."""
    bits_per_weight: float
    kl_mean: float
    kl_p99: float
    agreement: float
    perplexity: float
    exact_match: float | None = None
    best: bool = False
    """No other is both smaller and closer."""


def pareto(sizes: Sequence[float], errors: Sequence[float]) -> list[bool]:
    """Which candidates no other beats or equals in both, and beats in one."""
    pairs = list(zip(sizes, errors, strict=True))
    return [
        not any(a <= size and b <= error and (a, b) != (size, error) for a, b in pairs)
        for size, error in pairs
    ]


def page(
    title: str,
    *,
    candidates: Sequence[Candidate] = (),
    confidence: Sequence[ConfidenceBin] = (),
    layers: Sequence[LayerError] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page; a part without data is left out."""
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    if candidates:
        parts += ["<h2>Quality against size</h2>", _scatter(candidates), _table(candidates)]
    if layers:
        parts += [
            "<h2>Error per layer</h2>",
            "<p>How far the residual stream behind each layer is from the checkpoint's.</p>",
            _bars(layers),
        ]
    if confidence:
        parts += [
            "<h2>Confidence</h2>",
            "<p>How often the most likely token is the checkpoint's, by its lead over the second."
            "</p>",
            _confidence(confidence),
        ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


class _Axis:
    """Maps values to pixels, with round marks."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        self._log = log and min(values) > 0
        self.low: float = 0.0
        self.high: float = 1.0
        low, high = min(values), max(values)
        if self._log:
            self.low = 10.0 ** math.floor(math.log10(low))
            self.high = 10.0 ** math.ceil(math.log10(high * 1.0001))
        else:
            self.high = _round_up(high or 1.0)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self._log:
            share = math.log10(value / self.low) / math.log10(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def marks(self) -> list[float]:
        """Values to label: powers of ten, or quarters."""
        if self._log:
            powers = round(math.log10(self.high / self.low))
            return [self.low * 10**i for i in range(powers + 1)]
        return [self.low + (self.high - self.low) * i / 4 for i in range(5)]


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8, 10 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value)


def _scatter(candidates: Sequence[Candidate]) -> str:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    x = _Axis([one.size_mb for one in candidates], _LEFT, right, log=False)
    y = _Axis([max(one.kl_mean, 1e-9) for one in candidates], floor, _TOP, log=True)
    shapes = _frame(x, y, "weights, MB", "mean KL divergence, nats")
    front = sorted((one.size_mb, max(one.kl_mean, 1e-9)) for one in candidates if one.best)
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in front)
    shapes.append(f'<polyline class="front" points="{points}"/>')
    for one in candidates:
        at, high = x(one.size_mb), y(max(one.kl_mean, 1e-9))
        colour = "--mark" if one.best else "--second"
        left = at > right - 120
        anchor, offset = ("end", -9) if left else ("start", 9)
        shapes.append(f'<circle cx="{at:.1f}" cy="{high:.1f}" r="5" fill="var({colour})"/>')
        shapes.append(
            f'<text class="label" x="{at + offset:.1f}" y="{high + 4:.1f}" '
            f'text-anchor="{anchor}">{html.escape(one.name)}</text>'
        )
    return _svg(shapes)


def _bars(layers: Sequence[LayerError]) -> str:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    step = (right - _LEFT) / len(layers)
    y = _Axis([one.error for one in layers], floor, _TOP, log=False)
    places = [_LEFT + step * (index + 0.5) for index in range(len(layers))]
    shapes = _frame(None, y, "layer", "relative error")
    every = math.ceil(len(layers) / 24)
    for at, one in zip(places, layers, strict=True):
        high = y(one.error)
        shapes.append(
            f'<rect x="{at - step * 0.35:.1f}" y="{high:.1f}" width="{step * 0.7:.1f}" '
            f'height="{floor - high:.1f}" fill="var(--mark)"/>'
        )
        if one.layer % every == 0:
            shapes.append(
                f'<text x="{at:.1f}" y="{floor + 16}" text-anchor="middle">{one.layer}</text>'
            )
    return _svg(shapes)


def _confidence(bins: Sequence[ConfidenceBin]) -> str:
    rows = "".join(
        f"<tr><td>{one.margin:g} or more</td><td>{one.share:.1%}</td>"
        f"<td>{f'{one.agreement:.2%}' if one.share else '-'}</td></tr>"
        for one in bins
    )
    head = "<tr><th>lead, logits</th><th>positions</th><th>agreement</th></tr>"
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def _table(candidates: Sequence[Candidate]) -> str:
    rows = ""
    for one in sorted(candidates, key=lambda one: one.size_mb):
        task = "-" if one.exact_match is None else f"{one.exact_match:.1%}"
        rows += (
            f"<tr><td>{html.escape(one.name)}{' *' if one.best else ''}</td>"
            f"<td>{one.size_mb:.2f}</td><td>{one.bits_per_weight:.2f}</td>"
            f"<td>{one.kl_mean:.5f}</td><td>{one.kl_p99:.4f}</td><td>{one.agreement:.2%}</td>"
            f"<td>{one.perplexity:.3f}</td><td>{task}</td></tr>"
        )
    names = ("", "MB", "bits", "mean KL", "99 % KL", "agreement", "perplexity", "exact match")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
        "<p>* no other is both smaller and closer to the checkpoint.</p>"
    )


def _frame(x: _Axis | None, y: _Axis, x_name: str, y_name: str) -> list[str]:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    shapes = [f'<line x1="{_LEFT}" y1="{floor}" x2="{right}" y2="{floor}"/>']
    for mark in y.marks():
        at = y(mark)
        shapes.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        label = f"{mark:.3g}"
        shapes.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for mark in [] if x is None else x.marks():
        label = f"{mark:.3g}"
        shapes.append(
            f'<text x="{x(mark):.1f}" y="{floor + 16}" text-anchor="middle">{label}</text>'
            if x is not None
            else ""
        )
    middle = (_LEFT + right) / 2
    shapes.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{x_name}</text>')
    shapes.append(
        f'<text transform="translate(14 {(_TOP + floor) / 2}) rotate(-90)" '
        f'text-anchor="middle">{y_name}</text>'
    )
    return shapes


def _svg(shapes: Sequence[str]) -> str:
    body = "\n".join(shapes)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n{body}\n</svg>'
