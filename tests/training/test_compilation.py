"""Compiled training steps: the same model, or the stated way out."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from c2al.config import replace
from c2al.distributed.process import process_group
from c2al.training import compilation
from c2al.training.batches import training_reader
from c2al.training.model import OverArch
from c2al.training.run_folder import start_run
from c2al.training.trainer import Trainer
from impressions import splits
from ranks import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return replace(splits(tmp_path_factory.mktemp("impressions")), **{"train.epochs": 2, "model.layers": 1})


@pytest.fixture(scope="module")
def world(config):
    with process_group(config.dist) as world:
        yield world


def trained(config, world, folder: Path, steps: int, **overrides) -> tuple[Trainer, list[float]]:
    run = start_run(folder, replace(config, **overrides), None, world)
    trainer = Trainer(run, world)
    batches = itertools.chain.from_iterable(training_reader(run, world, epoch) for epoch in (0, 1))
    losses = []
    for _ in range(steps):
        trainer.advance(batches)
        losses.append(float(trainer.step_loss_T[0]))
    return trainer, losses


def test_compiled_steps_equal_plain_ones(config, world, tmp_path):
    """20 steps with dropout: losses to 1e-5, the same names in a checkpoint, and plain lines outside training."""
    torch._dynamo.utils.counters.clear()  # of other tests in this process
    plain, expected = trained(config, world, tmp_path / "off", 20, **{"train.compile": "off", "model.dropout": 0.1})
    ours, losses = trained(config, world, tmp_path / "on", 20, **{"train.compile": "on", "model.dropout": 0.1})
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)
    assert max(losses) - min(losses) > 1e-3, "it was trained"
    assert ours.model.module.state_dict().keys() == plain.model.module.state_dict().keys()
    over = next(m for m in ours.model.modules() if isinstance(m, OverArch))
    assert over.compiled is not None
    assert not over.compiled.failed
    over.eval()
    pooled_BND = torch.randn(5, len(over.keys), over.dim)
    dense_BF = torch.randn(5, 1)
    calls = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    over.logits(dense_BF, pooled_BND)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == calls == 1, "one graph, of training steps"


@pytest.mark.parametrize("overrides", [{}, {"model.fm.y_l2": 0.1}, {"model.dropout": 0.1}])
def test_steps_in_blocks_of_rows_equal_plain_ones(config, world, tmp_path, monkeypatch, overrides):
    """Also with what a block alone cannot give: a mean over the batch, and random numbers in the batch's order."""
    rows = config.train.batch_size
    monkeypatch.setattr(compilation, "BLOCK_BYTES", len(config.data.sparse) * config.model.embedding_dim * rows)
    _, expected = trained(config, world, tmp_path / "off", 10, **{"train.compile": "off"}, **overrides)
    ours, losses = trained(config, world, tmp_path / "on", 10, **{"train.compile": "on"}, **overrides)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)
    over = next(m for m in ours.model.modules() if isinstance(m, OverArch))
    blocks = over.compiled._blocks(torch.empty(rows, len(over.keys), over.dim))
    assert blocks == (1 if overrides else 4), "float32 is four times the limit"


def graphs_on_a_rank(config, folder: Path) -> tuple[int, list[float]]:
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000
    with process_group(config.dist) as world:
        _, losses = trained(config, world, folder, 4)
    return torch._dynamo.utils.counters["aot_autograd"]["total"], losses


def test_two_ranks_on_a_cpu_compile_one_graph(config, tmp_path):
    """torch cuts it where a bucket of DDP is full, here of 1000 bytes; a step of wukong-26x16 took 7% more by that."""
    compiled, plain = (
        run_ranks(graphs_on_a_rank, 2, replace(config, **{"train.compile": choice}), tmp_path / choice)
        for choice in ("on", "off")
    )
    for (graphs, losses), (none, expected) in zip(compiled, plain, strict=True):
        assert (graphs, none) == (1, 0)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)


