"""Real node processes, started as a user starts them, and what to put between or against them.

A stranger here is a plain gRPC client or server that speaks in bytes of the test's choosing. A `proxy` stands between
two nodes and breaks their TCP connections when told to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import torch
from thinpipe.compress.bit_packing import bit_width, pack_bits
from thinpipe.compress.byte_format import Direction, Key
from thinpipe.compress.registry import parse_format
from thinpipe.node.config import RunConfig
from thinpipe.node.data import vocabulary_size
from thinpipe.node.links.transport import METHOD
from thinpipe.node.model import resolve_model
from thinpipe.node.preparation import run_digest
from thinpipe.protocol.messages import (
    Chunk,
    Greeting,
    Kind,
    Limits,
    Message,
    Refusal,
    decode_frame,
    encode_frame,
    split,
)
from thinpipe.sim.launch.fork_server import Process
from thinpipe.sim.launch.node_launch import free_ports
from thinpipe.sim.links.proxy import Proxy

from .preloaded import start

DEADLINE_S = 120.0  # of a slow and busy machine; a quiet one needs a sixth
LIMITS = Limits(message_bytes=2**26)


@contextmanager
def node(run: Path, stage: int, *options: str) -> Iterator[Process]:
    """Stage `stage` of `run`/run.toml as a process; its words are in `run`/stage-N.log."""
    log = (run / f"stage-{stage}.log").open("w")
    process = start(["node", "--config", str(run / "run.toml"), "--stage", str(stage), *options], log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a file or a process to say something; the only wall clock here, and bounded."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        time.sleep(0.05)


def free_address() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


# -- what a stranger may say --------------------------------------------------------------------------------------


def hello_of(config: RunConfig, *, stage: int = 0, **other: Any) -> Greeting:
    """The greeting with which the true stage would be let in."""
    vocab = vocabulary_size(config.data, config.model.vocab_size)
    architecture = resolve_model(config.model, vocab_size=vocab, sequence_length=config.data.sequence_length)
    told = {
        "run_id": config.run.name,
        "configuration": run_digest(config, architecture),
        "stage": stage,
        "stages": config.pipeline.stages,
        "incarnation": 666,
        "next_sequence": 0,
        "granted_bytes": 2**24,
    }
    return Greeting(**{**told, **other})


def activation(config: RunConfig, *, microbatch: int = 0) -> Message:
    """A message that stage 1 has to accept as the activation of step 0, with zeros in it."""
    rows, tokens = config.microbatch_size, config.data.sequence_length
    assert config.model.width
    assert config.model.vocab_size
    ids = np.zeros(rows * (tokens + 1), dtype=np.int64)
    key = Key(seed=1, boundary=0, direction=Direction.FORWARD, step=0, microbatch=microbatch)
    payload = parse_format("bf16").pack(torch.zeros(rows, tokens, config.model.width), key)
    return Message(
        kind=Kind.ACTIVATION,
        step=0,
        microbatch=microbatch,
        codec="bf16",
        codec_header=payload.header,
        token_ids=pack_bits(ids, bit_width(config.model.vocab_size)),
        body=payload.body,
    )


def parts(message: Message, first: int = 0) -> list[bytes]:
    """The frames of a message, numbered from `first`."""
    return [
        encode_frame(Chunk(sequence=number, generation=0, head=head, data=data))
        for number, (head, data) in enumerate(split(message, 256 * 1024), start=first)
    ]


async def attempt(address: str, frames: list[bytes], compression: grpc.Compression | None = None) -> str:
    """Send frames on a new stream; returns the code of the refusal, or the gRPC status that ended it."""
    options = [("grpc.max_send_message_length", -1)]
    async with asyncio.timeout(20), grpc.aio.insecure_channel(address, options=options) as channel:
        call = channel.stream_stream(METHOD)(compression=compression)
        try:
            for frame in frames:
                await call.write(frame)
            while isinstance(raw := await call.read(), bytes):
                if isinstance(frame := decode_frame(raw, LIMITS), Refusal):
                    return frame.code
            return "closed without a word"
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return str((await call.code()).name)
        finally:
            call.cancel()


# -- between two nodes --------------------------------------------------------------------------------------------


def proxy(to: str) -> Proxy:
    """A relay on a free address, to break the connections of two nodes with."""
    return Proxy(to, port=free_ports(1)[0])
