"""One accuracy budget for ranks, channels and bits together, kept by the deployed artefact."""

from muntin.budgeting.budget import Budget
from muntin.budgeting.pipeline import CompressionResult, compress

__all__ = ["Budget", "CompressionResult", "compress"]
