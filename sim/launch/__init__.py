"""Processes on this machine: a local swarm, one supervised stage, namespaces for them, faults on purpose."""
