"""Published data sets -> Parquet splits by time. One module a data set."""
