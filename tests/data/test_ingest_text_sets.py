"""MovieLens-1M, Criteo and Avazu, from tiny files in the published formats."""

import gzip
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from c2al import __main__ as command_line
from c2al.config import load_config
from c2al.data.ingest import avazu, criteo, movielens, text
from c2al.errors import DataError

CONFIGS = Path(__file__).parents[2] / "c2al" / "configs"
SPLITS = ("train", "validation", "test")


def rows_of(folder):
    return {s: pq.read_table(folder / s).to_pylist() if (folder / s).exists() else [] for s in SPLITS}


def write_movielens(folder, ratings=100):
    folder.mkdir(exist_ok=True)
    order = list(range(ratings))
    random.Random(0).shuffle(order)
    lines = [f"{i % 3 + 1}::{i % 2 + 1}::{i % 5 + 1}::{978300000 + i}" for i in order]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-123\n3::M::25::15::02139\n")
    movies = "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Cité des enfants perdus, La (1995)::Sci-Fi\n"
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    return folder


def test_movielens(tmp_path):
    assert movielens.ingest(write_movielens(tmp_path / "in"), tmp_path / "out") == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    split = rows_of(tmp_path / "out")
    rows = [r for s in SPLITS for r in split[s]]
    assert [r["row_id"] for r in rows] == list(range(100))
    assert [r["time"] for r in rows] == [978300000 + i for i in range(100)]
    assert [r["label"] for r in rows] == [int(i % 5 + 1 >= 4) for i in range(100)]
    assert "rating" not in rows[0]
    assert rows[1] == {
        "row_id": 1,
        "label": 0,
        "time": 978300001,
        "user_id": 2,
        "movie_id": 2,
        "age": 56,
        "occupation": 16,
        "gender": "M",
        "zip": "70072-123",
        "year": 1995,
        "genres": ["Sci-Fi"],
    }
    assert rows[0]["genres"] == ["Animation", "Children's", "Comedy"]
    assert rows[2]["zip"] == "02139"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1::2::3", r"ratings\.dat, line 3: 3 fields, expected 4: '1\\t2\\t3'"),
        ("1::2::five::7", r"ratings\.dat, line 3: column 'rating' is 'five', expected int64"),
        ("1::2::9::7", r"ratings\.dat, line 3: column 'rating' is 9, must lie in 1\.\.5"),
        ("7::2::3::7", r"ratings\.dat, line 3: user_id 7 is not in users\.dat"),
        ("1::8::3::7", r"ratings\.dat, line 3: movie_id 8 is not in movies\.dat"),
    ],
)
def test_movielens_malformed(tmp_path, line, message):
    folder = write_movielens(tmp_path / "in")
    lines = (folder / "ratings.dat").read_text().splitlines()
    (folder / "ratings.dat").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(DataError, match=message):
        movielens.ingest(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def criteo_line(i):
    numbers = ["" if (i + j) % 4 == 0 else str(i * j - 3) for j in range(13)]
    categories = ["" if (i + j) % 5 == 0 else f"{i * 7919 + j:08x}" for j in range(26)]
    return "\t".join([str(i % 2), *numbers, *categories])


def write_criteo(path, start, rows):
    content = "".join(criteo_line(i) + "\n" for i in range(start, start + rows)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def check_criteo(rows):
    for i, row in enumerate(rows):
        values = list(row.values())
        assert values[:2] == [i, i]
        assert list(row)[2:] == ["label", *(f"I{j}" for j in range(1, 14)), *(f"C{j}" for j in range(1, 27))]
        assert ["" if v is None else str(v) for v in values[2:]] == criteo_line(i).split("\t")


def test_criteo_kaggle_holds_out_the_last_seventh(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 4096)
    write_criteo(tmp_path / "train.txt", 0, 70)
    assert criteo.ingest(tmp_path / "train.txt", tmp_path / "out") == {"train": 60, "validation": 5, "test": 5}
    split = rows_of(tmp_path / "out")
    check_criteo([r for s in SPLITS for r in split[s]])
    assert criteo.ingest(tmp_path, tmp_path / "again") == {"train": 60, "validation": 5, "test": 5}


def test_criteo_terabyte_holds_out_the_last_day(tmp_path):
    for day, start in ((0, 0), (2, 10), (10, 20)):
        write_criteo(tmp_path / f"day_{day}.gz", start, 10)
    assert criteo.ingest(tmp_path, tmp_path / "out") == {"train": 20, "validation": 5, "test": 5}
    split = rows_of(tmp_path / "out")
    check_criteo([r for s in SPLITS for r in split[s]])


def test_criteo_config_declares_its_columns(tmp_path):
    write_criteo(tmp_path / "train.txt", 0, 70)
    criteo.ingest(tmp_path, tmp_path / "out")
    data = load_config(CONFIGS / "criteo.toml").data
    names = set(pq.read_schema(tmp_path / "out" / "train" / "part-00000.parquet").names)
    assert names == {data.label, data.row_id, data.user_id} | {f.column for f in (*data.dense, *data.sparse)}


@pytest.mark.parametrize("at", [0, 3, 499])
@pytest.mark.parametrize("name", ["train.txt", "day_0.gz"])
def test_criteo_malformed_line_is_named_in_any_block(tmp_path, monkeypatch, at, name):
    """499 lies in a later block than the first: line numbers count the whole file."""
    monkeypatch.setattr(text, "BLOCK_BYTES", 4096)
    lines = [criteo_line(i) for i in range(500)]
    for bad, message in (
        ("1\t2\t3", rf"{name}, line {at + 1}: 3 fields, expected 40: '1\\t2\\t3'"),
        (lines[at].replace("\t", "\tx", 2), rf"{name}, line {at + 1}: column 'I1' is 'x.*', expected int64"),
        ("", rf"{name}, line {at + 1}: column 'label' is empty"),
    ):
        content = "\n".join([*lines[:at], bad, *lines[at + 1 :], ""]).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(DataError, match=message):
            criteo.ingest(tmp_path, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == [name]


def test_criteo_truncated_gzip_and_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"neither day_N\[\.gz\] nor train\.txt is there"):
        criteo.ingest(tmp_path, tmp_path / "out")
    write_criteo(tmp_path / "day_0.gz", 0, 1000)
    content = (tmp_path / "day_0.gz").read_bytes()
    (tmp_path / "day_0.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"day_0\.gz: cannot be read"):
        criteo.ingest(tmp_path, tmp_path / "out")


AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def avazu_line(i, hour, device="a99f214a"):
    ident = 17_000_000_000_000_000_000 + i
    place = "1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22"
    return f"{ident},{i % 2},{hour},{place},{device},ip{i},m{i},1,0,15706,320,50,1722,0,35,-1,79"


def write_avazu(path, lines):
    content = "\n".join([AVAZU, *lines, ""]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["train.csv", "train.gz"])
def test_avazu(tmp_path, name):
    lines = [avazu_line(i, 141021 * 100 + i * 100 + i) for i in range(10)] + [avazu_line(10, 14103023, "d10")]
    write_avazu(tmp_path / name, lines)
    assert avazu.ingest(tmp_path, tmp_path / "out") == {"train": 8, "validation": 1, "test": 2}
    split = rows_of(tmp_path / "out")
    rows = [r for s in SPLITS for r in split[s]]
    assert [r["row_id"] for r in rows] == list(range(11))
    assert [r["label"] for r in rows] == [i % 2 for i in range(11)]
    assert [r["hour"] for r in rows] == [*range(10), 23]
    assert rows[3]["time"] == 14102403
    assert rows[3]["user_id"] == "ip3-m3"
    assert rows[10]["user_id"] == "d10"
    assert rows[3]["C20"] == "-1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (avazu_line(2, "14103100"), r"train\.csv, line 4: column 'hour' is 14103100, not in days 141021 to 141030"),
        (avazu_line(2, "now"), r"train\.csv, line 4: column 'hour' is 'now', expected int64"),
        ("1,2", r"train\.csv, line 4: 2 fields, expected 24: '1,2'"),
    ],
)
def test_avazu_malformed(tmp_path, line, message):
    write_avazu(tmp_path / "train.csv", [avazu_line(0, 14102100), avazu_line(1, 14102100), line])
    with pytest.raises(DataError, match=message):
        avazu.ingest(tmp_path / "train.csv", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["train.csv"]


def test_avazu_missing_column(tmp_path):
    write_avazu(tmp_path / "train.csv", [avazu_line(0, 14102100)])
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text().replace("device_ip", "ip", 1))
    with pytest.raises(DataError, match=r"train\.csv: no column 'device_ip'; needed are click, hour"):
        avazu.ingest(tmp_path, tmp_path / "out")


def test_a_split_that_a_partial_set_leaves_empty_is_said(tmp_path, capsys):
    """One day of Avazu has no validation day; ratings of one second cannot be cut; six lines have no seventh."""
    write_avazu(tmp_path / "train.csv", [avazu_line(i, 14102100) for i in range(5)])
    movies = write_movielens(tmp_path / "ml", 6)
    (movies / "ratings.dat").write_text("".join(f"{i % 3 + 1}::1::4::978300000\n" for i in range(9)))
    write_criteo(tmp_path / "train.txt", 0, 6)
    for name, source in (("avazu", "train.csv"), ("movielens1m", "ml"), ("criteo", "train.txt")):
        words = ["ingest", name, "--input", str(tmp_path / source), "--output", str(tmp_path / name)]
        assert command_line.main(words) == 0
        out = capsys.readouterr().out
        assert f"{source} holds no row of the split validation" in out
        assert f"{source} holds no row of the split test" in out
        assert len(rows_of(tmp_path / name)["train"]) >= 5


def test_command(tmp_path, capsys):
    folder = write_movielens(tmp_path / "in")
    words = ["ingest", "movielens1m", "--input", str(folder), "--output", str(tmp_path / "out")]
    assert command_line.main([*words, "--label", "is_like"]) == 2
    assert "--label: movielens1m has one label only" in capsys.readouterr().err
    assert command_line.main(words) == 0
    assert "validation" in capsys.readouterr().out
    assert command_line.main(words) == 2
    assert "out: exists already" in capsys.readouterr().err
    (folder / "users.dat").unlink()
    assert command_line.main([*words[:-1], str(tmp_path / "other")]) == 2
    assert "users.dat: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
