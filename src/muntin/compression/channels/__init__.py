"""Cutting channels that gates have closed."""
