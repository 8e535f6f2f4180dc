"""Checkpoints that load on another number of ranks and under another sharding plan.

A checkpoint holds tensors in a form no plan appears in: every table as rows x columns, its row-wise
Adagrad moments as one vector of rows for each range of columns that had its own, and the dense part
with Adam's state. A rank writes the blocks it owns (torch.distributed.checkpoint) and reads those it
wants. The rule for moments: a block's moment is the mean of the saved ones over the block's columns,
each weighted by the columns it shares with the block. It follows from what a moment is (the mean of
g^2 over columns), is exact whenever the column ranges are the same, and exact from a split table to
a whole one; from a whole one to a split one it is the best estimate there is.

    DIRECTORY/step-00000200/   .metadata, __RANK_N.distcp (DCP), complete.json

complete.json is written last and carries step, NE, the caller's `extra`, the model's signature, and
size and SHA-256 of every other file. The folder gets its name only then, so a name means a whole
checkpoint, at whatever instant the writer was killed.
"""

import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.config import CheckpointConfig
from c2al.distributed.blocks import BlockLoader, BlockSaver, Piece
from c2al.distributed.optim import Optimizer
from c2al.distributed.process import World
from c2al.distributed.tables import Table, local_tables
from c2al.errors import CheckpointError
from c2al.files import write_atomically

MARKER = "complete.json"
FORMAT = 1
_HIDDEN = ".unfinished-"
"""Prefix of folders being written or deleted; never loaded, removed at the next start."""


