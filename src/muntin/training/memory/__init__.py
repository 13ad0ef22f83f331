"""Memory of training: tensor layouts, and what is recomputed instead of kept."""
