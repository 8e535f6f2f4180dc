"""The one 64-bit hash of integers: ids of embedding rows, users of the bootstrap, groups of the jackknife."""

from typing import Any

import numpy as np


def splitmix64(x: Any) -> Any:
    """splitmix64's step and finaliser (Steele, Lea and Flood 2014), a bijection of 64-bit words.

    `x` is a uint64, or an array of them. The function is plain arithmetic, so numba compiles it too.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
