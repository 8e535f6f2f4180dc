"""cohorts.json and the table: what discovery found, for people and for the jobs that read it.

Legend: C cohorts, S fine slots, K coarse slots. Numbers are written with 10 significant digits, nothing
in the document names a path, a time or a machine, and every sum behind it is of integers, so equal data
give equal bytes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from c2al.config import Axis, DiscoverConfig
from c2al.data.cohorts import FORMAT, VERSION
from c2al.discovery.accumulate import Accumulators, cohort_spec, parts
from c2al.discovery.divergence import MEASURES, TINY
from c2al.discovery.histogram import BINS, COUNT, LOW, NEGATIVE, POSITIVE, Counts, slot_edges
from c2al.discovery.select import AxisPairs, Choice, choose, compare_axis

LISTED_PAIRS = 50
"""Pairs of an axis that cohorts.json lists, by descending lower bound."""

_Floats = npt.NDArray[np.float64]


def describe(accumulators: Accumulators, config: DiscoverConfig) -> dict[str, Any]:
    """The content of cohorts.json."""
    counts = [accumulators.of_axis(a) for a in accumulators.axes]
    pairs = [compare_axis(a.name, c, config) for a, c in zip(accumulators.axes, counts, strict=True)]
    choice = choose(pairs, config)
    axes = [
        _axis(a, c, p, b, accumulators, config)
        for a, c, p, b in zip(accumulators.axes, counts, pairs, choice.bounds, strict=True)
    ]
    total = counts[0].fine_CS22[..., COUNT].sum((0, 1))
    return {
        "format": FORMAT,
        "version": VERSION,
        "rows": int(total.sum()),
        "positives": int(total[POSITIVE]),
        "rule": {
            "measure": config.rule,
            "confidence": config.confidence,
            "correction": config.correction,
            "tested_pairs": choice.tested,
            "min_rows": config.min_rows,
            "min_positives": config.min_positives,
            "axes": list(config.axes),
        },
        "units": {
            "js": "Jensen-Shannon divergence, nats (its square root is the distance), bins of equal pooled mass",
            "kl": "kl_head_tail + kl_tail_head, nats, half a count added to every bin",
            "cosine": "1 - cosine of the densities over logit(p)",
            "wasserstein": "Wasserstein-1 distance in p",
            "wasserstein_logit": "Wasserstein-1 distance in logit(p)",
            "interval": "delete-a-group jackknife by user, two-sided, not corrected for the number of pairs",
            "lower_bound": "of the rule's measure, one-sided, corrected for all tested pairs",
            "ne": "cross-entropy over that of the cohort's positive rate (Normalized Entropy)",
            "calibration": "mean prediction over positive rate",
        },
        "chosen": _chosen(accumulators, counts, pairs, choice),
        "axes": axes,
    }


def _chosen(
    accumulators: Accumulators, counts: Sequence[Counts], pairs: Sequence[AxisPairs], choice: Choice
) -> dict[str, Any]:
    if choice.chosen is None:
        return {"head": None, "tail": None, "reason": choice.reason}
    i, pair = choice.chosen
    keys = counts[i].keys[pairs[i].head_P[pair]], counts[i].keys[pairs[i].tail_P[pair]]
    head, tail = (cohort_spec(accumulators.axes[i], accumulators.axes, accumulators.cuts, k).to_json() for k in keys)
    return {"head": head, "tail": tail, "reason": choice.reason}


def _axis(
    axis: Axis, counts: Counts, pairs: AxisPairs, bound_P: _Floats, accumulators: Accumulators, config: DiscoverConfig
) -> dict[str, Any]:
    specs = [cohort_spec(axis, accumulators.axes, accumulators.cuts, key) for key in counts.keys]
    statistics = cohort_statistics(counts)
    rank_P = np.lexsort((-np.nan_to_num(pairs.rule.value_P, nan=-np.inf), -np.nan_to_num(bound_P, nan=-np.inf)))
    listed = rank_P[:LISTED_PAIRS]
    return {
        "name": axis.name,
        "columns": [p.column for p in parts(axis, accumulators.axes)],
        "cuts": {
            p.name: list(accumulators.cuts[p.name]) for p in parts(axis, accumulators.axes) if p.kind != "categorical"
        },
        "cohorts": [
            {"name": s.name, "conditions": [c.to_json() for c in s.conditions], **values}
            for s, values in zip(specs, statistics, strict=True)
        ],
        "pairs": _pairs(pairs, bound_P, listed, [s.name for s in specs], config),
        "pairs_left_out": len(rank_P) - len(listed),
    }


def _pairs(
    pairs: AxisPairs, bound_P: _Floats, listed: npt.NDArray[np.int64], names: Sequence[str], config: DiscoverConfig
) -> list[dict[str, Any]]:
    head_L, tail_L = pairs.head_P[listed], pairs.tail_P[listed]
    # Fewer than two groups have no error; their quantile is never used.
    width_L = -stdtrit(np.maximum(pairs.freedom_P[listed], 1), (1 - config.confidence) / 2)
    measures = {m: pairs.comparison.estimate(head_L, tail_L, m) for m in MEASURES}
    return [
        {
            "head": names[head_L[i]],
            "tail": names[tail_L[i]],
            "lower_bound": rounded(bound_P[listed[i]]),
            **{
                m: {
                    "value": rounded(e.value_P[i]),
                    "low": rounded(e.value_P[i] - width_L[i] * e.error_P[i]),
                    "high": rounded(e.value_P[i] + width_L[i] * e.error_P[i]),
                }
                for m, e in measures.items()
            },
        }
        for i in range(len(listed))
    ]


def cohort_statistics(counts: Counts) -> list[dict[str, Any]]:
    """Of each cohort: rows, positives, positive rate, mean prediction, calibration and NE (C2AL Eq. 13).

    The mean prediction is exact to float32. The cross-entropy takes each slot's rows at their mean
    prediction; a slot is 1/64 octave wide, so NE is off by about 1e-6 of itself. 0 and 1 count as
    2^-25 away from themselves there. Calibration is null without positives, NE without positives or
    without negatives, each with its reason.
    """
    count_CS2, low_CS2 = counts.fine_CS22[..., COUNT], counts.fine_CS22[..., LOW]
    edge_S = slot_edges()
    unit_S = np.zeros(len(edge_S))
    unit_S[1 : BINS + 1] = np.diff(edge_S)[1:] / 2**17
    sum_CS2 = count_CS2 * edge_S[:, None] + low_CS2 * unit_S[:, None]
    mean_CS2 = np.clip(sum_CS2 / np.maximum(count_CS2, 1), TINY, 1 - TINY)
    entropy_C = -(count_CS2[..., POSITIVE] * np.log(mean_CS2[..., POSITIVE])).sum(1)
    entropy_C -= (count_CS2[..., NEGATIVE] * np.log1p(-mean_CS2[..., NEGATIVE])).sum(1)
    result = []
    for count_2, total, entropy in zip(count_CS2.sum(1), sum_CS2.sum((1, 2)), entropy_C, strict=True):
        rows, positives = int(count_2.sum()), int(count_2[POSITIVE])
        rate = positives / rows
        values = {"rows": rows, "positives": positives, "positive_rate": rate, "mean_prediction": total / rows}
        values["calibration"] = total / positives if positives else math.nan
        defined = 0 < positives < rows
        values["ne"] = (
            entropy / -(positives * math.log(rate) + (rows - positives) * math.log1p(-rate)) if defined else math.nan
        )
        statistics: dict[str, Any] = {k: v if isinstance(v, int) else rounded(v) for k, v in values.items()}
        if not defined:
            statistics["undefined"] = "no positives" if not positives else "no negatives"
        result.append(statistics)
    return result


def rounded(value: float) -> float | None:
    """10 significant digits; null where the value is not defined."""
    return float(f"{value:.10g}") if math.isfinite(value) else None


def table(document: dict[str, Any], pairs: int = 5) -> str:
    """What cohorts.json says, on a screen: axes by their best pair, each with its first `pairs`."""
    measure = document["rule"]["measure"]

    def best(axis: dict[str, Any]) -> float:
        bounds = [p["lower_bound"] for p in axis["pairs"][:1] if p["lower_bound"] is not None]
        return bounds[0] if bounds else -math.inf

    lines = [f"{document['rows']:,} rows, {document['positives']:,} positives"]
    for axis in sorted(document["axes"], key=best, reverse=True):
        lines += ["", f"axis {axis['name']}: {len(axis['cohorts'])} cohorts"]
        rows = {c["name"]: c for c in axis["cohorts"]}
        widest = max(len(n) for n in rows)
        lines.append(f"  {'cohort':<{widest}} {'rows':>13} {'rate':>10} {'mean p':>10} {'calibration':>11} {'NE':>8}")
        by_rows = sorted(rows.values(), key=lambda c: -c["rows"])
        for c in by_rows[:20]:
            lines.append(
                f"  {c['name']:<{widest}} {c['rows']:>13,} {c['positive_rate']:>10.3g} {c['mean_prediction']:>10.3g} "
                f"{_cell(c['calibration']):>11} {_cell(c['ne']):>8}"
            )
        if len(by_rows) > 20:
            lines.append(f"  and {len(by_rows) - 20} smaller cohorts")
        for pair in axis["pairs"][:pairs]:
            value = pair[measure]
            lines.append(
                f"  {pair['head']} | {pair['tail']}: {measure} {_cell(value['value'])} "
                f"[{_cell(value['low'])}, {_cell(value['high'])}], corrected bound {_cell(pair['lower_bound'])}"
            )
    chosen = document["chosen"]
    if chosen["head"] is None:
        return "\n".join([*lines, "", f"nothing chosen: {chosen['reason']}"])
    head, tail = chosen["head"], chosen["tail"]
    return "\n".join(
        [*lines, "", f"axis {head['axis']}: head {head['name']}, tail {tail['name']} ({chosen['reason']})"]
    )


def _cell(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
