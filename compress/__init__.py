"""Tensor <-> bytes: what crosses a pipeline boundary and in how many bits. Knows nothing of protocol or node."""
