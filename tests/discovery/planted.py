"""Impressions with known truth, counted by the product's scanner: `from planted import counted`."""

import numpy as np
import pyarrow as pa

from c2al.config import Axis
from c2al.discovery.accumulate import BLOCK_ROWS, BlockScanner
from c2al.discovery.axes import Columns
from c2al.discovery.histogram import Counts

AXIS = Axis(name="axis", column="axis")
COLUMNS = Columns(prediction="prediction", label="label", user="user")


class Planted:
    """Grows by cohorts of rows; `counts` is what discovery sees."""

    def __init__(self):
        self._scanner = BlockScanner([AXIS], {}, COLUMNS, cap=1000, jackknife=True)

    def add(self, cohort_R, prediction_R, user_R) -> "Planted":
        columns = {
            "prediction": np.asarray(prediction_R, np.float32),
            "label": np.zeros(len(prediction_R), np.float32),
            "user": user_R,
            "axis": np.broadcast_to(np.asarray(cohort_R, np.int32), len(prediction_R)),
        }
        for block in pa.table(columns).to_batches(max_chunksize=BLOCK_ROWS):
            self._scanner.add(block, 0)
        return self

    def counts(self) -> Counts:
        return self._scanner.take()[0]


def clustered(seed: int, users: int, cohorts: int, *, known: bool = True) -> Counts:
    """All cohorts alike; a user belongs to one and has 20 rows close to a mean of its own.

    known: False gives every row a user of its own, as if rows were independent.
    """
    rng = np.random.default_rng(seed)
    mean_U = np.repeat(rng.beta(2, 48, users), 20)
    prediction_R = np.clip(rng.beta(500 * mean_U, 500 * (1 - mean_U)), 1e-7, 1 - 1e-7)
    share = 1 / np.arange(1, cohorts + 1)  # large and small cohorts
    cohort_R = np.repeat(rng.choice(cohorts, users, p=share / share.sum()), 20)
    user_R = np.repeat(rng.integers(0, 2**60, users), 20) if known else np.arange(20 * users)
    return Planted().add(cohort_R, prediction_R, user_R).counts()
