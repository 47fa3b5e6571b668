"""Which parts of keys and values cross between this node and its own stage in another lane: all of it is known from the
configuration, so whatever else comes is refused by name before it is kept.

Both ends do the actions of one schedule, and within an action the layers in order (forward from the first, backward
from the last). So what a peer sends next is known up to the order of segments within one layer, and a few parts of
memory are enough, however far the peer is ahead: its credit holds it back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.messages import OF_CONTEXT, Kind, Message
from .chunk_layout import ChunkLayout
from .exchange import ContextKey, What
from .subspace_choice import CHOOSES, choice_key

_WHAT: dict[Kind, What] = {Kind.CONTEXT_GRAM: "gram", Kind.CONTEXT_SUBSPACE: "subspace"}
LAYERS_AHEAD = 2  # in zigzag order no peer can be further ahead: it needs something of this node in each layer


def kind_of(key: ContextKey) -> Kind:
    if key.what != "segment":
        return Kind.CONTEXT_GRAM if key.what == "gram" else Kind.CONTEXT_SUBSPACE
    if key.gradient:
        return Kind.CONTEXT_GRADIENT
    return Kind.CONTEXT_EVALUATION if key.evaluation else Kind.CONTEXT


def message_of(key: ContextKey, body: bytes) -> Message:
    return Message(
        kind=kind_of(key),
        step=key.step,
        microbatch=key.microbatch,
        layer=key.layer,
        segment=key.segment,
        body=body,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParts:
    """Of the stage that has these `layers` (numbered in the whole model), in lane `lane`. microbatches: of a step and
    of an evaluation. body_bytes: of a packed part, the same at both ends. gathering_step: behind which lanes choose
    subspaces (node/context/subspace_choice.py); None: never. in_flight: microbatches that are computed in turns."""

    layout: ChunkLayout
    lane: int
    layers: Sequence[int]
    microbatches: int
    evaluation_microbatches: int
    body_bytes: Callable[[ContextKey], int]
    gathering_step: int | None = None
    in_flight: int = 1

    def given(self, peer: int) -> tuple[int, ...]:
        """This node's segments that lane `peer` looks at, and so returns gradients for."""
        return tuple(segment for segment in self.layout.of_lane(self.lane) if self.lane_needs(peer, segment))

    def taken(self, peer: int) -> tuple[int, ...]:
        """The segments of lane `peer` that this node looks at."""
        return tuple(segment for segment in self.layout.of_lane(peer) if self.lane_needs(self.lane, segment))

    def lane_needs(self, lane: int, segment: int) -> bool:
        return segment in self.layout.needed_by(lane)

    def held_most(self, peer: int) -> int:
        """Parts of that lane that are kept until they are wanted: of each microbatch in flight."""
        return self.in_flight * LAYERS_AHEAD * max(len(self.taken(peer)), len(self.given(peer)))

    def largest_bytes(self, peer: int) -> int:
        """Of one body that this node sends to that lane, or takes of it."""
        return max([bytes_ for _, bytes_ in self._of_layer(peer)] + self._of_choice(peer, self.layers[0]))

    def step_bytes(self, peer: int) -> tuple[int, int]:
        """(messages, bytes) of one step that cross to that lane or from it, where more do."""
        sent = [bytes_ for gives, bytes_ in self._of_layer(peer) if gives]
        came = [bytes_ for gives, bytes_ in self._of_layer(peer) if not gives]
        times = self.microbatches * len(self.layers)
        chosen = [size for layer in self.layers for size in self._of_choice(peer, layer)]
        return times * max(len(sent), len(came)) + len(chosen), times * max(sum(sent), sum(came)) + sum(chosen)

    def _of_layer(self, peer: int) -> list[tuple[bool, int]]:
        """Of each part of a layer and microbatch of training: whether this node sends it, and its length."""
        found: list[tuple[bool, int]] = []
        for segments, mine in ((self.given(peer), True), (self.taken(peer), False)):
            for segment in segments:
                key = ContextKey(
                    step=0, evaluation=False, microbatch=0, layer=self.layers[0], segment=segment, gradient=False
                )
                back = ContextKey(
                    step=0, evaluation=False, microbatch=0, layer=self.layers[0], segment=segment, gradient=True
                )
                found += [(mine, self.body_bytes(key)), (not mine, self.body_bytes(back))]
        return found

    def _of_choice(self, peer: int, layer: int) -> list[int]:
        """Lengths of what crosses to that lane and from it for the subspaces of a layer."""
        if self.gathering_step is None or CHOOSES not in (self.lane, peer):
            return []
        kinds: tuple[What, What] = ("gram", "subspace")
        return [self.body_bytes(choice_key(self.gathering_step, layer, what)) for what in kinds]

    def key_of(self, message: Message, peer: int) -> ContextKey:
        """Which part a message from that lane is. Raises RemoteProtocolError for one that no stage sends here."""
        name = message.kind.name.lower()
        if message.kind not in OF_CONTEXT:
            raise RemoteProtocolError(Fault.PAYLOAD, f"a message of kind {name} where keys and values are due")
        key = ContextKey(
            step=message.step,
            evaluation=message.kind is Kind.CONTEXT_EVALUATION,
            microbatch=message.microbatch,
            layer=message.layer,
            segment=message.segment,
            gradient=message.kind is Kind.CONTEXT_GRADIENT,
            what=_WHAT.get(message.kind, "segment"),
        )
        count = self.evaluation_microbatches if key.evaluation else self.microbatches
        segments, due = self.given(peer) if key.gradient else self.taken(peer), 0
        if key.what != "segment":
            segments, count = (0,), 1
        if key.layer not in self.layers:
            wrong = f"this stage has layers {self.layers[0]} to {self.layers[-1]}"
        elif key.what != "segment" and not self._chooses(key, peer):
            wrong = f"lane {peer} has no part of that kind in a choice of subspaces behind this step"
        elif key.segment not in segments:
            wrong = f"of lane {peer} segments {', '.join(map(str, segments)) or 'none'} are due"
        elif key.microbatch >= count:
            wrong = f"there are {count} microbatches"
        elif len(message.token_ids) or len(message.dictionary) or message.codec or message.codec_header:
            wrong = "it brings more than a body"
        elif message.loss_sum:
            wrong = "it brings a loss"
        elif len(message.body) != (due := self.body_bytes(key)):
            wrong = f"it has {len(message.body)} bytes, and {due} are due"
        else:
            return key
        raise RemoteProtocolError(Fault.PAYLOAD, f"{key}: {wrong}")

    def _chooses(self, key: ContextKey, peer: int) -> bool:
        """Whether that lane sends such a thing here behind that step."""
        there = self.lane if key.what == "gram" else peer
        return key.step == self.gathering_step and there == CHOOSES
