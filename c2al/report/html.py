"""One self-contained HTML page from an experiment's folder."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from c2al.config import dump_config
from c2al.evaluation.result import COHORT, OVERALL, Estimate, Segment
from c2al.files import write_atomically
from c2al.report import figures
from c2al.report.experiment import ARMS, Experiment, read_experiment
from c2al.report.style import CSS
from c2al.training.diagnostics import NEAR_ZERO, NEAR_ZERO_RELATIVE

MOST_SEGMENTS = 30
"""Bars of one axis; the largest segments are drawn, all are in evaluation.csv."""
MOST_PAIRS = 5
"""Pairs of cohorts listed for one axis."""


def write_report(experiment_dir: Path) -> Path:
    """Writes report.html into the folder of a finished experiment and returns its path.

    Reads only the files named in `c2al.report.experiment`. Raises DataError naming one that is missing
    or not readable.
    """
    e = read_experiment(experiment_dir)
    sections = (_result, _segments, _cohorts, _densities, _training, _y, _reproduce)
    body = "\n".join(section(e) for section in sections)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>C2AL experiment</title>\n'
        f"<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    target = experiment_dir / "report.html"
    write_atomically(target, page)
    return target


def _result(e: Experiment) -> str:
    evaluation, seeds = e.evaluation, e.config.experiment.seeds
    main = [s for s in evaluation.segments if s.axis in (OVERALL, COHORT)]
    tiles = "".join(_tile(s, evaluation.confidence) for s in main)
    train = e.config.experiment
    seed_note = (
        f"Values are means over {len(seeds)} seeds; the seed column is the standard deviation of NE_diff from seed to "
        "seed. The interval covers users and seeds together."
        if len(seeds) > 1
        else "One seed was run: how far another initialisation would move these numbers is not known."
    )
    columns = [
        "",
        "rows",
        "positives",
        "NE baseline",
        "NE C2AL",
        "NE_diff",
        "interval",
        *(["seed sd"] * (len(seeds) > 1)),
    ]
    table = _table(
        columns,
        [
            [
                _name(s),
                f"{s.rows:,}",
                f"{s.positives:,}",
                _value(s.arms["baseline"]["ne"], "{:.5f}"),
                _value(s.arms["c2al"]["ne"], "{:.5f}"),
                _value(s.differences[0].estimates["ne"], "{:+.3%}"),
                _interval(s.differences[0].estimates["ne"], "{:+.3%}"),
                *([_number(s.differences[0].estimates["ne"].seed_std, "{:.3%}")] * (len(seeds) > 1)),
            ]
            for s in main
        ],
        text=(0,),
    )
    more = _table(
        ["", "model", "calibration", "interval", "AUC", "interval"],
        [
            [
                _name(s),
                arm,
                _value(s.arms[prefix]["calibration"], "{:.4f}"),
                _interval(s.arms[prefix]["calibration"], "{:.4f}"),
                _value(s.arms[prefix]["auc"], "{:.5f}"),
                _interval(s.arms[prefix]["auc"], "{:.5f}"),
            ]
            for s in main
            for arm, prefix in ARMS.items()
        ],
        text=(0, 1),
    )
    return f"""<h1>C2AL against its baseline</h1>
