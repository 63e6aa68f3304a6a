"""The page that `tidegate simulate --plot` writes: one file of HTML with the plots in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.edge.energy.simulate.compare import BOUND, Cell, Scene, rows_of
from tidegate.edge.energy.simulate.policies import policies
from tidegate.edge.energy.simulate.run import simulate
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MARKERS = "osD^vP*X<>hp"
"""Points of policies often lie on each other: shapes tell them apart where colours do not."""


def write_page(path: Path, scene: Scene, cells: Sequence[Cell]) -> None:
    """Draw what a person would look at first.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot", str(path), "used with `pip install tidegate[simulate]`") from None
    figures = [
        ("Joules against misses", _pareto(Figure(figsize=(7.5, 4.5)), cells)),
        ("What leaves the device", _offloaded(Figure(figsize=(7.5, 3.5)), cells)),
        *_day(Figure, scene),
    ]
    parts = [f"<h2>{html.escape(title)}</h2>{_image(figure)}" for title, figure in figures]
    about = (
        f"{scene.kind}, {scene.requests} requests {scene.pace_told};"
        f" watts of the {scene.costs.scope}, {scene.costs.source}. Assumed: {scene.assumed.why}."
    )
    page = (
        "<!doctype html><meta charset=utf-8><title>tidegate simulate</title>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;"
        "padding:0 1rem;color:#222}img{max-width:100%}p{color:#555}</style>"
        f"<h1>Simulated: {html.escape(scene.kind)}</h1><p>{html.escape(about)}</p>{''.join(parts)}"
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError("plot", str(path), f"a file to write to: {error.strerror}") from None


def _image(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _pareto(figure: Figure, cells: Sequence[Cell]) -> Figure:
    axes = figure.subplots()
    shown = [row for row in rows_of(cells) if row.policy != BOUND]
    for number, row in enumerate(shown):
        ours = row.policy == "pace"
        axes.scatter(
            row.system_j + row.price,
            100 * row.missed_share,
            s=110 if ours else 55,
            marker=_MARKERS[number % len(_MARKERS)],
            color="#c2410c" if ours else f"C{number % 10}",
            zorder=4 if ours else 3,
            alpha=0.85,
            label=row.policy,
        )
    for row in rows_of(cells):
        if row.policy == BOUND:
            axes.axvline(row.system_j, color="#0f766e", linestyle="--", linewidth=1)
            at, over = (row.system_j, 1.0), ("data", "axes fraction")
            axes.annotate("bound", at, (3, 3), over, "offset points", color="#0f766e", fontsize=9)
    axes.set_xlabel("J a request: the device's above idling, the cloud's, and its price in joules")
    axes.set_ylabel("late or never answered, % of requests")
    axes.set_xlim(left=0)
    most = max(5.0, *(100 * row.missed_share for row in shown))
    axes.set_ylim(-0.05 * most, 1.08 * most)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    return figure


def _offloaded(figure: Figure, cells: Sequence[Cell]) -> Figure:
    axes = figure.subplots()
    rows = [row for row in rows_of(cells) if row.policy != BOUND]
    bars = axes.barh(
        [row.policy for row in rows], [100 * row.offloaded_share for row in rows], color="#0369a1"
    )
    axes.bar_label(bars, fmt="%.0f %%", padding=4, fontsize=9)
    axes.set_axisbelow(True)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("answered by the cloud, % of requests")
    axes.grid(axis="x", alpha=0.25)
    figure.tight_layout()
    return figure


def _day(figures: type[Figure], scene: Scene) -> list[tuple[str, Figure]]:
    """Temperature, and the battery where there is one, through the run of the first seed."""
    jobs = scene.jobs(1)
    setup = replace(scene.setup(jobs), keep_line=True)
    if setup.heat is None and not scene.on_battery:
        return []
    known = policies(
        scene.costs,
        default_mode=scene.default_mode,
        radio=scene.radio,
        cloud=scene.cloud,
        weights=scene.weights,
    )
    lines = {name: simulate(jobs, setup, known[name]).line for name in ("pace", "edf")}
    count = int(setup.heat is not None) + int(scene.on_battery)
    figure = figures(figsize=(7.5, 0.9 + 2.8 * count))
    rows: Any = figure.subplots(count, sharex=True, squeeze=False)
    if setup.heat is not None:
        axes = rows[0][0]
        _lines(
            axes, {name: [(at_s, celsius) for at_s, celsius, _ in lines[name]] for name in lines}
        )
        axes.axhline(setup.soft_c, color="#444", linestyle=":", linewidth=1)
        axes.annotate("soft limit", (0, setup.soft_c), fontsize=8, va="bottom", color="#444")
        axes.set_ylabel("temperature, °C")
    if scene.on_battery:
        axes = rows[-1][0]
        full_j = setup.battery_j
        _lines(
            axes,
            {
                name: [(at_s, 100 * left / full_j) for at_s, _, left in lines[name]]
                for name in lines
            },
        )
        axes.set_ylabel("battery, %")
        axes.set_ylim(0, 103)
    rows[-1][0].set_xlabel("hours")
    figure.tight_layout()
    return [("The run of the first seed", figure)]


def _lines(axes: Any, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """PACE before plain EDF, over hours."""
    for name, color, depth in (("edf", "#94a3b8", 2), ("pace", "#c2410c", 3)):
        hours = [at_s / 3600 for at_s, _ in lines[name]]
        values = [value for _, value in lines[name]]
        axes.plot(hours, values, color=color, linewidth=0.9, zorder=depth, label=name)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncol=2, frameon=False, fontsize=9)
