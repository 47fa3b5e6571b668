"""The rules of the conversation between stages, sans-IO (pure state machines): no torch, asyncio, grpc, sockets, clocks
or randomness.
"""
