"""How long is waited for a message, and for whom: deadlines that follow from the link, the work and who is missing."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from thinpipe.node.links.control_stream import LIMITS, Control
from thinpipe.node.links.link import Link
from thinpipe.node.links.outgoing import Write
from thinpipe.node.process_pause import PAUSE_S, ProcessPause
from thinpipe.node.queues import SendQueue
from thinpipe.node.receive_deadline import LEAST_S, TIMES, ReceiveDeadline
from thinpipe.node.run_records import Stopwatch, Tracer
from thinpipe.node.worker_thread import Worker
from thinpipe.protocol.control_messages import CopyPart, Heartbeat
from thinpipe.protocol.errors import RemoteProtocolError
from thinpipe.protocol.messages import Frame, Kind, Message, decode_frame, encode_frame
from thinpipe.protocol.rollback import Rollback
from thinpipe.protocol.rollback_actions import Side

from .builders import identity
from .links import make_link

NEVER = float("inf")


def test_the_deadline_follows_the_work_and_the_bytes() -> None:
    deadline = ReceiveDeadline(transfer_s=7.0)
    assert deadline.timeout_s == LEAST_S + TIMES * 7
    deadline.observe(0.5)
    assert deadline.timeout_s == LEAST_S + TIMES * 7
    deadline.observe(200.0)
    deadline.observe(3.0)  # the longest counts
    assert deadline.timeout_s == TIMES * 207


def test_the_users_own_deadline_wins() -> None:
    deadline = ReceiveDeadline(transfer_s=7.0, fixed_s=5.0)
    deadline.observe(200.0)
    assert deadline.timeout_s == 5.0


@pytest.mark.parametrize(("missing", "counts"), [((0.0, NEVER), True), ((5.0, 0.0), False), ((0.0, 100.0), False)])
def test_an_outage_says_nothing_of_work(missing: tuple[float, float], counts: bool) -> None:
    deadline = ReceiveDeadline(missing_s=lambda: missing)
    deadline.observe(1200.0)
    assert deadline.timeout_s == (TIMES * 1200 if counts else LEAST_S)


@pytest.mark.parametrize(
    ("missing", "once_more"),
    [
        ((0.0, NEVER), False),  # all are there, and always were
        ((1.0, 0.0), True),  # somebody is missing
        ((99.0, 0.0), True),
        ((101.0, 0.0), False),  # for longer than anybody waits
        ((0.0, 59.0), True),  # somebody was missing while this wait went on
        ((0.0, 61.0), False),
    ],
)
def test_nobody_is_late_while_somebody_is_missing(missing: tuple[float, float], once_more: bool) -> None:
    deadline = ReceiveDeadline(fixed_s=60.0, replacement_s=100.0, missing_s=lambda: missing)
    assert deadline.extend(60.0) is once_more


def test_an_evaluation_has_the_time_that_it_takes() -> None:
    """Before one is done, that of as many steps; the user's own deadline is for every message."""
    deadline = ReceiveDeadline(transfer_s=7.0)
    assert deadline.after_evaluation(3) == LEAST_S + 3 * TIMES * 7
    deadline.observe(50.0)
    assert deadline.after_evaluation(3) == TIMES * (3 * 50 + 3 * 7)
    deadline.observe_evaluation(100.0)
    assert deadline.after_evaluation(3) == TIMES * (100 + 3 * 7)
    assert deadline.timeout_s == TIMES * (50 + 7)  # for a step's message, no longer than before
    assert ReceiveDeadline(fixed_s=5.0).after_evaluation(3) == 5.0


def message(microbatch: int) -> Message:
    return Message(kind=Kind.ACTIVATION, step=0, microbatch=microbatch, body=bytes(1000))


@asynccontextmanager
async def sending(link: Link, deadline: ReceiveDeadline) -> AsyncIterator[SendQueue]:
    codec = Worker("codec", Stopwatch(), Tracer(stage=0, enabled=False))
    queue = SendQueue(link, codec, deadline)
    pump = asyncio.create_task(queue.pump())
    try:
        yield queue
    finally:
        pump.cancel()
        codec.close()
        codec.join(10)


async def fill(queue: SendQueue, count: int = 10) -> None:
    for number in range(count):
        await queue.put(f"pack activation {number}", partial(message, number))


def narrow_link() -> Link:
    """Whose neighbour has yet to take anything, and which holds two messages meanwhile."""
    link = make_link(0)
    link._send_buffer_bytes = 2000
    return link


