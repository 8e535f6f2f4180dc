"""How fast is a whole training step on a GPU, and what does FM attention's op bring to it?

    python benchmarks/gpu_step.py [--shapes dhen-production wukong-26x16] [--seconds 160] [--output DIR]

A step is the lookup in one merged table, dense arch, DHEN, prediction heads, Eq. 4, backward, row-wise
Adagrad and fused Adam, on one batch that lies on the device. Variants: torch's products and attention ("bmm"), our
op for FM attention ("fm"), and our op for attention among fields as well ("ours"); eager, compiled, compiled with
CUDA graphs of torch.compile's own ("graphs": forward and backward) or with the whole step replayed as one; a
baseline or C2AL with its two auxiliary prediction heads. Variants of a precision take turns.

Roofline: the longer of FLOPs over the speed of a large matrix product in that precision and of bytes over the
bandwidth of a copy, both measured on this card. Bytes count what no fusion of the pointwise work saves:
the tables' rows (read, gradient written and read, row and gradient buffer read and written), Adam
(parameter and two moments read and written, gradient written and read), and the output of every Linear and of
FM attention (written, read forward, read backward, its gradient written and read).
Writes gpu_step_DEVICE.csv after every precision. Imports torch, c2al.nn, c2al.ops and c2al.config alone.
"""

import argparse
import functools
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, about, write_table
from shapes import SHAPES, Shape
from stack import Columns, MergedTable, PlainStep
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from c2al.nn import interactions
from c2al.ops.field_attention import field_attention
from c2al.ops.fm_attention import fm_attention

