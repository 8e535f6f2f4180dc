"""Sections on training: curves, gradients of the tasks, the distribution of Y, dead units, change of the weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from c2al.report import figures
from c2al.report.experiment import Entry, Experiment, Line
from c2al.report.page import between, escaped, figure, number, table
from c2al.text import percent
from c2al.training.diagnostics import NEAR_ZERO, NEAR_ZERO_RELATIVE

Y_MEASURES = ("near_zero", "near_zero_relative", "std", "kurtosis", "participation_ratio", "entropy")
"""What the report compares of Y's distribution (c2al.training.diagnostics)."""
Y_TITLES = {
    "near_zero": f"|y| < {NEAR_ZERO:g}",
    "near_zero_relative": f"|y| < {NEAR_ZERO_RELATIVE:g} rms",
    "participation_ratio": "participation ratio",
}
MOST_LAYERS = 3
"""Layers whose Y is followed over training."""


def section(e: Experiment) -> str:
    return f"<h2>Dynamics</h2>\n{_curves(e)}\n{_gradients(e)}\n{_y(e)}\n{_units(e)}\n{_weights(e)}"


def _curves(e: Experiment) -> str:
    arms = [a.name for a in e.drawn]
    panels = {
        "training NE": {a: e.lines(a, "train", "window", "primary", "all", "ne") for a in arms},
        "validation NE": {a: e.lines(a, "validation", "primary", "all", "ne") for a in arms},
    }
    if e.main is not None:
        tasks = [c.partition(":")[0] for c in e.main.cohorts]
        panels["validation NE, auxiliary tasks"] = {
            t: e.lines(e.main.name, "validation", t, "all", "ne") for t in tasks
        }
    drawn = {title: named for title, named in panels.items() if any(named.values())}
    caption = "One line per seed. Training NE is that of the batches since the last record, before each update."
    return figure(figures.curves(drawn), caption) if drawn else ""


def _gradients(e: Experiment) -> str:
    """The Gramian of the tasks' gradients (Eq. 8-12), where it was recorded."""
    if e.main is None or not (last := e.last(e.main.name, "gramian")):
        return "<h3>Gradients of the tasks</h3><p>Not recorded.</p>"
    tasks = last["tasks"]
    series = {
        "norm of the gradient": {t: _series(e, "norms", i) for i, t in enumerate(tasks)},
        "cosine to the primary gradient": {t: _series(e, "cosines", 0, i) for i, t in enumerate(tasks) if i},
    }
    rows = [
        [task, *(number(_at(last, k, i), "{:.3g}") for k in ("norms", "parallel", "orthogonal"))]
        + [number(_at(last, "cosines", i, j), "{:+.3f}") for j in range(len(tasks))]
        for i, task in enumerate(tasks)
    ]
    head = ["task", "norm", "parallel", "orthogonal", *(f"cosine to {t}" for t in tasks)]
    return f"""<h3>Gradients of the tasks</h3>
<p>Of {escaped(e.main.name)}, at the encoder's output, as the losses enter the objective (Eq. 8-12). Parallel and
orthogonal are the parts along and beside the primary task's gradient: the orthogonal part is what the primary loss does
not teach. The table is the last record of seed {e.record.seeds[0]}.</p>
{figure(figures.curves({k: v for k, v in series.items() if any(v.values())}), "One line per seed.")}
{table(head, rows, text=(0,))}"""


def _series(e: Experiment, *keys: str | int) -> list[Line]:
    """One line per seed of a number in the main arm's Gramian records."""
    assert e.main is not None
    found = []
    for records in e.records[e.main.name]:
        points = [(r["step"], v) for r in records if r["kind"] == "gramian" if (v := _at(r, *keys)) is not None]
        if points:
            steps, values = np.array(points, dtype=np.float64).T
            found.append((steps, values))
    return found


def _at(record: Any, *keys: str | int) -> Any:
    """record[key][key]..., None where it is not there."""
    for key in keys:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            return None
    return record


def _y(e: Experiment) -> str:
    """Distribution of Y at the end and over training (Figs. 2 and 5)."""
    y = {a.name: e.last(a.name, "y") for a in e.drawn}
    layers = list(dict.fromkeys(layer for found in y.values() for layer in found))
    if not layers:
        return "<h3>Distribution of Y</h3><p>Not recorded.</p>"
    fm = e.config.model.fm
    how = (
        "an attention MLP makes it for each sample" if fm.y == "mlp" else "it is a parameter, the same for all samples"
    )
    shape = "d × k, it mixes embedding dimensions" if fm.layout == "paper" else "n × k, it mixes fields"
    rows = [
        [
            layer_name(layer),
            arm,
            *(f"{s[k]:.2%}" for k in Y_MEASURES[:2]),
            *(number(s[k], "{:.4g}") for k in Y_MEASURES[2:]),
        ]
        for layer in layers
        for arm, found in y.items()
        if (s := found.get(layer)) is not None
    ]
    shares = {
        f"{layer_name(layer)}: |y| < {NEAR_ZERO_RELATIVE:g} rms": {
            a.name: e.lines(a.name, "y", layer, "near_zero_relative") for a in e.drawn
        }
        for layer in layers[:MOST_LAYERS]
    }
    over_time = any(len(x) > 1 for named in shares.values() for found in named.values() for x, _ in found)
    named = {arm: {layer_name(layer): s for layer, s in found.items()} for arm, found in y.items()}
    head = ["layer", "arm", *(Y_TITLES.get(m, m) for m in Y_MEASURES)]
    return f"""<h3>Distribution of Y in the FM attention</h3>
<p>G = X Xᵀ Y (Eq. 3): {how} (fm.y = '{fm.y}'). Layout '{fm.layout}': Y is {shape}. Measured on the first batches of the
validation split, seed {e.record.seeds[0]}, at the end of training.</p>
{figure(figures.y_distributions([layer_name(layer) for layer in layers], named))}
{table(head, rows, text=(0, 1))}
{_y_over_seeds(e)}
{figure(figures.curves(shares), "Over training, one line per seed.") if over_time else ""}
<p class="note">The share below {NEAR_ZERO_RELATIVE:g} of the root mean square does not change when a layer scales all
of Y; a normal distribution has 8%. Participation ratio: number of directions that the rows of Y use. Entropy: of |y|
within one Y, 1 when all are equal.</p>"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class YDifference:
    """A measure of one Y at the end of training, in two arms."""

    layer: str
    measure: str
    against: float
    """Mean over the seeds of the other arm."""
    arm: float
    """Mean over the seeds."""
    difference: float
    """Mean over the seeds of arm - against."""
    interval: tuple[float, float] | None
    """Student t over the seeds' differences, not corrected for several; None with one seed."""


