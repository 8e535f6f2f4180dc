"""The document and the table, on counts whose statistics are known by hand."""

import json

import numpy as np
import pyarrow as pa
import pytest

from c2al.config import Axis, DiscoverConfig
from c2al.discovery.accumulate import BlockScanner
from c2al.discovery.accumulators import Accumulators
from c2al.discovery.axes import Columns, cohort_spec, fixed_cuts, parts, targets
from c2al.discovery.describe import LISTED_PAIRS, describe, table
from c2al.discovery.saved import load_accumulators, save_accumulators
from c2al.errors import CohortError

TAB = Axis(name="tab", column="tab")
AGE = Axis(name="age", column="age", kind="edges", edges=(18.0, 35.0))
LEVEL = Axis(name="level", column="level", kind="percentiles", percentiles=(0.0, 5.0, 100.0))
CROSS = Axis(name="age_tab", kind="cross", cross=("age", "tab"))
COLUMNS = Columns(prediction="p", label="y", user="u")


def accumulated(table, axes, cuts):
    scanner = BlockScanner(axes, cuts, COLUMNS, cap=100, jackknife=True)
    for batch in table.to_batches():
        scanner.add(batch, 0)
    return Accumulators.empty(axes, cuts, COLUMNS, jackknife=True).plus(scanner.take())


def many_cohorts(cohorts=20, rows=20_000):
    rng = np.random.default_rng(0)
    columns = {"p": rng.random(rows).astype(np.float32), "y": (rng.random(rows) < 0.5).astype(np.float32)}
    return pa.table({**columns, "u": np.arange(rows), "tab": rng.integers(0, cohorts, rows)})


def test_statistics_of_a_cohort_by_hand():
    p, y = np.array([0.25, 0.5, 0.125, 0.75], np.float32), np.array([1, 0, 0, 1], np.float32)
    document = describe(
        accumulated(pa.table({"p": p, "y": y, "u": [1, 2, 3, 4], "tab": ["a"] * 4}), (TAB,), {}), DiscoverConfig()
    )
    (cohort,) = document["axes"][0]["cohorts"]
    entropy = -(np.log(0.25) + np.log(0.5) + np.log(0.875) + np.log(0.75)) / 4
    assert cohort["mean_prediction"] == 0.40625
    assert cohort["calibration"] == 0.8125
    assert cohort["ne"] == pytest.approx(entropy / np.log(2), rel=1e-9)


def test_only_the_first_pairs_are_listed_and_the_others_are_counted():
    document = describe(accumulated(many_cohorts(), (TAB,), {}), DiscoverConfig())
    (axis,) = document["axes"]
    assert len(axis["pairs"]) == LISTED_PAIRS
    assert axis["pairs_left_out"] == 20 * 19 // 2 - LISTED_PAIRS
    assert document["rule"]["tested_pairs"] == 20 * 19 // 2
    bounds = [p["lower_bound"] for p in axis["pairs"]]
    assert bounds == sorted(bounds, reverse=True)
    pair = axis["pairs"][0]
    assert pair["js"]["low"] < pair["js"]["value"] < pair["js"]["high"]
    assert pair["lower_bound"] < pair["js"]["low"]  # corrected for all pairs
    assert document["chosen"]["head"] is None
    assert "nothing chosen" in table(document)
    assert json.loads(json.dumps(document)) == document


def test_names_are_unique_and_for_people():
    axes, cuts = (TAB, AGE, LEVEL, CROSS), {**fixed_cuts([AGE]), "level": (0.25,)}

    def name(axis, *key):
        return cohort_spec(axis, axes, cuts, key).name

    assert [name(TAB, v) for v in (3, "feed", True, None)] == ["3", "feed", "true", "null"]
    assert [name(TAB, v) for v in ("null", "a & b", 'say "x"')] == ['"null"', '"a & b"', '"say \\"x\\""']
    assert [name(AGE, v) for v in (0, 1, 2, None)] == ["< 18", "[18, 35)", ">= 35", "null"]
    assert [name(LEVEL, v) for v in (0, 1)] == ["p0-p5", "p5-p100"]
    assert name(CROSS, 1, "feed") == "[18, 35) & feed"
    assert cohort_spec(CROSS, axes, cuts, (0, "feed")).conditions[0].upper == 18


def test_only_axes_that_no_cross_contains_are_counted():
    surface = Axis(name="surface", column="surface")
    other = Axis(name="surface_tab", kind="cross", cross=("surface", "tab"))
    assert [[a.name for a in t] for t in targets((TAB, AGE, surface, LEVEL, CROSS, other))] == [
        ["level"],
        ["tab", "age"],
        ["tab", "surface"],
    ]
    three = Axis(name="three", kind="cross", cross=("surface", "age", "tab"))
    assert [[a.name for a in t] for t in targets((TAB, AGE, surface, CROSS, three))] == [["tab", "age", "surface"]]
    assert [a.name for a in parts(three, (TAB, AGE, surface, three))] == ["surface", "age", "tab"]


def test_axes_that_cannot_be_cut_are_refused():
    again = Axis(name="again", column="tab")
    with pytest.raises(CohortError, match="'twice' crosses column 'tab' with itself"):
        targets((TAB, again, Axis(name="twice", kind="cross", cross=("tab", "again"))))
    with pytest.raises(CohortError, match="'age': two edges are the same float32"):
        fixed_cuts([Axis(name="age", column="age", kind="edges", edges=(1.0, 1.0 + 1e-9))])


def test_an_edge_that_float32_would_move_past_integers_is_refused():
    def cut(edge):
        return fixed_cuts([Axis(name="views", column="views", kind="edges", edges=(10.0, edge))])["views"]

    assert cut(2.0**24 - 1) == (10.0, 2.0**24 - 1)
    assert cut(2.0**24 + 2) == (10.0, 2.0**24 + 2)
    assert cut(0.1 + 10) == (10.0, 10.1)
    for edge in (2.0**24 + 1, 2.0**25 + 3, 1.7e18):
        with pytest.raises(CohortError, match=r"'views': edges are float32, which does not hold"):
            cut(edge)
    with pytest.raises(CohortError, match="16777217; the nearest that it holds are 16777216 and 16777218"):
        cut(16777217.0)


def test_accumulators_survive_a_file(tmp_path):
    total = accumulated(many_cohorts(5, 500), (TAB,), {})
    save_accumulators(tmp_path / "a.npz", total, [(0, 1)])
    loaded, finished = load_accumulators(tmp_path / "a.npz")
    assert finished == ((0, 1),)
    for field in ("axes", "cuts", "jackknife", "columns", "files"):
        assert getattr(loaded, field) == getattr(total, field)
    assert loaded.counts[0].keys == total.counts[0].keys
    assert (loaded.counts[0].fine_CS22 == total.counts[0].fine_CS22).all()
    assert (loaded.counts[0].group_CGK == total.counts[0].group_CGK).all()
