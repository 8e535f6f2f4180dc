"""Worlds with a latent segment: their equations, their truth, and what they promise about it."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al import __main__ as command_line
from c2al.config import load_config
from c2al.data.synthetic import LATENT_WORLDS, LatentConfig, synthesise
from c2al.data.synthetic.latent import segment_shares
from c2al.errors import ConfigError

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "validation", "test")
ROWS = 39_000
INPUTS = ("u0", "u1", "u2", "u3", "grp", "item", "cat", "hour")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    return {w: (folder / w, synthesise(LatentConfig(world=w, rows=ROWS), folder / w)) for w in LATENT_WORLDS}


def everything(folder):
    return pa.concat_tables(pq.read_table(folder / split) for split in SPLITS)


def column(table, name):
    return table[name].to_numpy()


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("world", LATENT_WORLDS)
def test_same_seed_same_bytes_and_another_seed_another_world(worlds, tmp_path, world):
    synthesise(LatentConfig(world=world, rows=ROWS), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(worlds[world][0])
    synthesise(LatentConfig(world=world, rows=ROWS, seed=1), tmp_path / "other")
    part = "train/part-00000.parquet"
    assert digest(tmp_path / "other")[part] != digest(worlds[world][0])[part]


def test_splits_are_300_30_60_by_time(worlds):
    tables = [pq.read_table(worlds["privileged"][0] / split) for split in SPLITS]
    assert [t.num_rows for t in tables] == [30_000, 3_000, 6_000]
    table = pa.concat_tables(tables)
    assert table["row_id"].to_pylist() == list(range(ROWS))
    assert np.all(np.diff(column(table, "time")) >= 0)
    assert column(tables[0], "time").max() < column(tables[1], "time").min()
    assert column(tables[1], "time").max() < column(tables[2], "time").min()


def test_the_whole_is_written_in_row_groups(tmp_path):
    synthesise(LatentConfig(world="privileged", rows=130_000), tmp_path / "s")
    metadata = pq.ParquetFile(tmp_path / "s/train/part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [32768] * 3 + [1696]


def test_features_are_of_the_sizes_the_study_names(worlds):
    table = everything(worlds["privileged"][0])
    sizes = dict(zip(INPUTS, (8, 6, 4, 4, 8, 100, 8, 24), strict=True))
    for name, size in sizes.items():
        assert set(column(table, name).tolist()) == set(range(size)), name
    assert column(table, "user_id").max() < 20_000
    # A user's features and segment, and an item's category, are its own.
    for key, values in (("user_id", ("u0", "u1", "u2", "u3", "grp", "segment")), ("item", ("cat",))):
        groups = table.group_by(key).aggregate([(v, "count_distinct") for v in values])
        assert all(set(groups[f"{v}_count_distinct"].to_pylist()) == {1} for v in values)


def test_popularity_falls_as_a_power_of_the_rank(worlds):
    counts = np.sort(np.bincount(column(everything(worlds["privileged"][0]), "item"), minlength=100))[::-1]
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(counts), 1)[0]
    assert slope == pytest.approx(-0.7, abs=0.08)


def test_a_tenth_of_the_users_is_high_and_a_tenth_is_low(tmp_path):
    synthesise(LatentConfig(world="privileged", rows=20_000, users=1000), tmp_path / "s")
    users = everything(tmp_path / "s").group_by("user_id").aggregate([("segment", "min")])
    segment = np.array(users["segment_min"].to_pylist())
    # Some of the 1000 users never occur, so a share is known up to their number.
    for name in ("high", "low"):
        assert np.mean(segment == name) == pytest.approx(0.1, abs=1 - len(segment) / 1000 + 0.001)


@pytest.mark.parametrize("rate", [0.2, 0.02])
def test_rate_of_positives(tmp_path, rate):
    truth = synthesise(LatentConfig(world="privileged", rows=130_000, rate=rate), tmp_path / "s")["train"]["overall"]
    # The rate is exact in expectation, so only the labels and the draw of users vary: p differs between
    # rows, which makes their sum vary less than a binomial of that rate.
    assert truth.positives / truth.rows == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / truth.rows))


def test_logit_is_additive_in_segment_group_item_and_hour(worlds):
    """logit = (term of segment, grp, item) + 0.2 sin(pi hour / 12): no user, u0..u3 or time in it."""
    table = everything(worlds["privileged"][0])
    p = column(table, "true_p").astype(np.float64)
    rest = np.log(p / (1 - p)) - 0.2 * np.sin(np.pi * column(table, "hour") / 12)
    segment = np.unique(np.array(table["segment"].to_pylist()), return_inverse=True)[1]
    _, cell = np.unique((segment * 8 + column(table, "grp")) * 100 + column(table, "item"), return_inverse=True)
    mean = np.bincount(cell, rest) / np.bincount(cell)
    assert np.abs(rest - mean[cell]).max() < 1e-4  # float32 of p


def test_affinity_has_rank_three_and_shifts_are_the_segments(worlds):
    """What remains of the logit without hour is shift_s + beta_item + T_s V_item, V of rank 3."""
    table = everything(worlds["privileged"][0])
    p = column(table, "true_p").astype(np.float64)
    rest = np.log(p / (1 - p)) - 0.2 * np.sin(np.pi * column(table, "hour") / 12)
    segment, grp, item = np.array(table["segment"].to_pylist()), column(table, "grp"), column(table, "item")
    popular = np.argsort(-np.bincount(item))[:20]
    rows = []
    for g in range(8):
        chosen = [(segment == "mid") & (grp == g) & (item == i) for i in popular]
        assert all(c.any() for c in chosen)
        rows.append([rest[c].mean() for c in chosen])
    singular = np.linalg.svd(np.array(rows) - np.mean(rows, axis=0), compute_uv=False)
    assert singular[2] > 0.05
    assert singular[3] < 1e-3


def test_probability_without_the_latent_averages_the_one_with_it(worlds):
    """Tower property: over rows of the same inputs, true_p averages to true_p_without_latent; and
    true_p_without_latent is a function of the inputs alone."""
    table = everything(worlds["privileged"][0])
    p, without = column(table, "true_p").astype(np.float64), column(table, "true_p_without_latent").astype(np.float64)
    inputs = [column(table, name) for name in INPUTS]
    key = np.ravel_multi_index(inputs, (8, 6, 4, 4, 8, 100, 8, 24))
    order = np.argsort(key, kind="stable")
    same = key[order][1:] == key[order][:-1]
    assert same.sum() > 100
    assert np.array_equal(without[order][1:][same], without[order][:-1][same])

    # Over users, e is independent of u0..u3: the mean difference in any group of inputs is noise alone. A
    # user's rows share one e, so the user is the unit.
    users, index = np.unique(column(table, "user_id"), return_inverse=True)
    difference = np.bincount(index, p - without)
    level = np.zeros(len(users), np.int64)
    level[index] = np.ravel_multi_index(inputs[:4], (8, 6, 4, 4))
    for factor in (level % 4, level // 4 % 4, level // 16 % 6, level // 96):
        for value in np.unique(factor):
            d = difference[factor == value]
            assert abs(d.sum()) < 4.5 * math.sqrt((d**2).sum()), value


def test_share_of_a_segment_is_the_normal_tail_of_its_score():
    """Against numeric integration over e: P(v > q | f) and P(v < q | f)."""
    f, (low, high), e = np.array([-2.0, -0.5, 0.0, 1.4]), (-1.1, 1.3), np.linspace(-9, 9, 200_001)
    density = np.exp(-(e**2) / 2) / math.sqrt(2 * math.pi) * (e[1] - e[0])
    v = f[:, None] + 0.3 * e
    expected = np.stack([((v >= low) & (v <= high)) @ density, (v > high) @ density, (v < low) @ density], axis=1)
    assert segment_shares(f, low, high) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("world", LATENT_WORLDS)
def test_truth_is_the_entropy_of_what_was_written(worlds, world):
    folder, truth = worlds[world]
    written = json.loads((folder / "truth.json").read_text())["splits"]
    for split, segment in itertools.product(SPLITS, ("overall", "mid", "high", "low")):
        table = pq.read_table(folder / split)
        of = np.array(table["segment"].to_pylist())
        y = column(table, "label")[(of == segment) | (segment == "overall")]
        rate = y.mean()
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        for name, field in (("true_p", "bayes_ne"), ("true_p_without_latent", "bayes_ne_without_latent")):
            p = column(table, name).astype(np.float64)[(of == segment) | (segment == "overall")]
            ne = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)) / entropy
            assert written[split][segment][field] == pytest.approx(ne)
            assert getattr(truth[split][segment], field) == pytest.approx(ne)
        assert written[split][segment]["rows"] == len(y)


def test_the_segment_is_worth_something_in_the_privileged_world_and_nothing_in_the_homogeneous(worlds):
    hidden, nothing = (worlds[w][1]["train"]["overall"] for w in ("privileged", "homogeneous"))
    assert hidden.bayes_ne < hidden.bayes_ne_without_latent - 0.01
    assert nothing.bayes_ne == pytest.approx(nothing.bayes_ne_without_latent, abs=1e-6)
    table = everything(worlds["homogeneous"][0])
    assert np.allclose(column(table, "true_p"), column(table, "true_p_without_latent"), atol=1e-6)
    assert set(table["segment"].to_pylist()) == {"mid", "high", "low"}


def test_visible_is_the_privileged_world(worlds):
    files = [digest(worlds[w][0]) for w in ("privileged", "visible")]
    assert {k: v for k, v in files[0].items() if k != "truth.json"} == {
        k: v for k, v in files[1].items() if k != "truth.json"
    }
    latent = [json.loads((worlds[w][0] / "truth.json").read_text())["latent"] for w in ("privileged", "visible")]
    assert latent == ["segment: an axis, never an input", "segment: an axis, may be an input"]


def test_privileged_config_reads_it_and_the_segment_is_an_axis_only(worlds):
    config = load_config(ROOT / "c2al" / "configs" / "demo.toml")
    inputs = {f.column for f in config.data.dense} | {f.column for f in config.data.sparse}
    assert inputs == set(INPUTS)
    assert [a.column for a in config.axes] == ["segment"]
    names = set(pq.read_schema(worlds["privileged"][0] / "train/part-00000.parquet").names)
    assert inputs | {"segment", config.data.label, config.data.row_id, config.data.user_id, config.data.time} <= names


def test_impossible_settings():
    with pytest.raises(ConfigError) as caught:
        LatentConfig(world="nowhere", rows=12, users=1, items=0, rate=math.nan)
    assert len(caught.value.problems) == 5


def test_few_users_and_one_item_are_a_world(tmp_path):
    truth = synthesise(LatentConfig(world="privileged", rows=1300, users=10, items=1), tmp_path / "s")
    assert truth["train"]["overall"].rows == 1000


def test_command(tmp_path, capsys):
    words = ["synth", "--world", "privileged", "--rows", "1300", "--output", str(tmp_path / "s")]
    assert command_line.main(words) == 0
    assert "without segment" in capsys.readouterr().out
    for extra, message in (
        (["--zipf", "1"], "--zipf: does not go with --world privileged"),
        (["--rates", "0.1", "0.1", "0.1"], "--rates: does not go with --world privileged"),
        (["--world", "conflict", "--rate", "0.1"], "--rate: does not go with --world conflict"),
        (["--rows", "12"], "synth.rows: must be at least 13, is 12"),
    ):
        assert command_line.main([*words[:-1], str(tmp_path / "t"), *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
