"""Kills workers of a real training run at random moments and demands that it never matters.

    python scripts/fault_drill.py --output runs/drill --kills 20

Trains the demo model with `torchx run` on two ranks, and a random worker is SIGKILLed again and again: half of
the times while a checkpoint is being written (not the first after a start, or nothing would ever get done), else
at a random moment from the workers' start (imports and rendezvous included) to well into training. After every
kill each checkpoint there is must load. The run must then finish by itself, with the weights of an undisturbed
run of as many steps, bit for bit. Prints one line per kill. Exit status 0 means all of that held.

No moment is guessed from the clock, so the drill works at any speed. The run's config gives it no end. With the
last kill, before torchrun can start the workers again, the drill writes an end into the config that they will
read. The undisturbed run comes second, with that end. A worker that is to die while it writes is stopped first,
and killed only if the checkpoint is unfinished then.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from c2al.config import load_config, replace, save_config
from c2al.data.synthetic import SynthConfig, synthesise
from c2al.distributed.checkpoint import load_unsharded

ROOT = Path(__file__).parents[1]
RANKS = 2
T = TypeVar("T")
PATIENCE_SECONDS = 180.0
"""Longest wait for anything: a start of workers, a checkpoint, their death."""
OF_A_RANK = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables by which the drill knows a worker. Who starts the drill may have them: they are not handed on."""


class Drill:
    def __init__(self, output: Path, checkpoint_every: int, seed: int):
        self.output, self.checkpoint_every = output, checkpoint_every
        self.random = random.Random(seed)
        self.startup = 0.0
        """Seconds from the workers' start to their first checkpoint, as last seen."""
        self.steps = 0
        """Of both runs; known with the last kill."""

    def run(self, kills: int) -> None:
        """Raises AssertionError at the first thing that does not hold."""
        shutil.rmtree(self.output, ignore_errors=True)
        synthesise(SynthConfig(rows=40_000), self.output / "data")
        self.write_config(steps=0)
        self.train("disturbed", kills)
        self.train("undisturbed", kills=0)
        expected, actual = (
            load_unsharded(self.output / name / "checkpoints" / f"step-{self.steps:08d}")
            for name in ("undisturbed", "disturbed")
        )
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            difference = (tensor - actual[name]).abs().max()
            assert torch.equal(tensor, actual[name]), f"'{name}' differs by up to {difference}"
        print(f"{kills} kills, {self.steps} steps: final weights equal bit for bit", flush=True)

    def write_config(self, steps: int) -> None:
        """The config of both runs. steps: 0 for no end (a million epochs)."""
        config = load_config(ROOT / "c2al" / "configs" / "conflict.toml")
        changes = {
            "data.train": [str(self.output / "data" / "train")],
            "data.validation": [],
            "data.test": [],
            "train.batch_size": 256,
            "train.epochs": 1_000_000,
            "train.max_steps": steps,
            "train.checkpoint.every_steps": self.checkpoint_every,
            # A run's end may move only where no step depends on it. Whether steps are compiled does.
            "train.optimizer.decay": "constant",
            "train.compile": "off",
        }
        save_config(replace(config, **changes), self.output / "config.toml")

    def train(self, name: str, kills: int) -> None:
        """One run to its end with `kills` on the way."""
        folder = self.output / name
        command = [
            *("torchx", "run", "-s", "local_cwd", "-cfg", f"log_dir={self.output / 'logs'}"),
            *(f"{ROOT}/launch/components.py:train", "-j", f"1x{RANKS}", "--max_restarts", str(kills), "--"),
            *("--config", str(self.output / "config.toml"), "--output", str(folder)),
        ]
        environment = {k: v for k, v in os.environ.items() if k not in OF_A_RANK}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with (self.output / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        begun = time.monotonic()
        try:
            for kill in range(kills):
                workers = wait(lambda: live_workers(process))
                if not self.startup:  # torchx and torchrun import about as much as a worker does
                    self.startup = time.monotonic() - begun
                self.kill_one(process, folder / "checkpoints", workers, kill, last=kill == kills - 1)
            status = wait_for_end(process, folder / "checkpoints")
            assert status == 0, f"{name}: exit status {status}, see {self.output / name}.log"
        finally:
            process.terminate()  # TorchX takes its workers along
            process.wait()

    def kill_one(
        self, process: subprocess.Popen[bytes], checkpoints: Path, workers: list[int], number: int, last: bool
    ) -> None:
        if self.random.random() < 0.5:
            moment = "while writing a checkpoint"
            self.stop_while_writing(process, checkpoints, workers)
        else:
            seconds = self.random.uniform(0, 1.5 * self.startup)
            moment = f"{seconds:.1f} s after the start"
            time.sleep(seconds)
            stop(workers)
        assert process.poll() is None, f"the run ended with status {process.poll()} before kill {number + 1}"
        victim = self.random.choice(workers)
        agent = parent(victim)
        try:
            stop([agent])  # it starts no worker until it may go on
            signal_all([victim], signal.SIGKILL)
            if last:
                self.steps = newest_step(checkpoints) + 4 * self.checkpoint_every
                self.write_config(self.steps)
        finally:
            signal_all([*workers, agent], signal.SIGCONT)
        wait(lambda: not any(alive(pid) for pid in workers))
        # The next workers are still importing: nobody writes here.
        found = sorted(checkpoints.glob("step-*"))
        for checkpoint in found:
            load_unsharded(checkpoint)
        print(f"kill {number + 1}: {moment}; {[p.name for p in found]} load", flush=True)

    def stop_while_writing(self, process: subprocess.Popen[bytes], checkpoints: Path, workers: list[int]) -> None:
        """Returns with all workers stopped and a checkpoint unfinished."""
        before, more, begun = newest_step(checkpoints), self.random.randint(1, 4), time.monotonic()

        def ended() -> bool:
            return process.poll() is not None

        wait(lambda: ended() or newest_step(checkpoints) > before)
        self.startup = time.monotonic() - begun
        wait(lambda: ended() or newest_step(checkpoints) >= before + more * self.checkpoint_every)

        def writing() -> bool:
            return ended() or any(checkpoints.glob(".unfinished-*"))

        while True:
            wait(writing, pause=0.0005)
            time.sleep(self.random.uniform(0, 0.01))
            stop(workers)
            if writing():
                return
            signal_all(workers, signal.SIGCONT)


def newest_step(checkpoints: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in checkpoints.glob("step-*")), default=0)