def y_differences(
    against: Sequence[Sequence[Entry]], arm: Sequence[Sequence[Entry]], confidence: float
) -> list[YDifference]:
    """The last Y of every layer, arm minus the other, seed by seed.

    `against`, `arm`: by seed, the records of metrics.jsonl; the seeds of both in the same order. A layer or a measure
    that a seed lacks is left out.
    """
    last = [[_last_y(records) for records in runs] for runs in (against, arm)]
    found = []
    for layer in last[0][0] if last[0] else ():
        for measure in Y_MEASURES:
            values_2S = [[_at(y, layer, measure) for y in runs] for runs in last]
            if any(v is None for values in values_2S for v in values):
                continue
            other_S, own_S = np.array(values_2S, dtype=np.float64)
            difference_S = own_S - other_S
            interval, seeds = None, len(difference_S)
            if seeds > 1:
                t = float(special.stdtrit(seeds - 1, (1 + confidence) / 2))
                half = t * float(difference_S.std(ddof=1)) / seeds**0.5
                interval = (float(difference_S.mean()) - half, float(difference_S.mean()) + half)
            found.append(
                YDifference(
                    layer=layer_name(layer),
                    measure=measure,
                    against=float(other_S.mean()),
                    arm=float(own_S.mean()),
                    difference=float(difference_S.mean()),
                    interval=interval,
                )
            )
    return found


def _last_y(records: Sequence[Entry]) -> Entry:
    """Layer -> measures of the last record of Y; empty without one."""
    found = [r for r in records if r["kind"] == "y"][-1:]
    return {k: v for r in found for k, v in r.items() if k not in ("step", "kind")}


def _y_over_seeds(e: Experiment) -> str:
    """Whether Y is denser (Fig. 5): the main arm against the baseline over all seeds."""
    if e.main is None:
        return ""
    baseline, confidence = e.record.baseline.name, e.evaluation.confidence
    rows = [
        [
            d.layer,
            Y_TITLES.get(d.measure, d.measure),
            *(number(v, "{:.4g}") for v in (d.against, d.arm)),
            number(d.difference, "{:+.3g}"),
            between(d.interval, "{:+.3g}"),
        ]
        for d in y_differences(e.records[baseline], e.records[e.main.name], confidence)
    ]
    if not rows:
        return ""
    return f"""<p>Over the seeds: means at the end of training, and the mean difference of paired seeds with its
{percent(confidence)} t-interval, which is not corrected for the number of rows.</p>
{table(["layer", "measure", baseline, e.main.name, "difference", "interval"], rows, text=(0, 1))}"""


def _units(e: Experiment) -> str:
    """Share of ReLU units that no row activates, mean over the seeds, where it was recorded."""
    dead: dict[str, dict[str, list[float]]] = {}
    for arm in (a.name for a in e.drawn):
        for records in e.records[arm]:
            for record in [r for r in records if r["kind"] == "units"][-1:]:
                for layer, found in record.items():
                    if (share := _at(found, "dead")) is not None:
                        dead.setdefault(layer, {}).setdefault(arm, []).append(share)
    if not dead:
        return ""
    arms = [a.name for a in e.drawn]
    rows = [
        [layer, *(f"{np.mean(shares[a]):.1%}" if a in shares else "–" for a in arms)] for layer, shares in dead.items()
    ]
    return f"""<h3>Dead units</h3>
<p>Share of the ReLU units of a layer that no row of the first validation batches activates, at the end of training, the
mean over the seeds.</p>
{table(["layer", *arms], rows, text=(0,))}"""


def layer_name(name: str) -> str:
    """layers.0.interactions.fm_attention.y -> layer 0: what sets one Y of a DHEN apart."""
    parts = name.split(".")
    return f"layer {parts[1]}" if parts[0] == "layers" and len(parts) > 1 else name


def _weights(e: Experiment) -> str:
    """Relative change of the weights per module (Fig. 4), where it was recorded."""
    found = {a.name: e.last(a.name, "weights").get("modules", {}) for a in e.drawn}
    modules = {m: _at(change, "part") for changes in found.values() for m, change in changes.items()}
    if not modules:
        return ""
    rows = [
        [module, str(part), *(number(_at(changes, module, "change"), "{:.3g}") for changes in found.values())]
        for module, part in modules.items()
    ]
    return f"""<h3>Change of the weights</h3>
<p>Norm of the change over the norm before, at the end of the training of seed {e.record.seeds[0]}. Part: before the
attention MLPs, the attention MLPs that make Y, or after them.</p>
{table(["module", "part", *found], rows, text=(0, 1))}"""
