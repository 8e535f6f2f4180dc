"""Sections on the arms: what each came to, how its settings were chosen, what the design can see."""

import math
from typing import Any

from c2al.config import Arm, flat_settings
from c2al.evaluation.result import COHORT, OVERALL, Difference, Segment
from c2al.report import figures
from c2al.report.experiment import Experiment
from c2al.report.page import between, counted, escaped, figure, number, table, value
from c2al.report.record import ArmRecord, TrialRecord, repeated
from c2al.report.verdict import FORM
from c2al.text import percent

LAMBDA = "train.auxiliary_lambda"
MOST_BARS = 40
"""Arms that one figure shows; the table has all."""
_FOREST = "NE_diff of each arm against the baseline with its corrected interval; coloured if it excludes 0."


_DIFFERENCE = ("verdict", "NE_diff", "corrected interval", "seeds below 0", "seed sd")
"""Titles of what `_difference` gives."""


def section(e: Experiment) -> str:
    overall, baseline = e.evaluation.overall, e.record.baseline
    rows, same = [], repeated([(_declared(e, arm), arm.cohorts) for arm in e.record.arms])
    for arm in (baseline, *e.record.arms):
        note = f" (the same as those of {same[arm.name]})" if arm.name in same else ""
        about = [_settings(e, arm), ("; ".join(arm.cohorts) or "none") + note]
        if arm.chosen is None:
            rows.append([arm.name, "not trained: see the verdict", "–", "–", "–", "–", "–", "–", *about])
            continue
        found = [""] * 5 if arm is baseline else _difference(overall.difference(arm.name, baseline.name))
        ne = [value(overall.arms[arm.name]["ne"], "{:.5f}"), number(arm.chosen.mean_ne, "{:.5f}")]
        rows.append([arm.name, *found, *ne, *about])
    others = [d for d in overall.differences if d.against != baseline.name]
    compared = [overall.difference(a.name, baseline.name) for a in e.record.done]
    drawn = compared[:MOST_BARS]
    head = ["arm", *_DIFFERENCE, "test NE", "validation NE", "settings", "auxiliary cohorts"]
    seeds = ", ".join(map(str, e.record.seeds))
    return f"""<h2>Arms</h2>
<p>Test NE and NE_diff are means over the seeds ({escaped(seeds)}). Intervals cover users and seeds together (bootstrap
over users, {e.evaluation.replicates:,} replicates), at {percent(e.evaluation.confidence)}. Holm's method corrects them
for the {counted(len(overall.differences), "comparison")} on the whole test set. An arm counts as lower or higher
exactly if its corrected interval excludes 0.</p>
{table(head, rows, text=(0, 1, 8, 9))}
{figure(figures.forest(drawn), _FOREST) if drawn else ""}
{_against(others)}
{_items(e)}"""


def _difference(d: Difference) -> list[str]:
    estimate, judgement = d.estimates["ne"], d.judgement
    below = sum(v is not None and v < 0 for v in estimate.per_seed)
    return [
        judgement.verdict if judgement else estimate.reason,
        value(estimate, FORM),
        between(judgement.corrected_interval if judgement else None, FORM),
        f"{below} of {len(estimate.per_seed)}",
        number(estimate.seed_std, "{:.3%}"),
    ]


def _against(differences: list[Difference]) -> str:
    if not differences:
        return ""
    rows = [[d.arm, d.against, *_difference(d)] for d in differences]
    return "<h3>Against the placebo</h3>" + table(["arm", "against", *_DIFFERENCE], rows, text=(0, 1, 2))


def _items(e: Experiment) -> str:
    """The sensitivity interval over users and items, beside the one over users and seeds, both not corrected."""
    if not e.evaluation.items:
        return ""
    rows = [
        [
            s.name if s.axis == OVERALL else f"{s.name}: {s.detail}",
            d.arm,
            d.against,
            value(d.estimates["ne"], FORM),
            between(d.estimates["ne"].interval, FORM),
            between(d.items_interval, FORM),
        ]
        for s in e.evaluation.segments
        if s.axis in (OVERALL, COHORT)
        for d in s.differences
        if s.axis == OVERALL or d.against == e.record.baseline.name
    ]
    head = ["", "arm", "against", "NE_diff", "users and seeds", "users, items and seeds"]
    return f"""<h3>Other items</h3>
<p>How far NE_diff would move on other items as well: users and the values of {escaped(e.evaluation.items)} are
resampled together (pigeonhole bootstrap), on the whole test set and on the cohorts only: segments have none.
Neither interval is corrected for the number of comparisons, and no verdict follows the one over items.</p>
{table(head, rows, text=(0, 1, 2))}"""


def _declared(e: Experiment, arm: ArmRecord) -> Arm:
    """As the configuration has it; one without overrides where it has none of that name."""
    other = Arm(name=arm.name, cohorts=arm.source, axis=arm.axis)  # type: ignore[arg-type]  # a source is a choice
    return next((a for a in e.config.arms if a.name == arm.name), other)


