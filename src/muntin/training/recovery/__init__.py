"""Recovery of a run from lack of memory and from instability."""
