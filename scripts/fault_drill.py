"""Kills workers of a real training run at random moments and demands that it never matters.

    python scripts/fault_drill.py --output runs/drill --kills 20

Trains the demo model with `torchx run` on two ranks, once undisturbed and once with a random worker
SIGKILLed again and again: half of the times while a checkpoint is being written (not the first after a
start, or nothing would ever get done), else at a random moment from the workers' start (imports and
rendezvous included) to well into training. After every kill each checkpoint there is must load; the run
must finish by itself, with the undisturbed run's weights bit for bit. Prints one line per kill. Exit status 0
means all of that held.
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

from c2al.data.synthetic import SynthConfig, synthesise
from c2al.distributed.checkpoint import load_unsharded

ROOT = Path(__file__).parents[1]
RANKS = 2
T = TypeVar("T")
PATIENCE_SECONDS = 180.0
"""Longest wait for anything: a start of workers, a checkpoint, their death."""


class Drill:
    def __init__(self, output: Path, steps: int, checkpoint_every: int, seed: int):
        self.output, self.steps, self.checkpoint_every = output, steps, checkpoint_every
        self.random = random.Random(seed)

    def run(self, kills: int) -> None:
        """Raises AssertionError at the first thing that does not hold."""
        shutil.rmtree(self.output, ignore_errors=True)
        synthesise(SynthConfig(rows=40_000), self.output / "data")
        # Read again at every restart, while the repository may move on.
        shutil.copy(ROOT / "c2al" / "configs" / "conflict.toml", self.output / "config.toml")
        startup = self.train("undisturbed", kills=0, startup=0.0)
        print(f"undisturbed: first checkpoint {startup:.1f} s after the workers' start", flush=True)
        self.train("disturbed", kills, startup)
        expected, actual = (
            load_unsharded(self.output / name / "checkpoints" / f"step-{self.steps:08d}")
            for name in ("undisturbed", "disturbed")
        )
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            difference = (tensor - actual[name]).abs().max()
            assert torch.equal(tensor, actual[name]), f"'{name}' differs by up to {difference}"
        print(f"{kills} kills: final weights equal bit for bit", flush=True)

    def train(self, name: str, kills: int, startup: float) -> float:
        """One run to its end with `kills` on the way. Returns seconds from its workers' start to a checkpoint."""
        folder = self.output / name
        command = [
            *("torchx", "run", "-s", "local_cwd", "-cfg", f"log_dir={self.output / 'logs'}"),
            *(f"{ROOT}/launch/components.py:train", "-j", f"1x{RANKS}", "--max_restarts", str(kills), "--"),
            *("--config", str(self.output / "config.toml"), "--output", str(folder)),
            *("--data.train", f'["{self.output / "data" / "train"}"]', "--data.validation", "[]", "--data.test", "[]"),
            *("--train.batch_size", "256", "--train.epochs", "1000", "--train.max_steps", str(self.steps)),
            *("--train.checkpoint.every_steps", str(self.checkpoint_every)),
        ]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with (self.output / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PATH": path}, cwd=ROOT)
        try:
            workers = wait(lambda: live_workers(process))
            start = time.monotonic()
            if not kills:
                wait(lambda: any((folder / "checkpoints").glob("step-*")))
                startup = time.monotonic() - start
            for kill in range(kills):
                self.kill_one(process, folder / "checkpoints", workers, startup, kill)
                workers = wait(lambda: live_workers(process))
            status = process.wait(timeout=PATIENCE_SECONDS + self.steps)
            assert status == 0, f"{name}: exit status {status}, see {self.output / name}.log"
        finally:
            process.terminate()  # TorchX takes its workers along
            process.wait()
        return startup

    def kill_one(
        self, process: subprocess.Popen[bytes], checkpoints: Path, workers: list[int], startup: float, number: int
    ) -> None:
        if self.random.random() < 0.5:
            moment = "while writing a checkpoint"
            before, more = newest_step(checkpoints), self.random.randint(1, 4)

            def over() -> bool:
                return process.poll() is not None

            wait(lambda: over() or newest_step(checkpoints) >= before + more * self.checkpoint_every)
            wait(lambda: over() or any(checkpoints.glob(".unfinished-*")), pause=0.0005)
            time.sleep(self.random.uniform(0, 0.01))
        else:
            seconds = self.random.uniform(0, 1.5 * startup)
            moment = f"{seconds:.1f} s after the start"
            time.sleep(seconds)
        victim = self.random.choice(workers)
        assert process.poll() is None, f"the run ended before kill {number + 1}; give it more --steps"
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        wait(lambda: not any(alive(pid) for pid in workers))
        # The next workers are still importing: nobody writes here.
        found = sorted(checkpoints.glob("step-*"))
        for checkpoint in found:
            load_unsharded(checkpoint)
        print(f"kill {number + 1}: {moment}; {[p.name for p in found]} load", flush=True)


def newest_step(checkpoints: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in checkpoints.glob("step-*")), default=0)


def live_workers(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of all ranks, once all are there; empty before."""
    assert process.poll() is None, f"the run ended with status {process.poll()} where its workers were awaited"
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            children.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                int(entry.name)
            )
    found, queue = [], [process.pid]
    while queue:
        for pid in children.get(queue.pop(), []):
            queue.append(pid)
            # torchrun gives LOCAL_RANK to its workers alone.
            with contextlib.suppress(OSError):
                if b"\0LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes() and alive(pid):
                    found.append(pid)
    return found if len(found) == RANKS else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait(ready: Callable[[], T], pause: float = 0.05) -> T:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (result := ready()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:g} s in vain"
        time.sleep(pause)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; replaced if it exists")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000, help="of the run; more than 20 kills need more")
    parser.add_argument("--checkpoint-every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    Drill(arguments.output.absolute(), arguments.steps, arguments.checkpoint_every, arguments.seed).run(arguments.kills)
