"""One stage's part in the rounds of its lanes: what it contributes, and what it makes of all contributions.

`contribute` gives the bytes of a round, a function of this stage's state; `use` adds those of all members *in lane
order* and moves the weights. Nothing here depends on when a contribution arrived, so lanes as processes and lanes in
one process end with the same bits. A node's own contribution is unpacked from its own bytes like any other: what was
rounded away is rounded away for all alike.

Between `contribute` and `use` a state may be taken and restored (`state_tensors`), and the round goes on.

A lane that is no member of a round uses it all the same, without a contribution of its own: so it follows the others,
and goes on with them (`enter`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compress.byte_format import ByteFormat, CodecError, Direction, Key, Payload
from .modes import AveragingMode
from .round_plan import Round, RoundPlan

_PLACE = 2**32  # beyond all boundaries: rounds have random numbers of their own


class RoundError(CodecError):
    """A contribution that cannot be what was agreed; names lane, stage and round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which node of the grid this is, of how many lanes, and the run's seed."""

    stage: int
    lane: int
    lanes: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundUsed:
    """For the record of rounds. members: lanes, in order. digest: of their contributions, in that order. norm: of the
    mean that was used."""

    round: Round
    members: list[int]
    digest: str
    norm: float

    def record(self) -> dict[str, Any]:
        """Fields of a record `round`."""
        when = {name: getattr(self.round, name) for name in ("number", "fragment", "made", "used")}
        return {**when, "members": self.members, "digest": self.digest, "norm": self.norm}


