"""Training with every conflict method at h: real trainers, fused tables, one and two ranks."""

import json
import typing
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from c2al.config import Config, TrainConfig, replace
from c2al.distributed.process import process_group
from c2al.distributed.tables import local_tables
from c2al.nn.combine import Combine
from c2al.nn.objective import targets
from c2al.training.model import C2ALModel
from c2al.training.run_folder import start_run
from c2al.training.trainer import Trainer
from impressions import splits, write_cohorts
from ranks import run_ranks

NAMES = typing.get_type_hints(TrainConfig)["combine"].__args__
METHODS = tuple(n for n in NAMES if n != "selective-groups")
LAMBDAS = (1.0, 0.7, 0.4)
TABLES = ("user_id", "item_id", "surface", "tags")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_cohorts(folder / "cohorts.json")
    return folder


@pytest.fixture(scope="module")
def config(folder) -> Config:
    changes = {"train.log_every": 1, "train.auxiliary_lambda": 0.7, "train.lambdas": {"tail": 0.4}}
    return replace(splits(folder, rows=2048), **changes)


def plan(folder: Path, ranks: list[int]) -> str:
    """Every table in two column blocks, whatever the number of ranks."""
    path = folder / f"plan-{len(set(ranks))}.json"
    tables = {name: {"sharding": "column_wise", "ranks": ranks} for name in TABLES}
    path.write_text(json.dumps({"format": "plan", "version": 1, "tables": tables}))
    return str(path)


def train_all(config: Config, folder: Path, changes: dict[str, dict], steps: int) -> dict[str, dict]:
    """Losses of the global batch, Gramians and weights of each step, and this rank's pieces of the tables."""
    out = {}
    with process_group(config.dist) as world:
        for name, change in changes.items():
            own = replace(config, **change)
            trainer = Trainer(start_run(folder / name, own, folder / "cohorts.json", world), world)
            combine = next((m for m in trainer.model.modules() if isinstance(m, Combine)), None)
            batches = trainer._batches()
            seen: list[tuple] = []
            for _ in range(steps):
                trainer.advance(batches)
                loss_T = world.all_sum(trainer.step_loss_T / world.size).tolist()
                seen.append((loss_T, combine and combine.gramian_TT, combine and combine.weight_T))
            tables = [
                (t.name, b.row, b.column, b.weight_RD.detach().clone())
                for t in local_tables(trainer.model)
                for b in t.blocks
            ]
            out[name] = {"steps": seen, "tables": tables, "shown": trainer.objective.shown()}
    return out


def on_ranks(ranks: int, config: Config, folder: Path, changes: dict[str, dict], steps: int) -> list[dict]:
    (folder / f"ranks{ranks}").mkdir()
    write_cohorts(folder / f"ranks{ranks}" / "cohorts.json")
    placed = replace(config, **{"dist.plan": plan(folder, [0, 0] if ranks == 1 else [1, 0])})
    return run_ranks(train_all, ranks, placed, folder / f"ranks{ranks}", changes, steps, timeout=300)


