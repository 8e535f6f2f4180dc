"""What a design can see: the smallest difference, and the seeds or users that a target needs."""

from collections.abc import Callable

from scipy import optimize

from c2al.evaluation.intervals import Spread, exponent, rejection
from c2al.evaluation.result import Power

POWER = 0.8
TARGET = 0.001
"""NE_diff of 0.1%."""
MOST_SEEDS = 1000
"""More seeds than this count as no number of seeds."""
_MOST_USERS = 1e6
"""As a factor of the users there are."""


def power(found: Spread, users: float, confidence: float, target: float = TARGET) -> Power | None:
    """The power statement of a design whose variances are those of `found`; None where it has no variance.

    The estimated variances are taken as the true ones, that of the seeds at least as large as how their models meet
    these users. More users would lessen this part, so that `users_needed` errs towards more users.
    """
    own = found.seeds_df + 1
    alpha, v_users = 1 - confidence, found.users_variance
    seed_variance = own * max(found.seeds_variance, found.resampled_variance - v_users)
    std = (v_users + seed_variance / own) ** 0.5
    if not std:
        return None

    def chance(difference: float, seeds: float, factor: float) -> float:
        """That `seeds` seeds and `factor` times the users see the difference."""
        v_u, v_s = v_users / factor, seed_variance / seeds
        df = max(int(seeds) - 1, 1)
        a = exponent(df, round(alpha, 12)) if seed_variance else 1.0
        return rejection(difference / (v_u + v_s) ** 0.5, v_s / (v_u + v_s), df, alpha, a)

    high = 1.0
    while chance(high * std, own, 1.0) < POWER:
        high *= 2
    smallest = optimize.brentq(lambda x: chance(x * std, own, 1.0) - POWER, 0.0, high, xtol=1e-4) * std
    seeds_needed = None
    if found.seeds_df:
        seeds_needed = _first(lambda n: chance(target, n, 1.0) >= POWER, 2, MOST_SEEDS)
    return Power(
        smallest=float(smallest),
        seeds_needed=seeds_needed,
        users_needed=_users(chance, target, own, users),
        target=target,
    )


def _first(holds: Callable[[int], bool], low: int, most: int) -> int | None:
    """The smallest integer from `low` to `most` for which `holds`, which stays true once it is."""
    high = low
    while not holds(high):
        if high == most:
            return None
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _users(chance: Callable[[float, float, float], float], target: float, seeds: int, users: float) -> float | None:
    if chance(target, seeds, _MOST_USERS) < POWER:
        return None
    low = 1e-6
    if chance(target, seeds, low) >= POWER:
        return users * low
    return float(users * optimize.brentq(lambda f: chance(target, seeds, f) - POWER, low, _MOST_USERS, rtol=1e-4))
