"""Putting a message together from its chunks, in memory whose size this node chose.

The buffer is as long as the head announces, which `decode_frame` has checked against `Limits.message_bytes`; one
message is under way at a time. What a received message costs of the credit is counted here: its data, and
`MESSAGE_COST_BYTES` for the head and the objects around it. Counting by message and not by chunk makes the price
independent of how the peer cuts, so a buffer that can hold one message can always be filled with one, whatever chunk
size the other end is set to.
"""

from __future__ import annotations

from .envelope import Gathered
from .errors import Fault, RemoteProtocolError
from .header import HEADER_BYTES_MAX
from .messages import Chunk, Head, Message

# The worst head that decode_frame lets through takes about 37 KB of Python objects (tests/test_messages.py measures).
MESSAGE_COST_BYTES = 12 * HEADER_BYTES_MAX


def message_cost(data_bytes: int) -> int:
    """What one whole message takes of the receiver's buffer, in bytes of credit."""
    return data_bytes + MESSAGE_COST_BYTES


class Assembly:
    """The message that is coming in, if any."""

    def __init__(self) -> None:
        self._head: Head | None = None
        self._buffer = bytearray()
        self._filled = 0

    @property
    def under_way(self) -> bool:
        """Some of a message is here and some is not."""
        return self._head is not None

    def add(self, chunk: Chunk) -> Message | None:
        """Take the next part; the message, if that was its last one. Data are views of one buffer, not copies.

        Raises RemoteProtocolError for a part that does not fit, before anything has changed: it can be sent again,
        whole, on the next connection.
        """
        if self.under_way == (chunk.head is not None):
            what = "belongs to no message" if chunk.head is None else "starts a message within a message"
            raise RemoteProtocolError(Fault.OUT_OF_ORDER, f"chunk {chunk.sequence} {what}")
        head = chunk.head or self._head
        assert head is not None
        assert not isinstance(chunk.data, Gathered)  # what was received is in one piece
        filled = self._filled + len(chunk.data)
        if filled > head.data_bytes:
            raise RemoteProtocolError(
                Fault.MALFORMED, f"chunk {chunk.sequence} brings byte {filled} of a message of {head.data_bytes}"
            )
        if not chunk.data and head.data_bytes:
            raise RemoteProtocolError(Fault.MALFORMED, f"chunk {chunk.sequence} is empty and its message is not")
        if filled == head.data_bytes and chunk.head is not None:  # all in one: it stays where it came
            data = memoryview(chunk.data)
        else:
            if chunk.head is not None:
                self._head, self._buffer = head, bytearray(head.data_bytes)
            data = memoryview(self._buffer)
            data[self._filled : filled] = chunk.data  # into a view: a bytearray would copy what it is given first
            self._filled = filled
            if filled < head.data_bytes:
                return None
            self._head, self._buffer, self._filled = None, bytearray(), 0
        tensor = head.token_ids_bytes + head.dictionary_bytes
        return Message(
            kind=head.kind,
            step=head.step,
            microbatch=head.microbatch,
            codec=head.codec,
            codec_header=head.codec_header,
            token_ids=data[: head.token_ids_bytes],
            dictionary=data[head.token_ids_bytes : tensor],
            body=data[tensor:],
            loss_sum=head.loss_sum,
            layer=head.layer,
            segment=head.segment,
        )
