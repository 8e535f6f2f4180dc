"""One TOML file -> strict validation -> frozen dataclasses, and back.

``load_config`` reports every problem at once, each with its dotted path. Nothing is read from
the environment, nothing is mutated after loading, and ``dump_config`` writes text that parses back
equal. A saved file holds no secrets: ``save_config`` writes ``redacted_config``, which is what
a resumed job compares.
"""

import dataclasses
import os
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from c2al.config.presets import expand, with_presets
from c2al.config.schema import Config
from c2al.errors import ConfigError
from c2al.files import write_atomically
from c2al.text import redacted
from c2al.typed import build

T = typing.TypeVar("T")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads and validates one TOML file.

    `overrides` are the words after the known flags: ``--train.batch_size 512`` or
    ``--train.batch_size=512``; a value is TOML, or a bare string.

    Raises ConfigError with every problem, each with file and dotted path.
    """
    try:
        # utf-8-sig: some editors begin a file with a byte order mark.
        tree = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as e:
        raise ConfigError(f"{path}: not a readable TOML file: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # not TOML, not UTF-8, an integer of 5,000 digits, a thousand brackets
        raise ConfigError(f"{path}: not a readable TOML file: {e}") from e
    return parse_config(tree, overrides, source=str(path))


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Validates a parsed TOML tree; `source` names it in messages. Raises ConfigError."""
    return parse_sections(Config, tree, overrides, source)


def parse_sections(kind: type[T], tree: dict[str, Any], overrides: Sequence[str], source: str) -> T:
    """`parse_config` for a job that needs only some sections: `kind` is a dataclass of these."""
    problems: list[str] = []
    given: list[str] = []
    for path, value in with_presets(_parse_overrides(overrides, problems)):
        given.append(path)
        _apply(tree, path, value, problems)
    expand(tree)
    sections = build(kind, tree, "", problems)
    if problems:
        raise ConfigError([_blamed(p, given, source) for p in problems])
    return typing.cast(T, sections)


def _blamed(problem: str, given: Sequence[str], source: str) -> str:
    """`problem` with where it comes from: the file, or the command line for a path in `given`."""
    if problem.startswith("command line: "):
        return problem
    ours = any(problem.startswith((f"{p}:", f"{p}.", f"{p}[")) for p in given)
    return f"command line (over {source}): {problem}" if ours and source != "command line" else f"{source}: {problem}"


def dump_config(config: Any) -> str:
    """TOML text of a config dataclass that parses back equal to it."""
    lines: list[str] = []
    _dump(config, "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes the resolved config atomically, without the secrets in its URIs. Raises OutputError."""
    write_atomically(path, dump_config(redacted_config(config)))


def redacted_config(config: Config) -> Config:
    """`config` without the secrets in its URIs: what `save_config` writes, and therefore what a saved one equals.

    load_config(run / "config.toml") == redacted_config(config)
    """
    return typing.cast(Config, _redacted(config))


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, tuple):
        return tuple(_redacted(v) for v in value)
    if isinstance(value, dict):
        return {k: _redacted(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _redacted(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def replace(config: Config, **changes: Any) -> Config:
    """A copy with dotted fields changed, e.g. ``replace(c, **{"train.auxiliary_lambda": 0.1})``. Validated again."""
    tree = tomllib.loads(dump_config(config))
    problems: list[str] = []
    for path, value in with_presets(changes.items()):
        _apply(tree, path, list(value) if isinstance(value, tuple) else value, problems)
    if problems:
        raise ConfigError(problems)
    return parse_config(tree)


def _parse_overrides(words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    rest, seen = list(words), set[str]()
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            problems.append(f"command line: '{word}' is not an override; write --section.key value")
            continue
        path, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                problems.append(f"command line: --{path} has no value")
                return
            text = rest.pop(0)
        if path in seen:
            problems.append(f"command line: --{path} is given twice")
        seen.add(path)
        yield path, _override_value(text)


def _override_value(text: str) -> Any:
    """`text` as a TOML value, or as it is where it is none. "1\nx = 2" is no value but two lines."""
    try:
        tree = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return tree["v"] if len(tree) == 1 else text


def _apply(tree: dict[str, Any], path: str, value: Any, problems: list[str]) -> None:
    *parents, last = path.split(".")
    node = tree
    for i, part in enumerate(parents):
        child = node.setdefault(part, {})
        if isinstance(child, list):
            whole = ".".join(parents[: i + 1])
            problems.append(f"{path}: '{whole}' is a list, which an override replaces as a whole: --{whole}='[...]'")
            return
        if not isinstance(child, dict):
            problems.append(f"{path}: '{part}' is not a section that an override can enter")
            return
        node = child
    node[last] = value


def _dump(section: Any, path: str, lines: list[str]) -> None:
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    nested = {k: v for k, v in values.items() if dataclasses.is_dataclass(v) or _is_table_array(v)}
    for name, value in values.items():
        if name not in nested and value is not None:
            lines.append(f"{name} = {to_toml(value)}")
    for name, value in nested.items():
        full = f"{path}.{name}" if path else name
        for item in value if isinstance(value, tuple) else (value,):
            lines.append(f"\n[[{full}]]" if isinstance(value, tuple) else f"\n[{full}]")
            _dump(item, full, lines)


def _is_table_array(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])


def to_toml(value: Any) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        escaped = "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped)
        return f'"{escaped}"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(to_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(str(k))} = {to_toml(v)}" for k, v in value.items()) + "}"
    return repr(value)
