"""Which nodes may talk to each other: keys and certificates of a run's own authority, and why a handshake failed."""
