"""The tables of a finished experiment as Markdown, for a page under docs/results.

    python benchmarks/experiment_page.py EXPERIMENT > tables.md

Every figure comes from the experiment's folder: `experiment.json`, `evaluation/evaluation.json`, `cohorts-*/` and
`metrics.jsonl`. Intervals are the corrected ones, where a comparison was corrected.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import machine

from c2al.config import flat_settings
from c2al.evaluation.result import COHORT, OVERALL, Difference, Segment
from c2al.experiment.folder import read_result
from c2al.report.dynamics import Y_TITLES, y_differences
from c2al.report.experiment import Entry, Experiment, read_experiment
from c2al.report.record import ArmRecord

LARGEST = 8
"""Segments of an axis that are shown, by rows."""
FORM = "{:+.3%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--axes", nargs="*", default=[], help="axes whose segments are shown; none: all")
    args = parser.parse_args()
    e = read_experiment(args.experiment)
    parts = [
        baseline(e),
        overall(e),
        cohorts(e),
        segments(e, args.axes),
        validation(e),
        power(e),
        densification(e),
        reproduction(e),
    ]
    print("\n\n".join(parts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def baseline(e: Experiment) -> str:
    name, found = e.record.baseline.name, e.evaluation.overall.arms
    rows = []
    for metric in ("ne", "calibration", "auc", "gauc"):
        estimate = found[name][metric]
        rows.append([metric, _number(estimate.value, "{:.5f}"), _between(estimate.interval, "{:.5f}")])
    return f"### The baseline on the test days\n\n{table(['', 'mean over seeds', 'interval'], rows)}"


def overall(e: Experiment) -> str:
    whole = e.evaluation.overall
    head = ["arm", "against", "NE_diff", "corrected interval", "verdict", "seeds below 0", "seed sd"]
    rows = [[d.arm, d.against, *_difference(d)] for d in whole.differences]
    ne = [
        [a.name, a.source, "; ".join(a.cohorts), _settings(e, a), _number(whole.arms[a.name]["ne"].value, "{:.5f}")]
        for a in (e.record.baseline, *e.record.done)
    ]
    arms = table(["arm", "cohorts from", "auxiliary cohorts", "settings chosen", "test NE"], ne)
    found = [f"- {a.name}: {a.finding}" for a in e.record.arms if a.finding]
    return "\n\n".join(["### Arms", arms, "\n".join(found), "### Overall", table(head, rows)]).replace("\n\n\n", "\n\n")


def cohorts(e: Experiment) -> str:
    """Every arm on every auxiliary cohort of some arm; a placebo's cohorts are no segments."""
    wanted = {tuple(c.partition(": ")[2].split(" = ", 1)) for a in e.record.done for c in a.cohorts}
    rows = []
    for s in e.evaluation.segments:
        if s.axis not in (OVERALL, COHORT) and (s.axis, s.name) in wanted:
            rows += _segment_rows(e, s)
    head = ["cohort", "test rows", "arm", "NE_diff", "corrected interval", "verdict"]
    return f"### On the auxiliary cohorts\n\n{table(head, rows)}"


def segments(e: Experiment, axes: Sequence[str]) -> str:
    """The largest segments of every axis, arms with chosen cohorts only; and how many pass."""
    arms = [a.name for a in e.record.done if a.source == "chosen"]
    others = [s for s in e.evaluation.segments if s.axis not in (OVERALL, COHORT)]
    rows = []
    for axis in dict.fromkeys(s.axis for s in others):
        if axes and axis not in axes:
            continue
        for s in sorted((s for s in others if s.axis == axis), key=lambda s: -s.rows)[:LARGEST]:
            rows += [r for r in _segment_rows(e, s) if r[2] in arms]
    counts = []
    for a in e.record.done:
        found = [d.judgement for s in others if (d := s.difference(a.name, e.record.baseline.name)).judgement]
        tally = [str(sum(j is not None and j.verdict == v for j in found)) for v in ("lower", "higher")]
        counts.append([a.name, *tally, str(len(found))])
    head = ["segment", "test rows", "arm", "NE_diff", "corrected interval", "verdict"]
    return (
        f"### By segment\n\n{table(['arm', 'segments lower', 'higher', 'of'], counts)}\n\n"
        f"The {LARGEST} largest segments of an axis:\n\n{table(head, rows)}"
    )


