"""What all synthetic worlds share: random draws, columns, and the entropy of the true probability.

Letters: N rows, U users or items.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CHUNK_ROWS = 65536
"""Rows drawn from one random stream: (seed, chunk) fixes them."""

START_SECONDS = 1_700_000_000
"""Time of the first impression, seconds since 1970."""

TRUE_P = "true_p"
"""Column with the click probability that the label was drawn from."""
TRUE_P_WITHOUT_LATENT = "true_p_without_latent"
"""Column with the click probability given the inputs alone."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is known of one group of rows in one split."""

    rows: int
    positives: int
    bayes_ne: float | None
    """Normalized entropy of `true_p`; None where one class is absent."""


@dataclasses.dataclass(frozen=True)
class LatentTruth(Truth):
    """Truth of a world with a segment that no input holds."""

    bayes_ne_without_latent: float | None
    """Normalized entropy of `true_p_without_latent`: what a model that sees the inputs alone cannot beat
    but by luck; None where one class is absent."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one split, in the order of time."""

    split: str
    table: pa.Table
    """Has `label`, `true_p` and, in a world with a latent, `true_p_without_latent`."""
    group_N: Ints
    """Index into the world's `groups` of each row."""


class Entropy:
    """Sums for the normalized entropy of one or more probabilities of the same rows."""

    def __init__(self) -> None:
        self._rows, self._positives = 0, 0
        self._loss: dict[str, float] = {}

    def add(self, label_N: npt.NDArray[np.int8], probability_N: dict[str, Floats]) -> None:
        """Adds rows; `probability_N` maps a column's name to its values."""
        self._rows += len(label_N)
        self._positives += int(label_N.sum())
        for name, p in probability_N.items():
            loss = -float(np.log(np.where(label_N == 1, p, 1 - p)).sum())
            self._loss[name] = self._loss.get(name, 0.0) + loss

    def truth(self) -> Truth:
        """A LatentTruth where the rows had `true_p_without_latent`."""
        ne = self._normalized(TRUE_P)
        if TRUE_P_WITHOUT_LATENT not in self._loss:
            return Truth(self._rows, self._positives, ne)
        return LatentTruth(self._rows, self._positives, ne, self._normalized(TRUE_P_WITHOUT_LATENT))

    def _normalized(self, name: str) -> float | None:
        if not 0 < self._positives < self._rows:
            return None
        rate = self._positives / self._rows
        return self._loss[name] / self._rows / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))


def setting_problems(config: Any, least: Mapping[str, float], rates: Mapping[str, tuple[float, ...]]) -> list[str]:
    """What is wrong with the settings of a world: one below its `least`, or one of `rates` not within (0, 1)."""
    found = [
        f"synth.{name}: must be at least {low}, is {getattr(config, name)}"
        for name, low in least.items()
        if not getattr(config, name) >= low
    ]
    return found + [
        f"synth.{name}: must lie in (0, 1), is {rate}"
        for name, own in rates.items()
        for rate in own
        if not 0 < rate < 1
    ]


def seconds(row_N: Ints, rows: int, splits: dict[str, int]) -> Floats:
    """(N,) time of the rows, spread evenly over the days of the splits."""
    second_N: Floats = np.floor(START_SECONDS + row_N * (sum(splits.values()) * 86400 / rows))
    return second_N


def cut(chunk: Part, start: int, rows: int, splits: dict[str, int]) -> Iterator[Part]:
    """The parts that `chunk`, whose first row is `start` of `rows`, has in each split."""
    size, days, begin = len(chunk.group_N), sum(splits.values()), 0
    for split, last_day in zip(splits, np.cumsum(list(splits.values())).tolist(), strict=True):
        end = rows * last_day // days
        a, b = np.clip((begin - start, end - start), 0, size).tolist()
        if a < b:
            yield Part(split, chunk.table.slice(a, b - a), chunk.group_N[a:b])
        begin = end


def power_law(rng: np.random.Generator, count: int, exponent: float) -> tuple[Floats, Floats]:
    """(weights by id, their cumulative distribution); which id is popular is random."""
    weight = rng.permutation(np.arange(1, count + 1, dtype=np.float64) ** -exponent)
    cdf = np.cumsum(weight)
    # Exactly 1 at the end, so that no draw in [0, 1) falls beyond the last id.
    return weight, cdf / cdf[-1]


def intercept(logit: Floats, rate: float, weight: Floats | None = None) -> float:
    """b whose mean of sigmoid(b + logit), weighted by `weight`, is `rate`; by bisection."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if np.average(sigmoid(middle + logit), weights=weight) > rate else (middle, high)
    return low


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    p: Floats = 1 / (1 + np.exp(-x))
    return p


def strings(names: tuple[str, ...], codes: Ints) -> pa.Array:
    """(N,) names[codes] as an Arrow column."""
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names)).cast(pa.string())
