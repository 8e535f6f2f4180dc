"""The one set of questions about Arrow types. None looks into a dictionary unless it says so."""

import pyarrow as pa


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are strings: string, large_string or string_view."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
