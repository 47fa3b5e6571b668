"""Messages of a codec's exact size, made without a tensor: for a plan, and for stages whose compute is emulated.

What a byte format, a dictionary's changes and the framing take follows from the configuration alone; the content does
not matter to a link. Sizes are those of the steps after the first, which also brings whole dictionaries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compress.bit_packing import packed_bytes
from ...compress.byte_format import ByteFormat, LearnedTable
from ...compress.codec_interface import BoundaryContext
from ...compress.registry import parse_codec
from ...protocol.dictionary import Publisher
from ...protocol.dictionary_delta import DIGEST_BYTES, encode_delta, join_deltas
from ...protocol.dictionary_selection import budget
from ...protocol.global_norm import norm_message
from ...protocol.messages import Chunk, Kind, Message, encode_frame
from ...protocol.wire_size import framed_bytes
from ...sim.links.pipeline import Boundary
from ...sim.links.shaper import LinkProfile
from ..boundary.endpoints import BoundaryShape
from ..boundary.learned_tables import change_due, dictionary_of, gradient_due
from ..boundary.projector_gradient import gradient_bytes
from ..config import RunConfig
from ..links.outgoing import accounted_parts, chunk_bytes_for, framed_rows
from ..stage import DTYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TYPICAL_GRANT = 2**30


class Sizes:
    """The messages of one boundary. All boundaries of a run are alike."""

    def __init__(self, config: RunConfig, architecture: PretrainedConfig, boundary: int = 0) -> None:
        codec = parse_codec(config.codec.codec, config.codec.forward, config.codec.backward)
        context = BoundaryContext(
            seed=0, boundary=boundary, width=architecture.hidden_size, vocab_size=architecture.vocab_size
        )
        self.shape = shape = BoundaryShape.of(
            codec,
            context,
            microbatch_size=config.microbatch_size,
            sequence_length=config.lane_tokens,
            microbatches=config.pipeline.microbatches,
            seed=0,
            ids_length=config.chunk_layout.ids_length(config.chunk_layout.chunks - 1, config.ids_before),
            delay=config.pipeline.delay,
        )
        self.microbatches = config.pipeline.microbatches
        self._norms = config.clips_by_global_norm
        self.link = LinkProfile.parse(config.link.link)
        self._chunk_bytes = config.link.chunk_bytes or chunk_bytes_for(self.link)
        self._ids = bytes(packed_bytes(shape.token_ids, shape.token_id_bits))
        self._bodies = {way: bytes(way.body_bytes(shape.z_shape)) for way in (shape.forward, shape.backward)}
        self._table = shape.table
        self._books = {way: way.table(shape.wire_width) for way in (shape.forward, shape.backward)}
        known = [table for table in (self._table, *self._books.values()) if table]
        self._changes = {id(table): _change(table) for table in known}

    def activation(self, step: int, microbatch: int, kind: Kind = Kind.ACTIVATION) -> Message:
        training = kind is Kind.ACTIVATION
        known = [each for each in (self._table, self._books[self.shape.forward]) if each]
        changed = _changed(known, step, microbatch) if training else []
        return self._message(kind, step, microbatch, self.shape.forward, known, changed, token_ids=self._ids)

    def gradient(self, step: int, microbatch: int, loss_sum: float = 0.0) -> Message:
        book = self._books[self.shape.backward]
        known = [book] if book else []
        changed = _changed(known, step, microbatch)
        return self._message(Kind.GRADIENT, step, microbatch, self.shape.backward, known, changed, loss_sum=loss_sum)

    def projector_gradient_due(self, step: int) -> bool:
        return gradient_due(self._table, step)

    def projector_gradient(self, step: int) -> Message:
        table = self._table
        assert table
        return Message(
            kind=Kind.PROJECTOR_GRADIENT,
            step=step,
            microbatch=0,
            codec=table.gradient or "",
            codec_header={"shape": [table.entries, table.width]},
            body=bytes(gradient_bytes(table)),
        )

    def boundary(self) -> Boundary:
        """What crosses for one microbatch, framed; what crosses once in some steps is spread over all messages. But not
        a gradient norm: that has to be waited for."""
        step = 1000
        period = math.lcm(*(table.every for table in (self._table, *self._books.values()) if table and table.every))
        down, up = 0, 0
        for offset in range(period):
            down += self._framed(self.activation(step + offset, 0))
            down += (self.microbatches - 1) * self._framed(self.activation(step + offset, 1))
            up += self._framed(self.gradient(step + offset, 0))
            up += (self.microbatches - 1) * self._framed(self.gradient(step + offset, 1))
            if self.projector_gradient_due(step + offset):
                up += self._framed(self.projector_gradient(step + offset))
        messages = period * self.microbatches
        return Boundary(
            forward_bytes=round(down / messages),
            backward_bytes=round(up / messages),
            link=self.link,
            norm_bytes=self._framed(norm_message(step, 1.0)) if self._norms else 0,
        )

    def budget_bits(self, link_bits: float, boundary: Boundary) -> int:
        """Bits a token for what is coded, in the direction that has fewer left, where a link carries so many bits while
        a microbatch is computed: less what else crosses with it, and half a byte for a token's scale. 0 for none."""
        shape = self.shape
        framed = ((shape.forward, boundary.forward_bytes), (shape.backward, boundary.backward_bytes))
        beside = max(size - way.body_bytes(shape.z_shape) for way, size in framed)
        return max(0, math.floor((link_bits - 8 * beside) / shape.tokens - 4))

    def _framed(self, message: Message) -> int:
        return sum(accounted(message, self._chunk_bytes).values())

    def _message(
        self,
        kind: Kind,
        step: int,
        microbatch: int,
        way: ByteFormat,
        known: Sequence[LearnedTable],
        changed: Sequence[LearnedTable],
        **more: Any,
    ) -> Message:
        named = {table.name: [0, 1000, 1, 0, bytes(DIGEST_BYTES)] for table in known}
        return Message(
            kind=kind,
            step=step,
            microbatch=microbatch,
            codec=way.id,
            codec_header={"shape": list(self.shape.z_shape), **named},
            dictionary=join_deltas(self._changes[id(table)] for table in changed),
            body=self._bodies[way],
            **more,
        )


def _changed(known: Sequence[LearnedTable], step: int, microbatch: int) -> list[LearnedTable]:
    return [table for table in known if change_due(table, step, microbatch, has_started=True)]


def _change(table: LearnedTable) -> bytes:
    """A change of the table as it usually is: of the second message and later."""
    spec = dictionary_of(table, DTYPES["float32"])
    publisher, zeros = Publisher(spec, 0), np.zeros((table.entries, table.width), np.float32)
    publisher.publish(zeros, step=0, microbatch=0)
    count = budget(table.policy, table.divisor, table.entries)
    entries = None if count == table.entries else np.arange(count)
    return encode_delta(publisher.publish(zeros, step=1, microbatch=0, entries=entries))


def accounted(message: Message, chunk_bytes: int) -> Counter[str]:
    """Framed bytes by kind of a message cut into chunks, as `node.links.link` counts them on the wire."""
    total: Counter[str] = Counter()
    for sequence, (head, data, rows) in enumerate(accounted_parts(message, chunk_bytes)):
        # Numbers are varints; typical ones stand for all.
        chunk = Chunk(
            sequence=1000 + sequence,
            generation=0,
            head=head,
            data=data,
            next_sequence=1000,
            granted_bytes=TYPICAL_GRANT,
            acknowledge=True,
        )
        total.update(framed_rows(rows, framed_bytes(len(encode_frame(chunk)))))
    return total
