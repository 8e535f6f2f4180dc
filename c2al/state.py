"""State files: JSON that one job writes and another reads.

There is one strict reader. It accepts a file only if its format, its version and every field are what
the reader expects; anything else raises an error that names the file and the field. State files are
data: nothing in them is ever executed.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from c2al.errors import C2ALError, StateError
from c2al.files import write_atomically
from c2al.typed import build

T = TypeVar("T")

MOST_PROBLEMS = 5
"""Problems that one message lists."""


def write_state(path: str | os.PathLike[str], value: Any, *, format: str, version: int) -> None:
    """Writes the dataclass `value` atomically, with its format name and version in front."""
    write_atomically(path, state_text(value, format=format, version=version))


def state_text(value: Any, *, format: str, version: int) -> str:
    """What `write_state` writes. Raises ValueError for a number that is not finite."""
    tree = {"format": format, "version": version, **dataclasses.asdict(value)}
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_state(
    path: str | os.PathLike[str],
    kind: type[T],
    *,
    format: str,
    version: int,
    error: type[C2ALError] = StateError,
) -> T:
    """Reads what `write_state` wrote as a `kind`.

    Raises `error`, naming the file, when it cannot be read, is not JSON in UTF-8, is of another format
    or version, or when a field is missing, unknown or of another type.
    """
    return parse_state(_bytes(path, error), str(path), kind, format=format, version=version, error=error)


def parse_state(
    content: bytes,
    source: str | os.PathLike[str],
    kind: type[T],
    *,
    format: str,
    version: int,
    error: type[C2ALError] = StateError,
) -> T:
    """`read_state` of a file's `content`, wherever it came from; `source` names it in messages."""
    path, tree = source, parse_json(content, source, error)
    if not isinstance(tree, dict):
        raise error(f"{path}: not a {format} file: it holds no JSON object")
    found = tree.pop("format", None), tree.pop("version", None)
    if found != (format, version) or isinstance(found[1], bool):
        raise error(f"{path}: format {found[0]!r}, version {found[1]!r}; this c2al reads {format!r}, version {version}")
    problems: list[str] = []
    value = build(kind, tree, "", problems)
    if problems:
        more = f" (and {len(problems) - MOST_PROBLEMS} more)" if len(problems) > MOST_PROBLEMS else ""
        raise error(f"{path}: damaged: {'; '.join(problems[:MOST_PROBLEMS])}{more}")
    return value  # type: ignore[no-any-return]


def read_json(path: str | os.PathLike[str], error: type[C2ALError] = StateError) -> Any:
    """The JSON tree of a file. Raises `error`, naming the file, for whatever is not strict JSON in UTF-8."""
    return parse_json(_bytes(path, error), str(path), error)


def parse_json(content: bytes, source: str | os.PathLike[str], error: type[C2ALError] = StateError) -> Any:
    """`read_json` of a file's `content`; `source` names it in messages."""
    try:
        text = content.decode("utf-8")
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except UnicodeDecodeError as e:
        raise error(f"{source}: not UTF-8: byte {e.start} is {e.object[e.start]:#04x}") from e
    except RecursionError:
        raise error(f"{source}: not a state file: nested too deeply") from None
    except ValueError as e:
        raise error(f"{source}: not strict JSON: {e}") from e


def _bytes(path: str | os.PathLike[str], error: type[C2ALError]) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as e:
        raise error(f"{path}: cannot be read: {e.strerror}") from e


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [k for k, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"key {twice!r} is there twice")
    return tree
