"""The containers that data sets are handed round in, read without trust: one file a container."""
