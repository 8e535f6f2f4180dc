"""Features with weights, shared tables and projections in the exported programs, and what defaults they refuse."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from c2al.config import parse_config
from c2al.distributed.process import process_group
from c2al.errors import ConfigError
from c2al.serving.artifact import parse_defaults
from c2al.serving.export import export
from c2al.serving.predict import Predictor
from c2al.training.score import score
from c2al.training.trainer import train
from impressions import tree, write_impressions

ITEM = {"num_embeddings": 40, "encoding": "vocabulary", "min_count": 5, "dim": 4, "table": "thing"}
FEATURES = {
    "beside a mean of a table with a projection": [
        {"column": "user_id", "num_embeddings": 100, "min_count": 5},
        {"column": "seen", "max_length": 3, "weights": "shares", **ITEM},
        {"column": "tags", "num_embeddings": 16, "max_length": 4, "pooling": "mean", "dim": 12},
        {"column": "item_id", **ITEM},
    ],
    "alone": [{"column": "seen", "max_length": 3, "weights": "shares", **ITEM}],
}


def made(folder: Path, sparse: list[dict]) -> Path:
    """A folder with data/, run/, artifact/ and scores/."""
    rng = np.random.default_rng(0)
    for seed, (split, rows) in enumerate({"train": 1024, "validation": 512, "test": 512}.items()):
        seen = [rng.integers(0, 50, n).tolist() for n in rng.integers(0, 5, rows)]
        shares = pa.array([rng.random(len(bag)).tolist() for bag in seen], pa.list_(pa.float64()))
        write_impressions(folder / "data" / split, rows, seed, seen=pa.array(seen, pa.list_(pa.int64())), shares=shares)
    sections = tree(folder / "data")
    sections["data"]["sparse"] = sparse
    sections["model"]["layers"] = 1
    config = parse_config(sections)
    with process_group(config.dist) as world:
        train(config, folder / "run", world)
        export(folder / "run", config.data.test, folder / "artifact", world)
        score(folder / "run", config.data.test, folder / "scores", world)
    return folder


@pytest.mark.parametrize("case", FEATURES)
def test_predictions_with_weights_are_those_of_score_bit_for_bit(tmp_path, case):
    folder = made(tmp_path, FEATURES[case])
    raw = pq.read_table(folder / "data" / "test")
    scores = np.asarray(pq.read_table(folder / "scores")["prediction"])
    predictor = Predictor(folder / "artifact")
    assert np.array_equal(predictor.predict(raw), scores)
    int8 = Predictor(folder / "artifact", "int8").predict(raw)
    assert not np.array_equal(int8, scores)
    np.testing.assert_allclose(int8, scores, rtol=0, atol=1e-3)
    for variant in ("float", "int8"):
        for rows in (0, 1):
            assert Predictor(folder / "artifact", variant).predict(raw.slice(0, rows)).shape == (rows,)
    # The weights say something to both programs.
    doubled = pa.array([[2 * w for w in bag] for bag in raw["shares"].to_pylist()], pa.list_(pa.float64()))
    other = raw.set_column(raw.schema.get_field_index("shares"), "shares", doubled)
    filled = np.asarray(raw["seen"].combine_chunks().value_lengths()) > 0
    for variant, plain in (("float", scores), ("int8", int8)):
        changed = Predictor(folder / "artifact", variant).predict(other) != plain
        assert changed[filled].mean() > 0.9
        assert not changed[~filled].any()
    for word, column in (("seen=[1]", "seen"), ("shares=[0.5]", "shares")):
        message = f"--default {column}={word.partition('=')[2]}: feature 'seen' takes no default"
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_defaults([word], predictor.schema)
