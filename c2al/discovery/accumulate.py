"""From declared axes to counts: what to count in one pass, and the counts of every axis afterwards.

A target is a set of plain axes counted together. A cross contains its parts, whose counts are sums
of the cross's; so only the axes that no other axis contains are counted.
"""

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from c2al.config import Axis
from c2al.data.cohorts import CohortSpec, Condition
from c2al.discovery.codes import Categories, Encoder, Intervals, Numbering, user_groups
from c2al.discovery.histogram import COARSE, GROUPS, SLOTS, BlockCounter, Counts, Key, PreparedRows
from c2al.errors import CheckpointError, CohortError, DataError
from c2al.files import write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_ROWS = 1 << 17
"""Rows counted at a time: few enough to stay in the last-level cache, enough that 30 us of Python a block
cost 0.2 ns a row (measured: 64k to 256k within 10%, 16k 1.5 times as long)."""

Cuts = Mapping[str, tuple[float, ...]]
"""Ascending cuts of every numeric plain axis, by its name; float32 values."""

Target = tuple[Axis, ...]
"""Plain axes counted together, in the order of their declaration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns discovery reads besides the axes'."""

    prediction: str
    label: str
    user: str


def plain_axes(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes that read a column, in the order of their declaration."""
    return tuple(a for a in axes if a.kind != "cross")


def parts(axis: Axis, axes: Sequence[Axis]) -> Target:
    """The plain axes of an axis, in the order it names them. Raises CohortError for a column used twice."""
    found = tuple(next(a for a in axes if a.name == name) for name in axis.cross) or (axis,)
    if len({a.column for a in found}) < len(found):
        raise CohortError(f"axis '{axis.name}' crosses column '{found[0].column}' with itself")
    return found


def targets(axes: Sequence[Axis]) -> tuple[Target, ...]:
    """What to count so that every axis is a sum of some target: the largest sets of parts."""
    sets = {a.name: frozenset(p.name for p in parts(a, axes)) for a in axes}
    largest = dict.fromkeys(s for s in sets.values() if not any(s < other for other in sets.values()))
    return tuple(tuple(a for a in plain_axes(axes) if a.name in names) for names in largest)


def fixed_cuts(axes: Sequence[Axis]) -> dict[str, tuple[float, ...]]:
    """The cuts of the axes of kind 'edges'. Raises CohortError where two edges are one float32."""
    cuts = {a.name: float32_cuts(a.edges) for a in axes if a.kind == "edges"}
    for name, values in cuts.items():
        if len(set(values)) < len(values):
            raise CohortError(f"axis '{name}': two edges are the same float32: {list(values)}")
    return cuts


def float32_cuts(cuts: Sequence[float]) -> tuple[float, ...]:
    """Rounded to float32, as the shortest decimals that read back as the same float32."""
    return tuple(float(str(np.float32(c))) for c in cuts)


class BlockScanner:
    """Counts blocks of rows into the targets of a set of axes; one a thread."""

    def __init__(self, axes: Sequence[Axis], cuts: Cuts, columns: Columns, *, cap: int, jackknife: bool):
        self._columns, self._jackknife = columns, jackknife
        self._plain = plain_axes(axes)
        self._encoders: dict[str, Encoder] = {
            a.name: Categories(a.column, a.name)
            if a.kind == "categorical"
            else Intervals(cuts[a.name], a.column, a.name)
            for a in self._plain
        }
        self._targets: list[tuple[Target, Numbering, BlockCounter]] = []
        for target in targets(axes):
            encoders = [self._encoders[a.name] for a in target]
            numbering = Numbering(encoders, " x ".join(a.name for a in target), cap)
            self._targets.append((target, numbering, BlockCounter(jackknife)))
        self._rows = PreparedRows(BLOCK_ROWS)

    def add(self, block: "pa.RecordBatch", first_row: int) -> None:
        """Counts at most BLOCK_ROWS rows; `first_row` is the number of the first one in messages.

        Raises DataError naming column, row and value for a null, a prediction outside
        [0, 1] or a label that is neither 0 nor 1; CohortError for an axis column of a wrong type or
        with too many cohorts.
        """
        prediction_R = _floats(block, self._columns.prediction, first_row)
        label_R = _floats(block, self._columns.label, first_row)
        group_R = user_groups(block.column(self._columns.user), self._columns.user) if self._jackknife else None
        valid = self._rows.fill(prediction_R, label_R, group_R)
        if valid < len(label_R):
            p, label = float(prediction_R[valid]), float(label_R[valid])
            wrong = (
                f"column '{self._columns.label}' holds {label!r}, needs 0 or 1"
                if 0 <= p <= 1
                else f"column '{self._columns.prediction}' holds {p!r}, needs a probability in [0, 1]"
            )
            raise DataError(f"row {first_row + valid}: {wrong}")
        digits = {a.name: self._encoders[a.name](block.column(a.column)) for a in self._plain}
        for target, numbering, counter in self._targets:
            counter.add(self._rows, numbering([digits[a.name] for a in target]), len(numbering.keys))

    def take(self) -> tuple[Counts, ...]:
        """The counts of every target since the last call."""
        return tuple(counter.take(numbering.keys) for _, numbering, counter in self._targets)


def _floats(block: "pa.RecordBatch", column: str, first_row: int) -> npt.NDArray[np.float32]:
    import pyarrow as pa

    values = block.column(column)
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"row {first_row + row}: column '{column}' is null")
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        raise DataError(f"column '{column}' is {values.type}, needs a number")
    numbers = values.cast(pa.uint8()) if pa.types.is_boolean(values.type) else values
    return np.asarray(np.from_dlpack(numbers), np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accumulators:
    """Everything one scan counted: sums, so that days, shards, ranks and threads simply add up."""

    axes: tuple[Axis, ...]
    cuts: dict[str, tuple[float, ...]]
    jackknife: bool
    counts: tuple[Counts, ...]
    """Of every target of `targets(axes)`."""

    @classmethod
    def empty(cls, axes: Sequence[Axis], cuts: Cuts, jackknife: bool) -> "Accumulators":
        nothing = Counts((), np.zeros((0, SLOTS, 2, 2), np.int64), np.zeros((0, GROUPS * jackknife, COARSE), np.int64))
        counts = (nothing,) * len(targets(axes))
        return cls(axes=tuple(axes), cuts=dict(cuts), jackknife=jackknife, counts=counts)

    def plus(self, counts: Sequence[Counts]) -> "Accumulators":
        """With the counts of further rows, target by target."""
        return dataclasses.replace(self, counts=tuple(a + b for a, b in zip(self.counts, counts, strict=True)))

    def of_axis(self, axis: Axis) -> Counts:
        """The counts of one declared axis; key components in the order of `parts`."""
        wanted = parts(axis, self.axes)
        target, counts = next(
            (t, c) for t, c in zip(targets(self.axes), self.counts, strict=True) if set(wanted) <= set(t)
        )
        return counts.marginal([target.index(a) for a in wanted])

    def save(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Writes one .npz atomically; `extra` is JSON that `load` gives back."""
        head = {
            "version": 1,
            "axes": [dataclasses.asdict(a) for a in self.axes],
            "cuts": self.cuts,
            "jackknife": self.jackknife,
            "keys": [c.keys for c in self.counts],
            "extra": extra,
        }
        arrays: dict[str, npt.NDArray[Any]] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
        for i, counts in enumerate(self.counts):
            for name, array in (("fine", counts.fine_CS22), ("group", counts.group_CGK)):
                at = np.flatnonzero(array)  # most cells are empty
                arrays |= {f"{name}{i}_shape": np.array(array.shape), f"{name}{i}_at": _narrow(at)}
                arrays[f"{name}{i}"] = _narrow(array.reshape(-1)[at])
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **arrays)
        write_atomically(path, packed.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple["Accumulators", dict[str, Any]]:
        """(accumulators, extra) of a saved file. Raises CheckpointError naming the file if it is not one."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                head = json.loads(arrays["head"].tobytes())
                if head["version"] != 1:
                    raise CheckpointError(f"{path}: version is {head['version']!r}, this c2al reads version 1")
                counts = tuple(
                    Counts(tuple(tuple(k) for k in keys), *(_dense(arrays, f"{n}{i}") for n in ("fine", "group")))
                    for i, keys in enumerate(head["keys"])
                )
        except (OSError, ValueError, KeyError, EOFError) as e:
            raise CheckpointError(f"{path}: not the accumulators of a scan: {e!r}") from e
        axes = []
        for saved in head["axes"]:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
            axes.append(Axis(**fields))
        cuts = {name: tuple(values) for name, values in head["cuts"].items()}
        return cls(axes=tuple(axes), cuts=cuts, jackknife=head["jackknife"], counts=counts), head["extra"]


def _narrow(values: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The same non-negative integers in as few bytes as hold them all."""
    return values.astype(np.min_scalar_type(values.max(initial=0)))


def _dense(arrays: Any, name: str) -> npt.NDArray[np.int64]:
    array = np.zeros(arrays[f"{name}_shape"], np.int64)
    array.flat[arrays[f"{name}_at"]] = arrays[name]
    return array


def cohort_spec(axis: Axis, axes: Sequence[Axis], cuts: Cuts, key: Key) -> CohortSpec:
    """The cohort of an axis that `key` stands for."""
    names, conditions = zip(
        *(_condition(a, cuts, value) for a, value in zip(parts(axis, axes), key, strict=True)), strict=True
    )
    return CohortSpec(axis=axis.name, name=" & ".join(names), conditions=conditions)


def _condition(axis: Axis, cuts: Cuts, value: Any) -> tuple[str, Condition]:
    if value is None:
        return "null", Condition(column=axis.column, null=True)
    if axis.kind == "categorical":
        text = value if isinstance(value, str) else json.dumps(value)
        if isinstance(value, str) and (value == "null" or "&" in value or '"' in value):
            text = json.dumps(value, ensure_ascii=False)
        return text, Condition(column=axis.column, equals=value)
    edges = (None, *cuts[axis.name], None)
    lower, upper = edges[value], edges[value + 1]
    if axis.kind == "percentiles":
        name = f"p{axis.percentiles[value]:g}-p{axis.percentiles[value + 1]:g}"
    elif lower is None or upper is None:
        name = f"< {upper:.9g}" if lower is None else f">= {lower:.9g}"
    else:
        name = f"[{lower:.9g}, {upper:.9g})"
    return name, Condition(column=axis.column, lower=lower, upper=upper)
