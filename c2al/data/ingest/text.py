"""Delimited text in blocks, where a malformed line is an error that names the line."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv

from c2al.errors import DataError

BLOCK_BYTES = 4 << 20


def read_delimited(
    path: Path,
    types: Mapping[str, pa.DataType],
    *,
    required: Collection[str],
    names: Sequence[str] | None = None,
    delimiter: str = ",",
    quoted: bool = True,
    content: bytes | None = None,
) -> Iterator[pa.Table]:
    """Blocks of a text file with exactly the columns of `types`, typed; an empty field is null,
    and an error in the `required` columns.

    `names` are the columns of a file without a header line; `quoted` allows "..." around a field.
    A path ending in .gz is decompressed. `content` stands for the file's bytes where they had to
    be rewritten, line by line. Memory is one block.

    Raises DataError naming file, line (counted from 1) and value: a line with another number of
    fields, a value not of its type, a required one that is empty; or naming the file and the missing header column.
    """
    bad_lines: list[str] = []

    def refuse(row: csv.InvalidRow) -> str:
        counts = f"{row.actual_columns} fields, expected {row.expected_columns}"
        bad_lines.append(f"line {row.number}: {counts}: {row.text!r}")
        return "error"

    first_line = 1 if names else 2
    try:
        source = pa.BufferReader(content) if content is not None else pa.input_stream(str(path))
        reader = csv.open_csv(
            source,
            # Threads lose the row numbers of malformed lines.
            read_options=csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names),
            parse_options=csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                ignore_empty_lines=False,
                invalid_row_handler=refuse,
            ),
            convert_options=csv.ConvertOptions(
                include_columns=list(types),
                column_types={c: pa.string() for c in types},
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        for batch in reader:
            table = pa.Table.from_batches([batch])
            for column in required:
                if table[column].null_count:
                    at = table[column].is_null().index(True).as_py()
                    raise DataError(f"{path}, line {first_line + at}: column '{column}' is empty")
            yield pa.table({c: _typed(table[c], kind, c, path, first_line) for c, kind in types.items()})
            first_line += batch.num_rows
    except KeyError as e:  # pyarrow names the column that the header lacks in quotes, among its own words.
        name = re.search(r"'(.*?)'", str(e))
        raise DataError(f"{path}: no column {name[0] if name else e}; needed are {', '.join(types)}") from e
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path}, {bad_lines[0]}" if bad_lines else f"{path}: cannot be read: {e}") from e


def read_whole(path: Path, types: Mapping[str, pa.DataType], required: Collection[str]) -> pa.Table:
    """A comma-separated file with a header, as one table. Raises DataError as `read_delimited`."""
    return pa.concat_tables(read_delimited(path, types, required=required))


def _typed(column: pa.ChunkedArray, kind: pa.DataType, name: str, path: Path, first_line: int) -> pa.ChunkedArray:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        # The first value that fails, by bisection: column[:low] casts, column[:high] does not.
        low, high = 0, len(column)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                column.slice(low, middle - low).cast(kind)
                low = middle
            except pa.ArrowInvalid:
                high = middle
        raise DataError(
            f"{path}, line {first_line + low}: column '{name}' is {column[low].as_py()!r}, expected {kind}"
        ) from None
