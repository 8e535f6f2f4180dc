"""A small run with a mean-pooled feature, its artifact and its scores, made once."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.config import parse_config
from c2al.distributed.process import process_group
from c2al.serving.export import export
from c2al.serving.predict import Predictor
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import splits, tree


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Path:
    """A folder with data/, run/, artifact/ and scores/."""
    root = tmp_path_factory.mktemp("served")
    splits(root / "data")
    sections = tree(root / "data")
    sections["data"]["sparse"] += [
        {"column": "tags", "name": "tag_mean", "num_embeddings": 16, "max_length": 4, "pooling": "mean"},
        {"column": "age", "name": "age_bucket", "encoding": "bucketise", "edges": [20.0, 30.0, 40.0]},
        {"column": "surface", "name": "surface_hash", "num_embeddings": 32},
    ]
    sections["model"]["layers"] = 1
    config = parse_config(sections)
    with process_group(config.dist) as world:
        train(config, root / "run", world)
        export(root / "run", config.data.test, root / "artifact", world, defaults=["age=31.5", "tags=[1, 2]"])
        score(root / "run", config.data.test, root / "scores", world)
    return root


@pytest.fixture(scope="session")
def predictor(served) -> Predictor:
    """Of the float variant."""
    return Predictor(served / "artifact")


@pytest.fixture
def raw(served) -> pa.Table:
    """The held-out rows."""
    return pq.read_table(served / "data" / "test")
