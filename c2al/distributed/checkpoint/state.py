"""A sharded model and its optimizer as a mapping from key to the blocks that this rank writes or wants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.distributed.checkpoint.blocks import Piece
from c2al.distributed.optim import Optimizer
from c2al.distributed.process import World
from c2al.distributed.tables import Table, local_tables
from c2al.errors import CheckpointError


def model_key(name: str) -> str:
    return f"model/{name}"


def _moment_prefix(table: Table) -> str:
    return f"moment/{table.name}/"


def _dense_tensors(dmp: DistributedModelParallel, tables: list[Table]) -> dict[str, torch.Tensor]:
    names = {t.name for t in tables}
    return {name: value for name, value in dmp.module.state_dict().items() if name not in names}


def signature_of(dmp: DistributedModelParallel) -> dict[str, list[int]]:
    tables = local_tables(dmp)
    shapes = {t.name: [t.rows, t.dim] for t in tables}
    return shapes | {name: list(value.shape) for name, value in _dense_tensors(dmp, tables).items()}


def compare(path: Path, saved: dict[str, list[int]], model: dict[str, list[int]]) -> None:
    problems = [
        f"{path}: parameter '{name}' has shape {saved.get(name, 'none')} in the checkpoint, "
        f"{model.get(name, 'none')} in the model"
        for name in sorted(saved.keys() | model.keys())
        if saved.get(name) != model.get(name)
    ]
    if problems:
        raise CheckpointError("\n".join(["checkpoint of another model", *problems]))


def saved_state(dmp: DistributedModelParallel, optimizer: Optimizer, world: World) -> dict[str, list[Piece]]:
    """What this rank writes: the blocks it owns, and its share of what is replicated."""
    tables = local_tables(dmp)
    state: dict[str, list[Piece]] = {}
    for table in tables:
        for block in table.blocks:
            height, width = block.weight_RD.shape
            moment_R = block.moment_R if block.moment_R is not None else optimizer.replicated_moments[table.name]
            mine = slice(0, height)
            if table.replicated:
                mine = slice(height * world.rank // world.size, height * (world.rank + 1) // world.size)
            if mine.start == mine.stop:
                continue
            row = block.row + mine.start
            state.setdefault(model_key(table.name), []).append(
                Piece(block.weight_RD[mine], (row, block.column), (table.rows, table.dim))
            )
            key = f"{_moment_prefix(table)}{block.column}-{block.column + width}"
            state.setdefault(key, []).append(Piece(moment_R[mine], (row,), (table.rows,)))
    whole = {model_key(name): value for name, value in _dense_tensors(dmp, tables).items()}
    whole |= {f"adam/{name}": value for name, value in optimizer.dense_state().items()}
    for i, (key, tensor) in enumerate(sorted(whole.items())):
        if i % world.size == world.rank:
            state[key] = [Piece.whole(tensor)]
    return state


def wanted_state(
    dmp: DistributedModelParallel, optimizer: Optimizer | None, saved: dict[str, Any]
) -> tuple[dict[str, list[Piece]], list[Callable[[], None]]]:
    """What this rank reads, straight into live tensors, and what remains to be done after reading."""
    tables = local_tables(dmp)
    state: dict[str, list[Piece]] = {}
    finish: list[Callable[[], None]] = []
    read: dict[tuple[str, int], torch.Tensor] = {}  # column blocks of one table share what they read
    for table in tables:
        for block in table.blocks:
            state.setdefault(model_key(table.name), []).append(
                Piece(block.weight_RD, (block.row, block.column), (table.rows, table.dim))
            )
            if optimizer is None:
                continue
            height, width = block.weight_RD.shape
            moment_R = block.moment_R if block.moment_R is not None else optimizer.replicated_moments[table.name]
            parts = []
            for key in saved:
                if not key.startswith(_moment_prefix(table)):
                    continue
                first, last = map(int, key.removeprefix(_moment_prefix(table)).split("-"))
                shared = min(last, block.column + width) - max(first, block.column)
                if shared > 0:
                    if (key, block.row) not in read:
                        read[key, block.row] = torch.empty(height)
                        state.setdefault(key, []).append(Piece(read[key, block.row], (block.row,), (table.rows,)))
                    parts.append((shared / width, read[key, block.row]))
            finish.append(lambda moment_R=moment_R, parts=parts: _combine(moment_R, parts))  # type: ignore[misc]
    for name, value in _dense_tensors(dmp, tables).items():
        state[model_key(name)] = [Piece.whole(value)]
    if optimizer is not None:
        for name, value in optimizer.dense_state().items():
            state[f"adam/{name}"] = [Piece.whole(value)]
    return state, finish


def _combine(moment_R: torch.Tensor, parts: list[tuple[float, torch.Tensor]]) -> None:
    moment_R.copy_(sum(share * part_R for share, part_R in parts))  # type: ignore[arg-type]
