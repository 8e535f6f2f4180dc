"""Files and folders that are whole or not there, and the lock of a folder that is being written."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from c2al.errors import LockedError, OutputError

LOCK = ".lock"
"""Name of the lock file in a folder that a job writes."""


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) so that a reader sees the old file or the whole new one, never a part.

    Raises OutputError naming the path when it cannot be written.
    """
    target = Path(path)
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(content.encode("utf-8") if isinstance(content, str) else content)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def output_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError of the block (disk full, read-only, a file in the way) into OutputError naming the path."""
    try:
        yield
    except OSError as e:
        # The name in the error may be that of a temporary file beside `path`.
        raise OutputError(f"{path}: cannot be written: {e.strerror or e}") from e


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes `path` only if the block ends well; else nothing is left.

    Raises OutputError if `path` is there already (two results in one folder are never meant) or
    cannot be made.
    """
    target = Path(path)
    with output_errors(target):
        if target.exists() or target.is_symlink():
            raise OutputError(f"{target}: exists already; remove it or name another output")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        with output_errors(target):
            temporary.chmod(0o755)
            temporary.rename(target)
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        # pyarrow's writers name no file. An error that names a file elsewhere is one of reading.
        if isinstance(e, OSError) and str(e.filename or temporary).startswith(str(temporary)):
            raise OutputError(f"{target}: cannot be written: {e.strerror or e}") from e
        raise


def refuse_foreign(output: Path, own: Collection[str], job: str) -> None:
    """Raises OutputError where the folder `output` holds files that `job` does not write; hidden ones do not count."""
    with output_errors(output):
        present = {p.name for p in output.iterdir()} if output.is_dir() else set()
    foreign = sorted(name for name in present - set(own) if not name.startswith("."))
    if foreign:
        raise OutputError(f"{output}: holds '{foreign[0]}', which {job} does not write; name another --output")


@dataclasses.dataclass(frozen=True)
class Writer:
    """Who writes a folder."""

    host: str
    pid: int
    since: str
    """UTC, ISO 8601."""


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Makes this process the only writer of `folder`, which is created if need be, until the block ends.

    The operating system holds the lock and frees it when the process dies, however it dies, so a lock
    file that a dead process left behind is taken over. Readers need no lock.

    Raises LockedError naming host, pid and start time of the other writer, OutputError naming the folder
    that cannot be made.
    """
    path = Path(folder)
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"{path}: is being written by {_writer(path / LOCK)}; wait for it or name another output"
            ) from None
        except OSError as e:
            raise OutputError(
                f"{path}: its file system has no locks ({e.strerror}); name an output on another one"
            ) from e
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        text = json.dumps(dataclasses.asdict(Writer(socket.gethostname(), os.getpid(), now)))
        with output_errors(path / LOCK):
            os.ftruncate(handle, 0)
            os.pwrite(handle, text.encode(), 0)
        yield
    finally:
        os.close(handle)


def _writer(lock: Path) -> str:
    """The writer in words. Its record may be half written or foreign; then it is just another process."""
    try:
        w = Writer(**json.loads(lock.read_text(encoding="utf-8")))
        return f"process {w.pid} on {w.host} since {w.since}"
    except (OSError, ValueError, TypeError):
        return "another process"
