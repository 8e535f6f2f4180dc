"""How fast is FM attention against the ways one would write it in torch?

    python benchmarks/fm_attention.py [--threads 2] [--rounds 15] [--device cpu]

Every round times a short burst of every variant, so that whatever else the machine does falls on all alike; a
row is the median of the rounds, a speed-up the median of the rounds' own ratios, and "best" compares
the fastest round of each, which a busy machine distorts least. GB/s counts the fewest bytes any
kernel must move. Prints a table and writes it with machine, date and versions to benchmarks/results/.

Legend: B batch, m fields, d embedding dim, k columns of Y; layout "paper", so A = x^T is d x m.
"""

import argparse
import csv
import ctypes
import datetime
import functools
import io
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from c2al.files import write_atomically
from c2al.ops.fm_attention import fm_attention

SHAPES = ((16, 64, 8), (48, 64, 16), (128, 128, 32), (512, 128, 64), (256, 256, 64))
CPU_ELEMENTS = 2**23
"""Elements of x on the CPU: well beyond its caches, as a training batch is."""
GPU_BATCH = 16384
BURST = 5
"""Calls of one variant in a turn: gram and einsum write tens of megabytes between its turns."""

Variant = Callable[[Tensor, Tensor], Tensor]


def chain(x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x.mT, torch.bmm(x, y))


def gram(x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(x.mT, x), y)


def einsum(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bmi,bmj,bjk->bik", x, x, y)


def ours(x: Tensor, y: Tensor) -> Tensor:
    return fm_attention(x, y, layout="paper")


class Function(torch.autograd.Function):
    """The hand-written backward that one would try before a fused kernel."""

    @staticmethod
    def forward(ctx, x, y):
        t = torch.bmm(x, y)
        ctx.save_for_backward(x, y, t)
        return torch.bmm(x.mT, t)

    @staticmethod
    def backward(ctx, grad):
        x, y, t = ctx.saved_tensors
        s = torch.bmm(x, grad)
        return torch.baddbmm(torch.bmm(t, grad.mT), s, y.mT), torch.bmm(x.mT, s)


def variants(device: str) -> dict[str, Variant]:
    if device == "cuda":
        return {"chain": chain, "function": Function.apply, "ours": ours}
    torch.compiler.reset()  # else every shape and mode counts against one recompilation limit
    compiled = torch.compile(chain, fullgraph=True)
    return {"chain": chain, "gram": gram, "einsum": einsum, "compiled": compiled, "ours": ours}


def burst(work: Callable[[], object], device: str) -> float:
    """Mean seconds of a few calls in a row, after one that refills the caches the variant before has emptied."""
    work()
    return statistics.mean(timed(work, device) for _ in range(BURST))


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int) -> list[dict[str, object]]:
    """One row for every variant, forward alone and with backward."""
    m, d, k = shape
    batch = GPU_BATCH if device == "cuda" else CPU_ELEMENTS // (m * d)
    x = torch.randn(batch, m, d, dtype=dtype, device=device, requires_grad=True)
    y = torch.randn(batch, d, k, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(batch, d, k, dtype=dtype, device=device)
    every = variants(device)

    def forward(variant: Variant) -> None:
        with torch.no_grad():
            variant(x, y)

    def both(variant: Variant) -> None:
        torch.autograd.grad(variant(x, y), (x, y), grad)

    rows: list[dict[str, object]] = []
    for name, work, elements in (
        ("forward", forward, m * d + 2 * d * k),
        ("forward+backward", both, 3 * m * d + 5 * d * k),
    ):
        seconds: dict[str, list[float]] = {variant: [] for variant in every}
        for turn in range(rounds + 2):  # the first two warm up: compilation, tuning, page faults
            for variant, function in every.items():
                spent = burst(functools.partial(work, function), device)
                if turn >= 2:
                    seconds[variant].append(spent)
        for variant, spent in seconds.items():
            ratios = [c / s for c, s in zip(seconds["chain"], spent, strict=True)]
            middle = statistics.median(spent)
            rows.append(
                {
                    "m": m, "d": d, "k": k, "batch": batch, "dtype": str(dtype).removeprefix("torch."),
                    "pass": name, "variant": variant, "milliseconds": round(middle * 1e3, 3),
                    "times_chain": round(statistics.median(ratios), 2),
                    "best_times_chain": round(min(seconds["chain"]) / min(spent), 2),
                    "gb_per_second": round(batch * elements * x.element_size() / middle / 1e9, 1),
                }
            )  # fmt: skip
    return rows


def copy_bandwidth() -> float:
    """GB/s of a copy on this card, read and write: what a memory-bound kernel can hope for."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / min(timed(lambda: target.copy_(source), "cuda") for _ in range(20)) / 1e9


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return f"{cpu or platform.processor()}, {torch.get_num_threads()} threads"


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks, as the allocators of training hosts (jemalloc, tcmalloc) do.

    By default it hands them back to the system, and faulting the pages in again costs more than the
    products do: the table would be one of page faults.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 2**30)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    if device == "cpu":
        keep_freed_memory()

    about = {"machine": machine(device), "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    bandwidth = copy_bandwidth() if device == "cuda" else None
    header = f"{'m,d,k':>12} {'dtype':>9} {'pass':>17} {'variant':>9} {'ms':>9} {'x chain':>8} {'best':>6} {'GB/s':>7}"
    print(header + (f" {'of floor':>9}   copy runs at {bandwidth:.0f} GB/s" if bandwidth else ""))
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for row in measure(shape, dtype, device, arguments.rounds):
                line = f"{','.join(map(str, shape)):>12} {row['dtype']:>9} {row['pass']:>17} {row['variant']:>9} "
                line += f"{row['milliseconds']:>9} {row['times_chain']:>8} {row['best_times_chain']:>6}"
                line += f" {row['gb_per_second']:>7}"
                if bandwidth:
                    row["share_of_floor"] = round(float(str(row["gb_per_second"])) / bandwidth, 3)
                    line += f" {row['share_of_floor']:>9}"
                print(line, flush=True)
                rows.append(row | about)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    target = arguments.output / f"fm_attention_{device}.csv"
    write_atomically(target, text.getvalue())
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
