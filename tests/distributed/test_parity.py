"""The same global batches on 1, 2 and 4 ranks under every sharding type: the losses of plain torch."""

import dataclasses
import json
from pathlib import Path

import pytest
import rich_toy
import torch
import toy
from oracle import ORACLES

from c2al.distributed.optim import make_optimizer
from c2al.distributed.process import process_group
from c2al.distributed.sharding import shard_model
from c2al.distributed.tables import local_tables, plan_of
from c2al.training.metrics import BinaryMetrics
from ranks import run_ranks

STEPS = 20
TOYS = {"toy": toy, "rich": rich_toy}
"""The plain toy, and the one with shared, weighted and narrower tables."""


def everywhere(sharding: str, ranks: list[int]) -> dict:
    return {name: {"sharding": sharding, "ranks": ranks} for name in rich_toy.ROWS}


def grid(ranks: list[int]) -> dict:
    """grid_shard pools by sum only, so the mean-pooled table lies elsewhere."""
    return everywhere("grid_shard", ranks) | {"tags": {"sharding": "column_wise", "ranks": [ranks[0], ranks[-1]]}}


# Ranks -> (ranks per host, plans). Tables split by columns have two blocks in every world.
PLANS = {
    1: (
        1,
        {
            "table_wise": everywhere("table_wise", [0]),
            "column_wise": everywhere("column_wise", [0, 0]),
            "data_parallel": everywhere("data_parallel", []),
        },
    ),
    2: (
        2,
        {
            "table_wise": everywhere("table_wise", [0]) | {"item": {"sharding": "table_wise", "ranks": [1]}},
            "row_wise": everywhere("row_wise", [0, 1]),
            "column_wise": everywhere("column_wise", [1, 0]),
            "table_row_wise": everywhere("table_row_wise", [0, 1]),
            "table_column_wise": everywhere("table_column_wise", [0, 1]),
            "data_parallel": everywhere("data_parallel", []),
        },
    ),
    4: (
        2,
        {
            "table_wise": everywhere("table_wise", [3]) | {"item": {"sharding": "table_wise", "ranks": [1]}},
            "row_wise": everywhere("row_wise", [0, 1, 2, 3]),
            "column_wise": everywhere("column_wise", [3, 1]),
            "table_row_wise": everywhere("table_row_wise", [2, 3]),
            "table_column_wise": everywhere("table_column_wise", [0, 1]),
            "grid_shard": grid([0, 1, 2, 3]),
            "data_parallel": everywhere("data_parallel", []),
            "mixed": {
                "user": {"sharding": "row_wise", "ranks": [0, 1, 2, 3]},
                "item": {"sharding": "data_parallel", "ranks": []},
                "tags": {"sharding": "table_row_wise", "ranks": [0, 1]},
                "basket": {"sharding": "table_wise", "ranks": [2]},
            },
        },
    ),
}
"""Of the rich toy's tables; the plain one takes those it has."""
SPLIT = {"column_wise", "table_column_wise", "grid_shard"}


def train(plans: dict[str, Path], kind: str) -> dict:
    """Losses under each plan, and this rank's initial blocks and dense parameters."""
    out, model = {}, TOYS[kind]
    for name, path in plans.items():
        config = model.config(dist__plan=str(path))
        with process_group(config.dist) as world:
            dmp = shard_model(model.Toy(), config, world)
            blocks = [
                (t.name.split(".")[-2], b.row, b.column, b.weight_RD.clone())
                for t in local_tables(dmp)
                for b in t.blocks
            ]
            over = {n: p.detach().clone() for n, p in dmp.module.named_parameters() if n.startswith("over")}
            optimizer = make_optimizer(dmp, config.train.optimizer, STEPS)
            losses = [model.train_step(dmp, optimizer, s, world.rank, world.size) for s in range(STEPS)]
            out[name] = (
                losses,
                blocks,
                over,
                {t: p.sharding for t, p in plan_of(dmp).items()},
                ne_of(dmp, world, model),
            )
    return out


