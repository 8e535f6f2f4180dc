"""Which tiles, warps and stages are the fastest for FM attention's Triton kernels on this card?

    python benchmarks/fm_tune.py [--seconds 90] [--output DIR]

Times every configuration of a direction and shape that fits shared memory, with batch 16,384 and Y per sample:
first those that ship (c2al/ops/triton/configurations.py), then the grid around them. Prints the share of the
floor (fewest bytes over the bandwidth of a copy), and writes fm_tune.csv after every shape and direction, as the
table from which configurations.py is amended. A grid point that spills is slow, one that does not fit
is named. Without a GPU, --dry-run runs one shipped configuration of a tiny shape in Triton's interpreter
(TRITON_INTERPRET=1). Imports torch, triton and c2al.ops alone.

Legend: A is p x q per sample, Y p x k.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, about, write_table

from c2al.ops import fm_attention  # noqa: F401  (registers the op)
from c2al.ops.triton import launch
from c2al.ops.triton.configurations import SHARED_MEMORY, Configuration, configurations

SHAPES = ((64, 64, 16), (64, 28, 16), (64, 16, 8), (128, 128, 32), (256, 256, 64), (128, 512, 64), (512, 128, 32))
TILES, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=1e9, help="no configuration is begun after this")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    if arguments.dry_run:
        arguments.batch = 3
        launch._resident_programs = lambda device: 2  # the interpreter has no card to ask
    bandwidth = 1e9 if arguments.dry_run else copy_bytes()
    shapes = ((8, 6, 2),) if arguments.dry_run else SHAPES
    deadline = time.monotonic() + arguments.seconds
    rows: list[dict[str, Any]] = []
    for shape, direction in itertools.product(shapes, ("forward", "backward")):
        shipped = configurations(direction, *shape, "half")
        grid = [] if arguments.dry_run else around(shipped[0], *shape) if shipped else []
        found = []
        for c in [*shipped, *(g for g in grid if g not in shipped)][: 1 if arguments.dry_run else None]:
            if time.monotonic() > deadline:
                break
            row = {
                "direction": direction,
                **dict(zip("pqk", shape, strict=True)),
                **c._asdict(),
                "shipped": c in shipped,
            }
            try:
                seconds, floor = measure(direction, shape, c, arguments.batch, device, bandwidth)
            except Exception as e:  # a grid point that does not fit, by the compiler's words
                row["error"] = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
            else:
                row |= {"microseconds": round(seconds * 1e6, 1), "share_of_floor": round(floor / seconds, 3)}
            found.append(row)
        found.sort(key=lambda r: r.get("microseconds", float("inf")))
        for row in found[:3] + [r for r in found[3:] if r["shipped"]]:
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows += [row | about(device) for row in found]
        if rows:
            write_table(arguments.output / "fm_tune.csv", rows)


def around(c: Configuration, p: int, q: int, k: int) -> list[Configuration]:
    """The grid of tiles, warps and stages of the schedule that this shape takes."""
    grid = []
    for tile, warps, stages in itertools.product(TILES, WARPS, STAGES):
        blocks = {"block_q": tile} if c.schedule == "columns" else {"block_p": tile}
        g = c._replace(**blocks, warps=warps, stages=stages)
        staged = 2 * (g.block_p * g.block_k + g.block_q * g.block_k + stages * g.block_p * g.block_q)
        if tile <= max(16, 2 * (q if c.schedule == "columns" else p)) and staged <= SHARED_MEMORY:
            grid.append(g)
    return grid


def measure(
    direction: str, shape: tuple[int, int, int], c: Configuration, batch: int, device: str, bandwidth: float
) -> tuple[float, float]:
    """(seconds of a call, seconds of the fewest bytes) of one configuration."""
    p, q, k = shape
    launch.configurations = lambda *_: [c]  # one candidate, which is not timed by the launcher
    x = torch.randn(batch, q, p, dtype=torch.bfloat16, device=device)
    y, grad = (torch.randn(batch, p, k, dtype=torch.bfloat16, device=device) for _ in range(2))
    out, rstd = launch.forward(x, y, True, 1e-5) if direction == "forward" else (y, y[..., 0].float())

    def call() -> object:
        if direction == "forward":
            return launch.forward(x, y, True, 1e-5)
        return launch.backward(grad, x, y, out, rstd, True)

    elements = p * q + 2 * p * k if direction == "forward" else 2 * p * q + 4 * p * k
    floor = batch * elements * 2 / bandwidth
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, floor
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, return_mode="median") / 1e3, floor


def copy_bytes() -> float:
    """Bytes read and written per second by a copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    from triton.testing import do_bench

    return 2 * 2**30 / (do_bench(lambda: target.copy_(source), return_mode="min") / 1e3)


if __name__ == "__main__":
    main()
