"""Heights and widths that a model takes: as they were given, and as they are found by calling it."""
