"""The page that `tidegate simulate --plot` writes: one file of HTML with the plots in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.edge.energy.simulate.compare import BOUND, Cell, Scene, rows_of
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
        f"{scene.kind}, {scene.requests} requests at {scene.utilisation:g} of the device;"
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
            axes.annotate("bound", (row.system_j, 0), color="#0f766e", fontsize=9)
    axes.set_xlabel("joules and price of a request")
    axes.set_ylabel("late, % of requests")
    axes.set_ylim(bottom=-1)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    return figure


def _offloaded(figure: Figure, cells: Sequence[Cell]) -> Figure:
    axes = figure.subplots()
    rows = [row for row in rows_of(cells) if row.policy != BOUND]
    axes.barh(
        [row.policy for row in rows], [100 * row.offloaded_share for row in rows], color="#0369a1"
    )
    axes.invert_yaxis()
    axes.set_xlabel("answered by the cloud, % of requests")
    axes.grid(axis="x", alpha=0.25)
    figure.tight_layout()
    return figure


def _day(figures: type[Figure], scene: Scene) -> list[tuple[str, Figure]]:
    """Temperature, and the battery where there is one, through PACE's run of the first seed."""
    from dataclasses import replace

    from tidegate.edge.energy.pace import Pace
    from tidegate.edge.energy.pace_state import Weights
    from tidegate.edge.energy.simulate.run import simulate

    jobs = scene.jobs(1)
    setup = replace(scene.setup(jobs), keep_line=True)
    if setup.heat is None and not scene.on_battery:
        return []
    pace = Pace(
        costs=scene.costs,
        weights=scene.weights or Weights(),
        radio=scene.radio,
        cloud=scene.cloud,
    )
    line = simulate(jobs, setup, pace).line
    hours = [at_s / 3600 for at_s, _, _ in line]
    figure = figures(figsize=(7.5, 3.8))
    axes: Any = figure.subplots()
    if setup.heat is not None:
        axes.plot(hours, [celsius for _, celsius, _ in line], color="#c2410c", linewidth=0.8)
        axes.axhline(setup.soft_c, color="#c2410c", linestyle=":", linewidth=1)
        axes.set_ylabel("temperature, °C (dotted: soft limit)")
    if scene.on_battery:
        other = axes.twinx() if setup.heat is not None else axes
        other.plot(hours, [100 * left / setup.battery_j for _, _, left in line], color="#0369a1")
        other.set_ylabel("battery, %")
        other.set_ylim(0, 100)
    axes.set_xlabel("hours")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    return [("PACE's run of the first seed", figure)]
