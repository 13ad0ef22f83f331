"""Rewrites of a graph that change no product: folding, storage of weights, grids of pixels, workarounds of engines."""
