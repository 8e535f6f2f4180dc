"""A sharded model and its optimizer as a mapping from key to the blocks that this rank writes or wants."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.distributed.checkpoint.blocks import Piece
from c2al.distributed.optim import Optimizer
from c2al.distributed.placement import plan_arithmetic
from c2al.distributed.process import World
from c2al.distributed.tables import Table, drop_caches, local_tables, plan_of
from c2al.errors import CheckpointError

_PART = 2**24
"""Values whose finiteness is checked at once."""


def model_key(name: str) -> str:
    return f"model/{name}"


def average_key(name: str) -> str:
    """Of the moving average of a dense parameter."""
    return f"ema/{name}"


def moment_key(table: str, first: int, last: int) -> str:
    """Of the moments of a table's columns from `first` to before `last`; `table` is the name of its weight."""
    return f"moment/{table}/{first}-{last}"


def _moment_prefix(table: Table) -> str:
    return f"moment/{table.name}/"


def _dense_tensors(dmp: DistributedModelParallel, tables: list[Table]) -> dict[str, torch.Tensor]:
    names = {t.name for t in tables}
    return {name: value for name, value in dmp.module.state_dict().items() if name not in names}


Shapes = dict[str, tuple[int, ...]]


def signature_of(dmp: DistributedModelParallel) -> Shapes:
    """Shape of every parameter and buffer by name, of a table the shape before sharding."""
    tables = local_tables(dmp)
    shapes: Shapes = {t.name: (t.rows, t.dim) for t in tables}
    return shapes | {name: tuple(value.shape) for name, value in _dense_tensors(dmp, tables).items()}


def column_blocks_of(dmp: DistributedModelParallel) -> dict[str, int]:
    """Table -> number of column blocks with row-wise Adagrad moments of their own."""
    return plan_arithmetic(plan_of(dmp), get_local_size())


def compare(path: Path, saved: Shapes, model: Shapes) -> None:
    """Raises CheckpointError naming every parameter whose shape differs, with both shapes."""

    def shown(shapes: Shapes, name: str) -> str:
        return str(list(shapes[name])) if name in shapes else "none"

    problems = [
        f"{path}: parameter '{name}' has shape {shown(saved, name)} in the checkpoint, "
        f"{shown(model, name)} in the model"
        for name in sorted(saved.keys() | model.keys())
        if saved.get(name) != model.get(name)
    ]
    if problems:
        raise CheckpointError("\n".join(["checkpoint of another model", *problems]))


def compare_arithmetic(path: Path, saved: dict[str, int], plan: dict[str, int]) -> None:
    """Raises CheckpointError naming every table that the checkpoint split into another number of column blocks.

    Row-wise Adagrad keeps one moment per row and column block, so the run would go on with other
    updates than it began with.
    """
    problems = [
        f"{path}: table '{table}' was trained in {saved.get(table)} column blocks, and dist.* now splits it into {n}"
        for table, n in sorted(plan.items())
        if saved.get(table) != n
    ]
    if problems:
        raise CheckpointError(
            "\n".join(
                [
                    *problems,
                    "row-wise Adagrad would go on differently; set dist.plan to the plan.json of the run, "
                    "or dist.sharding and dist.tables so that the tables have as many column blocks as before",
                ]
            )
        )


def staged(state: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
    """A copy of the state in host memory, which training cannot change any more."""
    return {
        key: [Piece(p.tensor.detach().to("cpu", copy=True), p.offset, p.size) for p in pieces]
        for key, pieces in state.items()
    }


def not_finite(state: dict[str, list[Piece]]) -> list[str]:
    """Keys of the tensors that hold a value that is not finite."""
    return [
        key
        for key, pieces in state.items()
        if any(not _finite(p.tensor.detach()) for p in pieces if p.tensor.is_floating_point())
    ]


def _finite(tensor: torch.Tensor) -> bool:
    # In parts, since isfinite makes a tensor of truth values a quarter as large as its operand.
    flat = tensor.reshape(-1)
    return all(bool(flat[i : i + _PART].isfinite().all()) for i in range(0, len(flat), _PART))


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
            key = moment_key(table.name, block.column, block.column + width)
            state.setdefault(key, []).append(Piece(moment_R[mine], (row,), (table.rows,)))
    whole = {model_key(name): value for name, value in _dense_tensors(dmp, tables).items()}
    whole |= {f"adam/{name}": value for name, value in optimizer.dense_state().items()}
    whole |= {average_key(name): value for name, value in optimizer.averages.items()}
    for i, (key, tensor) in enumerate(sorted(whole.items())):
        if i % world.size == world.rank:
            state[key] = [Piece.whole(tensor)]
    return state


def wanted_state(
    dmp: DistributedModelParallel, optimizer: Optimizer | None, saved: Iterable[str]
) -> tuple[dict[str, list[Piece]], list[Callable[[], None]]]:
    """What this rank reads, straight into live tensors, and what remains to be done after reading.

    `saved` are the keys of the checkpoint. Without an optimizer the model is not for training, so its
    dense weights are the moving averages where the checkpoint has them.
    """
    saved = set(saved)
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
                columns = re.fullmatch(re.escape(_moment_prefix(table)) + r"(\d+)-(\d+)", key)
                if not columns:
                    continue
                first, last = map(int, columns.groups())
                shared = min(last, block.column + width) - max(first, block.column)
                if shared > 0:
                    if (key, block.row) not in read:
                        read[key, block.row] = torch.empty(height)
                        state.setdefault(key, []).append(Piece(read[key, block.row], (block.row,), (table.rows,)))
                    parts.append((shared / width, read[key, block.row]))
            finish.append(lambda moment_R=moment_R, parts=parts: _combine(moment_R, parts))  # type: ignore[misc]
    for name, value in _dense_tensors(dmp, tables).items():
        key = model_key(name)
        if optimizer is None and average_key(name) in saved:
            key = average_key(name)
        state[key] = [Piece.whole(value)]
    if optimizer is not None:
        for name, value in optimizer.dense_state().items():
            state[f"adam/{name}"] = [Piece.whole(value)]
        for name, value in optimizer.averages.items():
            state[average_key(name)] = [Piece.whole(value)]
    finish.append(lambda: drop_caches(dmp))
    return state, finish


def _combine(moment_R: torch.Tensor, parts: list[tuple[float, torch.Tensor]]) -> None:
    moment_R.copy_(sum(share * part_R for share, part_R in parts))  # type: ignore[arg-type]
