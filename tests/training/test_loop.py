"""The loop around a training step: what it waits for, what is under way, and which pipeline drives it."""

import itertools
import json
from dataclasses import replace as changed
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, train_pipelines

from c2al.config import replace
from c2al.data.batch import Batch
from c2al.distributed.process import process_group
from c2al.distributed.sharding import shard_model
from c2al.distributed.tables import fused_kernels, local_tables, plan_of
from c2al.training.batches import training_reader
from c2al.training.model import C2ALModel
from c2al.training.pipeline import Clock, Pipeline, PipelinedSteps, PlainSteps, PrefetchPipeline, make_steps
from c2al.training.run_folder import start_run
from c2al.training.trainer import Trainer, train
from impressions import splits
from ranks import run_ranks
from waits import Waits


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return replace(splits(tmp_path_factory.mktemp("impressions")), **{"train.epochs": 2, "model.layers": 1})


def test_a_step_does_not_wait_for_the_device(config, tmp_path):
    """Forward, backward, update, averages, metrics: but for numbers that are the host's own, none is looked at."""
    given = {"train.optimizer.clip_norm": 1.0, "train.ema": 0.9, "train.compile": "off"}
    with process_group(config.dist) as world:
        trainer = Trainer(start_run(tmp_path / "run", replace(config, **given), None, world), world)
        batches = iter(list(itertools.islice(training_reader(trainer.run, world), 4)))
        trainer.advance(batches)
        hosts = [t for name, t in trainer.optimizer.dense_state().items() if name.endswith(".step")]
        for kernel in fused_kernels(trainer.model):
            hosts += [kernel.iter_cpu, kernel.learning_rate_tensor]  # of fbgemm, on the host on GPUs too
        with Waits(hosts) as waits:
            trainer.advance(batches)
        assert waits.seen == []


def test_a_reader_for_gpus_pins_its_batches(config, tmp_path, monkeypatch):
    """The copy to the device is asynchronous from pinned memory only."""
    pinned = []

    def pin(batch: Batch) -> Batch:
        pinned.append(batch)
        return batch

    monkeypatch.setattr(Batch, "pin_memory", pin)
    with process_group(config.dist) as world:
        run = start_run(tmp_path / "run", config, None, world)
        assert len(list(itertools.islice(training_reader(run, world), 3))) == 3
        assert pinned == []
        batches = training_reader(run, changed(world, device=torch.device("cuda")))
        read = list(itertools.islice(batches, 3))
    assert [any(one is batch for one in pinned) for batch in read] == [True] * 3


def evaluated_on_the_way(config, folder: Path) -> list[list[float]]:
    """Validation NE and training loss of every record of the log."""
    with process_group(config.dist) as world:
        train(config, folder, world)
    if world.rank:
        return []
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[r["step"], r["loss"]["primary"]] for r in records if r["kind"] == "train"] + [
        [r["step"], r["primary"]["all"]["ne"]] for r in records if r["kind"] == "validation"
    ]


def test_evaluations_between_change_nothing_that_is_trained(config, tmp_path):
    """Two ranks: the pipeline runs empty before an evaluation, and goes on as if there had been none."""
    given = {"train.max_steps": 12, "train.log_every": 4, "train.batch_size": config.train.batch_size}
    seldom = replace(config, **given, **{"train.eval_every": 0, "train.y_every": 0})
    often = replace(config, **given, **{"train.eval_every": 3, "train.y_every": 4})
    alone = run_ranks(evaluated_on_the_way, 2, seldom, tmp_path / "seldom")[0]
    between = run_ranks(evaluated_on_the_way, 2, often, tmp_path / "often")[0]
    assert [r for r in between if r in alone] == alone
    assert len(between) - len(alone) == 3, "evaluated after steps 3, 6, 9 as well"