OPS = {
    "bmm": (functools.partial(fm_attention, backend="eager"), functools.partial(field_attention, backend="eager")),
    "fm": (fm_attention, functools.partial(field_attention, backend="eager")),
    "ours": (fm_attention, field_attention),
}
VARIANTS = (("bmm", "c2al"), ("ours", "c2al"), ("ours", "baseline"), ("fm", "c2al"))
MODES = ("graphs", "compiled", "eager", "graph")
COMPILE = {"eager": None, "compiled": "default", "graphs": "reduce-overhead", "graph": "default"}
PRECISIONS = ("bfloat16", "tf32", "float32")
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["dhen-production", "wukong-26x16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="steps of a variant in a round")
    parser.add_argument("--seconds", type=float, default=1e9, help="no variant is begun after this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is here")
    if arguments.device == "cpu":
        print("left out on a CPU: tf32 and CUDA graphs (graphs, graph)")
    deadline = time.monotonic() + arguments.seconds
    torch._dynamo.config.recompile_limit = 256  # every variant compiles the same function
    rows: list[dict[str, Any]] = []
    # Precision outside, so that a run cut short has the most important one of every shape.
    for precision in arguments.precisions:
        if precision == "tf32" and arguments.device == "cpu":
            continue
        for name in arguments.shapes:
            rows += measure(name, precision, arguments, deadline)
            write_table(
                arguments.output / f"gpu_step_{arguments.device}.csv", [r | about(arguments.device) for r in rows]
            )
    print(f"wrote {arguments.output / f'gpu_step_{arguments.device}.csv'}")


def measure(name: str, precision: str, arguments: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """One row for every variant that could be built in time."""
    shape, device = SHAPES[name](), arguments.device
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    limits = (matmul_flops(precision, device), copy_bytes(device))
    optimizer = shape.config.train.optimizer
    table = MergedTable(shape.rows, shape.config.model.embedding_dim, optimizer.sparse_lr, optimizer.sparse_eps, device)
    columns = Columns.random(len(shape.config.data.dense), table, shape.rows, shape.batch, device)
    runs: dict[tuple[str, str, str], Callable[[], object]] = {}
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for mode in arguments.modes:
        for op, arm in VARIANTS:
            if time.monotonic() > deadline or (mode.startswith("graph") and device == "cpu"):
                continue
            key = (op, mode, arm)
            try:
                runs[key], rows[key] = build(shape, table, columns, precision, *key, device)
            except Exception:  # one variant that fails must not take the others with it
                traceback.print_exc()
                print(f"{name} {precision} {' '.join(key)}: FAILED, see above", flush=True)
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in runs}
    for _ in range(arguments.rounds):
        for key, run in runs.items():
            seconds[key].append(timed(run, arguments.steps, device))
    for key, spent in seconds.items():
        finish(rows[key], spent, seconds, key, shape, limits)
        print(f"{name} {precision} " + ", ".join(f"{k} {v}" for k, v in rows[key].items()), flush=True)
    return [{"shape": name, "batch": shape.batch, "precision": precision} | row for row in rows.values()]


def build(
    shape: Shape, table: MergedTable, columns: Columns, precision: str, op: str, mode: str, arm: str, device: str
) -> tuple[Callable[[], object], dict[str, Any]]:
    """(one step, what is known of it before it is timed)."""
    table.reset()  # so that equal variants start from equal weights and report equal losses
    torch.manual_seed(0)
    step = PlainStep(shape.config, table, arm == "c2al", precision == "bfloat16", COMPILE[mode])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()

    def run() -> torch.Tensor:
        interactions.fm_attention, interactions.field_attention = OPS[op]
        return step(columns)

    flops, moved = cost(step, columns, op)
    for _ in range(WARM_UP):
        loss = run()  # after the one that was counted, the same number of steps for all
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss is {loss.item()}")
    replay: Callable[[], object] = run
    if mode == "graph":
        replay = captured(run, step)
        replay()
    row: dict[str, Any] = {"ops": op, "mode": mode, "arm": arm, "loss": round(loss.item(), 4)}
    row |= {"gflop": round(flops / 1e9, 6), "mib_moved": round(moved / 2**20, 3)}
    row["start_seconds"] = round(time.monotonic() - start, 1)
    if device == "cuda":
        row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return replay, row


def captured(run: Callable[[], object], step: PlainStep) -> Callable[[], object]:
    """The whole step as one CUDA graph."""
    for group in step.optimizer.param_groups:
        group["capturable"] = True
    for state in step.optimizer.state.values():
        state["step"] = state["step"].cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # allocations of the warm-up must not be the graph's
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def cost(step: PlainStep, columns: Columns, op: str) -> tuple[int, int]:
    """(FLOPs of forward and backward, bytes of the docstring's count), counted on an eager step."""
    interactions.fm_attention, interactions.field_attention = OPS[op]
    outputs = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal outputs
        outputs += output.numel() * output.element_size()
        if isinstance(module, interactions.YSource) and output.dim() == 3:
            outputs += output.numel() * output.element_size()  # G is as large as Y

    counted = [m for m in step.over.modules() if isinstance(m, (nn.Linear, interactions.YSource))]
    hooks = [module.register_forward_hook(count) for module in counted]
    loss, step.loss = step.loss, step._loss
    with FlopCounterMode(display=False) as flops:
        step(columns)
    step.loss = loss
    for hook in hooks:
        hook.remove()
    parameters = sum(p.numel() for p in step.over.parameters())
    looked_up = columns.row_V.numel() * step.table.weight_RD.shape[1] * 4
    return flops.get_total_flops(), 5 * outputs + 4 * 8 * parameters + 7 * looked_up


def finish(
    row: dict[str, Any], spent: list[float], every: dict[Any, list[float]], key: Any, shape: Shape, limits: Any
) -> None:
    """Speeds, the share of the roofline, and ratios to the sibling variants of the same rounds."""
    middle, (op, mode, arm) = statistics.median(spent), key
    row |= {f"{n}_ms": round(f(spent) * 1e3, 3) for n, f in (("median", statistics.median), ("min", min), ("max", max))}
    row["samples_per_second"] = round(shape.batch / middle)
    roof = max(row["gflop"] * 1e9 / limits[0], row["mib_moved"] * 2**20 / limits[1])
    row |= {"roofline_ms": round(roof * 1e3, 3), "share_of_roofline": round(roof / middle, 3)}
    row |= {"limit_tflops": round(limits[0] / 1e12, 2), "limit_gb_per_second": round(limits[1] / 1e9, 1)}
    ratios = {"over_bmm": ("bmm", mode, arm), "over_baseline": (op, mode, "baseline")}
    for name, other in ratios.items():
        pairs = [a / b for a, b in zip(spent, every.get(other, []), strict=False)]
        row[name] = round(statistics.median(pairs), 4) if pairs and other != key else ""


def timed(run: Callable[[], object], calls: int, device: str) -> float:
    """Seconds of one call, mean of some in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def matmul_flops(precision: str, device: str) -> float:
    """FLOP/s of a large matrix product in this precision."""
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    return 2 * size**3 / min(timed(lambda: a @ a, 3, device) for _ in range(4))


def copy_bytes(device: str) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(timed(lambda: target.copy_(source), 3, device) for _ in range(4))


if __name__ == "__main__":
    main()
