"""The one 64-bit hash: ids of embedding rows, users of the bootstrap, groups of the jackknife, random draws.

An id must get the same embedding row in training and in serving, years apart, so no version, platform
or process changes the hash, and the tests hold values of it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from c2al.compiled import compiled
from c2al.data.arrow_types import flat, is_integral, is_text, numbers, plain

try:
    import numba
except ImportError:
    # Serving needs torch, pyarrow and numpy only; the same arithmetic then runs on whole arrays.
    numba = None

KEY = b"0123456789123456"
"""SipHash's key. It is public: the hash spreads ids, it hides nothing."""
_KEY_0, _KEY_1 = (np.uint64(int.from_bytes(KEY[i : i + 8], "little")) for i in (0, 8))


def mix64(x: Any) -> Any:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection of 64-bit words.

    `x` is a uint64, or an array of them. The function is plain arithmetic, so numba compiles it too.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def splitmix64(x: Any) -> Any:
    """splitmix64's step and finaliser, a bijection of 64-bit words; `x` as in `mix64`."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(values: pa.Array) -> npt.NDArray[np.uint64]:
    """(V,) 64-bit hash of integers, bools or strings without nulls, dictionary-encoded or not.

    Integers and bools: `splitmix64` of the value's 64 bits; equal integers of any two types that hold
    them hash alike. Strings: SipHash-2-4 (Aumasson and Bernstein 2012) of the UTF-8 bytes under `KEY`,
    through `mix64`. (This is pandas.util.hash_array of the strings, bit for bit.)
    """
    if pa.types.is_dictionary(values.type):
        of_entry = hash64(values.dictionary)
        return of_entry.take(numbers(values.indices))
    out = np.empty(len(values), np.uint64)
    if is_text(values.type):
        text = values.cast(pa.large_binary())
        _, offsets, data = text.buffers()
        offset_V = np.frombuffer(offsets or b"\0" * 8, np.int64)[text.offset :][: len(text) + 1]
        hash_strings = _hash_strings_numpy if numba is None else _hash_strings
        hash_strings(np.frombuffer(data or b"", np.uint8), offset_V, out)
        return out
    if not is_integral(values.type):
        raise TypeError(f"{values.type} has no hash")
    word_V = _words(values)
    if numba is None:
        return np.asarray(splitmix64(word_V))
    _hash_words(word_V, out)
    return out


def hashed_rows(values: pa.Array, rows: int) -> npt.NDArray[np.int64]:
    """(V,) `hash64` of integers or bools, modulo the rows of an embedding table, in one pass."""
    if numba is None:
        return (hash64(values) % np.uint64(rows)).view(np.int64)
    out = np.empty(len(values), np.uint64)
    _hash_words_modulo(_words(values), np.uint64(rows), out)
    return out.view(np.int64)


def _words(values: pa.Array) -> npt.NDArray[np.uint64]:
    """(V,) the 64 bits of integers or bools."""
    return numbers(values if pa.types.is_uint64(values.type) else values.cast(pa.int64())).view(np.uint64)


_splitmix64 = compiled()(splitmix64)
_mix64 = compiled()(mix64)


@compiled()
def _hash_words(word_V, out):  # type: ignore[no-untyped-def]
    for i in range(len(word_V)):
        out[i] = _splitmix64(word_V[i])


@compiled()
def _hash_words_modulo(word_V, modulus, out):  # type: ignore[no-untyped-def]
    """The quotient is the upper half of a product with floor((2^64 - 1) / modulus), which is exact or 1 too small.

    The processor's own division takes longer than all the rest.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    inverse = np.uint64(0xFFFFFFFFFFFFFFFF) // modulus
    c, d = inverse & low, inverse >> half
    for i in range(len(word_V)):
        x = _splitmix64(word_V[i])
        a, b = x & low, x >> half
        bc = b * c + ((a * c) >> half)
        ad = a * d + (bc & low)
        rest = x - (b * d + (bc >> half) + (ad >> half)) * modulus
        out[i] = rest - modulus if rest >= modulus else rest