def test_compiled_bfloat16_layers_of_64_fields_equal_plain_ones(config):
    """Tiles of 32 x 32 values that are transposed once held garbage."""
    fields = 64 - len(config.data.sparse)
    wide = {"model.embedding_dim": 64, "model.dense_tokens": fields, "model.interactions": ("fm_attention", "linear")}
    torch.manual_seed(0)
    over = OverArch(replace(config, **wide, **{"train.precision": "bfloat16", "model.dropout": 0.0}), 0)
    dense_BF = torch.randn(64, len(config.data.dense))
    pooled_BND = torch.randn(64, len(config.data.sparse), 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = over.interact(dense_BF, pooled_BND).float()
        found = compilation._Compiled(over, required=True)(dense_BF, pooled_BND).float()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_transposes_of_any_size_equal_plain_ones(dtype):
    """The compiler erred where one kernel transposes twice; sizes that fill tiles of every width, and their edges."""

    def twice(a_BMD: torch.Tensor, c_BDM: torch.Tensor, bias_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        joined_BND = torch.cat([a_BMD, (c_BDM.mT.float() + bias_M[:, None]).to(dtype)], 1)
        return joined_BND, joined_BND.mT.contiguous()

    torch.manual_seed(0)
    for rows, dim in itertools.product((8, 16, 17, 27, 32, 33, 64, 80, 128), (8, 16, 20, 32, 48, 64)):
        operands = torch.randn(8, rows, dim, dtype=dtype), torch.randn(8, dim, rows, dtype=dtype), torch.randn(rows)
        compiled = torch.compile(twice, dynamic=False, fullgraph=True, options=compilation.cpu_kernels())
        for found, expected in zip(compiled(*operands), twice(*operands), strict=True):
            assert torch.equal(found, expected), (rows, dim)
        torch._dynamo.reset()


def test_auto_compiles_long_runs_alone_and_arms_alike(config, world, tmp_path, capsys):
    def compiled(steps: int, folder: str) -> bool:
        run = start_run(tmp_path / folder, config, None, world)
        trainer = Trainer(run, world)
        over = next(m for m in trainer.model.modules() if isinstance(m, OverArch))
        over.compiled = None
        compilation.compile_training(trainer.model, config, world, steps)
        return over.compiled is not None

    assert not compiled(32, "short")
    assert "train.compile" not in capsys.readouterr().err
    assert compiled(10**9, "long")
    assert "train.compile: the first step compiles the layers" in capsys.readouterr().err


def test_a_run_that_is_made_longer_is_not_compiled_on_the_way(config, world, tmp_path, monkeypatch):
    """Compiled steps round otherwise, and no step may depend on where training ends."""

    def opened(steps: int) -> Trainer:
        return Trainer(start_run(tmp_path / "run", replace(config, **{"train.max_steps": steps}), None, world), world)

    def compiled(trainer: Trainer) -> bool:
        return next(m for m in trainer.model.modules() if isinstance(m, OverArch)).compiled is not None

    opened(4).train()
    monkeypatch.setattr(compilation, "WORTH_FLOPS", 0.0)
    longer = opened(8)
    assert longer.step == 4
    assert not compiled(longer)
    compilation.compile_training(longer.model, config, world, 8, before=True)
    assert compiled(longer), "a run that began compiled stays so, however short"


FALLBACK = """
import itertools, sys
sys.path[:0] = [{tests!r}]
import logging; logging.basicConfig(level=logging.WARNING)
from pathlib import Path
from test_compilation import trained
from c2al.config import load_config
from c2al.distributed.process import process_group
from c2al.training import compilation
compilation.WORTH_FLOPS = 0.0
config = load_config(Path({config!r}))
with process_group(config.dist) as world:
    print(trained(config, world, Path({folder!r}), 3)[1])
"""


def test_auto_on_a_gpu_goes_by_steps(config, world, tmp_path):
    """What it saves there is the host's time per step, whatever the size of the model. Nothing runs on the device."""
    trainer, _ = trained(config, world, tmp_path / "run", 1, **{"train.compile": "off"})
    (over,) = (m for m in trainer.model.modules() if isinstance(m, OverArch))
    of_a_card = dataclasses.replace(world, device=torch.device("cuda"))
    for steps, expected in ((compilation.WORTH_STEPS, False), (compilation.WORTH_STEPS + 1, True)):
        over.compiled = None
        compilation.compile_training(trainer.model, replace(config, **{"train.compile": "auto"}), of_a_card, steps)
        assert (over.compiled is not None) == expected


@pytest.mark.parametrize("choice", ["auto", "on"])
def test_without_a_compiler_auto_trains_plainly_and_on_is_refused(config, world, tmp_path, choice):
    from c2al.config import save_config

    config = replace(config, **{"train.compile": choice})
    save_config(config, tmp_path / "c.toml")
    script = FALLBACK.format(
        tests=str(Path(__file__).parent), config=str(tmp_path / "c.toml"), folder=str(tmp_path / "run")
    )
    environment = os.environ | {
        "CXX": "/nowhere/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    if choice == "on":
        assert "BackendError: train.compile = 'on': torch.compile failed: " in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.compile failed, training goes on without it") == 1
    _, expected = trained(config, world, tmp_path / "plain", 3, **{"train.compile": "off"})
    assert json.loads(done.stdout.splitlines()[-1]) == expected
