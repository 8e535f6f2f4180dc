"""Compiles the shipped kernel configurations for sm_90 and prints one JSON line each. No GPU needed.

    python triton_compile_cases.py [--costliest | --variants]

A configuration is compiled for a full block. Four variants can be its costliest: both layouts, with and
without LayerNorm, and with shared Y backward, whose dY lives across samples. Of these each configuration that was
timed on a card gets one, in turn, and so does every third of the others; with --costliest, all get all four.
--variants compiles every variant instead.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from c2al.ops.triton import field_kernels, field_launch, kernels
from c2al.ops.triton.configurations import BLOCKS_K, BLOCKS_P, BLOCKS_Q, MEASURED, MEASURED_ROWS, configurations

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MEASURED_CASES = {c for table in (MEASURED, MEASURED_ROWS) for found in table.values() for c in found}
LONG = 1024  # beyond every block: a length that streams


def shipped():
    """Every (direction, precision, configuration) that some shape gets."""
    shapes = itertools.product((*BLOCKS_P, 512, LONG), (*BLOCKS_Q, LONG), BLOCKS_K)
    cases = itertools.product(("forward", "backward"), ("half", "tf32", "ieee"), shapes)
    return sorted({(d, kind, c) for d, kind, shape in cases for c in configurations(d, *shape, kind)})


def usage(case):
    """(registers, stack bytes, shared bytes) of one compiled kernel."""
    direction, precision, config, paper, shared, norm, element = case
    p, q = (config.block_p, LONG) if config.schedule == "columns" else (LONG, config.block_q)
    kernel = getattr(kernels, f"{direction}_{config.schedule}")
    constants = {
        "P": p, "Q": q, "K": config.block_k, "PAPER": paper, "SHARED": shared, "NORM": norm,
        "PRECISION": "ieee" if precision == "ieee" else "tf32",
        "BLOCK_P": config.block_p, "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k,
    }  # fmt: skip
    types = dict.fromkeys(kernel.arg_names, f"*{element}") | dict.fromkeys(constants, "constexpr")
    types |= {"stride_b": "i32", "stride_m": "i32", "batch": "i32", "eps": "fp32", "rstd": "*fp32"}
    if shared:
        types["dy"] = "*fp32"
    return resources(kernel, types, constants, config.warps, config.stages)


def field_usage(case):
    """The same of attention among fields."""
    kernel, block_m, block_s = case
    constants = {"M": block_m, "D": 4 * block_s, "HEADS": 4, "BLOCK_M": block_m, "BLOCK_S": block_s}
    types = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(constants, "constexpr") | {"scale": "fp32"}
    return resources(kernel, types, constants, field_launch.warps_of(block_m), field_launch.STAGES)


def resources(kernel, types, constants, warps, stages):
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = [i for i, n in enumerate(signature) if signature[n].startswith("*") or n.startswith("stride")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def cases(which):
    variants = which == "--variants"
    for number, (direction, precision, config) in enumerate(shipped()):
        elements = {"half": ("bf16", "fp16") if variants else ("bf16",)}.get(precision, ("fp32",))
        for element in elements:
            if variants:
                for flags in itertools.product((True, False), repeat=3):
                    yield (direction, precision, config, *flags, element)
            else:
                if not which and number % 3 and config not in MEASURED_CASES:
                    continue
                costliest = list(itertools.product((True, False), repeat=2))
                for paper, norm in costliest if which == "--costliest" else [costliest[number % 4]]:
                    yield (direction, precision, config, paper, direction == "backward", norm, element)


def main():
    todo = list(cases(sys.argv[1] if len(sys.argv) > 1 else ""))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # cold, so that what is measured is what this source gives
        with get_context("fork").Pool(2) as pool:
            for case, (registers, stack, shared) in zip(todo, pool.imap(usage, todo, chunksize=4), strict=True):
                timed = case[2] in MEASURED_CASES
                row = {"case": str(case), "registers": registers, "stack": stack, "shared": shared, "timed": timed}
                print(json.dumps(row), flush=True)
            kernels_of_fields = (field_kernels.forward, field_kernels.backward)
            for kernel, block_m, block_s in itertools.product(kernels_of_fields, (16, 32, 64, 128), (16, 32, 64)):
                registers, stack, shared = field_usage((kernel, block_m, block_s))
                name = f"attention among fields {kernel.__name__} {block_m} {block_s}"
                row = {"case": name, "registers": registers, "stack": stack, "shared": shared, "timed": False}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