@pytest.mark.parametrize("flushes", [False, True])
def test_a_neighbour_that_takes_nothing_is_not_waited_for_without_end(flushes: bool) -> None:
    """Its process is alive, and hangs: it says neither credit nor anything else."""

    async def story() -> None:
        async with sending(narrow_link(), ReceiveDeadline(fixed_s=0.1)) as queue:
            if flushes:
                await fill(queue, 4)
            with pytest.raises(TimeoutError, match=r"waited 0.1 s for the neighbour to take what is sent"):
                await (queue.flush() if flushes else fill(queue))

    asyncio.run(story())


def test_a_neighbour_that_takes_little_is_waited_for() -> None:
    async def story() -> None:
        link = narrow_link()

        async def take() -> None:
            while True:
                await asyncio.sleep(0.15)
                if len(link._outgoing.queue):
                    link._outgoing.queue.pop(at_s=float("inf"))
                    link._outgoing.moved.set()

        async with sending(link, ReceiveDeadline(fixed_s=0.2)) as queue:
            taking = asyncio.create_task(take())
            await fill(queue, 7)
            await queue.flush()
            taking.cancel()

    asyncio.run(story())


def test_who_is_missing_takes_nothing_and_is_waited_for() -> None:
    async def story() -> None:
        missing = True
        deadline = ReceiveDeadline(fixed_s=0.05, missing_s=lambda: (1.0 if missing else 0.0, float("inf")))
        async with sending(narrow_link(), deadline) as queue:
            filling = asyncio.create_task(fill(queue))
            done, _ = await asyncio.wait({filling}, timeout=0.3)
            assert not done
            missing = False
            with pytest.raises(TimeoutError):
                await filling

    asyncio.run(story())


def test_a_job_that_hangs_is_named() -> None:
    """What waits for it to end can go on: the process, to its own end, so that another one takes its place."""
    begun, hangs = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        hangs.wait()

    async def story() -> None:
        compute = Worker("compute", Stopwatch(), Tracer(stage=0, enabled=False))
        await compute.run("forward 0", int)
        running = asyncio.create_task(compute.run("backward 0", job))
        await asyncio.to_thread(begun.wait)
        compute.close()
        with pytest.raises(TimeoutError, match=r"waited 0.1 s for this stage's 'backward 0' to end"):
            compute.join(0.1)
        hangs.set()
        compute.join(10)
        await running

    asyncio.run(story())


def chain(stages: int) -> list[Rollback]:
    machines = [Rollback(identity(stage, stages), joining=False) for stage in range(stages)]
    for stage in range(stages - 1):
        machines[stage].meet("below", machines[stage + 1].greeting())
        machines[stage + 1].meet("above", machines[stage].greeting())
    return machines


def beat(machines: list[Rollback]) -> None:
    """Every stage sends a heartbeat to each neighbour that is there, once."""
    sides: tuple[tuple[Side, int, Side], ...] = (("above", -1, "below"), ("below", 1, "above"))
    for side, step, back in sides:
        for stage, machine in enumerate(machines):
            if machine.peers[side] is not None:
                machines[stage + step].receive(back, machine.heartbeat(side))


@pytest.mark.parametrize("lost", range(5))
def test_all_learn_who_is_missing_and_that_it_is_back(lost: int) -> None:
    machines = chain(5)
    beat(machines)
    assert [machine.heartbeats.missing for machine in machines] == [0] * 5
    for neighbour, side in ((lost - 1, "below"), (lost + 1, "above")):
        if 0 <= neighbour < 5:
            machines[neighbour].part(side)  # pyright: ignore[reportArgumentType]
    for side in ("above", "below"):
        machines[lost].part(side)
    for _ in range(5):
        beat(machines)
    assert [machine.heartbeats.missing for stage, machine in enumerate(machines) if stage != lost] == [lost + 1] * 4
    for neighbour, side, back in ((lost - 1, "below", "above"), (lost + 1, "above", "below")):
        if 0 <= neighbour < 5:
            machines[neighbour].meet(side, machines[lost].greeting())  # pyright: ignore[reportArgumentType]
            machines[lost].meet(back, machines[neighbour].greeting())  # pyright: ignore[reportArgumentType]
    for _ in range(5):
        beat(machines)
    assert [machine.heartbeats.missing for machine in machines] == [0] * 5


def test_all_learn_how_old_the_oldest_copy_is() -> None:
    """And keep their own checkpoints from there on, since a lost disk takes all back to its copy."""
    machines = chain(4)
    for _ in range(4):
        beat(machines)
    assert [machine.heartbeats.copied_by_all for machine in machines] == [0] * 4
    for machine, copied in zip(machines, (30, 20, 50, 40), strict=True):
        machine.heartbeats.copied = copied
    for _ in range(4):
        beat(machines)
    assert [machine.heartbeats.copied_by_all for machine in machines] == [20] * 4
    machines[1].heartbeats.copied = 60
    for _ in range(4):
        beat(machines)
    assert [machine.heartbeats.copied_by_all for machine in machines] == [30] * 4
    machines[3].heartbeats.copied = 0  # its neighbour was lost, and the copies with it
    for _ in range(4):
        beat(machines)
    assert [machine.heartbeats.copied_by_all for machine in machines] == [0] * 4
    assert Rollback(machines[0].identity, joining=True).heartbeats.copied_by_all == 0


