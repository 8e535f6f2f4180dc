"""Sections on training: curves, gradients of the tasks, the distribution of Y, change of the weights."""

from typing import Any

import numpy as np

from c2al.report import figures
from c2al.report.experiment import Experiment, Line
from c2al.report.page import escaped, figure, number, table
from c2al.training.diagnostics import NEAR_ZERO, NEAR_ZERO_RELATIVE

MOST_LAYERS = 3
"""Layers whose Y is followed over training."""


def section(e: Experiment) -> str:
    return f"<h2>Dynamics</h2>\n{_curves(e)}\n{_gradients(e)}\n{_y(e)}\n{_weights(e)}"


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
            *(f"{s[k]:.2%}" for k in ("near_zero", "near_zero_relative")),
            *(number(s[k], "{:.4g}") for k in ("std", "kurtosis", "participation_ratio", "entropy")),
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
    head = ["layer", "arm", f"|y| < {NEAR_ZERO:g}", f"|y| < {NEAR_ZERO_RELATIVE:g} rms", "std", "kurtosis"]
    return f"""<h3>Distribution of Y in the FM attention</h3>
<p>G = X Xᵀ Y (Eq. 3): {how} (fm.y = '{fm.y}'). Layout '{fm.layout}': Y is {shape}. Measured on the first batches of the
validation split, seed {e.record.seeds[0]}, at the end of training.</p>
{figure(figures.y_distributions([layer_name(layer) for layer in layers], named))}
{table([*head, "participation ratio", "entropy"], rows, text=(0, 1))}
{figure(figures.curves(shares), "Over training, one line per seed.") if over_time else ""}
<p class="note">The share below {NEAR_ZERO_RELATIVE:g} of the root mean square does not change when a layer scales all
of Y; a normal distribution has 8%. Participation ratio: number of directions that the rows of Y use. Entropy: of |y|
within one Y, 1 when all are equal.</p>"""


def layer_name(name: str) -> str:
    """layers.0.interactions.fm_attention.y -> layer 0: what sets one Y of a DHEN apart."""
    parts = name.split(".")
    return f"layer {parts[1]}" if parts[0] == "layers" and len(parts) > 1 else name


def _weights(e: Experiment) -> str:
    """Relative change of the weights per module (Fig. 4), where it was recorded: {module: change or None}."""
    found = {a.name: e.last(a.name, "weights") for a in e.drawn}
    modules = list(
        dict.fromkeys(
            m for change in found.values() for m, v in change.items() if v is None or isinstance(v, int | float)
        )
    )
    if not modules:
        return ""
    rows = [[m, *(number(change.get(m), "{:.3g}") for change in found.values())] for m in modules]
    return f"""<h3>Change of the weights</h3>
<p>Norm of the change over the norm before, at the last record of seed {e.record.seeds[0]}.</p>
{table(["module", *found], rows, text=(0,))}"""
