"""Waiting for other ranks outside the collectives.

A gloo collective gives up after its timeout, however well the other ranks are. Here a rank that works
renews a heartbeat in the store of the process group, and the others wait for as long as it does. An
error that a rank meets alone is left in the store, too, so that the others can name it.
"""

import contextlib
import json
import math
import signal
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from c2al import errors
from c2al.errors import C2ALError, TrainingError

T = TypeVar("T")

MAIN = "main"
"""Name of the rounds of the main threads."""
LEAVE_SECONDS = 30.0
"""How long a rank with an error waits for ranks that still work, before it leaves without them."""
LOOK_SECONDS = 1.0
"""How long a rank that works goes on without a look at whether another has left."""
_FAILED = "failed"
_POLL_SECONDS = (0.002, 0.25)
"""Shortest and longest pause between two looks at the store."""
_ERROR_SECONDS = 2.0
"""How long a rank whose collective failed looks for the error of the rank that left."""


def describe(error: BaseException) -> tuple[str, str]:
    """(class, message) of an error, for the other ranks.

    An OSError is described as OutputError, and Ctrl-C as an error of ours with the same exit code.
    """
    if isinstance(error, OSError):
        return "OutputError", f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, KeyboardInterrupt):
        return ("TerminateError" if signal.SIGTERM in error.args else "InterruptError"), "interrupted"
    return type(error).__name__, str(error) or repr(error)


def described(rank: int, name: str, message: str) -> C2ALError:
    """The error that `describe` described on `rank`: of its class where that is one of ours, else TrainingError."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, C2ALError):
        return kind(f"rank {rank}: {message}")
    return TrainingError(f"rank {rank}: {name}: {message}")


def _tried(work: Callable[[], T]) -> tuple[T, None] | tuple[None, Exception]:
    try:
        return work(), None
    except Exception as e:
        return None, e


class Board:
    """The keys that ranks leave for each other in the store of the default process group.

    Making one is collective: rank 0 draws the prefix of all its keys, since a store outlives a board.
    """

    def __init__(self, rank: int, size: int, timeout: float, group: dist.ProcessGroup):
        self._rank, self._size, self._timeout = rank, size, timeout
        self._rounds: defaultdict[str, int] = defaultdict(int)
        self._looked = -math.inf
        """When this rank last looked for an error of another."""
        prefix = [uuid.uuid4().hex]
        dist.broadcast_object_list(prefix, src=0, group=group)
        self._store = PrefixStore(f"c2al/{prefix[0]}", _get_default_store())

    def round(self, work: Callable[[], T], name: str = MAIN) -> tuple[T, None] | tuple[None, Exception]:
        """Result or error of `work` on this rank, once it has ended on every rank, however long that takes.

        `name` tells apart rounds that run at the same time in different threads.
        Raises TrainingError when a rank that has not ended shows no sign of life for the timeout, and
        the error of a rank that has left. In the main round, an error of `work` is raised when the
        others have not ended some seconds later: a user should not wait for hours to see it.
        """
        if self._size == 1:
            return _tried(work)
        self._rounds[name] += 1
        key = f"{name}/{self._rounds[name]}"
        with self._heartbeat(f"{key}/beat/{self._rank}"):
            result, error = _tried(work)
        self._store.set(f"{key}/done/{self._rank}", "")
        ended = self._wait(key, LEAVE_SECONDS if error is not None and name == MAIN else math.inf)
        if error is None:
            return cast(T, result), None
        if not ended:
            raise error
        return None, error

    def raise_if_another_left(self) -> None:
        """Raises the error of a rank that has left because of it. Not collective, callable from any thread.

        It is cheap enough for every turn of a loop: it looks at most once per LOOK_SECONDS.
        """
        if (now := time.monotonic()) - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if (error := self.error_of_another(seconds=0)) is not None:
            raise error

    @contextlib.contextmanager
    def _heartbeat(self, key: str) -> Iterator[None]:
        """Renews `key` while the block runs. A short block ends before the first renewal."""
        ended = threading.Event()

        def beat() -> None:
            count = 0
            # A store that is gone ends the beat; the block's next collective will say so.
            with contextlib.suppress(RuntimeError):
                while not ended.wait(min(self._timeout / 4, 5.0)):
                    count += 1
                    self._store.set(key, str(count))

        thread = threading.Thread(target=beat, name="c2al-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _wait(self, key: str, longest: float) -> bool:
        """Waits until every rank is done; False when that takes longer than `longest` seconds.

        It polls, since a blocking wait would keep the store from other threads.
        """
        pause, begin = _POLL_SECONDS[0], time.monotonic()
        pending = [r for r in range(self._size) if r != self._rank]
        last, since = dict.fromkeys(pending, b""), dict.fromkeys(pending, time.monotonic())
        while True:
            pending = [r for r in pending if not self._store.check([f"{key}/done/{r}"])]
            if not pending:
                return True
            self.raise_if_another_left()
            now = time.monotonic()
            if now - begin > longest:
                return False
            for rank in pending:
                beat = self._read(f"{key}/beat/{rank}")
                if beat != last[rank]:
                    last[rank], since[rank] = beat, now
                elif now - since[rank] > self._timeout:
                    raise TrainingError(
                        f"rank {self._rank}: rank {rank} is gone or was silent for {self._timeout:g} s "
                        "(dist.timeout_seconds)"
                    )
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])

    def _read(self, key: str) -> bytes:
        return bytes(self._store.get(key)) if self._store.check([key]) else b""

    def leave_error(self, error: BaseException) -> None:
        """Leaves the error that ends this rank for the others; the first one left stays."""
        if self._size == 1:
            return
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_FAILED, "", json.dumps([self._rank, *describe(error)]))

    def error_of_another(self, seconds: float = _ERROR_SECONDS) -> C2ALError | None:
        """The error that another rank left within `seconds` from now, if any."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while self._size > 1:
                if text := self._read(_FAILED):
                    rank, name, message = json.loads(text)
                    return None if rank == self._rank else described(rank, name, message)
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
        return None
