"""Runs a function on N gloo processes of this machine: `from ranks import run_ranks`.

The processes are forked from a server that has imported torchrec and the jobs once, so a group of four
starts in well under a second. They meet through a file store, need no port, and are killed at the timeout.
A failure shows every failed worker's whole traceback.
"""

import datetime
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["c2al.training.score", "c2al.discovery.discover", "pytest"])
GRACE_SECONDS = 10.0
"""What the other ranks get, once one has failed, to report why they failed, too."""


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0, local_size: int | None = None
) -> list[Any]:
    """Calls `function(*args)` on `ranks` processes with a process group; returns their results by rank.

    `function` must be importable (module level); the default group is there when it is called, so
    `c2al.distributed.process.process_group` adopts it. `local_size`: ranks per pretended host.
    Raises AssertionError with all tracebacks if any rank fails, dies or is not done in `timeout` seconds.
    """
    try:
        return _run_once(function, ranks, args, timeout, local_size or ranks)
    except NoGroupError as e:
        # Once in thousands of groups gloo's ranks do not meet on a busy machine: one closes the other's connection
        # in the handshake (torch's own tests of gloo fail alike). `function` has not been called then.
        warnings.warn(f"the ranks did not meet, they try once more: {e}", stacklevel=2)
        return _run_once(function, ranks, args, timeout, local_size or ranks)


class NoGroupError(AssertionError):
    """The ranks did not become a group."""


def _run_once(
    function: Callable[..., Any], ranks: int, args: tuple[Any, ...], timeout: float, local_size: int
) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="c2al-ranks-") as name:
        folder = Path(name)
        workers = [
            _CONTEXT.Process(target=_worker, args=(function, args, rank, ranks, local_size, folder, timeout))
            for rank in range(ranks)
        ]
        try:
            for worker in workers:
                worker.start()
            _wait(workers, time.monotonic() + timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        failures = [f"--- rank {r}: {_report(folder, r, w.exitcode)}" for r, w in enumerate(workers) if w.exitcode]
        if failures:
            raise (NoGroupError if any(folder.glob("*.apart")) else AssertionError)("\n".join(failures))
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(ranks)]


def _wait(workers: list[Any], deadline: float) -> None:
    running = {w.sentinel: w for w in workers}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in multiprocessing.connection.wait(list(running), timeout=left):
            worker = running.pop(sentinel)
            worker.join()
            if worker.exitcode:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _report(folder: Path, rank: int, exitcode: int) -> str:
    path = folder / f"{rank}.failure"
    return (
        path.read_text() if path.exists() else f"no report, exit code {exitcode} (-9: killed, here or at the timeout)"
    )


def _worker(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    ranks: int,
    local_size: int,
    folder: Path,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_WORLD_SIZE=str(local_size), LOCAL_RANK=str(rank % local_size))
    try:
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(folder / "store"), ranks),
                rank=rank,
                world_size=ranks,
                timeout=datetime.timedelta(seconds=timeout),
            )
            dist.barrier()  # no rank leaves before all are here
        except RuntimeError:
            (folder / f"{rank}.apart").touch()
            raise
        torch.save(function(*args), folder / f"{rank}.result")
        status = 0
    except BaseException:
        (folder / f"{rank}.failure").write_text(traceback.format_exc())
        status = 1
    # Straight out: destroying the group could wait for a rank that has failed.
    os._exit(status)
