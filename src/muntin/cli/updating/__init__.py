"""Commands about a model after its training."""
