"""An evaluation as a text table and as CSV."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from c2al.text import csv_text, percent, table

if TYPE_CHECKING:
    from c2al.evaluation.result import Difference, Estimate, Evaluation, Segment

Column = tuple[str, "Callable[[Segment], str]"]

CSV_COLUMNS = (
    *("axis", "segment", "detail", "rows", "positives", "users", "arm", "against", "metric"),
    *(
        "value",
        "low",
        "high",
        "seeds",
        "seed_std",
        "users_std",
        "df",
        "p",
        "corrected_p",
        "corrected_low",
        "corrected_high",
        "passes",
        "verdict",
        "items_low",
        "items_high",
        "reason",
    ),
)


def terminal_table(evaluation: "Evaluation") -> str:
    """One table per comparison; of a single arm, its metrics."""
    if not evaluation.comparisons:
        return _drawn(evaluation, _metric_columns(evaluation))
    return "\n\n".join(
        f"{arm} against {against}\n" + _drawn(evaluation, _difference_columns(evaluation, i))
        for i, (arm, against) in enumerate(evaluation.comparisons)
    )


def _drawn(evaluation: "Evaluation", columns: Sequence[Column]) -> str:
    first: list[Column] = [
        ("axis", lambda s: s.axis),
        ("segment", lambda s: f"{s.name} ({s.detail})" if s.detail else s.name),
        ("rows", lambda s: f"{s.rows:,}"),
        ("positives", lambda s: f"{s.positives:,}"),
    ]
    columns = [*first, *columns]
    return table([[t for t, _ in columns], *([cell(s) for _, cell in columns] for s in evaluation.segments)], left=2)


def _metric_columns(evaluation: "Evaluation") -> list[Column]:
    name = evaluation.arms[0].name
    return [
        ("NE", lambda s: number(s.arms[name]["ne"], "{:.5f}")),
        (f"{percent(evaluation.confidence)} interval", lambda s: interval(s.arms[name]["ne"], "{:.5f}")),
        ("cal.", lambda s: number(s.arms[name]["calibration"], "{:.4f}")),
        ("AUC", lambda s: number(s.arms[name]["auc"], "{:.4f}")),
        ("GAUC", lambda s: number(s.arms[name]["gauc"], "{:.4f}")),
    ]


def _difference_columns(evaluation: "Evaluation", i: int) -> list[Column]:
    arm, against = evaluation.comparisons[i]

    def ne(s: "Segment") -> "Estimate":
        return s.differences[i].estimates["ne"]

    columns: list[Column] = [
        ("NE ref.", lambda s: number(s.arms[against]["ne"], "{:.5f}")),
        ("NE", lambda s: number(s.arms[arm]["ne"], "{:.5f}")),
        ("NE_diff", lambda s: number(ne(s), "{:+.3%}")),
        (f"corrected {percent(evaluation.confidence)} interval", lambda s: _corrected(s.differences[i])),
        ("verdict", lambda s: verdict(s.differences[i])),
    ]
    if evaluation.items:
        columns.append(("users and items", lambda s: _bounds(s.differences[i].items_interval, "{:+.3%}")))
    if any(len(s.differences[i].estimates["ne"].per_seed) > 1 for s in evaluation.segments):
        columns.append(("seed sd", lambda s: _text(ne(s).seed_std, "{:.3%}")))
    for metric, title in (("calibration", "cal."), ("auc", "AUC"), ("gauc", "GAUC")):
        for name, suffix in ((against, " ref."), (arm, "")):
            columns.append((title + suffix, lambda s, m=metric, n=name: number(s.arms[n][m], "{:.4f}")))  # type: ignore[misc]
    return columns


def evaluation_csv(evaluation: "Evaluation") -> str:
    """One row per segment, arm or comparison, and metric; an undefined number is an empty cell with its reason."""
    rows: list[Sequence[Any]] = [CSV_COLUMNS]
    for s in evaluation.segments:
        segment = [s.axis, s.name, s.detail, s.rows, s.positives, s.users]
        for arm, estimates in s.arms.items():
            rows += [[*segment, arm, "", metric, *_cells(e), *[None] * 8, e.reason] for metric, e in estimates.items()]
        for d in s.differences:
            for metric, e in d.estimates.items():
                j = d.judgement if metric == "ne" else None
                judged = [j.p, j.corrected_p, *j.corrected_interval, j.passes, j.verdict] if j else [None] * 6
                items = (metric == "ne" and d.items_interval) or (None, None)
                rows.append([*segment, d.arm, d.against, f"{metric}_diff", *_cells(e), *judged, *items, e.reason])
    return csv_text(rows)


def _cells(e: "Estimate") -> list[Any]:
    return [e.value, *(e.interval or (None, None)), len(e.per_seed), e.seed_std, e.users_std, e.df]


def verdict(difference: "Difference") -> str:
    return difference.judgement.verdict if difference.judgement else ""


def number(estimate: "Estimate", form: str) -> str:
    return "undefined" if estimate.value is None else form.format(estimate.value)


def interval(estimate: "Estimate", form: str) -> str:
    """In square brackets, or why there is none."""
    return _bounds(estimate.interval, form) or estimate.reason


def _corrected(difference: "Difference") -> str:
    """The interval that the verdict follows, or why there is none."""
    if difference.judgement is None:
        return difference.estimates["ne"].reason
    return _bounds(difference.judgement.corrected_interval, "{:+.3%}")


def _bounds(bounds: tuple[float, float] | None, form: str) -> str:
    return "" if bounds is None else f"[{', '.join(form.format(bound) for bound in bounds)}]"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
