"""Which tiles, warps and stages are the fastest for FM attention's Triton kernels on this card?

    python benchmarks/fm_tune.py [--seconds 90] [--shipped] [--output DIR]

Times every configuration of a direction and shape that fits registers and shared memory, with batch 16,384 and Y
per sample (--shared: one Y for all): those that ship (c2al/ops/triton/configurations.py) and the grid of both
schedules. All are compiled first, in as many processes as the machine has cores. Prints the share of the floor
(fewest bytes over the bandwidth of a large copy) and of a copy that moves as many bytes, and writes fm_tune.csv after
every shape and direction, as the table from which configurations.py is amended. A grid point that does not compile
is named. --shipped times those that ship alone and writes fm_shipped.csv. Without a GPU, --dry-run runs one shipped
configuration of a tiny shape in Triton's interpreter (TRITON_INTERPRET=1). Imports torch, triton and c2al.ops alone.

Legend: A is p x q per sample, Y p x k.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, about, write_table

from c2al.ops import fm_attention  # noqa: F401  (registers the op)
from c2al.ops.triton import launch
from c2al.ops.triton.configurations import BLOCKS_K, SHARED_MEMORY, Configuration, configurations

SHAPES = (
    (64, 64, 16), (64, 16, 8), (64, 48, 16), (128, 128, 32),
    (256, 256, 64), (128, 512, 64), (512, 128, 32), (27, 16, 24), (28, 64, 16), (16, 11, 8),
)  # fmt: skip
TILES, WARPS, STAGES = (16, 32, 64, 128), (1, 2, 4, 8, 16), (1, 2, 3, 4)
REGISTERS = 200
"""Values a thread may hold by the count of `fits`: of more, most spill."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=1e9, help="no configuration is begun after this")
    parser.add_argument("--shipped", action="store_true", help="no grid")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="P,Q,K (default: every shape of the script)")
    parser.add_argument("--shared", action="store_true", help="Y shared by the batch")
    parser.add_argument("--name", help="of the table (default: fm_shipped or fm_tune)")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    if arguments.dry_run:
        arguments.batch = 3
        launch._resident_programs = lambda *_: 2  # the interpreter has no card to ask
    bandwidth = 1e9 if arguments.dry_run else copy_bytes()
    shapes = ((8, 6, 2),) if arguments.dry_run else arguments.shapes or SHAPES
    deadline = time.monotonic() + arguments.seconds
    work = {
        (d, shape): candidates(d, shape, arguments.shipped or arguments.dry_run, arguments.shared)
        for shape in shapes
        for d in ("forward", "backward")
    }
    if not arguments.dry_run:
        compile_all(
            [(d, shape, c, arguments.shared) for (d, shape), found in work.items() for c in found],
            arguments.seconds / 2,
        )
    rows: list[dict[str, Any]] = []
    for (direction, shape), every in work.items():
        shipped = configurations(direction, *shape, "half")
        found = []
        for c in every[: 1 if arguments.dry_run else None]:
            if time.monotonic() > deadline:
                break
            row = {
                "direction": direction,
                **dict(zip("pqk", shape, strict=True)),
                "shared_y": arguments.shared,
                **c._asdict(),
                "shipped": c in shipped,
            }
            try:
                seconds, floor, copy = measure(
                    direction, shape, c, arguments.batch, device, bandwidth, arguments.shared
                )
            except Exception as e:  # a grid point that does not fit, by the compiler's words
                row["error"] = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
            else:
                row |= {"microseconds": round(seconds * 1e6, 1), "share_of_floor": round(floor / seconds, 3)}
                row["share_of_copy"] = round(copy / seconds, 3)
            found.append(row)
        found.sort(key=lambda r: r.get("microseconds", float("inf")))
        for row in found[:3] + [r for r in found[3:] if r["shipped"]]:
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows += [row | about(device) for row in found]
        if rows:
            name = arguments.name or ("fm_shipped" if arguments.shipped else "fm_tune")
            write_table(arguments.output / f"{name}.csv", rows)


def shape_of(text: str) -> tuple[int, int, int]:
    p, q, k = map(int, text.split(","))
    return p, q, k


