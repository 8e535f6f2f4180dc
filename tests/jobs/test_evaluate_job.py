import argparse
import csv
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.config import Axis, DataConfig, EvaluateConfig, dump_config, load_config, parse_config
from c2al.data.hashing import hash64
from c2al.errors import CohortError, ConfigError, DataError, OutputError
from c2al.evaluation.bootstrap import poisson_weights
from c2al.evaluation.evaluate import evaluate as evaluate_arms
from c2al.evaluation.evaluate import paired
from c2al.evaluation.intervals import Spread
from c2al.evaluation.result import Estimate, Evaluation, Segment, read_evaluation
from c2al.jobs import evaluate as job

SMALL = EvaluateConfig(replicates=50)
AXIS = (Axis(name="surface", column="tab"),)


def evaluate(runs: Sequence[Sequence[Any]], *rest: Any) -> Evaluation:
    """Of one (baseline, c2al) per seed, or of one (scores,)."""
    return evaluate_arms(paired(runs), *rest)


def estimates(segment: Segment) -> dict[str, Estimate]:
    """All of a segment, by one name each."""
    found = {f"{arm}.{metric}": e for arm, metrics in segment.arms.items() for metric, e in metrics.items()}
    return found | {f"{metric}_diff": e for d in segment.differences for metric, e in d.estimates.items()}


def impressions(users: int = 150, rows: int = 400, seed: int = 0, weights: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows)
    effect = rng.normal(size=users)[user]
    label = (rng.random(rows) < 1 / (1 + np.exp(1 - effect))).astype(np.float32)
    return {
        "row_id": rng.permutation(rows).astype(np.int64),
        "user_id": user.astype(np.int64),
        "label": label,
        "weight": (rng.integers(0, 3, rows) if weights else np.ones(rows)).astype(np.float32),
        "tab": rng.choice(np.array(["a", "b"]), rows),
        "true_effect": effect,
    }


