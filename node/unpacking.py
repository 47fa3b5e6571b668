"""What a neighbour's message holds for a stage: checked against what was agreed, and unpacked by the stage's endpoint.

It runs on the codec thread, ahead of the compute, in the order in which messages came: each may bring a change of a
table. What is not expected is refused here, before the schedule looks for it.
"""

from __future__ import annotations

from ..protocol.errors import Fault, RemoteProtocolError
from ..protocol.global_norm import sum_of_squares_in
from ..protocol.messages import Kind, Message
from .boundary.endpoints import DownstreamEndpoint, UpstreamEndpoint
from .queues import Arrival
from .stage import Stage


class Unpacking:
    """Of the messages that come to `stage`, in one generation. Raises RemoteProtocolError."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._norms = stage.config.clips_by_global_norm
        self._follows: dict[object, int] = {}  # for each port, the link's `peer_changes` when its tables come from

    def from_above(self, message: Message, peer_changes: int) -> Arrival:
        port = self._stage.upstream_endpoint
        assert port is not None
        if self._norms and message.kind is Kind.GRADIENT_NORM:
            return _norm(message, peer_changes)
        if message.kind not in (Kind.ACTIVATION, Kind.EVALUATION):
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a {message.kind.name.lower()} message from upstream")
        self._forget_strangers(port, peer_changes)
        ids_BS, received = port.unpack_activation(message)
        return Arrival(message=message, peer_changes=peer_changes, ids_BS=ids_BS, received=received)

    def from_below(self, message: Message, peer_changes: int) -> Arrival:
        port = self._stage.downstream_endpoint
        assert port is not None
        if message.kind is Kind.EVALUATION_LOSS:
            return Arrival(message=message, peer_changes=peer_changes)
        if self._norms and message.kind is Kind.GRADIENT_NORM:
            return _norm(message, peer_changes)
        self._forget_strangers(port, peer_changes)
        if message.kind is Kind.PROJECTOR_GRADIENT and port.table:
            tensor = port.table.unpack_gradient(message)
            return Arrival(message=message, peer_changes=peer_changes, tensor=tensor)
        if message.kind is not Kind.GRADIENT:
            raise RemoteProtocolError(Fault.UNEXPECTED, f"a {message.kind.name.lower()} message from downstream")
        return Arrival(message=message, peer_changes=peer_changes, tensor=port.unpack_gradient(message))

    def _forget_strangers(self, port: UpstreamEndpoint | DownstreamEndpoint, peer_changes: int) -> None:
        """Another process may take a neighbour's place until something of it was used."""
        if self._follows.setdefault(port, peer_changes) != peer_changes:
            self._follows[port] = peer_changes
            port.forget()


def _norm(message: Message, peer_changes: int) -> Arrival:
    return Arrival(message=message, peer_changes=peer_changes, sum_of_squares=sum_of_squares_in(message))
