"""Finding and loading the checkpoints of a run, without writing anything."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.distributed.checkpoint.blocks import BlockLoader, Piece
from c2al.distributed.checkpoint.manifest import DTYPES, MARKER, TENSORS, Manifest, StoredTensors, finished
from c2al.distributed.checkpoint.state import (
    average_key,
    column_blocks_of,
    compare,
    compare_arithmetic,
    model_key,
    signature_of,
    wanted_state,
)
from c2al.distributed.checkpoint.storage import RawReader
from c2al.distributed.optim import Optimizer
from c2al.distributed.process import World
from c2al.errors import CheckpointError

T = TypeVar("T")
ATTEMPTS = 10
"""How often the newest checkpoint may be deleted while it is read."""


class CheckpointReader:
    """Finds and loads the checkpoints of one run, while the run goes on or from read-only storage.

    All methods are collective. `directory` must be the same storage on every host.
    """

    def __init__(self, directory: Path, world: World):
        self._directory, self._world = directory, world
        self._warned: set[str] = set()

    def finished(self) -> list[tuple[Path, Manifest]]:
        """Folder and manifest of every finished checkpoint by ascending step, the same on every rank.

        Damaged ones are passed over, with a warning that names them. Raises CheckpointError when all
        that there are are damaged, or `directory` cannot be read.
        """

        def look() -> list[tuple[Path, Manifest]]:
            good, damaged = finished(self._directory)
            if damaged and not good:
                raise CheckpointError("\n".join(damaged))
            for line in damaged:
                if line not in self._warned:
                    logging.getLogger(__name__).warning("passed over a damaged checkpoint: %s", line)
                    self._warned.add(line)
            return good

        return self._world.once(look)

    def latest(self) -> Path | None:
        """Folder of the finished checkpoint with the highest step; None without any. Raises as `finished`."""
        found = self.finished()
        return found[-1][0] if found else None

    def best(self) -> Path | None:
        """Folder of the finished checkpoint with the lowest validation NE, of equals the later; None without any."""
        ranked = sorted((m.ne, -m.step, path) for path, m in self.finished() if m.ne is not None)
        return ranked[0][2] if ranked else None

    def with_newest(self, action: Callable[[Path], T], *, best: bool = False) -> T:
        """What `action`, which is collective, makes of the newest checkpoint, or of the `best` if there is one.

        A training run may delete the checkpoint meanwhile; then `action` gets the newest again.
        Raises CheckpointError when there is no checkpoint, and what `action` raises.
        """
        for _ in range(ATTEMPTS):
            path = (self.best() if best else None) or self.latest()
            if path is None:
                raise CheckpointError(f"{self._directory}: holds no checkpoint")
            try:
                return action(path)
            except CheckpointError:
                if not self._world.once(lambda path=path: _gone(path)):  # type: ignore[misc]
                    raise
        raise CheckpointError(f"{self._directory}: {ATTEMPTS} checkpoints were deleted while they were read")

    def load(
        self,
        path: Path,
        dmp: DistributedModelParallel,
        optimizer: Optimizer | None = None,
        *,
        same_arithmetic: bool = False,
    ) -> dict[str, Any]:
        """Fills the model, and the optimizer if given, from a checkpoint; returns its `extra`.

        `same_arithmetic` is for a run that goes on: every table must have as many column blocks as
        when it was saved.

        Raises CheckpointError on every rank. A missing or damaged file, another model (naming the
        parameter and both shapes) and another arithmetic are found before any tensor is changed.
        """
        world = self._world

        def check() -> tuple[Manifest, StoredTensors]:
            manifest, stored = _opened(path, world.rank, world.size)
            compare(path, manifest.model, signature_of(dmp))
            if same_arithmetic:
                compare_arithmetic(path, manifest.column_blocks, column_blocks_of(dmp))
            return manifest, stored

        manifest, stored = world.together(check)
        state, finish = wanted_state(dmp, optimizer, stored.tensors)
        run_dcp(
            path,
            "loaded",
            lambda: dcp_load(
                state, storage_reader=RawReader(path, stored), planner=BlockLoader(), process_group=world.control
            ),
        )
        for step in finish:
            step()
        if optimizer is not None:
            optimizer.load_state_dict(manifest.optimizer)
        return manifest.extra


def load_unsharded(path: Path) -> dict[str, torch.Tensor]:
    """The model of a checkpoint as whole CPU tensors by parameter name; needs no process group.

    Dense weights are the moving averages where the checkpoint has them.

    Raises CheckpointError as `CheckpointReader.load` does.
    """
    manifest, stored = _opened(path)
    tensors = {}
    keys = {n: average_key(n) if average_key(n) in stored.tensors else model_key(n) for n in manifest.model}
    for name, shape in manifest.model.items():
        tensor = stored.tensors.get(keys[name])
        if tensor is None or tensor.size != shape:
            raise CheckpointError(f"{path / TENSORS}: damaged: parameter '{name}' is not there as {list(shape)}")
        tensors[name] = torch.empty(shape, dtype=DTYPES[tensor.dtype])
    state = {keys[name]: [Piece.whole(tensor)] for name, tensor in tensors.items()}
    reader = RawReader(path, stored)
    with warnings.catch_warnings():
        # DCP warns that it assumes a single process, which no_dist has just told it.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        run_dcp(path, "loaded", lambda: dcp_load(state, storage_reader=reader, planner=BlockLoader(), no_dist=True))
    return tensors


def run_dcp(path: Path, verb: str, action: Callable[[], Any]) -> None:
    """Runs a collective of DCP, which raises the failures of all ranks on each, as a CheckpointError."""
    try:
        action()
    except CheckpointException as e:
        rank, (cause, _) = min(e.failures.items())
        raise CheckpointError(f"{path}: cannot be {verb}: rank {rank}: {cause}") from e


def _opened(path: Path, rank: int = 0, size: int = 1) -> tuple[Manifest, StoredTensors]:
    """The two state files of a checkpoint, once this rank's share of its files has shown the right checksums."""
    manifest = Manifest.read(path)
    try:
        if TENSORS not in manifest.files:
            raise CheckpointError(f"{path / MARKER}: damaged: it does not list {TENSORS}")
        manifest.verify(path, rank, size)
        return manifest, StoredTensors.read(path, manifest.files)
    except CheckpointError as e:
        if _gone(path):
            raise CheckpointError(f"{path}: was deleted while it was read") from e
        raise


def _gone(path: Path) -> bool:
    return not (path / MARKER).exists()
