"""Intervals and tests: numbers in, numbers out, by numpy and scipy alone."""
