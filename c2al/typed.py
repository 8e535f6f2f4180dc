"""Strict building of dataclasses from plain values, for the configuration and for every state file.

``build`` turns a tree of dicts, lists, numbers and strings (of TOML or JSON) into a type. It collects
every problem with its dotted path instead of stopping at the first one.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

Problems = Iterator[tuple[str, str]]
"""(field name relative to the section, what is wrong with it)."""

INT64 = range(-(2**63), 2**63)


def hint(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where a known word is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def build(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as a `kind`; where it is none, appends lines to `problems` and returns None.

    `kind` is a dataclass, bool, int, float, str, a Literal, a union, tuple[X, ...], tuple[X, Y],
    dict[str, X], or Any, which takes every value as it is. An integer must fit int64, a float must be
    finite, a string must be valid Unicode.
    A key that the dataclass does not know is a problem. A dataclass may have a method `problems`,
    which yields (field, message) for values that do not go together.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, path, problems)
    if origin is types.UnionType:
        return _build_union(args, value, path, problems)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        problems.append(f"{path}: {value!r} is none of {', '.join(map(repr, args))}{hint(str(value), args)}")
        return None
    if origin is tuple:
        return _build_tuple(args, value, path, problems)
    if origin is dict:
        return _build_dict(args[1], value, path, problems)
    return _build_scalar(kind, value, path, problems)


PLAIN = {bool: "true or false", int: "integer", float: "number", str: "string"}
"""Types in the words of the documents."""


def _build_scalar(kind: type, value: Any, path: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and value in INT64:
        return float(value)
    if type(value) is not kind:
        problems.append(f"{path}: expected {PLAIN.get(kind, kind.__name__)}, got {_name_of(value)} {_short(value)}")
        return None
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path}: must be finite, is {value}")
        return None
    if isinstance(value, int) and value not in INT64:
        problems.append(f"{path}: {_short(value)} does not fit into 64 bits")
        return None
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        problems.append(f"{path}: {value!r} is not valid Unicode")
        return None
    return value


def _build_union(kinds: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    if value is None and type(None) in kinds:
        return None
    rest = [k for k in kinds if k is not type(None)]
    exact = [k for k in rest if type(value) is k]
    return build(exact[0] if exact else rest[0], value, path, problems)


def _build_tuple(kinds: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, list):
        problems.append(f"{path}: expected a list, got {_name_of(value)} {_short(value)}")
        return None
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    elif len(value) != len(kinds):
        problems.append(f"{path}: expected {len(kinds)} values, got {_short(value)}")
        return None
    return tuple(build(k, v, f"{path}[{i}]", problems) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _build_dict(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected a section, got {_name_of(value)} {_short(value)}")
        return None
    return {k: build(kind, v, f"{path}.{k}" if path else k, problems) for k, v in value.items()}


def _build_dataclass(kind: type, value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected a section, got {_name_of(value)} {_short(value)}")
        return None
    prefix = f"{path}." if path else ""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    before = len(problems)
    for key in value:
        if key not in fields:
            problems.append(f"{prefix}{key}: unknown key{hint(key, fields)}")
    built = {k: build(hints[k], value[k], f"{prefix}{k}", problems) for k in fields if k in value}
    for name, field in fields.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in value and missing:
            problems.append(f"{prefix}{name}: missing")
    if len(problems) > before:
        return None
    section = kind(**built)
    check: Callable[[], Problems] | None = getattr(section, "problems", None)
    if check is not None:
        problems.extend(f"{prefix}{field}: {message}" for field, message in check())
    return section


def _name_of(value: Any) -> str:
    kind = type(value)
    words = {**PLAIN, bool: "boolean", dict: "section", type(None): "nothing"}
    return words.get(kind, kind.__name__)


def _short(value: Any) -> str:
    """`value` in at most 80 characters."""
    if isinstance(value, int) and value not in INT64:
        return "an integer beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
