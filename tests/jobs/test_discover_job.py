"""`c2al discover` against DuckDB, and its bytes against every way to run it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.__main__ import main
from c2al.config import DistConfig, load_config
from c2al.data.cohorts import read_cohorts
from c2al.data.identity import identify
from c2al.data.source import open_dataset
from c2al.discovery.axes import Columns
from c2al.discovery.discover import discover
from c2al.discovery.record import ScanRecord
from c2al.discovery.saved import load_accumulators
from c2al.discovery.unfinished import Unfinished
from c2al.distributed.process import process_group
from ranks import run_ranks

CONFIG = """
data.user_id = "user"
data.dense = [{column = "activity"}]
axes = [
    {name = "tab", column = "tab"},
    {name = "surface", column = "surface"},
    {name = "activity", column = "activity", kind = "percentiles", percentiles = [0, 25, 50, 100]},
    {name = "price", column = "price", kind = "edges", edges = [0.1, 2]},
    {name = "tab_surface", kind = "cross", cross = ["surface", "tab"]},
    {name = "paid", column = "paid"},
]
"""


def impressions(rows=30_000, seed=0):
    """Nulls, NaN, exact 0 and 1, and a surface whose predictions differ."""
    rng = np.random.default_rng(seed)
    surface = rng.choice(["feed", "reels", "search"], rows, p=[0.6, 0.3, 0.1])
    user = rng.integers(0, rows // 10, rows)
    prediction = rng.beta(2, np.where(surface == "search", 48, 98)).astype(np.float32)
    prediction[:4] = [0.0, -0.0, 1.0, 1e-9]
    price = rng.lognormal(size=rows).astype(np.float32)
    price[::50] = np.nan
    null = rng.random(rows) < 0.05
    return pa.table(
        {
            "user": [f"u{u}" for u in user],
            "label": (rng.random(rows) < prediction).astype(np.float32),
            "prediction": prediction,
            "tab": pa.array(rng.integers(-2, 6, rows), pa.int16(), mask=null),
            "surface": pa.array(surface, mask=rng.random(rows) < 0.02),
            "activity": rng.permutation(rows),
            "price": price,
            "paid": pa.array(rng.random(rows) < 0.5, mask=null),
        }
    )


def write(folder: Path, table: pa.Table, files=3, row_group=2_000, **options) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    cuts = np.linspace(0, table.num_rows, files + 1).astype(int)
    paths = [folder / f"part-{i}.parquet" for i in range(files)]
    for path, start, end in zip(paths, cuts[:-1], cuts[1:], strict=True):
        pq.write_table(table[start:end], path, row_group_size=row_group, **options)
    return [str(p) for p in paths]


def config_file(folder: Path, text=CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(text)
    return path


def run(folder: Path, scores: list[str], *words: str, text=CONFIG) -> tuple[int, Path]:
    output = folder / "out"
    command = ["discover", "--config", str(config_file(folder, text)), "--scores", *scores, "--output", str(output)]
    return main([*command, *words]), output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impressions")
    return write(folder, impressions())


@pytest.fixture(scope="module")
def result(data, tmp_path_factory):
    code, output = run(tmp_path_factory.mktemp("run"), data)
    assert code == 0
    return output


def test_every_cohort_is_what_duckdb_counts(data, result):
    document = json.loads((result / "cohorts.json").read_text())
    assert document["rows"] == 30_000
    database = duckdb.connect()
    # Into memory: over Parquet, DuckDB skips row groups by statistics that know no NaN.
    database.execute("CREATE TABLE impressions AS FROM read_parquet($1)", [data])
    checked = 0
    for axis in document["axes"]:
        assert sum(c["rows"] for c in axis["cohorts"]) == 30_000, axis["name"]  # disjoint, and nothing is dropped
        for cohort in axis["cohorts"]:
            query = "SELECT count(*), sum(label), avg(prediction::DOUBLE) FROM impressions WHERE "
            query += " AND ".join(sql(c) for c in cohort["conditions"])
            rows, positives, mean = database.execute(query).fetchall()[0]
            assert (cohort["rows"], cohort["positives"]) == (rows, positives), cohort
            assert cohort["mean_prediction"] == pytest.approx(mean, rel=1e-7)
            if positives:
                assert cohort["calibration"] == pytest.approx(mean * rows / positives, rel=1e-7)
            checked += 1
    assert checked > 40


def sql(condition) -> str:
    column = condition["column"]
    if condition.get("null"):
        nan = f" OR isnan({column})" if column == "price" else ""
        return f"({column} IS NULL{nan})"
    if "equals" in condition:
        value = condition["equals"]
        return f"{column} = '{value}'" if isinstance(value, str) else f"{column} = {value}"
    value = f"{column}::FLOAT"
    bounds = [] if condition["lower"] is None else [f"{value} >= {condition['lower']}::FLOAT"]
    bounds += [] if condition["upper"] is None else [f"{value} < {condition['upper']}::FLOAT"]
    return f"({' AND '.join(bounds)} AND NOT isnan({value}))"


def test_normalized_entropy_is_that_of_the_rows(data, result):
    document = json.loads((result / "cohorts.json").read_text())
    surface = next(a for a in document["axes"] if a["name"] == "surface")
    table = pa.concat_tables([pq.read_table(p) for p in data])
    for cohort in surface["cohorts"][:3]:
        kept = np.array([v == cohort["name"] for v in table["surface"].to_pylist()])
        p = np.clip(table["prediction"].to_numpy()[kept].astype(float), 2**-25, 1 - 2**-25)
        y = table["label"].to_numpy()[kept]
        rate = y.mean()
        entropy = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
        assert cohort["ne"] == pytest.approx(entropy / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)), rel=2e-5)


def test_codes_and_membership_agree_with_the_counts(data, result):
    cohorts = read_cohorts(result / "cohorts.json")
    document = json.loads((result / "cohorts.json").read_text())
    table = pa.concat_tables([pq.read_table(p) for p in data])
    for axis, written in zip(cohorts.axes, document["axes"], strict=True):
        codes = axis.codes(table)
        expected = [c["rows"] for c in written["cohorts"]]
        assert np.bincount(codes, minlength=len(expected)).tolist() == expected, axis.name
    head, tail = cohorts.chosen()
    assert head.axis in ("surface", "tab_surface")
    assert head.membership(table).sum() > tail.membership(table).sum()
    assert any(c.equals == "search" for c in (*head.conditions, *tail.conditions))


def test_beside_cohorts_stand_table_figure_and_config(result):
    assert load_config(result / "config.toml").axes[4].cross == ("surface", "tab")
    assert "axis surface" in (result / "table.txt").read_text()
    assert "<svg" in (result / "densities.svg").read_text()
    lines = (result / "densities.csv").read_text().splitlines()
    feed = [line.split(",") for line in lines if line.startswith("surface,feed,")]
    assert sum(int(line[4]) for line in feed) == pytest.approx(30_000 * 0.6 * 0.98, rel=0.05)
    assert not (result / "unfinished").exists()


def shuffled(folder: Path) -> list[str]:
    """The same rows in other files, row groups, orders, codec and encodings."""
    table = impressions()
    table = table.take(np.random.default_rng(5).permutation(table.num_rows))
    first = table[:9_000].set_column(4, "surface", table[:9_000]["surface"].dictionary_encode())
    a = write(folder / "b", first, files=1, row_group=7_001, compression="zstd")
    return write(folder / "a", table[9_000:], files=4, row_group=999, compression="snappy") + a


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_files_order_codec_or_threads(result, tmp_path, threads):
    code, output = run(tmp_path, shuffled(tmp_path)[::-1], "--discover.threads", str(threads))
    assert code == 0
    assert (output / "cohorts.json").read_bytes() == (result / "cohorts.json").read_bytes()


def discover_on_rank(config_path: str, scores: list[str], output: str) -> str:
    config = load_config(config_path)
    with process_group(DistConfig(device="cpu")) as world:
        return discover(scores, config.axes, config.discover, Path(output), world, config.data).reason


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_do_not_depend_on_ranks(data, result, tmp_path, ranks):
    reasons = run_ranks(discover_on_rank, ranks, str(config_file(tmp_path)), data, str(tmp_path / "out"))
    assert set(reasons) == {read_cohorts(result / "cohorts.json").reason}
    assert (tmp_path / "out" / "cohorts.json").read_bytes() == (result / "cohorts.json").read_bytes()


def discover_raises(config_path: str, scores: list[str], output: str) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever it is, it is compared)
        discover_on_rank(config_path, scores, output)
    return str(caught.value)


def test_an_error_on_one_rank_ends_all(tmp_path):
    table = impressions(8_000)
    scores = write(tmp_path / "data", table, files=2, row_group=4_000)
    broken = table[4_000:].set_column(2, "prediction", pa.array(np.full(4_000, 1.5, np.float32)))
    pq.write_table(broken, scores[1])
    messages = run_ranks(discover_raises, 2, str(config_file(tmp_path)), scores, str(tmp_path / "out"))
    assert all("part-1.parquet, row group 0: row 0: column 'prediction' holds 1.5" in m for m in messages)
    assert not (tmp_path / "out" / "cohorts.json").exists()


@pytest.mark.parametrize("ranks_after", [1, 2])
def test_a_killed_scan_goes_on_with_the_same_bytes(result, tmp_path, ranks_after):
    scores = write(tmp_path / "data", impressions(), row_group=500)  # 60 row groups, a checkpoint each
    config, output = config_file(tmp_path, CONFIG + "discover.checkpoint_seconds = 0\n"), tmp_path / "out"
    words = ["discover", "--config", str(config), "--scores", *scores, "--output", str(output)]
    process = subprocess.Popen([sys.executable, "-m", "c2al", *words], stderr=subprocess.PIPE, start_new_session=True)
    checkpoint, deadline = output / "unfinished" / "000000-00000.npz", time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "cohorts.json").exists()
    finished = len(load_accumulators(checkpoint)[1])
    assert 0 < finished < 60, "killed too early or too late to show anything"

    if ranks_after > 1:
        run_ranks(discover_on_rank, ranks_after, str(config), scores, str(output))
    else:
        again = subprocess.run([sys.executable, "-m", "c2al", *words], capture_output=True, text=True, check=True)
        counted = int(again.stderr.split("count: ")[1].split(" rows")[0].replace(",", ""))
        assert counted == 30_000 - 500 * finished
        assert "cuts, pass" not in again.stderr
    assert (output / "cohorts.json").read_bytes() == (result / "cohorts.json").read_bytes()
    assert not (output / "unfinished").exists()


def test_a_checkpoint_of_another_scan_is_refused(data, tmp_path, capsys):
    other = write(tmp_path / "other", impressions(3_000))
    files = open_dataset(other)
    config = load_config(config_file(tmp_path))
    record = ScanRecord(
        axes=config.axes,
        columns=Columns(prediction="prediction", label="label", user="user"),
        settings=config.discover,
        earlier_cuts={},
        files=identify(files),
    )
    Unfinished(tmp_path / "out" / "unfinished", record).save_cuts({"activity": (1.0, 2.0), "price": (0.1, 2.0)})
    assert run(tmp_path, data)[0] == 2
    message = capsys.readouterr().err
    assert "cuts.json: belongs to another scan" in message
    assert "part-0.parquet: is not there any more" in message


def test_days_are_merged_without_a_scan(result, tmp_path):
    """Two days with the first's cuts; percentiles of one day do not hold for both, so cuts are given."""
    table = impressions()
    everything = write(tmp_path / "all", table)
    days = [write(tmp_path / f"day{i}", table[i * 15_000 : (i + 1) * 15_000]) for i in (0, 1)]
    outputs = []
    for i, scores in enumerate([days[0], days[1], everything]):
        cuts = ["--cuts", str(outputs[0])] if i else []
        code, output = run(tmp_path / f"run{i}", scores, *cuts)
        assert code == 0
        outputs.append(output)
    for order in (outputs[:2], outputs[1::-1]):
        merged = tmp_path / f"merged-{order[0].parent.name}"
        assert main(["discover", "--merge", *map(str, order), "--output", str(merged)]) == 0
        assert (merged / "cohorts.json").read_bytes() == (outputs[2] / "cohorts.json").read_bytes()
    # A merge may decide by another rule; the counts are the same.
    by_wasserstein = tmp_path / "w"
    words = ["discover", "--merge", *map(str, outputs[:2]), "--output", str(by_wasserstein)]
    assert main([*words, "--discover.rule", "wasserstein"]) == 0
    assert json.loads((by_wasserstein / "cohorts.json").read_text())["rule"]["measure"] == "wasserstein"


