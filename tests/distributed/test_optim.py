"""Schedule, clipping, accumulation, and row-wise Adagrad fused and not."""

import math

import pytest
import torch
import toy
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from c2al.config import OptimizerConfig
from c2al.distributed.optim import learning_rate_scale, make_optimizer
from c2al.distributed.process import process_group
from c2al.distributed.sharding import shard_model
from c2al.distributed.tables import local_tables
from c2al.errors import PlanError
from waits import Waits

LR, EPS = 0.1, 1e-8


def test_schedule_by_hand():
    def scales(total: int, warmup_steps: int = 0, **fields) -> list[float]:
        config = OptimizerConfig(**fields)
        return [learning_rate_scale(config, step, total, warmup_steps) for step in range(total)]

    assert scales(3) == [1, 1, 1]
    assert scales(6, warmup_steps=2, decay="linear") == pytest.approx([0.5, 1, 1, 2 / 3, 1 / 3, 0])
    assert scales(6, warmup_steps=1, decay="linear", final_lr_fraction=0.2) == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2])
    assert scales(5, decay="cosine") == pytest.approx(
        [1, 0.5 + math.cos(math.pi / 4) / 2, 0.5, 0.5 - math.cos(math.pi / 4) / 2, 0]
    )
    assert scales(2, warmup_steps=4) == [0.25, 0.5]
    # Past the planned end the rate stays at its last value.
    assert learning_rate_scale(OptimizerConfig(decay="linear", final_lr_fraction=0.1), 99, 10, 0) == pytest.approx(0.1)


def row_wise_adagrad(weight_RD, grad_RD, moment_R, decay):
    """By the formula, in float64; a row nobody looked up stays as it is."""
    for r in range(len(weight_RD)):
        if grad_RD[r].abs().sum() == 0:
            continue
        g = grad_RD[r].double() + decay * weight_RD[r].double()
        moment_R[r] = moment_R[r] + (g * g).sum() / len(g)
        weight_RD[r] = weight_RD[r].double() - LR * g / (moment_R[r].sqrt() + EPS)


@pytest.mark.parametrize(("kind", "decay"), [("table_wise", 0.0), ("data_parallel", 0.0), ("data_parallel", 0.02)])
def test_tables_follow_row_wise_adagrad_and_only_touched_rows_decay(kind, decay):
    config = toy.config(
        dist__sharding=[kind], train__optimizer={"sparse_lr": LR, "sparse_eps": EPS, "sparse_weight_decay": decay}
    )
    with process_group(config.dist) as world:
        dmp = shard_model(toy.Toy(), config, world)
        optimizer = make_optimizer(dmp, config.train.optimizer, 3)
        table = next(t for t in local_tables(dmp) if "user" in t.name)
        block = table.blocks[0]
        moment_R = block.moment_R if block.moment_R is not None else optimizer.replicated_moments[table.name]
        expected_RD, expected_R = block.weight_RD.clone().double(), torch.zeros(37, dtype=torch.float64)
        direction_D = torch.linspace(-1, 1, toy.DIM)
        for ids in ([0, 5, 5], [5, 36, 0]):
            sparse = KeyedJaggedTensor(
                keys=list(toy.ROWS), values=torch.tensor(ids), lengths=torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])
            )
            optimizer.zero_grad()
            (dmp.module.ebc(sparse)["user"] @ direction_D).sum().backward()
            optimizer.step()
            grad_RD = torch.zeros(37, toy.DIM)
            for i in ids:
                grad_RD[i] += direction_D
            row_wise_adagrad(expected_RD, grad_RD, expected_R, decay)
        torch.testing.assert_close(block.weight_RD.double(), expected_RD, rtol=0, atol=1e-6)
        torch.testing.assert_close(moment_R.double(), expected_R, rtol=1e-6, atol=1e-12)


def test_weight_decay_the_kernel_would_ignore_is_refused():
    config = toy.config(dist__sharding=["table_wise"], train__optimizer={"sparse_weight_decay": 0.02})
    with (
        process_group(config.dist) as world,
        pytest.raises(PlanError, match="'user': the fused CPU kernel silently ign"),
    ):
        shard_model(toy.Toy(), config, world)


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_the_schedule_reaches_the_step_it_is_for(kind):
    """A fused update happens inside backward: with a rate of almost 0 at step 0, step 0 must not move a table."""
    config = toy.config(
        dist__sharding=[kind],
        train__optimizer={
            "sparse_lr": 0.1,
            "dense_lr": 0.1,
            "warmup_steps": 10**9,
            "sparse_warmup_steps": 10**9,
            "dense": "adam",
        },
    )
    with process_group(config.dist) as world:
        dmp = shard_model(toy.Toy(), config, world)
        optimizer = make_optimizer(dmp, config.train.optimizer, 10)
        before = [b.weight_RD.clone() for t in local_tables(dmp) for b in t.blocks]
        over = [p.detach().clone() for p in dmp.module.over.parameters()]
        toy.train_step(dmp, optimizer, 0, 0, 1)
        after = [b.weight_RD for t in local_tables(dmp) for b in t.blocks]
        for old, new in zip(before, after, strict=True):
            assert (old - new).abs().max() < 1e-7
        for old, new in zip(over, dmp.module.over.parameters(), strict=True):
            assert (old - new).abs().max() < 1e-7
        assert optimizer.learning_rates == pytest.approx((0.1 * 2e-9, 0.1 * 2e-9))


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_warm_up_of_the_dense_part_leaves_the_tables_at_their_full_rate(kind):
    """Adagrad's sums never forget, so a table must move by what fills them: as without any warm-up."""
    moved = []
    for warmup in (10**9, 0):
        fields = {"sparse_lr": 0.1, "dense_lr": 0.1, "warmup_steps": warmup, "dense": "adam"}
        config = toy.config(dist__sharding=[kind], train__optimizer=fields)
        with process_group(config.dist) as world:
            torch.manual_seed(0)
            dmp = shard_model(toy.Toy(), config, world)
            optimizer = make_optimizer(dmp, config.train.optimizer, 10)
            assert optimizer.learning_rates[0] == 0.1
            assert optimizer.learning_rates[1] == pytest.approx(0.1 / max(warmup, 1))
            over = [p.detach().clone() for p in dmp.module.over.parameters()]
            before = [b.weight_RD.clone() for t in local_tables(dmp) for b in t.blocks]
            toy.train_step(dmp, optimizer, 0, 0, 1)
            after = [b.weight_RD.clone() for t in local_tables(dmp) for b in t.blocks]
            moved.append([new - old for old, new in zip(before, after, strict=True)])
            if warmup:
                for old, new in zip(over, dmp.module.over.parameters(), strict=True):
                    assert (old - new).abs().max() < 1e-7
    for with_warmup, without in zip(*moved, strict=True):
        assert without.abs().max() > 1e-3
        torch.testing.assert_close(with_warmup, without)


