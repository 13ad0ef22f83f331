"""A better picture."""
