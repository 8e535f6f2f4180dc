"""Arms x seeds: differences, families of tests, GAUC, reliability, users and items together."""

import argparse
import csv
import dataclasses
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from c2al.bins import BINS, bin_predictions, logit_bins
from c2al.config import Axis, EvaluateConfig, dump_config, parse_config
from c2al.data.hashing import hash64
from c2al.errors import ConfigError, DataError, OutputError
from c2al.evaluation import evaluate as library
from c2al.evaluation.bootstrap import poisson_weights, resample_pairs
from c2al.evaluation.evaluate import arm, evaluate
from c2al.evaluation.grouped import shares, user_aucs
from c2al.evaluation.intervals import Spread
from c2al.evaluation.judge import judgement
from c2al.evaluation.result import Arm, read_evaluation
from c2al.jobs import evaluate as job
from evaluation.scored import impressions, predictions, write

SMALL = EvaluateConfig(replicates=60)
AXIS = (Axis(name="surface", column="tab"),)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory):
    """(data, arm -> seed -> predictions, arms): a baseline with three seeds, two arms with three and two."""
    root = tmp_path_factory.mktemp("scored")
    data = impressions(rows=3000)
    seeds = {"baseline": (4, 7, 9), "chosen": (4, 7, 9), "placebo": (9, 4)}
    noise = {"baseline": 0.9, "chosen": 0.3, "placebo": 0.9}
    p = {
        name: {s: predictions(data, 100 * i + s, noise[name]) for s in of} for i, (name, of) in enumerate(seeds.items())
    }
    arms = tuple(
        Arm(name=name, seeds=of, folders=tuple(write(root / f"{name}{s}", data, p[name][s]) for s in of))
        for name, of in seeds.items()
    )
    return data, p, arms


def test_arms_are_paired_by_seed_and_any_two_can_be_compared(scored, tmp_path: Path):
    data, p, arms = scored
    got = evaluate(arms, None, AXIS, SMALL, 3, tmp_path / "out", comparisons=[("chosen", "placebo")])
    assert got.comparisons == (("chosen", "baseline"), ("placebo", "baseline"), ("chosen", "placebo"))

    def ne(prediction: np.ndarray) -> float:  # of one seed; the entropy of the labels cancels in NE_diff
        y, w, q = data["label"], data["weight"], prediction.astype(float)
        return -np.average(np.where(y == 1, np.log(q), np.log(1 - q)), weights=w)

    for a, against, seeds in (
        ("chosen", "baseline", (4, 7, 9)),
        ("placebo", "baseline", (9, 4)),
        ("chosen", "placebo", (4, 9)),
    ):
        expected = [(ne(p[a][s]) - ne(p[against][s])) / ne(p[against][s]) for s in seeds]
        found = got.overall.difference(a, against).estimates["ne"]
        assert found.per_seed == pytest.approx(expected, rel=1e-9)
        assert found.value == pytest.approx(np.mean(expected), rel=1e-9)
    with pytest.raises(KeyError, match="placebo was not compared with chosen"):
        got.overall.difference("placebo", "chosen")
    assert got.overall.difference("chosen", "baseline").judgement.verdict == "lower"
    assert got.overall.difference("placebo", "baseline").judgement.verdict == "no difference shown"
    assert read_evaluation(tmp_path / "out" / "evaluation.json") == got
    assert "chosen against placebo" in got.table()


def test_the_table_shows_the_interval_that_its_verdict_follows(scored, tmp_path: Path):
    """With a heading, of one comparison too: without it nobody knows which arms stand there."""
    _, _, arms = scored
    got = evaluate(arms[:2], None, AXIS, SMALL, 3, tmp_path / "out")
    heading, titles, *lines = got.table().splitlines()
    assert heading == "chosen against baseline"
    assert "corrected 95% interval" in titles
    assert not re.search(r"(?<!corrected) 95% interval", titles.replace("corrected 95% interval", ""))
    for line, s in zip(lines, got.segments, strict=True):
        low, high = s.differences[0].judgement.corrected_interval
        assert f"[{low:+.3%}, {high:+.3%}]" in line
    assert "users and items" not in titles


