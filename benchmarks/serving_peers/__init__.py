"""What `benchmarks/serving.py` compares: other servers that hold the same artefact, and the load that is put on all of them."""
