"""Sections on cohorts: NE_diff by segment, how the cohorts were chosen, predictions and calibration on them."""

from typing import Any

from c2al.data.cohorts import PAIR_LABELS
from c2al.evaluation.result import COHORT, OVERALL, Segment
from c2al.report import figures
from c2al.report.experiment import Experiment
from c2al.report.page import between, escaped, figure, number, table, value
from c2al.report.verdict import FORM
from c2al.text import percent

MOST_SEGMENTS = 30
"""Bars of one axis; the largest segments are drawn, all are in evaluation.csv."""
MOST_NAMED = 3
"""Segments of an arm that the table names."""
MOST_PAIRS = 5
"""Pairs of cohorts listed for one axis."""
MEASURES = {
    "js": "JS",
    "kl": "KL",
    "cosine": "1 − cosine",
    "wasserstein": "W1 in p",
    "wasserstein_logit": "W1 in logit",
}


def segments(e: Experiment) -> str:
    """NE_diff by segment (Fig. 6): only what passes the correction is coloured."""
    if e.main is None:
        return "<h2>NE_diff by segment</h2><p>No arm was compared with the baseline.</p>"
    baseline, arm = e.record.baseline.name, e.main.name
    axes = dict.fromkeys(s.axis for s in e.evaluation.segments if s.axis not in (OVERALL, COHORT))
    drawn = []
    for axis in axes:
        found = [s for s in e.evaluation.segments if s.axis == axis]
        largest = {s.name for s in sorted(found, key=lambda s: -s.rows)[:MOST_SEGMENTS]}
        shown = [s for s in found if s.name in largest]
        caption = f"The {len(shown)} largest of {len(found)} segments." if len(shown) < len(found) else ""
        bars = [(s.name, s.rows, s.difference(arm, baseline)) for s in shown]
        overall = e.evaluation.overall.difference(arm, baseline).estimates["ne"].value
        drawn.append(figure(figures.segment_bars(axis, bars, overall), caption))
    return f"""<h2>NE_diff by segment</h2>
<p>{escaped(arm)} against {escaped(baseline)}. Bars are NE_diff, lines its corrected interval, the dashed line the whole
test set; in brackets the rows. Only what passes is coloured: of the coloured segments of an arm, at most
{percent(1 - e.evaluation.confidence)} are false on average (Benjamini-Hochberg). Grey: no difference shown; dotted: too
few users for an interval. An arrow with its number marks what runs out of the axis.</p>
{"".join(drawn)}
{_by_arm(e)}
<p class="note">All numbers: evaluation/evaluation.csv.</p>"""


def _by_arm(e: Experiment) -> str:
    """Each arm on the chosen cohorts, and how many of its segments pass."""
    baseline = e.record.baseline.name
    cohorts = [s for s in e.evaluation.segments if s.axis == COHORT]
    rows = []
    for arm in e.record.done:
        cells = [arm.name]
        for s in cohorts:
            d = s.difference(arm.name, baseline)
            interval = between(d.judgement.corrected_interval, FORM) if d.judgement else d.estimates["ne"].reason
            cells += [value(d.estimates["ne"], FORM), interval]
        judged = [
            d.judgement
            for s in e.evaluation.segments
            if s.axis not in (OVERALL, COHORT) and (d := s.difference(arm.name, baseline)).judgement
        ]
        cells += [_named(e, arm.name, v) for v in ("lower", "higher")]
        rows.append([*cells, str(len(judged))])
    head = ["arm", *(t for s in cohorts for t in (f"{s.name}: {s.detail}", "corrected interval"))]
    last = len(head)
    return table([*head, "segments lower", "segments higher", "of"], rows, text=(0, last, last + 1))


def _named(e: Experiment, arm: str, verdict: str) -> str:
    """How many segments pass with this verdict, and the largest of them by name."""
    found = [
        s
        for s in e.evaluation.segments
        if s.axis not in (OVERALL, COHORT)
        and (j := s.difference(arm, e.record.baseline.name).judgement)
        and j.verdict == verdict
    ]
    largest = sorted(found, key=lambda s: -s.rows)[:MOST_NAMED]
    names = ", ".join(f"{s.axis} = {s.name}" for s in largest)
    more = ", ..." if len(found) > len(largest) else ""
    return f"{len(found)}: {names}{more}" if found else "0"


