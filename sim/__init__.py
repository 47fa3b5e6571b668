"""Thin links without thin links: the link model, a local swarm of processes, and what is measured on it."""
