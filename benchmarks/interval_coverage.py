"""How often do intervals of NE_diff hold the true value?

    python benchmarks/interval_coverage.py [--draws 4000]

Draws test sets of users and seeds from known distributions, evaluates each with the product's functions and
counts how often the nominal 95% interval holds the truth. A draw has users of unequal sizes whose reaction
to the arm differs (u), seeds that differ (a), and models of a seed that meet users differently (i):

    loss difference of user and seed = truth * loss + u_user + a_seed + i_(user, seed)

Regimes say which share of the variance of the mean over seeds is due to seeds (a and i), which part of that
is i, and the shapes of u and a. Methods that were tried stand beside the one that is used. The figure shows
the simulation as points and, as lines, the error rates computed by integration (`intervals.rejection`), which
know nothing of the floor: what i adds lies above the line. "agreeing" counts the draws whose seeds agree so well
that the floor binds, and how often the interval holds the truth in these alone.
Writes benchmarks/results/coverage.csv and coverage.svg.
"""

import argparse
import csv
import dataclasses
import datetime
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from scipy import special

from c2al.evaluation.estimates import effective
from c2al.evaluation.intervals import Spread, exponent, rejection, spread

RESULTS = Path(__file__).parent / "results"
SEEDS = (2, 3, 5, 8)
ALPHA = 0.05
TRUTH = -0.002
SCALE = 0.001
"""Standard error of the mean over seeds, in NE_diff: 0.1%."""
REPLICATES = 400
TOGETHER = 20
"""Draws that share their bootstrap weights."""
BAND = (0.93, 0.97)


@dataclasses.dataclass(frozen=True)
class Regime:
    share: float
    """V_s / V: share of the variance of the mean that is due to seeds."""
    interaction: float = 0.5
    """Part of V_s that is i, the rest is a."""
    users: int = 400
    skewed_users: bool = False
    """u is lognormal (sigma 1) instead of normal."""
    heavy_seeds: bool = False
    """a is Student t with 5 degrees of freedom instead of normal."""


REGIMES = {
    "users alone": Regime(share=0.0),
    "users dominate": Regime(share=0.1),
    "users somewhat": Regime(share=0.25),
    "balanced": Regime(share=0.5),
    "seeds dominate": Regime(share=0.9),
    "seeds alone": Regime(share=1.0, interaction=0.0),
    "balanced, all interaction": Regime(share=0.5, interaction=1.0),
    "seeds alone, all interaction": Regime(share=1.0, interaction=1.0),
    "balanced, skewed users": Regime(share=0.5, skewed_users=True),
    "balanced, heavy-tailed seeds": Regime(share=0.5, heavy_seeds=True),
    "balanced, 100 users": Regime(share=0.5, users=100),
}

Interval = tuple[float, float]


class Held(NamedTuple):
    """What one method did over all draws."""

    coverage: float
    half_width: float
    """Mean, in true standard errors."""
    agreeing: float
    """Share of the draws whose seeds agree so well that the floor binds."""
    agreeing_coverage: float
    """Coverage in these draws alone; nan without any."""


Method = Callable[[np.ndarray, np.ndarray, Spread], Interval]


def t(df: float) -> float:
    return float(special.stdtrit(df, 1 - ALPHA / 2))


def around(found: Spread, half: float) -> Interval:
    return found.value - half, found.value + half


def users_only(value_S: np.ndarray, replicate_SR: np.ndarray, found: Spread) -> Interval:
    low, high = np.quantile(replicate_SR.mean(axis=0), (ALPHA / 2, 1 - ALPHA / 2))
    return low, high


def seeds_only(value_S: np.ndarray, replicate_SR: np.ndarray, found: Spread) -> Interval:
    return around(found, t(len(value_S) - 1) * math.sqrt(found.seeds_variance))


def counted_twice(value_S: np.ndarray, replicate_SR: np.ndarray, found: Spread) -> Interval:
    both = dataclasses.replace(found, users_variance=float(replicate_SR.mean(axis=0).var(ddof=1)))
    return around(both, t(both.df) * both.std)


