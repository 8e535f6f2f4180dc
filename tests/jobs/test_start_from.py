"""`train --start-from`: what a run takes over from an earlier one, what it names, and what it refuses."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from c2al.__main__ import main
from c2al.config import Config, parse_config, replace, save_config
from c2al.distributed.checkpoint import load_unsharded
from c2al.distributed.checkpoint.parts import StoredParts
from c2al.distributed.process import process_group
from c2al.errors import CheckpointError, ConfigError
from c2al.training.run_folder import start_run
from c2al.training.start_from import Start
from c2al.training.trainer import Trainer, train
from impressions import tree, write_cohorts, write_impressions
from ranks import run_ranks

STEPS = 16


def day(folder: Path, days: list[int], **changes) -> Config:
    """Config over the training files of these days, in file order, one shard: batches follow one another."""
    content = tree(folder)
    content["data"] |= {
        "train": [str(folder / "train" / f"part-{number}.parquet") for number in days],
        "dense": [{"column": "age", "transforms": ["log1p"]}],
        "shuffle_rows": 0,
        "shards": 1,
    }
    content["data"]["sparse"][2] = {"column": "surface", "num_embeddings": 8}
    content["train"] |= {"prime_biases": False}
    return replace(parse_config(content), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    for number in (1, 2):
        write_impressions(folder / "train", seed=number)
    write_impressions(folder / "validation", 1024, seed=3)
    write_impressions(folder / "test", 1024, seed=4)
    return folder


@pytest.fixture(scope="module")
def first(folder, world, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("first") / "run"
    train(day(folder, [1], **{"train.ema": 0.9}), run, world)
    return run


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def started(config: Config, run: Path, world, start: Start, cohorts: Path | None = None) -> tuple[Trainer, dict]:
    """The trainer of a new run before its first step, and its model's weights by name."""
    trainer = Trainer(start_run(run, config, cohorts, world, start=start), world)
    trainer.checkpoints.save(0, trainer.model, trainer.optimizer, {}, loss=torch.zeros(1))
    trainer.checkpoints.wait()
    parts = StoredParts(newest(run))
    return trainer, {name: parts.whole(f"model/{name}") for name in parts.manifest.model}


def fresh(config: Config, run: Path, world) -> dict[str, torch.Tensor]:
    trainer = Trainer(start_run(run, config, None, world), world)
    trainer.checkpoints.save(0, trainer.model, trainer.optimizer, {}, loss=torch.zeros(1))
    trainer.checkpoints.wait()
    return load_unsharded(newest(run))


def contents(run: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in run.rglob("*") if p.is_file()}


def table(name: str) -> str:
    return f"model.ebc.embedding_bags.{name}.weight"


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_day_after_a_day_equals_one_run_over_both(folder, world, tmp_path, ema):
    changes = {"train.ema": ema}
    train(day(folder, [1, 2], **changes), tmp_path / "both", world)
    train(day(folder, [1], **changes), tmp_path / "one", world)
    before = contents(tmp_path / "one")
    start = Start(run=tmp_path / "one", optimizer=True)
    train(day(folder, [2], **changes), tmp_path / "two", world, start=start)
    assert contents(tmp_path / "one") == before, "the earlier run is only read"
    both, two = StoredParts(newest(tmp_path / "both")), StoredParts(newest(tmp_path / "two"))
    assert both.manifest.step == 2 * STEPS
    assert two.manifest.step == STEPS
    keys = json.loads((newest(tmp_path / "two") / "tensors.json").read_text())["tensors"]
    assert {key.partition("/")[0] for key in keys} == {"model", "moment", "adam"} | ({"ema"} if ema else set())
    for key in keys:
        assert torch.equal(both.whole(key), two.whole(key)), key
    # Without the optimizer state it is another run.
    train(day(folder, [2], **changes), tmp_path / "weights", world, start=Start(run=tmp_path / "one"))
    weights = StoredParts(newest(tmp_path / "weights"))
    assert not torch.equal(weights.whole(f"model/{table('user_id')}"), two.whole(f"model/{table('user_id')}"))


def test_killed_before_its_first_checkpoint_it_starts_from_the_same_weights(folder, world, first, tmp_path):
    config = day(folder, [2], **{"train.ema": 0.9})
    start = Start(run=first, optimizer=True)
    train(config, tmp_path / "whole", world, start=start)
    start_run(tmp_path / "parts", config, None, world, start=start)  # the folder, and no step
    train(replace(config, **{"train.max_steps": 5}), tmp_path / "parts", world, start=start)
    train(config, tmp_path / "parts", world, start=start)
    whole, parts = load_unsharded(newest(tmp_path / "whole")), load_unsharded(newest(tmp_path / "parts"))
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


