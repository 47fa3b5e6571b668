"""The process that hosts one pipeline stage. Only here are sockets, threads, devices and disk."""
