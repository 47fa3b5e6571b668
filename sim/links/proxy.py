"""A TCP relay that can be told to break what passes through it: how a swarm on one machine meets a bad network.

Bytes pass as they come; `cut` resets every connection that stands, `cut(half=True)` only towards the side that dialled,
so that the other end does not notice. While it is `down`, connections are reset as soon as they are made. Why not a
firewall rule: that needs root, and takes effect on packets, while what a node has to survive is the end of a connection
at any byte.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Self


class Proxy:
    """Relays from its own loopback address to `to` (host:port), on a thread of its own, while the block runs."""

    def __init__(self, to: str, *, port: int) -> None:
        self._to = to.rpartition(":")
        self._port = port
        self.address = f"127.0.0.1:{port}"
        self.connections = 0
        self._down = False
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        serving = asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            self._break(half=False)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def redirect(self, to: str) -> None:
        """From now on new connections go there."""
        self._to = to.rpartition(":")

    def cut(self, *, half: bool = False) -> None:
        """Reset every connection. half: only towards who dialled."""

        async def job() -> None:
            self._break(half=half)

        asyncio.run_coroutine_threadsafe(job(), self._loop).result()

    @property
    def down(self) -> bool:
        """Whether nothing passes."""
        return self._down

    @down.setter
    def down(self, down: bool) -> None:
        self._down = down
        if down:
            self.cut()

    def _break(self, *, half: bool) -> None:
        for upper, lower in self._pairs:
            upper.transport.abort()
            if not half:
                lower.transport.abort()
        if not half:
            self._pairs.clear()

    async def _serve(self, reader: asyncio.StreamReader, upper: asyncio.StreamWriter) -> None:
        if self._down:
            upper.transport.abort()
            return
        try:
            lower_reader, lower = await asyncio.open_connection(self._to[0], int(self._to[2]))
        except OSError:
            upper.transport.abort()
            return
        if self._down:  # meanwhile
            upper.transport.abort()
            lower.transport.abort()
            return
        self.connections += 1
        self._pairs.append((upper, lower))

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(2**16):
                    sink.write(data)
                    await sink.drain()
                sink.write_eof()
            except OSError:  # a reset is passed on as one
                sink.transport.abort()

        both = asyncio.gather(pass_on(reader, lower), pass_on(lower_reader, upper))
        with suppress(asyncio.CancelledError):
            await both
