"""Pruning: channels, closed gates and heads of attention that leave a model."""
