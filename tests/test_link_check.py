"""What a node finds out about its links before it trusts them: a cap that is missed has to show, either way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from thinpipe.node.config import RunConfig
from thinpipe.node.links.link import PROBE_TRIES, Link, LinkOffCap
from thinpipe.node.run_records import Tracer
from thinpipe.node.stage_failure import FAILED
from thinpipe.protocol.messages import Kind, Limits, Message
from thinpipe.protocol.session import LinkSession
from thinpipe.protocol.wire_size import framed_bytes
from thinpipe.sim.links.link_check import LinkCheck, SteadyRate, round_trip_warning
from thinpipe.sim.links.shaper import LinkProfile, Shaper

from .builders import identity
from .conftest import TinyConfig
from .in_memory import run_in_memory
from .virtual import JumpingClock

CAP = 80e6


def make_link(stage: int, profile: str, clock: Callable[[], float]) -> Link:
    session = LinkSession(
        identity=identity(stage), peer_stage=1 - stage, limits=Limits(message_bytes=2**19), receive_buffer_bytes=2**23
    )
    return Link(
        session=session,
        profile=LinkProfile.parse(profile),
        chunk_bytes=None,
        send_buffer_bytes=2**24,
        uncapped_window_bytes=2**22,
        seed=1,
        tracer=Tracer(stage=stage, enabled=False),
        clock=clock,
    )


Path_ = tuple[Callable[[], Awaitable[bytes]], Callable[[bytes], Awaitable[None]]]


def path(profile: str) -> Path_:
    """A real path: a second bucket, of which the link knows nothing, behind buffers of any size."""
    loop, queue, wire = asyncio.get_running_loop(), asyncio.Queue[bytes](), Shaper(LinkProfile.parse(profile))

    async def write(frame: bytes) -> None:
        passage = wire.admit(framed_bytes(len(frame)), loop.time())
        loop.call_at(passage.arrive_s, queue.put_nowait, frame)

    return queue.get, write


def probed(
    cap: str, through: str = "none", meddle: Callable[[Link], None] = lambda _: None, late_s: float = 0.0
) -> tuple[LinkCheck, Link]:
    """What the stage above finds, on a clock that jumps. meddle: breaks the link on purpose. late_s: each write is."""

    async def story() -> tuple[LinkCheck, Link]:
        loop = asyncio.get_running_loop()
        upper, lower = make_link(0, cap, loop.time), make_link(1, cap, loop.time)
        (down_read, down_write), (up_read, up_write) = path(through), path("none")
        meddle(upper)

        async def write(frame: bytes) -> None:
            await asyncio.sleep(late_s)
            await down_write(frame)

        ends = [
            asyncio.create_task(upper.attach(up_read, write, speaks_first=True, greeting_timeout_s=30)),
            asyncio.create_task(lower.attach(down_read, up_write, speaks_first=False, greeting_timeout_s=30)),
        ]

        async def consume() -> None:
            while True:
                await lower.receive()

        ends.append(asyncio.create_task(consume()))
        await asyncio.gather(upper.opened.wait(), lower.opened.wait())
        found = await upper.probe(120)
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        return found, upper

    with asyncio.Runner(loop_factory=JumpingClock) as runner:
        return runner.run(story())


@pytest.mark.parametrize("cap", ["80mbit,25ms", "80mbit", "1gbit,5ms", "2mbit,50ms", "80mbit,25ms,burst=256kb"])
def test_a_cap_that_holds_is_measured_as_it_is(cap: str) -> None:
    found, link = probed(cap)
    assert found.configured_bits_per_s == link.profile.rate_bits_per_s
    assert found.deviation == pytest.approx(0, abs=0.01)
    assert (found.warning, found.tries) == (None, 1)
    assert found.round_trip_s == pytest.approx(2 * link.profile.latency_s, abs=0.001)
    assert "round trip" in str(found)


@pytest.mark.parametrize(("share", "off"), [(0.5, True), (0.88, True), (0.95, False)])
@pytest.mark.parametrize("latency", ["0ms", "25ms", "100ms"])
def test_a_path_that_is_slower_than_the_cap_shows(share: float, off: bool, latency: str) -> None:
    """Also where a whole probe of a quarter second would have fitted into the window, so that nobody had taken it."""
    found, _ = probed(f"80mbit,{latency}", through=f"{80 * share:g}mbit")
    assert found.measured_bits_per_s == pytest.approx(share * CAP, rel=0.02)
    assert (found.warning is not None) == off
    if off:
        assert found.tries == PROBE_TRIES
        assert found.warning
        assert f"configured 80 Mb/s, measured {found.measured_bits_per_s / 1e6:.4g} Mb/s" in found.warning
        assert "\n" not in found.warning


def test_a_clock_that_is_late_at_every_frame_shows() -> None:
    found, _ = probed("80mbit,5ms", late_s=0.010)  # a chunk takes 6.6 ms
    assert found.deviation
    assert found.deviation < -0.2
    assert found.warning


@pytest.mark.parametrize("real", ["none", "160mbit", "40mbit"])
def test_a_bucket_that_does_not_keep_its_rate_shows(real: str) -> None:
    """The ideal times of a bucket of another rate: broken on purpose, as a cap that is not applied."""

    def meddle(link: Link) -> None:
        link._outgoing.shaper = Shaper(LinkProfile.parse(real))

    found, _ = probed("80mbit", meddle=meddle, late_s=0.0001)
    assert found.warning
    assert ("does not hold" in found.warning) == (real != "40mbit")


def test_only_the_probe_counts() -> None:
    """Traffic before it, which was slower, changes nothing."""

    async def story() -> tuple[LinkCheck, float]:
        loop = asyncio.get_running_loop()
        upper, lower = make_link(0, "80mbit", loop.time), make_link(1, "80mbit", loop.time)
        (down_read, down_write), (up_read, up_write) = path("none"), path("none")
        late_s = 0.050

        async def write(frame: bytes) -> None:
            await asyncio.sleep(late_s)
            await down_write(frame)

        ends = [
            asyncio.create_task(upper.attach(up_read, write, speaks_first=True, greeting_timeout_s=30)),
            asyncio.create_task(lower.attach(down_read, up_write, speaks_first=False, greeting_timeout_s=30)),
        ]
        await asyncio.gather(upper.opened.wait(), lower.opened.wait())
        for number in range(8):
            await upper.send(Message(kind=Kind.ACTIVATION, step=number, microbatch=0, body=bytes(2**19)))
        for _ in range(8):
            await lower.receive()
        late_s = 0.0
        found = await upper.probe(60)
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        return found, upper.meter.rate_bits_per_s() or 0.0

    with asyncio.Runner(loop_factory=JumpingClock) as runner:
        found, of_all = runner.run(story())
    assert found.deviation == pytest.approx(0, abs=0.01)
    assert of_all < 0.5 * CAP


def test_without_a_cap_of_its_own_it_says_so() -> None:
    found, link = probed("none")
    assert (found.measured_bits_per_s, found.warning, link.sent["probe"]) == (None, None, 0)
    assert str(found).startswith("not capped here, round trip ")


def test_a_link_too_thin_to_tell_is_no_warning() -> None:
    found, _ = probed("10kbit,50ms")
    assert (found.measured_bits_per_s, found.warning) == (None, None)
    assert str(found).startswith("not measured")


# -- in a node ------------------------------------------------------------------------------------------------------


def two_stages(tiny: TinyConfig, verify: str) -> RunConfig:
    """Over links of 50 Gb/s, which no process here can fill."""
    link = {"link.link": "50gbit", "link.verify": verify}
    return tiny({"pipeline.stages": 2, "run.steps": 1, **link})


@pytest.mark.slow
def test_a_node_warns_once_a_link_and_goes_on(
    tiny: TinyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_stages(tiny, "warn")
    assert config.digest() == two_stages(tiny, "fail").digest()
    outcome = run_in_memory(config, tmp_path)
    assert len(outcome.losses[0]) == 1
    said = capsys.readouterr()
    for stage, way in ((0, "forward"), (1, "backward")):
        records = [json.loads(line) for line in (tmp_path / f"stage-{stage}.jsonl").read_text().splitlines()]
        (ready,) = [record for record in records if record["event"] == "ready"]
        (check,) = ready["link_check"]
        assert (check["boundary"], check["direction"], check["configured_bits_per_s"]) == (0, way, 50e9)
        assert check["measured_bits_per_s"] < 45e9
        assert said.err.count(f"stage {stage}: warning: {check['warning']}\n") == 1
    assert "boundary 0-1: sends at 50gbit, measured " in said.out


@pytest.mark.slow
def test_a_node_that_shall_fail_ends_with_that_line(tiny: TinyConfig, tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        run_in_memory(two_stages(tiny, "fail"), tmp_path)
    first: BaseException = raised.value
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, LinkOffCap)
    assert isinstance(first, FAILED)  # exit code 1
    assert "configured 5e+04 Mb/s, measured" in str(first)
    assert str(first).endswith('link.verify = "fail" ends the node here')


# -- the parts ------------------------------------------------------------------------------------------------------


def test_the_head_of_a_transfer_is_left_out() -> None:
    by_bytes, by_time = SteadyRate(skip_bytes=300), SteadyRate(skip_bytes=10**9, skip_s=1.0)
    for number in range(11):
        now_s = 0.01 * number if number < 3 else 1.0 + number
        by_bytes.add(100, now_s)
        by_time.add(100, now_s)
    assert (by_bytes.steady_bytes, by_bytes.total_bytes) == (800, 1100)
    assert by_bytes.steady_s == pytest.approx(11 - 0.02)
    assert (by_time.steady_bytes, by_time.steady_s, by_time.bits_per_s()) == (700, 7.0, 800.0)
    assert SteadyRate(skip_bytes=0).bits_per_s() is None


@pytest.mark.parametrize(("measured", "said"), [(72.1e6, False), (71.9e6, True), (87.9e6, False), (88.1e6, True)])
def test_ten_per_cent_are_let_pass(measured: float, said: bool) -> None:
    check = LinkCheck(name="x", configured_bits_per_s=80e6, measured_bits_per_s=measured)
    assert (check.warning is not None) == said == check.misses


def test_a_round_trip_that_is_longer_than_configured_is_said() -> None:
    assert round_trip_warning("round trip", 0.050, 0.0565) is None
    line = round_trip_warning("round trip", 0.050, 0.080)
    assert line
    assert "50 ms, measured 80 ms (+60.0%" in line


@pytest.mark.parametrize("tries", [1, 3])
def test_what_answers_a_probe_is_counted_as_the_probe(tries: int) -> None:
    """So the ratio of a run does not depend on how often its links were tried."""

    async def story() -> None:
        loop = asyncio.get_running_loop()
        upper, lower = make_link(0, "80mbit,5ms", loop.time), make_link(1, "80mbit,5ms", loop.time)
        (down_read, down_write), (up_read, up_write) = path("none"), path("none")
        ends = [
            asyncio.create_task(upper.attach(up_read, down_write, speaks_first=True, greeting_timeout_s=30)),
            asyncio.create_task(lower.attach(down_read, up_write, speaks_first=False, greeting_timeout_s=30)),
        ]

        async def consume() -> None:
            while True:
                await lower.receive()

        ends.append(asyncio.create_task(consume()))
        await asyncio.gather(upper.opened.wait(), lower.opened.wait())
        greeting = lower.sent["control"]
        for _ in range(tries):
            await upper.probe(120)
        assert (lower.sent["control"], lower.sent["probe"] > 0) == (greeting, True)
        await upper.send(Message(kind=Kind.ACTIVATION, step=0, microbatch=0, body=bytes(2**16)))
        await asyncio.sleep(1)
        assert lower.sent["control"] > greeting
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)

    with asyncio.Runner(loop_factory=JumpingClock) as runner:
        runner.run(story())