def test_other_cuts_cannot_be_merged(result, tmp_path, capsys):
    code, other = run(tmp_path, write(tmp_path / "day", impressions(9_000, seed=1)))
    assert code == 0
    assert main(["discover", "--merge", str(result), str(other), "--output", str(tmp_path / "m")]) == 2
    message = capsys.readouterr().err
    assert f"{other}: cuts" in message
    assert "--cuts" in message
    assert main(["discover", "--merge", str(result), str(tmp_path), "--output", str(tmp_path / "m")]) == 2
    assert "accumulators.npz: not the accumulators" in capsys.readouterr().err


def without_last_array(path: Path) -> None:
    """Still a zip, still with a head."""
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()[:-1]}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


DAMAGES = {
    "half of the counts": ("accumulators.npz", lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])),
    "one bit of the counts": ("accumulators.npz", flipped),
    "an array of the counts": ("accumulators.npz", without_last_array),
    "no counts": ("accumulators.npz", Path.unlink),
    "no densities": ("densities.csv", Path.unlink),
    "no table": ("table.txt", Path.unlink),
    "half of the record": ("scan.json", lambda p: p.write_text(p.read_text()[:100])),
    "half of the cohorts": ("cohorts.json", lambda p: p.write_text(p.read_text()[:100])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_result_that_was_damaged_is_not_called_finished(data, result, tmp_path, capsys, damage):
    name, spoil = DAMAGES[damage]
    shutil.copytree(result, tmp_path / "out")
    assert run(tmp_path, data)[0] == 0
    assert "is finished already" in capsys.readouterr().err
    spoil(tmp_path / "out" / name)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("[!.]*")}
    assert run(tmp_path, data)[0] == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out' / name}: " in said
    assert "is finished already" not in said
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("[!.]*")} == before


