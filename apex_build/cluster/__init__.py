"""More than one machine: shards and points as tasks of Dask distributed (extra `cluster`)."""