<p class="lead">{_headline(e)}</p>
<p class="soft">{evaluation.rows:,} test impressions. NE is Normalized Entropy, the log loss over the entropy of the
average label; lower is better. NE_diff = (NE C2AL − NE baseline) / NE baseline. Both models of a seed share
initialisation and data order and differ in the auxiliary losses alone (lambda
{train.auxiliary_lambda:g}), which exist in training only.</p>
<div class="tiles">{tiles}</div>
{table}
<p class="note">{evaluation.confidence:.0%} intervals over users (paired bootstrap,
{evaluation.replicates:,} replicates) and seeds. {seed_note}</p>
{_per_seed(main, seeds)}
{more}
<p class="note">Calibration is the sum of predictions over the sum of labels. AUC comes from bins of the logit and is
within {max(s.auc_error or 0 for s in main):.1g} of the exact one.</p>"""


def _headline(e: Experiment) -> str:
    overall = e.evaluation.segment(OVERALL, OVERALL)
    assert overall is not None
    estimate = overall.differences[0].estimates["ne"]
    if estimate.value is None:
        return _text(f"NE_diff is undefined on this test set: {estimate.reason}.")
    if estimate.interval is None:
        return _text(f"NE_diff is {estimate.value:+.3%} overall, with {estimate.reason}: no conclusion.")
    low, high = estimate.interval
    if high < 0:
        said = f"C2AL lowers test NE by {-estimate.value:.3%} overall: the interval lies below 0."
    elif low > 0:
        said = f"C2AL is worse here: it raises test NE by {estimate.value:.3%}, and the interval lies above 0."
    else:
        said = f"No overall effect is shown: NE_diff is {estimate.value:+.3%}, and its interval contains 0."
    lower = sum(value is not None and value < 0 for value in estimate.per_seed)
    return said + f" It is negative in {lower} of {len(estimate.per_seed)} seeds." * (len(estimate.per_seed) > 1)


def _tile(s: Segment, confidence: float) -> str:
    estimate = s.differences[0].estimates["ne"]
    tone = ""
    if estimate.interval is not None:
        tone = "better" if estimate.interval[1] < 0 else "worse" if estimate.interval[0] > 0 else ""
    value = "undefined" if estimate.value is None else f"{estimate.value:+.3%}".replace("-", "−")
    return (
        f'<div class="tile"><b>NE_diff, {_text(_name(s))}</b><strong class="{tone}">{value}</strong>'
        f"<span>{confidence:.0%}: {_text(_interval(estimate, '{:+.3%}'))}</span>"
        f"<span>{_text(_verdict(estimate))}</span></div>"
    )


def _verdict(estimate: Estimate) -> str:
    if estimate.interval is None:
        return estimate.reason
    if estimate.interval[1] < 0:
        return "better: the interval lies below 0"
    if estimate.interval[0] > 0:
        return "worse: the interval lies above 0"
    return "no difference shown: the interval contains 0"


def _per_seed(segments: Sequence[Segment], seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return ""
    rows = [
        [_name(s), *(_number(v, "{:+.3%}") for v in s.differences[0].estimates["ne"].per_seed)] for s in segments
    ]  # fmt: skip
    return "<h3>NE_diff of each seed</h3>" + _table(["", *(f"seed {s}" for s in seeds)], rows, text=(0,))


def _segments(e: Experiment) -> str:
    overall = e.evaluation.segment(OVERALL, OVERALL)
    assert overall is not None
    axes = dict.fromkeys(s.axis for s in e.evaluation.segments if s.axis not in (OVERALL, COHORT))
    drawn = []
    judged = excluding = 0
    for axis in axes:
        segments = [s for s in e.evaluation.segments if s.axis == axis]
        intervals = [s.differences[0].estimates["ne"].interval for s in segments]
        judged += sum(i is not None for i in intervals)
        excluding += sum(i is not None and (i[0] > 0 or i[1] < 0) for i in intervals)
        largest = {s.name for s in sorted(segments, key=lambda s: -s.rows)[:MOST_SEGMENTS]}
        shown = [s for s in segments if s.name in largest]
        left = len(segments) - len(shown)
        caption = f"The {len(shown)} largest of {len(segments)} segments." if left else ""
        drawn.append(_figure(figures.segment_bars(axis, shown, overall.differences[0].estimates["ne"].value), caption))
    expected = judged * (1 - e.evaluation.confidence)
    return f"""<h2>NE_diff by segment</h2>