def predictions(data: dict[str, np.ndarray], seed: int, noise: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = 0.7 * data["true_effect"] - 0.9 + noise * rng.normal(size=len(data["label"]))
    return (1 / (1 + np.exp(-z))).astype(np.float32)


def write(folder: Path, data: dict[str, Any], prediction: Any, cuts: Sequence[int] = (), group: int = 1000) -> str:
    """A score folder with a part for each cut."""
    folder.mkdir(parents=True)
    columns = {k: v for k, v in data.items() if k != "true_effect"}
    table = pa.table({**columns, "prediction": prediction})
    bounds = [0, *cuts, table.num_rows]
    for i, (low, high) in enumerate(itertools.pairwise(bounds)):
        pq.write_table(table.slice(low, high - low), folder / f"part-{i:05}.parquet", row_group_size=group)
    (folder / "_complete.json").write_text("{}")
    return str(folder)


def ne(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> float:
    p = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.average(np.where(y == 1, np.log(p), np.log(1 - p)), weights=w)
    q = np.average(y, weights=w)
    return loss / -(q * math.log(q) + (1 - q) * math.log(1 - q))


def auc(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> float:
    i, j = y == 1, y == 0
    win = (p[i][:, None] > p[j][None, :]) + 0.5 * (p[i][:, None] == p[j][None, :])
    pair = w[i][:, None] * w[j][None, :]
    return float((win * pair).sum() / pair.sum())


def replicate_weights(data: dict[str, np.ndarray], seed: int, replicates: int) -> np.ndarray:
    """(rows, replicates) weight of each row: that of its user."""
    out = np.empty((len(data["user_id"]), replicates + 1))
    for i, user in enumerate(hash64(pa.array(data["user_id"]))):
        poisson_weights(np.uint64(seed), user, out[i])
    return out[:, 1:]


def test_everything_against_a_bootstrap_written_out(tmp_path: Path):
    data = impressions(weights=True)
    p = [[predictions(data, seed=10 * i + s) for s in range(2)] for i in range(2)]
    runs = [tuple(write(tmp_path / f"{i}{s}", data, p[i][s]) for i in range(2)) for s in range(2)]
    got = evaluate(runs, None, AXIS, SMALL, 7, tmp_path / "out")

    w_NR = replicate_weights(data, 7, 50)
    names = [("overall", "overall"), ("surface", "a"), ("surface", "b")]
    assert [(s.axis, s.name) for s in got.segments] == names
    for segment in got.segments:
        rows = np.ones(400, bool) if segment.axis == "overall" else data["tab"] == segment.name
        y, w = data["label"][rows], data["weight"][rows].astype(float)
        assert (segment.rows, segment.positives) == (rows.sum(), y.sum())

        def diff(s: int, w: np.ndarray, y: np.ndarray = y, rows: np.ndarray = rows) -> float:
            base = ne(y, p[0][s][rows], w)
            return (ne(y, p[1][s][rows], w) - base) / base

        estimate = estimates(segment)["ne_diff"]
        per_seed = [diff(0, w), diff(1, w)]
        assert estimate.per_seed == pytest.approx(per_seed, rel=1e-9)
        assert estimate.value == pytest.approx(np.mean(per_seed), rel=1e-9)
        assert estimate.seed_std == pytest.approx(np.std(per_seed, ddof=1), rel=1e-9)
        resampled = [(diff(0, w * w_NR[rows, r]) + diff(1, w * w_NR[rows, r])) / 2 for r in range(50)]
        assert estimate.users_interval == pytest.approx(np.quantile(resampled, [0.025, 0.975]), rel=1e-9)
        two = np.array([[diff(s, w * w_NR[rows, r]) for r in range(50)] for s in range(2)])
        shared = np.mean((two[0] - two[0].mean()) * (two[1] - two[1].mean())) * 50 / 49
        assert estimate.users_std == pytest.approx(math.sqrt(max(shared, 0)), rel=1e-7)
        mean = np.var(two.mean(axis=0), ddof=1)
        assert estimate.resampled_std == pytest.approx(math.sqrt(mean), rel=1e-7)
        found = Spread(np.mean(per_seed), max(shared, 0), np.var(per_seed, ddof=1) / 2, segment.users - 1, 1, mean)
        assert estimate.interval == pytest.approx(found.interval(0.95), rel=1e-7)

        for i, arm in enumerate(("baseline", "c2al")):
            calibration = [(w * q[rows]).sum() / (w * y).sum() for q in p[i]]
            assert segment.arms[arm]["ne"].per_seed == pytest.approx([ne(y, q[rows], w) for q in p[i]])
            assert segment.arms[arm]["calibration"].per_seed == pytest.approx(calibration)
            exact = [auc(y, q[rows], w) for q in p[i]]
            assert np.abs(np.subtract(segment.arms[arm]["auc"].per_seed, exact)).max() <= segment.auc_error < 0.01
        # The Hajek projection drops terms of order 1 / users: 150 users, intervals about 0.1 wide.
        resampled = [np.mean([auc(y, q[rows], w * w_NR[rows, r]) for q in p[0]]) for r in range(50)]
        assert segment.arms["baseline"]["auc"].users_interval == pytest.approx(
            np.quantile(resampled, [0.025, 0.975]), abs=0.01
        )


def test_poisson_weights_are_poisson_and_independent():
    users = hash64(pa.array(range(400)))
    w = np.empty((400, 501))
    for i, user in enumerate(users):
        poisson_weights(np.uint64(3), user, w[i])
    assert (w[:, 0] == 1).all()
    w = w[:, 1:]
    n = w.size
    for k in range(5):
        share = math.exp(-1) / math.factorial(k)
        assert (w == k).mean() == pytest.approx(share, abs=5 * math.sqrt(share / n))
    # Largest of 400 correlations over 500 replicates: 4.5 standard errors.
    assert np.abs(np.corrcoef(w)[0, 1:]).max() < 4.5 / math.sqrt(500)
    other = np.empty(501)
    poisson_weights(np.uint64(4), users[0], other)
    assert (other[1:] != w[0]).any()


def test_same_answer_for_any_files_row_groups_and_row_order(tmp_path: Path):
    data = impressions()
    p = [predictions(data, s) for s in range(2)]
    order = np.random.default_rng(1).permutation(400)
    shuffled = {k: v[order] for k, v in data.items()}
    folders = [
        (write(tmp_path / "a0", data, p[0]), write(tmp_path / "a1", data, p[1])),
        (write(tmp_path / "b0", data, p[0], [7, 7, 399]), write(tmp_path / "b1", data, p[1], [200], group=33)),
        (write(tmp_path / "c0", shuffled, p[0][order]), write(tmp_path / "c1", shuffled, p[1][order])),
    ]
    results = [evaluate([pair], None, AXIS, SMALL, 0, tmp_path / "out") for pair in folders]
    for other in results[1:]:
        for a, b in zip(results[0].segments, other.segments, strict=True):
            assert (a.axis, a.name, a.rows, a.positives) == (b.axis, b.name, b.rows, b.positives)
            for name, estimate in estimates(a).items():
                assert estimates(b)[name].value == pytest.approx(estimate.value, rel=1e-11)
                assert estimates(b)[name].interval == pytest.approx(estimate.interval, rel=1e-9)
                assert estimates(b)[name].users_interval == pytest.approx(estimate.users_interval, rel=1e-11)


def cohorts_json(path: Path, chosen: bool = True) -> Path:
    cohorts = [{"name": v, "conditions": [{"column": "tab", "equals": v}]} for v in ("a", "b", "never")]
    pair = {"head": {"axis": "surface", **cohorts[0]}, "tail": {"axis": "surface", **cohorts[1]}}
    tree = {
        "format": "c2al.cohorts",
        "version": 2,
        "chosen": {**(pair if chosen else {"head": None, "tail": None}), "reason": "test"},
        "axes": [{"name": "surface", "columns": ["tab"], "cohorts": cohorts}],
    }
    path.write_text(json.dumps(tree))
    return path


def test_cohorts_file_gives_head_tail_and_empty_segments(tmp_path: Path):
    data = impressions()
    runs = [(write(tmp_path / "0", data, predictions(data, 0)), write(tmp_path / "1", data, predictions(data, 1)))]
    got = evaluate(runs, cohorts_json(tmp_path / "cohorts.json"), (), SMALL, 0, tmp_path / "out")
    names = [("overall", "overall"), ("cohort", "head"), ("cohort", "tail")]
    assert [(s.axis, s.name) for s in got.segments] == [
        *names,
        ("surface", "a"),
        ("surface", "b"),
        ("surface", "never"),
    ]
    head, same, never = (got.segments[i] for i in (1, 3, 5))
    assert head.detail == "surface = a"
    assert (estimates(head), head.users) == (estimates(same), same.users)
    assert (never.rows, estimates(never)["ne_diff"].value) == (0, None)
    assert estimates(never)["ne_diff"].reason == "no rows"

    none = evaluate(runs, cohorts_json(tmp_path / "none.json", chosen=False), (), SMALL, 0, tmp_path / "none")
    assert [s.axis for s in none.segments] == ["overall", "surface", "surface", "surface"]


def test_segments_that_cannot_be_judged_say_why(tmp_path: Path):
    data = impressions(users=200, rows=2000)
    data["tab"] = np.array(["enough", "few", "cold", "hot", None])[np.minimum(data["user_id"] // 8, 4)].astype(object)
    data["tab"][data["user_id"] < 8] = "few"
    data["tab"][data["user_id"] >= 60] = "enough"
    data["label"][data["tab"] == "cold"] = 0
    data["label"][data["tab"] == "hot"] = 1
    runs = [(write(tmp_path / "0", data, predictions(data, 0)), write(tmp_path / "1", data, predictions(data, 1)))]
    by_name = {s.name: s for s in evaluate(runs, None, AXIS, SMALL, 0, tmp_path / "out").segments}
    assert set(by_name) == {"overall", "enough", "few", "cold", "hot", "null"}
    for name, reason in (("cold", "no positives"), ("hot", "no negatives")):
        for estimate in ("ne_diff", "baseline.ne", "c2al.auc", "auc_diff"):
            assert estimates(by_name[name])[estimate].value is None
            assert estimates(by_name[name])[estimate].reason == reason
    assert by_name["cold"].auc_error is None
    assert estimates(by_name["cold"])["baseline.calibration"].value is None
    assert estimates(by_name["hot"])["baseline.calibration"].value is not None
    few = estimates(by_name["few"])["ne_diff"]
    assert few.value is not None
    assert few.interval is None
    assert "effective users" in few.reason
    assert estimates(by_name["enough"])["ne_diff"].interval is not None
    table = read_evaluation(tmp_path / "out" / "evaluation.json").table()
    assert re.search(r"cold +[\d,]+ +0 +undefined +undefined +undefined +no positives", table)


def test_effective_users_of_equal_users(tmp_path: Path):
    data = impressions(users=50, rows=1000)
    data["user_id"] = np.arange(1000) % 50
    data["label"] = ((np.arange(1000) // 50) % 2).astype(np.float32)
    got = evaluate(
        [(write(tmp_path / "0", data, predictions(data, 0)),)], None, (), EvaluateConfig(), 0, tmp_path / "o"
    )
    # 1,000 replicates: the estimate of a variance has a relative standard error of sqrt(2 / 1000)
    assert got.segments[0].users == pytest.approx(50, rel=0.2)


def test_saturated_predictions_are_clipped(tmp_path: Path):
    data = impressions(rows=40)
    p = np.where(data["label"] == 1, 0.0, 1.0).astype(np.float32)
    got = evaluate([(write(tmp_path / "0", data, p),)], None, (), SMALL, 0, tmp_path / "o").segments[0]
    q = data["label"].mean(dtype=float)
    assert got.arms["scores"]["ne"].value == pytest.approx(
        math.log(1e7) / -(q * math.log(q) + (1 - q) * math.log(1 - q))
    )
    assert got.arms["scores"]["auc"].value == 0


def test_files_read_back_equal_and_csv_agrees(tmp_path: Path):
    data = impressions()
    runs = [(write(tmp_path / "0", data, predictions(data, 0)), write(tmp_path / "1", data, predictions(data, 1)))]
    got = evaluate(runs, None, AXIS, SMALL, 0, tmp_path / "out")
    assert read_evaluation(tmp_path / "out" / "evaluation.json") == got
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").open()))
    assert [r["segment"] for r in rows if r["metric"] == "ne_diff"] == ["overall", "a", "b"]
    for segment in got.segments:
        (row,) = [r for r in rows if (r["segment"], r["metric"]) == (segment.name, "ne_diff")]
        estimate = estimates(segment)["ne_diff"]
        assert (float(row["value"]), float(row["low"])) == (estimate.value, estimate.interval[0])
        assert float(row["corrected_p"]) == segment.differences[0].judgement.corrected_p


def test_another_version_is_refused(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text('{"format": "c2al.evaluation", "version": 99}')
    with pytest.raises(DataError, match=r"evaluation\.json.*version 99; this c2al reads"):
        read_evaluation(tmp_path / "evaluation.json")


def broken(data: dict[str, Any], column: str, row: int, value: Any) -> dict[str, Any]:
    values = data[column].astype(object)
    values[row] = value
    return {**data, column: pa.array(values.tolist(), pa.array(data[column]).type)}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("row_id", 77777, r"1/part-00001\.parquet, row group 0, row 2: row_id is 77777, but .*0/part-00000.* has 102"),
        ("label", 0.5, r"row 2: label is 0\.5, but .*row 302 \(row_id 102\)"),
        ("weight", 9.0, r"row 2: weight is 9\.0"),
        ("row_id", None, r"part-00001\.parquet, row group 0, row 2: row_id is null"),
    ],
)
def test_runs_of_other_rows_are_refused(tmp_path: Path, column: str, value: Any, message: str):
    data = impressions()
    data["row_id"] = np.arange(400, dtype=np.int64) - 200
    data["label"][302] = 1
    first = write(tmp_path / "0", data, predictions(data, 0))
    second = write(tmp_path / "1", broken(data, column, 302, value), predictions(data, 0), cuts=[300])
    with pytest.raises(DataError, match=message):
        evaluate([(first, second)], None, (), SMALL, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", 2.0, "row 3, row_id 3: label must be 0 or 1, is 2.0"),
        ("weight", -1.0, "row 3, row_id 3: weight must be finite and not negative, is -1.0"),
        ("user_id", None, "row 3: user_id is null"),
    ],
)
def test_values_outside_the_contract_are_refused(tmp_path: Path, column: str, value: Any, message: str):
    data = impressions()
    data["row_id"] = np.arange(400, dtype=np.int64)
    folder = write(tmp_path / "0", broken(data, column, 3, value), predictions(data, 0))
    with pytest.raises(DataError, match=message):
        evaluate([(folder,)], None, (), SMALL, 0, tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.25])
def test_a_prediction_that_is_no_probability_is_refused(tmp_path: Path, bad: float):
    data = impressions()
    p = predictions(data, 0)
    p[5] = bad
    with pytest.raises(
        DataError, match=rf"row 5, row_id {data['row_id'][5]}: prediction must lie in \[0, 1\], is {bad}"
    ):
        evaluate([(write(tmp_path / "0", data, p),)], None, (), SMALL, 0, tmp_path / "out")


def test_other_inputs_that_cannot_be_evaluated(tmp_path: Path):
    data = impressions()
    p = predictions(data, 0)
    whole = write(tmp_path / "whole", data, p)
    short = write(tmp_path / "short", {k: v[:-1] for k, v in data.items()}, p[:-1])
    with pytest.raises(DataError, match=r"short: 399 rows, but .*whole has 400"):
        evaluate([(whole, short)], None, (), SMALL, 0, tmp_path / "out")
    with pytest.raises(ConfigError, match="a pair of runs for each seed"):
        evaluate([(whole,), (whole,)], None, (), SMALL, 0, tmp_path / "out")
    with pytest.raises(CohortError, match="column 'country' of axis 'country' is missing"):
        evaluate([(whole,)], None, (Axis(name="country", column="country"),), SMALL, 0, tmp_path / "out")
    unlabelled = write(tmp_path / "unlabelled", {k: v for k, v in data.items() if k != "label"}, p)
    with pytest.raises(DataError, match="column 'label' is missing"):
        evaluate([(unlabelled,)], None, (), SMALL, 0, tmp_path / "out")
    text = write(tmp_path / "text", data, [str(v) for v in p])
    with pytest.raises(DataError, match="column 'prediction' is string"):
        evaluate([(text,)], None, (), SMALL, 0, tmp_path / "out")
    (tmp_path / "whole" / "_complete.json").unlink()
    with pytest.raises(DataError, match="whole: incomplete"):
        evaluate([(whole,)], None, (), SMALL, 0, tmp_path / "out")


def test_columns_under_configured_names_and_an_axis_of_users(tmp_path: Path):
    data = impressions()
    p = predictions(data, 0)
    plain = evaluate([(write(tmp_path / "0", data, p),)], None, (), SMALL, 0, tmp_path / "out")
    data["who"], data["impression"] = data.pop("user_id"), data.pop("row_id")
    axes = (Axis(name="user", column="who"),)
    names = DataConfig(user_id="who", row_id="impression")
    got = evaluate([(write(tmp_path / "1", data, p),)], None, axes, SMALL, 0, tmp_path / "out", names)
    assert got.segments[0] == plain.segments[0]
    assert len(got.segments) == 1 + len(np.unique(data["who"]))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_in_any_arrow_type(tmp_path: Path, kind: pa.DataType):
    data = impressions()
    plain = {**data, "user_id": np.array([f"u{u}" for u in data["user_id"]])}
    other = {**plain, **{k: pa.array(plain[k], pa.string()).cast(kind) for k in ("user_id", "tab")}}
    p = predictions(data, 0)
    results = [
        evaluate([(write(tmp_path / str(i), d, p, cuts=[150]),)], None, AXIS, SMALL, 0, tmp_path / "out")
        for i, d in enumerate((plain, other))
    ]
    assert results[0].segments == results[1].segments


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = {**impressions(), "user_id": np.array([f"u{u}" for u in impressions()["user_id"]])}
    pair = [write(tmp_path / str(i), data, predictions(data, i)) for i in range(2)]
    config = parse_config(
        {
            "data": {"sparse": [{"column": "x", "num_embeddings": 9}]},
            "axes": [{"name": "s", "column": "tab"}, {"name": "w", "column": "weight", "kind": "edges", "edges": [1]}],
        }
    )
    (tmp_path / "c.toml").write_text(dump_config(config))
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    words = ["--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "out")]
    job.run(parser.parse_args([*words, "--pair", *pair]), ["--evaluate.replicates", "30"])
    out, log = capsys.readouterr()
    assert log == "axes left out, since their cuts are in a cohorts.json (--cohorts): w\n"
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [["overall", "overall"], ["s", "a"], ["s", "b"]]
    assert load_config(tmp_path / "out" / "config.toml").evaluate.replicates == 30
    assert read_evaluation(tmp_path / "out" / "evaluation.json").replicates == 30
    job.run(parser.parse_args([*words, "--scores", pair[0]]), [])
    assert set(read_evaluation(tmp_path / "out" / "evaluation.json").segments[0].arms["scores"]) == {
        "ne",
        "calibration",
        "auc",
        "gauc",
    }


def test_a_run_is_not_replaced_by_an_evaluation_and_is_no_two_seeds(tmp_path: Path):
    data = impressions()
    pair = [write(tmp_path / str(i), data, predictions(data, i)) for i in range(2)]
    (tmp_path / "c.toml").write_text(
        dump_config(parse_config({"data": {"sparse": [{"column": "x", "num_embeddings": 9}]}}))
    )
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("of a run")
    (run / "statistics.json").write_text("{}")
    words = ["--config", str(tmp_path / "c.toml"), "--pair", *pair]
    with pytest.raises(OutputError, match=r"holds 'statistics\.json', which evaluate does not write"):
        job.run(parser.parse_args([*words, "--output", str(run)]), [])
    assert (run / "config.toml").read_text() == "of a run"
    with pytest.raises(ConfigError, match="names one folder twice"):
        job.run(parser.parse_args([*words, "--pair", *pair, "--output", str(tmp_path / "out")]), [])


@pytest.mark.slow
def test_intervals_of_a_null_difference_cover(tmp_path: Path):
    """Two models equally good by construction, whose errors and labels are correlated within a user.

    The interval over users must cover 0 at about its nominal rate, the one that takes rows for
    independent must not: it is the same code with each row a user of its own.
    """
    draws, users, per_user = 300, 150, 20
    covered = {"user": 0, "row": 0}
    config = EvaluateConfig(replicates=200, confidence=0.9)
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        user = np.repeat(np.arange(users), per_user)
        z = 1.5 * rng.normal(size=users)[user] - 1.5
        label = (rng.random(len(user)) < 1 / (1 + np.exp(-z))).astype(np.float32)
        data = {
            "row_id": np.arange(len(user)),
            "user_id": user,
            "label": label,
            "weight": np.ones(len(user), np.float32),
        }
        p = [1 / (1 + np.exp(1.5 - 0.5 * rng.normal(size=users)[user])) for _ in range(2)]
        for unit in covered:
            own = {**data, "user_id": user if unit == "user" else np.arange(len(user))}
            runs = [tuple(write(tmp_path / f"{unit}{draw}{i}", own, p[i].astype(np.float32)) for i in range(2))]
            low, high = (
                evaluate(runs, None, (), config, draw, tmp_path / "out")
                .segments[0]
                .differences[0]
                .estimates["ne"]
                .interval
            )
            covered[unit] += low <= 0 <= high
    print({unit: n / draws for unit, n in covered.items()})
    # Standard error of a 90% coverage over 300 draws: 0.017.
    assert 0.84 <= covered["user"] / draws <= 0.96
    assert covered["row"] / draws < 0.7


def test_estimate_is_json_without_nan(tmp_path: Path):
    data = impressions(rows=5)
    data["label"][:] = 0
    got = evaluate([(write(tmp_path / "0", data, predictions(data, 0)),)], None, (), SMALL, 0, tmp_path / "out")
    assert got.segments[0].arms["scores"]["ne"] == dataclasses.replace(
        got.segments[0].arms["scores"]["ne"], value=None, interval=None, per_seed=(None,), reason="no positives"
    )
    assert "NaN" not in (tmp_path / "out" / "evaluation.json").read_text()
