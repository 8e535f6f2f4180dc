"""What must be set before the libraries under us are loaded: where compiled code is kept, and how memory is."""

import atexit
import ctypes
import os
import shutil
import tempfile


def numba_cache_folder(package: str) -> str | None:
    """A folder for NUMBA_CACHE_DIR, or None where numba finds one itself: beside the source, or in the user's cache.

    The last resort is a folder of this process, deleted at its end, so kernels are then compiled once per
    process. A shared name under /tmp would be unsafe: numba unpickles what it finds there. Where not even
    that folder can be made, there is no cache (c2al.compiled).
    """
    if _writable(package):
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache) and _writable(os.path.join(cache, "numba")):
        return None
    try:
        folder = tempfile.mkdtemp(prefix="c2al-numba-")
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def inductor_cache_folder() -> str | None:
    """A folder of the user's for what torch.compile makes, or None where there is none.

    torch's own default is a name under /tmp that any user can take first, and torch unpickles what it
    finds there. A second start that finds the folder compiles nothing.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "c2al", "inductor")
    return folder if os.path.isabs(folder) and _writable(folder) else None


def keep_freed_memory() -> None:
    """Makes glibc keep the large blocks that tensors free, as the allocators of training hosts do.

    By default it hands them back to the system, and the next step faults their pages in again. Does
    nothing where another allocator is loaded, another C library is used, or the user chose (MALLOC_*, GLIBC_TUNABLES).
    """
    chosen = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_"}
    if chosen & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)


def _writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
