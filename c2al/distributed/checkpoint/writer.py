"""Writing the checkpoints of a run, and deleting those that are not to be kept."""

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torchrec.distributed.model_parallel import DistributedModelParallel

from c2al.config import CheckpointConfig
from c2al.distributed.checkpoint.blocks import BlockSaver, Piece
from c2al.distributed.checkpoint.manifest import (
    HIDDEN,
    TENSORS,
    Manifest,
    StoredFile,
    digest_of,
    finished,
    folder_name,
)
from c2al.distributed.checkpoint.reader import run_dcp
from c2al.distributed.checkpoint.state import column_blocks_of, not_finite, saved_state, signature_of, staged
from c2al.distributed.checkpoint.storage import RawWriter, file_name
from c2al.distributed.optim import Optimizer
from c2al.distributed.process import CLOSE_SECONDS, World
from c2al.errors import C2ALError, CheckpointError, NotFiniteError


class CheckpointWriter:
    """Writes the checkpoints of one run.

    All methods but `close` are collective. `directory` must be the same storage on every host, and
    this must be its only writer. A failed write is raised on every rank: at once when writing
    synchronously, else by the next `save` or `wait`.

        with CheckpointWriter(run / "checkpoints", config.train.checkpoint, world) as checkpoints:
            ...
            checkpoints.save(step, model, optimizer, {"step": step}, loss=loss_T)
    """

    def __init__(self, directory: Path, config: CheckpointConfig, world: World):
        """Creates `directory` and removes what an earlier, killed writer left unfinished.

        Raises CheckpointError when it cannot.
        """
        self._directory, self._config, self._world = directory, config, world
        # Collectives of a background write must not meet those of training in one group.
        self._group = world.new_control_group()
        self._write: _Background | None = None

        def clean() -> None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                for left_over in self._directory.glob(f"{HIDDEN}*"):
                    shutil.rmtree(left_over)
            except OSError as e:
                raise CheckpointError(f"{self._directory}: cannot be used for checkpoints: {e.strerror}") from e

        world.once(clean)
        world.before_leaving(self.close)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.wait()
        else:
            self.close()

    def save(
        self,
        step: int,
        dmp: DistributedModelParallel,
        optimizer: Optimizer,
        extra: dict[str, Any],
        *,
        loss: torch.Tensor,
        ne: float | None = None,
    ) -> None:
        """Writes step-STEP.

        `loss` are this rank's losses of this very step, of any shape. A step whose loss is not finite
        on some rank is not saved, nor are weights or optimizer state that are not finite; so every
        checkpoint is good, and deleting old ones always leaves a good one.
        `extra` (rank 0's) is JSON: whatever else a resumed run needs.
        `ne` is the validation NE of exactly these weights, by which `keep_best` ranks checkpoints, or
        None where these weights were not evaluated.

        When asynchronous, returns once this rank's share is copied to host memory, as much again as
        it holds. A write that is still going on is awaited first.
        A step that is already there keeps its tensors, since the run is at the same place. It gets the
        new `extra`, and the new `ne` if there is one.
        Raises CheckpointError, and NotFiniteError where something is not finite.
        """
        self.wait()
        self._world.together(lambda: self._check(step, loss, extra))
        manifest = Manifest(
            step=step,
            ne=ne,
            extra=extra,
            optimizer=optimizer.state_dict(),
            model=signature_of(dmp),
            column_blocks=column_blocks_of(dmp),
            files={},
        )
        if self._once(lambda: self._renew(manifest)):
            return
        state = saved_state(dmp, optimizer, self._world)
        if self._config.asynchronous:
            state = staged(state)
        write = _Background(lambda: self._save(state, manifest))
        if self._config.asynchronous:
            self._write = write
            write.start()
        else:
            write.run()
            write.result()

    def wait(self) -> None:
        """Returns when no write is going on; raises its error if the last one failed."""
        if self._write is not None:
            write, self._write = self._write, None
            write.join()
            write.result()

    def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Gives a write that is going on `seconds` to end, and returns whether it has; raises nothing.

        For leaving after an error. A process that left in the middle of the write would be aborted.
        """
        if self._write is not None:
            self._write.join(seconds)
            return not self._write.is_alive()
        return True

    def _check(self, step: int, loss: torch.Tensor, extra: dict[str, Any]) -> None:
        if not loss.isfinite().all():
            raise self._refusal(step, "its loss is not finite")
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"{self._directory}: extra is not JSON: {e}") from e

    def _save(self, state: dict[str, list[Piece]], manifest: Manifest) -> None:
        target = self._directory / folder_name(manifest.step)
        unfinished = self._directory / f"{HIDDEN}{target.name}"
        self._world.together(lambda: self._check_state(state, manifest.step), self._group)
        try:
            self._once(lambda: unfinished.mkdir())
            run_dcp(
                target,
                "written",
                lambda: dcp_save(
                    state,
                    storage_writer=RawWriter(unfinished, self._world.rank),
                    planner=BlockSaver(),
                    process_group=self._group,
                ),
            )
            files = self._checksums(unfinished)
            self._once(lambda: self._finish(unfinished, target, dataclasses.replace(manifest, files=files)))
        except C2ALError:
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs its room back
            raise

    def _check_state(self, state: dict[str, list[Piece]], step: int) -> None:
        if names := not_finite(state):
            raise self._refusal(step, f"values of {', '.join(names)} are not finite")

    def _refusal(self, step: int, reason: str) -> NotFiniteError:
        good, _ = finished(self._directory)
        before = f"the last good checkpoint is {good[-1][0]}" if good else "there is no checkpoint before it"
        return NotFiniteError(f"{self._directory}: step {step} is not saved: {reason}; {before}")

    def _once(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 and gives all ranks its result, or its failure as a CheckpointError."""

        def careful() -> Any:
            try:
                return action()
            except OSError as e:
                raise CheckpointError(f"{e.filename or self._directory}: cannot be written: {e.strerror}") from e

        return self._world.once(careful, self._group)

    def _renew(self, manifest: Manifest) -> bool:
        """Whether the step was there already, whole. A damaged one makes room."""
        target = self._directory / folder_name(manifest.step)
        if not target.exists():
            return False
        try:
            old = Manifest.read(target)
        except CheckpointError:
            self._delete(target)
            return False
        ne = old.ne if manifest.ne is None else manifest.ne
        dataclasses.replace(manifest, files=old.files, ne=ne).write(target)
        self._retain()
        return True

    def _checksums(self, folder: Path) -> dict[str, StoredFile]:
        """Name -> size and checksum of all files, each read back by the rank that wrote it."""
        names = [file_name(self._world.rank)] + ([TENSORS] if self._world.rank == 0 else [])

        def digests() -> dict[str, StoredFile]:
            try:
                return {n: StoredFile((folder / n).stat().st_size, digest_of(folder / n)) for n in names}
            except OSError as e:
                raise CheckpointError(f"{e.filename}: cannot be read back: {e.strerror}") from e

        mine = self._world.together(digests, self._group)
        everyone: list[dict[str, StoredFile]] = [{}] * self._world.size
        dist.all_gather_object(everyone, mine, group=self._group)
        return {name: entry for files in everyone for name, entry in files.items()}

    def _finish(self, unfinished: Path, target: Path, manifest: Manifest) -> None:
        manifest.write(unfinished)
        _sync(unfinished)
        unfinished.rename(target)
        _sync(self._directory)
        self._retain()

    def _retain(self) -> None:
        """Deletes the finished checkpoints that are neither among the last nor among the best."""
        found, _ = finished(self._directory)
        keep = {path for path, _ in found[-self._config.keep_last :]}
        ranked = sorted((m.ne, -m.step, path) for path, m in found if m.ne is not None)
        keep |= {path for _, _, path in ranked[: self._config.keep_best]}
        for path, _ in found:
            if path not in keep:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        doomed = path.with_name(f"{HIDDEN}{path.name}")
        path.rename(doomed)  # half a checkpoint must not carry a checkpoint's name
        shutil.rmtree(doomed)


class _Background(threading.Thread):
    """Runs an action and keeps its error."""

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


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
