"""Figures of the report, as inline SVG that takes the page's text colour in light and in dark.

matplotlib is imported when the first figure is drawn. The same numbers give the same bytes.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from c2al.config import BASELINE
from c2al.data.cohorts import PAIR_LABELS
from c2al.evaluation.result import Difference, Reliability
from c2al.report.names import figure_text
from c2al.report.page import escaped
from c2al.report.svg import TEXT, svg_text
from c2al.training.diagnostics import Y_EDGES

Float = NDArray[np.float64]

# Mid contrast on white and on near-black: at least 3:1 on both.
_CYCLE = ("#2f86c9", "#cf5872", "#2c9c6a", "#9a6fd0", "#b8860b", "#4aa3a3")
_VERDICTS = {"lower": "#2c9c6a", "higher": "#cf5872"}

PRIMARY = "primary"
"""The task that every model has."""

_INK = "#123456"
"""Stands for the page's text colour while matplotlib draws."""
_WIDTH = 8.6
"""Inches of a full-width figure; the page scales it."""
_STYLE = {
    **TEXT,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@contextlib.contextmanager
def _figure(rows: int, columns: int, height: float, **options: Any) -> Iterator[tuple[Any, Any]]:
    """(figure, axes as a 2-d array), closed at the end. No global state of matplotlib is touched."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def _svg(figure: Any, label: str) -> str:
    """The figure as one <svg> element; `label` is what a screen reader says."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        text = svg_text(figure, transparent=True)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Names of groups are counted anew in each figure and would repeat in one page.
    text = re.sub(r' id="[A-Za-z]+[\w.]*_\d+"', "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    text = re.sub(r"font: (bold|700) ([\d.]+)px [^;\"]*", r"font: 600 \2px system-ui, sans-serif", text)
    text = text.replace(_INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped(label)}"', 1).strip()


_BEYOND = 4.0
"""The axis reaches at most this many times as far from 0 as what passes does; what goes further is cut off."""


def _range(bars: Sequence[tuple[str, int, Difference]], overall: float | None = None) -> tuple[float, float]:
    """What the axis shows, in %: all that passes and `overall`, and of the rest what hides neither.

    Where nothing passes, it goes at most eight times as far as the most precise segment reaches.
    """
    passing: list[float] = [0.0] if overall is None else [0.0, overall]
    others: list[list[float]] = []
    seen = False
    for _, _, difference in bars:
        value, judgement = difference.estimates["ne"].value, difference.judgement
        if value is not None:
            reached = [value, *(judgement.corrected_interval if judgement else ())]
            if judgement and judgement.passes:
                passing += reached
                seen = True
            else:
                others.append(reached)
    reaches = [reach for reached in others if (reach := max(map(abs, reached)))]
    far = max(map(abs, passing))
    if not seen:
        far = max(far, 2 * min(reaches, default=0.005))
    far *= _BEYOND
    everything = passing + [bound for reached in others for bound in reached]
    low, high = max(min(everything), -far), min(max(everything), far)
    if low == high:
        low, high = -far, far
    return 104 * low - 4 * high, 104 * high - 4 * low


def _cut(ax: Any, row: int, reached: Sequence[float]) -> None:
    """An arrow with its number at each edge that what a row reaches (in %: its value, its bounds) lies beyond."""
    left, right = ax.get_xlim()
    for end, edge, beyond in ((min(reached), left, min(reached) < left), (max(reached), right, max(reached) > right)):
        if beyond:
            ax.plot(edge, row, marker="<" if edge == left else ">", ms=5, color=_INK, clip_on=False)
            ax.annotate(
                f"{end:+.1f}%".replace("-", "\N{MINUS SIGN}"),
                (edge, row),
                (6 if edge == left else -6, 4),
                textcoords="offset points",
                ha="left" if edge == left else "right",
                fontsize=7,
            )


def segment_bars(axis: str, bars: Sequence[tuple[str, int, Difference]], overall: float | None) -> str:
    """NE_diff of each segment with its corrected interval (Fig. 6), bars (name, rows, difference).

    Coloured only if it passes the correction; `overall` is drawn as a line for comparison.
    """
    with _figure(1, 1, 0.85 + 0.27 * len(bars)) as (figure, grid):
        ax = grid[0, 0]
        ax.set_xlim(*_range(bars, overall))
        for i, (_, _, difference) in enumerate(bars):
            estimate, judgement = difference.estimates["ne"], difference.judgement
            if estimate.value is None:
                ax.text(0, i, f" undefined: {estimate.reason}", va="center", fontsize=8, alpha=0.7)
            elif judgement is None:
                ax.barh(i, 100 * estimate.value, height=0.62, facecolor="none", edgecolor=_INK, lw=0.8, ls=":")
            else:
                low, high = (100 * bound for bound in judgement.corrected_interval)
                colour, alpha = (_VERDICTS[judgement.verdict], 0.9) if judgement.passes else (_INK, 0.2)
                ax.barh(i, 100 * estimate.value, height=0.62, color=colour, alpha=alpha, lw=0)
                ax.plot([low, high], [i, i], color=_INK, lw=1.1, solid_capstyle="butt")
            if estimate.value is not None:
                bounds = judgement.corrected_interval if judgement else ()
                _cut(ax, i, [100 * v for v in (estimate.value, *bounds)])
        if overall is not None:
            ax.axvline(100 * overall, color=_INK, lw=0.9, ls=(0, (4, 3)), alpha=0.6)
        _rows(ax, [f"{figure_text(name)}  ({rows:,})" for name, rows, _ in bars])
        ax.set_title(figure_text(axis))
        return _svg(figure, f"NE_diff by segment of {axis}")


def forest(differences: Sequence[Difference]) -> str:
    """NE_diff of each arm with its corrected interval; coloured only if it passes the correction."""
    with _figure(1, 1, 0.75 + 0.27 * len(differences)) as (figure, grid):
        ax = grid[0, 0]
        for i, difference in enumerate(differences):
            estimate, judgement = difference.estimates["ne"], difference.judgement
            if estimate.value is None:
                ax.text(0, i, f" undefined: {estimate.reason}", va="center", fontsize=8, alpha=0.7)
                continue
            colour = _VERDICTS[judgement.verdict] if judgement and judgement.passes else _INK
            if judgement:
                ax.plot([100 * b for b in judgement.corrected_interval], [i, i], color=colour, lw=1.4)
            ax.plot(100 * estimate.value, i, marker="o", ms=5, color=colour)
        _rows(ax, [figure_text(d.arm) for d in differences])
        return _svg(figure, "NE_diff by arm")


def _rows(ax: Any, names: Sequence[str]) -> None:
    """Names the rows of a figure of NE_diff, the first on top."""
    ax.axvline(0, color=_INK, lw=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("NE_diff, % (negative: the arm is better)")


class Point(NamedTuple):
    """One setting of a grid."""

    x: float
    ne: float
    std: float
    kept: bool


Grid = dict[tuple[str, str], list[Point]]
"""(setting on the x axis, the other settings) -> its points."""


def grids(panels: dict[str, Grid], baseline: float | None) -> str:
    """Mean validation NE over a setting, a panel per arm, at most three beside each other."""
    columns = min(len(panels), 3)
    with _figure(-(-len(panels) // columns), columns, 2.6 * -(-len(panels) // columns)) as (figure, axes):
        for ax, (arm, grid) in zip(axes.flat, panels.items(), strict=False):
            for i, ((key, others), points) in enumerate(grid.items()):
                colour = _CYCLE[i % len(_CYCLE)]
                x, y, std = ([p[j] for p in sorted(points)] for j in range(3))
                ax.errorbar(
                    x, y, yerr=std, color=colour, marker="o", ms=3.5, lw=1.4, capsize=2, label=figure_text(others)
                )
                for p in points:
                    if p.kept:
                        ax.plot(p.x, p.ne, marker="o", ms=10, mfc="none", color=colour)
                ax.set_xlabel(figure_text(key))
                if min(x) > 0 and max(x) > 5 * min(x):
                    ax.set_xscale("log")
                    ax.set_xticks(sorted(set(x)), [f"{v:g}" for v in sorted(set(x))], minor=False)
                    ax.minorticks_off()
            if baseline is not None:
                ax.axhline(baseline, color=_INK, lw=0.9, ls=(0, (4, 3)), alpha=0.6)
            ax.set_title(figure_text(arm))
            if 1 < len(grid) <= 6:
                ax.legend(fontsize=7)
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_visible(False)
        axes[0, 0].set_ylabel("validation NE")
        return _svg(figure, "Validation NE over the settings of each grid")


def reliability(panels: dict[str, dict[str, Reliability]]) -> str:
    """Reliability diagrams: panel title -> arm -> bins. The first arm is the baseline."""
    columns = min(len(panels), 3)
    with _figure(-(-len(panels) // columns), columns, 2.8 * -(-len(panels) // columns)) as (figure, grid):
        for ax, (title, arms) in zip(grid.flat, panels.items(), strict=False):
            top = max((max((*b.prediction, *b.rate), default=0.0) for b in arms.values()), default=0.0) or 1.0
            ax.plot([0, top], [0, top], color=_INK, lw=0.8, alpha=0.6)
            for i, (arm, bins) in enumerate(arms.items()):
                ax.plot(
                    bins.prediction, bins.rate, marker="o", ms=3.5, lw=1.2, color=_colour(i), label=figure_text(arm)
                )
            ax.set_title(figure_text(title))
            ax.set_xlabel("mean prediction")
            ax.legend()
        for ax in list(grid.flat)[len(panels) :]:
            ax.set_visible(False)
        grid[0, 0].set_ylabel("observed rate")
        return _svg(figure, "Reliability of baseline and arm")


def densities(edges: Float, density: dict[str, dict[str, Float]]) -> str:
    """Densities over logit(prediction): arm -> cohort -> density of each bin (Fig. 3)."""
    with _figure(1, len(density), 2.7, sharey=True, sharex=True) as (figure, grid):
        for ax, (arm, cohorts) in zip(grid[0], density.items(), strict=True):
            colours = task_colours(list(cohorts))
            for cohort, density_K in cohorts.items():
                ax.stairs(density_K, edges, color=colours[cohort], label=figure_text(cohort), lw=1.5)
                ax.stairs(density_K, edges, color=colours[cohort], fill=True, alpha=0.16, lw=0)
            ax.set_title(figure_text(arm))
            ax.set_xlabel("logit of the prediction")
        grid[0, 0].set_ylabel("density")
        grid[0, 0].legend()
        return _svg(figure, "Densities of predictions on the chosen cohorts")


def y_distributions(layers: Sequence[str], y: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Density of Y: arm -> layer -> summary of `diagnostics.YRecorder` (Fig. 2). The first arm is the baseline."""
    columns = min(len(layers), 3)
    rows = -(-len(layers) // columns)
    with _figure(rows, columns, 2.5 * rows) as (figure, grid):
        for ax, layer in zip(grid.flat, layers, strict=False):
            found = {(i, arm): summaries[layer] for i, (arm, summaries) in enumerate(y.items()) if layer in summaries}
            limit = max(4 * max(s["std"] for s in found.values()), 1e-3)
            edges = np.linspace(-limit, limit, 82)
            for (i, arm), summary in found.items():
                density = _rebinned(summary["histogram"], edges)
                label = f"{figure_text(arm)}: {summary['near_zero_relative']:.1%} near zero"
                ax.stairs(density, edges, color=_colour(i), lw=1.5, label=label)
                ax.stairs(density, edges, color=_colour(i), fill=True, alpha=0.16, lw=0)
            ax.set_title(figure_text(layer))
            ax.set_xlabel("y")
            ax.set_ylim(top=1.35 * ax.get_ylim()[1])  # room for the legend
            ax.legend(loc="upper left")
        for ax in list(grid.flat)[len(layers) :]:
            ax.set_visible(False)
        grid[0, 0].set_ylabel("density")
        return _svg(figure, "Distribution of Y for baseline and arm")


def _rebinned(histogram: Sequence[int], edges: Float) -> Float:
    """Density over `edges` of a histogram over Y_EDGES, values spread evenly over a fine bin."""
    cumulated = np.cumsum(histogram[:-1]) / max(sum(histogram), 1)
    density: Float = np.diff(np.interp(edges, Y_EDGES, cumulated)) / np.diff(edges)
    return density


def curves(panels: dict[str, dict[str, list[tuple[Float, Float]]]]) -> str:
    """Lines over training steps: panel title -> name -> one (x, y) for each seed.

    Names are arms where the baseline is among them, and tasks otherwise.
    """
    with _figure(1, len(panels), 2.7) as (figure, grid):
        tasks = list(dict.fromkeys(name for named in panels.values() if BASELINE not in named for name in named))
        colours = task_colours(tasks)
        for ax, (title, named) in zip(grid[0], panels.items(), strict=True):
            for position, (name, lines) in enumerate(named.items()):
                colour = _colour(position) if BASELINE in named else colours[name]
                for i, (x, y) in enumerate(lines):
                    marker = "o" if len(x) < 12 else None
                    label = figure_text(name) if i == 0 else None
                    ax.plot(x, y, color=colour, marker=marker, ms=3.5, lw=1.4, alpha=0.85, label=label)
            ax.set_title(figure_text(title))
            ax.set_xlabel("step")
            ax.legend()
        return _svg(figure, ", ".join(panels))


def task_colours(tasks: Sequence[str]) -> dict[str, str]:
    """Task or cohort -> its colour, which is the same in every figure of a page, whatever else is drawn beside it."""
    known = (*PAIR_LABELS, PRIMARY)
    fixed = {name: _CYCLE[i] for i, name in enumerate(known)}
    free = _CYCLE[len(known) :]
    others = [t for t in tasks if t not in fixed]
    return {t: fixed.get(t) or free[others.index(t) % len(free)] for t in tasks}


def _colour(position: int) -> str:
    """The baseline, which comes first, is grey."""
    return ("#7d8a9c", "#d9722b", *_CYCLE)[position % (2 + len(_CYCLE))]