def test_the_counts_of_another_scan_are_not_this_results(data, result, tmp_path, capsys):
    shutil.copytree(result, tmp_path / "out")
    _, other = run(tmp_path / "other", write(tmp_path / "day", impressions(3_000, seed=1)))
    shutil.copy(other / "accumulators.npz", tmp_path / "out")
    assert run(tmp_path, data)[0] == 2
    assert "accumulators.npz: not of the scan that scan.json tells of; delete the folder" in capsys.readouterr().err


def test_a_local_s3_server_serves_the_same_bytes(data, result, tmp_path, monkeypatch):
    server_module = pytest.importorskip("moto.server", reason="moto's server is not installed")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = server_module.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="scores")
        for path in data:
            client.upload_file(path, "scores", f"day/{Path(path).name}")
        uri = f"s3://scores/day?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        code, output = run(tmp_path, [uri])
    finally:
        server.stop()
    assert code == 0
    assert (output / "cohorts.json").read_bytes() == (result / "cohorts.json").read_bytes()


def changed(column: str, values) -> pa.Table:
    table = impressions(3_000)
    values = values(table[column]) if callable(values) else values
    return table.set_column(table.column_names.index(column), column, values)


def with_value(value, row=2_345):
    def change(column):
        array = column.to_numpy().copy()
        array[row] = value
        return pa.array(array)

    return change