@dataclass(frozen=True)
class Manifest:
    """Content of complete.json."""

    step: int
    ne: float | None
    extra: dict[str, Any]
    optimizer: dict[str, Any]
    model: dict[str, list[int]]
    """Shape of every parameter and buffer."""
    files: dict[str, tuple[int, str]]
    """Name -> (bytes, SHA-256)."""

    def write(self, folder: Path) -> None:
        write_atomically(folder / MARKER, json.dumps({"format": FORMAT} | self.__dict__, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises CheckpointError when `folder` is no finished checkpoint of this format."""
        path = folder / MARKER
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree.pop("format") != FORMAT:
                raise CheckpointError(f"{path}: written in another format than {FORMAT}")
            tree["files"] = {name: (int(size), str(digest)) for name, (size, digest) in tree["files"].items()}
            return cls(**tree)
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: no finished checkpoint, {MARKER} is missing") from None
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{path}: damaged: {e!r}") from e

    def verify(self, folder: Path, rank: int = 0, size: int = 1) -> None:
        """Compares this rank's share of the files with their checksums; raises CheckpointError naming one."""
        for name, (length, digest) in sorted(self.files.items())[rank::size]:
            path = folder / name
            try:
                if path.stat().st_size != length:
                    raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes instead of {length}")
                if _digest(path) != digest:
                    raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one {MARKER} names")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: shard file is missing") from None
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e


class Checkpointer:
    """Writes, finds and loads the checkpoints of one run.

    All methods are collective. `directory` must be the same storage on every host. A failed write is
    raised on every rank: at once when writing synchronously, else by the next `save` or `wait`.
    """

    def __init__(self, directory: str | os.PathLike[str], config: CheckpointConfig, world: World):
        """Creates `directory` and removes what an earlier, killed writer left unfinished.

        Raises CheckpointError when it cannot.
        """
        self._directory, self._config, self._world = Path(directory), config, world
        # Collectives of a background write must not meet those of training in one group.
        self._group = world.new_control_group()
        self._write: _Background | None = None

        def clean() -> None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                for left_over in self._directory.glob(f"{_HIDDEN}*"):
                    shutil.rmtree(left_over)
            except OSError as e:
                raise CheckpointError(f"{self._directory}: cannot be used for checkpoints: {e.strerror}") from e

        world.once(clean)

    def save(
        self,
        step: int,
        dmp: DistributedModelParallel,
        optimizer: Optimizer,
        extra: dict[str, Any],
        ne: float | None = None,
    ) -> None:
        """Writes step-STEP. `extra` (rank 0's) is JSON: whatever else a resumed run needs, e.g. the
        data position; `ne` ranks the checkpoint for `keep_best`.

        When asynchronous, returns once this rank's share is copied to host memory, as much again as
        it holds; a write still going on is awaited first.
        A step that is already there keeps its tensors (the run is at the same place) and gets the
        new `extra` and `ne`. Raises CheckpointError.
        """
        self.wait()
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"{self._directory}: extra is not JSON: {e}") from e
        state = _saved_state(dmp, optimizer, self._world)
        if self._config.asynchronous:
            state = {
                k: [Piece(p.tensor.detach().to("cpu", copy=True), p.offset, p.size) for p in v]
                for k, v in state.items()
            }
        manifest = Manifest(step, ne, extra, optimizer.state_dict(), _signature(dmp), {})
        write = _Background(lambda: self._save(state, manifest))
        if self._config.asynchronous:
            self._write = write
            write.start()
        else:
            write.run()
            write.result()

    def wait(self) -> None:
        """Returns when no write is going on; raises CheckpointError if the last one failed."""
        if self._write is not None:
            write, self._write = self._write, None
            write.join()
            write.result()

    def latest(self) -> Path | None:
        """Folder of the finished checkpoint with the highest step, the same on every rank."""
        self.wait()
        found: list[Path] = self._once(lambda: [path for path, _ in self._finished()])
        return found[-1] if found else None

    def load(self, path: Path, dmp: DistributedModelParallel, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Fills the model, and the optimizer if given, from a checkpoint; returns its `extra`.

        Raises CheckpointError on every rank, and before any tensor is changed: a file missing or
        damaged, or a checkpoint of another model (naming the parameter and both shapes).
        """
        world = self._world

        def check() -> Manifest:
            manifest = Manifest.read(path)
            _compare(path, manifest.model, _signature(dmp))
            manifest.verify(path, world.rank, world.size)
            return manifest

        manifest = world.together(check)
        reader = FileSystemReader(path)
        saved = reader.read_metadata().state_dict_metadata
        state, finish = _wanted_state(dmp, optimizer, saved)
        _run_dcp(
            path,
            "loaded",
            lambda: dcp_load(state, storage_reader=reader, planner=BlockLoader(), process_group=world.control),
        )
        for step in finish:
            step()
        if optimizer is not None:
            optimizer.load_state_dict(manifest.optimizer)
        return manifest.extra

    def _save(self, state: dict[str, list[Piece]], manifest: Manifest) -> None:
        target = self._directory / f"step-{manifest.step:08d}"
        unfinished = self._directory / f"{_HIDDEN}{target.name}"
        try:
            if self._once(lambda: self._renew(target, manifest)):
                return
            self._once(lambda: unfinished.mkdir())
            _run_dcp(
                target,
                "written",
                lambda: dcp_save(
                    state,
                    storage_writer=FileSystemWriter(unfinished),
                    planner=BlockSaver(),
                    process_group=self._group,
                ),
            )
            files = self._checksums(unfinished)
            self._once(lambda: self._finish(unfinished, target, Manifest(**manifest.__dict__ | {"files": files})))
        except CheckpointError:
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs its room back
            raise

    def _once(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 and gives all ranks its result, or its failure as a CheckpointError."""

        def careful() -> Any:
            try:
                return action()
            except OSError as e:
                raise CheckpointError(f"{e.filename or self._directory}: cannot be written: {e.strerror}") from e

        return self._world.once(careful, self._group)

    def _renew(self, target: Path, manifest: Manifest) -> bool:
        if not target.exists():
            return False
        old = Manifest.read(target)
        Manifest(**manifest.__dict__ | {"files": old.files}).write(target)
        self._retain()
        return True

    def _checksums(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Name -> (bytes, SHA-256) of all files, each read back by the rank that wrote it."""
        prefixes = (f"__{self._world.rank}_",) + ((".metadata",) if self._world.rank == 0 else ())

        def digests() -> dict[str, tuple[int, str]]:
            files = (path for path in sorted(folder.iterdir()) if path.name.startswith(prefixes))
            try:
                return {path.name: (path.stat().st_size, _digest(path)) for path in files}
            except OSError as e:
                raise CheckpointError(f"{e.filename}: cannot be read back: {e.strerror}") from e

        mine = self._world.together(digests, self._group)
        everyone: list[dict[str, tuple[int, str]]] = [{}] * self._world.size
        dist.all_gather_object(everyone, mine, group=self._group)
        return {name: entry for files in everyone for name, entry in files.items()}

    def _finish(self, unfinished: Path, target: Path, manifest: Manifest) -> None:
        manifest.write(unfinished)
        _sync(unfinished)
        unfinished.rename(target)
        _sync(self._directory)
        self._retain()

    def _retain(self) -> None:
        finished = self._finished()
        keep = {path for path, _ in finished[-self._config.keep_last :]}
        ranked = sorted((m.ne, -m.step, path) for path, m in finished if m.ne is not None)
        keep |= {path for _, _, path in ranked[: self._config.keep_best]}
        for path, _ in finished:
            if path not in keep:
                doomed = path.with_name(f"{_HIDDEN}{path.name}")
                path.rename(doomed)  # half a checkpoint must not carry a checkpoint's name
                shutil.rmtree(doomed)

    def _finished(self) -> list[tuple[Path, Manifest]]:
        """Finished checkpoints by ascending step."""
        found = [(path, Manifest.read(path)) for path in self._directory.glob("step-*")]
        return sorted(found, key=lambda entry: entry[1].step)


def load_unsharded(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The model of a checkpoint as whole CPU tensors by parameter name; needs no process group.

    Raises CheckpointError as `Checkpointer.load` does.
    """
    folder = Path(path)
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    reader = FileSystemReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, shape in manifest.model.items():
        metadata = saved[_model_key(name)]
        assert isinstance(metadata, TensorStorageMetadata)
        tensors[name] = torch.empty(shape, dtype=metadata.properties.dtype)
    state = {_model_key(name): [Piece.whole(tensor)] for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        # DCP warns that it assumes a single process, which no_dist has just told it.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        _run_dcp(folder, "loaded", lambda: dcp_load(state, storage_reader=reader, planner=BlockLoader(), no_dist=True))
    return tensors


class _Background(threading.Thread):
    """Runs an action and keeps its error. A daemon: a run that fails elsewhere ends without waiting
    for the write, which leaves nothing but an unfinished folder."""

    def __init__(self, action: Callable[[], None]):
        super().__init__(name="c2al-checkpoint", daemon=True)
        self._action = action
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._action()
        except BaseException as e:
            self._error = e

    def result(self) -> None:
        if self._error is not None:
            raise self._error


def _model_key(name: str) -> str:
    return f"model/{name}"


def _moment_prefix(table: Table) -> str:
    return f"moment/{table.name}/"


def _dense_tensors(dmp: DistributedModelParallel, tables: list[Table]) -> dict[str, torch.Tensor]:
    names = {t.name for t in tables}
    return {name: value for name, value in dmp.module.state_dict().items() if name not in names}


def _signature(dmp: DistributedModelParallel) -> dict[str, list[int]]:
    tables = local_tables(dmp)
    shapes = {t.name: [t.rows, t.dim] for t in tables}
    return shapes | {name: list(value.shape) for name, value in _dense_tensors(dmp, tables).items()}


def _compare(path: Path, saved: dict[str, list[int]], model: dict[str, list[int]]) -> None:
    problems = [
        f"{path}: parameter '{name}' has shape {saved.get(name, 'none')} in the checkpoint, "
        f"{model.get(name, 'none')} in the model"
        for name in sorted(saved.keys() | model.keys())
        if saved.get(name) != model.get(name)
    ]
    if problems:
        raise CheckpointError("\n".join(["checkpoint of another model", *problems]))


def _saved_state(dmp: DistributedModelParallel, optimizer: Optimizer, world: World) -> dict[str, list[Piece]]:
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
            state.setdefault(_model_key(table.name), []).append(
                Piece(block.weight_RD[mine], (row, block.column), (table.rows, table.dim))
            )
            key = f"{_moment_prefix(table)}{block.column}-{block.column + width}"
            state.setdefault(key, []).append(Piece(moment_R[mine], (row,), (table.rows,)))
    whole = {_model_key(name): value for name, value in _dense_tensors(dmp, tables).items()}
    whole |= {f"adam/{name}": value for name, value in optimizer.dense_state().items()}
    for i, (key, tensor) in enumerate(sorted(whole.items())):
        if i % world.size == world.rank:
            state[key] = [Piece.whole(tensor)]
    return state


def _wanted_state(
    dmp: DistributedModelParallel, optimizer: Optimizer | None, saved: dict[str, Any]
) -> tuple[dict[str, list[Piece]], list[Callable[[], None]]]:
    """What this rank reads, straight into live tensors, and what remains to be done after reading."""
    tables = local_tables(dmp)
    state: dict[str, list[Piece]] = {}
    finish: list[Callable[[], None]] = []
    read: dict[tuple[str, int], torch.Tensor] = {}  # column blocks of one table share what they read
    for table in tables:
        for block in table.blocks:
            state.setdefault(_model_key(table.name), []).append(
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
        state[_model_key(name)] = [Piece.whole(value)]
    if optimizer is not None:
        for name, value in optimizer.dense_state().items():
            state[f"adam/{name}"] = [Piece.whole(value)]
    return state, finish


def _combine(moment_R: torch.Tensor, parts: list[tuple[float, torch.Tensor]]) -> None:
    moment_R.copy_(sum(share * part_R for share, part_R in parts))  # type: ignore[arg-type]


def _run_dcp(path: Path, verb: str, action: Callable[[], Any]) -> None:
    """DCP collects the failures of all ranks and raises them on each."""
    try:
        action()
    except CheckpointException as e:
        rank, (cause, _) = min(e.failures.items())
        raise CheckpointError(f"{path}: cannot be {verb}: rank {rank}: {cause}") from e


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
