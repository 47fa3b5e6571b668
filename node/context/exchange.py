"""What the lanes of a group tell each other of keys and values: which part of what it is, and who moves its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

What = Literal["segment", "gram", "subspace"]
_WORDS: dict[What, str] = {"gram": "Gram matrices", "subspace": "subspaces"}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ContextKey:
    """The keys and values of one layer (numbered in the whole model) for one segment of a microbatch's sequences, or
    with `gradient` what comes back for them. what: another thing of that layer and step, of no segment."""

    step: int
    evaluation: bool
    microbatch: int
    layer: int
    segment: int
    gradient: bool = False
    what: What = "segment"

    def __str__(self) -> str:
        if self.what != "segment":
            return f"{_WORDS[self.what]} of layer {self.layer}, step {self.step}"
        what = "the gradient of " if self.gradient else ""
        when = "evaluation after step" if self.evaluation else "step"
        return (
            f"{what}keys and values of layer {self.layer}, segment {self.segment}, {when} {self.step}, "
            f"microbatch {self.microbatch}"
        )


class ContextTransport(Protocol):
    """Moves packed parts between the nodes of one stage. Called on the thread that computes."""

    def send(self, lane: int, key: ContextKey, body: bytes) -> None:
        """To that lane; does not wait for it."""
        ...

    def receive(self, lane: int, key: ContextKey) -> bytes:
        """From that lane; waits until it is here. Each part is received once; order is the receiver's. Raises
        TimeoutError, which says what was waited for, and what ends the generation."""
        ...
