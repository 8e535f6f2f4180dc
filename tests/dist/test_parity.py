"""The same global batches on 1, 2 and 4 ranks under every sharding type: the same losses."""

import json

import pytest
import toy
import torch
from distributed import run_ranks

from c2al.dist.optim import make_optimizer
from c2al.dist.process import process_group
from c2al.dist.sharding import plan_of, shard_model

STEPS = 20


def train(cases: list[dict]) -> list[tuple[list[float], dict[str, str]]]:
    out = []
    for overrides in cases:
        config = toy.config(**overrides)
        with process_group(config.dist) as world:
            dmp = shard_model(toy.Toy(), config, world)
            optimizer = make_optimizer(dmp, config.train.optimizer, STEPS)
            losses = [toy.train_step(dmp, optimizer, s, world.rank, world.size) for s in range(STEPS)]
            out.append((losses, {t: p.sharding for t, p in plan_of(dmp).items()}))
    return out


