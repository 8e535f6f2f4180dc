"""Criteo display advertising: the Kaggle challenge's train.txt, or the 1TB log's day_0 .. day_23[.gz].

Neither has timestamps: lines are in the order of time. With several day files the last day is
held out, with one file (the challenge's seven days) the last seventh of its lines; the held-out
lines are validation in their first half and test in their second. There is no user either: every
row is its own `user_id`, so intervals treat impressions as independent.
"""

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from c2al.data.ingest.splits import SplitWriter
from c2al.data.ingest.text import BLOCK_BYTES, read_delimited
from c2al.errors import DataError
from c2al.files import new_folder

_TYPES = {
    "label": pa.int8(),
    **{f"I{i}": pa.int64() for i in range(1, 14)},
    **{f"C{i}": pa.string() for i in range(1, 27)},
}
DAYS_OF_ONE_FILE = 7


def ingest(source: Path, output: Path) -> dict[str, int]:
    """Writes <output>/{train,validation,test} from one file or a folder of them; rows of each split.

    Streams: memory does not depend on the size. The last file is read twice, first to count its
    lines. Raises DataError naming the malformed line.
    """
    files = _files(source)
    lines = _count_lines(files[-1])
    held_out = lines if len(files) > 1 else lines // DAYS_OF_ONE_FILE
    with new_folder(output) as folder:
        writer = SplitWriter(folder)
        row = 0
        for file in files:
            in_file = 0
            for table in read_delimited(
                file, _TYPES, required=["label"], names=list(_TYPES), delimiter="\t", quoted=False
            ):
                row_id = pa.array(np.arange(row, row + table.num_rows))
                table = table.add_column(0, "row_id", row_id).add_column(1, "user_id", row_id)
                train = lines - held_out if file == files[-1] else in_file + table.num_rows
                a, b = np.clip((train - in_file, train + held_out // 2 - in_file), 0, table.num_rows).tolist()
                for split, begin, end in (("train", 0, a), ("validation", a, b), ("test", b, table.num_rows)):
                    if begin < end:
                        writer.write(split, table.slice(begin, end - begin))
                in_file += table.num_rows
                row += table.num_rows
        return writer.close_published(source)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    days = {int(m[1]): p for p in source.glob("day_*") if (m := re.fullmatch(r"day_(\d+)(\.gz)?", p.name))}
    if not days and not (source / "train.txt").is_file():
        raise DataError(f"{source}: neither day_N[.gz] nor train.txt is there")
    return [days[d] for d in sorted(days)] or [source / "train.txt"]


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as f:
            while block := f.read(BLOCK_BYTES):
                lines, last = lines + block.count(b"\n"), block[-1:]
    except (OSError, EOFError) as e:
        raise DataError(f"{path}: cannot be read: {e}") from e
    return lines + (last != b"\n")