def with_null(column):
    return pa.array([None if i == 2_345 else v for i, v in enumerate(column.to_pylist())], column.type)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (changed("prediction", with_value(np.nan)), "row group 1: row 345: column 'prediction' holds nan"),
        (changed("prediction", with_value(-1e-9)), "row group 1: row 345: column 'prediction' holds -"),
        (changed("prediction", with_value(1.0001)), "row group 1: row 345: column 'prediction' holds 1.0001"),
        (changed("prediction", with_null), "row group 1: row 345: column 'prediction' is null"),
        (changed("label", with_value(2)), "row group 1: row 345: column 'label' holds 2.0, needs 0 or 1"),
        (changed("label", with_null), "row 345: column 'label' is null"),
        (changed("activity", with_value(0)).drop_columns("price"), "column 'price' is missing"),
        (changed("activity", pa.array(["x"] * 3_000)), "axis 'activity': column 'activity' is string"),
        (changed("tab", pa.array(np.zeros(3_000))), "axis 'tab': column 'tab' is double"),
        (changed("activity", pa.array(np.r_[np.zeros(900), np.arange(2_100)])), "p0-p25 with 0.0% of the values"),
        (changed("activity", pa.nulls(3_000, pa.int64())), "axis 'activity': every value is null"),
        (changed("tab", pa.array(range(3_000))), "axis 'tab' has more than 500 cohorts"),
        (changed("user", pa.array(np.zeros(3_000))), "column 'user' (the user) is double"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, table, words):
    scores = write(tmp_path / "data", table, files=1)
    code, output = run(tmp_path, scores, "--discover.max_cohorts", "500")
    message = capsys.readouterr().err
    assert code == 2
    assert words in message
    assert not output.exists()


