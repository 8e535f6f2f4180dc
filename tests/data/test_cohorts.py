"""Cohorts against rows picked by hand."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from c2al.data.cohorts import AxisCohorts, CohortSpec, Condition, read_cohorts
from c2al.errors import CohortError

TABLE = pa.table(
    {
        "tab": pa.array([1, 2, None, 3, 1, 2]),
        "x": pa.array([0.1, 0.5, None, float("nan"), float("inf"), -7.0]),
        "surface": pa.array(["feed", "reels", "feed", None, "other", "reels"]).dictionary_encode(),
        "paid": pa.array([True, False, None, True, True, False]),
    }
)


def spec(*conditions, axis="a", name="n"):
    return CohortSpec(axis=axis, name=name, conditions=conditions)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        (Condition(column="tab", equals=1), [0, 4]),
        (Condition(column="tab", null=True), [2]),
        (Condition(column="surface", equals="reels"), [1, 5]),
        (Condition(column="surface", null=True), [3]),
        (Condition(column="paid", equals=False), [1, 5]),
        (Condition(column="x", lower=0.1, upper=0.5), [0]),  # 0.1 is compared as float32 on both sides
        (Condition(column="x", lower=0.5), [1, 4]),  # the upper end is open and takes infinity in
        (Condition(column="x", upper=0.1), [5]),
        (Condition(column="x", null=True), [2, 3]),  # NaN is missing, too
    ],
)
def test_membership_of_each_kind_of_condition(condition, rows):
    assert np.flatnonzero(spec(condition).membership(TABLE)).tolist() == rows
    batch = TABLE.combine_chunks().to_batches()[0]
    assert np.flatnonzero(spec(condition).membership(batch)).tolist() == rows


def test_conditions_of_a_cohort_all_hold():
    both = spec(Condition(column="tab", equals=1), Condition(column="surface", equals="feed"))
    assert both.membership(TABLE).tolist() == [True, False, False, False, False, False]
    assert both.columns == ("tab", "surface")


def test_codes_number_the_cohorts_and_mark_what_is_unknown():
    axis = AxisCohorts(
        name="tab_x",
        columns=("x", "tab"),
        cohorts=(
            spec(Condition(column="x", lower=0.25), Condition(column="tab", equals=2)),
            spec(Condition(column="x", upper=0.25), Condition(column="tab", equals=2)),
            spec(Condition(column="x", null=True), Condition(column="tab", null=True)),
            spec(Condition(column="x", upper=0.25), Condition(column="tab", equals=1)),
        ),
    )
    # Row 3 is tab 3, never seen; row 4 is (>= 0.25, tab 1), a combination never seen.
    assert axis.codes(TABLE).tolist() == [3, 0, 2, -1, -1, 1]
    assert axis.codes(TABLE).dtype == np.int32
    assert axis.codes(TABLE.slice(0, 0)).tolist() == []


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (Condition(column="missing", equals=1), "'missing' is missing"),
        (Condition(column="surface", equals=1), "'surface' is string"),
        (Condition(column="tab", equals="1"), "'tab' is int64"),
        (Condition(column="tab", equals=True), "'tab' is int64"),
        (Condition(column="surface", lower=0.0), "needs? a number"),
    ],
)
def test_a_column_that_does_not_fit_is_named(condition, words):
    with pytest.raises(CohortError, match=words):
        spec(condition, axis="a").membership(TABLE)


def document(**changes):
    cohorts = [
        {"name": "1", "conditions": [{"column": "tab", "equals": 1}], "rows": 7},
        {"name": "null", "conditions": [{"column": "tab", "null": True}]},
    ]
    axis = {"name": "tab", "columns": ["tab"], "cohorts": cohorts}
    head, tail = ({"axis": "tab", "name": c["name"], "conditions": c["conditions"]} for c in cohorts)
    return {
        "format": "c2al.cohorts",
        "version": 2,
        "chosen": {"head": head, "tail": tail, "reason": "r"},
        "axes": [axis],
        **changes,
    }


def written(tmp_path, tree):
    path = tmp_path / "cohorts.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def test_what_is_read_is_what_was_written(tmp_path):
    cohorts = read_cohorts(written(tmp_path, document()))
    head, tail = cohorts.chosen()
    assert head == dataclasses.replace(spec(Condition(column="tab", equals=1), axis="tab", name="1"), label="head")
    assert tail.membership(TABLE).tolist() == [False, False, True, False, False, False]
    assert cohorts.axes[0].codes(TABLE).tolist() == [0, -1, 1, -1, 0, -1]
    interval = Condition(column="x", lower=None, upper=0.5)
    assert Condition.from_json(json.loads(json.dumps(interval.to_json())), "f") == interval


def test_any_number_of_chosen_cohorts_with_names_of_their_own(tmp_path):
    tab = document()["axes"][0]["cohorts"]
    other = {"name": "young", "axis": "age", "conditions": [{"column": "age", "lower": None, "upper": 20}]}
    chosen = [{"name": label, "axis": "tab", "conditions": c["conditions"]} for label, c in zip("ab", tab, strict=True)]
    tree = document(chosen={"cohorts": [*chosen, other], "reason": "r"})
    found = read_cohorts(written(tmp_path, tree)).chosen()
    assert [(c.label, c.axis, c.name) for c in found] == [
        ("a", "tab", "1"),
        ("b", "tab", "null"),
        ("young", "age", "young"),
    ]
    one = read_cohorts(written(tmp_path, document(chosen={"cohorts": [other], "reason": "r"}))).chosen()
    assert [c.label for c in one] == ["young"]
    none = document(chosen={"cohorts": [], "reason": "all alike"})
    with pytest.raises(CohortError, match="all alike"):
        read_cohorts(written(tmp_path, none)).chosen()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["primary"], "'primary'.*is none of primary, all, overall"),
        (["all"], "'all'"),
        (["a.b"], "'a.b'"),
        ([""], "''"),
        (["x", "x"], "two chosen cohorts are named 'x'"),
    ],
)
def test_a_name_that_metrics_or_configs_cannot_hold_is_refused(tmp_path, labels, words):
    conditions = [{"column": "tab", "equals": 1}]
    chosen = [{"name": label, "axis": "tab", "conditions": conditions} for label in labels]
    path = written(tmp_path, document(chosen={"cohorts": chosen, "reason": "r"}))
    with pytest.raises(CohortError, match=words):
        read_cohorts(path)


def test_no_choice_says_why(tmp_path):
    nothing = {"head": None, "tail": None, "reason": "all alike"}
    with pytest.raises(CohortError, match="all alike"):
        read_cohorts(written(tmp_path, document(chosen=nothing))).chosen()


def with_cohorts(*conditions):
    cohorts = [{"name": str(i), "conditions": c} for i, c in enumerate(conditions)]
    return document(axes=[{"name": "tab", "columns": ["tab"], "cohorts": cohorts}])


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("{", "not strict JSON"),
        (document(version=1), "version 1; this c2al reads"),
        ([], "holds no JSON object"),
        ({"format": "c2al.cohorts", "version": 2}, "chosen"),
        (with_cohorts([{"column": "tab", "equals": None}]), "not a condition"),
        (with_cohorts([{"column": "tab", "equals": 1.5}]), "not a condition"),
        (with_cohorts([{"column": "tab", "lower": "0", "upper": 1}]), "not a condition"),
        (with_cohorts([{"column": "tab", "equals": 1, "null": True}]), "not a condition"),
        (with_cohorts([{"column": "x", "equals": 1}]), "not one condition on each"),
        (with_cohorts([{"column": "tab", "equals": 1}], [{"column": "tab", "equals": 1}]), "same conditions"),
        (with_cohorts(), "no cohorts"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path, tree, words):
    path = written(tmp_path, tree)
    with pytest.raises(CohortError, match=words) as caught:
        read_cohorts(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(document()).replace('"equals": 1', '"equals": ' + "9" * 400),
        json.dumps(document()).replace('"equals": 1', '"lower": 1e999, "upper": null'),
        json.dumps(document()).replace('"equals": 1', '"lower": NaN, "upper": 1'),
        json.dumps(document()).replace('"equals": 1', '"lower": 2, "upper": 1'),
        json.dumps(document()).replace('"equals": 1', '"equals": ' + "[" * 100_000),
        json.dumps(document()).replace('"equals": 1', '"equals": {"a": 1}'),
        json.dumps(document()).replace('"name": "tab"', '"name": 7'),
        json.dumps(document(chosen=[])),
        json.dumps(document(axes={})),
        json.dumps(document(axes=[7])),
        json.dumps(document(version=True)),
        json.dumps(document(format="other")),
        json.dumps(document(chosen={"head": None, "tail": None, "reason": None})),
        json.dumps(document(axes=document()["axes"] * 2)),
        '{"format": "c2al.cohorts", "format": "c2al.cohorts", "version": 2}',
    ],
)
def test_damaged_or_foreign_files_are_refused_by_name(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(CohortError) as caught:
        read_cohorts(path)
    assert str(caught.value).startswith(f"{path}: ")


def put(tree, where, key):
    """`tree` with an unknown key in the object at `where`."""
    copy = json.loads(json.dumps(tree))
    node = copy
    for step in where:
        node = node[step]
    node[key] = 1
    return copy


AS_LIST = {
    "reason": "r",
    "cohorts": [{"label": "a", "axis": "tab", "name": "1", "conditions": [{"column": "tab", "equals": 1}]}],
}


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(
    ("where", "key", "words"),
    [
        ((), "choosen", "unknown key 'choosen'; did you mean 'chosen'"),
        (("chosen",), "lambdas", "'chosen': unknown key 'lambdas'; there may be reason, "),
        (("chosen",), "third", "'chosen': unknown key 'third'"),
        (("axes", 0), "colums", "axis 'tab': unknown key 'colums'; did you mean 'columns'"),
        (("axes", 0, "cohorts", 1), "weight", "cohort 'null': unknown key 'weight'"),
        (("axes", 0, "cohorts", 0, "conditions", 0), "uper", "uper: unknown key; did you mean 'upper'"),
    ],
)
def test_a_key_that_nobody_knows_is_refused_by_name_wherever_it_stands(tmp_path, where, key, words, as_list):
    tree = document(chosen=AS_LIST) if as_list else document()
    read_cohorts(written(tmp_path, tree))
    path = written(tmp_path, put(tree, where, key))
    with pytest.raises(CohortError, match=words) as caught:
        read_cohorts(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_two_conditions_on_one_column_are_refused(tmp_path):
    """All but the first were ignored without a word."""
    twice = json.loads(json.dumps(AS_LIST))
    twice["cohorts"][0]["conditions"].append({"column": "tab", "equals": 2})
    with pytest.raises(
        CohortError, match="cohort '1': two conditions on column 'tab'; one may have 'lower' and 'upper'"
    ):
        read_cohorts(written(tmp_path, document(chosen=twice)))


def test_cohorts_of_an_axis_that_share_values_are_refused(tmp_path):
    def axis(*bounds):
        cohorts = [{"name": str(b), "conditions": [{"column": "age", "lower": b[0], "upper": b[1]}]} for b in bounds]
        return {"name": "age", "columns": ["age"], "cohorts": cohorts}

    tree = document()
    read_cohorts(written(tmp_path, {**tree, "axes": [*tree["axes"], axis((None, 10), (10, 50), (50, None))]}))
    with pytest.raises(CohortError, match=r"axis 'age': two cohorts share values of column 'age': one is \[10"):
        read_cohorts(written(tmp_path, {**tree, "axes": [*tree["axes"], axis((10, 50), (20, 30))]}))


def test_users_are_drawn_by_ids_alone():
    drawn = CohortSpec(axis="p", name="d", conditions=(Condition(column="age", draw=0, lower=0.0, upper=0.5),))
    with pytest.raises(CohortError, match="column 'age' is double; users are drawn by integers or strings"):
        drawn.membership(pa.table({"age": [0.5, 1.5]}))


def test_an_unknown_key_of_a_chosen_cohort_and_a_pair_beside_a_list_are_refused(tmp_path):
    for tree, words in (
        (put(document(), ("chosen", "tail"), "lambda"), "cohort 'null': unknown key 'lambda'"),
        (put(document(), ("chosen", "tail"), "label"), "cohort 'null': unknown key 'label'"),
        (put(document(chosen=AS_LIST), ("chosen", "cohorts", 0), "lambda"), "cohort '1': unknown key 'lambda'"),
        (document(chosen={**AS_LIST, "head": AS_LIST["cohorts"][0]}), "'chosen': unknown key 'head'"),
    ):
        with pytest.raises(CohortError, match=words):
            read_cohorts(written(tmp_path, tree))


def test_bytes_that_are_not_utf_8_are_refused_by_name(tmp_path):
    path = tmp_path / "cohorts.json"
    path.write_bytes(b'{"format": "\xff"}')
    with pytest.raises(CohortError, match="not UTF-8"):
        read_cohorts(path)


def test_integers_of_any_width_meet_categories_and_cuts_of_any_size():
    narrow = pa.table({"c": pa.array([1, None, 127], pa.int8())})
    wide = pa.table({"c": pa.array([2**64 - 1, None, 7], pa.uint64())})
    nanoseconds = pa.table({"c": pa.array([2**62 + 1, None, 5])})
    assert spec(Condition(column="c", equals=300)).membership(narrow).tolist() == [False] * 3
    assert spec(Condition(column="c", equals=-1)).membership(wide).tolist() == [False] * 3
    assert spec(Condition(column="c", equals=7)).membership(wide).tolist() == [False, False, True]
    for table in (wide, nanoseconds):
        assert spec(Condition(column="c", lower=2.0**61)).membership(table).tolist() == [True, False, False]


def test_string_view_is_text():
    table = pa.table({"c": pa.array(["a", None, "b"], pa.string_view())})
    assert spec(Condition(column="c", equals="b")).membership(table).tolist() == [False, False, True]


def test_a_float_beyond_float32_lies_in_the_last_interval():
    assert spec(Condition(column="c", lower=1.0)).membership(pa.table({"c": [1e300, 0.0]})).tolist() == [True, False]
