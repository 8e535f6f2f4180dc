"""Kinds of fault in score folders: each is refused by file, field or row, and value; none is evaluated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.config import Axis, EvaluateConfig
from c2al.data.scores_folder import write_marker
from c2al.errors import DataError
from c2al.evaluation.evaluate import arm, evaluate
from c2al.evaluation.result import read_evaluation
from evaluation.scored import impressions, predictions, with_value, write

SMALL = EvaluateConfig(replicates=20)
AXIS = (Axis(name="surface", column="tab"),)


def refused(
    folder: str, tmp_path: Path, match: str, axes: tuple[Axis, ...] = (), config: EvaluateConfig = SMALL
) -> None:
    with pytest.raises(DataError, match=match):
        evaluate([arm("s", [folder])], None, axes, config, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lost_part_is_noticed(tmp_path: Path):
    data = impressions(rows=512)
    folder = Path(write(tmp_path / "s", data, predictions(data, 0), cuts=[256]))
    write_marker(folder, ("part-00000.parquet", "part-00001.parquet"))
    assert evaluate([arm("s", [folder])], None, (), SMALL, 0, tmp_path / "whole").rows == 512
    (folder / "part-00001.parquet").unlink()
    refused(str(folder), tmp_path, r"part-00001\.parquet: missing; _complete\.json lists it with 256 rows")


def test_a_part_replaced_by_a_shorter_one_is_noticed(tmp_path: Path):
    data = impressions(rows=512)
    folder = Path(write(tmp_path / "s", data, predictions(data, 0), cuts=[256]))
    write_marker(folder, ("part-00000.parquet", "part-00001.parquet"))
    table = pq.read_table(folder / "part-00001.parquet")
    pq.write_table(table.slice(0, 100), folder / "part-00001.parquet")
    refused(str(folder), tmp_path, r"part-00001\.parquet: has 100 rows .* says 256 rows")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "other", "version": 1}', '{"format": "c2al.scores", "version": 1}']
)
def test_a_damaged_marker_is_no_marker(tmp_path: Path, text: str):
    data = impressions()
    folder = Path(write(tmp_path / "s", data, predictions(data, 0)))
    (folder / "_complete.json").write_text(text)
    refused(str(folder), tmp_path, r"_complete\.json")


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int32])
def test_a_row_scored_twice_is_refused_naming_both_places(tmp_path: Path, kind: type):
    data = impressions()
    data["row_id"] = data["row_id"].astype(kind)
    if kind is np.uint64:
        data["row_id"] += np.uint64(2**63)
    data["row_id"][450] = data["row_id"][7]
    folder = write(tmp_path / "s", data, predictions(data, 0), cuts=[400], group=30)
    refused(
        folder,
        tmp_path,
        rf"part-00001\.parquet, row group 1, row 20: row_id {data['row_id'][7]} is there already, "
        r"at .*part-00000\.parquet, row group 0, row 7",
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.5, -1e-9])
@pytest.mark.parametrize("second", [False, True])
def test_a_prediction_that_is_no_probability_is_refused_in_any_run(tmp_path: Path, bad: float, second: bool):
    data = impressions()
    p = predictions(data, 0)
    good = write(tmp_path / "good", data, p)
    p = p.copy()
    p[45] = bad
    other = write(tmp_path / "bad", data, p, cuts=[40])
    runs = [arm("a", [good]), arm("b", [other])] if second else [arm("b", [other])]
    with pytest.raises(DataError, match=r"bad/part-00001\.parquet, row group 0, row 5, row_id 45: prediction must lie"):
        evaluate(runs, None, (), SMALL, 0, tmp_path / "out")


@pytest.mark.parametrize("column", ["row_id", "user_id", "label", "weight", "item"])
def test_a_null_is_refused_by_file_row_group_and_row(tmp_path: Path, column: str):
    data = with_value(impressions(), column, 47, None)
    folder = write(tmp_path / "s", data, predictions(impressions(), 0), cuts=[40], group=5)
    config = EvaluateConfig(replicates=20, items="item")
    refused(folder, tmp_path, rf"part-00001\.parquet, row group 1, row 2: {column} is null", config=config)


@pytest.mark.parametrize(
    ("column", "bad"), [("label", float("nan")), ("weight", float("nan")), ("weight", float("inf"))]
)
def test_a_label_or_weight_that_is_no_number_is_refused(tmp_path: Path, column: str, bad: float):
    data = impressions()
    data[column][3] = bad
    refused(write(tmp_path / "s", data, predictions(impressions(), 0)), tmp_path, f"row 3, row_id 3: {column} must be")


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ("row_id", pa.string(), "column 'row_id' is string; evaluate needs an integer there"),
        ("user_id", pa.float64(), "column 'user_id' is double; evaluate needs an integer or a string there"),
        ("label", pa.string(), "column 'label' is string; evaluate needs a number there"),
        ("prediction", pa.bool_(), "column 'prediction' is bool; evaluate needs a number there"),
    ],
)
def test_a_column_of_another_type_is_refused_with_what_is_needed(tmp_path: Path, column: str, kind: Any, message: str):
    data = impressions()
    folder = Path(write(tmp_path / "s", data, predictions(data, 0)))
    table = pq.read_table(folder / "part-00000.parquet")
    i = table.schema.get_field_index(column)
    pq.write_table(table.set_column(i, column, table.column(column).cast(kind)), folder / "part-00000.parquet")
    refused(str(folder), tmp_path, message)


def test_a_column_there_twice_is_refused(tmp_path: Path):
    data = impressions()
    folder = Path(write(tmp_path / "s", data, predictions(data, 0)))
    table = pq.read_table(folder / "part-00000.parquet")
    pq.write_table(table.append_column("label", table.column("label")), folder / "part-00000.parquet")
    refused(str(folder), tmp_path, r"part-00000\.parquet: column 'label' is there 2 times")


def test_users_that_are_integers_in_one_file_and_strings_in_another_are_refused(tmp_path: Path):
    data = impressions()
    folder = Path(write(tmp_path / "s", data, predictions(data, 0), cuts=[300]))
    table = pq.read_table(folder / "part-00001.parquet")
    i = table.schema.get_field_index("user_id")
    pq.write_table(
        table.set_column(i, "user_id", table.column("user_id").cast(pa.string())), folder / "part-00001.parquet"
    )
    refused(
        str(folder),
        tmp_path,
        r"part-00001\.parquet: column 'user_id' is string, but in .*part-00000\.parquet it is int64",
    )


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_strings_of_any_arrow_type_are_the_same_users_and_segments(tmp_path: Path, kind: pa.DataType):
    data = impressions()
    p = predictions(data, 0)
    plain = {
        **data,
        "user_id": pa.array([f"u{u % 100}" for u in data["user_id"]]),
        "item": pa.array(map(str, data["item"])),
    }
    other = {**plain, **{k: pa.array(plain[k], pa.string()).cast(kind) for k in ("user_id", "tab", "item")}}
    config = EvaluateConfig(replicates=20, items="item")
    results = [
        evaluate([arm("s", [write(tmp_path / name, d, p)])], None, AXIS, config, 0, tmp_path / "out")
        for name, d in (("plain", plain), ("other", other))
    ]
    assert results[0].segments == results[1].segments
    assert [s.name for s in results[0].segments] == ["overall", "a", "b"]


def test_ids_beyond_int64_are_users_items_and_rows_like_others(tmp_path: Path):
    data = impressions()
    p = predictions(data, 0)
    big = {**data, **{k: data[k].astype(np.uint64) + np.uint64(2**63 + 5) for k in ("row_id", "user_id", "item")}}
    config = EvaluateConfig(replicates=20, items="item")
    small, large = (
        evaluate([arm("s", [write(tmp_path / name, d, p)])], None, (), config, 0, tmp_path / "out").overall
        for name, d in (("small", data), ("large", big))
    )
    assert large.arms["s"]["ne"].value == pytest.approx(small.arms["s"]["ne"].value, rel=1e-12)
    assert large.arms["s"]["gauc"].value == pytest.approx(small.arms["s"]["gauc"].value, rel=1e-12)
    assert large.users == pytest.approx(small.users, rel=0.8)
    unsigned = {**data, "user_id": data["user_id"].astype(np.uint64)}
    assert (
        evaluate([arm("s", [write(tmp_path / "u", unsigned, p)])], None, (), config, 0, tmp_path / "out").overall
        == small
    )


def test_text_that_is_not_utf8_is_refused(tmp_path: Path):
    data = impressions()
    data["tab"] = pa.array([b"a", b"\xff\xfe"] * 300).cast(pa.binary()).view(pa.string())
    refused(
        write(tmp_path / "s", data, predictions(data, 0)),
        tmp_path,
        "row group 0: column 'tab' .*UTF-?8",
        AXIS,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(version=1), r"version 1; this c2al reads 'c2al\.evaluation', version 3"),
        (lambda t: t.update(rows="many"), "rows: expected int"),
        (lambda t: t.update(more=1), "more: unknown key"),
        (lambda t: t["segments"][0].pop("users"), r"segments\[0\]\.users: missing"),
        (lambda t: t["segments"][0]["arms"]["s"]["ne"].update(interval=[1]), r"interval: expected 2 values"),
        (lambda t: t["arms"][0].update(seeds=[1, 2]), r"arms\[0\]\.folders: has 1 entries for 2 seeds"),
        (lambda t: t.update(seed=10**30), "seed: .*64 bits"),
    ],
)
def test_an_evaluation_json_that_is_damaged_or_foreign_is_refused(tmp_path: Path, change: Any, message: str):
    data = impressions()
    got = evaluate(
        [arm("s", [write(tmp_path / "s", data, predictions(data, 0))])], None, (), SMALL, 0, tmp_path / "out"
    )
    path = tmp_path / "out" / "evaluation.json"
    assert read_evaluation(path) == got
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message):
        read_evaluation(path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100000, b"null", b'{"a": NaN}'])
def test_an_evaluation_json_that_is_no_json_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "evaluation.json").write_bytes(content)
    with pytest.raises(DataError, match=r"evaluation\.json"):
        read_evaluation(tmp_path / "evaluation.json")
