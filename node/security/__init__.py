"""Who may talk to whom: keys and certificates of a run's own authority, and why a handshake failed."""
