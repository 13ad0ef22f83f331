"""Weights with a pattern of zeros: N of M neighbours along the inputs, or blocks."""
