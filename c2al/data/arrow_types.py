"""The one set of questions about Arrow types, and the types that the rest of the code meets.

``File.read`` turns every column into its `readable` type, so string_view, list_view and dictionaries
of numbers exist at the door only. None of the questions looks into a dictionary unless it says so.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Category = Literal["integer", "text"]
"""What the values of a sparse column are. Equal ids of different categories have different hashes."""


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are strings: string, large_string or string_view."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_integral(kind: pa.DataType) -> bool:
    """Whether values of this type are integers of any width, or bools."""
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values of this type are integers, bools or floats. Decimals and times are no numbers here."""
    return is_integral(kind) or bool(pa.types.is_floating(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type is list-valued, in any layout."""
    t = pa.types
    return bool(
        t.is_list(kind)
        or t.is_large_list(kind)
        or t.is_fixed_size_list(kind)
        or t.is_list_view(kind)
        or t.is_large_list_view(kind)
    )


def decoded(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary; any other type itself."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def leaf(kind: pa.DataType) -> pa.DataType:
    """The type of the single values of a scalar or list column, dictionary-encoded or not."""
    kind = decoded(kind)
    return decoded(kind.value_type) if is_list(kind) else kind


def category(kind: pa.DataType) -> Category | None:
    """What the single values of a scalar or list column are; None: nothing that can be an id."""
    kind = leaf(kind)
    return "text" if is_text(kind) else "integer" if is_integral(kind) else None


def family(kind: pa.DataType) -> str:
    """In a word what a column holds, whatever its width and layout: what files of one data set must agree on."""
    if is_list(decoded(kind)):
        return f"lists of {family(decoded(kind).value_type)}"
    kind = decoded(kind)
    names = {"strings": is_text, "integers": is_integral, "floats": pa.types.is_floating}
    return next((name for name, holds in names.items() if holds(kind)), str(kind))


def readable(kind: pa.DataType) -> pa.DataType:
    """The type a column has once it is read.

    string_view becomes string, list_view becomes list, and a dictionary becomes its values unless these
    are strings: a string is then looked at once per distinct value.
    """
    t = pa.types
    if t.is_dictionary(kind):
        return kind if t.is_string(kind.value_type) or t.is_large_string(kind.value_type) else readable(kind.value_type)
    if t.is_string_view(kind):
        return pa.string()
    if is_list(kind):
        value = readable(decoded(kind.value_type))
        if t.is_fixed_size_list(kind):
            return pa.list_(value, kind.list_size)
        large = t.is_large_list(kind) or t.is_large_list_view(kind)
        made = pa.large_list(value) if large else pa.list_(value)
        # Names and nullability of list elements do not matter; an equal type need not be cast.
        return kind if value == kind.value_type and (t.is_list(kind) or t.is_large_list(kind)) else made
    return kind


def plain(array: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The array with its `readable` type, dictionaries decoded too."""
    return converted(array, readable(decoded(array.type)))


def converted(array: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """The array as its `readable` type `kind`."""
    if array.type == kind:
        return array
    if isinstance(array, pa.ChunkedArray):
        return pa.chunked_array([converted(chunk, kind) for chunk in array.chunks], kind)
    if pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        # pyarrow 26's own cast of a list_view makes an offsets buffer that is too short.
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        large = pa.types.is_large_list(kind)
        offsets = pa.array(bounds, pa.int64() if large else pa.int32())
        of = pa.LargeListArray if large else pa.ListArray
        return of.from_arrays(offsets, converted(array.flatten(), kind.value_type), mask=array.is_null())
    return array.cast(kind)


def float64(array: pa.Array) -> npt.NDArray[np.float64]:
    """(N,) float64 of integers, bools or floats, null as NaN.

    An integer beyond 2^53 becomes the nearest float64, whether the column has nulls or not: pyarrow's
    own conversions refuse it or round it, by circumstances.
    """
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    return numbers(array.cast(pa.float64(), safe=False))


def numbers(array: pa.Array) -> npt.NDArray[Any]:
    """(N,) integers or floats; where none is null, Arrow's own memory, not to be written to.

    pyarrow's `to_numpy` imports pandas.
    """
    if array.null_count or pa.types.is_boolean(array.type):
        return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    return np.from_dlpack(array)


def float32_rounded_down(array: pa.Array) -> npt.NDArray[np.float32]:
    """(N,) float32 of integers, the largest that is not above each; null as NaN.

    An integer is at least a float32 c exactly when this is.
    """
    integer_N: npt.NDArray[Any] = np.from_dlpack(array.fill_null(0) if array.null_count else array)
    value_N = integer_N.astype(np.float32)
    # Every integer up to 2^24 is a float32.
    if max(-int(integer_N.min(initial=0)), int(integer_N.max(initial=0))) > 2**24:
        # Compared as integers. The one float32 that may lie beyond their type is above all of them.
        beyond_N = value_N >= np.float32(np.iinfo(integer_N.dtype).max)
        above_N = beyond_N | (np.where(beyond_N, 0, value_N).astype(integer_N.dtype) > integer_N)
        value_N = np.where(above_N, np.nextafter(value_N, np.float32(-np.inf)), value_N)
    if array.null_count:
        value_N[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return value_N


def flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column as one array, without a copy where it is one already."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def canonical(array: pa.Array) -> pa.Array:
    """Integers and bools as int64, strings as string: the types of a vocabulary.

    Raises pyarrow.ArrowInvalid for a uint64 beyond int64.
    """
    return array.cast(pa.int64() if is_integral(decoded(array.type)) else pa.string())
