"""Users -> groups of the delete-a-group jackknife."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.compiled import compiled
from c2al.data.arrow_types import decoded, is_text
from c2al.data.hashing import hash64, splitmix64
from c2al.discovery.histogram import GROUPS
from c2al.errors import DataError


def user_groups(users: pa.Array, column: str) -> npt.NDArray[np.uint8]:
    """Jackknife group of each row, the hash of its user's integer or string modulo G: uint8 (R,).

    Equal users share a group in every file, whatever their encoding. There must be no null. Raises
    DataError naming the column if it holds neither integers nor strings.
    """
    kind = decoded(users.type)
    if not (pa.types.is_integer(kind) or is_text(kind)):
        raise DataError(f"column '{column}' (the user) is {users.type}, needs integers or strings")
    if pa.types.is_dictionary(users.type):
        if users.dictionary.null_count:
            return user_groups(users.dictionary_decode(), column)
        return np.asarray(user_groups(users.dictionary, column)[np.from_dlpack(users.indices)])
    if pa.types.is_integer(kind):
        user_R, group_R = np.from_dlpack(users), np.empty(len(users), np.uint8)
        _integer_groups(user_R if user_R.dtype == np.uint64 else user_R.astype(np.int64, copy=False), group_R)
        return group_R
    return (hash64(users) % np.uint64(GROUPS)).astype(np.uint8)


_splitmix64 = compiled()(splitmix64)


@compiled()
def _integer_groups(value_R, group_R):  # type: ignore[no-untyped-def]
    """`hash64` of integers, modulo G, in one pass: users are hashed in every row of a scan."""
    for i in range(len(value_R)):
        group_R[i] = np.uint8(_splitmix64(np.uint64(value_R[i])) % np.uint64(GROUPS))
