"""See `documents`: the name that endings.py and flops.py import."""

from documents import crossed as crossed