def _settings(e: Experiment, arm: ArmRecord) -> str:
    """What sets the arm's training apart: its overrides, its lambda, what was selected."""
    settings = flat_settings(_declared(e, arm).overrides)
    if arm.cohorts and arm.source != "none":
        settings = {LAMBDA: e.config.experiment.auxiliary_lambda, **settings}
    settings |= flat_settings(arm.chosen.settings) if arm.chosen else {}
    return ", ".join(f"{k.removeprefix('train.')} = {v}" for k, v in settings.items()) or "–"


def curve(e: Experiment) -> str:
    """The grid of every arm that had one: mean validation NE over seeds, with its spread."""
    grids = [a for a in (e.record.baseline, *e.record.arms) if len(a.trials) > 1]
    if not grids:
        return f"""<h2>Lambda</h2>
<p>No arm had a grid of settings to choose from (select), so there is no curve. Arms that do not set lambda themselves
trained with {e.config.experiment.auxiliary_lambda:g}.</p>"""
    panels = {a.name: found for a in grids if (found := _points(a))}
    rows = [
        [
            a.name,
            ", ".join(f"{k} = {v}" for k, v in flat_settings(t.settings).items()),
            number(t.mean_ne, "{:.5f}"),
            number(_std(t), "{:.5f}"),
            "kept" if i == a.selected else "",
        ]
        for a in grids
        for i, t in enumerate(a.trials)
    ]
    marked = [i for i, row in enumerate(rows) if row[-1]]
    drawn = figure(
        figures.grids(panels, e.record.baseline.chosen.mean_ne if e.record.baseline.chosen else None),
        "Mean validation NE over the seeds; bars are one standard deviation over the seeds, the ring is what was kept, "
        "the dashed line is the baseline.",
    )
    return f"""<h2>Lambda</h2>
<p>Every setting of a grid was trained with every seed. The one of lowest mean validation NE was kept; test data played
no part.</p>
{drawn if panels else ""}
{table(["arm", "settings", "validation NE", "seed sd", ""], rows, text=(0, 1, 4), marked=marked)}"""


def _points(arm: ArmRecord) -> figures.Grid:
    """Lines of a grid over lambda, or over the first number in it: label of the other settings -> points."""
    settings = [flat_settings(t.settings) for t in arm.trials]
    numeric = [
        k for k in settings[0] if all(isinstance(s[k], int | float) for s in settings) and len(_all(settings, k)) > 1
    ]
    if not numeric:
        return {}
    key = LAMBDA if LAMBDA in numeric else numeric[0]
    found: figures.Grid = {}
    for i, (trial, own) in enumerate(zip(arm.trials, settings, strict=True)):
        if trial.mean_ne is not None:
            others = ", ".join(f"{k.rpartition('.')[2]} = {v}" for k, v in own.items() if k != key)
            point = figures.Point(float(own[key]), trial.mean_ne, _std(trial) or 0.0, i == arm.selected)
            found.setdefault((key.rpartition(".")[2], others), []).append(point)
    return found


def _all(settings: list[dict[str, Any]], key: str) -> set[Any]:
    return {s[key] for s in settings}


def _std(trial: TrialRecord) -> float | None:
    values = [v for v in trial.validation_ne if v is not None]
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def power(e: Experiment) -> str:
    """What differences the design can see."""
    segments = [s for s in e.evaluation.segments if s.axis in (OVERALL, COHORT)]
    rows = [
        _power_row(s, d)
        for s in segments
        for d in s.differences
        if d.power and (s.axis == OVERALL or d.arm == (e.main and e.main.name))
    ]
    targets = sorted({d.power.target for s in segments for d in s.differences if d.power})
    said = ", ".join(f"{t:.1%}" for t in targets)
    if not rows:
        return '<h2 id="power">Power</h2><p>No comparison has an interval, so nothing can be said about power.</p>'
    smallest = e.evaluation.overall.differences[0].power
    lead = f"This design would see a true NE_diff of {smallest.smallest:.3%} overall. " if smallest else ""
    head = ["", "arm", "against", "smallest NE_diff seen", f"seeds for {said}", f"users for {said}"]
    return f"""<h2 id="power">Power</h2>
<p>{lead}The smallest difference that would be seen has an 80% chance to be told from 0 at
{percent(e.evaluation.confidence)} confidence over {counted(len(e.evaluation.comparisons), "comparison")} (the first
step of Holm's method): it is that of the corrected comparison which a verdict follows. The last columns say how many
seeds on these users, or how many users with these seeds, would see {said}.</p>
{table(head, rows, text=(0, 1, 2))}"""


def _power_row(s: Segment, d: Difference) -> list[str]:
    assert d.power is not None
    return [
        s.name if s.axis == OVERALL else f"{s.name}: {s.detail}",
        d.arm,
        d.against,
        f"{d.power.smallest:.3%}",
        "none would" if d.power.seeds_needed is None else f"{d.power.seeds_needed:,}",
        "none would" if d.power.users_needed is None else f"{d.power.users_needed:,.0f}",
    ]
