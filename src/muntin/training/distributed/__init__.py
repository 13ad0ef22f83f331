"""Training by several processes: their communication, the sharding of a model, and its checkpoints."""
