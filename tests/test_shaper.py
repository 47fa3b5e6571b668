"""The link model under a virtual clock: its caps hold, late callers lose nothing, control goes first."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinpipe.protocol.wire_size import framed_bytes
from thinpipe.sim.links.shaper import BusyMeter, LinkError, LinkProfile, Shaper, WireQueue

KIB = 1024
CHUNK_BYTES = 128 * KIB
UNCAPPED = LinkProfile.parse("none")

rates = st.floats(1e6, 1e9).map(lambda rate: round(rate, -3))
capped_profiles = st.builds(
    LinkProfile,
    rate_bits_per_s=rates,
    latency_s=st.floats(0, 0.2),
    burst_bytes=st.sampled_from([1, 1500, 16 * KIB, 64 * KIB]),
)
frame_sizes = st.integers(1, 256 * KIB)
seeds = st.integers(0, 2**32)


# --- LinkProfile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "canonical"),
    [
        ("300mbit,25ms", (300e6, 0.025, 0, 16384), "300mbit,25ms"),
        ("300mbit,25ms,jitter=2ms,burst=64kb", (300e6, 0.025, 0.002, 65536), "300mbit,25ms,jitter=2ms,burst=64kb"),
        ("none", (None, 0, 0, 16384), "none"),
        ("25ms", (None, 0.025, 0, 16384), "25ms"),
        ("80mbit", (80e6, 0, 0, 16384), "80mbit"),
        (" 0.3GBit , 0.025 S, BURST = 1MB ", (300e6, 0.025, 0, 2**20), "300mbit,25ms,burst=1mb"),
        ("25ms,80000kbit", (80e6, 0.025, 0, 16384), "80mbit,25ms"),
        ("1.5gbit,500us,jitter=.5us,burst=1500b", (1.5e9, 5e-4, 5e-7, 1500), "1.5gbit,500us,jitter=0.5us,burst=1500b"),
        ("0ms", (None, 0, 0, 16384), "none"),
        ("80mbit, KERNEL = rate,25ms", (80e6, 0.025, 0, 16384), "80mbit,25ms,kernel=rate"),
        ("80mbit,25ms,kernel=all", (80e6, 0.025, 0, 16384), "80mbit,25ms,kernel=all"),
    ],
)
def test_spelling(text, expected, canonical):
    profile = LinkProfile.parse(text)
    assert (profile.rate_bits_per_s, profile.latency_s, profile.jitter_s, profile.burst_bytes) == expected
    assert str(profile) == canonical
    assert LinkProfile.parse(canonical) == profile


@given(
    rate=st.none() | st.floats(0, exclude_min=True, allow_infinity=False),
    latency=st.floats(0, allow_infinity=False),
    jitter_share=st.floats(0, 1),
    burst=st.integers(1, 2**32 - 1),
)
def test_spelling_reads_back_to_the_bit(rate, latency, jitter_share, burst):
    profile = LinkProfile(
        rate_bits_per_s=rate,
        latency_s=latency,
        jitter_s=latency * jitter_share,
        burst_bytes=16384 if rate is None else burst,
    )
    assert LinkProfile.parse(str(profile)) == profile


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not a number with a unit"),
        (" ", "not a number with a unit"),
        ("300mbit,", "not a number with a unit"),
        ("300", "not a number with a unit"),
        ("mbit", "not a number with a unit"),
        ("-5mbit", "not a number with a unit"),
        ("nanmbit", "not a number with a unit"),
        ("none,25ms", "not a number with a unit"),
        ("300mbit\n,x", "not a number with a unit"),
        ("300mbps", "unknown unit 'mbps' in '300mbps', known are gbit, mbit, kbit, s, ms, us"),
        ("300mb", "unknown unit 'mb'"),
        ("300mbit,25ms,jitter=2mbit", "unknown unit 'mbit' in 'jitter=2mbit', known are s, ms, us"),
        ("300mbit,burst=64kbit", "unknown unit 'kbit' in 'burst=64kbit', known are mb, kb, b"),
        ("300mbit,loss=2ms", "unknown setting 'loss'"),
        ("0mbit", "not a positive number"),
        ("9" * 400 + "mbit", "not a positive number"),
        ("300mbit,80mbit", "says its rate twice"),
        ("25ms,1s", "says its latency twice"),
        ("300mbit,jitter=2ms", "jitter 0.002 s is not between 0 and latency 0.0 s"),
        ("300mbit,25ms,jitter=26ms", "jitter 0.026 s is not between 0 and latency 0.025 s"),
        ("300mbit,burst=0b", "burst 0 bytes is not between"),
        ("300mbit,burst=4096mb", "burst 4294967296 bytes is not between"),
        ("300mbit,burst=0.3b", "not a whole number"),
        ("25ms,burst=64kb", "does nothing without a rate"),
        ("25ms,kernel=rate", "says nothing without a rate"),
        ("80mbit,kernel=", "neither rate nor all"),
        ("80mbit,kernel=tbf", "neither rate nor all"),
        ("80mbit,kernel=rate,kernel=all", "said once"),
    ],
)
def test_malformed_links_are_refused_in_one_line_with_an_example(text, fault):
    with pytest.raises(LinkError) as error:
        LinkProfile.parse(text)
    assert fault in str(error.value)
    assert "300mbit,25ms" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_kernel_does_is_not_applied_again():
    whole = "80mbit,25ms,jitter=2ms,burst=64kb"
    assert LinkProfile.parse(whole).applied == LinkProfile.parse(whole)
    assert LinkProfile.parse(f"{whole},kernel=rate").applied == LinkProfile.parse("25ms,jitter=2ms")
    assert LinkProfile.parse(f"{whole},kernel=all").applied == UNCAPPED


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(LinkError, match="not a positive number"):
        LinkProfile(rate_bits_per_s=rate)
    with pytest.raises(LinkError, match="latency"):
        LinkProfile(rate_bits_per_s=1e6, latency_s=math.nan if rate == 0 else -1.0)


def test_bandwidth_delay_product():
    link = LinkProfile.parse("300mbit,25ms")
    assert link.bandwidth_delay_product_bytes() == 1_875_000  # 300e6 / 8 * 0.05
    assert link.bandwidth_delay_product_bytes(0.1) == 3_750_000
    assert UNCAPPED.bandwidth_delay_product_bytes() is None
    assert link.serialisation_s(37_500) == pytest.approx(1e-3)
    assert UNCAPPED.serialisation_s(10**9) == 0


# --- the rate ---------------------------------------------------------------------------------------------------------


def drive(profile, frames, lateness=lambda: 0.0, shaper=None):
    """Send (push time, bytes, control) frames over a link as the transport does; the caller wakes `lateness()` late.

    Returns (entry, passage, time handed over on the virtual clock) in wire order.
    """
    shaper = shaper or Shaper(profile)
    frames = sorted(frames, key=lambda frame: frame[0])
    queue, sent, now, next_frame = WireQueue(), [], -math.inf, 0
    while queue or next_frame < len(frames):
        while next_frame < len(frames) and frames[next_frame][0] <= now:
            at, nbytes, control = frames[next_frame]
            queue.push(next_frame, nbytes, control=control, now_s=at)
            next_frame += 1
        while queue:
            free = shaper.wire_free_at(queue.ready_s())
            if free > now:
                break
            entry = queue.pop(at_s=free)
            passage = shaper.admit(entry.nbytes, entry.enqueued_s)
            sent.append((entry, passage, max(now, passage.arrive_s)))
        wakes = [free] if queue else []
        wakes += [frames[next_frame][0]] if next_frame < len(frames) else []
        if wakes:
            now = max(now, min(wakes) + lateness())
    return sent


def check_rate_is_the_cap(profile, cap_bits_per_s, seed, late_s=0.03):
    """A backlog of random frames, each wake-up up to `late_s` late, is handed over at the cap, within 3 %."""
    source = random.Random(seed)
    frames = [(5.0, source.randint(1 * KIB, 256 * KIB), False) for _ in range(150)]
    sent = drive(profile, frames, lambda: source.uniform(0, late_s))
    handed_over_s = max(at for *_, at in sent) - 5.0 - profile.latency_s
    rate = sum(entry.nbytes for entry, *_ in sent) * 8 / handed_over_s if handed_over_s else math.inf
    assert rate == pytest.approx(cap_bits_per_s, rel=0.03), f"{rate:.4g} bit/s over a cap of {cap_bits_per_s:.4g}"


@given(rate=st.floats(10e6, 100e6), latency=st.floats(0, 0.1), seed=seeds)
@settings(deadline=None, max_examples=40)
def test_long_run_rate_is_the_cap(rate, latency, seed):
    check_rate_is_the_cap(LinkProfile(rate_bits_per_s=rate, latency_s=latency), rate, seed)


@pytest.mark.parametrize("text", ["none", "25ms"])
def test_without_the_shaper_the_rate_test_fails(text):
    for cap in (10e6, 80e6, 300e6):
        with pytest.raises(AssertionError, match="over a cap"):
            check_rate_is_the_cap(LinkProfile.parse(text), cap, seed=1)


def test_a_caller_that_does_not_say_when_frames_could_have_gone_loses_rate():
    # Why admit takes eligible_at_s: the same late caller, passing its own clock instead, falls under the cap.
    profile, source = LinkProfile.parse("300mbit,burst=1500b"), random.Random(3)
    ideal, naive, now = Shaper(profile), Shaper(profile), 0.0
    for _ in range(200):
        now = naive.admit(CHUNK_BYTES, now).depart_s + source.uniform(0, 2e-3)
        ideal_s = ideal.admit(CHUNK_BYTES, 0.0).depart_s
    assert 200 * CHUNK_BYTES * 8 / ideal_s == pytest.approx(300e6, rel=0.01)
    assert 200 * CHUNK_BYTES * 8 / now < 0.85 * 300e6


@given(
    profile=capped_profiles,
    jitter_share=st.sampled_from([0.0, 0.3]),
    gaps=st.lists(st.tuples(st.floats(0, 0.02), frame_sizes, st.booleans()), min_size=1, max_size=40),
)
@settings(deadline=None)
def test_no_interval_passes_more_than_rate_burst_and_one_frame(profile, jitter_share, gaps):
    profile = replace(profile, jitter_s=profile.latency_s * jitter_share)
    at, frames = 100.0, []
    for gap, nbytes, control in gaps:
        at += gap
        frames.append((at, nbytes, control))
    shaper = Shaper(profile, random=7)
    sent = drive(profile, frames, shaper=shaper)
    assert shaper.passed_bytes == sum(nbytes for _, nbytes, _ in frames)
    assert all(a[1].arrive_s <= b[1].arrive_s for a, b in pairwise(sent)), "arrivals are monotone"
    assert all(a[1].depart_s <= b[1].depart_s for a, b in pairwise(sent)), "departures are monotone"
    largest = max(nbytes for _, nbytes, _ in frames)
    for which, slack_s in (("depart_s", 1e-9), ("arrive_s", 1e-9 + 2 * profile.jitter_s)):
        for first in range(len(sent)):
            total = 0
            for entry, passage, _ in sent[first:]:
                total += entry.nbytes
                elapsed_s = getattr(passage, which) - getattr(sent[first][1], which) + slack_s
                assert total <= profile.rate_bits_per_s / 8 * elapsed_s + profile.burst_bytes + largest


@given(seed=seeds, late_s=st.sampled_from([1e-4, 0.01, 0.2]))
@settings(deadline=None, max_examples=30)
def test_lateness_changes_no_ideal_time(seed, late_s):
    source = random.Random(seed)
    profile = LinkProfile.parse("80mbit,25ms")
    frames = [(source.uniform(0, 1), source.randint(1, 256 * KIB), source.random() < 0.3) for _ in range(60)]
    punctual = drive(profile, frames)
    late = drive(profile, frames, lambda: source.uniform(0, late_s))
    assert [(entry, passage) for entry, passage, _ in late] == [(entry, passage) for entry, passage, _ in punctual]


def test_idle_time_accumulates_one_burst_and_no_more():
    profile = LinkProfile.parse("80mbit,burst=64kb")
    for idle_s in (1.0, 1000.0):
        shaper = Shaper(profile)
        shaper.admit(10 * 2**20, 0.0)
        start = shaper.wire_free_at(0.0) + idle_s
        departs = [shaper.admit(32 * KIB, start).depart_s for _ in range(4)]
        assert departs[:2] == [start, start]
        assert departs[2] == pytest.approx(start + profile.serialisation_s(32 * KIB))
        assert departs[3] == pytest.approx(start + 2 * profile.serialisation_s(32 * KIB))


def test_a_frame_larger_than_the_burst_passes_and_pays_the_difference():
    profile = LinkProfile.parse("80mbit,25ms,burst=16kb")
    shaper = Shaper(profile)
    passage = shaper.admit(256 * KIB, 1.0)
    assert passage.depart_s == pytest.approx(1.0 + profile.serialisation_s(240 * KIB))
    assert shaper.admit(16 * KIB, 1.0).depart_s == pytest.approx(1.0 + profile.serialisation_s(256 * KIB))


def test_two_producers_share_one_bucket():
    profile = LinkProfile.parse("80mbit")
    cap = profile.rate_bits_per_s

    def summed_rate(shapers):
        last = [shapers[i % 2].admit(CHUNK_BYTES, 0.0).depart_s for i in range(200)]
        return 200 * CHUNK_BYTES * 8 / max(last)

    shared = Shaper(profile)
    assert summed_rate([shared, shared]) == pytest.approx(cap, rel=0.03)
    assert summed_rate([Shaper(profile), Shaper(profile)]) == pytest.approx(2 * cap, rel=0.03)


# --- the delay line ---------------------------------------------------------------------------------------------------


@given(rate=st.none() | rates, latency=st.floats(0, 1), sizes=st.lists(frame_sizes, min_size=1, max_size=20))
def test_latency_is_exact_without_jitter(rate, latency, sizes):
    shaper = Shaper(LinkProfile(rate_bits_per_s=rate, latency_s=latency))
    for index, nbytes in enumerate(sizes):
        passage = shaper.admit(nbytes, index * 1e-3)
        assert passage.arrive_s == passage.depart_s + latency
        if rate is None:
            assert passage.depart_s == index * 1e-3


def test_jitter_is_bounded_deterministic_and_uniform_around_the_latency():
    profile = LinkProfile.parse("300mbit,25ms,jitter=5ms")

    def delays(seed):
        shaper = Shaper(profile, random=seed)  # frames a second apart: the order cannot bind
        passages = [shaper.admit(1500, float(second)) for second in range(2000)]
        return [passage.arrive_s - passage.depart_s for passage in passages]

    first = delays(1)
    assert first == delays(1)
    assert first != delays(2)
    assert all(0.020 - 1e-9 <= delay <= 0.030 + 1e-9 for delay in first)
    assert min(first) < 0.0205
    assert max(first) > 0.0295
    assert sum(first) / len(first) == pytest.approx(0.025, abs=0.0005)


@pytest.mark.parametrize(("value", "delay_s"), [(0.0, 0.020), (0.5, 0.025), (1.0, 0.030)])
def test_jitter_takes_its_randomness_from_the_caller(value, delay_s):
    shaper = Shaper(LinkProfile.parse("25ms,jitter=5ms"), random=lambda: value)
    assert shaper.admit(1, 3.0).arrive_s == pytest.approx(3.0 + delay_s)


def test_jitter_never_reorders():
    shaper = Shaper(LinkProfile.parse("25ms,jitter=25ms"), random=iter([1.0, 0.0, 0.5]).__next__)
    arrivals = [shaper.admit(1, at).arrive_s for at in (0.0, 0.001, 1.0)]
    assert arrivals == pytest.approx([0.05, 0.05, 1.025])


# --- control ahead of tensors -----------------------------------------------------------------------------------------


@given(seed=seeds, late_s=st.sampled_from([0.0, 0.02]))
@settings(deadline=None, max_examples=40)
def test_control_waits_for_at_most_one_chunk(seed, late_s):
    source = random.Random(seed)
    profile = LinkProfile.parse("80mbit,25ms")
    tensors = [(0.0, CHUNK_BYTES, False)] * 80  # about a second of backlog
    controls = [(0.1 * n + source.uniform(0, 0.05), 200, True) for n in range(1, 10)]
    sent = drive(profile, tensors + controls, lambda: source.uniform(0, late_s))
    waits = [p.depart_s - entry.enqueued_s for entry, p, _ in sent if entry.control]
    assert len(waits) == 9
    assert max(waits) <= profile.serialisation_s(CHUNK_BYTES + 200) + 1e-9
    # The control that makes this a test: in one class, a control frame stands behind the backlog.
    sent = drive(profile, tensors + [(at, nbytes, False) for at, nbytes, _ in controls])
    assert max(p.depart_s - entry.enqueued_s for entry, p, _ in sent if entry.nbytes == 200) > 0.5


@given(pushes=st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=30))
def test_queue_is_first_in_first_out_within_each_class(pushes):
    queue = WireQueue()
    for index, (control, nbytes) in enumerate(pushes):
        queue.push(index, nbytes, control=control, now_s=float(index))
    order = []
    while queue:
        assert queue.queued_bytes == sum(n for i, (_, n) in enumerate(pushes) if i not in order)
        assert len(queue) == len(pushes) - len(order)
        head = queue.peek()
        assert queue.pop() == head
        order.append(head.item)
    assert order == sorted(range(len(pushes)), key=lambda i: (not pushes[i][0], i))
    assert queue.queued_bytes == 0
    assert (queue.peek(), queue.peek_tensor(), queue.ready_s()) == (None, None, math.inf)
    with pytest.raises(IndexError):
        queue.pop()


def test_queue_chooses_as_of_a_moment():
    queue = WireQueue()
    queue.push("tensor", 10, control=False, now_s=1.0)
    queue.push("control", 10, control=True, now_s=2.0)
    assert queue.ready_s() == 1.0
    assert queue.ready_s(control_only=True) == 2.0
    assert queue.peek(at_s=0.5).item == "tensor"  # nothing was there yet: the first to come
    assert queue.peek(at_s=1.5).item == "tensor"
    assert queue.peek(at_s=2.0).item == "control"
    assert queue.peek().item == "control"
    assert queue.peek_tensor().item == "tensor"
    assert queue.pop(control_only=True).item == "control"
    assert queue.peek(control_only=True) is None
    assert queue.ready_s(control_only=True) == math.inf
    with pytest.raises(IndexError):
        queue.pop(control_only=True)
    assert queue.pop().item == "tensor"


# --- BusyMeter --------------------------------------------------------------------------------------------------------


def test_meter_counts_busy_time_only():
    meter = BusyMeter()
    assert meter.rate_bits_per_s() is None
    meter.begin(10.0)
    assert meter.busy
    assert meter.rate_bits_per_s() is None
    meter.delivered(1000, 11.0)
    assert meter.rate_bits_per_s() == 8000
    meter.delivered(1000, 12.0)
    meter.end(12.0)
    meter.begin(100.0)  # 88 idle seconds do not count
    meter.delivered(500, 100.5)
    meter.end(101.0)
    assert (meter.busy_s, meter.busy_bytes, meter.intervals, meter.busy) == (3.0, 2500, 2, False)
    assert meter.rate_bits_per_s() == pytest.approx(2500 * 8 / 3)


def test_meter_counts_overlapping_ideal_times_once():
    meter = BusyMeter()
    meter.begin(0.0)
    meter.delivered(1000, 2.0)
    meter.end(2.0)  # a departure that lies ahead of the clock
    meter.begin(1.0)
    meter.delivered(1000, 3.0)
    meter.end(3.0)
    assert meter.busy_s == 3.0


def test_meter_refuses_misuse():
    meter = BusyMeter()
    for call in (lambda: meter.delivered(1, 0.0), lambda: meter.end(0.0)):
        with pytest.raises(ValueError, match="while idle; call begin"):
            call()
    meter.begin(0.0)
    with pytest.raises(ValueError, match="while busy"):
        meter.begin(1.0)
    meter.end(0.0)
    assert meter.rate_bits_per_s() is None


@given(rate=st.floats(10e6, 500e6), seed=seeds)
@settings(deadline=None, max_examples=20)
def test_meter_over_the_shaper_reads_the_cap_though_the_link_idles(rate, seed):
    source = random.Random(seed)
    profile, meter = LinkProfile(rate_bits_per_s=rate), BusyMeter()
    shaper = Shaper(profile)
    at = 0.0
    for _ in range(4):
        meter.begin(at)
        for _ in range(40):
            nbytes = source.randint(1 * KIB, 256 * KIB)
            passage = shaper.admit(nbytes, at)
            meter.delivered(nbytes, passage.depart_s)
        meter.end(passage.depart_s)
        at = passage.depart_s + source.uniform(0.5, 5)
    assert meter.busy_bytes == shaper.passed_bytes
    assert rate <= meter.rate_bits_per_s() <= rate * 1.03
    excess_bits = meter.intervals * profile.burst_bytes * 8
    assert meter.rate_bits_per_s() <= rate + excess_bits / meter.busy_s * (1 + 1e-9)


def send_messages(profile, messages, *, late_s=0.0):
    """A meter after `messages`, (pause before it, bytes), in chunks of 64 KiB; each frame leaves `late_s` late."""
    shaper, meter = Shaper(profile), BusyMeter(least_bytes=profile.burst_bytes + 25_000)
    at = 100.0
    for pause_s, nbytes in messages:
        at += pause_s
        queued_s = at
        while nbytes:
            part = min(nbytes, 64 * KIB)
            passage = shaper.admit(part, queued_s)
            left_s = passage.depart_s + late_s
            meter.passed(part, enqueued_s=queued_s, paid_from_s=passage.paid_from_s, left_s=left_s, tensor=True)
            nbytes -= part
        at = max(at, left_s)
    return meter


@given(
    messages=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200 * KIB)), min_size=1, max_size=30),
    burst=st.sampled_from([1, 16 * KIB, 64 * KIB]),
)
@settings(deadline=None)
def test_short_messages_never_measure_faster_than_the_cap(messages, burst):
    """Also where messages that are too short to tell, and are left out, come between."""
    profile = LinkProfile(rate_bits_per_s=4e6, burst_bytes=burst)
    meter = send_messages(profile, messages)
    if rate := meter.rate_bits_per_s():
        assert rate <= 4e6 * (1 + 1e-6)  # of rounding


@pytest.mark.parametrize("nbytes", [50 * KIB, 70 * KIB, 133 * KIB])
@pytest.mark.parametrize("pause_s", [0.001, 0.01, 0.0327, 0.5])
def test_short_messages_over_an_idle_link_measure_the_cap(nbytes, pause_s):
    """4 Mb/s, where the bucket's 16 KiB are an eighth of a message of `tiny` (133 KB) and a third of the shortest."""
    meter = send_messages(LinkProfile.parse("4mbit"), [(pause_s, nbytes)] * 50)
    assert meter.rate_bits_per_s() == pytest.approx(4e6, rel=1e-9)
    assert meter.busy_bytes == 50 * nbytes
    late = send_messages(LinkProfile.parse("4mbit"), [(pause_s, nbytes)] * 50, late_s=0.001)
    assert 0.985 * 4e6 < late.rate_bits_per_s() < 4e6


