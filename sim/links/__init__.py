"""Simulated thin links: shape a link, check it, cap it in the kernel, and simulate a pipeline over it."""
