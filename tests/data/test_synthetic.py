"""Synthetic impressions: reproducible, streamed, with the heterogeneity and the truth they claim."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from c2al import __main__ as command_line
from c2al.config import load_config
from c2al.data.parquet import BatchReader
from c2al.data.statistics import fit_statistics
from c2al.data.synthetic import CHUNK_ROWS, SynthConfig, synthesise
from c2al.errors import ConfigError, OutputError

SMALL = SynthConfig(rows=20_000, users=500, items=200)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "small"
    return folder, synthesise(SMALL, folder)


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes(small, tmp_path):
    synthesise(SMALL, tmp_path / "again")
    assert digest(tmp_path / "again") == digest(small[0])
    synthesise(SynthConfig(rows=20_000, users=500, items=200, seed=1), tmp_path / "other")
    assert digest(tmp_path / "other")["train/part-00000.parquet"] != digest(small[0])["train/part-00000.parquet"]


def test_splits_are_by_time_and_hold_every_row(small):
    splits = [pq.read_table(small[0] / s) for s in ("train", "validation", "test")]
    assert [t.num_rows for t in splits] == [14_285, 2_857, 2_858]
    everything = pa.concat_tables(splits)
    assert everything["row_id"].to_pylist() == list(range(20_000))
    assert np.all(np.diff(everything["time"].to_numpy()) >= 0)
    ends = [(t["time"].to_numpy().min(), t["time"].to_numpy().max()) for t in splits]
    assert ends[0][1] < ends[1][0]
    assert ends[1][1] < ends[2][0]


def test_more_rows_continue_the_same_stream(tmp_path):
    """A chunk's draw depends on seed and chunk only, so size does not reshuffle what is known."""
    rows = CHUNK_ROWS + 1000
    synthesise(SynthConfig(rows=rows), tmp_path / "a")
    synthesise(SynthConfig(rows=rows * 2), tmp_path / "b")
    a, b = (pq.read_table(tmp_path / n / "train", columns=["user_id"])["user_id"].to_pylist() for n in "ab")
    assert a[: len(a) // 2] == b[: len(a) // 2]


def test_truth_is_the_entropy_of_what_was_written(small):
    folder, truth = small
    written = json.loads((folder / "truth.json").read_text())["splits"]
    for split in ("train", "validation", "test"):
        table = pq.read_table(folder / split)
        for name, surfaces in {
            "overall": None,
            "majority": ["feed", "reels", "stories"],
            "head": ["search"],
            "tail": ["marketplace"],
        }.items():
            rows = table if surfaces is None else table.filter(pc.is_in(table["surface"], pa.array(surfaces)))
            y, p = rows["label"].to_pylist(), rows["true_p"].to_pylist()
            rate = sum(y) / len(y)
            loss = -sum(math.log(q if v else 1 - q) for v, q in zip(y, p, strict=True)) / len(y)
            ne = loss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
            assert written[split][name] == {"rows": len(y), "positives": sum(y), "bayes_ne": pytest.approx(ne)}
            assert truth[split][name].bayes_ne == pytest.approx(ne)


def test_minorities_are_minorities_with_the_wanted_rates(tmp_path):
    rates = (0.20, 0.45, 0.05)
    truth = synthesise(SynthConfig(rows=100_000, rates=rates), tmp_path / "s")["train"]
    for name, rate in zip(("majority", "head", "tail"), rates, strict=True):
        # Four standard errors of the labels, and the pilot's of the intercept.
        tolerance = 4 * math.sqrt(rate * (1 - rate) / truth[name].rows) + 0.01 * rate
        assert truth[name].positives / truth[name].rows == pytest.approx(rate, abs=tolerance)
    for name in ("head", "tail"):
        assert 0.05 < truth[name].rows / truth["overall"].rows < 0.10


def test_low_rates(tmp_path):
    truth = synthesise(SynthConfig(rows=200_000, rates=(0.0008, 0.0014, 0.0003)), tmp_path / "s")["train"]
    p = pq.read_table(tmp_path / "s" / "train", columns=["true_p", "surface"])
    for surface, rate in (("search", 0.0014), ("marketplace", 0.0003)):
        assert pc.mean(p.filter(pc.equal(p["surface"], surface))["true_p"]).as_py() == pytest.approx(rate, rel=0.15)
    assert truth["overall"].positives > 0


def test_a_class_that_is_absent_leaves_ne_undefined(tmp_path):
    truth = synthesise(SynthConfig(rows=1000, rates=(1e-9, 1e-9, 1e-9)), tmp_path / "s")
    assert truth["test"]["overall"].bayes_ne is None
    assert json.loads((tmp_path / "s" / "truth.json").read_text())["splits"]["test"]["overall"]["bayes_ne"] is None


def test_what_attracts_the_majority_repels_the_tail(small):
    """Estimated from what is written: the price slope and topic affinity of each cohort differ in sign."""
    table = pq.read_table(small[0] / "train")
    logit = np.log(table["true_p"].to_numpy() / (1 - table["true_p"].to_numpy(zero_copy_only=False)))
    surface = np.array(table["surface"].to_pylist())
    price = table["price"].to_numpy()

    def slope(mask):
        return np.polyfit(price[mask], logit[mask], 1)[0]

    assert slope(surface == "feed") > 0.1
    assert slope(surface == "marketplace") < -0.5
    pairs = {"feed": {}, "marketplace": {}}
    for s, interests, topics, z in zip(
        surface, table["interests"].to_pylist(), table["topics"].to_pylist(), logit, strict=True
    ):
        if s in pairs:
            for a in interests:
                for b in topics:
                    pairs[s].setdefault((a, b), []).append(z)
    both = [k for k in pairs["feed"] if k in pairs["marketplace"] and len(pairs["marketplace"][k]) >= 5]
    means = {s: np.array([np.mean(pairs[s][k]) for k in both]) for s in pairs}
    assert len(both) > 100
    assert np.corrcoef(means["feed"], means["marketplace"])[0, 1] < -0.1


def test_frequencies_follow_zipf(tmp_path):
    synthesise(SynthConfig(rows=100_000, users=1000, zipf=1.0), tmp_path / "s")
    counts = np.sort(pc.value_counts(pq.read_table(tmp_path / "s" / "train")["user_id"]).field("counts").to_numpy())[
        ::-1
    ]
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(counts[:100]), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.08)


