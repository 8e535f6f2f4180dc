"""The verdict: its words follow the corrected interval. The same sentences stand in the report and in the terminal."""

from c2al.evaluation.result import COHORT, OVERALL, Difference, Evaluation, Segment
from c2al.report.experiment import Experiment
from c2al.report.page import between, counted, escaped, number
from c2al.report.record import ArmRecord, Record, same_training
from c2al.text import percent

FORM = "{:+.3%}"
MOST_SENTENCES = 4
"""Further arms that get a sentence of their own; more are counted."""
MOST_SEGMENTS = 3
"""Segments that an arm harms and that are named, those of most rows first."""
_SAID = {
    "lower": "{arm} lowers test NE against {against}",
    "higher": "{arm} raises test NE against {against}",
    "no difference shown": "No difference shown between {arm} and {against}",
}


def sentence(d: Difference, confidence: float) -> str:
    """What one comparison on the whole test set came to."""
    estimate, judgement = d.estimates["ne"], d.judgement
    if estimate.value is None:
        return f"NE_diff of {d.arm} against {d.against} is undefined: {estimate.reason}."
    if judgement is None:
        return (
            f"{d.arm} against {d.against}: NE_diff {number(estimate.value, FORM)}, without an interval "
            f"({estimate.reason}): no conclusion."
        )
    said = _SAID[judgement.verdict].format(arm=d.arm, against=d.against)
    _, _, limits = judgement.words.partition("; ")
    return (
        f"{said}: NE_diff {number(estimate.value, FORM)}, corrected {percent(confidence)} interval "
        f"{between(judgement.corrected_interval, FORM)}{f'; {limits}' if limits else ''}."
    )


def against(evaluation: Evaluation, arm: ArmRecord, other: ArmRecord) -> str:
    return sentence(evaluation.overall.difference(arm.name, other.name), evaluation.confidence)


def findings(record: Record) -> list[str]:
    """Why arms came to nothing: one sentence per reason."""
    reasons: dict[str, list[str]] = {}
    for arm in record.arms:
        if arm.finding:
            reasons.setdefault(arm.finding, []).append(arm.name)
    return [f"Not trained: {', '.join(names)}. {r[:1].upper()}{r[1:]}" for r, names in reasons.items()]


def unseen(d: Difference) -> list[str]:
    """Where no difference is shown: which one would have been, and how many seeds or users the target takes."""
    if d.power is None or d.judgement is None or d.judgement.passes:
        return []
    ways = []
    if d.power.seeds_needed is not None:
        ways.append(f"{d.power.seeds_needed:,} seeds on these users")
    if d.power.users_needed is not None:
        ways.append(f"{d.power.users_needed:,.0f} effective users with these seeds")
    needed = " or ".join(ways) or "both more seeds and more users"
    return [
        f"This design sees an NE_diff from {d.power.smallest:.3%} on, in four of five cases. "
        f"{d.power.target:.1%} would take {needed}."
    ]


def cautions(record: Record) -> list[str]:
    """What a reader must know of how the arms were tuned: unequal numbers of trials, and arms that are one training."""
    said = []
    tuned = [a for a in record.done if len(a.trials) > len(record.baseline.trials)]
    if tuned:
        most = max(len(a.trials) for a in tuned)
        said.append(
            f"{', '.join(a.name for a in tuned)} chose from up to {counted(most, 'setting')}, the baseline from "
            f"{len(record.baseline.trials)}: it was not tuned with as many trials, so a gain may be the tuning's. "
            "experiment.select tunes the baseline."
        )
    for arm, earlier in same_training((record.baseline, *record.done)).items():
        said.append(
            f"{arm} kept the settings and cohorts of {earlier}: they are one training, so one answer and not two."
        )
    return said


