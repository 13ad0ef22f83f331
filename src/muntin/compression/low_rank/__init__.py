"""Low rank: layers as products of smaller ones, and the choice of their ranks."""
