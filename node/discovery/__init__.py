"""Discovery: which nodes are in the swarm, and how a node joins. hivemind's DHT in a process of its own, the
rendezvous, records, and claims.
"""
