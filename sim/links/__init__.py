"""Thin links without thin links: what shapes a link, checks it, caps it in the kernel, and simulates a pipeline over it."""