def having(config: Config, **fields) -> Config:
    """The config with other features."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def features(*trees: dict) -> tuple:
    return parse_config({"data": {"sparse": list(trees)}}).data.sparse


def vocabulary(config: Config, rows: int) -> Config:
    """The config with `item_id` looked up in a vocabulary."""
    sparse = tuple(
        dataclasses.replace(f, encoding="vocabulary", num_embeddings=rows) if f.column == "item_id" else f
        for f in config.data.sparse
    )
    return having(config, sparse=sparse)


def test_a_vocabulary_is_taken_over_by_value(folder, world, tmp_path, capsys):
    old_ids, new_ids = np.arange(0, 40, 2), np.arange(30, 70)
    for number, ids in ((5, old_ids), (6, new_ids)):
        rng = np.random.default_rng(number)
        write_impressions(folder / "train", seed=number, item_id=rng.choice(ids, 4096))
    one = vocabulary(day(folder, [5]), 32)
    train(one, tmp_path / "one", world)
    # 40 new values and room for 49: of the 15 old ones that are not among them, the 9 smallest.
    two = vocabulary(day(folder, [6]), 50)
    trainer, weights = started(two, tmp_path / "two", world, Start(run=tmp_path / "one", optimizer=True))
    kept = [v for v in old_ids if v not in new_ids][:9]
    values = sorted([*new_ids.tolist(), *map(int, kept)])
    assert list(trainer.run.statistics.vocabularies["item_id"]) == values
    untouched, before = fresh(two, tmp_path / "fresh", world), StoredParts(newest(tmp_path / "one"))
    old_RD, old_moment_R = (before.whole(k) for k in (f"model/{table('item_id')}", f"moment/{table('item_id')}/0-8"))
    moment_R = StoredParts(newest(tmp_path / "two")).whole(f"moment/{table('item_id')}/0-8")
    new_RD = weights[table("item_id")]
    assert torch.equal(new_RD[0], old_RD[0]), "the unknown stay the unknown"
    for row, value in enumerate(values, 1):
        if value in old_ids:
            at = 1 + list(old_ids).index(value)
            assert torch.equal(new_RD[row], old_RD[at]), value
            assert moment_R[row] == old_moment_R[at], value
        else:
            assert torch.equal(new_RD[row], untouched[table("item_id")][row]), value
            assert moment_R[row] == 0, value
    text = capsys.readouterr().err
    assert "table 'item_id': 14 of 49 values are taken over, the rest is new; 6 values of the earlier run had" in text
    assert (old_moment_R[1:21] > 0).all()


def test_what_cannot_be_taken_over_is_named_and_fresh(folder, world, first, tmp_path, capsys):
    config = day(folder, [2])
    content = tree(folder)["data"]["sparse"]
    sparse = features(
        {**content[0], "num_embeddings": 101},
        {**content[1], "num_embeddings": 80},
        {"column": "surface", "num_embeddings": 8, "dim": 4},
        {**content[3], "min_count": 3},
    )
    config = having(config, sparse=sparse)
    trainer, weights = started(config, tmp_path / "two", world, Start(run=first))
    text = capsys.readouterr().err
    before, untouched = load_raw(first), fresh(config, tmp_path / "fresh", world)
    assert "table 'user_id' is initialised fresh: ids were hashed to 100 rows and are to 101" in text
    assert "table 'surface' is initialised fresh: 8 columns before, 4 now" in text
    assert "table 'item_id': 64 rows before, 80 now; the first 64 are taken over" in text
    assert "parameter 'model.over.projections.surface.weight' is initialised fresh: the earlier run has none" in text
    for name in ("user_id", "surface"):
        assert torch.equal(weights[table(name)], untouched[table(name)])
    assert torch.equal(weights[table("item_id")][:64], before[table("item_id")])
    assert torch.equal(weights[table("item_id")][64:], untouched[table("item_id")][64:])
    assert torch.equal(weights[table("tags")][:16], before[table("tags")])
    assert torch.equal(weights[table("tags")][16], untouched[table("tags")][16]), "the row of rare values is new"
    dense = [n for n in before if "embedding_bags" not in n]
    assert dense
    assert all(torch.equal(weights[n], before[n]) for n in dense)
    assert not trainer.optimizer.replicated_moments
    assert all(not value.any() for value in trainer.optimizer.dense_state().values()), "not asked for"


def load_raw(run: Path) -> dict[str, torch.Tensor]:
    """The weights themselves, not their averages."""
    parts = StoredParts(newest(run))
    return {name: parts.whole(f"model/{name}") for name in parts.manifest.model}


def test_a_removed_feature_leaves_the_tables_and_a_fresh_network(folder, world, first, tmp_path, capsys):
    config = day(folder, [2])
    config = having(config, sparse=config.data.sparse[1:])
    _, weights = started(config, tmp_path / "two", world, Start(run=first))
    text, before = capsys.readouterr().err, load_raw(first)
    assert "its inputs were age, user_id, item_id, surface, tags and are age, item_id, surface, tags" in text
    assert "table 'user_id' of the earlier run is not used any more" in text
    assert torch.equal(weights[table("item_id")], before[table("item_id")])
    untouched = fresh(config, tmp_path / "fresh", world)
    assert all(torch.equal(weights[n], untouched[n]) for n in weights if ".over." in n)


def test_an_auxiliary_prediction_head_is_known_by_its_cohort(folder, world, tmp_path, capsys):
    cohorts = write_cohorts(tmp_path / "cohorts.json")
    c2al = {"train.auxiliary_lambda": 0.1}
    train(day(folder, [1], **c2al), tmp_path / "one", world, cohorts)
    content = json.loads(cohorts.read_text())
    # The cohort that was the tail is the head now, and the tail is a new one.
    content["chosen"]["head"], content["chosen"]["tail"] = content["chosen"]["tail"], content["chosen"]["head"]
    (tmp_path / "swapped.json").write_text(json.dumps(content))
    names = start_run(tmp_path / "look", day(folder, [2], **c2al), tmp_path / "swapped.json", world).names
    _, weights = started(
        day(folder, [2], **c2al), tmp_path / "two", world, Start(run=tmp_path / "one"), tmp_path / "swapped.json"
    )
    earlier = start_run(tmp_path / "look1", day(folder, [1], **c2al), cohorts, world).names
    before = load_raw(tmp_path / "one")
    for i, name in enumerate(names):
        new, old = (f"model.over.heads.auxiliary.{n}.0.weight" for n in (i, earlier.index(name)))
        assert torch.equal(weights[new], before[old]), name
    # A baseline has none, so they are fresh, and said to be.
    train(day(folder, [1]), tmp_path / "baseline", world)
    capsys.readouterr()
    started(day(folder, [2], **c2al), tmp_path / "three", world, Start(run=tmp_path / "baseline"), cohorts)
    assert "'model.over.heads.auxiliary.0.0.weight' is initialised fresh: the earlier run has none" in (
        capsys.readouterr().err
    )


def test_dense_columns_stay_scaled_as_the_network_knows_them(folder, world, tmp_path):
    one, two = (having(day(folder, [n]), dense=parse_config(tree(folder)).data.dense) for n in (1, 2))
    train(one, tmp_path / "one", world)
    run = start_run(tmp_path / "two", two, None, world, start=Start(run=tmp_path / "one"))
    own = start_run(tmp_path / "alone", two, None, world)
    before = json.loads((tmp_path / "one" / "statistics.json").read_text())["moments"]["age"]
    assert run.statistics.moments["age"].mean == before["mean"] != own.statistics.moments["age"].mean


def test_an_admitted_row_stays_admitted(folder, world, tmp_path):
    def counted(number: int) -> Config:
        return having(
            day(folder, [number]), sparse=features({"column": "user_id", "num_embeddings": 100, "min_count": 45})
        )

    one, two = (start_run(tmp_path / f"{n}", counted(n), None, world).statistics for n in (1, 2))
    train(counted(1), tmp_path / "1", world)
    both = start_run(tmp_path / "both", counted(2), None, world, start=Start(run=tmp_path / "1")).statistics
    first_R, second_R, both_R = (s.admitted_rows("user_id") for s in (one, two, both))
    assert (first_R & ~second_R).any()
    assert (second_R & ~first_R).any()
    assert np.array_equal(both_R, first_R | second_R)


def on_two_ranks(folder: Path, run: Path, first: Path, sharding: str) -> None:
    config = day(folder, [2], **{"dist.sharding": (sharding,), "data.shards": 2})
    with process_group(config.dist) as world:
        trainer = Trainer(start_run(run, config, None, world, start=Start(run=first, optimizer=True)), world)
        trainer.checkpoints.save(0, trainer.model, trainer.optimizer, {}, loss=torch.zeros(1))
        trainer.checkpoints.wait()


@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel", "column_wise"])
def test_it_starts_under_any_plan_and_world(folder, world, first, tmp_path, sharding):
    run_ranks(on_two_ranks, 2, folder, tmp_path / "two", first, sharding)
    before, after = StoredParts(newest(first)), StoredParts(newest(tmp_path / "two"))
    keys = json.loads((newest(first) / "tensors.json").read_text())["tensors"]
    for key in keys:
        if not key.startswith("ema/") and not (sharding == "column_wise" and key.startswith("moment/")):
            assert torch.equal(before.whole(key), after.whole(key)), key
    for name in ("user_id", "item_id"):
        # A moment of one row is that of each of its columns.
        for _, _, key in after.moment_blocks(table(name)):
            assert torch.equal(after.whole(key), before.whole(f"moment/{table(name)}/0-8"))


def refused(capsys, *words: str) -> str:
    assert main(["train", *words]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_what_makes_no_sense_is_refused(folder, world, first, tmp_path, capsys):
    save_config(day(folder, [2], **{"train.ema": 0.9}), tmp_path / "c.toml")
    base = ["--config", str(tmp_path / "c.toml"), "--output"]
    new = [*base, str(tmp_path / "run")]
    assert "--start-optimizer: without effect" in refused(capsys, *new, "--start-optimizer")
    assert "not the folder of a training run" in refused(capsys, *new, "--start-from", str(tmp_path))
    assert not (tmp_path / "run").exists()
    text = refused(capsys, *new, "--start-from", str(first), "--model.layers", "3", "--model.cross_rank", "3")
    assert "model.layers = 3" in text
    assert "model.cross_rank = 3" in text
    assert "began without --start-from" in refused(
        capsys, "--config", str(first / "config.toml"), "--output", str(first), "--start-from", str(first)
    )


def test_a_run_goes_on_only_as_it_began(folder, world, first, tmp_path, capsys):
    save_config(day(folder, [2], **{"train.max_steps": 3}), tmp_path / "c.toml")
    base = ["--config", str(tmp_path / "c.toml"), "--output", str(tmp_path / "run")]
    assert main(["train", *base, "--start-from", str(first)]) == 0
    assert f"began with --start-from {first}" in refused(capsys, *base)
    assert "give the same or another" in refused(capsys, *base, "--start-from", str(first), "--start-optimizer")
    assert main(["train", *base, "--start-from", str(first)]) == 0
    (tmp_path / "run" / "start.json").write_text("{}")
    assert "start.json" in refused(capsys, *base, "--start-from", str(first))


def test_the_earlier_checkpoint_must_be_the_same_until_the_first_one_is_saved(folder, world, first, tmp_path):
    shutil.copytree(first, tmp_path / "first")
    config, start = day(folder, [2]), Start(run=tmp_path / "first")
    start_run(tmp_path / "run", config, None, world, start=start)
    marker = newest(tmp_path / "first") / "complete.json"
    marker.write_text(marker.read_text().replace("{", "{ ", 1))
    with pytest.raises(CheckpointError, match="is not the checkpoint that"):
        start_run(tmp_path / "run", config, None, world, start=start)
    shutil.rmtree(newest(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=r"complete.json: cannot be read"):
        start_run(tmp_path / "run", config, None, world, start=start)
    with pytest.raises(CheckpointError, match="holds no checkpoint to start from"):
        start_run(tmp_path / "new", config, None, world, start=start)


def test_a_damaged_checkpoint_is_no_start(folder, world, first, tmp_path):
    shutil.copytree(first, tmp_path / "first")
    data = newest(tmp_path / "first") / "rank-00000.bin"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank-00000.bin: damaged"):
        train(day(folder, [2]), tmp_path / "run", world, start=Start(run=tmp_path / "first"))
    assert not (tmp_path / "run").exists()


def test_nothing_in_common_is_refused(folder, world, first, tmp_path):
    config = day(folder, [2])
    sparse = parse_config(
        {"data": {"sparse": [{"column": "item_id", "name": "thing", "num_embeddings": 9}]}}
    ).data.sparse
    with pytest.raises(ConfigError, match="no table is one of the run of --start-from"):
        train(having(config, sparse=sparse), tmp_path / "run", world, start=Start(run=first))
