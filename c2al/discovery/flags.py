"""Axes written as words of the command line, for scores that no configuration describes.

surface                           a column of integers, strings or bools
age:edges=25,35                   a number, cut at 25 and 35
age:percentiles=0,50,100          a number, cut at its median
surface*age                       the combinations of two or three axes, by their names
young=age:edges=25                any of these with a name of its own

An axis is named after its column. Where several axes read one column, each is named COLUMN_KIND, such as
age_edges.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from c2al.config import Axis
from c2al.errors import ConfigError
from c2al.typed import build, hint


@dataclasses.dataclass(frozen=True)
class _Word:
    """One --axis, taken apart."""

    word: str
    name: str
    column: str
    kind: str
    values: tuple[Any, ...]

    def fail(self, why: str) -> ConfigError:
        return ConfigError(f"--axis '{self.word}': {why}")


def axes_of_words(words: Sequence[str]) -> tuple[Axis, ...]:
    """The axes of the words after --axis. Raises ConfigError naming the word and what is wrong with it."""
    parsed = [_parse(word) for word in words]
    columns = [p.column for p in parsed if not p.name and p.kind != "cross"]
    named = []
    for p in parsed:
        own = p.name or (p.column if columns.count(p.column) < 2 else f"{p.column}_{p.kind}")
        named.append(dataclasses.replace(p, name=own))
    names = [p.name for p in named]
    plain = [p.name for p in named if p.kind != "cross"]
    for p in named:
        if names.count(p.name) > 1:
            raise p.fail(f"two axes are named '{p.name}'; write 'NAME={p.word}'")
        for part in p.values if p.kind == "cross" else ():
            if part not in plain:
                raise p.fail(f"no --axis is named '{part}'{hint(part, plain)}")
    return tuple(_axis(p) for p in named)


def _parse(word: str) -> _Word:
    head, colon, cut = word.partition(":")
    name, equals, column = head.partition("=")
    if not equals:
        name, column = "", head
    if (equals and not name) or not column:
        raise ConfigError(f"--axis '{word}': names no column")
    if not colon:
        if "*" in column:
            return _Word(word, name or column, column, "cross", tuple(column.split("*")))
        return _Word(word, name, column, "categorical", ())
    kind, equals, values = cut.partition("=")
    if kind not in ("edges", "percentiles") or not equals:
        raise ConfigError(f"--axis '{word}': after ':' comes edges=... or percentiles=..., not '{cut}'")
    try:
        return _Word(word, name, column, kind, tuple(float(v) for v in values.split(",")))
    except ValueError:
        raise ConfigError(f"--axis '{word}': '{values}' is not a list of numbers") from None


def _axis(p: _Word) -> Axis:
    tree: dict[str, Any] = {"name": p.name, "kind": p.kind}
    if p.kind != "cross":
        tree["column"] = p.column
    if p.values:
        tree[p.kind] = list(p.values)
    problems: list[str] = []
    axis: Axis = build(Axis, tree, "", problems)
    if problems:
        raise p.fail("; ".join(problems))
    return axis
