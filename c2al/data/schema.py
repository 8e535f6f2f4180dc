"""The contract of the columns: which there must be, and of which type, checked by footers alone."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import pyarrow as pa

from c2al.config import DataConfig, SparseFeature
from c2al.data.arrow_types import Category, category, decoded, family, is_list, is_number, is_text, leaf
from c2al.errors import DataError
from c2al.typed import hint


class Columns(Protocol):
    """What has a name and columns: a file, or a table in memory."""

    @property
    def name(self) -> str: ...
    @property
    def schema(self) -> pa.Schema: ...


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What one column must be."""

    column: str
    needed: str
    """In words, with the use of the column in brackets."""
    accepts: Callable[[pa.DataType], bool]


def check_columns(
    files: Iterable[Columns], data: DataConfig, carried: Sequence[str] = (), labelled: bool = True, items: str = ""
) -> None:
    """Checks the whole contract of the data: everything that some job will need of `files`.

    These are the label, the weight, the row id (integer), the user id (integer or string), the time and
    every feature that the config declares, and `carried`: columns that are handed through, such as those
    of the axes. Every one must be in every file once, with a type that can be used, and of one kind in
    all of them: give the files of several splits together to compare these. `carried` must have one
    type per call, exactly. With `labelled` = False there need be no label. `items`: evaluate.items, where
    the files will be scored.

    Raises DataError naming the file, the column, the type found and the type needed.
    """
    wanted = _inputs(data, labelled)
    wanted.append(Requirement(data.row_id, "an integer (data.row_id)", lambda t: pa.types.is_integer(t)))
    wanted.append(Requirement(data.user_id, "an integer or a string (data.user_id)", _is_id))
    if data.time:
        wanted.append(Requirement(data.time, "any scalar (data.time)", lambda kind: not pa.types.is_nested(kind)))
    if items:
        wanted.append(Requirement(items, "an integer or a string (evaluate.items)", _is_id))
    files = list(files)
    _check(files, wanted, carried)
    _check_shared(files, data)


def _check_shared(files: Iterable[Columns], data: DataConfig) -> None:
    """One value must have one row in a shared table, so all its columns hold integers or all hold text."""
    for file in files:
        for name, features in data.tables.items():
            kinds = {f.column: _type_of(file, f.column) for f in features if f.encoding != "bucketise"}
            first = next(iter(kinds), "")
            for column, kind in kinds.items():
                if category(kind) != category(kinds[first]):
                    raise DataError(
                        f"{file.name}: columns '{first}' and '{column}' share the embedding table '{name}', but are "
                        f"of types {kinds[first]} and {kind}"
                    )


def check_inputs(
    files: Iterable[Columns],
    data: DataConfig,
    carried: Sequence[str] = (),
    kinds: Mapping[str, Category] | None = None,
    labelled: bool = True,
) -> None:
    """Checks only what a reader of batches reads: label, weight, features and `carried`.

    `kinds` says what the sparse columns held in training (`Statistics.kinds`): an id that was an integer
    there and is a string here would get another embedding row without a word. With `labelled` = False
    there need be no label and no weight.

    Raises DataError as `check_columns`.
    """
    files = list(files)
    _check(files, _inputs(data, labelled, weighted=labelled), carried)
    for file in files:
        for column, expected in (kinds or {}).items():
            kind = _type_of(file, column)
            if category(kind) != expected:
                raise DataError(
                    f"{file.name}: column '{column}' has type {kind}, but its values in training were of type "
                    f"{expected}"
                )


def _check(files: Iterable[Columns], wanted: Sequence[Requirement], carried: Sequence[str]) -> None:
    families: dict[str, tuple[str, pa.DataType]] = {}
    exact: dict[str, tuple[str, pa.DataType]] = {}
    for file in files:
        for requirement in wanted:
            kind = _type_of(file, requirement.column, requirement.needed)
            if not requirement.accepts(kind):
                raise DataError(
                    f"{file.name}: column '{requirement.column}' has type {kind}, needed is {requirement.needed}"
                )
            name, first = families.setdefault(requirement.column, (file.name, kind))
            if not _agree(kind, first):
                raise DataError(f"{file.name}: column '{requirement.column}' has type {kind}, but {first} in {name}")
        for column in carried:
            kind = _type_of(file, column)
            name, first = exact.setdefault(column, (file.name, kind))
            if kind != first:
                raise DataError(f"{file.name}: column '{column}' has type {kind}, but {first} in {name}")


def _agree(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether two files may differ like this: integers and floats are both numbers, but no number is text."""
    return family(a) == family(b) or (is_number(a) and is_number(b))


def _inputs(data: DataConfig, labelled: bool, weighted: bool = True) -> list[Requirement]:
    wanted = []
    if labelled:
        wanted.append(Requirement(data.label, "0 or 1 as a number (the label, data.label)", is_number))
    if data.weight and weighted:
        wanted.append(Requirement(data.weight, "a number (weight)", is_number))
    wanted += [Requirement(dense.column, "a number (dense feature)", is_number) for dense in data.dense]
    return wanted + [requirement for feature in data.sparse for requirement in _sparse(feature)]


def _sparse(feature: SparseFeature) -> list[Requirement]:
    of = f"(sparse feature '{feature.key}', encoding '{feature.encoding}')"
    if feature.encoding == "bucketise":
        return [Requirement(feature.column, f"a number {of}", is_number)]
    what = "integer" if feature.encoding == "identity" else "integer or string"

    def is_value(kind: pa.DataType) -> bool:
        return category(kind) == "integer" or (category(kind) == "text" and feature.encoding != "identity")

    wanted = [Requirement(feature.column, f"{what} or a list of them {of}", is_value)]
    if not feature.max_length:
        needed = f"one {what} per row {of}; say with max_length how many values of a list count"
        wanted.append(Requirement(feature.column, needed, lambda kind: not is_list(decoded(kind))))
    if feature.weights:
        list_of = f"a list {of}, since it has weights"
        wanted.append(Requirement(feature.column, list_of, lambda kind: is_list(decoded(kind))))
        numbers = f"a list of numbers (weights of sparse feature '{feature.key}')"
        wanted.append(Requirement(feature.weights, numbers, lambda kind: is_list(kind) and is_number(leaf(kind))))
    return wanted


def _is_id(kind: pa.DataType) -> bool:
    return not is_list(kind) and (is_text(leaf(kind)) or pa.types.is_integer(leaf(kind)))


def _listed(names: Sequence[str]) -> str:
    """At most 20 of the names, and how many more there are."""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(f"'{n}'" for n in names[:20]) or "no columns") + more


def _type_of(file: Columns, column: str, needed: str = "") -> pa.DataType:
    count = file.schema.names.count(column)
    if count > 1:
        raise DataError(f"{file.name}: column '{column}' is there {count} times")
    if not count:
        use = f"; needed is {needed}" if needed else ""
        close = hint(column, file.schema.names) or f"; there are {_listed(file.schema.names)}"
        raise DataError(f"{file.name}: no column '{column}'{use}{close}")
    return file.schema.field(column).type
