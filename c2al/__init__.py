"""c2al: Cohort-Contrastive Auxiliary Learning (arXiv 2510.02215) on TorchRec."""

import os

from c2al._caches import inductor_cache_folder, keep_freed_memory, numba_cache_folder

__version__ = "0.1.0"

# pyarrow decodes every row group into buffers of the same sizes. By default its allocator hands freed
# ones back to the system after 10 ms, and faulting them in again costs 5 to 20% of a scan's CPU
# (benchmarks/discovery.py; most on a busy machine). Read when pyarrow is loaded, hence here.
os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")

keep_freed_memory()

# Read when numba is loaded, hence here as well.
if "NUMBA_CACHE_DIR" not in os.environ and (_folder := numba_cache_folder(os.path.dirname(__file__))):
    os.environ["NUMBA_CACHE_DIR"] = _folder

# Read when torch.compile is first used.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (_folder := inductor_cache_folder()):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _folder
