"""What a run would do and does: plans, stated machines, benchmarks, faults."""
