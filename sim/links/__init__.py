"""Thin links without thin links: shape a link, check it, cap it in the kernel, simulate a pipeline over it."""
