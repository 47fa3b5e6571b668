"""One stage of the floor: messages of the peer's size over a bare grpc.aio stream. Started by peer.py, one a namespace.

    python benchmarks/peer_grpc.py --config run.toml --stage 0 --out DIRECTORY [--listen HOST:PORT] [--next HOST:PORT]

What a link costs above the library that carries it is seen only beside the library alone. Here a stage sleeps as long
as `compute.emulate` says and passes on a message of hidden states, or of their gradients, in the order of the run's
schedule: each one gRPC message of zeros, written by a task and read by a task, on one stream a boundary. Nothing else
is done: no numbers, checksums, acknowledgements, credit, packing or token ids, and nothing outlives a connection.
Records are written as thinpipe's nodes write them.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from described import described
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import load_config
from thinpipe.node.measuring.emulated_machine import EmulatedMachine
from thinpipe.node.preparation import resolve_architecture
from thinpipe.node.run_records import Lap, MetricsWriter
from thinpipe.protocol.schedule import Backward, Forward, get_schedule

SERVICE, METHOD = "bare.Stage", "Link"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Boundary:
    """Messages to and from one neighbour, in order."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[bytes] = asyncio.Queue()
        self._due: asyncio.Queue[bytes] = asyncio.Queue()

    def send(self, message: bytes) -> None:
        self._due.put_nowait(message)

    async def converse(self, stream: Any) -> None:
        """Until the neighbour has ended the stream."""

        async def write() -> None:
            while True:
                await stream.write(await self._due.get())

        writing = asyncio.ensure_future(write())
        try:
            while isinstance(message := await stream.read(), bytes):
                self.came.put_nowait(message)
        finally:
            writing.cancel()


def pass_s(seconds: float) -> None:
    """As node.measuring.emulated_stage passes time: asleep, on a thread."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(left)


async def train(
    config: RunConfig, index: int, above: Boundary | None, below: Boundary | None, metrics: MetricsWriter
) -> None:
    """All steps of stage `index`."""
    assert config.compute.emulate
    architecture, pipeline = resolve_architecture(config), config.pipeline
    times = EmulatedMachine.parse(config.compute.emulate).times(config, architecture)[index]
    hidden = bytes(2 * config.microbatch_size * config.data.sequence_length * architecture.hidden_size)
    loop, compute = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    for step in range(config.run.steps):
        lap = Lap()
        for action in get_schedule(pipeline.schedule).actions(
            stage=index, stages=pipeline.stages, microbatches=pipeline.microbatches
        ):
            match action:
                case Forward():
                    source, target, seconds = above, below, times.forward_s
                case Backward():
                    source, target, seconds = below, above, times.backward_s
                case _:
                    continue
            if source:
                assert len(await source.came.get()) == len(hidden)
            await loop.run_in_executor(compute, pass_s, seconds)
            if target:
                target.send(hidden)
        tokens, seconds, cpu_s = config.tokens_per_step, lap.seconds, lap.cpu_s
        metrics.write("step", step=step, loss=None, tokens=tokens, seconds=seconds, cpu_s=cpu_s)


async def run(config: RunConfig, given: argparse.Namespace, metrics: MetricsWriter) -> None:
    above, below = Boundary() if given.listen else None, Boundary() if given.next else None
    met, parted = asyncio.Event(), asyncio.Event()

    async def serve(_: object, context: grpc.aio.ServicerContext) -> None:
        assert above
        met.set()
        await above.converse(context)
        parted.set()

    server = grpc.aio.server(options=OPTIONS)
    handlers = {METHOD: grpc.stream_stream_rpc_method_handler(serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    if above:
        server.add_insecure_port(given.listen)
        await server.start()
        await met.wait()
    if below:
        async with grpc.aio.insecure_channel(given.next, options=OPTIONS) as channel:
            await channel.channel_ready()
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
            talking = asyncio.ensure_future(below.converse(call))
            await train(config, given.stage, above, below, metrics)
            await call.done_writing()  # all of its gradients came, so its last activation was read
            await talking
    else:
        await train(config, given.stage, above, below, metrics)
    if above:
        await parted.wait()
        await server.stop(grace=1.0)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--listen")
    parser.add_argument("--next")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    metrics = MetricsWriter(given.out / f"stage-{given.stage}.jsonl")
    try:
        asyncio.run(run(load_config(given.config), given, metrics))
    finally:
        metrics.close()


if __name__ == "__main__":
    main()