def test_the_interval_over_items_stands_in_table_and_csv_where_there_is_one(scored, tmp_path: Path):
    _, _, arms = scored
    got = evaluate(arms[:2], None, AXIS, dataclasses.replace(SMALL, items="item"), 3, tmp_path / "out")
    low, high = got.overall.differences[0].items_interval
    _, titles, first, *others = got.table().splitlines()
    assert "users and items" in titles
    assert f"[{low:+.3%}, {high:+.3%}]" in first
    assert all(line.count("[") == first.count("[") - 1 for line in others), "segments have none"
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").open()))
    filled = [r for r in rows if r["items_low"] or r["items_high"]]
    assert [(r["axis"], r["arm"], r["metric"]) for r in filled] == [("overall", "chosen", "ne_diff")]
    assert (float(filled[0]["items_low"]), float(filled[0]["items_high"])) == (low, high)
    corrected = got.overall.differences[0].judgement.corrected_interval
    assert (float(filled[0]["corrected_low"]), float(filled[0]["corrected_high"])) == corrected


def test_two_runs_as_arms_and_alone_give_the_same_numbers(scored, tmp_path: Path):
    """More arms change the corrections, nothing else."""
    _, _, arms = scored
    all_three = evaluate(arms, None, AXIS, SMALL, 3, tmp_path / "a")
    two = evaluate(arms[:2], None, AXIS, SMALL, 3, tmp_path / "b")
    for a, b in zip(all_three.segments, two.segments, strict=True):
        assert a.differences[0].estimates == b.differences[0].estimates
        assert a.arms["baseline"] == b.arms["baseline"]


def test_families_holm_over_comparisons_overall_false_discovery_over_segments(scored, tmp_path: Path):
    _, _, arms = scored
    got = evaluate(arms, None, AXIS, SMALL, 3, tmp_path / "out")
    judged = [d.judgement for d in got.overall.differences]
    assert min(j.corrected_p for j in judged) == pytest.approx(2 * min(j.p for j in judged))
    assert max(j.corrected_p for j in judged) == pytest.approx(max(j.p for j in judged))
    for c in range(2):
        family = sorted((s.differences[c].judgement for s in got.segments[1:]), key=lambda j: j.p)
        assert len(family) == 2
        assert family[1].corrected_p == pytest.approx(family[1].p)
        assert family[0].corrected_p == pytest.approx(min(2 * family[0].p, family[1].p))
    for d in itertools.chain.from_iterable(s.differences for s in got.segments):
        low, high = d.judgement.corrected_interval
        assert d.judgement.passes == (not low <= 0 <= high) == (d.judgement.corrected_p <= 0.05)
        uncorrected = d.estimates["ne"].interval
        assert low <= uncorrected[0] + 1e-12
        assert high >= uncorrected[1] - 1e-12


def test_verdict_of_one_seed_says_that_it_knows_nothing_of_others(scored, tmp_path: Path):
    _, _, arms = scored
    one = [dataclasses.replace(a, seeds=(a.seeds[0],), folders=(a.folders[0],)) for a in arms[:2]]
    found = evaluate(one, None, (), SMALL, 3, tmp_path / "out").overall.differences[0]
    assert "one seed says nothing about other seeds" in found.judgement.words
    assert found.estimates["ne"].seed_std is None
    assert found.power.seeds_needed is None


def test_verdict_follows_the_decision():
    below, above = Spread(-1.0, 0.01, 0.01, 90.0, 2), Spread(1.0, 0.01, 0.01, 90.0, 2)
    assert judgement(below, 0.01, 0.02, 0.04, True).verdict == "lower"
    assert judgement(above, 0.01, 0.02, 0.04, True).verdict == "higher"
    assert judgement(below, 0.01, 0.06, 0.04, False).verdict == "no difference shown"