def test_the_pipeline_takes_no_batch_before_its_pause(config, tmp_path):
    with process_group(config.dist) as world:
        trainer = Trainer(start_run(tmp_path / "run", config, None, world), world)
        parts = (trainer.model, trainer.optimizer)
        steps = PipelinedSteps(*parts, Pipeline(*parts, world.device, Clock()), 1)
        taken = []
        batches = (taken.append(b) or b for b in training_reader(trainer.run, world))
        for left in (3, 2, 1):
            if left < 3:
                with pytest.raises(AssertionError, match=f"{left} batches are under way"), steps.paused():
                    pass
            steps.progress(batches, left, False)
        assert len(taken) == 3
        with steps.paused(), torch.no_grad():
            trainer.model(taken[0])
        steps.progress(batches, 2, False)
        assert len(taken) == 5
        assert steps.overlapped is not None


def prefetched_on_the_host(context, modules, device, streams, dist_stream, forward_stream) -> None:
    """TorchRec's stage of the same name without its streams: it does nothing where there are none."""
    for module in modules:
        name = module.forward._name
        context.module_input_post_prefetch[name] = context.input_dist_tensors_requests.pop(name).wait()
        context.module_contexts_post_prefetch[name] = context.module_contexts.pop(name)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_loop_trains_alike(config, tmp_path, monkeypatch, accumulate):
    """Bit for bit, with evaluations between, the last steps of an accumulation that is cut short included."""
    monkeypatch.setattr(train_pipelines, "prefetch_embeddings", prefetched_on_the_host)
    weights = {}
    given = {"train.max_steps": 8, "train.accumulate": accumulate, "train.eval_every": 5, "train.y_every": 3}
    for kind in (PlainSteps, Pipeline, PrefetchPipeline):
        with process_group(config.dist) as world:
            run = start_run(tmp_path / kind.__name__, replace(config, **given), None, world)
            trainer = Trainer(run, world)
            assert isinstance(trainer.steps, PlainSteps)
            parts = (trainer.model, trainer.optimizer)
            if kind is not PlainSteps:
                trainer.steps = PipelinedSteps(*parts, kind(*parts, world.device, trainer.clock), accumulate)
            batches = iter(list(itertools.islice(training_reader(run, world), 8)))
            for step in range(1, 9):
                trainer.advance(batches)
                if step in (3, 5, 6):
                    trainer._evaluate()
            assert trainer.optimizer.steps == -(-8 // accumulate)
            weights[kind] = [t.clone() for table in local_tables(trainer.model) for t in [table.blocks[0].weight_RD]]
            weights[kind] += [p.detach().clone() for p in trainer.model.module.parameters()]
    for kind in (Pipeline, PrefetchPipeline):
        assert all(map(torch.equal, weights[kind], weights[PlainSteps])), kind


class Tables(nn.Module):
    """The tables of a model alone: nothing of it needs values where the device has none."""

    def __init__(self, config) -> None:
        super().__init__()
        self.ebc = C2ALModel(config).ebc


@pytest.mark.parametrize("for_training", [True, False])
def test_tables_in_host_memory_are_trained_by_the_prefetch_pipeline(config, tmp_path, for_training):
    """A dry run: TorchRec builds its kernels on a device without memory. Those that only read prefetch nothing."""
    names = [table.name for table in C2ALModel(config).ebc.embedding_bag_configs()]
    tables = {n: {"sharding": "table_wise", "ranks": [0], "cache_load_factor": 0.25} for n in names}
    (tmp_path / "plan.json").write_text(json.dumps({"format": "plan", "version": 1, "tables": tables}))
    config = replace(config, **{"dist.plan": str(tmp_path / "plan.json")})
    with process_group(config.dist) as world:
        planned = shard_model(
            Tables(config), config, changed(world, device=torch.device("meta")), for_training=for_training
        )
        assert {(p.kernel, p.cache_load_factor) for p in plan_of(planned).values()} == {("fused_uvm_caching", 0.25)}
        assert {k.prefetch_pipeline for k in fused_kernels(planned)} == {for_training}
        trainer = Trainer(start_run(tmp_path / "run", replace(config, **{"dist.plan": ""}), None, world), world)
        steps = make_steps(planned, trainer.optimizer, changed(world, device=torch.device("meta")), Clock(), 1)
    assert isinstance(steps._pipeline, PrefetchPipeline)
    assert isinstance(steps._pipeline, PrefetchTrainPipelineSparseDist)