def choice(e: Experiment) -> str:
    """How discovery chose the cohorts. An estimate that is not above 0 is shown as "about 0"."""
    if e.cohorts is None:
        said = e.record.finding or "No arm needed cohorts from discovery."
        return f"<h2>Choice of the cohorts</h2><p>{escaped(said)}</p>"
    chosen, rule = e.cohorts["chosen"], e.cohorts["rule"]
    specs = {role: chosen[role] for role in PAIR_LABELS if chosen.get(role) is not None}
    pair = {(spec["axis"], role, spec["name"]) for role, spec in specs.items()}
    rows: list[list[str]] = []
    marked = []
    for axis in e.cohorts["axes"]:
        for found in axis["pairs"][:MOST_PAIRS]:
            if specs and {(axis["name"], role, found[role]) for role in PAIR_LABELS} == pair:
                marked.append(len(rows))
            measures = [_divergence(found[m]) for m in MEASURES]
            rows.append([axis["name"], found["head"], found["tail"], _bound(found["lower_bound"]), *measures])
    head = ["axis", "head", "tail", "lower bound", *MEASURES.values()]
    reason = chosen["reason"][:1].upper() + chosen["reason"][1:]
    units = e.cohorts.get("units", {})
    notes = "".join(f"<li>{escaped(t)}: {escaped(units[m])}</li>" for m, t in MEASURES.items() if m in units)
    return f"""<h2>Choice of the cohorts</h2>
<p>{escaped(reason)}.</p>
{_statistics(e.cohorts, specs)}
<p>The {MOST_PAIRS} pairs of each axis that differ most, by the baseline's predictions on the
{escaped(e.config.experiment.discover_on)} split. Pairs are ranked by the lower bound of {escaped(rule["measure"])}
({percent(rule["confidence"])}, {escaped(rule["correction"])} over {rule["tested_pairs"]:,} pairs): noise alone seldom
lifts it above 0. Divergences are corrected for their bias and stand with their intervals; one that is not above 0 is
shown as "about 0".</p>
{table(head, rows, text=(0, 1, 2), marked=marked, wrapped=range(4, len(head)))}
<ul class="note">{notes}</ul>"""


def _statistics(cohorts: dict[str, Any], specs: dict[str, Any]) -> str:
    statistics = {(axis["name"], c["name"]): c for axis in cohorts["axes"] for c in axis["cohorts"]}
    rows = []
    for role, spec in specs.items():
        c = statistics[spec["axis"], spec["name"]]
        rates = (number(c[k], "{:.4g}") for k in ("positive_rate", "mean_prediction", "calibration", "ne"))
        rows.append([f"{role}: {spec['axis']} = {spec['name']}", f"{c['rows']:,}", f"{c['positives']:,}", *rates])
    head = ["", "rows", "positives", "positive rate", "mean p", "calibration", "NE"]
    return table(head, rows, text=(0,)) if rows else ""


def _divergence(found: dict[str, Any]) -> str:
    """Value and interval: "0.0103 (0.00625 to 0.0143)"."""
    if found.get("value") is None:
        return "–"
    shown = _above(found["value"])
    if found.get("low") is None or found.get("high") is None or found["high"] <= 0:
        return shown
    return f"{shown} ({_above(found['low'], '{:.2g}')} to {_above(found['high'], '{:.2g}')})"


def _bound(value: float | None) -> str:
    if value is None:
        return "–"
    return number(value, "{:.3g}") if value > 0 else "not above 0"


def _above(value: float, form: str = "{:.3g}") -> str:
    return number(value, form) if value > 0 else "about 0"


def densities(e: Experiment) -> str:
    """Fig. 3 on the test split."""
    title = "<h2>Predictions on the chosen cohorts</h2>"
    if not e.pair:
        return f"{title}<p>No cohorts were chosen, so there is nothing to draw.</p>"
    caption = f"Density of the test predictions of seed {e.record.seeds[0]} on the chosen cohorts."
    return title + figure(figures.densities(*e.densities()), caption)


def calibration(e: Experiment) -> str:
    """Reliability diagrams before and after, and calibration, AUC and GAUC of every arm."""
    main = [s for s in e.evaluation.segments if s.axis in (OVERALL, COHORT)]
    arms = [a.name for a in e.drawn]
    panels = {_title(s): {a: s.reliability[a] for a in arms if a in s.reliability} for s in main}
    rows = [
        [
            _title(s),
            arm,
            *(t for m, form in _METRICS.items() for t in _metric(s, arm, m, form)),
        ]
        for s in main
        for arm in ((e.record.baseline.name, *(a.name for a in e.record.done)) if s.axis == OVERALL else arms)
    ]
    titles = {"calibration": "calibration", "auc": "AUC", "gauc": "GAUC"}
    head = ["", "arm", *(t for m in _METRICS for t in (titles[m], "interval"))]
    error = max((s.auc_error or 0 for s in main), default=0)
    return f"""<h2>Calibration</h2>
{figure(figures.reliability(panels), _RELIABILITY)}
{table(head, rows, text=(0, 1))}
<p class="note">Calibration is the sum of predictions over the sum of labels. GAUC is the mean AUC within users. AUC
comes from bins of the logit and is within {error:.1g} of the exact one. These intervals are not corrected.</p>"""


_RELIABILITY = "Observed rate against mean prediction in bins of equal weight; on the line, predictions are right."
_METRICS = {"calibration": "{:.4f}", "auc": "{:.4f}", "gauc": "{:.4f}"}


def _metric(s: Segment, arm: str, metric: str, form: str) -> tuple[str, str]:
    estimate = s.arms[arm][metric]
    return value(estimate, form), between(estimate.interval, form)


def _title(s: Segment) -> str:
    return s.name if s.axis == OVERALL else f"{s.name}: {s.detail}"
