"""How fast does `c2al train` go, end to end from Parquet, beside other stacks, and where does a step's time go?

    python benchmarks/train.py [--shapes wukong-26x16 dhen-production demo kuairand] [--precision bfloat16]

Contenders, each round one after the other in a process of its own:

c2al       `c2al train` with train.compile = "on", from Parquet: reader, tables, model, metrics, as a user runs it
c2al-eager the same with train.compile = "off"
plain      the same model function in plain PyTorch (benchmarks/stack.py): one process, batches in memory, one
           merged table, fused Adam: the practical ceiling of eager torch
compiled   the same under torch.compile
dlrm       torchrec.models.dlrm on the same batches in memory: another model, for scale
fuxictr    the shape wukong-26x16 from FuxiCTR's blocks, with its own Parquet loader and training step
           (benchmarks/fuxi.py), float32 alone; other shapes, and all where the extra `benchmark` is not
           installed, are skipped with a reason

samples/s and samples per CPU second are of the steps after --warm-up; start-up is the time from the process's
start to the end of the warm-up, compiling included. Every process keeps freed memory, as c2al does.
Medians, minima and maxima over the rounds go to benchmarks/results/train.csv, written after every round.
--breakdown adds where a step of c2al goes, from a run of its own, not compiled, under torch.profiler (which slows
it: read it as shares): results/train_breakdown.csv.
"""

import argparse
import dataclasses
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, about, keep_freed_memory, write_table
from shapes import SHAPES, Shape

from c2al.config import Config, replace

KEY = ("shape", "precision", "contender", "threads")
"""What a row of train.csv is known by."""
CONTENDERS = ("c2al", "c2al-eager", "plain", "compiled", "dlrm", "fuxictr")
MODULES = (
    "DenseArch",
    "FMAttention",
    "LinearCompression",
    "Cross",
    "SelfAttention",
    "FieldLinear",
    "Heads",
    "Objective",
)
"""Parts of a forward pass, by the names of their classes; a FieldLinear is an ensemble's map or a shortcut."""
EVENTS = {
    "input distribution": "sparse_data_dist",
    "lookup": "embedding_codegen_lookup",
    "table update": "rowwise_adagrad",
    "dense optimizer": "Optimizer.step",
}
"""Parts that run elsewhere, by a piece of the profiler's name for them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[n for n in SHAPES if "tiny" not in n])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="measured steps of a round")
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    torch.set_num_threads(arguments.threads)
    rows, parts = [], []
    for name, precision in itertools.product(arguments.shapes, arguments.precision):
        with tempfile.TemporaryDirectory() as folder:
            write_data(SHAPES[name](), arguments, Path(folder))
            contenders = [
                c for c in arguments.contenders if c != "fuxictr" or ready(name, precision, arguments, Path(folder))
            ]
            results: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
            for round_ in range(arguments.rounds):
                for contender in contenders:
                    run = Path(folder) / f"{contender}{round_}"
                    if (result := spawn(contender, name, precision, arguments, run)) is not None:
                        results[contender].append(result)
            fresh = summaries(name, precision, results)
            rows += [row | {"threads": arguments.threads} | about() for row in fresh]
            if rows:  # every contender may have been skipped
                write_table(arguments.output / "train.csv", rows, key=KEY)
            if arguments.breakdown:
                result = spawn("breakdown", name, precision, arguments, Path(folder) / "breakdown") or {}
                for part, share in result.items():
                    print(f"{name} {precision} {part:>20} {share:7.2%}")
                    parts.append(
                        {"shape": name, "precision": precision, "part": part, "share": round(share, 4)} | about()
                    )
                write_table(arguments.output / "train_breakdown.csv", parts, key=("shape", "precision"))


def write_data(shape: Shape, arguments: argparse.Namespace, folder: Path) -> None:
    from made_rows import write  # pyarrow, which the children that need no Parquet do without

    write(shape.config.data, shape.batch * (arguments.warm_up + arguments.steps + 1), folder / "data")


def ready(shape: str, precision: str, arguments: argparse.Namespace, folder: Path) -> bool:
    """Whether FuxiCTR's data is written; the reason why not goes to the screen."""
    result = spawn("fuxictr-data", shape, precision, arguments, folder / "fuxictr-data")
    if result and result["skipped"]:
        print(f"{shape} {precision} fuxictr: skipped: {result['skipped']}", flush=True)
    return result is not None and not result["skipped"]


