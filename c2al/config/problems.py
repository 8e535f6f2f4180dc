"""What a section of the configuration says about its own faults."""

import difflib
from collections.abc import Iterable, Iterator

Problems = Iterator[tuple[str, str]]
"""(field name relative to the section, what is wrong with it)."""


def hint(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where a known word is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
