"""The segmenters that `benchmarks/peers.py` compares: muntin's and another library's, trained by one loop, each deployed in its own way."""
