"""Users -> groups of the delete-a-group jackknife."""

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.data.arrow_types import is_text
from c2al.data.hashing import splitmix64
from c2al.discovery.histogram import GROUPS
from c2al.errors import DataError

_mix = numba.njit(nogil=True, cache=True)(splitmix64)


def user_groups(users: pa.Array, column: str) -> npt.NDArray[np.uint8]:
    """Jackknife group of each row, a hash of its user's integer or string: uint8 (R,), below G.

    Equal users share a group in every file, whatever their encoding. There must be no null. Raises
    DataError naming the column if it holds neither integers nor strings.
    """
    if pa.types.is_dictionary(users.type):
        group_of_entry = user_groups(users.dictionary.fill_null(_filler(users.dictionary, column)), column)
        return np.asarray(group_of_entry[np.from_dlpack(users.indices)])
    group_R = np.empty(len(users), np.uint8)
    if pa.types.is_integer(users.type):
        # A uint64 beyond int64 keeps its bits, and an integer that fits both has the same bits in both.
        user_R = np.from_dlpack(users)
        _hash_integers(user_R if user_R.dtype == np.uint64 else user_R.astype(np.int64, copy=False), group_R)
    elif is_text(users.type):
        text = users.cast(pa.large_binary())
        _, offsets, data = text.buffers()
        offset_R = np.frombuffer(offsets, np.int64)[text.offset :][: len(text) + 1]
        _hash_bytes(np.frombuffer(data or b"", np.uint8), offset_R, group_R)
    else:
        raise DataError(f"column '{column}' (the user) is {users.type}, needs integers or strings")
    return group_R


def _filler(dictionary: pa.Array, column: str) -> int | str:
    """What stands for an entry that is null, which no row may use."""
    return "" if is_text(dictionary.type) else 0


@numba.njit(nogil=True, cache=True)
def _hash_integers(value_R, group_R):  # type: ignore[no-untyped-def]
    for i in range(len(value_R)):
        group_R[i] = np.uint8(_mix(np.uint64(value_R[i])) % np.uint64(GROUPS))


@numba.njit(nogil=True, cache=True)
def _hash_bytes(data, offset_R, group_R):  # type: ignore[no-untyped-def]
    """FNV-1a of each string's bytes, which are hashed where they lie, then splitmix64."""
    for i in range(len(group_R)):
        x = np.uint64(0xCBF29CE484222325)
        for j in range(offset_R[i], offset_R[i + 1]):
            x = (x ^ np.uint64(data[j])) * np.uint64(0x100000001B3)
        group_R[i] = np.uint8(_mix(x) % np.uint64(GROUPS))
