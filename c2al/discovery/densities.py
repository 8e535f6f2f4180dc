"""Densities of the predictions of each axis's first pair: the table beside cohorts.json."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from c2al.discovery.accumulators import Accumulators
from c2al.discovery.describe import rounded
from c2al.discovery.divergence import logit
from c2al.discovery.histogram import COUNT, POSITIVE, coarse_edges, to_coarse
from c2al.files import write_atomically
from c2al.text import csv_text

DENSITIES = "densities.csv"


def write_densities(total: Accumulators, document: dict[str, Any], output: Path) -> None:
    """Writes densities.csv; density is per unit of logit(p), bins are 1/16 octave.

    A name that a spreadsheet would run as a formula has a quote in front.
    """
    edges_K = np.append(coarse_edges(), 1.0)
    width_K = np.maximum(np.diff(logit(edges_K)), 1e-9)
    rows = [["axis", "cohort", "lower", "upper", "rows", "positives", "density"]]
    for axis, cohorts in _first_pairs(total, document):
        for name, count_K2 in cohorts:
            density_K = count_K2.sum(1) / count_K2.sum() / width_K
            for k in np.flatnonzero(count_K2.sum(1)):
                edges = [f"{edges_K[k]:.9g}", f"{edges_K[k + 1]:.9g}"]
                counts = [str(count_K2[k].sum()), str(count_K2[k, POSITIVE])]
                rows.append([axis, name, *edges, *counts, str(rounded(density_K[k]))])
    write_atomically(output / DENSITIES, csv_text(rows))


_Pair = tuple[str, list[tuple[str, npt.NDArray[np.int64]]]]


def _first_pairs(total: Accumulators, document: dict[str, Any]) -> Iterator[_Pair]:
    """(axis, [(cohort, counts (K, 2))]) of each axis's first pair, or of its only cohort."""
    for axis, described in zip(total.axes, document["axes"], strict=True):
        names = [c["name"] for c in described["cohorts"]]
        wanted = [described["pairs"][0]["head"], described["pairs"][0]["tail"]] if described["pairs"] else names[:1]
        fine = total.of_axis(axis).fine_CS22[..., COUNT]
        yield axis.name, [(n, to_coarse(fine[names.index(n)].T).T) for n in wanted]