def test_demo_config_reads_it_and_no_input_is_after_the_fact(small):
    folder, _ = small
    config = load_config(Path(__file__).parents[2] / "c2al" / "configs" / "conflict.toml")
    inputs = {f.column for f in config.data.dense} | {f.column for f in config.data.sparse}
    assert not inputs & {"true_p", "label", "row_id", "time"}
    assert {a.column for a in config.axes if a.column} <= set(pq.read_schema(folder / "train/part-00000.parquet").names)
    paths = (str(folder / "train"),)
    reader = BatchReader(
        paths,
        config.data,
        fit_statistics(paths, config.data),
        batch_size=512,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        shards=8,
    )
    assert sum(int(b.weight_B.sum()) for b in reader) == 14_285


def test_impossible_settings_and_an_output_that_exists(tmp_path):
    with pytest.raises(ConfigError) as caught:
        SynthConfig(rows=3, users=0, rates=(0.1, 1.0, 0.1), zipf=math.nan)
    assert len(caught.value.problems) == 4
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="there: exists already"):
        synthesise(SMALL, tmp_path / "there")


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("c2al.data.synthetic.write_atomically", full)
    with pytest.raises(OutputError, match="No space"):
        synthesise(SMALL, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path, capsys):
    words = ["synth", "--output", str(tmp_path / "s"), "--rows", "2000", "--rates", "0.2", "0.4", "0.1"]
    assert command_line.main(words) == 0
    assert "Bayes NE" in capsys.readouterr().out
    assert command_line.main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert command_line.main(["synth", "--output", str(tmp_path / "t"), "--rows", "0"]) == 2
    assert "synth.rows: must be at least 14, is 0" in capsys.readouterr().err
    assert command_line.main(["synth", "--output", str(tmp_path / "t"), "--seeds", "1"]) == 2
    assert "unknown argument --seeds" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_the_rows_of_a_seed_do_not_change(small):
    """Published results name a seed. The digest is of whole-numbered columns, which do not depend on how
    a machine rounds exp and log."""
    table = pq.read_table(small[0] / "train", columns=["row_id", "time", "user_id", "item_id", "age", "surface"])
    rows = "\n".join(",".join(map(str, row.values())) for row in table.to_pylist())
    assert hashlib.sha256(rows.encode()).hexdigest().startswith("d4240851cbfa581e")