def ne_of(dmp, world, model) -> float | None:
    """NE on the batch after the last one trained on, merged over ranks as the training job does it."""
    dense_BF, sparse, label_B = model.batch(STEPS, world.rank, world.size)
    metrics = BinaryMetrics(("primary",))
    with torch.no_grad():
        metrics.update(dmp(dense_BF, sparse)[:, None], label_B[:, None], torch.ones_like(label_B))
    lifetime = metrics.lifetime
    merged = dataclasses.replace(lifetime, sums_CTS=world.all_sum(lifetime.sums_CTS))
    return merged.compute()["primary"]["all"].ne


def assemble(per_rank: list[list], model=toy) -> dict[str, torch.Tensor]:
    """Whole tables from the blocks of all ranks, which must cover every value."""
    tables = {name: torch.full((rows, model.DIMS[name]), float("nan")) for name, rows in model.ROWS.items()}
    for blocks in per_rank:
        for name, row, column, weight in blocks:
            tables[name][row : row + weight.shape[0], column : column + weight.shape[1]] = weight
    return tables


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Toy -> initial tables and dense parameters of the simplest plan there is."""
    return {kind: launch(1, tmp_path_factory.mktemp("plans"), kind)[0]["table_wise"] for kind in TOYS}


def write_plan(path: Path, plan: dict, kind: str = "toy") -> Path:
    """The plan file of the tables that the toy has."""
    tables = {name: plan[name] for name in TOYS[kind].ROWS}
    path.write_text(json.dumps({"format": "plan", "version": 1, "tables": tables}))
    return path


def launch(ranks: int, folder: Path, kind: str) -> list[dict]:
    local_size, plans = PLANS[ranks]
    paths = {name: write_plan(folder / f"{name}.json", plan, kind) for name, plan in plans.items()}
    return run_ranks(train, ranks, paths, kind, local_size=local_size)


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_plan_trains_like_plain_torch(ranks, kind, tmp_path, one_rank):
    _, blocks, over, *_ = one_rank[kind]
    model = TOYS[kind]
    tables = assemble([blocks], model)
    expected, expected_ne = {}, {}
    for split in (1, 2):
        oracle = ORACLES[kind](tables, over, dict.fromkeys(model.ROWS, split))
        expected[split] = torch.tensor([oracle.step(s) for s in range(STEPS)])
        # A step returns the log loss before its update; over the entropy of the mean label it is the NE.
        rate = model.batch(STEPS, 0, 1)[2].double().mean()
        entropy = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
        expected_ne[split] = oracle.step(STEPS) / entropy.item()
    # The column split is part of the arithmetic: were both the same, the cases below would prove less.
    assert (expected[1] - expected[2]).abs().max() > 1e-5

    results = launch(ranks, tmp_path, kind)
    for name in PLANS[ranks][1]:
        initial = assemble([r[name][1] for r in results], model)
        for table in model.ROWS:
            assert torch.equal(initial[table], tables[table]), f"{name}: initial '{table}' depends on the plan"
        for rank, result in enumerate(results):
            losses, _, over_here, plan, ne = result[name]
            # 1e-5 of the loss, over an entropy of 0.67.
            assert ne == pytest.approx(expected_ne[2 if name in SPLIT else 1], abs=2e-5), f"{name}: NE"
            assert name == "mixed" or name in plan.values()
            for parameter in over:
                assert torch.equal(over_here[parameter], over[parameter]), f"{name}: {parameter} on rank {rank}"
            # float32 sums in another order; 1e-5 is the bound users were promised.
            torch.testing.assert_close(
                torch.tensor(losses),
                expected[2 if name in SPLIT else 1],
                rtol=0,
                atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_initial_tables_follow_the_seed_and_the_declared_range(one_rank):
    tables = assemble([one_rank["toy"][1]])
    for name, rows in toy.ROWS.items():
        bound = rows**-0.5
        assert tables[name].abs().max() <= bound
        assert tables[name].std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not torch.equal(tables["user"][:30], tables["item"][:30])
    # Normal weights have no bound; the standard deviation is the declared one, and other tables keep theirs.
    rich = assemble([one_rank["rich"][1]], rich_toy)
    assert rich["user"].std() == pytest.approx(rich_toy.STD, rel=0.1)
    assert rich["user"].abs().max() > 2 * rich_toy.STD
    assert torch.equal(rich["item"], tables["item"])
