"""A run done again in one process, from its record: the settings, the text, and the log of members of its rounds.

What a run came to is a function of these three (`protocol.membership_log`): which process died when, which link broke
and who was waited for leaves no other trace. So anybody who has them can check a run: do it again on one machine, and
compare the digests of all weights, the losses and the averaging rounds. `thinpipe recompute` does that for a run that
has ended, `thinpipe chaos` for one that it has disturbed.

The log is not what one lane says, since lanes that could not hear each other may have decided on their own: of all
lanes' logs the one counts that the lanes would have agreed on (`MembershipLog.yields_to`). A lane that was left out and
had no round left to enter has followed the others up to the end; from which step, and with whose state, its records
`follows` and `took_up` say. One whose own log says otherwise has followed nobody: it never heard of the others again,
and what it came to is another run's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from ..protocol.membership_log import Entry, MembershipLog
from ..sim.reports.lanes import lane_path
from ..sim.reports.recomputation import LaneVerdict, compare_lanes, end_of, members_lines
from ..sim.reports.summary import read_records
from .config import ConfigError, RunConfig
from .config_file import load_config
from .data import Corpus
from .lanes.contribution_store import ContributionError
from .lanes.members_file import FILE, read_members
from .one_process import OneProcess
from .run_corpus import open_run_corpus
from .run_directory import with_start


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputation:
    """log: the one that counts. followed: lanes that followed up to the end. lanes: whether each came out the same."""

    log: MembershipLog
    followed: tuple[int, ...]
    lanes: list[LaneVerdict]

    @property
    def equal(self) -> bool:
        """Whether nothing differs in any lane that ended."""
        return all(each.equal for each in self.lanes)

    def members(self) -> list[str]:
        """Who left and came when, for people."""
        return members_lines(self.log, len(self.lanes), self.followed)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "equal": self.equal,
            "members": [asdict(each) for each in self.log.stretches],
            "followed_to_the_end": list(self.followed),
            "lanes": [{**asdict(each), "equal": each.equal} for each in self.lanes],
        }


def recomputable(run: Path) -> tuple[RunConfig, Corpus]:
    """The settings of the run in `run`, and its text. Raises ConfigError for a run that cannot be done again: it has
    not ended, or waited for links instead of computing, or its text was changed on the way; and what opening the text
    raises."""
    config = with_start(load_config(run / "run.toml"), run)
    if config.compute.emulate:
        raise ConfigError(f"{run} emulated its computations, so there are none to do again")
    if not any(_ended(run, config, lane) for lane in range(config.lanes.count)):
        raise ConfigError(f"{run} has not come to its end; go on with it first: thinpipe up --resume {run}")
    text = open_run_corpus(config, run, resume=True)
    if text.record and text.record.earlier:
        raise ConfigError(
            f"{run} went on with other text on the way (--data-changed), so it is no function of one text"
        )
    return config, text.corpus


def recompute(
    run: Path,
    again: Path,
    config: RunConfig,
    corpus: Corpus | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Recomputation:
    """Do the run in `run` again, with records in `again`, and compare. Raises ConfigError for a damaged log, and what
    `OneProcess` does."""
    lanes, stages, steps = config.lanes.count, config.pipeline.stages, config.run.steps
    log = log_that_counts(run, config)
    apart = by_their_own(run, config, log)
    followed = following(run, config, log, apart)
    with closing(OneProcess(config, again, log.expecting(followed), corpus)) as process:
        process.train(on_step)
    entries = [entry for stretch in log.expecting(followed).stretches for entry in stretch.entered]
    since = {each.lane: each.copied for each in entries if each.source != each.lane}
    verdicts = compare_lanes(run, again, lanes=lanes, stages=stages, steps=steps, since=since, apart=apart)
    return Recomputation(log=log, followed=tuple(each.lane for each in followed), lanes=verdicts)


def log_that_counts(run: Path, config: RunConfig) -> MembershipLog:
    """Of all lanes of the run in `run`. Raises ConfigError for one that is damaged."""
    return counting([_log_of(run, config, lane) for lane in range(config.lanes.count)])


def _log_of(run: Path, config: RunConfig, lane: int) -> MembershipLog:
    """That lane's own. Raises ConfigError."""
    count = config.lanes.count
    try:
        return read_members(lane_path(run, lane, count) / "rounds" / "stage-0" / FILE, count)
    except ContributionError as error:
        raise ConfigError(str(error)) from None


def counting(logs: Sequence[MembershipLog]) -> MembershipLog:
    """The one of them that all others give way to."""
    return reduce(lambda best, each: each if best.yields_to(each) else best, logs)


def by_their_own(run: Path, config: RunConfig, log: MembershipLog) -> dict[int, int]:
    """Those lanes that were no members at the end, but are through by a log that does not count: by lane, the first
    round that it decides otherwise."""
    found = {}
    for lane in range(config.lanes.count):
        if log.left_at(lane) is not None and _ended(run, config, lane):
            first = _log_of(run, config, lane).differs_from(log)
            found |= {} if first is None else {lane: first}
    return found


def following(run: Path, config: RunConfig, log: MembershipLog, apart: Collection[int] = ()) -> tuple[Entry, ...]:
    """Those lanes that were no members at the end, but are through, as entries past the last round that is decided; not
    those that ended by a log of their own (`apart`)."""
    found = []
    for lane in range(config.lanes.count):
        if lane in apart or log.left_at(lane) is None or not _ended(run, config, lane):
            continue
        records = read_records(lane_path(run, lane, config.lanes.count) / "stage-0.jsonl")
        copied, source, taken = 0, lane, (0, lane)
        for record in records:
            if record["event"] == "took_up":
                taken = record["completed"], record["lane"]
            elif record["event"] in ("rollback", "follows"):
                copied = record["completed"]
                source = taken[1] if copied == taken[0] else lane
        steps = config.run.steps
        found.append(Entry(lane=lane, first=log.decided, begins=steps, source=source, copied=copied))
    return tuple(found)


def _ended(run: Path, config: RunConfig, lane: int) -> bool:
    place = lane_path(run, lane, config.lanes.count)
    ends = [end_of(read_records(place / f"stage-{stage}.jsonl")) for stage in range(config.pipeline.stages)]
    return all(end and end["steps"] == config.run.steps for end in ends)