def test_long_transfers_measure_as_before():
    """One stretch of 8 MB at 300 Mb/s: its credit is 0.2 % of it."""
    meter = send_messages(LinkProfile.parse("300mbit"), [(1.0, 8_000_000)])
    assert meter.rate_bits_per_s() == pytest.approx(300e6, rel=1e-9)
    assert meter.intervals == 1


def test_what_the_credit_alone_carries_is_no_measurement():
    meter = send_messages(LinkProfile.parse("4mbit"), [(1.0, 4 * KIB)] * 20)
    meter.end(1000.0)
    assert meter.rate_bits_per_s() is None


def test_a_path_slower_than_the_cap_measures_what_it_carried():
    """The cap is 4 Mb/s; frames leave at 1: the credit hides little of that."""
    shaper, meter = Shaper(LinkProfile.parse("4mbit")), BusyMeter()
    for number in range(20):
        queued_s = 100.0 + 10 * number
        passage = shaper.admit(64 * KIB, queued_s)
        meter.passed(
            64 * KIB,
            enqueued_s=queued_s,
            paid_from_s=passage.paid_from_s,
            left_s=queued_s + 64 * KIB * 8 / 1e6,
            tensor=True,
        )
    assert meter.rate_bits_per_s() == pytest.approx(1e6, rel=0.07)