class Averager(ABC):
    """The rounds of one stage. moved: called after weights were changed from here."""

    def __init__(self, mode: AveragingMode, place: Place, *, steps: int, moved: Callable[[], None]) -> None:
        self.mode, self.place, self.plan = mode, place, RoundPlan(mode, steps)
        self._moved = moved
        self._own: dict[int, bytes] = {}  # by fragment: what was contributed to the round that is under way
        self.contributed = place.lanes  # how many lanes to the newest round that was used

    @abstractmethod
    def contribution_bytes(self, round_: Round) -> int:
        """Exact length of every contribution to it."""

    @abstractmethod
    def _packed(self, round_: Round) -> bytes:
        """This lane's contribution; moves the error that formats carry."""

    @abstractmethod
    def _check(self, round_: Round, lane: int, contribution: bytes) -> None:
        """Unpack that lane's contribution, of the right length, on the CPU. Raises RoundError where `_apply` would."""

    @abstractmethod
    def _apply(self, round_: Round, contributions: Mapping[int, bytes]) -> float:
        """Move the weights by all contributions, by lane, in order. Returns the norm of their mean."""

    @torch.no_grad()
    def check(self, number: int, lane: int, contribution: bytes) -> None:
        """Raises RoundError for what `use` would refuse of that lane in round `number`. Changes nothing, so any thread
        may do it; takes the memory of one unpacked contribution."""
        if number < self.plan.count:
            self._check_length(self.plan.round(number), lane, contribution)
            self._check(self.plan.round(number), lane, contribution)

    def _check_length(self, round_: Round, lane: int, contribution: bytes) -> None:
        if len(contribution) != (wanted := self.contribution_bytes(round_)):
            raise self._refusal(round_, lane, f"has {len(contribution)} bytes, {wanted} were agreed")

    def bytes_of(self, number: int) -> int:
        """`contribution_bytes` of round `number`, for links, which may ask for any: past the last one, 1."""
        return self.contribution_bytes(self.plan.round(number)) if number < self.plan.count else 1

    def under_way(self, completed: int) -> dict[Round, bytes]:
        """What this lane has contributed to the rounds that are made and not used once `completed` steps are."""
        return {round_: self._own[round_.fragment] for round_ in self.plan.under_way(completed)}

    @torch.no_grad()
    def contribute(self, round_: Round) -> bytes:
        """The bytes to give to the others. Raises CodecError for what is not finite."""
        self._own[round_.fragment] = made = self._packed(round_)
        return made

    @torch.no_grad()
    def use(self, round_: Round, others: Mapping[int, bytes], *, member: bool = True) -> RoundUsed:
        """Finish the round with the contributions of the `others`, by lane. member: this lane's own counts too. Raises
        RoundError, before anything is changed, for one that cannot be what was agreed."""
        own = {self.place.lane: self._own[round_.fragment]} if member else {}
        contributions = dict(sorted({**others, **own}.items()))
        for lane, contribution in contributions.items():
            self._check_length(round_, lane, contribution)
        self.contributed = len(contributions)
        norm = self._apply(round_, contributions)
        self._own.pop(round_.fragment, None)
        self._moved()
        digest = hashlib.sha256()
        for contribution in contributions.values():
            digest.update(contribution)
        return RoundUsed(round=round_, members=list(contributions), digest=digest.hexdigest(), norm=norm)

    def _mean(
        self,
        round_: Round,
        contributions: Mapping[int, bytes],
        fmt: ByteFormat,
        shape: tuple[int, ...],
        like: Tensor,
        *,
        divisor: int | None = None,
    ) -> Tensor:
        """The sum over lanes, in order, over `divisor` (default: how many they are), in the dtype of `like`."""
        total = like.new_zeros(shape)
        for lane, body in contributions.items():
            total.add_(self._unpacked(round_, lane, body, fmt, shape, like))
        return total.div_(divisor or len(contributions))

    def _unpacked(
        self, round_: Round, lane: int, body: bytes, fmt: ByteFormat, shape: tuple[int, ...], like: Tensor
    ) -> Tensor:
        payload = Payload(codec=fmt.id, header={"shape": list(shape)}, body=body)
        try:
            return fmt.unpack(payload, shape=shape, dtype=like.dtype, device=like.device, key=self._key(round_, lane))
        except CodecError as error:
            raise self._refusal(round_, lane, f"is refused: {error}") from None

    def _key(self, round_: Round, lane: int, part: int = 0) -> Key:
        return Key(
            seed=self.place.seed,
            boundary=_PLACE + 2 * self.place.stage + part,
            direction=Direction.BACKWARD,
            step=round_.number,
            microbatch=lane,
        )

    def _refusal(self, round_: Round, lane: int, fault: str) -> RoundError:
        return RoundError(f"lane {lane}'s contribution to round {round_.number} of stage {self.place.stage} {fault}")

    @torch.no_grad()
    def enter(self, completed: int) -> None:
        """This lane trains again, after `completed` steps of which the last ones were done without it. It has no part
        in the rounds that are under way, and carries no error from before."""
        for round_ in self.plan.under_way(completed):
            if round_.fragment not in self._own:
                self._own[round_.fragment] = bytes(self.contribution_bytes(round_))
                self._begin_anew(round_)
        names = {name: torch.zeros_like(like, device="cpu") for name, like in self._errors_layout(completed).items()}
        self._load_errors(names, completed)

    def _begin_anew(self, round_: Round) -> None:
        """That round is under way, and this lane has no part in it."""
        del round_

    def _errors_layout(self, completed: int) -> dict[str, Tensor]:
        """Of the errors that formats carry from one round to the next, once `completed` steps are."""
        del completed
        return {}

    def _load_errors(self, errors: Mapping[str, Tensor], completed: int) -> None:
        """Go on from these."""
        del errors, completed

    # -- state ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """What goes from one round to the next, by name: the tensors themselves, between two steps."""

    @abstractmethod
    def state_layout(self, completed: int) -> dict[str, Tensor]:
        """Names, shapes and dtypes of `state_tensors` once `completed` steps are; the numbers mean nothing."""

    @abstractmethod
    def load_state_tensors(self, state: Mapping[str, Tensor], completed: int) -> None:
        """Go on from what `state_tensors` had then."""


def octets(body: bytes) -> Tensor:
    """Bytes as a tensor of its own (N,), uint8, for a state."""
    return torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
