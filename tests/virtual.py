"""Time, threads, processes and gRPC that a whole swarm can have inside one thread of one process.

`JumpingClock` is an event loop whose time stands still while anybody works and jumps to the next timer when nobody
does; jobs that a node gives to its threads run in the loop, in the same order, and take times drawn from a seed. So a
story depends on its seed alone. `Process` is what can be stopped and killed: everything that a node does runs in its
process's context, and a stopped process's callbacks and timers are put off until it goes on, as SIGSTOP does. `Network`
answers for `grpc.aio`: channels and servers with the same calls, whose streams are pairs of queues.

Why not threads as they are: where a loss falls would depend on the machine's mood, and half of a story's time went into
waking them. Real threads, sockets and signals are the other tier's (`tests/test_recovery.py`).
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import random
import selectors
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from thinpipe.node import long_preparation, recovery_loop
from thinpipe.node.checkpoints import restore_points
from thinpipe.node.links.transport import CONTROL_METHOD
from thinpipe.node.worker_thread import Worker
from thinpipe.protocol.messages import Head

JOB_S = 0.01  # of a thread, on average
WRITE_S = 0.03  # of a checkpoint

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("PROCESS", default=None)


@dataclass(eq=False, slots=True, kw_only=True)
class Process:
    """One life of a stage. What it says goes to `records`, even when it is dead: whoever reads has to look at that."""

    stage: int
    number: int
    context: contextvars.Context = field(init=False)
    task: asyncio.Task[None] | None = None
    recovery_loop: recovery_loop.RecoveryLoop | None = None
    drain: Callable[[], bool] = lambda: False
    stopped: bool = False
    dead: bool = False
    streams: dict[Stream, None] = field(default_factory=dict)
    restored: asyncio.Event = field(default_factory=asyncio.Event)  # it took part in a new generation
    _put_off: deque[asyncio.Handle] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)

    def put_off(self, handle: asyncio.Handle) -> None:
        self._put_off.append(handle)

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """SIGCONT: all that came meanwhile, and all timers that ran out, in their order."""
        self.stopped = False
        while self._put_off:
            handle = self._put_off.popleft()
            if not handle.cancelled():
                loop.call_soon(handle._run, context=contextvars.Context())

    def die(self, loop: asyncio.AbstractEventLoop) -> None:
        """SIGKILL: nothing that it still does reaches anybody or anything."""
        self.dead = True
        for stream in list(self.streams):
            stream.break_off()
        self.go_on(loop)
        if self.task:
            self.task.cancel()


class JumpingClock(asyncio.SelectorEventLoop):
    """See the module. seed: of how long jobs take. hurry: they take no time at all."""

    def __init__(self, seed: int = 0, *, hurry: bool = False) -> None:
        self._now = 0.0
        self._hurry = hurry
        self._chance = random.Random(seed)
        self._queues: weakref.WeakKeyDictionary[Worker, asyncio.Lock] = weakref.WeakKeyDictionary()
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds

    async def work(self, mean_s: float = JOB_S) -> None:
        """As long as a job takes."""
        await asyncio.sleep(0 if self._hurry else min(5 * mean_s, self._chance.expovariate(1 / mean_s)))

    # -- processes ----------------------------------------------------------------------------------------------

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        owner = PROCESS.get() if context is None else context.get(PROCESS)
        if owner is None or not owner.stopped:
            return super().call_soon(callback, *args, context=context)
        handle = asyncio.Handle(callback, args, self, context or contextvars.copy_context())
        owner.put_off(handle)
        return handle

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        context = context or contextvars.copy_context()
        owner = context.get(PROCESS)
        if owner is None:
            return super().call_at(when, callback, *args, context=context)

        def ring() -> None:
            if owner.stopped:
                owner.put_off(timer)
            else:
                callback(*args)

        timer = super().call_at(when, ring, context=context)
        return timer

    # -- threads ------------------------------------------------------------------------------------------------

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # noqa: ARG002 (asyncio's)
        return self.create_task(self._job(func, args))

    async def _job(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        result = func(*args)
        if inspect.isawaitable(result):  # of what waits for another thread (`LateWriter`)
            return await result
        await self.work()
        return result

    async def queued_job(self, worker: Worker, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The next job of that worker's thread. It is done at once, as a thread is not stopped by who waits for it;
        that it is done is known later."""
        async with self._queues.setdefault(worker, asyncio.Lock()):
            result = work(*args)
            await self.work()
            return result


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: JumpingClock) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nobody has anything to do any more, and the story is not over")
        self._loop.jump(max(0.0, timeout))
        return []


