"""Predictions of raw rows: those of `score`, in a process with torch, pyarrow and numpy only, or a named error."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.__main__ import main
from c2al.data import hashing
from c2al.errors import ConfigError, DataError
from c2al.serving.predict import Predictor, predict

ROOT = Path(__file__).parents[2]


def scores(served: Path) -> np.ndarray:
    return np.asarray(pq.read_table(served / "scores")["prediction"])


def write(folder: Path, table: pa.Table) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "a.parquet", row_group_size=300)
    return folder


def run_predict(served: Path, data: Path, output: Path, *words: str, artifact: Path | None = None) -> int:
    where = str(artifact or served / "artifact")
    return main(["predict", "--artifact", where, "--data", str(data), "--output", str(output), *words])


def test_predictions_are_those_of_score_bit_for_bit(served, predictor, raw, tmp_path):
    data = write(tmp_path / "data", raw.drop_columns(["label"]))  # other row groups, no label
    assert run_predict(served, data, tmp_path / "out") == 0
    table = pq.read_table(tmp_path / "out")
    assert table.schema.names == ["row_id", "prediction"]
    assert table["row_id"].equals(raw["row_id"])
    assert np.array_equal(table["prediction"], scores(served))
    assert np.array_equal(predictor.predict(raw), scores(served))


def test_columns_are_carried_as_asked(served, raw, tmp_path):
    data = write(tmp_path / "data", raw.slice(0, 700))
    assert run_predict(served, data, tmp_path / "a", "--carry", "surface", "tags", "--batch-size", "100") == 0
    table = pq.read_table(tmp_path / "a")
    assert table.schema.names == ["surface", "tags", "prediction"]
    assert table["surface"].to_pylist() == raw["surface"].slice(0, 700).to_pylist()
    # Steps of another size round otherwise.
    np.testing.assert_allclose(table["prediction"], scores(served)[:700], rtol=0, atol=1e-6)
    assert run_predict(served, data, tmp_path / "b", "--carry") == 0
    assert pq.read_table(tmp_path / "b").schema.names == ["prediction"]


def bare_site(folder: Path) -> Path:
    """A site folder with torch, pyarrow, numpy, what these require, and nothing else."""
    folder.mkdir()
    wanted, seen = ["torch", "pyarrow", "numpy"], set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted += [re.split(r"[^A-Za-z0-9_.-]", r)[0] for r in distribution.requires or () if "extra ==" not in r]
        for top in {f.parts[0] for f in distribution.files or () if f.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder


HEAVY = ("torchrec", "fbgemm_gpu", "numba", "pandas", "scipy", "torchmetrics", "tensorboard", "matplotlib", "tqdm")

BARE = f"""
import sys, warnings
from c2al.__main__ import main
status = main(sys.argv[1:])
heavy = [m for m in {HEAVY!r} if m in sys.modules]
for name in {HEAVY!r}:
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{{name}} is installed; this is no bare process")
sys.exit(status if not heavy else f"imported {{heavy}}")
"""


def test_a_process_with_torch_pyarrow_and_numpy_only_predicts_the_same_bits(served, tmp_path):
    site = bare_site(tmp_path / "site")
    words = ["--artifact", served / "artifact", "--data", served / "data" / "test", "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-S", "-c", BARE, "predict", *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array_equal(pq.read_table(tmp_path / "out")["prediction"], scores(served))


def test_predicting_imports_nothing_heavy_where_it_is_installed():
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
import c2al.jobs.predict, c2al.jobs.serve_check
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_the_hash_has_the_same_bits_without_numba(tmp_path):
    rng = np.random.default_rng(0)
    text = ["", "a", "é" * 7, "x" * 300, *("".join(map(chr, rng.integers(32, 500, n))) for n in range(60))]
    arrays = [
        pa.array(text),
        pa.array(text).slice(3, 20),
        pa.array(text).slice(0, 0),
        pa.array(text, pa.large_string()),
        pa.array(text).dictionary_encode(),
        pa.array(rng.integers(-(2**63), 2**63 - 1, 100)),
        pa.array([2**64 - 1, 0, 5], pa.uint64()),
        pa.array([True, False]),
    ]
    compiled = [hashing.hash64(a).tolist() for a in arrays]
    compiled += [hashing.hashed_rows(a, 1_000_003).tolist() for a in arrays[-3:]]
    code = f"""