def test_weights_are_said_to_be_unused(data, result, tmp_path, capsys):
    code, output = run(tmp_path, data, text='data.weight = "w"\n' + CONFIG)
    assert code == 0
    assert "data.weight = 'w' is not used" in capsys.readouterr().err
    assert (output / "cohorts.json").read_bytes() == (result / "cohorts.json").read_bytes()


def test_a_truncated_file_is_named(data, tmp_path, capsys):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(Path(data[0]).read_bytes()[:-1000])
    assert run(tmp_path, [data[1], str(broken)])[0] == 2
    assert "broken.parquet: not a whole Parquet file" in capsys.readouterr().err


def test_a_column_of_another_kind_in_a_second_file_is_named(data, tmp_path, capsys):
    table = impressions(2_000)
    other = write(tmp_path / "data", table.set_column(3, "tab", pa.array(["x"] * 2_000)), files=1)
    assert run(tmp_path, [*data, *other])[0] == 2
    assert "column 'tab' holds text, but integers in" in capsys.readouterr().err


def test_one_cohort_is_a_result_without_a_choice(tmp_path):
    text = 'data.user_id = "user"\ndata.dense = [{column = "a"}]\naxes = [{name = "one", column = "one"}]\n'
    table = impressions(1_000).append_column("one", pa.array([7] * 1_000))
    code, output = run(tmp_path, write(tmp_path / "data", table, files=1), text=text)
    assert code == 0
    document = json.loads((output / "cohorts.json").read_text())
    assert document["chosen"] == {"head": None, "tail": None, "reason": "no axis has two cohorts"}
    assert document["axes"][0]["pairs"] == []


def test_a_cohort_without_positives_has_no_ne(tmp_path):
    text = 'data.user_id = "user"\ndata.dense = [{column = "a"}]\naxes = [{name = "label_is", column = "label_is"}]\n'
    table = impressions(1_000)
    table = table.append_column("label_is", pa.array(table["label"].to_numpy().astype(int)))
    code, output = run(tmp_path, write(tmp_path / "data", table, files=1), text=text)
    assert code == 0
    without, only = json.loads((output / "cohorts.json").read_text())["axes"][0]["cohorts"]
    assert (without["calibration"], without["ne"], without["undefined"]) == (None, None, "no positives")
    assert (only["ne"], only["undefined"]) == (None, "no negatives")
    assert only["calibration"] == pytest.approx(only["mean_prediction"])
    assert "undefined" in (output / "table.txt").read_text()


@pytest.mark.slow
def test_the_launcher_runs_it_on_two_processes(data, result, tmp_path):
    words = ["--standalone", "--nproc-per-node", "2", "-m", "c2al", "discover", "--config", str(config_file(tmp_path))]
    words += ["--scores", *data, "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], check=True, env=environment, timeout=300)
    assert (tmp_path / "out" / "cohorts.json").read_bytes() == (result / "cohorts.json").read_bytes()
