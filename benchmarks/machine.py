"""What every benchmark says of the machine, and how it writes its table. Imports torch alone."""

import csv
import ctypes
import datetime
import importlib.metadata
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
"""Processor flags that decide which matrix kernels run."""
PACKAGES = ("torch", "triton", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy", "fuxictr")


def about(device: str = "cpu") -> dict[str, str]:
    """Date, machine and versions: the last columns of every table."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        found.append(f"cuda {torch.version.cuda}")
    return {"date": datetime.date.today().isoformat(), "machine": machine(device), "versions": ", ".join(found)}


def machine(device: str = "cpu") -> str:
    """The card, or the processor with the flags that matter and the threads torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    fields = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = [flag for flag in FLAGS if flag in fields.get("flags", "").split()]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({' '.join(flags)}), {torch.get_num_threads()} threads"


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks, as the allocators of training hosts (jemalloc, tcmalloc) do.

    By default it hands them back to the system, and faulting the pages in again costs more than the
    products do: the table would be one of page faults.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 2**30)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def write_table(path: Path, rows: Sequence[Mapping[str, object]], key: Sequence[str] = ()) -> None:
    """Replaces `path` by a CSV of the rows. Called after every row, so that a job cut short leaves its rows.

    With a `key`, rows of the file that have other values in these columns stay, so that a table can be made by
    several commands.
    """
    if key and path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
        new = {tuple(str(row[name]) for name in key) for row in rows}
        rows = [row for row in old if tuple(row.get(name) for name in key) not in new] + list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text.getvalue())
    temporary.replace(path)
