"""The servers that `benchmarks/serving.py` compares, which all hold the same artefact, and the load generator."""
