"""Figures of the report, as inline SVG that takes the page's text colour in light and in dark.

matplotlib is imported when the first figure is drawn. The same numbers give the same bytes.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from c2al.evaluation.result import Segment
from c2al.training.diagnostics import Y_EDGES

Float = NDArray[np.float64]

# Mid contrast on white and on near-black: at least 3:1 on both.
COLOURS = {"baseline": "#7d8a9c", "C2AL": "#d9722b", "head": "#2f86c9", "tail": "#cf5872"}
_BETTER, _WORSE = "#2c9c6a", "#cf5872"

_INK = "#123456"
"""Stands for the page's text colour while matplotlib draws."""
_WIDTH = 8.6
"""Inches of a full-width figure; the page scales it."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "c2al",
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

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Names of groups are counted anew in each figure and would repeat in one page.
    text = re.sub(r' id="[a-z]+[\w.]*_\d+"', "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    text = re.sub(r"font: (bold|700) ([\d.]+)px [^;\"]*", r"font: 600 \2px system-ui, sans-serif", text)
    text = text.replace(_INK, "currentColor")
    title = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()


def segment_bars(axis: str, segments: Sequence[Segment], overall: float | None) -> str:
    """NE_diff of each segment with its interval (Fig. 6); `overall` is drawn as a line for comparison."""
    with _figure(1, 1, 0.85 + 0.27 * len(segments)) as (figure, grid):
        ax = grid[0, 0]
        for i, segment in enumerate(segments):
            estimate = segment.differences[0].estimates["ne"]
            if estimate.value is None:
                ax.text(0, i, f" undefined: {estimate.reason}", va="center", fontsize=8, alpha=0.7)
                continue
            percent = 100 * estimate.value
            colour = _BETTER if percent < 0 else _WORSE
            if estimate.interval is None:
                ax.barh(i, percent, height=0.62, facecolor="none", edgecolor=colour, lw=0.8, ls=":")
                continue
            low, high = (100 * bound for bound in estimate.interval)
            ax.barh(i, percent, height=0.62, color=colour, alpha=0.35 if low <= 0 <= high else 0.9, lw=0)
            ax.plot([low, high], [i, i], color=_INK, lw=1.1, solid_capstyle="butt")
        if overall is not None:
            ax.axvline(100 * overall, color=_INK, lw=0.9, ls=(0, (4, 3)), alpha=0.6)
        ax.axvline(0, color=_INK, lw=0.8)
        ax.set_yticks(range(len(segments)), [f"{_shorten(s.name)}  ({s.rows:,})" for s in segments])
        ax.set_ylim(len(segments) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("NE_diff, % (negative: C2AL is better)")
        ax.set_title(axis)
        return _svg(figure, f"NE_diff by segment of {axis}")


def densities(edges: Float, density: dict[str, dict[str, Float]]) -> str:
    """Densities over logit(prediction): model -> cohort -> density of each bin (Fig. 3)."""
    with _figure(1, len(density), 2.7, sharey=True, sharex=True) as (figure, grid):
        for ax, (model, cohorts) in zip(grid[0], density.items(), strict=True):
            for cohort, density_K in cohorts.items():
                ax.stairs(density_K, edges, color=COLOURS[cohort], label=cohort, lw=1.5)
                ax.stairs(density_K, edges, color=COLOURS[cohort], fill=True, alpha=0.16, lw=0)
            ax.set_title(model)
            ax.set_xlabel("logit of the prediction")
        grid[0, 0].set_ylabel("density")
        grid[0, 0].legend()
        return _svg(figure, "Densities of predictions on head and tail")


def y_distributions(layers: Sequence[str], y: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Density of Y: model -> layer -> summary of `diagnostics.YRecorder` (Fig. 2)."""
    columns = min(len(layers), 3)
    rows = -(-len(layers) // columns)
    with _figure(rows, columns, 2.5 * rows) as (figure, grid):
        for ax, layer in zip(grid.flat, layers, strict=False):
            found = {model: summaries[layer] for model, summaries in y.items() if layer in summaries}
            limit = max(4 * max(s["std"] for s in found.values()), 1e-3)
            edges = np.linspace(-limit, limit, 82)
            for model, summary in found.items():
                colour = COLOURS[model]
                density = _rebinned(summary["histogram"], edges)
                label = f"{model}: {summary['near_zero_relative']:.1%} near zero"
                ax.stairs(density, edges, color=colour, lw=1.5, label=label)
                ax.stairs(density, edges, color=colour, fill=True, alpha=0.16, lw=0)
            ax.set_title(layer)
            ax.set_xlabel("y")
            ax.set_ylim(top=1.35 * ax.get_ylim()[1])  # room for the legend
            ax.legend(loc="upper left")
        for ax in list(grid.flat)[len(layers) :]:
            ax.set_visible(False)
        grid[0, 0].set_ylabel("density")
        return _svg(figure, "Distribution of Y for baseline and C2AL")


def _rebinned(histogram: Sequence[int], edges: Float) -> Float:
    """Density over `edges` of a histogram over Y_EDGES, values spread evenly over a fine bin."""
    cumulated = np.cumsum(histogram[:-1]) / max(sum(histogram), 1)
    density: Float = np.diff(np.interp(edges, Y_EDGES, cumulated)) / np.diff(edges)
    return density


def curves(panels: dict[str, dict[str, list[tuple[Float, Float]]]]) -> str:
    """Lines over training steps: panel title -> name (a key of COLOURS) -> one (x, y) for each seed."""
    with _figure(1, len(panels), 2.7) as (figure, grid):
        for ax, (title, named) in zip(grid[0], panels.items(), strict=True):
            for name, lines in named.items():
                for i, (x, y) in enumerate(lines):
                    marker = "o" if len(x) < 12 else None
                    label = name if i == 0 else None
                    ax.plot(x, y, color=COLOURS[name], marker=marker, ms=3.5, lw=1.4, alpha=0.85, label=label)
            ax.set_title(title)
            ax.set_xlabel("step")
            ax.legend()
        return _svg(figure, ", ".join(panels))


def _shorten(name: str, length: int = 34) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
