"""What `benchmarks/peers.py` compares: segmenters of another library beside muntin's, trained by one loop, each deployed its own way."""
