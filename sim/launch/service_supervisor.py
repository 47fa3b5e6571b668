"""Keep one stage of a run served: start its node, start it again when it is lost, and end when the run has ended.

When a node process dies, something has to start the next one. On one machine that is `thinpipe up`. If each stage is a
container or a service of its own, each has a supervisor. It starts `thinpipe node` as a user
would, with --resume if the run's directory shows that the stage has been started before. Where no step was kept by all
stages, the run begins again with its first one, and the supervisor says so.

The supervisor of a stage holds a lock on RUN/stage-N.lock, and so does its node. The kernel releases it when they die,
whatever the cause. So a process that gets the lock of a stage which has been started before knows that it was lost,
without a clock. A *standby* waits for just that, on all stages, and serves the first one that is lost. Why not the
container engine's restart policy: it does nothing about a container that was ended by `docker kill`, which counts as
wanted.

In a run of several lanes it keeps one stage of one lane; each lane has a directory of its own in RUN, with its locks.

At the end the supervisor of stage 0 (of lane 0) prints the run's summary, and the others stay until it has. So nothing
is cut off if an engine ends all containers with the first one (`--abort-on-container-exit`). If each machine has a
directory of its own, there is nothing to wait for, and nothing to summarise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...protocol.grid_place import GridPlace, grid
from ..reports.lanes import lane_path, node_name
from ..reports.record_tail import RecordTail, whole_bytes
from ..reports.wording import counted
from .node_ends import AGAIN, Failure
from .node_launch import node_environment
from .stage_lock import began, ended_after, gave_up, newest_life, take_lock

POLL_S = 0.5
STARTING_S = 120.0  # imports, the model and the neighbours: no step is expected earlier
PROGRESS_S, PROGRESS_STEPS = 60.0, 10  # and then one within so long, or within so many of the longest step so far
STANDBY_S = 3.0  # that a lost stage stays free for its own supervisor, if that is only being started
SUMMARY_S = 120.0  # for the other stages to end, and for a summary
PAUSE_FIRST_S, PAUSE_MOST_S = 1.0, 30.0  # before a node is started again

FIRST = GridPlace(0)  # whose supervisor speaks for the run

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a supervisor is for.

    stage: None is a standby, for any of any lane. peers: host:port of every stage, in order, lane after lane; a node
    listens on its own port, and dials its successor and its own stage in lower lanes. steps: of the whole run. node:
    further options for the node. health: a file that is touched as long as the stage makes progress. restarts: how
    often a node that failed is started again.
    """

    run: Path
    stage: int | None
    peers: Sequence[str]
    steps: int
    node: Sequence[str] = ()
    health: Path | None = None
    restarts: int = 5
    lane: int = 0
    lanes: int = 1

    @property
    def stages(self) -> int:
        return len(self.peers) // self.lanes

    @property
    def places(self) -> list[GridPlace]:
        """All of the run."""
        return grid(self.stages, self.lanes)

    @property
    def own(self) -> GridPlace | None:
        return None if self.stage is None else GridPlace(self.stage, self.lane)

    @property
    def candidates(self) -> list[GridPlace]:
        return self.places if self.own is None else [self.own]

    def peer(self, place: GridPlace) -> str:
        return self.peers[place.lane * self.stages + place.stage]

    def of(self, place: GridPlace) -> tuple[Path, int]:
        """Where its records and its lock are, and as which stage."""
        return lane_path(self.run, place.lane, self.lanes), place.stage

    def name(self, place: GridPlace) -> str:
        return node_name(place.stage, place.lane, self.lanes)


