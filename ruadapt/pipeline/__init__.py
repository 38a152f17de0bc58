"""Stages, runs and their units of work: `ruadapt run`."""