<p>Bars are NE_diff, lines its {e.evaluation.confidence:.0%} interval, the dashed line the whole test set;
in brackets the rows. A pale bar's interval contains 0; a dotted one has too few users for an interval. {excluding} of
{judged} intervals exclude 0; were there no effect anywhere, about {expected:.1f} would.</p>
{"".join(drawn)}
<p class="note">All numbers: evaluation/evaluation.csv.</p>"""


def _cohorts(e: Experiment) -> str:
    chosen, rule = e.cohorts["chosen"], e.cohorts["rule"]
    specs = {role: chosen[role] for role in ("head", "tail") if chosen[role] is not None}
    statistics = {(axis["name"], c["name"]): c for axis in e.cohorts["axes"] for c in axis["cohorts"]}
    cohorts = []
    for role, spec in specs.items():
        c = statistics[spec["axis"], spec["name"]]
        rates = (_number(c[k], "{:.4g}") for k in ("positive_rate", "mean_prediction", "calibration", "ne"))
        cohorts.append([f"{role}: {spec['axis']} = {spec['name']}", f"{c['rows']:,}", f"{c['positives']:,}", *rates])

    measures = ("js", "kl", "cosine", "wasserstein", "wasserstein_logit")
    pair = {(spec["axis"], role, spec["name"]) for role, spec in specs.items()}
    rows: list[list[str]] = []
    marked = []
    for axis in e.cohorts["axes"]:
        for found in axis["pairs"][:MOST_PAIRS]:
            if {(axis["name"], role, found[role]) for role in ("head", "tail")} == pair:
                marked.append(len(rows))
            values = [found["lower_bound"], *(found[m]["value"] for m in measures)]
            rows.append([axis["name"], found["head"], found["tail"], *(_number(v, "{:.3g}") for v in values)])
    statistics_head = ["", "rows", "positives", "positive rate", "mean p", "calibration", "NE"]
    columns = ["axis", "head", "tail", "lower bound", "JS", "KL", "1 − cosine", "W1 in p", "W1 in logit"]
    reason = chosen["reason"][:1].upper() + chosen["reason"][1:]
    return f"""<h2>Choice of the cohorts</h2>
<p>{_text(reason)}.</p>
{_table(statistics_head, cohorts, text=(0,)) if cohorts else ""}
<p>The {MOST_PAIRS} pairs of each axis that differ most, by the baseline's predictions on the
{e.config.experiment.discover_on} split. Pairs are ranked by the lower bound of {_text(rule["measure"])}
({rule["confidence"]:.0%}, {_text(rule["correction"])} over {rule["tested_pairs"]:,} pairs): noise alone seldom lifts
it above 0.</p>
{_table(columns, rows, text=(0, 1, 2), marked=marked)}
<p class="note">JS: Jensen-Shannon divergence in nats. KL: sum of both directions in nats. W1: Wasserstein-1 distance.
All pairs with the intervals of every measure: cohorts/cohorts.json.</p>"""


def _densities(e: Experiment) -> str:
    if e.cohorts["chosen"]["head"] is None:
        return "<h2>Predictions on head and tail</h2><p>No pair was chosen, so there is nothing to draw.</p>"
    seed = e.config.experiment.seeds[0]
    caption = f"Density of the test predictions of seed {seed} on the head and the tail cohort."
    return "<h2>Predictions on head and tail</h2>" + _figure(figures.densities(*e.densities()), caption)


def _training(e: Experiment) -> str:
    panels = {
        "training NE": {arm: e.lines(arm, "train", "window", "primary", "all", "ne") for arm in ARMS},
        "validation NE": {arm: e.lines(arm, "validation", "primary", "all", "ne") for arm in ARMS},
        "validation NE, auxiliary tasks": {
            task: e.lines("C2AL", "validation", task, "all", "ne") for task in ("head", "tail")
        },
    }
    drawn = {title: named for title, named in panels.items() if any(named.values())}
    caption = "One line a seed. Training NE is that of the batches since the last record, before each update."
    return "<h2>Training</h2>" + _figure(figures.curves(drawn), caption)


def _y(e: Experiment) -> str:
    y = {arm: e.y(arm) for arm in ARMS}
    layers = list(dict.fromkeys(layer for found in y.values() for layer in found))
    if not layers:
        return "<h2>Distribution of Y</h2><p>Not recorded: the model has no FM attention.</p>"
    fm = e.config.model.fm
    how = (
        "Y comes from an attention MLP, one for each sample"
        if fm.y == "mlp"
        else "Y is a learned parameter, the same for all samples"
    )
    shape = "d × k, it mixes embedding dimensions" if fm.layout == "paper" else "n × k, it mixes fields"
    rows = [
        [
            _layer(layer),
            arm,
            f"{s['near_zero']:.2%}",
            f"{s['near_zero_relative']:.2%}",
            f"{s['std']:.4g}",
            _number(s["kurtosis"], "{:.3g}"),
            _number(s["participation_ratio"], "{:.3g}"),
            f"{s['entropy']:.4f}",
        ]
        for layer in layers
        for arm, found in y.items()
        if (s := found.get(layer)) is not None
    ]
    head = ["layer", "model", f"|y| < {NEAR_ZERO:g}", f"|y| < {NEAR_ZERO_RELATIVE:g} rms", "std", "kurtosis"]
    shares = {
        f"{_layer(layer)}: share of |y| < {NEAR_ZERO_RELATIVE:g} rms": {
            arm: e.lines(arm, "y", layer, "near_zero_relative") for arm in ARMS
        }
        for layer in layers[:3]
    }
    over_time = any(len(x) > 1 for named in shares.values() for lines in named.values() for x, _ in lines)
    named = {arm: {_layer(layer): s for layer, s in found.items()} for arm, found in y.items()}
    return f"""<h2>Distribution of Y in the FM attention</h2>
