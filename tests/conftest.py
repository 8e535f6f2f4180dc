"""Being here puts tests/ on the import path, so a test can `from ranks import run_ranks`."""

import os

# Ranks of one machine share its cores; set before torch is imported, here and in every child process.
os.environ["OMP_NUM_THREADS"] = "1"
