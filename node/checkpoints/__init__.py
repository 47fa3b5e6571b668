"""A stage's state on disk, and copies of it on a neighbour."""
