"""Measurements: benchmark, profile and its diagnosis, ceilings of the machine, and the doctor."""
