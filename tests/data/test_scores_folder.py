"""A folder of scores that lost something does not fit its marker."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from c2al.data.scores_folder import COMPLETE, check_marker, open_scored, write_marker
from c2al.errors import DataError


def write_part(path: Path, rows: int, value: float = 0.5) -> None:
    pq.write_table(pa.table({"prediction": np.full(rows, value, np.float32)}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_part(tmp_path / "part-00001.parquet", 5)
    write_part(tmp_path / "part-00000.parquet", 7)
    write_marker(tmp_path, ("part-00001.parquet", "part-00000.parquet"))
    return tmp_path


def test_a_whole_folder_fits_its_marker(folder):
    for marker in (check_marker(folder), check_marker(str(folder), pafs.LocalFileSystem())):
        assert marker is not None
        assert marker.rows == 12
        assert [(p.name, p.rows) for p in marker.parts] == [("part-00000.parquet", 7), ("part-00001.parquet", 5)]


def lose_the_marker(folder: Path) -> str:
    (folder / COMPLETE).unlink()
    return "incomplete, it has no _complete.json"


def lose_a_part(folder: Path) -> str:
    (folder / "part-00001.parquet").unlink()
    return "part-00001.parquet: missing; _complete.json lists it with 5 rows"


def lose_rows(folder: Path) -> str:
    write_part(folder / "part-00001.parquet", 4)
    return r"part-00001.parquet: has 4 rows in .* says 5 rows"


def truncate(folder: Path) -> str:
    file = folder / "part-00001.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    return "part-00001.parquet: not a whole Parquet file"


def add_a_part(folder: Path) -> str:
    write_part(folder / "extra.parquet", 5)
    return r"extra.parquet: _complete.json does not list it"


def count_wrongly(folder: Path) -> str:
    marker = folder / COMPLETE
    marker.write_text(marker.read_text().replace('"rows": 12', '"rows": 13'))
    return "says 13 rows"


def write_a_foreign_marker(folder: Path) -> str:
    (folder / COMPLETE).write_text('{"format": "another", "version": 1}')
    return "_complete.json: format 'another'"


def write_no_object(folder: Path) -> str:
    (folder / COMPLETE).write_text("[1]")
    return "holds no JSON object"


def write_no_json(folder: Path) -> str:
    (folder / COMPLETE).write_text("yes")
    return "not strict JSON"


CHANGES = [
    lose_the_marker,
    lose_a_part,
    lose_rows,
    truncate,
    add_a_part,
    count_wrongly,
    write_a_foreign_marker,
    write_no_object,
    write_no_json,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_lost_or_foreign_is_named(folder, change):
    message = change(folder)
    with pytest.raises(DataError, match=message) as caught:
        check_marker(folder)
    way_out = (
        "move it away" if change is add_a_part else f"; delete the folder {folder} and make it again (`c2al score`"
    )
    assert way_out in str(caught.value)


def lose_every_part(folder: Path) -> str:
    for part in folder.glob("part-*"):
        part.unlink()
    return r"part-00000.parquet: missing"


@pytest.mark.parametrize("change", [truncate, lose_every_part])
def test_scores_that_cannot_even_be_opened_say_what_to_do(folder, change):
    message = change(folder)
    with pytest.raises(DataError, match=f"{message}.*; delete the folder"):
        open_scored([str(folder)])


def test_what_is_no_folder_of_scores_is_refused_as_any_data(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder$"):
        open_scored([str(tmp_path / "nowhere")])


def test_a_marker_without_format_lists_no_parts(folder):
    (folder / COMPLETE).write_text("{}")
    assert check_marker(folder) is None
