"""How fast is FM attention against the ways one would write it in torch?

    python benchmarks/fm_attention.py [--threads 2] [--rounds 15] [--device cpu] [--norm]

Every round times a short burst of every variant, so that whatever else the machine does falls on all alike; a
row is the median of the rounds, a speed-up the median of the rounds' own ratios, and "best" compares
the fastest round of each, which a busy machine distorts least. GB/s counts the fewest bytes any
kernel must move, and "of floor" is its share of what a copy reaches on this card. --norm adds the LayerNorm
that a model has. Writes its table to benchmarks/results/ after every row. On a CPU our function is
the chain itself. Imports torch and c2al.ops alone.

Legend: B batch, m fields, d embedding dim, k columns of Y; layout "paper", so A = x^T is d x m.
"""

import argparse
import functools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from machine import RESULTS, about, keep_freed_memory, write_table
from torch import Tensor
from torch.nn import functional as F

from c2al.ops.fm_attention import fm_attention

SHAPES = ((16, 64, 8), (48, 64, 16), (128, 128, 32), (512, 128, 64), (256, 256, 64), (128, 512, 32), (512, 256, 128))
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


NORM_EPS = 1e-5


def variants(device: str, norm: bool) -> dict[str, Variant]:
    """Every contender; with `norm` all of them normalise the rows of G."""
    plain: dict[str, Variant] = {"chain": chain, "function": Function.apply}
    if device == "cpu":
        plain |= {"gram": gram, "einsum": einsum}
    if norm:
        plain = {name: functools.partial(_normed, variant) for name, variant in plain.items()}
    torch.compiler.reset()  # else every shape and mode counts against one recompilation limit
    ours = functools.partial(fm_attention, layout="paper", norm_eps=NORM_EPS if norm else None)
    return plain | {"compiled": torch.compile(plain["chain"], fullgraph=True), "ours": ours}


def _normed(variant: Variant, x: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(variant(x, y), y.shape[-1:], eps=NORM_EPS)


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


def measure(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    rounds: int,
    norm: bool,
    batch: int,
    without: list[str],
) -> Iterator[dict[str, object]]:
    """One row for every variant, forward alone and with backward."""
    m, d, k = shape
    x = torch.randn(batch, m, d, dtype=dtype, device=device, requires_grad=True)
    y = torch.randn(batch, d, k, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(batch, d, k, dtype=dtype, device=device)
    every = {name: v for name, v in variants(device, norm).items() if name not in without}

    def forward(variant: Variant) -> None:
        with torch.no_grad():
            variant(x, y)

    def both(variant: Variant) -> None:
        torch.autograd.grad(variant(x, y), (x, y), grad)

    for name, work, elements in (
        ("forward", forward, m * d + 2 * d * k),
        ("forward+backward", both, 3 * m * d + 5 * d * k),
    ):
        seconds = interleaved({v: functools.partial(work, f) for v, f in every.items()}, device, rounds)
        for variant, spent in seconds.items():
            chained = seconds.get("chain", spent)
            ratios = [c / s for c, s in zip(chained, spent, strict=True)]
            middle = statistics.median(spent)
            yield {
                "m": m, "d": d, "k": k, "batch": batch, "norm": norm, "pass": name, "variant": variant,
                "milliseconds": round(middle * 1e3, 3),
                "times_chain": round(statistics.median(ratios), 2),
                "best_times_chain": round(min(chained) / min(spent), 2),
                "gb_per_second": round(batch * elements * x.element_size() / middle / 1e9, 1),
            }  # fmt: skip


def interleaved(work: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every variant; one that fails is told and left out."""
    seconds: dict[str, list[float]] = {variant: [] for variant in work}
    for turn in range(rounds + 2):  # the first two warm up: compilation, tuning, page faults
        for variant in list(seconds):
            try:
                spent = burst(work[variant], device)
            except Exception:
                traceback.print_exc()
                print(f"{variant}: FAILED, see above", flush=True)
                del seconds[variant]
                continue
            if turn >= 2:
                seconds[variant].append(spent)
    return seconds


def copy_bandwidth() -> float:
    """GB/s of a copy on this card, read and write: what a memory-bound kernel can hope for."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / min(timed(lambda: target.copy_(source), "cuda") for _ in range(20)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--norm", action="store_true", help="with the LayerNorm that a model has")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, help="m,d,k")
    parser.add_argument("--batch", type=int, default=0, help="default: 16384 on a GPU, 8M elements of x on a CPU")
    parser.add_argument("--without", nargs="+", default=[], help="variants to leave out")
    parser.add_argument("--seconds", type=float, default=1e9, help="no shape is begun after this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device, deadline = arguments.device, time.monotonic() + arguments.seconds
    torch.set_num_threads(arguments.threads)
    if device == "cpu":
        keep_freed_memory()
    target = arguments.output / f"fm_attention{'_norm' if arguments.norm else ''}_{device}.csv"
    last = about(device)
    bandwidth = copy_bandwidth() if device == "cuda" else None
    print(", ".join(f"{key} {value}" for key, value in last.items()))
    print(
        f"{'m,d,k':>12} {'dtype':>9} {'pass':>17} {'variant':>9} {'ms':>9} {'x chain':>8} {'best':>6} {'GB/s':>7}",
        end="",
    )
    print(f" {'of floor':>9}   copy runs at {bandwidth:.0f} GB/s" if bandwidth else "")
    rows: list[dict[str, object]] = []
    for kind in ("bfloat16", "tf32", "float32") if device == "cuda" else ("float32", "bfloat16"):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        for shape in arguments.shapes:
            if time.monotonic() > deadline:
                print(f"{kind} {shape}: not measured, the time is up")
                continue
            batch = arguments.batch or (GPU_BATCH if device == "cuda" else CPU_ELEMENTS // (shape[0] * shape[1]))
            for row in measure(shape, dtype, device, arguments.rounds, arguments.norm, batch, arguments.without):
                line = f"{','.join(map(str, shape)):>12} {kind:>9} {row['pass']:>17} {row['variant']:>9} "
                line += f"{row['milliseconds']:>9} {row['times_chain']:>8} {row['best_times_chain']:>6}"
                line += f" {row['gb_per_second']:>7}"
                row = {"dtype": kind} | row
                if bandwidth:
                    row["share_of_floor"] = round(float(str(row["gb_per_second"])) / bandwidth, 3)
                    line += f" {row['share_of_floor']:>9}"
                print(line, flush=True)
                rows.append(row | last)
            write_table(target, rows)
    print(f"wrote {target}")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
