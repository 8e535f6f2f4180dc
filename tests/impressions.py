"""A small set of impressions with planted cohorts, and a config that trains on it in seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from c2al.config import Config, parse_config


def write_impressions(folder: Path, rows: int = 4096, seed: int = 0, **columns: Any) -> Path:
    """One file of `rows` impressions in four row groups; `columns` replace, add or (None) drop some."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, 300, rows)
    item = rng.integers(0, 50, rows)
    surface = rng.choice(["feed", "search", "story"], rows, p=[0.7, 0.2, 0.1])
    age = rng.normal(30, 8, rows)
    logit = -0.5 + np.where(surface == "story", -1.5, 0.8) * np.sin(item) + (surface == "search") + 0.03 * (age - 30)
    table = {
        "row_id": np.arange(rows) + seed * 1_000_000,
        "user_id": user,
        "item_id": item,
        "surface": surface,
        "age": age,
        "tags": pa.array([list(range(i % 4)) for i in item], pa.list_(pa.int64())),
        "label": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8),
    }
    table = {k: v for k, v in {**table, **columns}.items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / f"part-{seed}.parquet", row_group_size=max(rows // 4, 1))
    return folder


def tree(folder: Path) -> dict[str, Any]:
    """Config over `folder`/{train,validation,test}."""
    return {
        "data": {
            **{split: [str(folder / split)] for split in ("train", "validation", "test")},
            "dense": [{"column": "age"}],
            "sparse": [
                {"column": "user_id", "num_embeddings": 100},
                {"column": "item_id", "num_embeddings": 64, "encoding": "identity"},
                {"column": "surface", "num_embeddings": 8, "encoding": "vocabulary"},
                {"column": "tags", "num_embeddings": 16, "max_length": 4},
            ],
            "shuffle_rows": 2048,
        },
        "model": {"embedding_dim": 8, "dense_hidden": [16], "head_hidden": [16], "fm": {"k": 4, "hidden": 16}},
        "train": {"batch_size": 256, "log_every": 4},
        "dist": {"device": "cpu", "ddr_gib": 2.0},
        "axes": [
            {"name": "surface", "column": "surface"},
            {"name": "age", "column": "age", "kind": "percentiles", "percentiles": [0, 10, 50, 90, 100]},
        ],
        "evaluate": {"replicates": 50},
    }


def splits(folder: Path, rows: int = 4096) -> Config:
    """Writes all three splits and returns the config over them."""
    for seed, (split, share) in enumerate({"train": 1.0, "validation": 0.5, "test": 0.5}.items()):
        write_impressions(folder / split, int(rows * share), seed)
    return parse_config(tree(folder))


def write_cohorts(path: Path) -> Path:
    """cohorts.json with head = feed and tail = story on the axis `surface`."""
    cohorts = [
        {"name": name, "conditions": [{"column": "surface", "equals": name}]} for name in ("feed", "search", "story")
    ]
    head, tail = ({"axis": "surface", **cohorts[i]} for i in (0, 2))
    tree = {
        "format": "c2al.cohorts",
        "version": 2,
        "chosen": {"head": head, "tail": tail, "reason": "by hand"},
        "axes": [{"name": "surface", "columns": ["surface"], "cohorts": cohorts}],
    }
    path.write_text(json.dumps(tree))
    return path