class LateWriter(restore_points.CheckpointWriter):
    """Writes as its parent does, one snapshot at a time and some time after it was given, but in the loop."""

    _writing: asyncio.Task[None] | None = None

    def submit(self, snapshot: Any, **told: Any) -> Any:
        return self._submit(snapshot, told)

    def flush(self, timeout_s: float) -> Any:
        return self._flush(timeout_s)

    def close(self) -> Any:
        return self._close()

    async def _submit(self, snapshot: Any, told: dict[str, Any]) -> float:
        await self._flush(None)
        self._writing = asyncio.create_task(self._later(snapshot, told))
        return 0.0

    async def _later(self, snapshot: Any, told: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingClock)
        await loop.work(WRITE_S)
        self._write(snapshot, **told)

    async def _flush(self, timeout_s: float | None) -> bool:
        while self._writing and not self._writing.done():
            done, _ = await asyncio.wait([self._writing], timeout=timeout_s)
            if not done:
                return False
        return True

    async def _close(self) -> None:
        await self._flush(None)
        super().close()


def without_threads(patch: pytest.MonkeyPatch) -> list[Worker]:
    """The nodes' own threads do their jobs in a JumpingClock. Returns those threads, as they come: what was killed
    twice over does not end its own, and an interpreter that ends waits for them."""

    async def run(self: Worker, name: str, work: Callable[..., Any], *args: Any) -> Any:  # noqa: ARG001
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingClock)
        return await loop.queued_job(self, work, args)

    workers: list[Worker] = []
    begin = Worker.__init__

    def remembered(self: Worker, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        workers.append(self)

    async def in_loop(work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, work)

    patch.setattr(long_preparation, "in_daemon", in_loop)
    patch.setattr(Worker, "__init__", remembered)
    patch.setattr(Worker, "run", run)
    patch.setattr(restore_points, "CheckpointWriter", LateWriter)
    return workers


# -- gRPC ---------------------------------------------------------------------------------------------------------


Carry = Callable[["Stream", bytes, bool], Awaitable[bytes]]


def reset(why: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details=why)


class Stream:
    """One call: frames both ways until either end ends it, or it breaks. `carry` takes each on its way."""

    def __init__(self, upper: Process, lower: Process, *, control: bool, carry: Carry) -> None:
        self.upper, self.lower, self.control = upper, lower, control
        self.boundary = upper.stage
        self.carry = carry
        self.down: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.broken_above = self.broken_below = False
        self.status: grpc.StatusCode | None = None
        self.ended = asyncio.Event()
        self.server: asyncio.Task[None] | None = None
        self.part: tuple[Head, int] | None = None  # the head of the message that goes down, and how much of it went
        upper.streams[self] = lower.streams[self] = None

    def break_off(self, *, half: bool = False) -> None:
        """What is under way is lost. half: only the upper end notices."""
        self.broken_above = True
        _empty(self.up).put_nowait(None)
        self.end(grpc.StatusCode.UNAVAILABLE)
        if not half:
            self.broken_below = True
            _empty(self.down)
            if self.server:
                self.server.cancel()

    def end(self, status: grpc.StatusCode) -> None:
        if self.status is None:
            self.status = status
            self.ended.set()

    def forget(self) -> None:
        for process in (self.upper, self.lower):
            process.streams.pop(self, None)


def _empty(queue: asyncio.Queue[bytes | None]) -> asyncio.Queue[bytes | None]:
    while not queue.empty():
        queue.get_nowait()
    return queue


class _Call:
    """The upper end, as `grpc.aio.StreamStreamCall`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def read(self) -> Any:
        stream = self._stream
        frame = await stream.up.get()
        if frame is None:
            stream.up.put_nowait(None)  # whoever reads once more finds the same
            if stream.broken_above:
                raise reset("the connection broke")
            return grpc.aio.EOF
        return frame

    async def write(self, frame: bytes) -> None:
        stream = self._stream
        frame = await stream.carry(stream, frame, True)
        if stream.broken_above or stream.ended.is_set():
            raise reset("the connection broke")
        if not stream.broken_below:
            stream.down.put_nowait(frame)

    async def done_writing(self) -> None:
        self._stream.down.put_nowait(None)

    async def code(self) -> grpc.StatusCode:
        await self._stream.ended.wait()
        assert self._stream.status
        return self._stream.status

    def cancel(self) -> bool:
        if not self._stream.ended.is_set():
            self._stream.break_off()
        self._stream.forget()
        return True


class _Context:
    """The lower end, as `grpc.aio.ServicerContext`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def peer(self) -> str:
        return f"process {self._stream.upper.number} of stage {self._stream.upper.stage}"

    async def read(self) -> Any:
        frame = await self._stream.down.get()
        if frame is None:
            self._stream.down.put_nowait(None)
            return grpc.aio.EOF
        return frame

    async def write(self, frame: bytes) -> None:
        stream = self._stream
        frame = await stream.carry(stream, frame, False)
        if stream.broken_below:
            raise ConnectionResetError("the connection broke")
        if not stream.broken_above:  # else: nobody tells that it goes nowhere
            stream.up.put_nowait(frame)


class _Server:
    """As `grpc.aio.Server`."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._generic: Any = None
        self.process = PROCESS.get()
        self.calls: set[asyncio.Task[None]] = set()

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        (self._generic,) = handlers

    def add_insecure_port(self, address: str) -> int:
        self._address = address
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        self._network.servers[self._address] = self
        self._network.notify()

    async def stop(self, grace: float | None) -> None:
        if self._network.servers.get(self._address) is self:
            del self._network.servers[self._address]
        if self.calls:
            await asyncio.wait(self.calls, timeout=grace)
        for call in self.calls:
            call.cancel()

    def serve(self, method: str, stream: Stream) -> None:
        """Answer a call, in this server's process."""
        handler = self._generic.service(SimpleNamespace(method=method, invocation_metadata=())).stream_stream
        job = self._serve(handler, stream)
        assert self.process
        stream.server = asyncio.get_running_loop().create_task(job, context=self.process.context.copy())
        self.calls.add(stream.server)
        stream.server.add_done_callback(self.calls.discard)

    async def _serve(self, handler: Any, stream: Stream) -> None:
        status = grpc.StatusCode.CANCELLED
        try:
            await handler(None, _Context(stream))
            status = grpc.StatusCode.OK
        except ConnectionError:
            status = grpc.StatusCode.UNKNOWN
        except Exception as error:
            self._network.bugs.append(error)
            status = grpc.StatusCode.UNKNOWN
        finally:
            if status is not grpc.StatusCode.OK:
                stream.broken_above = True
            stream.end(status)
            stream.up.put_nowait(None)


class _Channel:
    """As `grpc.aio.Channel`."""

    def __init__(self, network: Network, address: str) -> None:
        self._network, self._address = network, address

    async def __aenter__(self) -> _Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        del try_to_connect
        return grpc.ChannelConnectivity.IDLE if self._server is None else grpc.ChannelConnectivity.READY

    async def wait_for_state_change(self, state: grpc.ChannelConnectivity) -> None:
        while self.get_state() is state:
            await self._network.changed.wait()

    @property
    def _server(self) -> _Server | None:
        server = self._network.servers.get(self._address)
        alive = server is not None and server.process and not (server.process.stopped or server.process.dead)
        return server if alive else None

    def stream_stream(self, method: str) -> Callable[[], _Call]:
        def call() -> _Call:
            upper, server = PROCESS.get(), self._server
            assert upper
            if server is None or server.process is None:
                raise reset("nobody listens any more")
            stream = Stream(upper, server.process, control=method == CONTROL_METHOD, carry=self._network.carry)
            self._network.streams.append(stream)
            self._network.called(stream)
            server.serve(method, stream)
            return _Call(stream)

        return call


class Network:
    """All addresses and streams; stands for `grpc.aio`. Who listens last at an address has it, as behind a relay that
    was pointed to a replacement. `called` is called with each new stream."""

    def __init__(self, carry: Carry, called: Callable[[Stream], None]) -> None:
        self.carry, self.called = carry, called
        self.servers: dict[str, _Server] = {}
        self.streams: list[Stream] = []  # all that there were: what still reads one must not be collected
        self.bugs: list[Exception] = []  # that reached gRPC
        self.changed = asyncio.Event()

    def notify(self) -> None:
        """Who listens, and who can, has changed."""
        self.changed.set()
        self.changed = asyncio.Event()

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """For what the nodes use of grpc.aio."""
        patch.setattr(grpc.aio, "insecure_channel", lambda address, **_: _Channel(self, address))
        patch.setattr(grpc.aio, "server", lambda **_: _Server(self))