def test_a_stage_that_there_is_not_cannot_be_missing() -> None:
    machines = chain(2)
    with pytest.raises(RemoteProtocolError, match="stage 2 cannot be missing"):
        machines[0].receive("below", Heartbeat(generation=0, completed_steps=0, missing=3))


class Clock:
    """The running loop's time, which goes on only by hand."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s
        asyncio.get_running_loop().time = lambda: self.now_s


def parted() -> tuple[Control, Rollback]:
    """Of two stages that have lost each other: what runs the upper one, and the lower one."""
    upper, lower = chain(2)
    lower.part("above")
    upper.part("below")
    sent: dict[Side, Counter[str]] = {"above": Counter(), "below": Counter()}
    return Control(upper, heartbeat_timeout_s=1e6, on_effect=lambda _: None, sent=sent), lower


@asynccontextmanager
async def conversation(control: Control, lower: Rollback, write: Write) -> AsyncIterator[None]:
    """While this lasts the lower stage is connected; it greets, and says nothing more."""
    frames = asyncio.Queue[bytes]()
    frames.put_nowait(encode_frame(lower.greeting()))
    session = control.converse("below", frames.get, write, speaks_first=True, greeting_timeout_s=1e6)
    talking = asyncio.create_task(session)
    try:
        await control.met["below"].wait()
        yield
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)


def test_who_has_just_come_back_is_not_late_yet() -> None:
    """Nobody looked while it was away: that it was missing until now has to be noted when it comes."""

    async def write(_: bytes) -> None:
        pass

    async def story() -> None:
        clock = Clock(1000.0)
        control, lower = parted()
        control.missing_s()
        clock.now_s = 1119.5
        async with conversation(control, lower, write):
            clock.now_s = 1120.0
            assert control.missing_s() == (0.0, 0.5)

    asyncio.run(story())


def test_alive_comes_between_other_frames_too() -> None:
    """While a copy is on its way there is always something else to say."""
    part = CopyPart(stage=0, completed_steps=1, offset=0, data=b"x")
    said: list[Frame] = []

    async def story() -> None:
        clock = Clock(0.0)
        control, lower = parted()

        async def write(raw: bytes) -> None:
            clock.now_s += 0.1
            said.append(decode_frame(raw, LIMITS))
            if len(said) < 100:
                control.tell("below", part)

        async with conversation(control, lower, write):
            control.tell("below", part)
            for _ in range(2000):
                await asyncio.sleep(0)

    asyncio.run(story())
    assert sum(isinstance(frame, CopyPart) for frame in said) > 50
    assert sum(isinstance(frame, Heartbeat) for frame in said) in range(6, 13)  # ten seconds


def test_a_pause_of_this_process_excuses_everybody() -> None:
    """A wait in which it was paused says nothing of others, whenever in it that was; nor does such a round of work."""

    async def story() -> None:
        clock, pause = Clock(0.0), ProcessPause()
        deadline = ReceiveDeadline(fixed_s=60.0, paused_ago_s=pause.ago_s)

        def awake(seconds: int, *, late_s: float = 0.0) -> None:
            for _ in range(seconds):
                clock.now_s += 1.0 + late_s
                pause.ago_s()

        awake(100, late_s=PAUSE_S - 1)  # a busy machine
        assert not deadline.extend(60.0)
        clock.now_s += 4000.0
        assert deadline.extend(60.0)  # the timer of the wait rings before that of the watch
        deadline.observe(4001.0)
        awake(59)
        assert deadline.extend(60.0)  # it would have been due a moment after waking
        awake(1)
        assert not deadline.extend(60.0)
        computed = ReceiveDeadline(paused_ago_s=pause.ago_s)
        computed.observe(61.0)
        assert computed.timeout_s == LEAST_S
        computed.observe(50.0)
        assert computed.timeout_s == TIMES * 50

    asyncio.run(story())


def test_it_is_looked_for_all_the_time() -> None:
    async def story() -> None:
        clock, pause = Clock(0.0), ProcessPause()
        watching = asyncio.create_task(pause.watch())
        await asyncio.sleep(0)
        for clock.now_s in (1.0, 2.0, 500.0, 501.0):
            for _ in range(5):
                await asyncio.sleep(0)
        assert pause.ago_s() == 1.0
        watching.cancel()

    asyncio.run(story())
