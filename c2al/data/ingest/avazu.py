"""Avazu click-through rate prediction (Kaggle 2014): ten days, 2014-10-21 .. 10-30, CSV.

Split by day: train to 10-28, validation 10-29, test 10-30.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from c2al.data.ingest.splits import SplitWriter
from c2al.data.ingest.text import read_delimited
from c2al.errors import DataError
from c2al.files import new_folder

SPLIT_OF_DAY = {**dict.fromkeys(range(141021, 141029), "train"), 141029: "validation", 141030: "test"}
UNKNOWN_DEVICE = "a99f214a"
"""The device_id of four rows in five: it means that there is none."""

_CATEGORIES = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)
_TYPES = {"click": pa.int8(), "hour": pa.int64(), **dict.fromkeys(_CATEGORIES, pa.string())}


def ingest(source: Path, output: Path) -> dict[str, int]:
    """Writes <output>/{train,validation,test} from train.csv or train.gz; rows of each split.

    `user_id` is the device, or address and model where the device is unknown. `time` is the
    published YYMMDDHH, `hour` its hour. Streams. Raises DataError naming the malformed line or
    the day that is none of the ten.
    """
    if source.is_dir():
        found = [source / name for name in ("train.csv", "train.csv.gz", "train.gz") if (source / name).is_file()]
        if not found:
            raise DataError(f"{source}: neither train.csv nor train.gz is there")
        source = found[0]
    with new_folder(output) as folder:
        writer = SplitWriter(folder)
        row = 0
        for table in read_delimited(source, _TYPES, required=_TYPES):
            time = table["hour"]
            day_N = pc.divide(time, 100).to_numpy(zero_copy_only=False)
            device = table["device_id"]
            address = pc.binary_join_element_wise(table["device_ip"], table["device_model"], "-")
            columns = {
                "row_id": pa.array(np.arange(row, row + table.num_rows)),
                "user_id": pc.if_else(pc.equal(device, UNKNOWN_DEVICE), address, device),
                "time": time,
                "hour": pc.subtract(time, pc.multiply(pc.divide(time, 100), 100)).cast(pa.int8()),
                "label": table["click"],
                **{c: table[c] for c in _CATEGORIES},
            }
            rows = pa.table(columns)
            for day in np.unique(day_N):
                if day not in SPLIT_OF_DAY:
                    at = int(np.argmax(day_N == day))
                    raise DataError(
                        f"{source}, line {row + at + 2}: column 'hour' is {time[at]}, not in days 141021 to 141030"
                    )
                writer.write(SPLIT_OF_DAY[int(day)], rows.filter(pa.array(day_N == day)))
            row += table.num_rows
        return writer.close_published(source)