import sys, json
sys.modules["numba"] = None
import pyarrow as pa
from c2al.data import hashing
assert hashing.numba is None
read = [pa.ipc.open_stream({str(tmp_path)!r} + f"/{{i}}").read_all()["a"].chunk(0) for i in range({len(arrays)})]
rows = [hashing.hashed_rows(a, 1_000_003).tolist() for a in read[-3:]]
print(json.dumps([hashing.hash64(a).tolist() for a in read] + rows))
"""
    for i, array in enumerate(arrays):
        batch = pa.RecordBatch.from_arrays([array], ["a"])
        with pa.ipc.new_stream(tmp_path / str(i), batch.schema) as stream:
            stream.write_batch(batch)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == compiled


def changed(table: pa.Table, column: str, values: object) -> pa.Table:
    at = table.schema.get_field_index(column)
    return table.set_column(at, column, values if isinstance(values, pa.Array) else pa.array(values))


def with_4th(table: pa.Table, column: str, value: object) -> pa.Table:
    values = table[column].to_pylist()
    values[4] = value
    return changed(table, column, pa.array(values, table.schema.field(column).type))


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 16, [None, pa.py_buffer(np.arange(17, dtype=np.int32).tobytes()), pa.py_buffer(b"\xff" * 16)]
)

BAD_ROWS = {
    "a feature column is missing": (lambda t: t.drop_columns(["surface"]), "no column 'surface'"),
    "a dense value is NaN": (lambda t: with_4th(t, "age", float("nan")), "row 4: column 'age' is nan"),
    "a dense value is null": (lambda t: with_4th(t, "age", None), "row 4: column 'age' is null"),
    "a dense value is infinite": (lambda t: with_4th(t, "age", float("inf")), "row 4: column 'age' is inf"),
    "a dense column holds strings": (
        lambda t: changed(t, "age", ["x"] * 16),
        "column 'age' has type string, needed is a number",
    ),
    "ids are strings, in training integers": (
        lambda t: changed(t, "user_id", ["7"] * 16),
        "column 'user_id' has type string, but its values in training were of type integer",
    ),
    "ids are integers, in training strings": (
        lambda t: changed(t, "surface", [1] * 16),
        "column 'surface' has type int64, but its values in training were of type text",
    ),
    "a list where one value is expected": (
        lambda t: changed(t, "item_id", [[1, 2]] * 16),
        "column 'item_id' has type list",
    ),
    "an id of encoding identity is out of range": (
        lambda t: with_4th(t, "item_id", 64),
        "row 4: column 'item_id' is 64, outside [0, 64)",
    ),
    "an id of encoding identity is negative": (
        lambda t: with_4th(t, "item_id", -1),
        "row 4: column 'item_id' is -1, outside [0, 64)",
    ),
    "text is not UTF-8": (lambda t: changed(t, "surface", NOT_UTF8), "column 'surface' cannot be decoded"),
    "a column is there twice": (
        lambda t: t.append_column("surface", t["surface"]),
        "column 'surface' is there 2 times",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_by_file_column_and_value(served, predictor, raw, tmp_path, capsys, case):
    change, message = BAD_ROWS[case]
    bad = change(raw.slice(0, 16))
    with pytest.raises(DataError, match=re.escape(message)):
        predictor.predict(bad)
    data = write(tmp_path / "data", bad)
    assert run_predict(served, data, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "a.parquet" in error
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "table: expected a pyarrow Table, got NoneType"),
        ({"age": [31.0]}, "table: expected a pyarrow Table, got dict; pa.table"),
        ("rows.parquet", "table: expected a pyarrow Table, got str; c2al.serving.predict.predict"),
        (Path("rows.parquet"), "table: expected a pyarrow Table, got PosixPath; c2al.serving.predict.predict"),
        ([{"age": 31.0}], "table: expected a pyarrow Table, got list; pa.Table.from_pylist"),
        (np.zeros((2, 3)), "table: expected a pyarrow Table, got ndarray"),
        (7, "table: expected a pyarrow Table, got int"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_what_is_no_table_is_refused_in_a_word(predictor, rows, said):
    for method in (predictor.predict, predictor.encode):
        with pytest.raises(DataError) as caught:
            method(rows)
        assert str(caught.value).startswith(said)


@pytest.mark.parametrize("folder", [None, {}, 7])
def test_an_artifact_that_is_no_path_is_refused_in_a_word(folder):
    with pytest.raises(ConfigError, match=f"expected the path of an artifact, got {type(folder).__name__}$"):
        Predictor(folder)


@pytest.mark.parametrize("data", [None, "rows.parquet", Path("rows.parquet"), 7, [None], [Path("rows.parquet")]])
def test_data_that_is_no_list_of_paths_is_refused_in_a_word(predictor, tmp_path, data):
    with pytest.raises(DataError, match=r"^data set: expected .*(None|rows\.parquet|7)"):
        predict(predictor, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_batch_of_records_is_a_table(predictor, raw):
    few = raw.slice(0, 5)
    assert np.array_equal(predictor.predict(few.to_batches()[0]), predictor.predict(few))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_version(path: Path) -> None:
    """A schema of another version, with the right checksum."""
    import hashlib

    schema = path.with_name("schema.json")
    schema.write_text(schema.read_text().replace('"version": 1', '"version": 2', 1))
    metadata = json.loads(path.read_text())
    content = schema.read_bytes()
    metadata["files"]["schema.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(metadata))


BAD_ARTIFACTS = {
    "a program is corrupted": (lambda a: flipped(a / "model.pt2"), "model.pt2: damaged"),
    "the schema is corrupted": (lambda a: flipped(a / "schema.json"), "schema.json: damaged"),
    "a program is cut short": (lambda a: (a / "model.pt2").write_bytes(b"PK"), "model.pt2: damaged: it has 2 bytes"),
    "the schema has another version": (
        lambda a: other_version(a / "metadata.json"),
        "schema.json: format 'c2al.serving.schema', version 2; this c2al reads",
    ),
    "there is no artifact": (lambda a: shutil.rmtree(a), "metadata.json: no such file"),
}


@pytest.mark.parametrize("case", BAD_ARTIFACTS)
def test_bad_artifacts_are_refused_by_file(served, tmp_path, capsys, case):
    damage, message = BAD_ARTIFACTS[case]
    artifact = shutil.copytree(served / "artifact", tmp_path / "artifact")
    damage(artifact)
    assert run_predict(served, served / "data" / "test", tmp_path / "out", artifact=artifact) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "aoti"], "has no variant 'aoti', only float, int8"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, is 0"),
        (["--batch-size", "-5"], "--batch-size: must be at least 1, is -5"),
        (["--carry", "nothing"], "no column 'nothing'"),
        (["--model.layers", "3"], "predict takes no configuration"),
    ],
)
def test_options_of_predict_that_cannot_be_followed_are_refused(served, tmp_path, capsys, words, message):
    assert run_predict(served, served / "data" / "test", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unseen_id_of_a_vocabulary_is_row_0(predictor, raw):
    unseen = predictor.encode(with_4th(raw.slice(0, 16), "surface", "billboard"))
    at = [f.key for f in predictor.schema.sparse].index("surface")
    assert unseen.sparse[at].values_V[4] == 0
    assert np.isfinite(predictor.predict(with_4th(raw.slice(0, 16), "surface", "billboard"))).all()


def test_a_list_beyond_max_length_is_cut_from_the_front(predictor, raw):
    long, cut = ([list(range(n))] * 16 for n in (9, 4))
    few = raw.slice(0, 16)
    same = [predictor.predict(changed(few, "tags", v)) for v in (long, cut)]
    assert np.array_equal(*same)


def test_a_column_that_is_missing_takes_the_default_that_the_schema_names(predictor, raw):
    few = raw.slice(0, 16)
    whole = changed(changed(few, "age", [31.5] * 16), "tags", pa.array([[1, 2]] * 16))
    assert predictor.schema.defaults == {"age": 31.5, "tags": [1, 2]}
    assert np.array_equal(predictor.predict(few.drop_columns(["age", "tags"])), predictor.predict(whole))


def test_layouts_of_arrow_give_the_same_predictions(predictor, raw):
    expected = predictor.predict(raw)
    layouts = raw
    for column, kind in {
        "surface": pa.dictionary(pa.int32(), pa.string()),
        "user_id": pa.int32(),
        "tags": pa.large_list(pa.int32()),
    }.items():
        layouts = changed(layouts, column, layouts[column].combine_chunks().cast(kind))
    assert np.array_equal(predictor.predict(layouts), expected)
    chunked = pa.concat_tables([raw.slice(0, 700), raw.slice(700)])
    assert np.array_equal(predictor.predict(chunked), expected)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"carry": ["user_id", "user_id"]}, "--carry user_id: is named 2 times"),
        ({"batch_size": 10**20}, f"--batch-size: must be at most {2**20}, is {10**20}"),
    ],
)
def test_options_that_no_batch_can_follow_are_refused(served, tmp_path, option, message):
    with pytest.raises(ConfigError, match=message):
        predict(Predictor(served / "artifact"), [str(served / "data" / "test")], tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()
