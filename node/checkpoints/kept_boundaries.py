"""Which boundaries of one cut of a model are in another cut too, and so where what was learned there goes on.

A boundary is where it is in the model: after so many layers. What its two ends learned fits the hidden states there,
and no others. What a stage knows of tokens (`Codec.tokens`) is subtracted at its lower boundary and added at its upper
one, so it goes where its lower boundary goes, and else where its upper one does. A stage that gets its two boundaries
from different stages has to choose, since it has one such module: the lower boundary wins, because what a sender
subtracts decides what crosses at all.

Why not give new boundaries the projector of the nearest one: what a projector keeps of other hidden states is chance,
and the next steps would first have to undo it. Where the run itself began from another one (`node.codec_start`) that
had a boundary at the very place, that one's is taken: it is older than the weights, and of the same hidden states.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBoundaries:
    """places: layers above each boundary of the new cut. boundaries: the old boundary at that place, None for a new
    one. tokens: by stage of the new cut, the old stage whose knowledge of tokens it takes, None: its own, untrained.
    mixed: boundaries that stay and whose receiver has another stage's. closed: (old boundary, layers above it)."""

    places: list[int]
    boundaries: list[int | None]
    tokens: list[int | None]
    mixed: list[int]
    closed: list[tuple[int, int]]

    def lines(self, at_start: Container[int] = ()) -> list[str]:
        """What becomes of each boundary, for people. at_start: after how many layers the run had found boundaries with
        learned codecs when it began."""
        said = []
        for boundary, (place, old) in enumerate(zip(self.places, self.boundaries, strict=True)):
            where = f"boundary {boundary}, after {_layers(place)}"
            if old is None and place in at_start:
                said.append(f"{where}: is new, its codec begins with what the run began with there")
            elif old is None:
                said.append(f"{where}: is new, its codec begins untrained")
            elif boundary in self.mixed:
                said.append(
                    f"{where}: goes on as boundary {old} was, but stage {boundary + 1} knows tokens as its lower "
                    "boundary needs it: the loss rises at first"
                )
            else:
                said.append(f"{where}: goes on as boundary {old} was")
        return said + [
            f"boundary {old} of before, after {_layers(place)}: is closed, what its codec learned is dropped"
            for old, place in self.closed
        ]


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def kept_boundaries(old: Sequence[range], new: Sequence[range]) -> KeptBoundaries:
    """old, new: the layers of each stage, by their numbers in the whole model."""
    before = {layers.stop: boundary for boundary, layers in enumerate(old[:-1])}
    places = [layers.stop for layers in new[:-1]]
    boundaries = [before.get(place) for place in places]
    tokens: list[int | None] = []
    mixed: list[int] = []
    for above, below in zip([None, *boundaries], [*boundaries, None], strict=True):
        as_receiver = None if above is None else above + 1
        as_sender = below
        tokens.append(as_receiver if as_sender is None else as_sender)
        if as_receiver not in (None, tokens[-1]):
            mixed.append(len(tokens) - 2)
    closed = [(boundary, place) for place, boundary in before.items() if place not in places]
    return KeptBoundaries(places=places, boundaries=boundaries, tokens=tokens, mixed=mixed, closed=closed)
