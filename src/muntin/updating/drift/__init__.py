"""Drift: whether pictures still come from the distribution that a model was trained on. Runs without torch, except `training_pictures`."""
