"""One accuracy budget for ranks, channels and bits together, kept by the deployed artifact."""

from muntin.budgeting.budget import Budget
from muntin.budgeting.pipeline import compress
from muntin.budgeting.result import CompressionResult

__all__ = ["Budget", "CompressionResult", "compress"]
