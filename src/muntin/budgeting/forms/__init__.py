"""Compression options of each layer (rank and bits): their costs, sensitivity and latency, and plans made of them."""
