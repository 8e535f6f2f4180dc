"""numba's compiler, for all our kernels."""

from collections.abc import Callable
from typing import Any

try:
    import numba
except ImportError:
    # Serving needs torch, pyarrow and numpy only.
    numba = None


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Decorates a kernel that numba compiles without the interpreter's lock; `options` are those of numba.njit.

    What is compiled is kept on disk where there is a place for it. Where there is none (a package and a
    home that cannot be written, and a NUMBA_CACHE_DIR that cannot either), each process compiles anew.
    Without numba the function stays as it is.
    """

    def decorate(function: Any) -> Any:
        if numba is None:
            return function
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no place for its cache
            return numba.njit(nogil=True, **options)(function)

    return decorate
