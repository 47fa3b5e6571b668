"""Processes on this machine: a local swarm, one supervised stage, network namespaces for them, and injected faults."""
