"""Which schedule and tile sizes the Triton kernels of FM attention run with, per shape and dtype.

Legend: A is p x q, Y p x K; BLOCK_* see kernels.py. Every configuration that `configurations` can
return is compiled for sm_90 by tests/ops/test_triton_compile.py, which refuses any that asks for more
shared memory than a Hopper block can have, and any that spills a register, but for a few bytes
of those that were timed on a card.
"""

from typing import Literal, NamedTuple

import torch

Direction = Literal["forward", "backward"]
Precision = Literal["half", "tf32", "ieee"]
"""half: bfloat16 or float16 operands. tf32, ieee: float32 operands and how their products round."""

Schedule = Literal["columns", "rows"]
"""What streams: tiles of A's columns or of its rows, see kernels.py."""

SHARED_MEMORY = 232_448
"""Bytes one block can have on sm_90."""
BLOCKS_P = (16, 32, 64, 128, 256)
BLOCKS_Q = (16, 32, 64, 128)
BLOCKS_K = (16, 32, 64, 128)
"""Sizes to which p (columns), q (rows) and K are padded."""


class _Budget(NamedTuple):
    live: int
    """Values a thread may hold by the count of `_fits`; found by compiling: more spills."""
    tiles: tuple[int, ...]
    """Tile sizes, likeliest first."""
    candidates: int
    """Configurations the autotuner tries."""


_BUDGETS: dict[tuple[Schedule, Precision], _Budget] = {
    ("columns", "half"): _Budget(170, (64, 32, 16), 2),
    ("columns", "tf32"): _Budget(110, (32, 16), 1),
    ("columns", "ieee"): _Budget(60, (16,), 1),
    ("rows", "half"): _Budget(100, (32, 16), 1),
    ("rows", "tf32"): _Budget(28, (32, 16), 1),
}


class Configuration(NamedTuple):
    """One compiled form of a kernel."""

    schedule: Schedule
    block_p: int
    block_q: int
    block_k: int
    warps: int
    stages: int


def _columns(block_p: int, block_k: int, *tiles: tuple[int, int, int]) -> list[Configuration]:
    return [Configuration("columns", block_p, tile, block_k, warps, stages) for tile, warps, stages in tiles]


_SMALL = ((32, 1, 3), (16, 1, 1), (64, 4, 2))
MEASURED: dict[tuple[Direction, int, int], list[Configuration]] = {
    ("forward", 16, 16): _columns(16, 16, (16, 1, 1)),
    ("backward", 16, 16): [Configuration("rows", 16, 16, 16, 1, 1), *_columns(16, 16, (16, 1, 1))],
    ("forward", 32, 16): _columns(32, 16, (32, 1, 3), (16, 1, 2)),
    ("backward", 32, 16): _columns(32, 16, (32, 1, 3)),
    ("forward", 32, 32): _columns(32, 32, (16, 1, 1), (16, 2, 1)),
    ("backward", 32, 32): [Configuration("rows", 32, 16, 32, 1, 1), *_columns(32, 32, (16, 2, 3))],
    ("forward", 64, 16): _columns(64, 16, *_SMALL),
    ("backward", 64, 16): _columns(64, 16, *_SMALL),
    ("forward", 128, 32): _columns(128, 32, (64, 4, 2), (32, 2, 3)),
    ("backward", 128, 32): _columns(128, 32, (64, 4, 2), (16, 2, 4)),
    ("forward", 128, 64): _columns(128, 64, (64, 4, 3), (32, 4, 3)),
    ("backward", 128, 64): _columns(128, 64, (32, 4, 4)),
    ("forward", 256, 64): _columns(256, 64, (16, 4, 4), (32, 8, 3)),
    ("backward", 256, 64): _columns(256, 64, (32, 8, 4)),
    ("forward", 512, 32): _columns(512, 32, (32, 4, 3)),
}
"""By padded p and K, in half precision: tile, warps and stages of the fastest of a grid on an H100
(benchmarks/fm_tune.py, benchmarks/results/fm_tune.csv). Other shapes take the rule of `configurations`."""
MEASURED_ROWS: dict[tuple[Direction, int, int], list[Configuration]] = {
    ("backward", 128, 32): [Configuration("rows", 128, 128, 32, 8, 3)],
}
"""The same by padded q and K, for p beyond every block."""

_STAGES: dict[tuple[Direction, Precision, Schedule, int, int, int], int] = {
    ("backward", "half", "columns", 128, 16, 128): 3,
    ("forward", "half", "rows", 32, 32, 16): 3,
    ("backward", "half", "rows", 32, 16, 32): 3,
    ("backward", "half", "rows", 32, 32, 128): 3,
    ("backward", "ieee", "columns", 16, 16, 16): 3,
    ("backward", "tf32", "columns", 128, 32, 32): 1,
}
"""Stages of the tiles (.., block_p, block_q, block_k) of which two make some variant spill; found by compiling."""


def precision_of(dtype: torch.dtype) -> Precision:
    """How products of this dtype are taken: float32 follows torch.backends.cuda.matmul.allow_tf32."""
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def configurations(direction: Direction, p: int, q: int, k: int, precision: Precision) -> list[Configuration]:
    """Candidates for the autotuner, likeliest first; empty where no kernel covers the shape.

    Where nothing was measured, columns of A stream while p K values fit in registers, its rows while q K do. Of
    every tile size the fewest warps that hold it are taken.
    """
    block_k = _block(k, BLOCKS_K)
    if precision == "half":
        measured = MEASURED.get((direction, _block(p, (*BLOCKS_P, 512)), block_k))
        if not measured and p > BLOCKS_P[-1]:
            measured = MEASURED_ROWS.get((direction, _block(q, BLOCKS_Q), block_k))
        if measured:
            return [c for c in measured if c.schedule == "columns" or q <= c.block_q]
    resident: dict[Schedule, int] = {"columns": _block(p, BLOCKS_P), "rows": _block(q, BLOCKS_Q)}
    for schedule, held in resident.items():
        budget = _BUDGETS.get((schedule, precision))
        if not (budget and held and block_k):
            continue
        found = []
        for tile in budget.tiles:
            block_p, block_q = (held, tile) if schedule == "columns" else (tile, held)
            stages = _STAGES.get((direction, precision, schedule, block_p, block_q, block_k), 2)
            options = (Configuration(schedule, block_p, block_q, block_k, warps, stages) for warps in (4, 8))
            found += [c for c in options if _fits(c, direction, precision, budget.live)][:1]
        if found:
            return found[: budget.candidates]
    return []


def _block(size: int, blocks: tuple[int, ...]) -> int:
    return next((block for block in blocks if size <= block), 0)


def _fits(c: Configuration, direction: Direction, precision: Precision, budget: int) -> bool:
    """Whether live values and staged tiles, as the source holds them, fit a thread and a block."""
    itemsize = 2 if precision == "half" else 4
    pk, qk, pq = c.block_p * c.block_k, c.block_q * c.block_k, c.block_p * c.block_q
    gradients = 2 if direction == "backward" else 1
    accumulators = pk + gradients * qk + (pq if direction == "backward" else 0)
    operands = gradients * pk * itemsize // 4
    norm = 2 * pk if c.schedule == "rows" else 0
    live = (accumulators + operands + norm) / (32 * c.warps)
    staged = itemsize * (gradients * (pk + qk) + c.stages * pq)
    return live <= budget and 1.4 * staged <= SHARED_MEMORY
