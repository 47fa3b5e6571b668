"""Targets for what messages carry: tensors, and changes of dictionaries.

A message is read as a stage reads it, through reassembly and the boundary's ports, of which some hold a table; a
change by a replica that is empty or has its snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from thinpipe.compress.byte_format import LearnedTable
from thinpipe.compress.registry import parse_format
from thinpipe.node.boundary.endpoints import BoundaryShape, DownstreamEndpoint, Encoded, UpstreamEndpoint
from thinpipe.node.boundary.learned_tables import TableReplica
from thinpipe.protocol.dictionary import Publisher, Replica
from thinpipe.protocol.dictionary_delta import DictionarySpec, decode_delta, encode_delta
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.global_norm import norm_message, sum_of_squares_in
from thinpipe.protocol.messages import MICROBATCH_MAX, STEP_MAX, Chunk, Kind, Message, decode_frame, encode_frame, split
from thinpipe.protocol.reassembly import Assembly

from . import mutators
from .judge import Ends, Finding, Target, check_refusal
from .wire import INPUT_BYTES_MAX, READING_BYTES

# -- tensors ----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
MICROBATCH, LENGTH, WIDTH, VOCABULARY = 2, 7, 10, 500  # 140 values: two blocks, the second one short


@dataclass(slots=True, eq=False)
class Ports:
    """Both halves of one boundary, as both ends hold them after the first step."""

    shape: BoundaryShape
    down: DownstreamEndpoint
    up: UpstreamEndpoint
    seeds: list[bytes]

    def read(self, message: Message) -> None:
        """As a stage does. Raises RemoteProtocolError."""
        shape, table = self.shape.z_shape, self.shape.table
        if message.kind is Kind.GRADIENT_NORM:
            if not 0 <= (squares := sum_of_squares_in(message)) < float("inf"):
                raise Finding(f"a sum of squares is {squares}")
            return
        if message.kind is Kind.PROJECTOR_GRADIENT:
            if self.down.table is None or table is None:
                raise RemoteProtocolError(Fault.UNEXPECTED, "no table is here")
            tensor, shape = self.down.table.unpack_gradient(message), (table.entries, table.width)
        elif message.kind in (Kind.ACTIVATION, Kind.EVALUATION):
            try:
                ids, received = self.up.unpack_activation(message)
            finally:
                self.up.forget()  # as after the first step, for the next input
            tensor = received.z_BTW
            if ids.min() < 0 or ids.max() >= VOCABULARY:
                raise Finding(f"token ids are {ids}")
        else:
            try:
                tensor = self.down.unpack_gradient(message)
            finally:
                self.down.forget()
        if tensor.shape != shape or not tensor.isfinite().all():
            raise Finding(f"a tensor of {tuple(tensor.shape)} came through: {tensor}")


def _shape(spec: str, table: LearnedTable | None, dtype: torch.dtype, width: int) -> BoundaryShape:
    return BoundaryShape(
        boundary=0,
        seed=1,
        microbatch_size=MICROBATCH,
        sequence_length=LENGTH,
        wire_width=width,
        vocab_size=VOCABULARY,
        forward=parse_format(spec),
        backward=parse_format(spec),
        table=table,
        dtype=dtype,
        microbatches=1,
    )


def _ports(
    spec: str, table: LearnedTable | None = None, dtype: torch.dtype = torch.float32, width: int = WIDTH
) -> Ports:
    draw = torch.Generator().manual_seed(7)
    down = DownstreamEndpoint(_shape(spec, table, dtype, width), dtype=dtype, device=CPU)
    up = UpstreamEndpoint(_shape(spec, table, dtype, width), dtype=dtype, device=CPU)
    z, ids = torch.randn(down.shape.z_shape, generator=draw, dtype=dtype), np.arange(MICROBATCH * (LENGTH + 1))
    said: list[Message] = []
    for step in range(2):  # with a dictionary: the snapshot, which both ends then hold, and the change that comes next
        out = Encoded(z_BTW=z)
        if table is not None and down.table is not None:
            master = torch.randn((table.entries, table.width), generator=draw, dtype=dtype)
            delta, _ = down.table.publish(master, step) or (b"", None)
            out = Encoded(z_BTW=z, coded_with=down.table.coded_with, delta=delta)
        activation = down.pack_activation(out, ids, step, 0, Kind.ACTIVATION)
        gradient = up.pack_gradient(z, step, 0, 3.5)
        if step == 0:
            up.unpack_activation(activation)
            down.unpack_gradient(gradient)
            for end in (*up.ends.values(), *down.ends.values()):
                if isinstance(end, TableReplica):
                    end._origin = end._latest[-1]
            said.append(down.pack_activation(replace(out, delta=b""), ids, 0, 1, Kind.EVALUATION))
        else:
            said += [activation, gradient, norm_message(step, 12.5)]
    if table is not None and up.table is not None:
        said.append(up.table.pack_gradient(torch.ones(table.entries, table.width, dtype=dtype), 1))
    wholes = [
        Chunk(sequence=0, generation=3, head=head, data=data)
        for message in said
        for head, data in split(message, 2**16)
    ]
    return Ports(down.shape, down, up, [encode_frame(whole) for whole in wholes])


def _table(delta: str, gradient: str) -> LearnedTable:
    return LearnedTable(name="projector", entries=9, width=5, delta=delta, gradient=gradient, every=1)


PORTS = [
    *(_ports(spec) for spec in ("fp32", "bf16", "int8", "int4", "int3", "int2")),
    _ports("fp64", dtype=torch.float64),
    _ports("int8", _table("int8", "bf16")),
    _ports("bf16", _table("int4", "int4"), torch.float64),
    _ports("rvq:groups=5,codes=5,scale=log4,delta=robin/3"),
    _ports("rvq:groups=2,codes=3,levels=1,delta=full,encoding=int8", _table("int8", "bf16")),
    *(_ports(spec) for spec in ("topk:k=3", "topk:k=10,values=int8", "mask:k=4", "columns:k=3")),
    _ports("int4:hadamard=true", width=8),
    _ports("int2:hadamard=true,centre=true", width=24),
]
TENSOR_BYTES_MAX = max(ports.shape.limits.message_bytes for ports in PORTS)


def tensors(data: bytes) -> Ends:
    """One frame with a whole message, through reassembly to the tensor; the first byte chooses the boundary."""
    ports = PORTS[data[0] % len(PORTS) if data else 0]
    try:
        frame = decode_frame(data[1:], ports.shape.limits)
        message = Assembly().add(frame) if isinstance(frame, Chunk) else None
        if message is None:
            return Ends(0, 0)
        ports.read(message)
    except RemoteProtocolError as error:
        check_refusal(error)
        return Ends(0, 1)
    return Ends(1, 0)


# -- dictionaries -----------------------------------------------------------------------------------------------------

GENERATION = 3


def _books() -> list[tuple[DictionarySpec, dict[str, Any], list[bytes]]]:
    """For each spec a replica's state, empty and after its snapshot, and changes that follow it."""
    books = []
    for encoding, dtype, entries in (
        ("int8", "float32", 300),
        ("int4", "float32", 9),
        ("bf16", "float32", 9),
        ("fp32", "float64", 9),
        ("fp64", "float64", 1),
    ):
        spec = DictionarySpec("projector", entries, 3, dtype, encoding)  # pyright: ignore
        draw = np.random.default_rng(1)
        publisher, replica = Publisher(spec, GENERATION), Replica(spec, GENERATION)
        empty = replica.state()
        tables = [draw.standard_normal((entries, 3)).astype(dtype) for _ in range(3)]
        snapshot = publisher.publish(tables[0], step=0, microbatch=0)
        some = np.arange(0, entries, 2)
        books.append((spec, empty, [encode_delta(snapshot)]))
        replica.apply(snapshot)
        held = publisher.state()
        whole = encode_delta(publisher.publish(tables[1], step=1, microbatch=0))
        publisher.load_state(held)
        part = encode_delta(publisher.publish(tables[2], step=1, microbatch=2, entries=some))
        books.append((spec, replica.state(), [whole, part]))
    return books


