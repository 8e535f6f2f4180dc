"""MovieLens-1M (Harper and Konstan, TiiS 2015): ratings in the order of time, cut 80 : 10 : 10.

The label is rating >= 4. The rating itself is known only afterwards and is not written.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from c2al.data.ingest.splits import SplitWriter
from c2al.data.ingest.text import read_delimited
from c2al.errors import DataError
from c2al.files import new_folder

SHARES = {"train": 0.8, "validation": 0.9, "test": 1.0}
"""Share of the rows up to each split's end."""
LIKED = 4

_int, _text = pa.int64(), pa.string()
_RATINGS = {"user_id": _int, "movie_id": _int, "rating": _int, "time": _int}
_USERS = {"user_id": _int, "gender": _text, "age": _int, "occupation": _int, "zip": _text}
_MOVIES = {"movie_id": _int, "title": _text, "genres": _text}


def ingest(source: Path, output: Path) -> dict[str, int]:
    """Writes <output>/{train,validation,test} from ratings.dat, users.dat and movies.dat; rows of each.

    Ratings of one second stay in one split. Raises DataError naming the missing file, the
    malformed line, the rating outside 1..5 or the id that joins nothing.
    """
    ratings = _read(source / "ratings.dat", _RATINGS)
    outside = ~ratings["rating"].between(1, 5)
    if outside.any():
        line = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"{source / 'ratings.dat'}, line {line + 1}: column 'rating' is {ratings['rating'][line]}, must lie in 1..5"
        )
    rows = ratings
    for key, name, types in (("user_id", "users.dat", _USERS), ("movie_id", "movies.dat", _MOVIES)):
        features = _read(source / name, types)
        unknown = np.flatnonzero(~rows[key].isin(features[key]))
        if len(unknown):
            line = int(unknown[0])
            raise DataError(f"{source / 'ratings.dat'}, line {line + 1}: {key} {rows[key][line]} is not in {name}")
        rows = rows.merge(features, on=key, validate="many_to_one")
    rows = rows.sort_values(["time", "user_id", "movie_id"], ignore_index=True)
    year = rows["title"].str.extract(r"\((\d{4})\)\s*$")[0].astype("float64")
    table = pa.table(
        {
            "row_id": pa.array(np.arange(len(rows))),
            "label": pa.array(rows["rating"] >= LIKED).cast(pa.int8()),
            **{c: pa.array(rows[c], _int) for c in ("time", "user_id", "movie_id", "age", "occupation")},
            **{c: pa.array(rows[c], _text) for c in ("gender", "zip")},
            "year": pa.array(year, pa.int32(), from_pandas=True),
            "genres": pa.array(rows["genres"].str.split("|"), pa.list_(_text)),
        }
    )
    time = rows["time"].to_numpy()
    cuts = [int(np.searchsorted(time, time[int(share * len(rows))])) for share in SHARES.values() if share < 1]
    # Ratings of one second stay together; those of the first second are for training.
    first = int(np.searchsorted(time, time[0], side="right"))
    ends = [*(max(cut, first) for cut in cuts), len(rows)]
    with new_folder(output) as folder:
        writer = SplitWriter(folder)
        for split, begin, end in zip(SHARES, [0, *ends[:-1]], ends, strict=True):
            writer.write(split, table.slice(begin, end - begin))
        return writer.close_published(source)


def _read(path: Path, types: dict[str, pa.DataType]) -> pd.DataFrame:
    try:
        text = path.read_bytes().decode("latin-1")
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e}") from e
    # No field holds a tab, and the CSV reader takes one character as delimiter.
    content = text.replace("::", "\t").encode()
    tables = list(
        read_delimited(path, types, required=types, names=list(types), delimiter="\t", quoted=False, content=content)
    )
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    return frame
