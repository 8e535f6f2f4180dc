"""accumulators.npz: counts on disk, written whole and read strictly.

The file is a zip of uncompressed .npy arrays of integers: `head`, which holds JSON, and for each
target i the cells that are not 0 as `fine{i}_at` and `fine{i}`, `group{i}_at` and `group{i}`. A file may
come from anywhere, so nothing in it is trusted: no pickle is loaded, no size that the file states is
allocated before it is checked against the file's own length, and counts that no scan can yield are
refused.
"""

import dataclasses
import io
import itertools
import math
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from c2al.config import Axis
from c2al.data.cohort_codes import Category
from c2al.data.identity import FileIdentity
from c2al.discovery.accumulators import Accumulators
from c2al.discovery.axes import Columns, Cuts, Target, cut_problem, targets
from c2al.discovery.histogram import COARSE, COUNT, GROUPS, LOW, LOW_MASK, SLOTS, Counts, Key, key_order, to_coarse
from c2al.errors import C2ALError, CheckpointError
from c2al.files import write_atomically
from c2al.state import parse_state, state_text

FORMAT, VERSION = "c2al.accumulators", 2

_MOST_ROWS = 1 << 45
"""Of one file: the low bits of so many rows sum to less than 2^62."""

Unit = tuple[int, int]
"""(file, row group)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Head:
    axes: tuple[Axis, ...]
    cuts: dict[str, tuple[float, ...]]
    columns: Columns
    jackknife: bool
    files: tuple[FileIdentity, ...]
    keys: tuple[tuple[tuple[Category | None, ...], ...], ...]
    finished: tuple[Unit, ...] | None
    """Row groups that the counts hold; None: all."""


def save_accumulators(path: str | os.PathLike[str], total: Accumulators, finished: Sequence[Unit] | None) -> None:
    """Writes one .npz atomically. `finished`: the row groups that are counted, None for all."""
    head = _Head(
        axes=total.axes,
        cuts=total.cuts,
        columns=total.columns,
        jackknife=total.jackknife,
        files=total.files,
        keys=tuple(c.keys for c in total.counts),
        finished=None if finished is None else tuple(finished),
    )
    text = state_text(head, format=FORMAT, version=VERSION)
    arrays: dict[str, npt.NDArray[Any]] = {"head": np.frombuffer(text.encode(), np.uint8)}
    for i, counts in enumerate(total.counts):
        for name, array in (("fine", counts.fine_CS22), ("group", counts.group_CGK)):
            at = np.flatnonzero(array)  # most cells are empty
            arrays |= {f"{name}{i}_at": _narrow(at), f"{name}{i}": _narrow(array.reshape(-1)[at])}
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)
    write_atomically(path, packed.getvalue())


def load_accumulators(path: str | os.PathLike[str]) -> tuple[Accumulators, tuple[Unit, ...] | None]:
    """(accumulators, finished row groups or None for all) of a saved file.

    Raises CheckpointError naming the file if it cannot be read, is of another format or version, or
    holds anything that `save_accumulators` does not write.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            text = _array(archive, "head").tobytes()
            head = parse_state(text, str(path), _Head, format=FORMAT, version=VERSION, error=CheckpointError)
            counts = _counts(archive, head)
    except C2ALError:
        raise
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: not the accumulators of a scan: no such file") from e
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError) as e:
        raise CheckpointError(f"{path}: not the accumulators of a scan: {e}") from e
    except MemoryError as e:
        raise CheckpointError(f"{path}: its counts do not fit into this machine's memory") from e
    total = Accumulators(
        axes=head.axes,
        cuts=head.cuts,
        columns=head.columns,
        jackknife=head.jackknife,
        files=head.files,
        counts=counts,
    )
    return total, head.finished


