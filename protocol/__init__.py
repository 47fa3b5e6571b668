"""The rules of the conversation between stages, sans-IO: no torch, asyncio, grpc, sockets, clocks or randomness."""
