"""Placeholder until merged."""

TRAINED = ()
