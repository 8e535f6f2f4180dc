"""The process group: one process as it is, or as many as torchrun or TorchX launched.

All ranks end alike. `World.agree` turns an error of one rank into the same error on every rank. An
error that one rank meets alone is left in the store of the process group, where the others find it
when their collectives fail.
"""

import contextlib
import datetime
import hashlib
import logging
import os
import resource
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from c2al.config import DistConfig
from c2al.distributed.patience import MAIN, Board, describe, described
from c2al.errors import BackendError, ConfigError, OutputError, TrainingError

T = TypeVar("T")
Item = TypeVar("Item")

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable that makes torchrun start every attempt with a store of its own."""
CLOSE_SECONDS = 30.0
"""What a background write gets to end after an error, before the process leaves without it."""


@dataclass(frozen=True)
class World:
    """This rank's place among the ranks, and the collectives that a job needs beside those of the model."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Ranks on this host, as TorchRec's table_row_wise and grid_shard understand a host."""
    device: torch.device
    timeout: datetime.timedelta
    control: dist.ProcessGroup
    """gloo group of all ranks; carries Python objects and CPU tensors whatever the device is."""
    board: Board
    """Where ranks leave word for each other outside the collectives."""
    _closers: list[Callable[[float], bool]] = field(default_factory=list)

    @property
    def alone_on_cpu(self) -> bool:
        """One process without a device to keep busy: neither DDP nor TorchRec's pipeline helps it."""
        return self.size == 1 and self.device.type == "cpu"

    def broadcast(self, value: T, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
        """`value` of rank `source`, on every rank (pickled)."""
        box = [value]
        dist.broadcast_object_list(box, src=source, group=group or self.control)
        return box[0]

    def together(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What `function`, which takes part in no collective, returns here; raises on every rank if it does on any.

        `function` may take any time: the other ranks wait for as long as this one shows that it is
        alive. A loop in it that takes minutes goes over `watched` items.
        An OSError becomes an OutputError, so that every rank leaves with the same exit code.
        """
        result, error = self.board.round(function, group.group_name if group else MAIN)
        self.agree(error, group)
        return cast(T, result)

    def watched(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items. Raises, before the next one, the error of another rank that has left because of it.

        For long loops in `together`, which would else go on for nothing until they end.
        """
        for item in items:
            self.board.raise_if_another_left()
            yield item

    def once(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What `function` returns or raises on rank 0, on every rank (pickled); the others do not call it.

        It may take any time, as in `together`.
        """
        result = self.together(lambda: function() if self.rank == 0 else None, group)
        return cast(T, self.broadcast(result, group=group))

    def share(self, items: Sequence[Item], function: Callable[[Item], T]) -> list[T]:
        """`function` of every item, in order, on every rank (pickled). Rank r works on every size-th item from r.

        `items` must be the same on every rank. Raises on every rank if `function` does on any.
        """
        mine = self.together(lambda: [function(item) for item in self.watched(items[self.rank :: self.size])])
        everyone: list[list[T]] = [[]] * self.size
        dist.all_gather_object(everyone, mine, group=self.control)
        return [everyone[i % self.size][i // self.size] for i in range(len(items))]

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of `tensor` over the ranks, in place, on every rank. CPU or device tensor."""
        dist.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def new_control_group(self) -> dist.ProcessGroup:
        """Another gloo group of all ranks, for collectives from a background thread. Collective."""
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=self.timeout))

    def before_leaving(self, close: Callable[[float], bool]) -> None:
        """Has `close(seconds)` called before the process group is destroyed, also after an error.

        It must end what uses the group in the background and return whether that ended in time.
        Destroying a group that a thread still uses aborts the process.
        """
        self._closers.append(close)

    def agree(self, error: BaseException | None, group: dist.ProcessGroup | None = None) -> None:
        """Raises on every rank if `error` is set on any; collective.

        A rank with an error of its own raises that. The others raise the first rank's error, with the
        rank in front of the message and with its class where that is one of ours, so that the exit
        code is the same on every rank. An OSError becomes an OutputError.
        """
        report = None if error is None else describe(error)
        reports: list[tuple[str, str] | None] = [None] * self.size
        dist.all_gather_object(reports, report, group=group or self.control)
        if isinstance(error, OSError) and report is not None:
            raise OutputError(report[1]) from error
        if error is not None:
            raise error
        for rank, other in enumerate(reports):
            if other is not None:
                raise described(rank, *other)

    def seed_step(self, seed: int, step: int) -> None:
        """Makes every random draw of this step (dropout) a function of (seed, step, rank).

        A resumed run draws what the uninterrupted one drew, and no generator state has to be saved.
        """
        digest = hashlib.sha256(f"c2al step {seed}/{step}/{self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextlib.contextmanager
def process_group(config: DistConfig) -> Iterator[World]:
    """Joins the ranks torchrun launched, or makes a world of one when nothing launched this process.

    gloo on CPU, nccl on CUDA. A group the caller already initialised is adopted and left alone.

    Raises BackendError when CUDA is asked for and absent, TrainingError when a rank does not arrive
    within `timeout_seconds`, the rendezvous address cannot be used, or a collective inside the block
    fails because a rank is gone or silent.
    """
    hush_the_stack()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(config.device, local_rank)
    timeout = datetime.timedelta(seconds=config.timeout_seconds)
    adopted = dist.is_initialized()
    before = {name: os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if not adopted:
        _initialise("nccl" if device.type == "cuda" else "gloo", timeout)
    world: World | None = None
    try:
        size = dist.get_world_size()
        local_size = config.local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if size % local_size:
            raise ConfigError(f"dist.local_world_size: {size} ranks are not a multiple of {local_size} ranks per host")
        # TorchRec reads the host's size from the environment wherever it splits rows within a host;
        # the plan and the runtime must mean the same number.
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank() % local_size))
        control = dist.new_group(backend="gloo", timeout=timeout) if dist.get_backend() != "gloo" else dist.group.WORLD
        world = World(
            rank=dist.get_rank(),
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            device=device,
            timeout=timeout,
            control=cast(dist.ProcessGroup, control),
            board=Board(dist.get_rank(), size, timeout.total_seconds(), cast(dist.ProcessGroup, control)),
        )
        with _alike(world):
            yield world
    finally:
        closed = [close(CLOSE_SECONDS) for close in world._closers] if world else []
        _restore_environment(before)
        if not adopted and all(closed):
            dist.destroy_process_group()


@contextlib.contextmanager
def _alike(world: World) -> Iterator[None]:
    """Lets an error of the block end every rank with the same error, wherever the others are just now."""
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            world.board.leave_error(e)
            raise
        if (cause := world.board.error_of_another()) is not None:
            raise cause from e
        raise TrainingError(
            f"rank {world.rank}: a collective failed, another rank is gone or was silent for "
            f"{world.timeout.total_seconds():g} s (dist.timeout_seconds): {e}"
        ) from e
    except BaseException as e:
        world.board.leave_error(e)
        raise


def _restore_environment(before: dict[str, str | None]) -> None:
    """Else what this process starts later takes itself for a rank."""
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _device(choice: str, local_rank: int) -> torch.device:
    if choice == "cuda" and not torch.cuda.is_available():
        raise BackendError("dist.device: 'cuda' was asked for, but no CUDA device is visible to this process")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise BackendError(
            f"dist.device: local rank {local_rank} has no CUDA device of its own, {torch.cuda.device_count()} visible"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _initialise(backend: str, timeout: datetime.timedelta) -> None:
    if "RANK" not in os.environ:
        dist.init_process_group(
            backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    environment = os.environ
    where = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    who = f"rank {environment['RANK']} of {environment.get('WORLD_SIZE')}"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and environment["TORCHELASTIC_MAX_RESTARTS"] != "0":
        # torch 2.13 keeps one store over all restarts and no longer tells them apart in it: a restarted
        # rank can read where a dead one listened, and waits for it until the timeout.
        raise TrainingError(
            f"{who}: torchrun with restarts shares its store between them, on which restarted ranks hang; "
            f"set {FRESH_STORE}=1 where torchrun runs, as launch/components.py does"
        )
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as e:  # DistError and its kin are RuntimeErrors
        if "EADDRINUSE" in str(e) or "address already in use" in str(e).lower():
            raise TrainingError(
                f"{who}: port in use: another process listens on {where}; choose another rendezvous port"
            ) from e
        raise TrainingError(
            f"{who}: not all ranks met at {where} within {timeout.total_seconds():g} s (dist.timeout_seconds): {e}"
        ) from e


def peak_memory_mib(device: torch.device) -> float:
    """Of the process, or of the device where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def hush_the_stack() -> None:
    """Silences warnings of the pinned torch, torchrec and fbgemm that only their developers can act on.

    They announce calls that will be renamed and give hints for their own planners. Errors still come through.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function", category=UserWarning)
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_concerns_a_user)


def _concerns_a_user(record: logging.LogRecord) -> bool:
    """False for two warnings that come through the root logger.

    The planner says of each data_parallel table that it has no sharding spec. torchrec warns of the
    only way in which its jagged tensors can be exported.
    """
    return not record.getMessage().startswith(("Sharding spec not found", "Trying to non-strict torch.export KJT"))