@pytest.mark.parametrize(
    ("arms", "comparisons", "message"),
    [
        ([arm("a", ["x"]), arm("a", ["y"])], (), "distinct names, got a, a"),
        ([arm("a", ["x"]), Arm(name="b", seeds=(5,), folders=("y",))], (), "'b' and 'a' have no seed in common"),
        (
            [arm("a", ["x"]), Arm(name="b", seeds=(0, 0), folders=("y", "z"))],
            (),
            r"'b' needs .* distinct seeds.*\[0, 0\]",
        ),
        ([arm("a", ["x"]), Arm(name="b", seeds=(0,), folders=("y", "z"))], (), "'b' has 2 folders for 1 seeds"),
        ([arm("a", ["x"]), arm("b", ["y"])], [("b", "c")], "no arm is called 'c'; there are a, b"),
        ([arm("a", ["x"]), arm("b", ["y"])], [("b", "b")], "'b' is compared with itself"),
        ([], (), "no scored run"),
    ],
)
def test_arms_that_cannot_be_compared(tmp_path: Path, arms, comparisons, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(arms, None, (), SMALL, 0, tmp_path / "out", comparisons=comparisons)


def test_gauc_against_pairs_counted_one_by_one(tmp_path: Path):
    data = impressions(users=80, rows=900)
    prediction = predictions(data, 1, digits=1)  # ties
    folder = write(tmp_path / "s", data, prediction, cuts=[90, 300], group=37)
    got = evaluate([arm("scores", [folder])], None, AXIS, SMALL, 5, tmp_path / "out")
    weight_UR = np.empty((80, 61))
    for u, h in enumerate(hash64(pa.array(np.arange(80)))):
        poisson_weights(np.uint64(5), h, weight_UR[u])
    for segment in got.segments:
        top, bottom = np.zeros(61), np.zeros(61)
        for u in range(80):
            rows = data["user_id"] == u
            if segment.axis != "overall":
                rows &= data["tab"] == segment.name
            y, w, p = (data[k][rows] for k in ("label", "weight", "user_id"))
            p = prediction[rows]
            wins = pairs = 0.0
            for i, j in itertools.product(np.flatnonzero(y == 1), np.flatnonzero(y == 0)):
                pairs += w[i] * w[j]
                wins += w[i] * w[j] * ((p[i] > p[j]) + (p[i] == p[j]) / 2)
            if pairs:
                top += weight_UR[u] * w.sum() * wins / pairs
                bottom += weight_UR[u] * w.sum()
        estimate = segment.arms["scores"]["gauc"]
        assert estimate.value == pytest.approx(top[0] / bottom[0], rel=1e-9)
        if estimate.users_interval is not None:
            assert estimate.users_interval == pytest.approx(np.quantile((top / bottom)[1:], [0.025, 0.975]), rel=1e-9)
    assert got.overall.arms["scores"]["gauc"].users_interval is not None


def test_gauc_without_a_user_of_both_classes_says_so(tmp_path: Path):
    data = impressions(users=100, rows=600)
    data["label"] = (data["user_id"] % 2).astype(np.float32)
    got = evaluate(
        [arm("s", [write(tmp_path / "s", data, predictions(data, 0))])], None, (), SMALL, 0, tmp_path / "out"
    )
    estimate = got.overall.arms["s"]["gauc"]
    assert (estimate.value, estimate.reason) == (None, "no user with positives and negatives")
    assert got.overall.arms["s"]["auc"].value is not None


def test_user_aucs_of_no_rows():
    none = np.zeros(0)
    found = user_aucs(none.astype(np.uint64), np.zeros((0, 1), np.int32), none.astype(np.uint8), none, np.zeros((0, 2)))
    assert [len(x) for x in found] == [0, 0, 0]


@pytest.mark.parametrize("count", [2, 7])
def test_shares_hold_every_row_once_in_order_and_leave_no_file(count: int, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rng, parts, reads = np.random.default_rng(0), [], []
    for rows in (50, 0, 31):
        user_N = rng.integers(0, 12, rows).astype(np.uint64)
        columns = (user_N, rng.integers(-1, 4, (rows, 2)).astype(np.int32), rng.integers(0, 2, rows).astype(np.uint8))
        parts.append((*columns, rng.random(rows), rng.random((rows, 3))))
    blocks = (reads.append(i) or part for i, part in enumerate(parts))  # each part can be had once
    whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
    found = list(shares(blocks, axes=2, runs=3, count=count))
    assert len(found) == count
    for share, columns in enumerate(found):
        own_N = whole[0] % np.uint64(count) == share
        for column, expected in zip(columns, whole, strict=True):
            assert column.dtype == expected.dtype
            np.testing.assert_array_equal(column, expected[own_N])
    assert reads == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_no_other_disk_is_taken_when_the_named_one_is_not_there(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "away"))
    one = (np.zeros(1, np.uint64), np.zeros((1, 1), np.int32), np.ones(1, np.uint8), np.ones(1), np.ones((1, 1)))
    with pytest.raises(OutputError, match=r"TMPDIR = .*away: cannot be written"):
        list(shares([one], axes=1, runs=1, count=2))


def test_memory_bounds_change_no_number(scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Segments in rounds, users in shares and row ids in shares: the same answer as all at once."""
    _, _, arms = scored
    config = dataclasses.replace(SMALL, items="item")
    whole = evaluate(arms, None, AXIS, config, 3, tmp_path / "a")
    monkeypatch.setattr(library, "MEMORY", 200_000)
    monkeypatch.setattr("c2al.evaluation.scores.UNIQUE_ROWS", 100)
    parts = evaluate(arms, None, AXIS, config, 3, tmp_path / "b")
    for a, b in zip(whole.segments, parts.segments, strict=True):
        assert a.differences[0].items_interval == b.differences[0].items_interval
        for name, metrics in a.arms.items():
            for metric, estimate in metrics.items():
                other = b.arms[name][metric]
                assert other.value == pytest.approx(estimate.value, rel=1e-11)
                assert other.users_interval == pytest.approx(estimate.users_interval, rel=1e-11)


def test_reliability_bins(tmp_path: Path):
    """Bins of equal weight whose rates are those of the rows in them, up to a row's logit bin."""
    rng = np.random.default_rng(0)
    data = impressions(rows=20000)
    prediction = rng.uniform(0.02, 0.9, 20000).astype(np.float32)
    data["label"] = (rng.random(20000) < prediction / 2).astype(np.float32)
    got = evaluate([arm("s", [write(tmp_path / "s", data, prediction)])], None, (), SMALL, 0, tmp_path / "out")
    bins = got.overall.reliability["s"]
    assert len(bins.rate) == 10
    assert sum(bins.weight) == pytest.approx(data["weight"].sum())
    assert np.array(bins.weight) == pytest.approx(data["weight"].sum() / 10, rel=0.03)
    order = np.argsort(prediction)
    edges = np.searchsorted(data["weight"][order].cumsum(), np.cumsum((0, *bins.weight)))
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        rows = order[low:high]
        w = data["weight"][rows]
        assert bins.prediction[i] == pytest.approx(np.average(prediction[rows], weights=w), abs=0.25 / 128 + 1e-3)
        assert bins.rate[i] == pytest.approx(np.average(data["label"][rows], weights=w), abs=0.02)
    assert np.array(bins.rate) == pytest.approx(np.array(bins.prediction) / 2, abs=0.05)


def test_bins_and_their_centres():
    p = np.concatenate(([0.01, 0.3, 0.5, 0.999], np.random.default_rng(0).random(1000)))
    index = logit_bins(np.log(p / (1 - p)))
    assert (np.abs(bin_predictions()[index] - p) <= 0.008 * p * (1 - p)).all()
    assert logit_bins(np.array([-99.0, 99.0])).tolist() == [0, BINS - 1]


def test_users_and_items_together_against_a_bootstrap_written_out(tmp_path: Path):
    """Row weight w(user) w(item); the interval's variance is that of NE_diff over those weights."""
    data = impressions(users=150, rows=900)
    p = [predictions(data, s, noise) for s, noise in enumerate((0.8, 0.4))]
    arms = [arm(name, [write(tmp_path / name, data, q)]) for name, q in zip("ab", p, strict=True)]
    config = EvaluateConfig(replicates=60, items="item")
    got = evaluate(arms, None, (), config, 5, tmp_path / "out").overall.differences[0]

    users, items = hash64(pa.array(data["user_id"])), hash64(pa.array(data["item"]))
    weight_NR = np.zeros((900, 61))
    for n in range(900):  # a row alone gives its own weights
        sums = np.zeros((1, 3, 61))
        one = slice(n, n + 1)
        resample_pairs(
            users[one], items[one], np.zeros((1, 1), np.int32), np.zeros(1, np.uint8), np.ones(1), np.zeros((1, 1)),
            np.uint64(5), sums,
        )  # fmt: skip
        weight_NR[n] = sums[0, 0]
    assert (weight_NR[:, 0] == 1).all()
    w = weight_NR * data["weight"][:, None]
    y = data["label"][:, None]
    loss = [
        (w * -np.where(y == 1, np.log(q.astype(float))[:, None], np.log(1 - q.astype(float))[:, None])).sum(0)
        for q in p
    ]
    diff = (loss[1] - loss[0]) / loss[0]
    class_2R = [(w * (y == c)).sum(axis=0) for c in (0, 1)]
    effective = min(1 / np.mean((x[1:] / x[0] - 1) ** 2) for x in class_2R)
    expected = Spread(diff[0], diff[1:].var(ddof=1), 0.0, effective - 1, 0).interval(0.95)
    low, high = got.items_interval
    assert (low, high) == pytest.approx(expected, rel=1e-9)
    plain_low, plain_high = got.estimates["ne"].interval
    assert high - low > plain_high - plain_low


def test_pair_weights_of_users_and_items_are_poisson_products():
    """Mean 1; variance (1 + 1)(1 + 1) - 1 = 3; rows of one user correlate, rows of no one in common do not."""
    replicates, rows = 40001, 3
    users, items = np.array([7, 7, 8], np.uint64), np.array([1, 2, 1 << 40], np.uint64)
    weights = np.zeros((rows, replicates))
    for n in range(rows):
        sums = np.zeros((1, 3, replicates))
        resample_pairs(
            users[n : n + 1], items[n : n + 1], np.zeros((1, 1), np.int32), np.zeros(1, np.uint8), np.ones(1),
            np.zeros((1, 1)), np.uint64(4), sums,
        )  # fmt: skip
        weights[n] = sums[0, 0]
    w = weights[:, 1:]
    assert w.mean(axis=1) == pytest.approx(1.0, abs=5 * math.sqrt(3 / 40000))
    assert w.var(axis=1) == pytest.approx(3.0, rel=0.1)
    covariance = np.cov(w)
    assert covariance[0, 1] == pytest.approx(1.0, abs=0.15)  # E w(u)^2 - 1
    assert abs(covariance[0, 2]) < 0.1


def test_items_need_a_column_of_ids(scored, tmp_path: Path):
    _, _, arms = scored
    for column, message in (
        ("nothing", "column 'nothing' is missing"),
        ("weight", "'weight' is float; evaluate.items"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(arms, None, (), EvaluateConfig(items=column), 0, tmp_path / "out")


def test_command_line_takes_arms(scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, _, arms = scored
    config = parse_config(
        {"data": {"sparse": [{"column": "x", "num_embeddings": 9}]}, "axes": [{"name": "s", "column": "tab"}]}
    )
    (tmp_path / "c.toml").write_text(dump_config(config))
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    words = ["--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "out")]
    baseline = ["--baseline", ",".join(arms[0].folders)]
    named = ["--arm", "chosen=" + ",".join(arms[1].folders), "--arm", f"placebo={arms[2].folders[1]}"]
    args = parser.parse_args([*words, *baseline, *named, "--compare", "chosen", "placebo"])
    job.run(args, ["--evaluate.replicates", "30"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if " against " in line] == [
        "chosen against baseline",
        "placebo against baseline",
        "chosen against placebo",
    ]
    got = read_evaluation(tmp_path / "out" / "evaluation.json")
    assert {a.name: a.seeds for a in got.arms} == {"baseline": (0, 1, 2), "chosen": (0, 1, 2), "placebo": (0,)}
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").open()))
    assert {(r["arm"], r["against"]) for r in rows if r["metric"] == "ne_diff"} == set(got.comparisons)
    with pytest.raises(ConfigError, match="--arm placebo: expected NAME=FOLDER"):
        job.run(parser.parse_args([*words, *baseline, "--arm", "placebo"]), [])
    with pytest.raises(ConfigError, match="--arm: needs --baseline"):
        job.run(parser.parse_args([*words, "--scores", arms[0].folders[0], "--arm", "a=b"]), [])


def test_names_of_data_run_nothing_where_they_are_shown(tmp_path: Path):
    """A category that is a formula or moves the cursor."""
    data = impressions()
    data["tab"] = np.where(data["tab"] == "a", "=1+1", "\x1b[2J")
    got = evaluate(
        [arm("s", [write(tmp_path / "s", data, predictions(data, 0))])], None, AXIS, SMALL, 0, tmp_path / "out"
    )
    assert "\x1b" not in got.table()
    segments = {row["segment"] for row in csv.DictReader((tmp_path / "out" / "evaluation.csv").open())}
    assert "'=1+1" in segments


def test_output_that_is_a_file_is_refused_before_any_work(scored, tmp_path: Path):
    _, _, arms = scored
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="out: cannot be written"):
        evaluate(arms, None, (), SMALL, 0, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