def satterthwaite(value_S: np.ndarray, replicate_SR: np.ndarray, found: Spread) -> Interval:
    return around(found, t(found.df) * found.std)


def howe(value_S: np.ndarray, replicate_SR: np.ndarray, found: Spread) -> Interval:
    t_u, t_s = t(found.users_df), t(found.seeds_df)
    return around(found, math.sqrt(t_u**2 * found.users_variance + t_s**2 * found.seeds_variance))


def cochran(value_S: np.ndarray, replicate_SR: np.ndarray, found: Spread) -> Interval:
    t_u, t_s = t(found.users_df), t(found.seeds_df)
    return around(found, ((1 - found.share) * t_u + found.share * t_s) * found.std)


def without_floor(value_S: np.ndarray, replicate_SR: np.ndarray, found: Spread) -> Interval:
    return dataclasses.replace(found, resampled_variance=0.0).interval(1 - ALPHA)


def used(value_S: np.ndarray, replicate_SR: np.ndarray, found: Spread) -> Interval:
    return found.interval(1 - ALPHA)


METHODS: dict[str, Method] = {
    "users only (bootstrap)": users_only,
    "seeds only (t)": seeds_only,
    "bootstrap + s^2/S, Satterthwaite": counted_twice,
    "decomposed, Satterthwaite": satterthwaite,
    "decomposed, Cochran": cochran,
    "decomposed, Howe": howe,
    "used, without its floor": without_floor,
    "used": used,
}


