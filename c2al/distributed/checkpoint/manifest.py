"""complete.json: what a finished checkpoint holds, and the checksums of its files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c2al.errors import CheckpointError
from c2al.files import write_atomically

MARKER = "complete.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Content of complete.json."""

    step: int
    ne: float | None
    extra: dict[str, Any]
    optimizer: dict[str, Any]
    model: dict[str, list[int]]
    """Shape of every parameter and buffer."""
    files: dict[str, tuple[int, str]]
    """Name -> (bytes, SHA-256)."""

    def write(self, folder: Path) -> None:
        write_atomically(folder / MARKER, json.dumps({"format": FORMAT} | self.__dict__, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises CheckpointError when `folder` is no finished checkpoint of this format."""
        path = folder / MARKER
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree.pop("format") != FORMAT:
                raise CheckpointError(f"{path}: written in another format than {FORMAT}")
            tree["files"] = {name: (int(size), str(digest)) for name, (size, digest) in tree["files"].items()}
            return cls(**tree)
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: no finished checkpoint, {MARKER} is missing") from None
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{path}: damaged: {e!r}") from e

    def verify(self, folder: Path, rank: int = 0, size: int = 1) -> None:
        """Compares this rank's share of the files with their checksums; raises CheckpointError naming one."""
        for name, (length, digest) in sorted(self.files.items())[rank::size]:
            path = folder / name
            try:
                if path.stat().st_size != length:
                    raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes instead of {length}")
                if digest_of(path) != digest:
                    raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one {MARKER} names")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: shard file is missing") from None
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e


def digest_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
