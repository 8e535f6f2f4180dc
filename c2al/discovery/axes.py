"""Axes as discovery sees them: which columns they read, what is counted together, how cohorts are called.

A target is a set of plain axes counted together. A cross contains its parts, whose counts are sums
of the cross's; so only the axes that no other axis contains are counted.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from c2al.config import Axis
from c2al.data.cohorts import CohortSpec, Condition
from c2al.discovery.histogram import Key
from c2al.errors import CohortError

Cuts = Mapping[str, tuple[float, ...]]
"""Ascending cuts of every numeric plain axis, by its name; float32 values."""

Target = tuple[Axis, ...]
"""Plain axes counted together, in the order of their declaration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns discovery reads besides the axes'."""

    prediction: str
    label: str
    user: str


def plain_axes(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes that read a column, in the order of their declaration."""
    return tuple(a for a in axes if a.kind != "cross")


def parts(axis: Axis, axes: Sequence[Axis]) -> Target:
    """The plain axes of an axis, in the order it names them. Raises CohortError for a column used twice."""
    found = tuple(next(a for a in axes if a.name == name) for name in axis.cross) or (axis,)
    columns = [a.column for a in found]
    twice = next((c for c in columns if columns.count(c) > 1), None)
    if twice is not None:
        raise CohortError(f"axis '{axis.name}' crosses column '{twice}' with itself")
    return found


def targets(axes: Sequence[Axis]) -> tuple[Target, ...]:
    """What to count so that every axis is a sum of some target: the largest sets of parts."""
    sets = {a.name: frozenset(p.name for p in parts(a, axes)) for a in axes}
    largest = dict.fromkeys(s for s in sets.values() if not any(s < other for other in sets.values()))
    return tuple(tuple(a for a in plain_axes(axes) if a.name in names) for names in largest)


def fixed_cuts(axes: Sequence[Axis]) -> dict[str, tuple[float, ...]]:
    """The cuts of the axes of kind 'edges', as float32.

    Raises CohortError where two edges are one float32, where one is beyond float32, and where one is so
    large that float32 would move it past an integer.
    """
    cuts = {a.name: float32_cuts(a.edges) for a in axes if a.kind == "edges"}
    for name, values in cuts.items():
        if not all(map(math.isfinite, values)):
            raise CohortError(f"axis '{name}': an edge is beyond float32 (3.4e38): {list(values)}")
        if len(set(values)) < len(values):
            raise CohortError(f"axis '{name}': two edges are the same float32: {list(values)}")
    for axis in (a for a in axes if a.kind == "edges"):
        for edge, value in zip(axis.edges, map(np.float32, axis.edges), strict=True):
            if abs(edge) > 2**24 and float(value) != edge:
                other = np.nextafter(value, np.float32(math.inf if float(value) < edge else -math.inf))
                low, high = sorted((int(value), int(other)))
                raise CohortError(
                    f"axis '{axis.name}': edges are float32, which does not hold {edge:.17g}; the nearest that it "
                    f"holds are {low} and {high}"
                )
    return cuts


def cut_problem(axes: Sequence[Axis], cuts: Cuts) -> str:
    """What is wrong with the cuts that a file holds for these axes; empty: nothing."""
    numeric = {a.name: a for a in axes if a.kind in ("edges", "percentiles")}
    if set(cuts) != set(numeric):
        return f"it has cuts of {sorted(cuts)}, the numeric axes are {sorted(numeric)}"
    for name, axis in numeric.items():
        expected = len(axis.edges) if axis.kind == "edges" else len(axis.percentiles) - 2
        values = cuts[name]
        if len(values) != expected or any(a >= b for a, b in itertools.pairwise(values)):
            return f"axis '{name}': {list(values)} are not {expected} ascending cuts"
    return ""


def float32_cuts(cuts: Sequence[float]) -> tuple[float, ...]:
    """Rounded to float32, as the shortest decimals that read back as the same float32."""
    with np.errstate(over="ignore"):
        return tuple(float(str(np.float32(c))) for c in cuts)


def cohort_spec(axis: Axis, axes: Sequence[Axis], cuts: Cuts, key: Key) -> CohortSpec:
    """The cohort of an axis that `key` stands for."""
    names, conditions = zip(
        *(_condition(a, cuts, value) for a, value in zip(parts(axis, axes), key, strict=True)), strict=True
    )
    return CohortSpec(axis=axis.name, name=" & ".join(names), conditions=conditions)


def _condition(axis: Axis, cuts: Cuts, value: Any) -> tuple[str, Condition]:
    if value is None:
        return "null", Condition(column=axis.column, null=True)
    if axis.kind == "categorical":
        text = value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, str) and (value == "null" or "&" in value or '"' in value):
            text = json.dumps(value, ensure_ascii=False)
        return text, Condition(column=axis.column, equals=value)
    edges = (None, *cuts[axis.name], None)
    lower, upper = edges[value], edges[value + 1]
    if axis.kind == "percentiles":
        name = f"p{axis.percentiles[value]:g}-p{axis.percentiles[value + 1]:g}"
    elif lower is None or upper is None:
        name = f"< {upper:.9g}" if lower is None else f">= {lower:.9g}"
    else:
        name = f"[{lower:.9g}, {upper:.9g})"
    return name, Condition(column=axis.column, lower=lower, upper=upper)
