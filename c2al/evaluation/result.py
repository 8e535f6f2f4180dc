"""What `c2al evaluate` found: evaluation.json, its table and its CSV."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from c2al.errors import DataError

VERSION = 1
"""Of evaluation.json; a file of another version is refused."""
OVERALL, COHORT = "overall", "cohort"
"""Axis names of the whole test set, and of head and tail."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One number with what is known about its uncertainty. None: undefined, `reason` says why."""

    value: float | None
    """Mean over seeds; of the AUC see `Segment.auc_error`."""
    interval: tuple[float, float] | None
    """Percentile interval of `value` from the bootstrap over users. It says how far another sample
    of users would move it; not how far another seed would: that is `seed_std`."""
    per_seed: tuple[float | None, ...]
    seed_std: float | None
    """Standard deviation over seeds (n - 1); None with one seed."""
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """The estimates on one set of rows."""

    axis: str
    """Name of an axis, or OVERALL, or COHORT."""
    name: str
    """Of the segment in its axis; "head" and "tail" with axis COHORT."""
    detail: str
    """What head and tail are, e.g. "tab = 1"."""
    rows: int
    positives: int
    users: float
    """Effective number of users (as many equal users would vary as much) behind the positives or
    the negatives, whichever has fewer; estimated from the bootstrap."""
    auc_error: float | None
    """Largest distance that the logit bins can put between an AUC and the exact one; None without AUC."""
    estimates: dict[str, Estimate]
    """With pairs: "ne_diff", "auc_diff", and "ne", "calibration", "auc" after "baseline." and "c2al.";
    with one run: "ne", "calibration", "auc"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What evaluation.json holds."""

    version: int
    runs: tuple[tuple[str, ...], ...]
    """Score folders: (baseline, c2al) for each seed, or one (scores,)."""
    rows: int
    confidence: float
    replicates: int
    seed: int
    clip: float
    segments: tuple[Segment, ...]

    def segment(self, axis: str, name: str) -> Segment | None:
        """The segment of that name, if there is one."""
        return next((s for s in self.segments if (s.axis, s.name) == (axis, name)), None)

    def to_json(self) -> str:
        """Full precision; reads back equal."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """One row a segment; an undefined number is an empty cell with its reason."""
        names = list(self.segments[0].estimates)
        fields = ("value", "low", "high", "seed_std", "reason")
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = ["axis", "segment", "detail", "rows", "positives", "users", "auc_error"]
        writer.writerow(head + [f"{name}.{field}" for name in names for field in fields])
        for s in self.segments:
            cells: list[Any] = [s.axis, s.name, s.detail, s.rows, s.positives, s.users, s.auc_error]
            for e in (s.estimates[name] for name in names):
                cells += [e.value, *(e.interval or (None, None)), e.seed_std, e.reason]
            writer.writerow(cells)
        return out.getvalue()

    def table(self) -> str:
        """For the terminal."""
        paired = "ne_diff" in self.segments[0].estimates
        columns: list[tuple[str, Callable[[Segment], str]]] = [
            ("axis", lambda s: s.axis),
            ("segment", lambda s: f"{s.name} ({s.detail})" if s.detail else s.name),
            ("rows", lambda s: f"{s.rows:,}"),
            ("positives", lambda s: f"{s.positives:,}"),
        ]
        if paired:
            columns += [
                ("NE base", lambda s: _number(s.estimates["baseline.ne"], "{:.5f}")),
                ("NE C2AL", lambda s: _number(s.estimates["c2al.ne"], "{:.5f}")),
                ("NE_diff", lambda s: _number(s.estimates["ne_diff"], "{:+.3%}")),
                (f"{self.confidence:.0%} interval", lambda s: _interval(s.estimates["ne_diff"], "{:+.3%}")),
            ]
            if len(self.runs) > 1:
                columns.append(("seed sd", lambda s: _text(s.estimates["ne_diff"].seed_std, "{:.3%}")))
            groups = [("baseline.", " base"), ("c2al.", " C2AL")]
        else:
            columns += [
                ("NE", lambda s: _number(s.estimates["ne"], "{:.5f}")),
                (f"{self.confidence:.0%} interval", lambda s: _interval(s.estimates["ne"], "{:.5f}")),
            ]
            groups = [("", "")]
        for metric, title in (("calibration", "cal."), ("auc", "AUC")):
            for prefix, suffix in groups:
                columns.append((title + suffix, lambda s, n=prefix + metric: _number(s.estimates[n], "{:.4f}")))  # type: ignore[misc]
        rows = [[title for title, _ in columns]] + [[cell(s) for _, cell in columns] for s in self.segments]
        width = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        align = [str.ljust, str.ljust] + [str.rjust] * (len(columns) - 2)
        return "\n".join("  ".join(a(c, w) for a, c, w in zip(align, row, width, strict=True)).rstrip() for row in rows)


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Reads evaluation.json. Raises DataError naming the file and what is wrong with it."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        if tree["version"] != VERSION:
            raise DataError(f"{path}: version is {tree['version']!r}, this c2al reads version {VERSION}")
        tree["runs"] = tuple(tuple(run) for run in tree["runs"])
        tree["segments"] = tuple(
            Segment(**{**s, "estimates": {name: _estimate(e) for name, e in s["estimates"].items()}})
            for s in tree["segments"]
        )
        return Evaluation(**tree)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise DataError(f"{path}: not a readable evaluation.json: {e!r}") from e


def _estimate(tree: dict[str, Any]) -> Estimate:
    interval = tree["interval"]
    return Estimate(
        **{**tree, "interval": None if interval is None else tuple(interval), "per_seed": tuple(tree["per_seed"])}
    )


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _number(estimate: Estimate, form: str) -> str:
    return "undefined" if estimate.value is None else form.format(estimate.value)


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.interval is None:
        return estimate.reason
    low, high = (form.format(bound) for bound in estimate.interval)
    return f"[{low}, {high}]"