def test_one_and_two_ranks_agree_with_every_method(config, folder):
    """Fused row-wise Adagrad on column-wise shards, two batches per optimizer step."""
    changes = {name: {"train.combine": name, "train.accumulate": 2} for name in METHODS}
    changes["group-dro"] = {"train.group_dro": 0.5, "train.auxiliary_lambda": 0.0, "train.lambdas": {}}
    changes["group-dro-beside"] = {"train.group_dro": 0.5, "train.combine": "pcgrad-feat"}
    changes["uncertainty"] = {"train.uncertainty_weighting": True}
    (one,) = on_ranks(1, config, folder, changes, 6)
    two, other = on_ranks(2, config, folder, changes, 6)
    for name in changes:
        assert [s[2] for s in two[name]["steps"]] == [s[2] for s in other[name]["steps"]], f"{name}: ranks differ"
        for (loss_1, gramian_1, weights_1), (loss_2, gramian_2, weights_2) in zip(
            one[name]["steps"], two[name]["steps"], strict=True
        ):
            assert loss_2 == pytest.approx(loss_1, abs=1e-6), name
            if gramian_1 is not None:
                scale = gramian_1.diagonal().max()
                assert (gramian_2 - gramian_1).abs().max() / scale < 1e-6, name
                assert weights_2 == pytest.approx(weights_1, abs=1e-6), name
        assert two[name]["shown"] == other[name]["shown"]
        pieces_1, pieces_2 = (
            {piece[:3]: piece[3] for result in results for piece in result[name]["tables"]}
            for results in ((one,), (two, other))
        )
        assert pieces_1.keys() == pieces_2.keys()
        for key, weight_RD in pieces_1.items():
            # Adagrad divides by the root of the squared gradients, which makes a rounding error of a tiny one count.
            torch.testing.assert_close(pieces_2[key], weight_RD, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # The methods do different things here: else the above would show less.
    last = {tuple(one[name]["steps"][-1][0]) for name in changes}
    assert len(last) == len(changes)


@pytest.mark.parametrize("name", ["sum", "mgda-ub", "pcgrad-feat", "imtl-g-feat"])
def test_tables_and_prediction_heads_move_once_per_step(config, folder, tmp_path, name):
    """One step against plain torch: a backward per task, one combination, one row-wise Adagrad update by hand."""
    with process_group(config.dist) as world:
        own = replace(config, **{"train.combine": name})
        trainer = Trainer(start_run(tmp_path / "run", own, folder / "cohorts.json", world), world)
        before = {t.name: t.blocks[0].weight_RD.detach().clone() for t in local_tables(trainer.model)}
        plain = C2ALModel(own, 2, table_device="cpu")
        dense = {n: p for n, p in trainer.model.module.state_dict().items() if ".ebc." not in f".{n}"}
        weights = {n.removeprefix("model."): v.clone() for n, v in (dense | before).items() if n.startswith("model.")}
        plain.load_state_dict(weights)
        batch = next(trainer._batches())
        trainer.advance(iter([batch]))

        kept = []
        plain.over.heads.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0][0]))
        logit_BT = plain(batch.dense_BF, batch.sparse)
        (h,) = kept
        target_BT = targets(batch.label_B, batch.member_BC)
        bce_BT = F.binary_cross_entropy_with_logits(logit_BT, target_BT, batch.weight_B[:, None], reduction="none")
        loss_T = bce_BT.sum(0) / batch.rows * torch.tensor(LAMBDAS)
        gradients = [torch.autograd.grad(loss, h, retain_graph=True)[0] for loss in loss_T]
        flat_TN = torch.stack([g.flatten().double() for g in gradients])
        combine = Combine(name, 3, own.seed)
        combine.step = 1
        weight_T = [1.0] * 3 if name == "sum" else combine.weights(flat_TN @ flat_TN.T)
        at_h = sum(w * g for w, g in zip(weight_T, gradients, strict=True))
        heads = dict(plain.over.heads.named_parameters(prefix="over.heads"))
        rest = {n: p for n, p in plain.named_parameters() if n not in heads}
        expected = dict(zip(rest, torch.autograd.grad(h, list(rest.values()), at_h, retain_graph=True), strict=True))
        expected |= zip(heads, torch.autograd.grad(loss_T.sum(), list(heads.values())), strict=True)

        optimizer = own.train.optimizer
        for table in local_tables(trainer.model):
            grad_RD = expected[table.name.removeprefix("model.")]
            rate_R = optimizer.sparse_lr / (grad_RD.square().mean(dim=1).sqrt() + optimizer.sparse_eps)
            moved = table.blocks[0].weight_RD - before[table.name]
            assert moved.abs().max() > 0.01
            # float32 rounding of g / |g|, at most sqrt(8) in one value
            torch.testing.assert_close(moved, -rate_R[:, None] * grad_RD, rtol=1e-3, atol=1e-5)
        for full, p in trainer.model.module.named_parameters():
            if ".ebc." not in f".{full}":
                assert torch.equal(trainer.optimizer._adam.state[p]["step"], torch.tensor(1.0)), full
                found = p.grad
                assert found is not None
                torch.testing.assert_close(found, expected[full.removeprefix("model.")], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logging_the_gramian_changes_no_weight(config, folder, tmp_path, precision):
    """Bit for bit, and without the node on the steps between."""
    got = []
    with process_group(config.dist) as world:
        for every in (1, 5, 1000):
            own = replace(config, **{"train.log_every": every, "train.precision": precision, "train.max_steps": 6})
            trainer = Trainer(start_run(tmp_path / str(every), own, folder / "cohorts.json", world), world)
            trainer.train()
            got.append({n: v.detach().clone() for n, v in trainer.model.module.named_parameters()})
            records = [json.loads(line) for line in (tmp_path / str(every) / "metrics.jsonl").open()]
            steps = [r["step"] for r in records if r["kind"] == "gramian"]
            assert steps == [s for s in range(1, 7) if s % every == 0 or s == 6]
    for other in got[1:]:
        assert all(torch.equal(got[0][n], other[n]) for n in other)


@pytest.mark.parametrize(
    "change",
    [
        {"train.combine": "gradvac-feat"},
        {"train.combine": "pcgrad-feat", "train.precision": "bfloat16"},
        {"train.group_dro": 0.5},
        {"train.uncertainty_weighting": True},
    ],
    ids=lambda change: next(iter(change.values())),
)
def test_resumed_equals_uninterrupted_with_what_a_method_remembers(config, folder, tmp_path, change):
    own = replace(config, **change, **{"train.max_steps": 8})
    with process_group(config.dist) as world:
        trainers = []
        for name in ("whole", "parts"):
            trainers.append(Trainer(start_run(tmp_path / name, own, folder / "cohorts.json", world), world))
            batches = trainers[-1]._batches()
            for _ in range(8 if name == "whole" else 3):
                trainers[-1].advance(batches)
        trainers[1]._save()
        trainers[1].checkpoints.wait()
        resumed = Trainer(start_run(tmp_path / "parts", own, folder / "cohorts.json", world), world)
        assert resumed.step == 3
        batches = resumed._batches()
        for _ in range(5):
            resumed.advance(batches)
        whole, parts = (dict(t.model.module.state_dict()) for t in (trainers[0], resumed))
        for n, value in whole.items():
            if isinstance(value, torch.Tensor) and ".ebc." not in f".{n}":
                assert torch.equal(value, parts[n]), n
        for a, b in zip(local_tables(trainers[0].model), local_tables(resumed.model), strict=True):
            assert torch.equal(a.blocks[0].weight_RD, b.blocks[0].weight_RD), a.name


def test_the_lambdas_by_hand_are_those_of_the_config(config):
    assert (1.0, *(config.train.lambda_of(n) for n in ("head", "tail"))) == LAMBDAS
