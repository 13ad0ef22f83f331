"""Models of other packages and of the user, opened for an export: `open_model`."""