def harmed(evaluation: Evaluation, arm: ArmRecord, other: ArmRecord) -> list[str]:
    """The segments whose NE the arm raises, in one sentence; none where there is no such segment.

    An NE_diff on the whole test set may hide them: what the cohorts gain, the rows outside may pay.
    """
    segments = [s for s in evaluation.segments if s.axis not in (OVERALL, COHORT)]
    found = [(s, d.estimates["ne"].value, d.judgement) for s in segments for d in [s.difference(arm.name, other.name)]]
    worse = [(s, v, j) for s, v, j in found if v is not None and j is not None and j.verdict == "higher"]
    worse.sort(key=lambda found: -found[0].rows)
    named = [
        f"{s.axis} = {s.name} ({s.rows:,} rows) {number(v, FORM)}, corrected {percent(evaluation.confidence)} interval "
        f"{between(j.corrected_interval, FORM)}"
        for s, v, j in worse[:MOST_SEGMENTS]
    ]
    if not named:
        return []
    more = f"; and {len(worse) - len(named)} smaller ones" if len(worse) > len(named) else ""
    return [
        f"{arm.name} raises NE against {other.name} in {len(worse)} of {len(segments)} segments: "
        f"{'; '.join(named)}{more}."
    ]


def sentences(record: Record, evaluation: Evaluation) -> list[str]:
    """The verdict in words: main arm, what could be seen, against its placebo, where it harms, cautions, findings, the
    other arms."""
    said = []
    if main := record.main:
        said.append(against(evaluation, main, record.baseline))
        said += unseen(evaluation.overall.difference(main.name, record.baseline.name))
        if record.placebo:
            said.append(against(evaluation, main, record.placebo))
        said += harmed(evaluation, main, record.baseline)
    said += cautions(record) + findings(record)
    others = [a for a in record.done if a is not main]
    if len(others) <= MOST_SENTENCES:
        return said + [against(evaluation, a, record.baseline) for a in others]
    judged = [evaluation.overall.difference(a.name, record.baseline.name).judgement for a in others]
    counts = {v: sum(j is not None and j.verdict == v for j in judged) for v in _SAID}
    return [
        *said,
        f"Of {len(others)} other arms, {counts['lower']} lower test NE, {counts['higher']} raise it, and "
        f"{counts['no difference shown']} show no difference.",
    ]


def section(e: Experiment) -> str:
    lead, *rest = sentences(e.record, e.evaluation) or ["No arm was compared with the baseline."]
    tiles = ""
    if e.main is not None:
        segments = [s for s in e.evaluation.segments if s.axis in (OVERALL, COHORT)]
        tiles = f'<div class="tiles">{"".join(_tile(s, e.main.name, e.record.baseline.name) for s in segments)}</div>'
    more = "".join(f"<li>{escaped(s)}{_to_power(e, s)}</li>" for s in rest)
    return f"""<h1>{escaped(_title(e))}</h1>
<p class="lead">{escaped(lead)}</p>
{f"<ul>{more}</ul>" if more else ""}
{tiles}
<p class="soft">{e.evaluation.rows:,} test impressions, {counted(len(e.record.seeds), "seed")}.
NE is Normalized Entropy: the log loss over the entropy of the average label; lower is better. NE_diff = (NE of the
arm − NE of the other) / NE of the other. All models of a seed start from the same weights and read the same batches;
auxiliary losses exist in training only. A placebo has cohorts of the same sizes whose users are drawn at random: what
it gains does not come from the cohorts. The verdict holds for these impressions, this model and these settings. A
synthetic world proves that an effect exists; it does not say that other data look like it.</p>"""


def _to_power(e: Experiment, said: str) -> str:
    """After the sentence on what could have been seen: the way to the section with the numbers."""
    if e.main is None or said not in unseen(e.evaluation.overall.difference(e.main.name, e.record.baseline.name)):
        return ""
    return ' See <a href="#power">Power</a>.'


def _title(e: Experiment) -> str:
    if e.main is None:
        return "The baseline, and arms that came to nothing"
    return f"{e.main.name} against its baseline"


def _tile(s: Segment, arm: str, baseline: str) -> str:
    d = s.difference(arm, baseline)
    estimate, judgement = d.estimates["ne"], d.judgement
    verdict = judgement.verdict if judgement else estimate.reason
    side = {"lower": "better", "higher": "worse"}.get(verdict, "")
    name = s.name if s.axis == OVERALL else f"{s.name}: {s.detail}"
    interval = f"corrected interval {between(judgement.corrected_interval, FORM)}" if judgement else ""
    return (
        f'<div class="tile"><b>{escaped(name)}</b><strong class="{side}">{number(estimate.value, FORM)}</strong>'
        f"<span>{escaped(interval)}</span><span>{escaped(verdict)}</span></div>"
    )