<p>G = X Xᵀ Y (Eq. 3). {how} (fm.y = '{fm.y}'). Layout '{fm.layout}': Y is {shape}. Measured on the first batches of
the validation split, seed {e.config.experiment.seeds[0]}, at the end of training.</p>
{_figure(figures.y_distributions([_layer(layer) for layer in layers], named), "")}
{_table([*head, "participation ratio", "entropy"], rows, text=(0, 1))}
{_figure(figures.curves(shares), "Over training, one line a seed.") if over_time else ""}
<p class="note">The share below {NEAR_ZERO_RELATIVE:g} of the root mean square does not change when a layer scales all
of Y; a normal distribution has 8%. Participation ratio: number of directions that the rows of Y use. Entropy: of |y|
within one Y, 1 when all are equal.</p>"""


def _layer(name: str) -> str:
    """layers.0.interactions.fm_attention.y -> layer 0: what sets one Y of a DHEN apart."""
    parts = name.split(".")
    return f"layer {parts[1]}" if parts[0] == "layers" and len(parts) > 1 else name


def _reproduce(e: Experiment) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in e.versions.items())
    return f"""<h2>Reproduce</h2>
<pre>{_text(e.command)}</pre>
<p class="soft">{_text(versions)}</p>
<details><summary>Resolved configuration</summary><pre>{_text(dump_config(e.config))}</pre></details>"""


def _name(s: Segment) -> str:
    return f"{s.name} ({s.detail})" if s.detail else s.name


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value).replace("-", "−")


def _value(estimate: Estimate, form: str) -> str:
    return "undefined" if estimate.value is None else _number(estimate.value, form)


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.interval is None:
        return "no interval"
    return " to ".join(_number(bound, form) for bound in estimate.interval)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _figure(svg: str, caption: str) -> str:
    text = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{text}</figure>\n"


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], text: Iterable[int] = (), marked: Iterable[int] = ()
) -> str:
    """Escapes every cell. `text`: left-aligned columns. `marked`: rows that stand out."""
    text, marked = set(text), set(marked)

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if i in text else ''}>{_text(cell)}</{tag}>" for i, cell in enumerate(cells)
        )

    body = "".join(
        f"<tr{' class=chosen' if i in marked else ''}>{line('td', row)}</tr>\n" for i, row in enumerate(rows)
    )
    top = f"<thead><tr>{line('th', head)}</tr></thead>"
    return f'<div class="scroll"><table>\n{top}\n<tbody>\n{body}</tbody></table></div>'
