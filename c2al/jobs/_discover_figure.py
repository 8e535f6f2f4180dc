"""Densities of the predictions of each axis's first pair: the figure and table beside cohorts.json."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from c2al.config import write_atomically
from c2al.discovery.describe import rounded
from c2al.discovery.divergence import logit
from c2al.discovery.histogram import COUNT, POSITIVE, coarse_edges, to_coarse
from c2al.discovery.scan import Accumulators

_PANELS = 12
"""Axes drawn; the table has all."""
_INK = "#808080"
"""Readable on light and on dark."""


def write_densities(total: Accumulators, document: dict[str, Any], output: Path) -> None:
    """Writes densities.csv and densities.svg; density is per unit of logit(p), bins are 1/16 octave."""
    pairs = list(_first_pairs(total, document))
    edges_K = np.append(coarse_edges(), 1.0)
    width_K = np.maximum(np.diff(logit(edges_K)), 1e-9)
    lines = ["axis,cohort,lower,upper,rows,positives,density"]
    for axis, cohorts in pairs:
        for name, count_K2 in cohorts:
            density_K = count_K2.sum(1) / count_K2.sum() / width_K
            for k in np.flatnonzero(count_K2.sum(1)):
                cells = [_quoted(axis), _quoted(name), f"{edges_K[k]:.9g}", f"{edges_K[k + 1]:.9g}"]
                cells += [str(count_K2[k].sum()), str(count_K2[k, POSITIVE]), str(rounded(density_K[k]))]
                lines.append(",".join(cells))
    write_atomically(output / "densities.csv", "\n".join(lines) + "\n")
    _draw(pairs, edges_K, width_K, output / "densities.svg")


_Pair = tuple[str, list[tuple[str, npt.NDArray[np.int64]]]]


def _first_pairs(total: Accumulators, document: dict[str, Any]) -> Iterator[_Pair]:
    """(axis, [(cohort, counts (K, 2))]) of each axis's first pair, or of its only cohort."""
    for axis, described in zip(total.axes, document["axes"], strict=True):
        names = [c["name"] for c in described["cohorts"]]
        wanted = [described["pairs"][0]["head"], described["pairs"][0]["tail"]] if described["pairs"] else names[:1]
        fine = total.of_axis(axis).fine_CS22[..., COUNT]
        yield axis.name, [(n, to_coarse(fine[names.index(n)].T).T) for n in wanted]


def _draw(pairs: list[_Pair], edges_K: npt.NDArray[Any], width_K: npt.NDArray[Any], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    shown = pairs[:_PANELS]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    style = {"svg.hashsalt": "c2al", "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK}
    with matplotlib.rc_context({**style, "xtick.color": _INK, "ytick.color": _INK, "font.size": 9}):
        figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
        for panel, (axis, cohorts) in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
            for (name, count_K2), color in zip(cohorts, ("#1f77b4", "#e6800d"), strict=False):
                density_K = count_K2.sum(1) / count_K2.sum() / width_K
                filled = np.flatnonzero(density_K)
                inside = slice(max(filled[0], 1), filled[-1] + 1)
                panel.plot(edges_K[:-1][inside], density_K[inside], drawstyle="steps-post", color=color, label=name)
            panel.set(xscale="log", title=axis, xlabel="prediction p", ylabel="density per logit")
            panel.patch.set_alpha(0)
            panel.legend(frameon=False)
        figure.patch.set_alpha(0)
        figure.savefig(path, metadata={"Date": None})


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text
