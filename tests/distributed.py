"""Runs a function on N gloo processes of this machine: `from distributed import run_ranks`.

The processes are forked from a server that has imported torchrec once, so a group of four starts
in well under a second; they meet through a file store, need no port, and are killed at the timeout.
A failure shows every failed worker's whole traceback.
"""

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchrec.distributed.model_parallel", "c2al.dist.checkpoint"])


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0, local_size: int | None = None
) -> list[Any]:
    """Calls `function(*args)` on `ranks` processes with a process group; returns their results by rank.

    `function` must be importable (module level) and is called after the default group is there, so
    `c2al.dist.process.process_group` adopts it. `local_size`: ranks a pretended host.
    Raises AssertionError with all tracebacks if any rank fails, dies or is not done in `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="c2al-ranks-") as folder:
        results = _CONTEXT.Queue()
        store = str(Path(folder) / "store")
        workers = [
            _CONTEXT.Process(
                target=_worker, args=(function, rank, ranks, local_size or ranks, store, timeout, results, args)
            )
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        try:
            return _collect(workers, results, time.monotonic() + timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _collect(workers: list[Any], results: Any, deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(answers) + len(failures) < len(workers):
        try:
            rank, answer, failure = results.get(timeout=0.2)
            if failure is None:
                answers[rank] = answer
            else:
                failures[rank] = failure
                # The others get a moment to report why they failed, too.
                deadline = min(deadline, time.monotonic() + 10)
            continue
        except queue.Empty:
            pass
        silent = [r for r in range(len(workers)) if r not in answers and r not in failures]
        for rank in silent:
            if workers[rank].exitcode is not None and results.empty():
                failures[rank] = f"died without a report, exit code {workers[rank].exitcode}"
                deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            failures |= {r: "did not finish in time" for r in silent if r not in failures}
    if failures:
        raise AssertionError("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return [answers[rank] for rank in range(len(workers))]


def _worker(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    local_size: int,
    store: str,
    timeout: float,
    results: Any,
    args: tuple[Any, ...],
) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(LOCAL_WORLD_SIZE=str(local_size), LOCAL_RANK=str(rank % local_size))
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, ranks),
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout),
        )
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    # Not destroyed: after a failure elsewhere the shutdown itself could wait. The process ends here.
    results.close()
    results.join_thread()
    os._exit(0)
