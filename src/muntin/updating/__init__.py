"""Models after their training: how the pictures that they see change, and what is learned from new ones."""
