"""c2al: Cohort-Contrastive Auxiliary Learning (arXiv 2510.02215) on TorchRec."""

import os

__version__ = "0.1.0"

# pyarrow decodes every row group into buffers of the same sizes. By default its allocator hands freed
# ones back to the system after 10 ms, and faulting them in again costs 5 to 20% of a scan's CPU
# (benchmarks/discovery.py; most on a busy machine). Read when pyarrow is loaded, hence here.
os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")