BOOKS = _books()


def _book(data: bytes) -> tuple[DictionarySpec, Replica]:
    spec, state, _ = BOOKS[data[0] % len(BOOKS) if data else 0]
    replica = Replica(spec, GENERATION)
    replica.load_state(state)
    return spec, replica


def deltas(data: bytes) -> Ends:
    """A change of a dictionary; the first byte chooses which one, and whether there is a snapshot already."""
    spec, replica = _book(data)
    version, digest, table = replica.version, replica.digest, replica._table
    try:
        delta = decode_delta(data[1:], spec)
        after = replica.apply(delta)
    except RemoteProtocolError as error:
        check_refusal(error)
        if replica.version != version or replica.digest != digest or replica._table is not table:
            raise Finding(f"'{error}' changed the replica") from error
        return Ends(0, 1)
    ends = (GENERATION + 1, STEP_MAX, MICROBATCH_MAX, MICROBATCH_MAX)
    if delta.previous != version or any(number >= end for number, end in zip(delta.version, ends, strict=True)):
        raise Finding(f"a change of {delta.previous} to {delta.version} was applied to {version}")
    if after.shape != (spec.entries, spec.width) or not np.isfinite(after).all() or after.flags.writeable:
        raise Finding(f"a table of {after.shape} came of it")
    fresh = Replica(spec, GENERATION)
    fresh.load_state(replica.state())  # what a checkpoint would hold of it can be read
    return Ends(1, 0)


def _mutated_delta(data: bytes, draw: Random) -> bytes:
    first = data[:1] if data and draw.random() < 0.95 else bytes([draw.randrange(256)])
    return first + mutators.delta(data[1:], draw, lambda: _book(first))


TABLE_BYTES_MAX = max(spec.entries * spec.width * np.dtype(spec.dtype).itemsize for spec, _, _ in BOOKS)

PAYLOADS = [
    Target(
        name="tensors",
        run=tensors,
        mutate=mutators.choosing(mutators.frame),
        seeds=[bytes([nth]) + raw for nth, ports in enumerate(PORTS) for raw in ports.seeds],
        # A tensor's bytes, the codes and the values made of them, eight bytes each: a few times the largest message.
        peak_bytes=READING_BYTES + 16 * TENSOR_BYTES_MAX + 2 * INPUT_BYTES_MAX,
        input_bytes_max=INPUT_BYTES_MAX,
    ),
    Target(
        name="deltas",
        run=deltas,
        mutate=_mutated_delta,
        seeds=[bytes([nth]) + raw for nth, (_, _, raws) in enumerate(BOOKS) for raw in raws],
        peak_bytes=READING_BYTES + 12 * TABLE_BYTES_MAX + 2 * INPUT_BYTES_MAX,
        input_bytes_max=INPUT_BYTES_MAX,
    ),
]
