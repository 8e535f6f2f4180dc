"""Predictions of an exported model on raw rows, in a process that has only torch, pyarrow and numpy.

Letters: N rows of a table, B rows of a step, F dense features.
"""

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from c2al.data.background import in_background
from c2al.data.encode import Encoder
from c2al.data.rows import Rows, model_inputs
from c2al.data.schema import check_inputs
from c2al.data.scores_folder import write_marker
from c2al.data.source import File, open_dataset, readable_column
from c2al.errors import ConfigError, DataError, StateError
from c2al.files import new_folder, output_errors
from c2al.serving.artifact import Schema, default_column, read_artifact

Program = Callable[..., Tensor]
"""(dense_BF, values, lengths) -> prediction_B; with weighted features also their values, lengths and weights."""
MOST_ROWS = 2**20
"""Largest batch of `predict`: a batch is padded to its full size, whatever it holds."""
AHEAD = 4
"""Steps that are read and encoded while the model computes."""
PREDICTION = "prediction"


class Predictor:
    """Probabilities of raw rows, with the encoding of the training.

    ::

        predictor = Predictor("artifact")
        predictor.predict(pa.table({"user_id": [7], "age": [31.0]}))  # numpy float32, one per row

    Raises StateError for an artifact that is damaged, incomplete or of another version, ConfigError for
    a variant that it does not have, and for a folder that is no path.
    """

    def __init__(self, folder: str | Path, variant: str = "float"):
        if not isinstance(folder, str | os.PathLike):
            raise ConfigError(f"Predictor: expected the path of an artifact, got {type(folder).__name__}")
        self.artifact = read_artifact(Path(folder))
        self.schema: Schema = self.artifact.schema
        self.variant = variant
        self.program: Program = load_program(self.artifact.program(variant), variant)
        self._encoder = Encoder(self.schema.data, self.schema.statistics, (), (), labelled=False)

    @property
    def columns(self) -> list[str]:
        """Columns that the features read."""
        return self._encoder.columns

    def predict(self, table: pa.Table, where: str = "table") -> npt.NDArray[np.float32]:
        """(N,) probability of the primary task of every row.

        A table of at least `schema.batch_size` rows is computed in steps of that many, the last one
        padded, and gives what `c2al score` gives, bit for bit. A smaller one is computed as it is, so its
        last bits may differ.

        Raises DataError naming `where`, row, column and value for what the features do not allow, and for what is
        no pa.Table (or pa.RecordBatch).
        """
        rows, step = self.encode(table, where), self.schema.batch_size
        step = min(step, len(rows)) or 1
        parts = [self.run(rows.slice(i, min(i + step, len(rows))), step) for i in range(0, len(rows), step)]
        prediction_N = np.concatenate([np.zeros(0, np.float32), *parts])
        refuse_not_finite(prediction_N, lambda row: f"{where}, row {row}")
        return prediction_N

    def encode(self, table: pa.Table, where: str = "table") -> Rows:
        """The rows as the model takes them. Raises DataError as `predict`."""
        table = self._with_defaults(_as_table(table, where))
        self.check(where, table.schema)
        columns = {c: readable_column(table[c], c, where) for c in self.columns}
        # An empty column may have no chunk at all.
        return self._encoder.encode(pa.table(columns).unify_dictionaries().combine_chunks(), where)

    def check(self, name: str, schema: pa.Schema) -> None:
        """Raises DataError naming `name` and the column that is missing, there twice, or of another type."""
        missing = [pa.field(c, default_column(self.schema, c, 0).type) for c in self._missing(schema)]
        columns = _Columns(name, pa.schema([*schema, *missing]))
        check_inputs([columns], self.schema.data, (), self.schema.statistics.kinds, labelled=False)

    def run(self, rows: Rows, size: int) -> npt.NDArray[np.float32]:
        """Predictions of encoded rows, computed as a step of `size` rows."""
        if not len(rows):
            # A program compiled by AOTInductor ends the process on an empty step.
            return np.zeros(0, np.float32)
        arguments = (torch.from_numpy(a) for a in model_inputs([rows], self.schema.data, size))
        with torch.no_grad():
            prediction: npt.NDArray[np.float32] = self.program(*arguments)[: len(rows)].numpy()
        return prediction

    def _missing(self, schema: pa.Schema) -> list[str]:
        return [c for c in self.schema.defaults if c not in schema.names]

    def _with_defaults(self, table: pa.Table) -> pa.Table:
        for column in self._missing(table.schema):
            table = table.append_column(column, default_column(self.schema, column, table.num_rows))
        return table

    def steps(self, files: Sequence[File], size: int, carry: Sequence[str] = ()) -> Generator[tuple[Rows, pa.Table]]:
        """Encoded rows of the files in order, `size` at a time, with the columns in `carry`.

        The files have been checked. Raises DataError for bad values.
        """
        rest: list[tuple[Rows, pa.Table]] = []
        for file in files:
            stored = [c for c in dict.fromkeys((*self.columns, *carry)) if c in file.schema.names]
            dictionary = [c for c in self._encoder.dictionary if c not in carry]
            for group, count in enumerate(file.row_group_rows):
                if not count:
                    continue
                table = file.read(group, stored, dictionary)
                encoded = self._encoder.encode(self._with_defaults(table), file.where(group))
                rest.append((encoded, table.select(list(carry))))
                held = sum(len(rows) for rows, _ in rest)
                if held < size:
                    continue
                rows, carried = _joined(rest)
                for start in range(0, held - held % size, size):
                    yield rows.slice(start, start + size), carried.slice(start, size)
                rest = [(rows.slice(held - held % size, held), carried.slice(held - held % size))]
        if rest and len(rest[0][0]):
            yield _joined(rest)


