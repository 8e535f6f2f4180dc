"""Worlds with a segment of users that gates the click rule: `privileged`, `visible`, `homogeneous`.

Letters: U users, I items, S segments, G levels of grp, R latent dimension (3), H hours, L levels of (u0, u1, u2, u3),
N rows.

    f = standardised (A[u0, u1] + B[u2, u3]) / sqrt(2)        A, B ~ N(0, 1)
    v = f + 0.3 e                                             e ~ N(0, 1), one per user
    segment: high = the top 10% of v, low = the bottom 10%, mid = the rest
    logit = b + 1.5 <T_s[grp], V_item> / sqrt(3) + shift_s + beta_item + 0.2 sin(pi hour / 12)

T_s (G x R) ~ N(0, 1), independent per segment; V_item = C[cat] + 0.3 N(0, 1); beta = 0.3 N(0, 1);
shift = 0, 0.8, -0.8 for mid, high, low; b gives the wanted rate of positives. Users occur in
proportion to rank^-0.5, items to rank^-0.7.

In `privileged` the segment is known in training and no input, but the inputs u0..u3 reveal most of it:
the case in which auxiliary labels of cohorts can teach the encoder something. `visible` is the same
world, to be trained with the segment as an input: nothing is hidden, so nothing is to be gained. In
`homogeneous` every segment has T and shift of mid: the segment is written and means nothing.

The column `segment` is there to be an axis. In `privileged` it must never be an input.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.data.synthetic.base import (
    CHUNK_ROWS,
    TRUE_P,
    TRUE_P_WITHOUT_LATENT,
    Floats,
    Ints,
    Part,
    cut,
    intercept,
    power_law,
    seconds,
    setting_problems,
    sigmoid,
    strings,
)
from c2al.errors import ConfigError

WorldName = Literal["privileged", "visible", "homogeneous"]
LATENT_WORLDS: tuple[WorldName, ...] = get_args(WorldName)

SEGMENTS = ("mid", "high", "low")
SHIFT_S = np.array([0.0, 0.8, -0.8])
SEGMENT_SHARE = 0.1
"""Share of users in high, and in low."""
LEVELS = (8, 6, 4, 4)
"""Levels of u0..u3."""
GROUPS, CATEGORIES, LATENT, HOURS = 8, 8, 3, 24
NOISE = 0.3
"""Standard deviation of what the features leave open about v."""

SPLIT_DAYS = {"train": 10, "validation": 1, "test": 2}
DAYS = sum(SPLIT_DAYS.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """A synthetic data set with a latent segment. Raises ConfigError for values that describe none."""

    world: WorldName
    rows: int = 390_000
    """Impressions over all splits: 10 days of training, 1 of validation, 2 of test."""
    seed: int = 0
    users: int = 20_000
    items: int = 100
    rate: float = 0.2
    """Expected share of positives."""

    def __post_init__(self) -> None:
        least = {"rows": DAYS, "seed": 0, "users": 10, "items": 1}
        problems = setting_problems(self, least, {"rate": (self.rate,)})
        if self.world not in LATENT_WORLDS:
            problems.append(f"synth.world: must be one of {', '.join(LATENT_WORLDS)}, is {self.world!r}")
        if problems:
            raise ConfigError(problems)


class LatentWorld:
    """The users, the items and the click model: everything that is not drawn row by row."""

    groups = SEGMENTS
    splits = SPLIT_DAYS

    def __init__(self, config: LatentConfig):
        self.config = config
        users, items = config.users, config.items
        rng = np.random.default_rng((config.seed, 0))
        a, b = rng.normal(size=LEVELS[:2]), rng.normal(size=LEVELS[2:])
        self.features_U4 = np.stack([rng.integers(levels, size=users) for levels in LEVELS], axis=1)
        self.level_U = np.ravel_multi_index(tuple(self.features_U4.T), LEVELS)
        self.grp_U = rng.integers(GROUPS, size=users)
        raw_L = ((a[:, :, None, None] + b) / math.sqrt(2)).ravel()
        raw_U = raw_L[self.level_U]
        # Few users may share one level, and then no spread is there to divide by.
        scale = float(raw_U.std()) or 1.0
        f_L = (raw_L - raw_U.mean()) / scale
        v_U = f_L[self.level_U] + NOISE * rng.normal(size=users)
        low, high = np.quantile(v_U, (SEGMENT_SHARE, 1 - SEGMENT_SHARE))
        self.segment_U = np.select([v_U > high, v_U < low], [1, 2], 0)
        self.share_LS = segment_shares(f_L, float(low), float(high))

        self.cat_I = rng.integers(CATEGORIES, size=items)
        taste_SGR = rng.normal(size=(len(SEGMENTS), GROUPS, LATENT))
        shift_S = SHIFT_S
        if config.world == "homogeneous":
            taste_SGR, shift_S = np.broadcast_to(taste_SGR[:1], taste_SGR.shape), np.zeros(len(SEGMENTS))
        v_IR = rng.normal(size=(CATEGORIES, LATENT))[self.cat_I] + 0.3 * rng.normal(size=(items, LATENT))
        beta_I = 0.3 * rng.normal(size=items)
        self.logit_SGI = 1.5 * np.einsum("sgr,ir->sgi", taste_SGR, v_IR) / math.sqrt(LATENT)
        self.logit_SGI += shift_S[:, None, None] + beta_I
        self.hour_H = 0.2 * np.sin(np.pi * np.arange(HOURS) / 12)

        user_weight, self.user_cdf = power_law(rng, users, 0.5)
        item_weight, self.item_cdf = power_law(rng, items, 0.7)
        # A row's probability depends on these four alone, so the rate is exact and needs no sample.
        weight_SG = np.zeros((len(SEGMENTS), GROUPS))
        np.add.at(weight_SG, (self.segment_U, self.grp_U), user_weight)
        weight = weight_SG[:, :, None, None] * item_weight[:, None] * np.ones(HOURS)
        self.logit_SGI += intercept(self.logit_SGI[..., None] + self.hour_H, config.rate, weight)

    def description(self) -> dict[str, Any]:
        """What must not be an input, and what each NE of truth.json is given."""
        hidden = self.config.world == "privileged"
        return {
            "latent": "segment: an axis, never an input" if hidden else "segment: an axis, may be an input",
            "bayes_ne": "NE of P(click | u0, u1, u2, u3, grp, item, cat, hour, segment)",
            "bayes_ne_without_latent": "NE of P(click | u0, u1, u2, u3, grp, item, cat, hour); no user id",
        }

    def parts(self) -> Iterator[Part]:
        """The rows, in the order of time."""
        rows = self.config.rows
        for chunk, start in enumerate(range(0, rows, CHUNK_ROWS)):
            row_N = np.arange(start, min(start + CHUNK_ROWS, rows))
            rng = np.random.default_rng((self.config.seed, 2, chunk))
            user_N = np.searchsorted(self.user_cdf, rng.random(len(row_N)), side="right")
            item_N = np.searchsorted(self.item_cdf, rng.random(len(row_N)), side="right")
            # Not the hour of `time`: rows lie in the order of time, and an input must not say where.
            hour_N = rng.integers(HOURS, size=len(row_N))
            p_NS = self.probability(user_N, item_N, hour_N)
            true_p = p_NS[np.arange(len(row_N)), self.segment_U[user_N]].astype(np.float32)
            without = (self.share_LS[self.level_U[user_N]] * p_NS).sum(axis=1).astype(np.float32)
            label_N = rng.random(len(row_N)) < true_p
            table = self._table(row_N, (user_N, item_N, hour_N), label_N, true_p, without)
            yield from cut(Part("", table, self.segment_U[user_N]), start, rows, SPLIT_DAYS)

    def probability(self, user_N: Ints, item_N: Ints, hour_N: Ints) -> Floats:
        """(N, S) click probability, were the user in each of the segments."""
        logit_NS = self.logit_SGI[:, self.grp_U[user_N], item_N].T + self.hour_H[hour_N][:, None]
        return sigmoid(logit_NS)

    def _table(
        self,
        row_N: Ints,
        drawn: tuple[Ints, Ints, Ints],
        label_N: npt.NDArray[np.bool_],
        true_p: npt.NDArray[np.float32],
        without_latent: npt.NDArray[np.float32],
    ) -> pa.Table:
        user_N, item_N, hour_N = drawn
        features = {f"u{i}": self.features_U4[user_N, i].astype(np.int8) for i in range(len(LEVELS))}
        return pa.table(
            {
                "row_id": row_N,
                "time": seconds(row_N, self.config.rows, SPLIT_DAYS).astype(np.int64),
                "user_id": user_N,
                **features,
                "grp": self.grp_U[user_N].astype(np.int8),
                "item": item_N,
                "cat": self.cat_I[item_N].astype(np.int8),
                "hour": hour_N.astype(np.int8),
                "segment": strings(SEGMENTS, self.segment_U[user_N]),
                "label": label_N.astype(np.int8),
                TRUE_P: true_p,
                TRUE_P_WITHOUT_LATENT: without_latent,
            }
        )


def segment_shares(f_L: Floats, low: float, high: float) -> Floats:
    """(L, S) P(segment | u0..u3), by the normal noise of v around f: what the inputs say of the segment."""
    below_L = np.array([_normal_cdf((low - f) / NOISE) for f in f_L])
    above_L = np.array([_normal_cdf((f - high) / NOISE) for f in f_L])
    return np.stack([1 - below_L - above_L, above_L, below_L], axis=1)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2
