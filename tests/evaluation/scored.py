"""Score folders for tests of evaluation."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def impressions(users: int = 150, rows: int = 600, seed: int = 0) -> dict[str, Any]:
    """Labels with an effect per user and per item, and what a model could know of them under "effect"."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, users, rows), rng.integers(0, 40, rows)
    effect = rng.normal(size=users)[user] + 0.5 * rng.normal(size=40)[item]
    return {
        "row_id": np.arange(rows),
        "user_id": user,
        "item": item,
        "label": (rng.random(rows) < 1 / (1 + np.exp(1 - effect))).astype(np.float32),
        "weight": rng.integers(0, 3, rows).astype(np.float32),
        "tab": rng.choice(np.array(["a", "b"]), rows),
        "effect": effect,
    }


def predictions(data: dict[str, Any], seed: int, noise: float = 0.5, digits: int = 9) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = 0.7 * data["effect"] - 0.9 + noise * rng.normal(size=len(data["label"]))
    return (1 / (1 + np.exp(-z))).round(digits).astype(np.float32)


def write(folder: Path, data: dict[str, Any], prediction: Any, cuts: Sequence[int] = (), group: int = 1000) -> str:
    """A score folder with a part for each cut and a marker that lists no parts."""
    folder.mkdir(parents=True)
    table = pa.table({**{k: v for k, v in data.items() if k != "effect"}, "prediction": prediction})
    for i, (low, high) in enumerate(itertools.pairwise([0, *cuts, table.num_rows])):
        pq.write_table(table.slice(low, high - low), folder / f"part-{i:05}.parquet", row_group_size=group)
    (folder / "_complete.json").write_text("{}")
    return str(folder)


def with_value(data: dict[str, Any], column: str, row: int, value: Any) -> dict[str, Any]:
    values = np.asarray(data[column]).astype(object)
    values[row] = value
    return {**data, column: pa.array(values.tolist(), pa.array(data[column]).type)}