def live_workers(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of all ranks, once all are there; empty before."""
    assert process.poll() is None, f"the run ended with status {process.poll()} where its workers were awaited"
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            children.setdefault(parent(int(entry.name)), []).append(int(entry.name))
    found: dict[bytes, int] = {}
    queue = [process.pid]
    while queue:
        for pid in children.get(queue.pop(0), []):
            queue.append(pid)
            # torchrun gives LOCAL_RANK to its workers alone. What a worker starts inherits it, and comes later here.
            with contextlib.suppress(OSError):
                environment = dict(
                    v.partition(b"=")[::2] for v in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                )
                if b"LOCAL_RANK" in environment and alive(pid):
                    found.setdefault(environment[b"LOCAL_RANK"], pid)
    return list(found.values()) if len(found) == RANKS else []


def wait_for_end(process: subprocess.Popen[bytes], checkpoints: Path) -> int:
    """The exit status of a run that goes on by itself: it may take any time as long as it makes checkpoints."""
    while process.poll() is None:
        newest = newest_step(checkpoints)
        wait(lambda newest=newest: process.poll() is not None or newest_step(checkpoints) > newest)
    return process.returncode


def stop(pids: list[int]) -> None:
    """Returns when none of the processes runs."""
    signal_all(pids, signal.SIGSTOP)
    wait(lambda: all(state(pid) in "TZX" for pid in pids), pause=0.001)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def alive(pid: int) -> bool:
    return state(pid) not in "ZX"


def state(pid: int) -> str:
    """As /proc has it: T stopped, Z dead and not yet reaped, X no longer there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait(ready: Callable[[], T], pause: float = 0.05) -> T:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (result := ready()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:g} s in vain"
        time.sleep(pause)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; replaced if it exists")
    parser.add_argument("--kills", type=int, default=20, help="at least one")
    parser.add_argument("--checkpoint-every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error("--kills: the run ends with the last kill, so there must be one")
    Drill(arguments.output.absolute(), arguments.checkpoint_every, arguments.seed).run(arguments.kills)