def test_clipping_bounds_the_dense_gradients_together_and_no_table():
    config = toy.config(
        dist__sharding=["data_parallel"], train__optimizer={"clip_norm": 1e-3, "dense": "adam", "dense_lr": 1e-3}
    )
    with process_group(config.dist) as world:
        dmp = shard_model(toy.Toy(), config, world)
        optimizer = make_optimizer(dmp, config.train.optimizer, 10)
        dense_BF, sparse, label_B = toy.batch(0, 0, 1)
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(dmp(dense_BF, sparse), label_B).backward()
        dense = list(dmp.module.over.parameters())
        blocks = [t.blocks[0] for t in local_tables(dmp)]
        tables_before = [b.grad_RD.clone() for b in blocks]
        norm = torch.cat([p.grad.flatten() for p in dense]).norm()
        direction = dense[0].grad.clone() / norm
        assert norm > 1e-3
        optimizer.step()
        clipped = torch.cat([p.grad.flatten() for p in dense]).norm()
        assert clipped == pytest.approx(1e-3, rel=1e-3)
        torch.testing.assert_close(dense[0].grad / clipped, direction, rtol=1e-4, atol=1e-6)
        for block, before in zip(blocks, tables_before, strict=True):
            assert torch.equal(block.grad_RD, before)


@pytest.mark.parametrize("dense", ["adam", "adamw"])
def test_dense_part_follows_torch(dense):
    fields = {"dense": dense, "dense_lr": 0.05, "weight_decay": 0.1, "betas": [0.8, 0.9]}
    config = toy.config(train__optimizer=fields)
    with process_group(config.dist) as world:
        dmp = shard_model(toy.Toy(), config, world)
        optimizer = make_optimizer(dmp, config.train.optimizer, 3)
        names = [n for n, _ in dmp.module.named_parameters() if n.startswith("over")]
        copies = [dict(dmp.module.named_parameters())[n].detach().clone().requires_grad_() for n in names]
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[dense]
        reference = kind(copies, lr=0.05, weight_decay=0.1, betas=(0.8, 0.9), fused=True)
        for step in range(3):
            toy.train_step(dmp, optimizer, step, 0, 1)
            for name, copy in zip(names, copies, strict=True):
                copy.grad = dict(dmp.module.named_parameters())[name].grad.clone()
            reference.step()
            for name, copy in zip(names, copies, strict=True):
                assert torch.equal(dict(dmp.module.named_parameters())[name], copy)


def test_gradients_add_up_until_the_step():
    """Accumulation: two backward passes, one step, on the dense part and on data_parallel tables."""
    config = toy.config(dist__sharding=["data_parallel"])
    with process_group(config.dist) as world:
        dmp = shard_model(toy.Toy(), config, world)
        optimizer = make_optimizer(dmp, config.train.optimizer, 3)

        def gradients(batches: list[int]) -> list[torch.Tensor]:
            optimizer.zero_grad()
            for number in batches:
                dense_BF, sparse, label_B = toy.batch(number, 0, 1)
                torch.nn.functional.binary_cross_entropy_with_logits(dmp(dense_BF, sparse), label_B).backward()
            tables = [b.grad_RD.clone() for t in local_tables(dmp) for b in t.blocks]
            return tables + [p.grad.clone() for p in dmp.module.over.parameters()]

        for both, one, other in zip(gradients([0, 1]), gradients([0]), gradients([1]), strict=True):
            torch.testing.assert_close(both, one + other)
            assert both.abs().sum() > 0


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_a_step_of_the_optimizer_does_not_wait_for_the_device(kind):
    config = toy.config(dist__sharding=[kind], train__optimizer={"clip_norm": 0.1})
    with process_group(config.dist) as world:
        dmp = shard_model(toy.Toy(), config, world)
        optimizer = make_optimizer(dmp, config.train.optimizer, 10)
        toy.train_step(dmp, optimizer, 0, 0, 1)
        dense_BF, sparse, label_B = toy.batch(1, 0, 1)
        dmp(dense_BF, sparse).sub(label_B).square().sum().backward()
        # Adam counts its steps on the host.
        counts = [t for name, t in optimizer.dense_state().items() if name.endswith(".step")]
        with Waits(counts) as waits:
            optimizer.step()
        assert waits.seen == []
        with Waits(counts) as waits:
            local_tables(dmp)[0].blocks[0].weight_RD.nonzero()
        assert waits.seen == ["nonzero"]  # it would be seen
