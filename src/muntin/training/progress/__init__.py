"""Output of a run while it goes on: its curve, its progress, the answer to Ctrl-C."""
