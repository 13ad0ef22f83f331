"""Data for `task: restore`: photographs that are degraded here, or pairs of a degraded and a clean picture. Reading needs no torch."""
