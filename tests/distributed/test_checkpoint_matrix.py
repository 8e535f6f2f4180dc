"""Saved under each plan and number of ranks, loaded under each other: model, moments and next losses."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from oracle import ORACLES
from test_parity import PLANS, TOYS, assemble, write_plan

from c2al.config import CheckpointConfig
from c2al.distributed.checkpoint import CheckpointReader, CheckpointWriter, load_unsharded
from c2al.distributed.checkpoint.parts import StoredParts
from c2al.distributed.optim import make_optimizer
from c2al.distributed.process import process_group
from c2al.distributed.sharding import shard_model
from c2al.distributed.tables import local_tables
from ranks import run_ranks

BEFORE, AFTER = 5, 10
FAST = {1: ["table_wise", "column_wise", "data_parallel"], 2: [n for n in PLANS[2][1] if n != "table_column_wise"]}


def write_plans(folder: Path, chosen: dict[int, list[str]], kind: str) -> dict[int, dict[str, Path]]:
    paths: dict[int, dict[str, Path]] = {}
    for ranks, names in chosen.items():
        for name in names:
            path = write_plan(folder / f"{ranks}-{name}.json", PLANS[ranks][1][name], kind)
            paths.setdefault(ranks, {})[name] = path
    return paths


def snapshot(dmp, optimizer) -> dict:
    """This rank's weights and moments by block, dense parameters, Adam's state and the learning rates."""
    weights, moments = [], []
    for table in local_tables(dmp):
        name = table.name.split(".")[-2]
        for b in table.blocks:
            moment = b.moment_R if b.moment_R is not None else optimizer.replicated_moments[table.name]
            weights.append((name, b.row, b.column, b.weight_RD.clone()))
            moments.append((name, b.row, b.column, b.weight_RD.shape[1], moment.clone()))
    over = {n: p.detach().clone() for n, p in dmp.module.named_parameters() if n.startswith("over")}
    adam = {n: t.clone() for n, t in optimizer.dense_state().items()}
    return {"weights": weights, "moments": moments, "over": over, "adam": adam, "rates": optimizer.learning_rates}


def build(path: Path, world, seed: int, model):
    config = model.config(dist__plan=str(path), seed=seed)
    dmp = shard_model(model.Toy(seed), config, world)
    return dmp, make_optimizer(dmp, config.train.optimizer, BEFORE + AFTER)


def save_all(plans: dict[str, Path], folder: Path, kind: str) -> dict:
    out, model = {}, TOYS[kind]
    for name, path in plans.items():
        with process_group(toy.config().dist) as world:
            dmp, optimizer = build(path, world, 0, model)
            for step in range(BEFORE):
                model.train_step(dmp, optimizer, step, world.rank, world.size)
            checkpointer = CheckpointWriter(folder / f"{world.size}-{name}", CheckpointConfig(), world)
            checkpointer.save(BEFORE, dmp, optimizer, {"position": BEFORE}, loss=torch.ones(1))
            before = snapshot(dmp, optimizer)
            losses = [model.train_step(dmp, optimizer, BEFORE + s, world.rank, world.size) for s in range(AFTER)]
            checkpointer.wait()
            out[name] = before | {"losses": losses}
    return out


def load_all(plans: dict[str, Path], sources: list[Path], kind: str) -> dict:
    out, model = {}, TOYS[kind]
    for (name, path), source in itertools.product(plans.items(), sources):
        with process_group(toy.config().dist) as world:
            dmp, optimizer = build(path, world, 1, model)
            checkpointer = CheckpointReader(source, world)
            latest = checkpointer.latest()
            assert latest is not None
            assert checkpointer.load(latest, dmp, optimizer) == {"position": BEFORE}
            after = snapshot(dmp, optimizer)
            losses = [model.train_step(dmp, optimizer, BEFORE + s, world.rank, world.size) for s in range(AFTER)]
            out[name, source.name] = after | {"losses": losses}
    return out


def whole_moments(per_rank: list[dict], model) -> dict[str, dict[tuple[int, int], torch.Tensor]]:
    """Table -> column range -> moments of all rows."""
    moments: dict[str, dict[tuple[int, int], torch.Tensor]] = {name: {} for name in model.ROWS}
    for rank in per_rank:
        for name, row, column, width, moment in rank["moments"]:
            whole = moments[name].setdefault((column, column + width), torch.full((model.ROWS[name],), float("nan")))
            whole[row : row + len(moment)] = moment
    return moments


def by_the_rule(saved: dict[tuple[int, int], torch.Tensor], columns: tuple[int, int]) -> torch.Tensor:
    """Mean over the block's columns of the moment that each column had."""
    per_column = torch.empty(len(next(iter(saved.values()))), max(last for _, last in saved))
    for (first, last), moment in saved.items():
        per_column[:, first:last] = moment[:, None]
    return per_column[:, slice(*columns)].mean(dim=1)


