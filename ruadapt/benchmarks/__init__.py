"""Measurements with a number to reach, one module each: `python -m ruadapt.benchmarks.NAME`."""