@compiled()
def _rotate(x, bits):  # type: ignore[no-untyped-def]
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@compiled()
def _round(a, b, c, d):  # type: ignore[no-untyped-def]
    """One SipRound of the paper's Figure 2.1, on v0, v1, v2, v3."""
    a, c = a + b, c + d
    b, d = _rotate(b, 13) ^ a, _rotate(d, 16) ^ c
    a = _rotate(a, 32)
    c, a = c + b, a + d
    b, d = _rotate(b, 17) ^ c, _rotate(d, 21) ^ a
    return a, b, _rotate(c, 32), d


@compiled()
def _hash_strings(data, offset_V, out):  # type: ignore[no-untyped-def]
    """SipHash-2-4 of data[offset_V[i]:offset_V[i + 1]], then the finaliser."""
    for i in range(len(out)):
        start, stop = offset_V[i], offset_V[i + 1]
        a, b = _KEY_0 ^ np.uint64(0x736F6D6570736575), _KEY_1 ^ np.uint64(0x646F72616E646F6D)
        c, d = _KEY_0 ^ np.uint64(0x6C7967656E657261), _KEY_1 ^ np.uint64(0x7465646279746573)
        whole = (stop - start) // 8
        for w in range(whole + 1):
            # Words are little-endian; the last one holds the rest and, on top, the length modulo 256.
            begin = start + 8 * w
            count = 8 if w < whole else stop - begin
            word = np.uint64(0) if w < whole else np.uint64((stop - start) & 255) << np.uint64(56)
            for j in range(count):
                word |= np.uint64(data[begin + j]) << np.uint64(8 * j)
            d ^= word
            a, b, c, d = _round(a, b, c, d)
            a, b, c, d = _round(a, b, c, d)
            a ^= word
        c ^= np.uint64(0xFF)
        for _ in range(4):
            a, b, c, d = _round(a, b, c, d)
        out[i] = _mix64(a ^ b ^ c ^ d)


def _hash_strings_numpy(data: npt.NDArray[np.uint8], offset_V: npt.NDArray[np.int64], out: Any) -> None:
    """`_hash_strings` in numpy: word by word, over all strings that have such a word."""
    start_V, length_V = offset_V[:-1], np.diff(offset_V)
    whole_V = length_V // 8
    state = np.empty((4, len(out)), np.uint64)
    state[0], state[1] = _KEY_0 ^ np.uint64(0x736F6D6570736575), _KEY_1 ^ np.uint64(0x646F72616E646F6D)
    state[2], state[3] = _KEY_0 ^ np.uint64(0x6C7967656E657261), _KEY_1 ^ np.uint64(0x7465646279746573)
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    live = np.arange(len(out))
    for w in range(int(whole_V.max(initial=-1)) + 1):
        live = live[whole_V[live] >= w]
        count = np.minimum(length_V[live] - 8 * w, 8)
        byte_V8 = padded[(start_V[live] + 8 * w)[:, None] + np.minimum(np.arange(8), count[:, None])]
        byte_V8[np.arange(8) >= count[:, None]] = 0
        word = np.ascontiguousarray(byte_V8).view("<u8")[:, 0].astype(np.uint64)
        last = whole_V[live] == w
        word |= np.where(last, (length_V[live] & 255).astype(np.uint64) << np.uint64(56), np.uint64(0))
        a, b, c, d = state[:, live]
        d = d ^ word
        a, b, c, d = _round(*_round(a, b, c, d))
        state[:, live] = a ^ word, b, c, d
    a, b, c, d = state
    c = c ^ np.uint64(0xFF)
    for _ in range(4):
        a, b, c, d = _round(a, b, c, d)
    out[:] = mix64(a ^ b ^ c ^ d)


DRAW_BUCKETS = 1 << 16
"""Steps of a random draw: float32 holds their shares exactly."""


def drawn_share(values: pa.Array | pa.ChunkedArray, draw: int) -> npt.NDArray[np.float32]:
    """A number in [0, 1) for each value, random but the same for equal values of any file: float32 (R,).

    It is a hash of the value and of the number of the draw, in DRAW_BUCKETS steps; null becomes NaN.
    """
    array = flat(plain(values))
    valid_R = array.is_valid().to_numpy(zero_copy_only=False)
    share_R = np.full(len(array), np.nan, np.float32)
    salt = splitmix64(np.array([draw], np.uint64))  # an array, since numpy warns of a scalar that overflows
    share_R[valid_R] = (mix64(hash64(array.drop_null()) ^ salt) >> np.uint64(48)) / np.float32(DRAW_BUCKETS)
    return share_R
