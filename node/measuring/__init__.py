"""Measuring runs: plans (simulations), emulated machines, benchmarks, and injected faults."""
