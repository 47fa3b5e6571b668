"""Whether a run and its recomputation agree: states at the end, losses of the steps that count, averaging rounds.

Both are directories of records. A swarm has more of them than count: steps that were done again, or were done by a lane
that was left out of the rounds meanwhile and went back behind them. What counts is what the recomputation has, since it
does each step once; the swarm's newest record of the same thing has to say the same.

A lane that took up the state of another one is compared from there on (`since`): what it had done before has an effect
in the others' rounds alone. A node that has not ended, because its lane was lost and not started again, has nothing to
compare; nor has a lane that went to its end by a log of its own, unheard by the others (`apart`): what it came to is no
part of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...protocol.membership_log import MembershipLog
from .lanes import lane_path
from .summary import read_records

Records = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneVerdict:
    """Of one lane. ended: whether all its stages were through. apart: the first round that its own log, by which it
    went to the end, decides otherwise than the one that counts. states_equal: by stage, at the end. loss, round: what
    differs first; None: nothing."""

    lane: int
    ended: bool
    states_equal: list[bool]
    loss: int | None = None
    round: int | None = None
    val_loss_equal: bool = True
    apart: int | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs; true of a lane of which nothing is compared, too."""
        if not self.ended or self.apart is not None:
            return True
        return all(self.states_equal) and self.val_loss_equal and self.loss is None and self.round is None

    def name(self, lanes: int) -> str:
        """What is compared, of a run of so many lanes."""
        return "the run" if lanes == 1 else f"lane {self.lane}"

    def words(self) -> str:
        """For people."""
        if not self.ended:
            return "has not come to the end, so there is nothing to compare"
        if self.apart is not None:
            how = f"came to the end by a log of its own, which does not count from round {self.apart} on"
            return f"{how}, so there is nothing to compare"
        differs = [f"state of stage {stage}" for stage, equal in enumerate(self.states_equal) if not equal]
        differs += [f"loss from step {self.loss + 1} on"] if self.loss is not None else []
        differs += [f"averaging from round {self.round} on"] if self.round is not None else []
        differs += [] if self.val_loss_equal else ["held-out loss"]
        return f"DIFFERENT: {', '.join(differs)}" if differs else "equal bit for bit"


def compare_lanes(
    run: Path,
    again: Path,
    *,
    lanes: int,
    stages: int,
    steps: int,
    since: Mapping[int, int],
    apart: Mapping[int, int] | None = None,
) -> list[LaneVerdict]:
    """The run in `run` against its recomputation in `again`, lane by lane. since: by lane, as for `compare_lane`.
    apart: lanes that ended by a log of their own, with the round from which on."""
    apart = apart or {}
    return [
        LaneVerdict(lane=lane, ended=True, states_equal=[], apart=apart[lane])
        if lane in apart
        else compare_lane(
            *(
                [read_records(lane_path(place, lane, lanes) / f"stage-{stage}.jsonl") for stage in range(stages)]
                for place in (run, again)
            ),
            lane=lane,
            steps=steps,
            since=since.get(lane, 0),
        )
        for lane in range(lanes)
    ]


def compare_lane(ours: list[Records], theirs: list[Records], *, lane: int, steps: int, since: int = 0) -> LaneVerdict:
    """By the records of each stage. steps: of the whole run. since: so many steps were another lane's."""
    ends, expected = ([end_of(records) for records in each] for each in (ours, theirs))
    if not all(end and end["steps"] == steps for end in ends):
        return LaneVerdict(lane=lane, ended=False, states_equal=[])
    states = [bool(a and b and a["state_sha256"] == b["state_sha256"]) for a, b in zip(ends, expected, strict=True)]
    theirs = [[each for each in records if _counts(each, since)] for records in theirs]
    losses = (_newest(each[0], "step", "step", ("loss",)) for each in (ours, theirs))
    held_out = (_newest(each[0], "evaluation", "step", ("val_loss",)) for each in (ours, theirs))
    rounds = [
        first_difference(*(_newest(each, "round", "number", ("members", "digest")) for each in pair))
        for pair in zip(ours, theirs, strict=True)
    ]
    return LaneVerdict(
        lane=lane,
        ended=True,
        states_equal=states,
        loss=first_difference(*losses),
        round=min((each for each in rounds if each is not None), default=None),
        val_loss_equal=first_difference(*held_out) is None,
    )


def _counts(record: dict[str, Any], since: int) -> bool:
    return record["used"] > since if record["event"] == "round" else record.get("step", since) >= since


def end_of(records: Records) -> dict[str, Any] | None:
    """How the newest process of a node ended; None if it has not."""
    begun = max((at for at, record in enumerate(records) if record["event"] == "start"), default=0)
    return next((record for record in reversed(records[begun:]) if record["event"] == "end"), None)


def first_difference(ours: dict[int, Any], theirs: dict[int, Any]) -> int | None:
    """The first of what `theirs` has that is not, or is another one, in `ours`."""
    return min((key for key, value in theirs.items() if ours.get(key) != value), default=None)


def _newest(records: Records, event: str, key: str, names: tuple[str, ...]) -> dict[int, Any]:
    """Of each of them, by number, what the newest record says."""
    return {each[key]: [each[name] for name in names] for each in records if each["event"] == event}


def members_lines(log: MembershipLog, lanes: int, followed: Iterable[int] = ()) -> list[str]:
    """Who left and came when, for people. followed: who was no member at the end, but followed the others up to it."""
    lines, before = [], set(range(lanes))
    for stretch in log.stretches:
        entered = {each.lane: each for each in stretch.entered}
        said = [f"lane {lane} is left out" for lane in sorted(before - set(stretch.members))]
        said += [
            f"lane {each.lane} is back, from step {each.begins} on; it followed from {each.copied}"
            for each in entered.values()
        ]
        if said:
            lines.append(f"round {stretch.first}: {'; '.join(said)}")
        before = set(stretch.members)
    return [*lines, *(f"the end: lane {lane} had followed the others up to it" for lane in followed)]
