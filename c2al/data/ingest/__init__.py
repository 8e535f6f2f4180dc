"""Published data sets -> Parquet splits by time. One module per data set."""