def draws(regime: Regime, seeds: int, together: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(difference, loss): sums per user, seed and draw, each (users, seeds, draws)."""
    shape = (regime.users, seeds, together)
    size = rng.lognormal(0.0, 0.7, (regime.users, 1, together))
    loss = size * 0.4 * (1 + 0.3 * rng.uniform(-1, 1, (regime.users, 1, together)) + 0.03 * rng.normal(size=shape))
    # Variance of a mean weighted by size: that of one user over the effective number of users.
    effective_users = regime.users / math.exp(0.7**2)
    v_u, v_s = (1 - regime.share) * SCALE**2, regime.share * SCALE**2
    common = rng.lognormal(0.0, 1.0, (regime.users, 1, together)) if regime.skewed_users else rng.normal(
        size=(regime.users, 1, together)
    )  # fmt: skip
    if regime.skewed_users:
        common = (common - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
    own = rng.standard_t(5, (1, seeds, together)) * math.sqrt(3 / 5) if regime.heavy_seeds else rng.normal(
        size=(1, seeds, together)
    )  # fmt: skip
    noise = common * math.sqrt(v_u * effective_users)
    noise = noise + own * math.sqrt((1 - regime.interaction) * v_s * seeds)
    noise = noise + rng.normal(size=shape) * math.sqrt(regime.interaction * v_s * seeds * effective_users)
    return TRUTH * loss + 0.4 * size * noise, loss


def simulate(regime: Regime, seeds: int, number: int, seed: int, methods: dict[str, Method]) -> dict[str, Held]:
    """Method -> what it did over `number` draws."""
    rng = np.random.default_rng(seed)
    held, held_agreeing, agreeing = dict.fromkeys(methods, 0), dict.fromkeys(methods, 0), 0
    width = dict.fromkeys(methods, 0.0)
    for _ in range(number // TOGETHER):
        difference, loss = draws(regime, seeds, TOGETHER, rng)
        weight_RU = np.vstack([np.ones(regime.users), rng.poisson(1.0, (REPLICATES, regime.users))])
        shape = (REPLICATES + 1, seeds, TOGETHER)
        lost_RSD = (weight_RU @ loss.reshape(regime.users, -1)).reshape(shape)
        value_RSD = (weight_RU @ difference.reshape(regime.users, -1)).reshape(shape) / lost_RSD
        for d in range(TOGETHER):
            value_SR = value_RSD[:, :, d].T
            users = effective(lost_RSD[:, :, d].mean(axis=1))
            found = spread(value_SR[:, 0], value_SR[:, 1:], users)
            binds = found.interval(1 - ALPHA)[0] < without_floor(value_SR[:, 0], value_SR[:, 1:], found)[0]
            agreeing += binds
            for name, method in methods.items():
                low, high = method(value_SR[:, 0], value_SR[:, 1:], found)
                held[name] += low <= TRUTH <= high
                held_agreeing[name] += binds and low <= TRUTH <= high
                width[name] += (high - low) / 2 / SCALE
    total = number // TOGETHER * TOGETHER
    return {
        name: Held(
            coverage=held[name] / total,
            half_width=width[name] / total,
            agreeing=agreeing / total,
            agreeing_coverage=held_agreeing[name] / agreeing if agreeing else math.nan,
        )
        for name in methods
    }


def figure(rows: list[dict[str, object]], path: Path) -> None:
    """Coverage over the share of seeds: a panel per number of seeds."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "c2al", "font.size": 9})
    drawn, axes = plt.subplots(1, len(SEEDS), figsize=(11, 3.2), sharey=True, layout="constrained")
    share = np.linspace(0.001, 0.999, 99)
    for ax, seeds in zip(axes, SEEDS, strict=True):
        ax.axhspan(*BAND, color="#2c9c6a", alpha=0.12, lw=0)
        ax.axhline(1 - ALPHA, color="#7d8a9c", lw=0.8)
        curves = {"used": ("#d9722b", exponent(seeds - 1, ALPHA)), "decomposed, Howe": ("#2f86c9", 1.0)}
        for name, (colour, a) in curves.items():
            exact = [1 - rejection(0.0, s, seeds - 1, ALPHA, a) for s in share]
            ax.plot(share, exact, color=colour, lw=1.2)
            ours = [r for r in rows if (r["seeds"], r["method"]) == (seeds, name)]
            ax.plot([r["share"] for r in ours], [r["coverage"] for r in ours], "o", ms=4, color=colour, label=name)
        others = {"decomposed, Satterthwaite": "#cf5872", "users only (bootstrap)": "#7d8a9c"}
        for name, colour in others.items():
            ours = [r for r in rows if (r["seeds"], r["method"]) == (seeds, name)]
            ax.plot([r["share"] for r in ours], [r["coverage"] for r in ours], "x", ms=5, color=colour, label=name)
        ax.set_title(f"{seeds} seeds")
        ax.set_xlabel("share of the variance due to seeds")
        ax.set_ylim(0.84, 1.0)
    axes[0].set_ylabel("coverage of the 95% interval")
    axes[-1].legend(fontsize=7, loc="lower right")
    drawn.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": platform.machine(),
        "versions": f"numpy {np.__version__} scipy {scipy.__version__}",
        "draws": arguments.draws,
    }
    rows: list[dict[str, object]] = []
    print(f"{'regime':30} {'seeds':>5}  " + "  ".join(f"{name:>12.12}" for name in METHODS))
    for number, (name, regime) in enumerate(REGIMES.items()):
        for seeds in SEEDS:
            found = simulate(regime, seeds, arguments.draws, 100 * number + seeds, METHODS)
            print(f"{name:30} {seeds:>5}  " + "  ".join(f"{h.coverage:>12.1%}" for h in found.values()), flush=True)
            rows += [
                {
                    **about,
                    "regime": name,
                    "seeds": seeds,
                    "share": regime.share,
                    "method": method,
                    "coverage": round(held.coverage, 5),
                    "standard_error": round(math.sqrt(held.coverage * (1 - held.coverage) / arguments.draws), 5),
                    "half_width": round(held.half_width, 3),
                    "agreeing": round(held.agreeing, 4),
                    "agreeing_coverage": round(held.agreeing_coverage, 3),
                }
                for method, held in found.items()
            ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "coverage.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure(rows, arguments.output / "coverage.svg")
    for method in ("used, without its floor", "used"):
        inside = [r["coverage"] for r in rows if r["method"] == method]
        print(f"{method}: {min(inside):.1%} to {max(inside):.1%} over {len(inside)} designs; nominal {1 - ALPHA:.0%}")


if __name__ == "__main__":
    main()