def run_matrix(folder: Path, chosen: dict[int, list[str]], kind: str) -> None:
    paths = write_plans(folder, chosen, kind)
    checkpoints = folder / "checkpoints"
    saved: dict[str, list[dict]] = {}
    for ranks, plans in paths.items():
        results = run_ranks(save_all, ranks, plans, checkpoints, kind, local_size=PLANS[ranks][0])
        saved |= {f"{ranks}-{name}": [r[name] for r in results] for name in plans}
    sources = [checkpoints / name for name in saved]
    for ranks, plans in paths.items():
        results = run_ranks(load_all, ranks, plans, sources, kind, local_size=PLANS[ranks][0], timeout=600)
        for name, (source, before) in itertools.product(plans, saved.items()):
            check(f"{source} -> {ranks}-{name}", before, [r[name, source] for r in results], kind)
    for source, before in saved.items():
        tensors = load_unsharded(checkpoints / source / f"step-{BEFORE:08d}")
        tables = assemble([r["weights"] for r in before], TOYS[kind])
        names = {n: f"{'weighted_' * (n == 'basket')}ebc.embedding_bags.{n}.weight" for n in tables}
        expected = {names[n]: t for n, t in tables.items()} | before[0]["over"]
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[n], expected[n]) for n in expected), source
        moved_rows(checkpoints / source / f"step-{BEFORE:08d}", {names[n]: t for n, t in tables.items()}, source)


def moved_rows(folder: Path, tables: dict[str, torch.Tensor], case: str) -> None:
    """Rows in another order, repeated or missing, of some columns: as a run that starts from this one reads them."""
    parts, rng = StoredParts(folder), np.random.default_rng(0)
    for name, table_RD in tables.items():
        row_N = rng.integers(-1, len(table_RD), 100)
        for first, last in ((0, table_RD.shape[1]), (table_RD.shape[1] // 4, table_RD.shape[1] // 4 * 3)):
            found = torch.full((100, last - first), 7.0)
            parts.fill_rows(f"model/{name}", row_N, found, first)
            expected = torch.where(torch.from_numpy(row_N >= 0)[:, None], table_RD[row_N][:, first:last], 7.0)
            assert torch.equal(found, expected), f"{case}: {name}"
        assert torch.equal(parts.whole(f"model/{name}"), table_RD), f"{case}: {name}"


def check(case: str, before: list[dict], after: list[dict], kind: str) -> None:
    model = TOYS[kind]
    tables_before, tables = (assemble([r["weights"] for r in ranks], model) for ranks in (before, after))
    for name in model.ROWS:
        assert torch.equal(tables[name], tables_before[name]), f"{case}: weights of '{name}'"
    for rank in after:
        for part in ("over", "adam"):
            for name, value in before[0][part].items():
                assert torch.equal(rank[part][name], value), f"{case}: {part} {name}"
        assert rank["rates"] == before[0]["rates"], case

    saved, moments = whole_moments(before, model), whole_moments(after, model)
    for name in model.ROWS:
        for columns, moment in moments[name].items():
            if columns in saved[name]:
                assert torch.equal(moment, saved[name][columns]), f"{case}: moments of '{name}'"
            else:
                # Moments here are near 1e-7: an absolute tolerance would let anything pass.
                expected_R = by_the_rule(saved[name], columns)
                torch.testing.assert_close(moment, expected_R, rtol=1e-6, atol=0, msg=f"{case}: moments of '{name}'")

    # The next losses are those of plain torch that starts from the loaded state.
    oracle = ORACLES[kind](tables, after[0]["over"], {name: len(m) for name, m in moments.items()})
    oracle.moments = {name: {c: m.clone() for c, m in parts.items()} for name, parts in moments.items()}
    for name, p in oracle.over.items():
        oracle.adam.state[p] = {k: after[0]["adam"][f"{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")}
    expected = torch.tensor([oracle.step(BEFORE + s) for s in range(AFTER)])
    torch.testing.assert_close(torch.tensor(after[0]["losses"]), expected, rtol=0, atol=1e-5, msg=f"{case}: losses")
    if {n: set(m) for n, m in moments.items()} == {n: set(m) for n, m in saved.items()}:
        continued = torch.tensor(before[0]["losses"])
        torch.testing.assert_close(
            torch.tensor(after[0]["losses"]), continued, rtol=0, atol=1e-5, msg=f"{case}: losses"
        )


@pytest.mark.parametrize("kind", TOYS)
def test_any_plan_and_world_loads_under_any_other(kind, tmp_path):
    run_matrix(tmp_path, FAST, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOYS)
def test_any_plan_and_world_loads_under_any_other_full(kind, tmp_path):
    run_matrix(tmp_path, {ranks: list(plans) for ranks, (_, plans) in PLANS.items()}, kind)