def _as_table(rows: Any, where: str) -> pa.Table:
    """`rows` if it is a table; a batch of records as one. Raises DataError that says how to make one of `rows`."""
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if isinstance(rows, pa.Table):
        return rows
    kind, way_out = type(rows).__name__, ""
    if isinstance(rows, Mapping):
        way_out = "; pa.table(...) makes one of columns"
    elif isinstance(rows, str | os.PathLike):
        way_out = "; c2al.serving.predict.predict(...) reads files"
    elif kind == "DataFrame":
        way_out = "; pa.Table.from_pandas(...) makes one"
    elif isinstance(rows, list):
        way_out = "; pa.Table.from_pylist(...) makes one of rows"
    raise DataError(f"{where}: expected a pyarrow Table, got {kind}{way_out}")


@dataclasses.dataclass(frozen=True)
class _Columns:
    name: str
    schema: pa.Schema


def _joined(parts: list[tuple[Rows, pa.Table]]) -> tuple[Rows, pa.Table]:
    return Rows.concat([rows for rows, _ in parts]), pa.concat_tables([table for _, table in parts])


def refuse_not_finite(prediction_N: npt.NDArray[np.float32], where: Callable[[int], str]) -> None:
    """Raises DataError for the first prediction that is NaN or infinite; `where` names its row."""
    for bad in np.flatnonzero(~np.isfinite(prediction_N))[:1]:
        raise DataError(
            f"{where(int(bad))}: the prediction is {prediction_N[bad]}; "
            "the model's weights or this row's inputs are too large"
        )


def load_program(path: Path, variant: str) -> Program:
    """A callable of the file of a variant. Raises StateError naming it when torch cannot load it."""
    try:
        if variant == "aoti":
            from torch._inductor import aoti_load_package  # imports the compiler's half of torch

            loaded: Program = aoti_load_package(str(path))
            return loaded
        program: Program = torch.export.load(path).module()
        return program
    except (RuntimeError, ValueError, KeyError, OSError, AssertionError, zipfile.BadZipFile) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise StateError(f"{path}: torch {torch.__version__} cannot load it: {reason}") from e


def predict(
    predictor: Predictor,
    data: Sequence[str],
    output: Path,
    batch_size: int | None = None,
    carry: Sequence[str] | None = None,
) -> int:
    """Writes predictions of `data`, in order, into the new folder `output`; returns the number of rows.

    The folder holds part-00000.parquet with the columns in `carry` (default: the row id, where the files
    have it) and `prediction`, and `_complete.json`. With the default `batch_size`, the run's, they are
    what `c2al score` gives in one process, bit for bit.

    Raises ConfigError, DataError, OutputError; then no `output` is left behind.
    """
    if batch_size is not None and not 1 <= batch_size <= MOST_ROWS:
        bound = "at least 1" if batch_size < 1 else f"at most {MOST_ROWS}"
        raise ConfigError(f"--batch-size: must be {bound}, is {batch_size}")
    files = open_dataset(data)
    row_id = predictor.schema.row_id
    if carry is None:
        carry = [row_id] if all(row_id in file.schema.names for file in files) else []
    for column in carry:
        if carry.count(column) > 1:
            raise ConfigError(f"--carry {column}: is named {carry.count(column)} times")
        if column == PREDICTION:
            raise ConfigError(f"--carry {column}: would hide the predictions' own column '{PREDICTION}'")
    check_inputs(files, dataclasses.replace(predictor.schema.data, dense=(), sparse=()), carry, labelled=False)
    for file in files:
        predictor.check(file.name, file.schema)
    size, rows, writer = batch_size or predictor.schema.batch_size, 0, None
    with new_folder(output) as folder:
        part = folder / "part-00000.parquet"
        steps = in_background(predictor.steps(files, size, carry), AHEAD)
        with contextlib.closing(steps), output_errors(part):  # type: ignore[type-var]
            for encoded, carried in steps:
                prediction_B = predictor.run(encoded, size)
                refuse_not_finite(prediction_B, lambda row, before=rows: row_name(files, before + row))  # type: ignore[misc]
                table = pa.table({**{c: carried[c] for c in carry}, PREDICTION: prediction_B})
                if writer is None:
                    writer = pq.ParquetWriter(part, table.schema, compression="zstd")
                writer.write_table(table)
                rows += table.num_rows
            if writer is not None:
                writer.close()
        write_marker(folder, (part.name,))
    return rows


def row_name(files: Sequence[File], row: int) -> str:
    """File, row group and row of a row of the data set, as messages name them."""
    for file in files:
        for group, rows in enumerate(file.row_group_rows):
            if row < rows:
                return f"{file.where(group)}, row {row}"
            row -= rows
    raise AssertionError("a row beyond the data set")
