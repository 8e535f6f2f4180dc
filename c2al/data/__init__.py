"""Parquet impressions -> batches: streaming, seekable, the same for every world size."""
