"""Thin links simulated on one machine: the link model, a local swarm of processes, and what is measured on it."""
