"""Scores of restored pictures."""
