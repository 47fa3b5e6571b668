"""Who is in the swarm, and how one gets in: hivemind's DHT in a process of its own, rendezvous addresses, records,
claims."""
