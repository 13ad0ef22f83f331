"""The page of a comparison of pictures with the training pictures: what changed, and the farthest ones."""
