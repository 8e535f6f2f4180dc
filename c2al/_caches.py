"""Where numba keeps compiled kernels when it can write neither beside their source nor into the home."""

import atexit
import os
import shutil
import tempfile


def numba_cache_folder(package: str) -> str | None:
    """A folder for NUMBA_CACHE_DIR, or None where numba finds one itself: beside the source, or in the user's cache.

    Without any, numba raises at import. The last resort is a folder of this process, deleted at its end,
    so kernels are then compiled once per process. A shared name under /tmp would be unsafe: numba
    unpickles what it finds there.
    """
    if _writable(package):
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache) and _writable(os.path.join(cache, "numba")):
        return None
    folder = tempfile.mkdtemp(prefix="c2al-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