def spawn(
    contender: str, shape: str, precision: str, arguments: argparse.Namespace, run: Path
) -> dict[str, Any] | None:
    """What one run of a contender measured; None, and its words on the screen, where it failed."""
    command = [sys.executable, __file__, "--child", contender, "--shapes", shape, "--precision", precision]
    for name in ("threads", "steps", "warm_up"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    done = subprocess.run(
        [*command, "--folder", str(run)], env=os.environ | threads, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{shape} {precision} {contender}: FAILED\n{done.stderr[-2000:]}", flush=True)
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summaries(shape: str, precision: str, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for every contender that ran: medians, spread, and its speed over the plain stack's, round by round."""
    rows = []
    for contender, runs in results.items():
        if not runs:
            continue
        speed = [run["samples_per_second"] for run in runs]
        plain = [run["samples_per_second"] for run in results.get("plain", [])]
        row: dict[str, Any] = {"shape": shape, "precision": precision, "contender": contender, "rounds": len(runs)}
        row |= {
            "samples_per_second": round(statistics.median(speed)),
            "min": round(min(speed)),
            "max": round(max(speed)),
        }
        pairs = [a / b for a, b in zip(speed, plain, strict=False)]
        row["over_plain"] = round(statistics.median(pairs), 3) if pairs else ""
        cpu = [run["samples_per_cpu_second"] for run in runs]
        plain_cpu = [run["samples_per_cpu_second"] for run in results.get("plain", [])]
        pairs = [a / b for a, b in zip(cpu, plain_cpu, strict=False)]
        row["cpu_over_plain"] = round(statistics.median(pairs), 3) if pairs else ""
        for name in ("samples_per_cpu_second", "peak_mib", "start_seconds"):
            row[name] = round(statistics.median(run[name] for run in runs), 1)
        row["data_wait_share"] = (
            round(statistics.median(r["data_wait"] for r in runs), 4) if contender.startswith("c2al") else ""
        )
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
    return rows


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    shape, bfloat16 = SHAPES[arguments.shapes[0]](), arguments.precision[0] == "bfloat16"
    match arguments.child:
        case "c2al" | "c2al-eager":
            return c2al(training_config(shape, arguments), arguments.folder, arguments.warm_up)
        case "breakdown":
            return breakdown(training_config(shape, arguments), arguments.folder)
        case "dlrm":
            return in_memory(shape, arguments, dlrm_step)
        case "fuxictr-data":
            return fuxictr_data(shape, bfloat16, arguments)
        case "fuxictr":
            return fuxictr(shape, arguments)
    compiled = arguments.child == "compiled"
    return in_memory(shape, arguments, lambda s, table: _plain(s, table, bfloat16, compiled))


def training_config(shape: Shape, arguments: argparse.Namespace) -> Config:
    """The shape's config on the written data: no validation, log lines at the warm-up's end and at the last step."""
    config = dataclasses.replace(shape.config, axes=())
    steps = arguments.warm_up + arguments.steps
    return replace(
        config,
        **{
            "data.train": (str(arguments.folder.parent / "data"),),
            "data.validation": (),
            "data.test": (),
            "train.precision": arguments.precision[0],
            "train.compile": "on" if arguments.child == "c2al" else "off",
            "train.epochs": 2,
            "train.max_steps": steps,
            "train.log_every": arguments.warm_up,
            "train.eval_every": 0,
            "train.y_every": 0,
            "train.checkpoint.every_steps": 0,
        },
    )


def c2al(config: Config, folder: Path, warm_up: int) -> dict[str, Any]:
    """`c2al train`, read from its metrics.jsonl. CPU time is taken when a line appears, by a thread that looks."""
    seen: dict[int, tuple[float, float]] = {}
    """Lines of the log -> CPU time and time when they were first seen."""
    done = threading.Event()
    start = time.perf_counter()
    age = _age(start)

    def look() -> None:
        while not done.wait(0.02):
            path = folder / "metrics.jsonl"
            lines = path.read_bytes().count(b"\n") if path.exists() else 0
            seen.setdefault(lines, (time.process_time(), time.perf_counter()))

    threading.Thread(target=look, daemon=True).start()
    records = run_training(config, folder)
    done.set()
    measured = records[1:]
    steps = measured[-1]["step"] - records[0]["step"]
    seconds = sum(r["seconds"]["total"] for r in measured)
    last = max(line for line in seen if line <= len(records))
    cpu = seen[last][0] - seen[1][0]
    counted = records[last - 1]["step"] - records[0]["step"]
    return {
        "samples_per_second": steps * config.train.batch_size / seconds,
        "samples_per_cpu_second": counted * config.train.batch_size / cpu,
        "data_wait": sum(r["seconds"].get("data", 0.0) for r in measured) / seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "start_seconds": seen[1][1] - start + age,
    }


def run_training(config: Config, folder: Path) -> list[dict[str, Any]]:
    """The log lines of a training run."""
    from c2al.distributed.process import process_group
    from c2al.training.trainer import train

    with process_group(config.dist) as world:
        train(config, folder, world)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def breakdown(config: Config, folder: Path) -> dict[str, float]:
    """Share of every part in the time of the profiled run's steps."""
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
    from torch.profiler import ProfilerActivity, profile, record_function

    scopes: list[Any] = []

    def enter(module: torch.nn.Module, inputs: object) -> None:
        if type(module).__name__ in MODULES:
            scopes.append(record_function(f"module {type(module).__name__}"))
            scopes[-1].__enter__()

    def leave(module: torch.nn.Module, inputs: object, output: object) -> None:
        if type(module).__name__ in MODULES:
            scopes.pop().__exit__(None, None, None)

    config = replace(config, **{"train.max_steps": 3 * config.train.log_every})
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        records = run_training(config, folder)
    for hook in hooks:
        hook.remove()
    total = sum(r["seconds"]["total"] for r in records)
    spent = {"data wait": sum(r["seconds"].get("data", 0.0) for r in records)}
    averages = profiler.key_averages()
    for module in MODULES:
        spent[module] = sum(e.cpu_time_total for e in averages if e.key == f"module {module}") / 1e6
    for part, piece in EVENTS.items():
        spent[part] = max((e.cpu_time_total for e in averages if piece in e.key), default=0.0) / 1e6
    for section in ("backward", "optimizer", "checkpoint"):
        spent[section] = sum(r["seconds"].get(section, 0.0) for r in records)
    spent["backward without table update"] = spent.pop("backward") - spent["table update"]
    spent["dense optimizer"] = max(spent["dense optimizer"], spent.pop("optimizer"))
    spent["metrics, logging and the rest"] = total - sum(spent.values())
    return {part: seconds / total for part, seconds in spent.items()}


def in_memory(shape: Shape, arguments: argparse.Namespace, make: Callable[[Shape, Any], Any]) -> dict[str, Any]:
    """Steps on batches that lie in memory."""
    from made_rows import in_memory as batches_of
    from stack import MergedTable

    keep_freed_memory()
    start = time.perf_counter()
    optimizer = shape.config.train.optimizer
    table = MergedTable(shape.rows, shape.config.model.embedding_dim, optimizer.sparse_lr, optimizer.sparse_eps)
    batches = itertools.cycle(batches_of(shape.config.data, table, shape.rows, shape.batch, 8))
    return measure(make(shape, table), batches, shape, arguments, start)


def measure(
    step: Callable[[Any], torch.Tensor],
    batches: Iterator[Any],
    shape: Shape,
    arguments: argparse.Namespace,
    start: float,
) -> dict[str, Any]:
    """What steps take after the warm-up; `start`: perf_counter when the process began its work."""
    for _ in range(arguments.warm_up):
        step(next(batches))
    ready, cpu = time.perf_counter(), time.process_time()
    for _ in range(arguments.steps):
        loss = step(next(batches))
    seconds, cpu = time.perf_counter() - ready, time.process_time() - cpu
    if not torch.isfinite(loss):
        raise SystemExit(f"the loss is {loss.item()}")
    return {
        "samples_per_second": arguments.steps * shape.batch / seconds,
        "samples_per_cpu_second": arguments.steps * shape.batch / cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "start_seconds": ready - start + _age(start),
    }


def fuxictr_data(shape: Shape, bfloat16: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    from fuxi import prepare, reason_to_skip

    if not (reason := reason_to_skip(shape, bfloat16)):
        prepare(shape, arguments.folder.parent)
    return {"skipped": reason}


def fuxictr(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of FuxiCTR on batches that its loader makes of its Parquet."""
    from fuxi import model_and_batches

    keep_freed_memory()
    start = time.perf_counter()
    model, batches = model_and_batches(shape, arguments.folder.parent)
    return measure(lambda batch: model.train_step(batch).detach(), batches, shape, arguments, start)


def _plain(shape: Shape, table: Any, bfloat16: bool, compiled: bool) -> Any:
    from stack import PlainStep

    return PlainStep(shape.config, table, False, bfloat16, "default" if compiled else None)


def dlrm_step(shape: Shape, table: Any) -> Callable[[Any], torch.Tensor]:
    """torchrec's DLRM above the merged table, whose lookup and update are those of the plain stack."""
    from torchrec.models.dlrm import DenseArch, InteractionArch, OverArch

    dim, fields = shape.config.model.embedding_dim, len(shape.rows)
    dense = DenseArch(len(shape.config.data.dense), [*shape.config.model.dense_hidden, dim])
    inter = InteractionArch(fields)
    over = OverArch(dim + fields * (fields + 1) // 2, [*shape.config.model.head_hidden, 1])
    modules = torch.nn.ModuleList([dense, inter, over])
    optimizer = torch.optim.Adam(modules.parameters(), lr=shape.config.train.optimizer.dense_lr, fused=True)

    def step(c: Any) -> torch.Tensor:
        pooled_BND = table.lookup(c.row_V, c.bag_V, len(c.label_B))
        logit_B = over(inter(dense(c.dense_BF), pooled_BND)).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logit_B, c.label_B, c.weight_B)
        loss.backward()
        table.update(c.row_V, c.bag_V, pooled_BND.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _age(moment: float) -> float:
    """Seconds from the process's start to `moment` of perf_counter, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return up - ticks / os.sysconf("SC_CLK_TCK") - (time.perf_counter() - moment)


if __name__ == "__main__":
    main()