def _counts(archive: zipfile.ZipFile, head: _Head) -> tuple[Counts, ...]:
    """Counts of every target. Raises ValueError for what no scan yields."""
    if problem := cut_problem(head.axes, head.cuts):
        raise ValueError(problem)
    if len({a.name for a in head.axes}) < len(head.axes):
        raise ValueError("two axes have one name")
    wanted = targets(head.axes)
    if len(head.keys) != len(wanted):
        raise ValueError(f"it holds {len(head.keys)} targets, its axes have {len(wanted)}")
    found = []
    for i, (target, keys) in enumerate(zip(wanted, head.keys, strict=True)):
        _check_keys(keys, target, head.cuts)
        groups = GROUPS if head.jackknife else 0
        counts = Counts(
            keys,
            _cells(archive, f"fine{i}", (len(keys), SLOTS, 2, 2)),
            _cells(archive, f"group{i}", (len(keys), groups, COARSE)),
        )
        _check_sums(counts, head.jackknife)
        found.append(counts)
    rows = {int(c.fine_CS22[..., COUNT].sum()) for c in found}
    if len(rows) > 1:
        raise ValueError(f"its targets hold different numbers of rows: {sorted(rows)}")
    return tuple(found)


def _check_keys(keys: Sequence[Key], target: Target, cuts: Cuts) -> None:
    for key in keys:
        if len(key) != len(target):
            raise ValueError(f"cohort {key!r} has not one category for each of {[a.name for a in target]}")
        for axis, category in zip(target, key, strict=True):
            if category is None or axis.kind == "categorical":
                continue
            if type(category) is not int or not 0 <= category <= len(cuts[axis.name]):
                raise ValueError(f"cohort {key!r}: axis '{axis.name}' has no interval {category!r}")
    try:
        ascend = all(key_order(a) < key_order(b) for a, b in itertools.pairwise(keys))
    except TypeError as e:
        raise ValueError(f"cohorts of different types: {e}") from e
    if not ascend:
        raise ValueError("cohorts are not in ascending order, or one is there twice")


def _check_sums(counts: Counts, jackknife: bool) -> None:
    count_CS2, low_CS2 = counts.fine_CS22[..., COUNT], counts.fine_CS22[..., LOW]
    if not count_CS2.any(axis=(1, 2)).all():
        raise ValueError("a cohort has no rows")
    if max(count_CS2.sum(dtype=np.float64), counts.group_CGK.sum(dtype=np.float64)) > _MOST_ROWS:
        raise ValueError(f"it counts more than {_MOST_ROWS} rows")
    if (low_CS2 > count_CS2 * LOW_MASK).any():
        raise ValueError("low bits exceed what their rows can have")
    if jackknife and not np.array_equal(counts.group_CGK.sum(1), to_coarse(count_CS2.sum(-1))):
        raise ValueError("the user groups do not add up to the rows")


def _cells(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """An array of `shape` from its cells that are not 0, which ascend."""
    at, values = _array(archive, f"{name}_at"), _array(archive, name)
    size = math.prod(shape)
    if len(at) != len(values) or (len(at) and int(at[-1]) >= size) or (at[1:] <= at[:-1]).any():
        raise ValueError(f"{name}: its cells do not ascend within {shape}")
    if len(values) and not 0 < int(values.min()) <= int(values.max()) <= _MOST_ROWS * LOW_MASK:
        raise ValueError(f"{name}: holds a count of {int(values.min())} or {int(values.max())}")
    if len(at) < shape[0] * bool(size):
        raise ValueError(f"{name}: a cohort has no rows")
    array = np.zeros(shape, np.int64)
    array.reshape(-1)[at.astype(np.int64)] = values
    return array


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """A member of one dimension and unsigned type. Its size is checked before anything is allocated."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    data = io.BytesIO(archive.read(info))
    version = np.lib.format.read_magic(data)
    if version != (1, 0):
        raise ValueError(f"{name} is of .npy version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(data)
    left = info.file_size - data.tell()
    if dtype.kind != "u" or len(shape) != 1 or shape[0] * dtype.itemsize != left:
        raise ValueError(f"{name} is {dtype} of shape {shape} in {left} bytes")
    return np.frombuffer(data.getvalue(), dtype, offset=data.tell())


def _narrow(values: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The same non-negative integers in as few bytes as hold them all."""
    return values.astype(np.min_scalar_type(values.max(initial=0)))
