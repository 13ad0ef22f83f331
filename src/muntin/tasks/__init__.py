"""Tasks: what a model answers. A folder each, with `answer.py` (without torch) and `learning.py` (torch)."""
