"""Writes, finds and loads the checkpoints of one run."""

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
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
from c2al.distributed.checkpoint.blocks import BlockLoader, BlockSaver, Piece
from c2al.distributed.checkpoint.manifest import Manifest, digest_of
from c2al.distributed.checkpoint.state import compare, model_key, saved_state, signature_of, wanted_state
from c2al.distributed.optim import Optimizer
from c2al.distributed.process import World
from c2al.errors import CheckpointError

_HIDDEN = ".unfinished-"
"""Prefix of folders being written or deleted; never loaded, removed at the next start."""


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
        state = saved_state(dmp, optimizer, self._world)
        if self._config.asynchronous:
            state = {
                k: [Piece(p.tensor.detach().to("cpu", copy=True), p.offset, p.size) for p in v]
                for k, v in state.items()
            }
        manifest = Manifest(step, ne, extra, optimizer.state_dict(), signature_of(dmp), {})
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
            compare(path, manifest.model, signature_of(dmp))
            manifest.verify(path, world.rank, world.size)
            return manifest

        manifest = world.together(check)
        reader = FileSystemReader(path)
        saved = reader.read_metadata().state_dict_metadata
        state, finish = wanted_state(dmp, optimizer, saved)
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
                return {path.name: (path.stat().st_size, digest_of(path)) for path in files}
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
        metadata = saved[model_key(name)]
        assert isinstance(metadata, TensorStorageMetadata)
        tensors[name] = torch.empty(shape, dtype=metadata.properties.dtype)
    state = {model_key(name): [Piece.whole(tensor)] for name, tensor in tensors.items()}
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


def _run_dcp(path: Path, verb: str, action: Callable[[], Any]) -> None:
    """DCP collects the failures of all ranks and raises them on each."""
    try:
        action()
    except CheckpointException as e:
        rank, (cause, _) = min(e.failures.items())
        raise CheckpointError(f"{path}: cannot be {verb}: rank {rank}: {cause}") from e


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