class Supervisor:
    """`run` does it all. say: where lines for people go."""

    def __init__(self, assignment: Assignment, say: Say = lambda line: print(line, flush=True)) -> None:
        self.assignment, self._say = assignment, say
        self._told: int | None = None  # to stop, by that signal
        self._passed_on = False
        self._node: subprocess.Popen[bytes] | None = None
        self._failure: Failure | None = None  # with which the newest node ended
        self._moved_s = time.monotonic()
        self._stuck = self._mute = False

    def run(self) -> int:
        """Returns the exit code: 0 when the run has ended, or this process was told to; else the node's last one.
        Raises SupervisorError where a stage's lock cannot be opened."""
        wanted = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        wanted += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
        before = {number: signal.signal(number, self._on_signal) for number in wanted}
        try:
            return self._run()
        finally:
            if self._node and self._node.poll() is None:
                self._node.kill()
                self._node.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        self._told = number
        if self._node and self._node.poll() is None:
            self._passed_on = True
            self._node.send_signal(number)

    def _run(self) -> int:
        if self._complete():
            return self._again()
        claimed = self._claim()
        if isinstance(claimed, int):
            return claimed
        place, lock = claimed
        try:
            if place == FIRST:
                (self.assignment.run / "summary.json").unlink(missing_ok=True)  # of an earlier life of the run
            os.ftruncate(lock, 0)
            code = self._serve(place, lock)
            if code and not self._told:
                with suppress(OSError):  # a full disk may be why
                    os.write(lock, f"exit code {code}\n".encode())
            return code if code or self._told else self._conclude(place)
        finally:
            os.close(lock)

    # -- which stage --------------------------------------------------------------------------------------------

    def _complete(self) -> bool:
        """Whether every stage has done all steps; where other machines have their records, whether this one was let go
        after them. Its own `end` alone does not say that: a stage that was lost may need it to go back once more."""
        assignment = self.assignment
        if assignment.own and self._elsewhere():
            return newest_life(*assignment.of(assignment.own)) == (assignment.steps, True)
        return all(ended_after(*assignment.of(place)) == assignment.steps for place in assignment.places)

    def _over(self) -> bool:
        """Whether every stage has ended, be it early."""
        return all(ended_after(*self.assignment.of(place)) is not None for place in self.assignment.places)

    def _again(self) -> int:
        self._say(
            f"the run in {self.assignment.run} is complete: {self.assignment.steps} steps; another one needs "
            "another directory, or this one to be removed"
        )
        return self._summary() if self.assignment.own == FIRST and not self._elsewhere() else 0

    def _elsewhere(self) -> bool:
        """Whether some of the stages leave no records in this directory."""
        return not all(began(*self.assignment.of(place)) for place in self.assignment.places)

    def _claim(self) -> tuple[GridPlace, int] | int:
        """(place, lock) as soon as there is one to serve; the exit code when the run is over, or this process told to
        stop."""
        assignment, standby = self.assignment, self.assignment.own is None
        said = served = False
        free_s: dict[GridPlace, float] = {}
        earlier = True  # what records say may be of an earlier life of the run, until they say that it goes on
        if assignment.own:
            with suppress(OSError):  # then taking the lock says so
                assignment.of(assignment.own)[0].mkdir(exist_ok=True)
        began_s, taken_up = time.monotonic(), set[GridPlace]()  # and so may a mark, until it was seen to be gone
        while not self._told:
            over = self._over()
            earlier = earlier and over
            for place in assignment.candidates:
                if standby and not began(*assignment.of(place)):
                    continue
                lock = take_lock(*assignment.of(place))
                if lock is None:
                    served = True
                    free_s.pop(place, None)
                    continue
                if served and over and not earlier:  # a run that was ended early is over too
                    unsaid = place == FIRST and not (assignment.run / "summary.json").exists()
                    code = self._summary() if unsaid else 0
                    os.close(lock)
                    return code
                since_s = free_s.setdefault(place, time.monotonic())
                if not standby or time.monotonic() - since_s >= STANDBY_S:
                    if standby or served:
                        self._say(f"{assignment.name(place)} was lost; this one takes its place")
                    return place, lock
                os.close(lock)
            if not said and (standby or served):
                said = True
                self._say(
                    "stands by for any stage"
                    if assignment.own is None
                    else f"{assignment.name(assignment.own)} is served elsewhere; this one stands by"
                )
            marked = {place for place in assignment.candidates if gave_up(*assignment.of(place))}
            taken_up |= set(assignment.candidates) - marked
            late = time.monotonic() - began_s >= STARTING_S  # then nobody corrects what they say
            if standby and len(marked) == len(assignment.candidates) and (late or len(taken_up) == len(marked)):
                self._say("no stage could be served, so there is nothing to stand by for; see what each says")
                return 1
            self._healthy("stands by")
            time.sleep(POLL_S)
        return 0

    # -- its node -----------------------------------------------------------------------------------------------

    def _serve(self, place: GridPlace, lock: int) -> int:
        """Start the node, and again, until it ends well, or need not be tried again; returns its exit code."""
        left, pause_s, before = self.assignment.restarts, PAUSE_FIRST_S, set[Failure]()
        while True:
            self._failure = None
            code = self._one_life(place, lock)
            if self._told or code in (0, 2):  # 2: bad input stays bad
                return code if code >= 0 else 128 - code
            if self._failure and self._failure.replays and self._failure in before:
                self._say(f"{self._failure}; {AGAIN}")
                return code if code > 0 else 128 - code
            before |= {self._failure} if self._failure else set()
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            if not left:
                self._say(
                    f"{self.assignment.name(place)}: its node was {why}, and was restarted "
                    f"{self.assignment.restarts} times already"
                )
                return code if code > 0 else 128 - code
            self._say(f"{self.assignment.name(place)}: its node was {why}; it is started again in {pause_s:g} s")
            left -= 1
            time.sleep(pause_s)
            pause_s = min(PAUSE_MOST_S, 2 * pause_s)

    def _one_life(self, place: GridPlace, lock: int) -> int:
        name, (directory, stage) = self.assignment.name(place), self.assignment.of(place)
        records, resume = directory / f"stage-{stage}.jsonl", began(directory, stage)
        tail, newest = RecordTail(records, offset=whole_bytes(records) if resume else 0), None
        if resume:
            self._say(f"{name} has been started before, and is resumed")
        self._moved_s, longest_s, shown = time.monotonic() + STARTING_S - PROGRESS_S, 0.0, None
        restored = False
        if self._told:
            return 0
        self._node = subprocess.Popen(
            self._command(place, resume=resume),
            stdin=subprocess.DEVNULL,
            env=node_environment(),
            start_new_session=True,  # a Ctrl-C in a terminal reaches the supervisor, which passes it on
            pass_fds=[lock],
        )
        if self._told and not self._passed_on:  # just before it was there
            self._node.send_signal(self._told)
        while True:
            code = None
            with suppress(subprocess.TimeoutExpired):
                code = self._node.wait(POLL_S)
            for record in tail.read():  # also of a node that has just ended: its last step is said
                newest = record if record["event"] == "step" else newest
                if record["event"] == "preparing":  # for hours, if need be
                    self._moved_s = time.monotonic()
                elif record["event"] == "rollback" and resume and not restored:
                    restored = True
                    self._say(f"{name} {_goes_on(record['completed'])}")
                elif record["event"] == "failed":
                    self._failure = Failure.of(record)
            if newest and newest is not shown:
                self._moved_s = time.monotonic()
                longest_s = max(longest_s, newest["seconds"])
                if place == FIRST:
                    self._show(newest, shown)
                shown = newest
            if code is not None:
                return code
            quiet_s = time.monotonic() - self._moved_s
            if quiet_s <= max(PROGRESS_S, PROGRESS_STEPS * longest_s):
                self._healthy(f"{name}: step {shown['step'] + 1}" if shown else f"{name} starts")
            elif not self._stuck:
                self._stuck = True
                self._say(f"{name}: no step for {quiet_s:.0f} s")

    def _command(self, place: GridPlace, *, resume: bool) -> list[str]:
        assignment, (stage, lane) = self.assignment, place
        dialled, below = stage > 0 or lane + 1 < assignment.lanes, stage + 1 < assignment.stages
        command = [sys.executable, "-m", "thinpipe.cli", "node", "--config", str(assignment.run / "run.toml")]
        command += ["--stage", str(stage), "--out", str(assignment.run), "--parent", str(os.getpid()), *assignment.node]
        command += ["--listen", f"0.0.0.0:{assignment.peer(place).rpartition(':')[2]}"] if dialled else []
        command += ["--next", assignment.peer(GridPlace(stage + 1, lane))] if below else []
        command += ["--lane", str(lane)] if assignment.lanes > 1 else []
        for lower in range(lane):
            command += ["--lateral", f"{lower}={assignment.peer(GridPlace(stage, lower))}"]
        return [*command, "--resume"] if resume else command

    def _show(self, step: dict[str, float], shown: dict[str, float] | None) -> None:
        """A line at each tenth of the run."""
        tenth, done = max(1, self.assignment.steps // 10), int(step["step"]) + 1
        before = 0 if shown is None else int(shown["step"]) + 1
        if shown is None or done // tenth > before // tenth or done == self.assignment.steps:
            self._say(
                f"step {done}/{self.assignment.steps}  loss {step['loss']:.3f}  {step['tokens_per_s']:.0f} tokens/s"
            )

    def _healthy(self, what: str) -> None:
        self._stuck = False
        if self.assignment.health is None:
            return
        try:
            self.assignment.health.write_text(what + "\n", encoding="utf-8")
        except OSError as error:  # the node is well, whoever cannot read of it
            if not self._mute:
                self._say(
                    f"cannot write {self.assignment.health}: {error.strerror}; a health check of it sees no progress"
                )
            self._mute = True
        else:
            self._mute = False

    # -- the end ------------------------------------------------------------------------------------------------

    def _conclude(self, place: GridPlace) -> int:
        """The node has ended the run; wait for the others of this directory. Returns the exit code."""
        if self._elsewhere():
            self._say(
                f"{self.assignment.name(place)} has ended; the records of other stages are not in "
                f"{self.assignment.run}: copy them here, and `thinpipe summary {self.assignment.run}` sums up"
            )
            return 0
        if place != FIRST:
            done = self._until((self.assignment.run / "summary.json").exists, "the summary, by stage 0")
            return 0 if done or self._told else 1
        return self._summary() if self._until(self._over, "all stages to end") else 1

    def _until(self, there: Callable[[], bool], what: str) -> bool:
        deadline_s = time.monotonic() + SUMMARY_S
        while not there():
            if self._told:
                return False
            if time.monotonic() > deadline_s:
                self._say(f"waited {SUMMARY_S:g} s for {what}; it did not come")
                return False
            self._healthy("the run has ended")
            time.sleep(POLL_S)
        return True

    def _summary(self) -> int:
        """In a session of its own: who is told to stop now still ends with what it is for."""
        command = [sys.executable, "-m", "thinpipe.cli", "summary", str(self.assignment.run), "--write"]
        return subprocess.run(command, env=node_environment(), start_new_session=True, check=False).returncode


def _goes_on(completed: int) -> str:
    if completed:
        return f"goes on after {counted(completed, 'step')}"
    return "begins again with step 1: there is no checkpoint that all stages have"
