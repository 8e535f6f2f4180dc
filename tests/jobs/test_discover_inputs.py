"""What `c2al discover` resumes, merges and refuses, and scores that no configuration describes."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.__main__ import main
from c2al.config import load_config
from c2al.data.cohorts import read_cohorts
from c2al.data.identity import identify
from c2al.data.scores_folder import write_marker
from c2al.data.source import open_dataset
from c2al.discovery.axes import Columns
from c2al.discovery.record import ScanRecord
from c2al.discovery.saved import load_accumulators
from c2al.discovery.unfinished import Unfinished
from c2al.files import only_writer

AXES = """
axes = [
    {name = "place", column = "place"},
    {name = "age", column = "age", kind = "edges", edges = [25, 35]},
    {name = "level", column = "level", kind = "percentiles", percentiles = [0, 50, 100]},
    {name = "both", kind = "cross", cross = ["place", "age"]},
]
data.dense = [{column = "age"}]
"""
FLAGS = ["--axis", "place", "--axis", "age:edges=25,35", "--axis", "level:percentiles=0,50,100"]
FLAGS += ["--axis", "both=place*age"]


def impressions(rows=2_000, seed=0, **columns) -> pa.Table:
    rng = np.random.default_rng(seed)
    place = rng.choice(["feed", "search"], rows)
    p = rng.beta(2, np.where(place == "feed", 8, 30)).astype(np.float32)
    own = {
        "user_id": rng.integers(0, rows // 4, rows),
        "label": (rng.random(rows) < p).astype(np.float32),
        "prediction": p,
        "place": place,
        "age": rng.integers(18, 60, rows),
        "level": rng.permutation(rows).astype(np.float64),
    }
    return pa.table({**own, **columns})


def written(path: Path, table: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=500)
    return path


def configured(folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(AXES)
    return path


def discover(*words: object) -> int:
    return main(["discover", *map(str, words)])


def columns_swapped(table: pa.Table) -> pa.Table:
    """Other predictions whose Parquet file has the same size and statistics."""
    p = table["prediction"].to_numpy()[::-1].copy()
    return table.set_column(2, "prediction", pa.array(p))


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("scores") / "part-0.parquet", impressions())


@pytest.fixture(scope="module")
def finished(scores, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    assert discover("--scores", scores, *FLAGS, "--output", output) == 0
    return output


# Scores of anybody


def test_flags_give_the_result_and_figure_of_a_config(scores, finished, tmp_path):
    output = tmp_path / "out"
    assert discover("--scores", scores, "--config", configured(tmp_path), "--output", output) == 0
    for name in ("cohorts.json", "densities.csv", "densities.svg", "table.txt"):
        assert (output / name).read_bytes() == (finished / name).read_bytes(), name


def test_flags_name_columns_and_axes_of_one_column(tmp_path):
    table = impressions().rename_columns(["who", "clicked", "p", "place", "age", "level"])
    scores, output = written(tmp_path / "part-0.parquet", table), tmp_path / "out"
    columns = ["--prediction", "p", "--label", "clicked", "--user", "who"]
    axes = ["--axis", "age:edges=25,35", "--axis", "age:percentiles=0,50,100", "--axis", "age_edges*place"]
    words = ["--scores", scores, *columns, *axes, "--axis", "place", "--output", output]
    assert discover(*words, "--discover.rule", "kl") == 0
    names = [a.name for a in read_cohorts(output / "cohorts.json").axes]
    assert names == ["age_edges", "age_percentiles", "age_edges*place", "place"]
    assert json.loads((output / "cohorts.json").read_text())["rule"]["measure"] == "kl"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--axis: needed with --scores"),
        (["--axis", "age:edges=25,x"], "--axis 'age:edges=25,x': '25,x' is not a list of numbers"),
        (["--axis", "age:edges=35,25"], "--axis 'age:edges=35,25': edges: must ascend"),
        (["--axis", "age:cuts=1"], "--axis 'age:cuts=1': after ':' comes edges="),
        (["--axis", "age:percentiles=5,100"], "--axis 'age:percentiles=5,100': percentiles: must ascend"),
        (["--axis", "place", "--axis", "place*agee"], "--axis 'place*agee': no --axis is named 'agee'"),
        (["--axis", "place", "--axis", "place"], "--axis 'place': two axes are named 'place_categorical'"),
        (["--axis", "=place"], "--axis '=place': names no column"),
        (
            ["--axis", "place", "--discover.axes", '["plac"]'],
            "discover.axes: unknown axis 'plac'; did you mean 'place'?",
        ),
        (["--axis", "place", "--discover.rul", "js"], "discover.rul: unknown key"),
        (["--axis", "place", "--config", "c.toml"], "--axis: does not go with --config"),
        (["--axis", "place", "--user", "nobody"], "column 'nobody' is missing"),
    ],
)
def test_a_wrong_flag_is_named(scores, tmp_path, capsys, words, message):
    assert discover("--scores", scores, *words, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Resuming over something else


def test_replaced_scores_of_the_same_names_and_sizes_are_not_resumed(tmp_path, capsys):
    table, output = impressions(), tmp_path / "out"
    scores = written(tmp_path / "s" / "part-0.parquet", table)
    config = load_config(configured(tmp_path))
    record = ScanRecord(
        axes=config.axes,
        columns=Columns(prediction="prediction", label="label", user="user_id"),
        settings=config.discover,
        earlier_cuts={},
        files=identify(open_dataset([str(scores)])),
    )
    Unfinished(output / "unfinished", record).save_cuts({"age": (25.0, 35.0), "level": (1000.0,)})
    size = scores.stat().st_size
    written(scores, columns_swapped(table))
    assert scores.stat().st_size == size
    words = ["--scores", scores, "--config", tmp_path / "config.toml", "--output", output]
    assert discover(*words) == 2
    assert "part-0.parquet: has the same size and other content" in capsys.readouterr().err
    written(scores, table)  # as it was, with another modification time
    assert discover(*words) == 0


def test_the_same_command_again_says_that_it_is_finished(scores, tmp_path, capsys):
    words = ["--scores", scores, *FLAGS, "--output", tmp_path / "out"]
    assert discover(*words) == 0
    (tmp_path / "out" / "densities.svg").unlink()  # a kill before the figure
    before = (tmp_path / "out" / "accumulators.npz").stat().st_mtime_ns
    capsys.readouterr()
    assert discover(*words, "--discover.threads", "2") == 0
    shown = capsys.readouterr()
    assert "is finished already, from the same files" in shown.err
    assert "axis place" in shown.out
    assert (tmp_path / "out" / "accumulators.npz").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "densities.svg").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*FLAGS, "--discover.rule", "kl"], "discover.rule was 'js', is 'kl'"),
        (FLAGS[:2], "axes were ["),
        ([*FLAGS, "--user", "age"], "columns were"),
    ],
)
def test_the_output_of_another_command_is_refused(scores, finished, capsys, words, message):
    content = (finished / "cohorts.json").read_bytes()
    assert discover("--scores", scores, *words, "--output", finished) == 2
    shown = capsys.readouterr().err
    assert "holds the result of another command" in shown
    assert message in shown
    assert (finished / "cohorts.json").read_bytes() == content


def test_a_finished_output_of_replaced_scores_is_refused(tmp_path, capsys):
    scores = written(tmp_path / "s" / "part-0.parquet", impressions())
    words = ["--scores", scores, *FLAGS, "--output", tmp_path / "out"]
    assert discover(*words) == 0
    written(scores, columns_swapped(impressions()))
    assert discover(*words) == 2
    assert "part-0.parquet: has the same size and other content" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(scores, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert discover("--scores", scores, *FLAGS, "--output", tmp_path) == 2
    assert "holds 'notes.txt', which discover does not write" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_second_writer_is_refused_by_name(scores, tmp_path, capsys):
    with only_writer(tmp_path / "out"):
        assert discover("--scores", scores, *FLAGS, "--output", tmp_path / "out") == 2
    assert f"is being written by process {os.getpid()} on " in capsys.readouterr().err


def test_files_counted_twice_are_not_merged(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for second in (finished, copy):
        assert discover("--merge", finished, second, "--output", tmp_path / "m") == 2
        shown = capsys.readouterr().err
        assert f"{second}: file " in shown
        assert "part-0.parquet' is counted in" in shown
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("flag", ["prediction", "label", "user"])
def test_scans_of_other_columns_are_not_merged(tmp_path, capsys, flag):
    other = {"prediction": "prediction", "label": "label", "user": "user_id"}[flag]
    for i in (0, 1):
        table = impressions(seed=i)
        table = table.append_column("second", table[other])
        words = [f"--{flag}", "second"] if i else []
        axes = ["--axis", "place"]
        scores = written(tmp_path / f"s{i}.parquet", table)
        assert discover("--scores", scores, *axes, *words, "--output", tmp_path / f"d{i}") == 0
    capsys.readouterr()
    assert discover("--merge", tmp_path / "d0", tmp_path / "d1", "--output", tmp_path / "m") == 2
    assert f"{tmp_path / 'd1'}: columns Columns(" in capsys.readouterr().err


# A lost part


def test_a_lost_part_of_scores_is_named(tmp_path, capsys):
    folder = tmp_path / "s"
    for i in (0, 1):
        written(folder / f"part-0000{i}.parquet", impressions(seed=i))
    write_marker(folder, ("part-00000.parquet", "part-00001.parquet"))
    assert discover("--scores", folder, "--axis", "place", "--output", tmp_path / "a") == 0
    (folder / "part-00001.parquet").unlink()
    capsys.readouterr()
    for words in (folder, folder / "*.parquet"):
        assert discover("--scores", words, "--axis", "place", "--output", tmp_path / "b") == 2
        assert "part-00001.parquet: missing" in capsys.readouterr().err
    (folder / "_complete.json").write_text("{}")  # by hand: says nothing about parts
    assert discover("--scores", folder, "--axis", "place", "--output", tmp_path / "b") == 0


# Names as markup

HOSTILE = ["$x$", "$", "_unknown", "=1+1", "<script>", "\x1b[31m", "a\nb", "", "x" * 300, "\\$", "動画"]


@pytest.mark.parametrize("first", HOSTILE)
def test_a_name_is_shown_as_it_is_everywhere(tmp_path, capsys, recwarn, first):
    table = impressions()
    place = np.where(np.array(table["place"].to_pylist()) == "feed", first, "$other_$")
    scores = written(tmp_path / "s.parquet", table.set_column(3, "$_axis_$", pa.array(place)))
    assert discover("--scores", scores, "--axis", "$_axis_$", "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert first in [
        c.equals for a in read_cohorts(tmp_path / "out" / "cohorts.json").axes for s in a.cohorts for c in s.conditions
    ]
    svg = (tmp_path / "out" / "densities.svg").read_text()
    # matplotlib draws one group per legend entry, each a line and a text.
    assert svg.split('id="legend_1"')[1].count('id="text_') == 2
    assert "<script>" not in svg
    assert "\x1b" not in svg
    assert first.isascii() or first in svg, "letters, for which the viewer has the font"
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    cells = (tmp_path / "out" / "densities.csv").read_text()
    assert not any(line.split(",")[1].startswith(("=", "+", "@")) for line in cells.splitlines() if line.count(",") > 5)


# Numbers


@pytest.mark.parametrize(("values", "cut"), [(np.inf, "p50 is inf"), (-np.inf, "p50 is -inf"), (1e300, "p50 is inf")])
def test_an_infinite_percentile_cut_is_refused(tmp_path, capsys, values, cut):
    level = np.arange(2_000.0)
    level[500:] = values
    scores = written(tmp_path / "s.parquet", impressions(level=level))
    words = ["--scores", scores, "--axis", "level:percentiles=0,50,100", "--output", tmp_path / "out"]
    assert discover(*words) == 2
    assert f"axis 'level': the cut at {cut}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_infinite_values_beyond_the_cuts_are_counted_and_read_back(tmp_path):
    level = np.arange(2_000.0)
    level[:100], level[-100:] = -np.inf, np.inf
    table = impressions(level=level)
    scores = written(tmp_path / "s.parquet", table)
    assert discover("--scores", scores, "--axis", "level:percentiles=0,50,100", "--output", tmp_path / "out") == 0
    (axis,) = read_cohorts(tmp_path / "out" / "cohorts.json").axes
    assert np.bincount(axis.codes(table)).tolist() == [1000, 1000]


def test_an_edge_beyond_float32_is_refused(scores, tmp_path, capsys):
    assert discover("--scores", scores, "--axis", "age:edges=25,1e39", "--output", tmp_path / "out") == 2
    assert "axis 'age': an edge is beyond float32" in capsys.readouterr().err


def test_integers_beyond_2_to_53_are_counted_where_they_are_read_back(tmp_path):
    time = [None if i % 7 == 0 else 1_700_000_000_000_000_000 + i * 10**15 for i in range(2_000)]
    user = np.arange(2_000).astype(np.uint64) // 4 + np.uint64(2**63)
    table = impressions(level=pa.array(time), user_id=user)
    scores = written(tmp_path / "s.parquet", table)
    assert discover("--scores", scores, "--axis", "level:percentiles=0,50,100", "--output", tmp_path / "out") == 0
    (axis,) = read_cohorts(tmp_path / "out" / "cohorts.json").axes
    written_rows = [
        c["rows"] for c in json.loads((tmp_path / "out" / "cohorts.json").read_text())["axes"][0]["cohorts"]
    ]
    assert np.bincount(axis.codes(table)).tolist() == written_rows


# Contracts


@pytest.mark.parametrize("column", ["user_id", "label", "prediction"])
@pytest.mark.parametrize("encoded", [False, True])
def test_a_null_is_named_with_its_row(tmp_path, capsys, column, encoded):
    table = impressions()
    values = pa.array([None if i == 777 else v for i, v in enumerate(table[column].to_pylist())])
    if encoded and column == "user_id":
        values = pa.array([None if v is None else str(v) for v in values.to_pylist()]).dictionary_encode()
    scores = written(tmp_path / "s.parquet", table.set_column(table.column_names.index(column), column, values))
    assert discover("--scores", scores, "--axis", "place", "--output", tmp_path / "out") == 2
    assert f"s.parquet, row group 1: row 277: column '{column}' is null" in capsys.readouterr().err


# Damaged state


def repacked(path: Path, change) -> None:
    """The archive with `change` applied to its members: name -> bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def array(values, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(values), **options)
    return out.getvalue()


