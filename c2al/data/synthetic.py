"""Impressions with planted heterogeneity, whose true click probability is known.

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
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.data.ingest.splits import SplitWriter
from c2al.data.rows import gather, offsets_of
from c2al.errors import ConfigError
from c2al.files import new_folder, write_atomically

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

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

CHUNK_ROWS = 65536
"""Rows drawn from one random stream: (seed, chunk) fixes them."""
PILOT_ROWS = 131072
"""Rows of the separate draw that fixes the intercepts."""

START_SECONDS = 1_700_000_000
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
        problems = [
            f"synth.{name}: must be at least {least}, is {getattr(self, name)}"
            for name, least in (("rows", DAYS), ("seed", 0), ("users", 1), ("items", 1), ("zipf", 0))
            if not getattr(self, name) >= least
        ]
        problems += [f"synth.rates: must lie in (0, 1), is {r}" for r in self.rates if not 0 < r < 1]
        if problems:
            raise ConfigError(problems)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is known of one cohort in one split."""

    rows: int
    positives: int
    bayes_ne: float | None
    """Normalized entropy of the true probability; None where one class is absent."""


def synthesise(config: SynthConfig, output: str | Path) -> dict[str, dict[str, Truth]]:
    """Writes <output>/{train,validation,test}/*.parquet and truth.json; returns split -> cohort -> truth.

    Column `true_p` (float32, the click probability the label was drawn from) is known only after
    the fact and must never be an input. Its normalized entropy, `bayes_ne`, is what no model can
    beat but by luck. Memory does not depend on rows; the same config gives the same bytes.
    """
    world = _World(config)
    truth = {split: {name: _Entropy() for name in ("overall", *COHORTS)} for split in SPLIT_DAYS}
    with new_folder(output) as folder:
        writer = SplitWriter(folder)
        for split, table, cohort_N in _impressions(world, config):
            writer.write(split, table)
            label, p = table["label"].to_numpy(), table["true_p"].to_numpy().astype(np.float64)
            truth[split]["overall"].add(label, p)
            for code, name in enumerate(COHORTS):
                truth[split][name].add(label[cohort_N == code], p[cohort_N == code])
        writer.close()
        result = {split: {name: e.truth() for name, e in parts.items()} for split, parts in truth.items()}
        text = {
            "config": dataclasses.asdict(config),
            "surfaces": dict(zip(SURFACES, (COHORTS[c] for c in COHORT_OF_SURFACE), strict=True)),
            "splits": {s: {n: dataclasses.asdict(t) for n, t in parts.items()} for s, parts in result.items()},
        }
        write_atomically(folder / "truth.json", json.dumps(text, indent=1) + "\n")
    return result


class _World:
    """The users, the items and the click model: everything that is not drawn row by row."""

    def __init__(self, config: SynthConfig):
        rng = np.random.default_rng((config.seed, 0))
        topic_TR = rng.normal(size=(TOPICS, LATENT))
        self.interests, interest_UR = _bags(rng, config.users, MAX_INTERESTS, topic_TR)
        self.topics, topic_IR = _bags(rng, config.items, MAX_TOPICS, topic_TR)
        rotations = [np.linalg.qr(rng.normal(size=(LATENT, LATENT)))[0] for _ in range(2)]
        mixing = (np.eye(LATENT), rotations[0], (rotations[1] - np.eye(LATENT)) / np.sqrt(2))
        self.interest_UR = interest_UR
        self.mixed_CIR = np.stack([topic_IR @ m.T for m in mixing])

        users, items = config.users, config.items
        user_weight, self.user_cdf = _zipf(rng, users, config.zipf)
        item_weight, self.item_cdf = _zipf(rng, items, config.zipf)
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
        self.intercept_C = np.array([_intercept(self.logit(pilot, c), rate) for c, rate in enumerate(config.rates)])

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


def _draw(rng: np.random.Generator, world: _World, rows: int, second_N: Floats) -> _Draw:
    item_N = np.searchsorted(world.item_cdf, rng.random(rows), side="right")
    return _Draw(
        user_N=np.searchsorted(world.user_cdf, rng.random(rows), side="right"),
        item_N=item_N,
        surface_N=np.searchsorted(np.cumsum(SURFACE_SHARES)[:-1], rng.random(rows), side="right"),
        hour_N=(second_N // 3600 % 24).astype(np.int64),
        price_N=0.8 * world.price_I[item_N] + 0.6 * rng.normal(size=rows),
    )


def _impressions(world: _World, config: SynthConfig) -> Iterator[tuple[str, pa.Table, Ints]]:
    """(split, rows, their cohorts), in the order of time."""
    ends = [config.rows * int(days) // DAYS for days in np.cumsum(list(SPLIT_DAYS.values()))]
    for chunk, start in enumerate(range(0, config.rows, CHUNK_ROWS)):
        row_N = np.arange(start, min(start + CHUNK_ROWS, config.rows))
        second_N = np.floor(START_SECONDS + row_N * (DAYS * 86400 / config.rows))
        rng = np.random.default_rng((config.seed, 2, chunk))
        draw = _draw(rng, world, len(row_N), second_N)
        true_p = (1 / (1 + np.exp(-world.logit(draw)))).astype(np.float32)
        table = _table(world, draw, row_N, second_N, rng.random(len(row_N)) < true_p, true_p)
        begin = 0
        for split, end in zip(SPLIT_DAYS, ends, strict=True):
            a, b = np.clip((begin - start, end - start), 0, len(row_N)).tolist()
            if a < b:
                yield split, table.slice(a, b - a), draw.cohort_N[a:b]
            begin = end


def _table(
    world: _World,
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
            "surface": _strings(SURFACES, draw.surface_N),
            "device": _strings(DEVICES, world.device_U[u]),
            "country": _strings(COUNTRIES, world.country_U[u]),
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


def _zipf(rng: np.random.Generator, count: int, exponent: float) -> tuple[Floats, Floats]:
    """(weights by id, their cumulative distribution); which id is popular is random."""
    weight = rng.permutation(np.arange(1, count + 1, dtype=np.float64) ** -exponent)
    cdf = np.cumsum(weight)
    # Exactly 1 at the end, so that no draw in [0, 1) falls beyond the last id.
    return weight, cdf / cdf[-1]


def _intercept(logit: Floats, rate: float) -> float:
    """b with mean sigmoid(b + logit) = rate, by bisection."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (1 / (1 + np.exp(-(middle + logit)))).mean() > rate else (middle, high)
    return low


def _strings(names: tuple[str, ...], codes: Ints) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names)).cast(pa.string())


def _rows_of(bags: tuple[Ints, Ints], index_N: Ints) -> pa.Array:
    values, offsets = bags
    rows = gather(values, offsets[index_N], offsets[index_N + 1])
    return pa.ListArray.from_arrays(pa.array(rows.offsets, pa.int32()), pa.array(rows.values_V, pa.int32()))


class _Entropy:
    """Sums for the normalized entropy of the true probability."""

    def __init__(self) -> None:
        self._rows, self._positives, self._loss = 0, 0, 0.0

    def add(self, label: npt.NDArray[np.int8], p: Floats) -> None:
        self._rows += len(label)
        self._positives += int(label.sum())
        self._loss -= float(np.log(np.where(label == 1, p, 1 - p)).sum())

    def truth(self) -> Truth:
        ne = None
        if 0 < self._positives < self._rows:
            rate = self._positives / self._rows
            ne = self._loss / self._rows / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
        return Truth(self._rows, self._positives, ne)