def validation(e: Experiment) -> str:
    rows = [
        [
            a.name,
            ", ".join(f"{k.removeprefix('train.')} = {v}" for k, v in flat_settings(t.settings).items()) or "as given",
            _number(t.mean_ne, "{:.5f}"),
            " ".join(_number(v, "{:.4f}") for v in t.validation_ne),
            "kept" if i == a.selected else "",
        ]
        for a in (e.record.baseline, *e.record.done)
        for i, t in enumerate(a.trials)
    ]
    return f"### Validation days\n\n{table(['arm', 'settings', 'mean validation NE', 'by seed', ''], rows)}"


def power(e: Experiment) -> str:
    rows = [
        [
            d.arm,
            d.against,
            f"{d.power.smallest:.3%}",
            "none would" if d.power.seeds_needed is None else f"{d.power.seeds_needed:,}",
            "none would" if d.power.users_needed is None else f"{d.power.users_needed:,.0f}",
        ]
        for d in e.evaluation.overall.differences
        if d.power
    ]
    head = ["arm", "against", "smallest NE_diff seen", "seeds for 0.1%", "users for 0.1%"]
    users = f"{e.evaluation.overall.users:,.0f} effective users, {len(e.record.seeds)} seeds; 80% power, uncorrected."
    return f"### What this design can see\n\n{users}\n\n{table(head, rows)}"


def densification(e: Experiment) -> str:
    """Y of every arm with auxiliary cohorts against the baseline, over the seeds."""
    runs = {a.name: _records(e, a) for a in (e.record.baseline, *e.record.done) if a.source != "none" or not a.cohorts}
    base = runs.pop(e.record.baseline.name)
    rows = [
        [
            name,
            d.layer,
            Y_TITLES.get(d.measure, d.measure).replace("|y|", "abs y"),
            f"{d.against:.4g}",
            f"{d.arm:.4g}",
            f"{d.difference:+.3g}",
            _between(d.interval, "{:+.3g}"),
        ]
        for name, records in runs.items()
        for d in y_differences(base, records, e.evaluation.confidence)
        if d.measure in ("near_zero", "near_zero_relative", "std", "kurtosis", "participation_ratio")
    ]
    head = ["arm", "layer", "measure", "baseline", "arm", "difference", "interval over seeds"]
    return f"### Distribution of Y at the end of training\n\n{table(head, rows)}"


def reproduction(e: Experiment) -> str:
    found = [read_result(e.path / f) for a in (e.record.baseline, *e.record.done) for f in a.folders(e.record.seeds)]
    seconds = statistics.median(r.seconds for r in found if r is not None)
    versions = ", ".join(f"{k} {v}" for k, v in e.versions.items())
    return f"{machine.machine()}; {versions}. Median wall time of a training: {seconds:.0f} s."


def _segment_rows(e: Experiment, s: Segment) -> list[list[str]]:
    rows = []
    for a in e.record.done:
        d = s.difference(a.name, e.record.baseline.name)
        value, interval, verdict, *_ = _difference(d)
        rows.append([f"{s.axis} = {s.name}", f"{s.rows:,}", a.name, value, interval, verdict])
    return rows


def _difference(d: Difference) -> list[str]:
    estimate, judgement = d.estimates["ne"], d.judgement
    below = sum(v is not None and v < 0 for v in estimate.per_seed)
    return [
        _number(estimate.value, FORM),
        _between(judgement.corrected_interval if judgement else None, FORM),
        judgement.verdict if judgement else estimate.reason,
        f"{below} of {len(estimate.per_seed)}",
        _number(estimate.seed_std, "{:.3%}"),
    ]


def _settings(e: Experiment, arm: ArmRecord) -> str:
    declared = next((a for a in e.config.arms if a.name == arm.name), None)
    settings = flat_settings(declared.overrides) if declared else {}
    settings |= flat_settings(arm.chosen.settings) if arm.chosen else {}
    return ", ".join(f"{k.removeprefix('train.')} = {v}" for k, v in settings.items())


def _records(e: Experiment, arm: ArmRecord) -> list[list[Entry]]:
    paths = [e.path / folder / "run" / "metrics.jsonl" for folder in arm.folders(e.record.seeds)]
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _between(interval: tuple[float, float] | None, form: str) -> str:
    return "–" if interval is None else f"[{form.format(interval[0])}, {form.format(interval[1])}]"


if __name__ == "__main__":
    main()
