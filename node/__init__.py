"""The only place with sockets, threads, devices and disk: a process that hosts one pipeline stage."""
