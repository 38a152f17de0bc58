"""Measurements with a number to reach, one module each: `python -m benchmarks.NAME`."""
