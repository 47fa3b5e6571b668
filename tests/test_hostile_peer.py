"""A real node over real gRPC: hostile frames close their own connection, by name, and disturb nothing.

One node lives through every attempt in turn; then its true neighbour connects and the run ends in the reference's bits.
"""

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from thinpipe.node.config import RunConfig, dump_config
from thinpipe.node.transport import METHOD
from thinpipe.protocol.messages import (
    Chunk,
    Greeting,
    Head,
    Kind,
    Limits,
    Message,
    Refusal,
    decode_frame,
    encode_frame,
    split,
)
from thinpipe.sim.report import read_records
from thinpipe.sim.swarm import free_ports, node_environment

from .conftest import TinyConfig
from .in_memory import run_reference

DEADLINE_S = 60.0
Scene = tuple[RunConfig, Path]
LIMITS = Limits(message_bytes=2**26)


@contextmanager
def node(run: Path, stage: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "thinpipe.cli", "node", "--config", str(run / "run.toml"), "--stage", str(stage)]
    log = (run / f"stage-{stage}.log").open("w")
    process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=node_environment(), text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def until(condition: object, what: str) -> None:
    """Wait for a file or process to say something; the only wall clock here, and bounded."""
    assert callable(condition)
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        time.sleep(0.05)


async def attempt(address: str, frames: list[bytes]) -> str:
    """Send frames on a new stream; returns the code of the refusal, or the gRPC status that ended it."""
    options = [("grpc.max_send_message_length", -1)]
    async with asyncio.timeout(20), grpc.aio.insecure_channel(address, options=options) as channel:
        call = channel.stream_stream(METHOD)()
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


def parts(message: Message) -> list[bytes]:
    return [
        encode_frame(Chunk(sequence=number, epoch=0, head=head, data=data))
        for number, (head, data) in enumerate(split(message, 256 * 1024))
    ]


