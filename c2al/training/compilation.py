"""torch.compile of training steps: when it pays, and what happens where it cannot be had.

Only the function below the encoder and the prediction heads is compiled, not the module. Names of parameters stay as
they are; evaluation, scoring, diagnostics and export, which hook modules or must agree to the bit, run the plain lines.
"""

import logging
import platform
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.config import Config
from c2al.distributed.process import World
from c2al.errors import BackendError
from c2al.training.model import OverArch

WORTH_FLOPS = 3e13
"""Least work of a run on one rank that compiling pays for: ten minutes at the 50 GFLOP/s that a core trains at. It
saves a fifth of them at least, and takes one minute without a cache (docs/LOG.md)."""
WORTH_STEPS = 10_000
"""Fewest steps on a GPU that compiling pays for. The host launches a compiled step in less time: on an H100 that
saved 8 ms of 25 per step, and compiling took half a minute (docs/LOG.md)."""

BLOCK_BYTES = 4 * 2**20
"""Largest activation that compiled layers work on at once on a CPU. Blocks of that size took 10% off a float32 step
at 28 and at 64 fields of 64 dimensions; smaller batches lose by them (docs/LOG.md)."""

logger = logging.getLogger(__name__)


def compile_training(
    dmp: DistributedModelParallel, config: Config, world: World, steps: int, before: bool | None = None
) -> None:
    """Compiles what stands above the tables of a TrainTask, as `config.train.compile` says.

    The choice depends on the config and the number of steps alone, and only on what lies below the encoder and
    the prediction heads: arms that are compared are compiled alike. `before` is what `is_compiled` said of the
    run that is gone on with, None of a new one: compiled steps round otherwise, so a run that is made longer
    stays as it began.
    """
    (over,) = (m for m in dmp.modules() if isinstance(m, OverArch))
    choice = config.train.compile
    pays = before
    if choice == "auto" and before is None:
        pays = _pays(over, config, world, steps)
    if choice == "on" or (choice == "auto" and pays):
        # A penalty on Y is a mean over the rows that a block has, and dropout would draw in another order.
        whole = config.model.dropout or config.model.fm.y_l1 or config.model.fm.y_l2 or world.device.type != "cpu"
        block_bytes = 0 if whole else BLOCK_BYTES
        over.compiled = _Compiled(over, choice == "on", block_bytes, split=world.device.type != "cpu")
        if world.rank == 0:
            print(
                "train.compile: the first step compiles the layers: a minute or two, less from a cache", file=sys.stderr
            )


def cpu_kernels() -> dict[str, Any]:
    """Options of Inductor for its CPU kernels; a GPU's heed none of them.

    GCC 12.2 makes garbage of torch's transpose of 32 x 32 bfloat16 values in 512-bit vectors when it vectorises
    straight-line code, which -O3 asks for: a layer of 64 fields, "fm_attention" beside "linear", gave NaN
    (docs/LOG.md). Inductor's own code is vectors already and loses nothing without. The processor's name is the
    one setting that reaches the compiler's command line.
    """
    if platform.machine() != "x86_64":
        return {}
    from torch._inductor import config

    return {"cpp.march": f"{config.cpp.march or 'native'} -fno-tree-slp-vectorize"}


def is_compiled(dmp: DistributedModelParallel) -> bool:
    """Whether training steps run compiled: asked for, and not failed."""
    (over,) = (m for m in dmp.modules() if isinstance(m, OverArch))
    return isinstance(over.compiled, _Compiled) and not over.compiled.failed


def _pays(over: OverArch, config: Config, world: World, steps: int) -> bool:
    """Whether compiling saves more time than it takes.

    On a CPU the run's products above the tables, forward and backward, must be more than WORTH_FLOPS; on a GPU, where
    launching them takes the host longer than the card computes, its steps.
    """
    if world.device.type != "cpu":
        return steps > WORTH_STEPS
    rows = 8
    over.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pooled_BND = torch.zeros(rows, len(over.keys), over.dim) if over.keys else None
        over.interact(torch.zeros(rows, len(config.data.dense)), pooled_BND)
    over.train()
    forward = float(counter.get_total_flops()) / rows * config.train.batch_size / world.size
    return 3 * forward * steps > WORTH_FLOPS


class _Compiled:
    """OverArch.interact under torch.compile; as it stands, where compiling fails and is not required.

    block_bytes: a batch whose embeddings take more runs in equal blocks of rows; 0: never.
    split: under DDP, cut the graph where a bucket of gradients is full, so that the ranks can add up the first
    buckets while the device computes the next. A CPU does both itself, and only loses what was fused.
    """

    def __init__(self, over: OverArch, required: bool, block_bytes: int = 0, split: bool = True) -> None:
        self._plain: Any = over.interact
        # Random numbers of dropout as without compiling. One graph: a batch always has the same size.
        options: dict[str, Any] = {"fallback_random": True} | cpu_kernels()
        self._compiled: Any = torch.compile(over.interact, fullgraph=True, dynamic=False, options=options)
        self._required, self.failed = required, False
        self._block_bytes, self._split = block_bytes, split
        self._number_bytes = 2 if over.autocast else 4

    def __call__(self, dense_BF: Tensor, pooled_BND: Tensor | None) -> Tensor:
        if self.failed:
            return self._plain(dense_BF, pooled_BND)  # type: ignore[no-any-return]
        from torch._dynamo import config as dynamo_settings
        from torch._dynamo.exc import TorchDynamoException

        try:
            with dynamo_settings.patch(optimize_ddp=self._split):
                if pooled_BND is None or (blocks := self._blocks(pooled_BND)) == 1:
                    return self._compiled(dense_BF, pooled_BND)  # type: ignore[no-any-return]
                parts = zip(dense_BF.chunk(blocks), pooled_BND.chunk(blocks), strict=True)
                return torch.cat([self._compiled(dense_bF, pooled_bND) for dense_bF, pooled_bND in parts])
        except TorchDynamoException as e:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            if self._required:
                raise BackendError(f"train.compile = 'on': torch.compile failed: {reason}") from e
            logger.warning("train.compile: torch.compile failed, training goes on without it: %s", reason)
            self.failed = True
        return self._plain(dense_BF, pooled_BND)  # type: ignore[no-any-return]

    def _blocks(self, pooled_BND: Tensor) -> int:
        """Least number of equal blocks of rows, each within the limit; 1 where none below twice that many divides."""
        if not self._block_bytes:
            return 1
        rows, size = len(pooled_BND), pooled_BND.numel() * self._number_bytes
        least = -(-size // self._block_bytes)
        return next((n for n in range(least, 2 * least) if rows % n == 0), 1)