def candidates(direction: str, shape: tuple[int, int, int], only_shipped: bool, shared: bool) -> list[Configuration]:
    """What is timed: the shipped configurations first, then the grid of both schedules."""
    p, q, k = shape
    shipped = configurations(direction, p, q, k, "half")
    if only_shipped:
        return shipped
    block_k = next(block for block in BLOCKS_K if k <= block)
    grid = []
    for schedule, held, streamed in (("columns", p, q), ("rows", q, p)):
        held = max(16, 1 << (held - 1).bit_length())
        for tile, warps, stages in itertools.product(TILES, WARPS, STAGES):
            block_p, block_q = (held, tile) if schedule == "columns" else (tile, held)
            c = Configuration(schedule, block_p, block_q, block_k, warps, stages)
            # A loop of one turn has nothing to overlap, but the samples of a program where they share Y.
            overlaps = tile < streamed or (shared and direction == "backward")
            if tile < 2 * streamed and (stages == 1 or overlaps) and fits(direction, c):
                grid.append(c)
    return [*shipped, *(c for c in grid if c not in shipped)]


def fits(direction: str, c: Configuration) -> bool:
    pk, qk, pq = c.block_p * c.block_k, c.block_q * c.block_k, c.block_p * c.block_q
    gradients = 2 if direction == "backward" else 1
    live = pk + gradients * qk + (pq if direction == "backward" else 0) + gradients * pk // 2
    staged = 2 * (gradients * (pk + qk) + c.stages * pq)
    return live <= REGISTERS * 32 * c.warps and live >= 4 * 32 * c.warps and 1.4 * staged <= SHARED_MEMORY


def compile_all(jobs: list[tuple[str, tuple[int, int, int], Configuration, bool]], seconds: float) -> None:
    """Fills Triton's cache, so that the timing below compiles nothing."""
    start = time.monotonic()
    workers = os.cpu_count() or 1
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    running = [pool.submit(compile_one, *job) for job in jobs]
    done, _ = concurrent.futures.wait(running, timeout=seconds)
    pool.shutdown(wait=True, cancel_futures=True)
    print(
        f"{len(done)} of {len(jobs)} configurations compiled in {time.monotonic() - start:.0f} s by {workers} processes"
    )


def compile_one(direction: str, shape: tuple[int, int, int], c: Configuration, shared: bool) -> None:
    with contextlib.suppress(Exception):  # told when it is timed
        called(direction, shape, c, 64, "cuda", shared)()


def measure(
    direction: str,
    shape: tuple[int, int, int],
    c: Configuration,
    batch: int,
    device: str,
    bandwidth: float,
    shared: bool,
) -> tuple[float, float, float]:
    """Seconds of a call of one configuration, of the fewest bytes, and of a copy that moves as many."""
    p, q, k = shape
    call = called(direction, shape, c, batch, device, shared)
    of_y = 0 if shared else p * k
    elements = p * q + p * k + of_y if direction == "forward" else 2 * (p * q + p * k + of_y)
    moved = batch * elements * 2
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, moved / bandwidth, moved / bandwidth
    from triton.testing import do_bench

    seconds = do_bench(call, warmup=5, rep=20, return_mode="median") / 1e3
    return seconds, moved / bandwidth, seconds_of_copy(moved)


def called(
    direction: str, shape: tuple[int, int, int], c: Configuration, batch: int, device: str, shared: bool
) -> Callable[[], object]:
    """One call of the kernel with this configuration, LayerNorm included."""
    p, q, k = shape
    launch.configurations = lambda *_: [c]  # one candidate, which is not timed by the launcher
    x = torch.randn(batch, q, p, dtype=torch.bfloat16, device=device)
    # An output of its own: another operand in its place would be read from the cache the second time.
    grad, out = (torch.randn(batch, p, k, dtype=torch.bfloat16, device=device) for _ in range(2))
    y = torch.randn(p, k, dtype=torch.bfloat16, device=device) if shared else torch.randn_like(grad)
    if direction == "forward":
        return lambda: launch.forward(x, y, True, 1e-5)
    rstd = out[..., 0].float()
    return lambda: launch.backward(grad, x, y, out, rstd, True)


def copy_bytes() -> float:
    """Bytes read and written per second by a large copy."""
    return 2**31 / seconds_of_copy(2**31)


@functools.cache
def seconds_of_copy(moved: int) -> float:
    """Of a copy that reads half of these bytes and writes the other half: launch, ramp and tail included."""
    from triton.testing import do_bench

    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return do_bench(lambda: target.copy_(source), return_mode="median") / 1e3


if __name__ == "__main__":
    main()