def hostilities(config: RunConfig, hello: Greeting) -> dict[str, tuple[list[bytes], str]]:
    """name -> (frames, the code that has to come back)."""
    import numpy as np
    import torch
    from thinpipe.compress.bits import bit_width, pack_bits
    from thinpipe.compress.boundary import Direction, Key, parse_format

    rows, tokens = config.microbatch_size, config.data.sequence_length
    shape, vocab = (rows, tokens, config.model.width or 0), config.model.vocab_size or 0
    ids = np.zeros(rows * (tokens + 1), dtype=np.int64)
    packed_ids = pack_bits(ids, bit_width(vocab))
    fine = parse_format("bf16").pack(
        torch.zeros(shape), Key(seed=1, boundary=0, direction=Direction.FORWARD, step=0, microbatch=0)
    )
    good = Message(
        kind=Kind.ACTIVATION,
        step=0,
        microbatch=0,
        codec="bf16",
        codec_header=fine.header,
        token_ids=packed_ids,
        body=fine.body,
    )
    nan = np.full(math.prod(shape), 0x7FC0, dtype=np.uint16).tobytes()
    greeting = encode_frame(hello)

    def greet(**other: object) -> list[bytes]:
        return [encode_frame(replace(hello, **other))]

    def bad(**other: object) -> list[bytes]:
        return [greeting, *parts(replace(good, **other))]

    flipped = bytearray(parts(good)[0])
    flipped[len(flipped) // 2] ^= 1
    late = encode_frame(Chunk(sequence=5, epoch=0, head=good.head, data=b""))
    huge = Head(kind=Kind.ACTIVATION, step=0, microbatch=0, body_bytes=2**50)
    frames: dict[str, tuple[list[bytes], str]] = {
        "random bytes": ([bytes(range(256)) * 4], "malformed-frame"),
        "an empty frame": ([b""], "malformed-frame"),
        "a truncated greeting": ([greeting[:-3]], "malformed-frame"),
        "a frame over gRPC's limit": ([greeting, bytes(2**22)], "RESOURCE_EXHAUSTED"),
        "a chunk before the greeting": ([parts(good)[0]], "unexpected-frame"),
        "two greetings": ([greeting, greeting], "unexpected-frame"),
        "silence": ([], "timeout"),
        "another run": (greet(run_id="other"), "run-id"),
        "another configuration": (greet(configuration="0" * 64), "configuration"),
        "another version": (greet(protocol_version=99), "protocol-version"),
        "another stage": (greet(stage=1), "wrong-stage"),
        "another number of stages": (greet(stages=7), "wrong-stage"),
        "another epoch": (greet(epoch=3), "wrong-epoch"),
        "a chunk out of order": ([greeting, late], "out-of-order"),
        "a flipped bit": ([greeting, bytes(flipped)], "corrupt-chunk"),
        "a message that is too large": (
            [greeting, encode_frame(Chunk(sequence=0, epoch=0, head=huge, data=b"x"))],
            "oversized",
        ),
        "an unknown codec": (bad(codec="zip9"), "bad-payload"),
        "another shape": (bad(codec_header={"shape": [1, 2, 3]}), "bad-payload"),
        "another dtype": (bad(codec="fp32"), "bad-payload"),
        "a short body": (bad(body=fine.body[:-2]), "bad-payload"),
        "values that are not numbers": (bad(body=nan), "bad-payload"),
        "a token past the vocabulary": (bad(token_ids=b"\xff" * len(packed_ids)), "bad-payload"),
        "short token ids": (bad(token_ids=packed_ids[:-1]), "bad-payload"),
        "a gradient from upstream": (bad(kind=Kind.GRADIENT, token_ids=b""), "unexpected-frame"),
    }
    return frames


@pytest.fixture(scope="module")
def scene(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    overrides = {"pipeline.stages": 2, "link.greeting_timeout_s": 2.0, "model.vocab_size": 500}
    config = tiny(overrides)
    run = tmp_path_factory.mktemp("hostile")
    (run / "run.toml").write_text(dump_config(config))
    return config, run


def test_a_node_survives_every_hostile_peer_and_then_trains(scene: Scene, tmp_path: Path) -> None:
    from thinpipe.node.data import vocabulary_size
    from thinpipe.node.host import prepare_corpus, run_digest
    from thinpipe.node.model import resolve_model

    config, run = scene
    prepare_corpus(config)
    vocab = vocabulary_size(config.data, config.model.vocab_size)
    architecture = resolve_model(config.model, vocab_size=vocab, sequence_length=config.data.sequence_length)
    hello = Greeting(
        run_id=config.run.name,
        configuration=run_digest(config, architecture),
        stage=0,
        stages=2,
        incarnation=666,
        next_sequence=0,
        granted_bytes=2**24,
    )
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with node(run, 1, "--listen", address) as victim:
        log = run / "stage-1.log"
        until(lambda: "listens on" in log.read_text() or victim.poll() is not None, "the node to listen")
        process = psutil.Process(victim.pid)
        asyncio.run(attempt(address, []))  # the first connection maps what every connection needs
        before = process.memory_info().rss
        for number, (name, (frames, code)) in enumerate(hostilities(config, hello).items()):
            frames = [
                encode_frame(replace(hello, incarnation=1000 + number)) if f == encode_frame(hello) else f
                for f in frames
            ]
            assert asyncio.run(attempt(address, frames)) == code, name
            assert victim.poll() is None, f"{name}: the node died: {log.read_text()}"
        assert process.memory_info().rss - before < 64 * 2**20

        with node(run, 0, "--next", address) as neighbour:
            until(lambda: None not in (neighbour.poll(), victim.poll()), "the run to end")
            assert (neighbour.returncode, victim.returncode) == (0, 0), log.read_text()

    reference = run_reference(config, tmp_path / "reference")
    ends = [read_records(run / f"stage-{stage}.jsonl")[-1] for stage in range(2)]
    assert [end["state_sha256"] for end in ends] == reference.state_sha256
    faults = [record["code"] for record in read_records(run / "stage-1.jsonl") if record["event"] == "fault"]
    named = {code for _, code in hostilities(config, hello).values()} - {"RESOURCE_EXHAUSTED"}
    assert named <= set(faults)  # this end has a name for it too
    assert "Traceback" not in log.read_text()


def test_a_dialler_refuses_a_node_of_another_run_and_says_both_values(scene: Scene, tmp_path: Path) -> None:
    config, run = scene
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.toml").write_text(dump_config(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with node(run, 1, "--listen", address) as listener:
        with node(other, 0, "--next", address, "--set", "optim.muon_lr=0.5") as dialler:
            until(lambda: dialler.poll() is not None, "the dialler to give up")
            assert dialler.returncode == 2
            said = (other / "stage-0.log").read_text()
            assert "configuration hash: stage 1 expects" in said
            assert "start both from the same run.toml" in said
        assert listener.poll() is None


def test_a_node_that_nobody_meets_ends_and_says_what_it_waited_for(scene: Scene, tmp_path: Path) -> None:
    config, _ = scene
    (tmp_path / "run.toml").write_text(dump_config(config))
    nowhere = f"127.0.0.1:{free_ports(1)[0]}"
    with node(tmp_path, 0, "--next", nowhere, "--set", "link.connect_timeout_s=1.5") as lonely:
        until(lambda: lonely.poll() is not None, "the node to give up")
        assert lonely.returncode == 1
        said = (tmp_path / "stage-0.log").read_text()
        assert f"no connection to {nowhere} for 1.5 s; is stage 1 running there?" in said
        assert "Traceback" not in said
    assert json.loads((tmp_path / "stage-0.jsonl").read_text().splitlines()[-1])["event"] == "fault"