def test_a_cap_that_does_not_hold_measures_faster():
    """Frames that leave 10 % early show it."""
    shaper, meter = Shaper(LinkProfile.parse("4mbit")), BusyMeter()
    for number in range(20):
        queued_s = 100.0 + 10 * number
        for _ in range(4):
            passage = shaper.admit(64 * KIB, queued_s)
            left_s = queued_s + (passage.depart_s - queued_s) * 0.9
            meter.passed(64 * KIB, enqueued_s=queued_s, paid_from_s=passage.paid_from_s, left_s=left_s, tensor=True)
    assert meter.rate_bits_per_s() > 1.08 * 4e6


# --- framing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "framed"),
    [
        (0, 5 + 9),
        (1, 6 + 9),
        (16379, 16384 + 9),  # with its prefix exactly one DATA frame
        (16380, 16385 + 18),
        (2 * 16384 - 5, 2 * 16384 + 18),
        (128 * KIB, 128 * KIB + 5 + 9 * 9),  # the prefix pushes eight full frames into a ninth
    ],
)
def test_framed_bytes(message, framed):
    assert framed_bytes(message) == framed


def test_framing_refuses_a_negative_size():
    with pytest.raises(ValueError, match="-1 bytes"):
        framed_bytes(-1)
    with pytest.raises(ValueError, match="-1 bytes"):
        Shaper(UNCAPPED).admit(-1, 0.0)


def test_meter_leaves_out_intervals_that_are_too_short_to_measure() -> None:
    meter = BusyMeter(least_bytes=1000)
    meter.begin(0.0)
    meter.delivered(999, 0.9)  # one late message says how late the sender woke up, not how fast the link is
    meter.end(0.9)
    assert (meter.rate_bits_per_s(), meter.intervals) == (None, 0)
    meter.begin(1.0)
    meter.delivered(1000, 1.1)
    meter.end(1.1)
    assert meter.rate_bits_per_s() == pytest.approx(80_000)
    meter.begin(2.0)
    meter.delivered(10, 2.8)
    meter.end(2.8)
    assert meter.rate_bits_per_s() == pytest.approx(80_000)
