"""Cohort discovery: histograms of predictions per cohort, cuts, divergences with bounds, the choice.

Kernels are compiled by numba at first use and cached beside their source, or, where the installation
is read-only, in the user's cache folder (NUMBA_CACHE_DIR names another). Where that is read-only too, each
process compiles them for itself (c2al/compiled.py, c2al/_caches.py).
"""
