"""The figure beside cohorts.json: densities of the predictions of each axis's first pair."""

import csv
import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from c2al.files import write_atomically
from c2al.report.names import figure_text
from c2al.report.svg import TEXT, svg_text

_PANELS = 12
"""Axes drawn; densities.csv has all."""
_INK = "#808080"
"""Readable on light and on dark."""


def draw_densities(folder: Path) -> None:
    """Draws the folder's densities.csv, which `discover` wrote, as densities.svg, whole or not at all.

    The lowest bin has no lower edge on a logarithmic axis and is left out.
    """
    densities: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    with (folder / "densities.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            bins = densities.setdefault(_name(row["axis"]), {}).setdefault(_name(row["cohort"]), [])
            bins.append((float(row["lower"]), float(row["upper"]), float(row["density"])))
    shown = list(densities.items())[:_PANELS]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    style = {**TEXT, "font.family": "sans-serif", "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK}
    with matplotlib.rc_context({**style, "xtick.color": _INK, "ytick.color": _INK, "font.size": 9}):
        figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
        for panel, (axis, cohorts) in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
            for (name, bins), color in zip(cohorts.items(), ("#1f77b4", "#e6800d"), strict=False):
                edges, values = _steps([b for b in bins if b[0] > 0])
                panel.plot(edges, values, drawstyle="steps-post", color=color, label=figure_text(name))
            panel.set(xscale="log", title=figure_text(axis), xlabel="prediction p", ylabel="density per logit")
            panel.patch.set_alpha(0)
            panel.legend(frameon=False)
        figure.patch.set_alpha(0)
        drawn = svg_text(figure)
    write_atomically(folder / "densities.svg", drawn)


def _name(cell: str) -> str:
    """The name in a cell, without the quote that keeps spreadsheets from running it as a formula."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] in ("=", "+", "-", "@", "\t", "\r") else cell


def _steps(bins: list[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Lower edges and heights of a step line over ascending bins; a gap between bins has height 0."""
    edges: list[float] = []
    values: list[float] = []
    for i, (lower, upper, value) in enumerate(bins):
        edges.append(lower)
        values.append(value)
        if i + 1 < len(bins) and bins[i + 1][0] > upper:
            edges.append(upper)
            values.append(0.0)
    return edges, values