def huge_header(members):
    """An array that says it has 2^50 entries."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<u8", "fortran_order": False, "shape": (1 << 50,)})
    members["fine0.npy"] = out.getvalue()


def head(old: str, new: str):
    def change(members):
        text = np.load(io.BytesIO(members["head.npy"])).tobytes().decode()
        assert old in text
        members["head.npy"] = array(np.frombuffer(text.replace(old, new).encode(), np.uint8))

    return change


DAMAGE = {
    "no zip": lambda path: path.write_bytes(b"PK\x03\x04 nothing"),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a flipped bit": lambda path: path.write_bytes(
        (b := path.read_bytes())[: len(b) // 2] + bytes([b[len(b) // 2] ^ 255]) + b[len(b) // 2 + 1 :]
    ),
    "a member less": lambda path: repacked(path, lambda m: m.pop("group1.npy")),
    "a pickle": lambda path: repacked(path, lambda m: m.update({"fine0.npy": array([{}], allow_pickle=True)})),
    "floats": lambda path: repacked(path, lambda m: m.update({"fine0.npy": array([0.5])})),
    "negative": lambda path: repacked(path, lambda m: m.update({"fine0.npy": array([-1])})),
    "beyond": lambda path: repacked(
        path,
        lambda m: m.update({"fine0.npy": array(np.array([1], "u1")), "fine0_at.npy": array(np.array([1 << 60], "u8"))}),
    ),
    "huge": lambda path: repacked(path, huge_header),
    "other version": lambda path: repacked(path, head('"version": 2', '"version": 99')),
    "other type": lambda path: repacked(path, head('"jackknife": true', '"jackknife": "yes"')),
    "other cuts": lambda path: repacked(path, head('"level": [', '"level": [-1.0, ')),
    "other rows": lambda path: repacked(
        path, lambda m: m.update({"fine0.npy": array(np.load(io.BytesIO(m["fine0.npy"])) + np.uint8(1))})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_accumulators_are_refused_by_name(finished, tmp_path, capsys, damage):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    DAMAGE[damage](copy / "accumulators.npz")
    assert discover("--merge", copy, "--output", tmp_path / "m") == 2
    assert f"{copy}/accumulators.npz: " in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "c2al.unfinished_scan", "version": 1}', "\xff", "[" * 100_000, '{"version": NaN}'],
)
def test_damaged_cuts_are_refused_by_name(scores, tmp_path, capsys, text):
    unfinished = tmp_path / "out" / "unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "cuts.json").write_bytes(text.encode("latin-1"))
    assert discover("--scores", scores, *FLAGS, "--output", tmp_path / "out") == 2
    assert "cuts.json: " in capsys.readouterr().err


def test_a_merge_decides_by_the_settings_of_its_first_folder(finished, tmp_path):
    assert discover("--merge", finished, "--output", tmp_path / "m") == 0
    assert (tmp_path / "m" / "cohorts.json").read_bytes() == (finished / "cohorts.json").read_bytes()
    assert load_accumulators(tmp_path / "m" / "accumulators.npz")[0].files


def test_a_divergence_that_is_not_above_zero_is_shown_as_about_0(tmp_path, capsys):
    table = impressions(place=np.arange(2_000) % 2)
    scores = written(tmp_path / "s.parquet", table)
    assert discover("--scores", scores, "--axis", "place", "--output", tmp_path / "out") == 0
    (pair,) = json.loads((tmp_path / "out" / "cohorts.json").read_text())["axes"][0]["pairs"]
    shown = capsys.readouterr().out
    assert pair["js"]["value"] <= 0, "the seed must give an estimate below zero"
    assert "js about 0 [" in shown


def test_string_view_counts_as_string_does(finished, tmp_path):
    table = impressions()
    views = table.set_column(3, "place", pa.array(table["place"].to_pylist(), pa.string_view()))
    scores = written(tmp_path / "s.parquet", views)
    assert pq.read_schema(scores).field("place").type == pa.string_view()
    assert discover("--scores", scores, *FLAGS, "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "cohorts.json").read_bytes() == (finished / "cohorts.json").read_bytes()
