"""Rendezvous, and how ranks fail together."""

import contextlib
import datetime
import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from c2al.config import Config, DistConfig
from c2al.data.source import open_dataset
from c2al.data.statistics import fit_statistics
from c2al.discovery.row_groups import RowGroups
from c2al.distributed import patience
from c2al.distributed.process import process_group
from c2al.errors import BackendError, C2ALError, CheckpointError, ConfigError, DataError, OutputError, TrainingError
from c2al.training.base_rates import count_base_rates
from impressions import splits
from ranks import run_ranks

CPU = DistConfig(device="cpu")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_launched(rank: int, size: int, port: int) -> None:
    """Leaves the test helper's group and looks like a worker of torchrun."""
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.pop("LOCAL_WORLD_SIZE", None)


def test_a_process_nobody_launched_is_a_world_of_one():
    with process_group(CPU) as world:
        assert (world.rank, world.size, world.local_size, world.device.type) == (0, 1, 1, "cpu")
        assert world.broadcast({"a": 1}) == {"a": 1}
        assert world.all_sum(torch.tensor([2.0])).tolist() == [2.0]
        world.barrier()
        world.agree(None)
    assert not dist.is_initialized()


@pytest.mark.parametrize("before", [None, "1"])
def test_the_environment_is_as_before_once_a_process_is_no_rank_any_more(before, monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
    with contextlib.suppress(DataError), process_group(CPU):
        assert os.environ["LOCAL_WORLD_SIZE"] == "1"
        raise DataError("an error on the way")
    assert {os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {before}


def launched(port: int) -> tuple[int, int, float, str, bool]:
    rank = dist.get_rank()
    as_launched(rank, 2, port)
    with process_group(CPU) as world:
        total = world.all_sum(torch.tensor([float(rank + 1)])).item()
        answer = (world.rank, world.size, total, world.broadcast(f"from {rank}", source=1))
    return (*answer, dist.is_initialized())


def test_ranks_of_a_launcher_meet_and_leave():
    port = free_port()
    assert run_ranks(launched, 2, port) == [(0, 2, 3.0, "from 1", False), (1, 2, 3.0, "from 1", False)]


def disagree(kind: type[Exception], bad_rank: int) -> tuple[str, str]:
    with process_group(CPU) as world:
        try:
            world.agree(kind("disk is full") if world.rank == bad_rank else None)
        except Exception as e:
            world.barrier()  # the group is still usable: nobody was left behind
            return type(e).__name__, str(e)
    return "nothing", ""


def test_an_error_of_one_rank_is_an_error_of_all():
    assert run_ranks(disagree, 2, CheckpointError, 1) == [
        ("CheckpointError", "rank 1: disk is full"),
        ("CheckpointError", "disk is full"),
    ]
    # An error that is not ours keeps its name in the message.
    assert run_ranks(disagree, 2, KeyError, 0)[1] == ("TrainingError", "rank 0: KeyError: 'disk is full'")


def alone(port: int) -> tuple[str, float]:
    as_launched(0, 2, port)
    start = time.monotonic()
    with pytest.raises(TrainingError) as e, process_group(DistConfig(device="cpu", timeout_seconds=2)):
        pass
    return str(e.value), time.monotonic() - start


def test_a_rank_that_never_arrives_is_an_error_after_the_timeout():
    message, seconds = run_ranks(alone, 1, free_port())[0]
    assert "rank 0 of 2: not all ranks met at 127.0.0.1:" in message
    assert "within 2 s (dist.timeout_seconds)" in message
    assert seconds < 20


def occupied(port: int) -> str:
    as_launched(0, 2, port)
    with pytest.raises(TrainingError) as e, process_group(DistConfig(device="cpu", timeout_seconds=5)):
        pass
    return str(e.value)


def test_port_in_use_is_named():
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        message = run_ranks(occupied, 1, port)[0]
    assert f"port in use: another process listens on 127.0.0.1:{port}" in message


def left_behind(port: int, how: str) -> str:
    rank = dist.get_rank()
    as_launched(rank, 2, port)
    with process_group(DistConfig(device="cpu", timeout_seconds=5)) as world:
        world.barrier()
        if rank == 1 and how == "gone":
            os._exit(9)
        if rank == 1 and how == "silent":
            time.sleep(8)
            return "was asleep"
        world.all_sum(torch.ones(1))
    return "nothing happened"


@pytest.mark.parametrize("how", ["gone", "silent"])
def test_a_rank_that_is_gone_or_silent_is_an_error_for_the_others(how):
    with pytest.raises(AssertionError) as e:
        run_ranks(left_behind, 2, free_port(), how)
    assert "TrainingError: rank 0: a collective failed, another rank is gone or was silent for 5 s" in str(e.value)


def test_restarts_that_share_a_store_are_refused(monkeypatch):
    """torchrun's default, on which a restarted rank sometimes meets a dead one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(TrainingError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), process_group(CPU):
        pass


def long_job(port: int, seconds: float) -> tuple[str, list[int]]:
    """Rank 0 works much longer than a collective may last, then both ranks take turns at it."""
    as_launched(dist.get_rank(), 2, port)
    with process_group(DistConfig(device="cpu", timeout_seconds=2)) as world:

        def work() -> str:
            time.sleep(seconds)
            return f"by rank {world.rank}"

        def square(n: int) -> int:
            time.sleep(seconds / 2 if n == 3 else 0)
            return n * n

        return world.once(work), world.share(range(5), square)


def test_ranks_wait_for_a_long_job_of_rank_0_beyond_the_timeout_of_collectives():
    assert run_ranks(long_job, 2, free_port(), 7.0) == [("by rank 0", [0, 1, 4, 9, 16])] * 2


def lost_in_a_long_job(port: int, how: str) -> tuple[str, str, int, float]:
    """Rank 0 is lost or fails while rank 1 waits for it. Returns what rank 1 raises, and its seconds in waiting."""
    rank = dist.get_rank()
    as_launched(rank, 2, port)
    start = time.monotonic()
    try:
        with process_group(DistConfig(device="cpu", timeout_seconds=2)) as world:
            world.barrier()
            start = time.monotonic()

            def work() -> None:
                time.sleep(1)
                if how == "killed":
                    os._exit(9)
                if how == "other killed":  # the one that does not hold the store
                    time.sleep(0.5)
                    return
                raise OSError(28, "No space left on device", "/full/statistics.json")

            if rank == 0 and how.isdecimal():
                raise KeyboardInterrupt(int(how))
            if rank == 0 and how == "alone":
                raise DataError("part-3.parquet: column 'age' has a null")
            if rank == 1 and how == "other killed":
                world.together(lambda: os._exit(9))
            world.once(work)
    except (C2ALError, KeyboardInterrupt) as e:
        if rank == 0:
            time.sleep(1)  # the file store of the test goes with the first process
        return type(e).__name__, str(e), getattr(e, "exit_code", 0), time.monotonic() - start
    return "nothing", "", 0, 0.0


def test_a_rank_that_dies_in_a_long_job_is_noticed():
    with pytest.raises(AssertionError, match=r"rank 0: no report, exit code 9") as e:
        run_ranks(lost_in_a_long_job, 2, free_port(), "killed", timeout=30)
    assert "rank 1" not in str(e.value)  # it left in time, with an error of ours


def test_a_rank_whose_heart_stops_is_noticed_after_the_timeout():
    with pytest.raises(AssertionError, match=r"rank 1: no report, exit code 9") as e:
        run_ranks(lost_in_a_long_job, 2, free_port(), "other killed", timeout=30)
    assert "rank 0" not in str(e.value)


def test_an_os_error_of_one_rank_is_an_output_error_of_all():
    first, second = run_ranks(lost_in_a_long_job, 2, free_port(), "full")
    assert first[:3] == ("OutputError", "/full/statistics.json: No space left on device", OutputError.exit_code)
    assert second[:3] == ("OutputError", f"rank 0: {first[1]}", OutputError.exit_code)


def test_an_error_that_one_rank_meets_alone_is_the_error_of_those_that_wait():
    first, second = run_ranks(lost_in_a_long_job, 2, free_port(), "alone")
    assert first[:3] == ("DataError", "part-3.parquet: column 'age' has a null", DataError.exit_code)
    assert second[:3] == ("DataError", f"rank 0: {first[1]}", DataError.exit_code)
    assert second[3] < 30


@pytest.mark.parametrize(("number", "name", "code"), [(2, "InterruptError", 130), (15, "TerminateError", 143)])
def test_ranks_that_wait_for_one_that_a_signal_ends_have_its_exit_code(number, name, code):
    first, second = run_ranks(lost_in_a_long_job, 2, free_port(), str(number))
    assert first[0] == "KeyboardInterrupt"
    assert second[:3] == (name, "rank 0: interrupted", code)


def error_beside_long_work(port: int) -> tuple[str, float]:
    """Rank 1 fails at once, while rank 0 has work for a minute."""
    rank = dist.get_rank()
    as_launched(rank, 2, port)
    patience.LEAVE_SECONDS = 1.0
    start = time.monotonic()

    def work() -> None:
        if rank == 1:
            raise DataError("part-3.parquet: column 'age' has a null")
        for _ in world.watched(range(600)):
            time.sleep(0.1)

    try:
        with process_group(DistConfig(device="cpu", timeout_seconds=60)) as world:
            world.together(work)
    except DataError as e:
        return str(e), time.monotonic() - start
    return "nothing", 0.0


def test_an_error_of_one_rank_does_not_wait_for_the_long_work_of_another():
    (first, waited), (second, _) = run_ranks(error_beside_long_work, 2, free_port())
    assert first == f"rank 1: {second}"
    assert second == "part-3.parquet: column 'age' has a null"
    assert waited < 30


def loops_after_an_error(port: int, config: Config) -> list[str]:
    """Rank 1 has left with an error. Returns what each long loop of rank 0 does then."""
    rank = dist.get_rank()
    as_launched(rank, 2, port)
    patience.LOOK_SECONDS = 0.0
    found = []
    try:
        with process_group(CPU) as world:
            world.barrier()
            if rank == 1:
                raise DataError("part-3.parquet: column 'age' has a null")
            while world.board.error_of_another() is None:
                pass
            files = open_dataset(config.data.train)
            units = [(0, g) for g in range(len(files[0].row_group_rows))]
            read = RowGroups(files, units, ["label"])
            for loop in (
                lambda: fit_statistics(config.data.train, config.data, watched=world.watched),
                lambda: count_base_rates(config, (), world),
                lambda: read.feed(Nothing, 1, "count", False, world.watched),
            ):
                try:
                    loop()
                    found.append("went on")
                except DataError as e:
                    found.append(str(e))
    except DataError:
        time.sleep(2)  # the file store of the test goes with the first process
    return found


class Nothing:
    """A worker of a pass that counts nothing."""

    def block(self, block, first_row): ...
    def finished(self, unit): ...
    def close(self): ...


def test_long_loops_end_with_the_error_of_a_rank_that_left(tmp_path):
    first, _ = run_ranks(loops_after_an_error, 2, free_port(), splits(tmp_path))
    assert first == ["rank 1: part-3.parquet: column 'age' has a null"] * 3


def alone_in_a_step(port: int) -> tuple[str, str]:
    """Rank 1 fails between collectives, while rank 0 stands in one."""
    rank = dist.get_rank()
    as_launched(rank, 2, port)
    try:
        with process_group(DistConfig(device="cpu", timeout_seconds=60)) as world:
            world.barrier()
            if rank == 1:
                raise DataError("part-3.parquet: column 'age' has a null")
            world.all_sum(torch.ones(1))
    except C2ALError as e:
        if rank == 0:
            time.sleep(0.5)
        return type(e).__name__, str(e)
    return "nothing", ""


def test_an_error_that_one_rank_meets_alone_is_the_error_of_those_in_a_collective():
    message = "part-3.parquet: column 'age' has a null"
    assert run_ranks(alone_in_a_step, 2, free_port(), timeout=50) == [
        ("DataError", f"rank 1: {message}"),
        ("DataError", message),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match="no CUDA device"), process_group(DistConfig(device="cuda")):
        pass


def test_ranks_must_fill_the_hosts():
    config = DistConfig(device="cpu", local_world_size=2)
    with (
        pytest.raises(ConfigError, match=r"dist\.local_world_size: 1 ranks are not a multiple of 2"),
        process_group(config),
    ):
        pass


def test_random_draws_follow_seed_step_and_rank():
    with process_group(CPU) as world:

        def draw(seed: int, step: int) -> float:
            world.seed_step(seed, step)
            return torch.rand(1).item()

        draws = [draw(0, 0), draw(0, 1), draw(1, 0)]
        assert len(set(draws)) == 3
        assert [draw(0, 0), draw(0, 1), draw(1, 0)] == draws


def test_timeout_is_the_configs():
    with process_group(DistConfig(device="cpu", timeout_seconds=7)) as world:
        assert world.timeout == datetime.timedelta(seconds=7)
