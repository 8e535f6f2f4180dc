"""The world `conflict`: two cohorts whose click models contradict the majority's.

Three cohorts share users and items but not the click model: the majority, and two minorities,
`head` and `tail`, each one surface. Letters: U users, I items, N rows, R latent dimension.

    logit = b_c + user + item + device + hour + age(u) + p_c * price + a_c * <t_u, M_c v_i>

t_u and v_i are means of latent topic vectors over the user's interests and the item's topics,
both of which are written (multi-hot), so the affinity is a bilinear form in observed features. M is
the identity for the majority, a rotation for the head, and minus the identity plus a rotation
for the tail: what attracts the majority repels the tail. b_c is set so that each cohort has the
wanted rate of positives.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.data.rows import gather, offsets_of
from c2al.data.synthetic.base import (
    CHUNK_ROWS,
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

COHORTS = ("majority", "head", "tail")
SURFACES = ("feed", "reels", "stories", "search", "marketplace")
SURFACE_SHARES = (0.52, 0.23, 0.10, 0.08, 0.07)
COHORT_OF_SURFACE = np.array([0, 0, 0, 1, 2])
DEVICES = tuple(f"{maker}-{model}" for maker in ("apple", "samsung", "xiaomi", "pixel") for model in range(1, 11))
COUNTRIES = ("br", "de", "gb", "id", "in", "jp", "mx", "us")
TOPICS, LATENT = 24, 4
MAX_INTERESTS, MAX_TOPICS = 5, 3
PRICE_SLOPE = np.array([0.25, -0.2, -0.9])
AFFINITY = np.array([2.0, 2.0, 2.4])

PILOT_ROWS = 131072
"""Rows of the separate draw that fixes the intercepts."""

SPLIT_DAYS = {"train": 10, "validation": 2, "test": 2}
DAYS = sum(SPLIT_DAYS.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """A synthetic data set. Raises ConfigError for values that describe none."""

    rows: int
    """Impressions over all splits: 10 days of training, 2 of validation, 2 of test."""
    seed: int = 0
    users: int = 5000
    items: int = 2000
    zipf: float = 0.8
    """Exponent of how often users and items occur; 0: all equally often."""
    rates: tuple[float, float, float] = (0.22, 0.40, 0.10)
    """Expected share of positives in majority, head and tail."""

    def __post_init__(self) -> None:
        least = {"rows": DAYS, "seed": 0, "users": 1, "items": 1, "zipf": 0}
        if problems := setting_problems(self, least, {"rates": self.rates}):
            raise ConfigError(problems)


class ConflictWorld:
    """The users, the items and the click model: everything that is not drawn row by row."""

    groups = COHORTS
    splits = SPLIT_DAYS

    def __init__(self, config: SynthConfig):
        self.config = config
        rng = np.random.default_rng((config.seed, 0))
        topic_TR = rng.normal(size=(TOPICS, LATENT))
        self.interests, interest_UR = _bags(rng, config.users, MAX_INTERESTS, topic_TR)
        self.topics, topic_IR = _bags(rng, config.items, MAX_TOPICS, topic_TR)
        rotations = [np.linalg.qr(rng.normal(size=(LATENT, LATENT)))[0] for _ in range(2)]
        mixing = (np.eye(LATENT), rotations[0], (rotations[1] - np.eye(LATENT)) / np.sqrt(2))
        self.interest_UR = interest_UR
        self.mixed_CIR = np.stack([topic_IR @ m.T for m in mixing])

        users, items = config.users, config.items
        user_weight, self.user_cdf = power_law(rng, users, config.zipf)
        item_weight, self.item_cdf = power_law(rng, items, config.zipf)
        self.user_bias_U = 0.4 * rng.normal(size=users)
        self.item_bias_I = 0.4 * rng.normal(size=items)
        self.age_U = np.clip(np.round(18 + 57 * rng.beta(1.6, 2.6, size=users)), 18, 75)
        self.activity_U = np.round(100 * user_weight / user_weight.mean() * rng.lognormal(0, 0.3, size=users), 2)
        self.popularity_I = np.round(100 * item_weight / item_weight.mean() * rng.lognormal(0, 0.3, size=items), 2)
        self.country_U = rng.choice(len(COUNTRIES), size=users)
        self.device_U = rng.choice(len(DEVICES), size=users)
        self.device_bias = 0.2 * rng.normal(size=len(DEVICES))
        self.advertiser_I = rng.integers(0, max(1, items // 10), size=items)
        self.price_I = rng.normal(size=items)
        self.intercept_C = np.zeros(len(COHORTS))

        pilot = _draw(np.random.default_rng((config.seed, 1)), self, PILOT_ROWS, np.zeros(PILOT_ROWS))
        self.intercept_C = np.array([intercept(self.logit(pilot, c), rate) for c, rate in enumerate(config.rates)])

    def description(self) -> dict[str, Any]:
        """Which cohort each surface is."""
        return {"surfaces": dict(zip(SURFACES, (COHORTS[c] for c in COHORT_OF_SURFACE), strict=True))}

    def parts(self) -> Iterator[Part]:
        """The rows, in the order of time."""
        rows, seed = self.config.rows, self.config.seed
        for chunk, start in enumerate(range(0, rows, CHUNK_ROWS)):
            row_N = np.arange(start, min(start + CHUNK_ROWS, rows))
            second_N = seconds(row_N, rows, SPLIT_DAYS)
            rng = np.random.default_rng((seed, 2, chunk))
            draw = _draw(rng, self, len(row_N), second_N)
            true_p = sigmoid(self.logit(draw)).astype(np.float32)
            table = _table(self, draw, row_N, second_N, rng.random(len(row_N)) < true_p, true_p)
            yield from cut(Part("", table, draw.cohort_N), start, rows, SPLIT_DAYS)

    def logit(self, draw: "_Draw", cohort: int | None = None) -> Floats:
        """(N,) true log-odds of the drawn rows; `cohort` puts all of them into that one."""
        u, i = draw.user_N, draw.item_N
        c = draw.cohort_N if cohort is None else np.full(len(u), cohort)
        affinity = np.einsum("nr,nr->n", self.interest_UR[u], self.mixed_CIR[c, i])
        age = self.age_U[u]
        logit: Floats = (
            self.intercept_C[c]
            + self.user_bias_U[u]
            + self.item_bias_I[i]
            + self.device_bias[self.device_U[u]]
            + 0.3 * np.sin(draw.hour_N * (2 * np.pi / 24))
            + 0.3 * np.cos((age - 18) * (2 * np.pi / 40))
            + PRICE_SLOPE[c] * draw.price_N
            + AFFINITY[c] * affinity
        )
        return logit


@dataclasses.dataclass(frozen=True)
class _Draw:
    user_N: Ints
    item_N: Ints
    surface_N: Ints
    hour_N: Ints
    price_N: Floats

    @property
    def cohort_N(self) -> Ints:
        return COHORT_OF_SURFACE[self.surface_N]


def _draw(rng: np.random.Generator, world: ConflictWorld, rows: int, second_N: Floats) -> _Draw:
    item_N = np.searchsorted(world.item_cdf, rng.random(rows), side="right")
    return _Draw(
        user_N=np.searchsorted(world.user_cdf, rng.random(rows), side="right"),
        item_N=item_N,
        surface_N=np.searchsorted(np.cumsum(SURFACE_SHARES)[:-1], rng.random(rows), side="right"),
        hour_N=(second_N // 3600 % 24).astype(np.int64),
        price_N=0.8 * world.price_I[item_N] + 0.6 * rng.normal(size=rows),
    )


def _table(
    world: ConflictWorld,
    draw: _Draw,
    row_N: Ints,
    second_N: Floats,
    label_N: npt.NDArray[np.bool_],
    true_p: npt.NDArray[np.float32],
) -> pa.Table:
    u, i = draw.user_N, draw.item_N
    return pa.table(
        {
            "row_id": row_N,
            "time": second_N.astype(np.int64),
            "user_id": u,
            "item_id": i,
            "advertiser_id": world.advertiser_I[i],
            "surface": strings(SURFACES, draw.surface_N),
            "device": strings(DEVICES, world.device_U[u]),
            "country": strings(COUNTRIES, world.country_U[u]),
            "hour": draw.hour_N.astype(np.int8),
            "age": world.age_U[u].astype(np.float32),
            "activity": world.activity_U[u].astype(np.float32),
            "popularity": world.popularity_I[i].astype(np.float32),
            "price": draw.price_N.astype(np.float32),
            "interests": _rows_of(world.interests, u),
            "topics": _rows_of(world.topics, i),
            "label": label_N.astype(np.int8),
            "true_p": true_p,
        }
    )


def _bags(rng: np.random.Generator, count: int, longest: int, topic_TR: Floats) -> tuple[tuple[Ints, Ints], Floats]:
    """`count` sets of 1..longest topics as (values, offsets), and the mean latent vector of each, of unit scale."""
    lengths = rng.integers(1, longest + 1, size=count)
    blocks = [min(CHUNK_ROWS, count - at) for at in range(0, count, CHUNK_ROWS)]
    chosen = np.concatenate([np.argsort(rng.random((n, TOPICS)), axis=1)[:, :longest] for n in blocks])
    kept = np.arange(longest) < lengths[:, None]
    mean_CR = (topic_TR[chosen] * kept[:, :, None]).sum(axis=1) / np.sqrt(lengths)[:, None]
    return (chosen[kept], offsets_of(lengths)), mean_CR / np.sqrt(LATENT)


def _rows_of(bags: tuple[Ints, Ints], index_N: Ints) -> pa.Array:
    values, offsets = bags
    rows = gather(values, offsets[index_N], offsets[index_N + 1])
    return pa.ListArray.from_arrays(pa.array(rows.offsets, pa.int32()), pa.array(rows.values_V, pa.int32()))
