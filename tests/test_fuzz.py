"""A sample of `make fuzz`, without coverage: damaged and random input for all that reads a network or a disk.

Every input has all its allocations counted. What a finding looks like, and that it is seen, is tested at the end.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinpipe.node.checkpoints.manifest import MANIFEST, MANIFEST_BYTES_MAX, CheckpointError, read_manifest
from thinpipe.protocol import dictionary, dictionary_delta, messages, round_session
from thinpipe.protocol.errors import RemoteProtocolError

from .fuzz import judge as judging
from .fuzz.__main__ import NAMES
from .fuzz.judge import Ends, Finding, Target, check_refusal, judge
from .fuzz.targets import TARGETS

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
unhurried = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
DAMAGED = 200  # inputs for each target; `make fuzz` runs a million


@pytest.fixture(scope="module", autouse=True)
def _no_room_for_what_is_claimed() -> Iterator[None]:
    """A size that somebody only claims ends in a MemoryError, and not in the memory of the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damaged(target: Target, nth: int) -> bytes:
    """The nth of a fixed row of inputs: a seed that was damaged once to four times."""
    draw = Random(nth)
    data = draw.choice(target.seeds)
    for _ in range(draw.choice([1, 1, 2, 4])):
        data = target.mutate(data, draw)[: target.input_bytes_max]
    return data


def test_make_fuzz_drives_every_target() -> None:
    assert sorted(NAMES) == sorted(TARGETS)


@pytest.mark.parametrize("first", [0, pytest.param(DAMAGED, marks=pytest.mark.slow)])
@each_target
def test_damaged_input_is_taken_or_refused(target: Target, first: int) -> None:
    for data in target.seeds:
        target.run(data)  # what is imported and cached once is no input's fault
    ends = [judge(target, damaged(target, nth), exact=True) for nth in range(first, first + DAMAGED)]
    # The damage is of the kind that tells: much is refused, and much gets through to where a message is used.
    assert sum(end.refused for end in ends) > DAMAGED // 10
    assert sum(end.taken for end in ends) > DAMAGED // 30


@each_target
@given(data=st.data())
@unhurried
def test_random_input_is_taken_or_refused(target: Target, data: st.DataObject) -> None:
    raw = data.draw(st.binary(max_size=300))
    if data.draw(st.booleans()):
        seed = data.draw(st.sampled_from(target.seeds))
        at = data.draw(st.integers(0, len(seed)))
        raw = seed[:at] + raw + seed[at + data.draw(st.integers(0, 20)) :]
    judge(target, raw[: target.input_bytes_max], exact=True)


@each_target
def test_what_is_not_damaged_gets_through(target: Target) -> None:
    ends = [judge(target, data, exact=False) for data in target.seeds]
    assert sum(end.taken for end in ends) >= len(ends) // 3
    assert ends[0].taken
    assert not ends[0].refused


def test_a_library_cannot_print_what_a_file_says(tmp_path: Path) -> None:
    """What safetensors makes of a file quotes it as it is."""
    for text in ("\x1b[2J", "x" * 7000):
        head = json.dumps({"a": {"dtype": text, "shape": [0], "data_offsets": [0, 0]}}, ensure_ascii=False).encode()
        judge(TARGETS["checkpoints"], len(head).to_bytes(8, "little") + head, exact=True)
    error = CheckpointError(f"{tmp_path} is \x1b[2J\n{'x' * 10**6}; delete it")
    check_refusal(error)
    assert str(error).startswith(str(tmp_path))
    assert str(error).endswith("; delete it")


# -- what was found ---------------------------------------------------------------------------------------------------


def test_a_manifest_with_many_faults_is_refused_cheaply(tmp_path: Path) -> None:
    """A list of all that is wrong took a hundred times the bytes of the file."""
    tree = json.loads(TARGETS["manifests"].seeds[0])
    for bomb in ({"dictionaries": {f"{nth}": 0 for nth in range(5500)}}, {"dictionaries": {"table_above": tree}}):
        (tmp_path / MANIFEST).write_text(json.dumps({**tree, **bomb}))
        with pytest.raises(CheckpointError, match="is damaged: "):
            read_manifest(tmp_path)
    bomb = json.dumps({**tree, "dictionaries": {f"{nth:x}": 0 for nth in range(5500)}}).encode()
    assert len(bomb) < MANIFEST_BYTES_MAX
    judge(TARGETS["manifests"], bomb, exact=True)


# -- findings are seen ------------------------------------------------------------------------------------------------


def spoiled(run: Callable[[bytes], Ends]) -> Target:
    return replace(TARGETS["frames"], run=run, peak_bytes=2**20)


def test_what_costs_too_much_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def large(_: bytes) -> Ends:
        return Ends(len(bytearray(2**22)), 0)

    def untouched(_: bytes) -> Ends:
        return Ends(len(np.empty(2**40, np.uint8)), 0)

    def touched(_: bytes) -> Ends:
        below_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - psutil.Process().memory_info().rss
        return Ends(len(b"x" * (below_peak + judging.RESIDENT_SLACK_BYTES + 2**26)), 0)

    def endless(_: bytes) -> Ends:
        return Ends(sum(range(10**6)), 0)

    def raising(data: bytes) -> Ends:
        return Ends(data[2**20], 0)

    for run in (large, untouched):
        with pytest.raises((Finding, MemoryError)):
            judge(spoiled(run), b"", exact=True)
    with pytest.raises(IndexError):
        judge(spoiled(raising), b"", exact=True)
    with pytest.raises(MemoryError, match="larger"):
        judge(spoiled(touched), b"", exact=False)
    monkeypatch.setattr(judging, "CPU_S_MAX", 1e-6)
    with pytest.raises(Finding, match="of the processor"):
        judge(spoiled(endless), b"", exact=False)


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "x" * 5000], ids=ascii)
def test_a_refusal_that_cannot_be_printed_is_a_finding(text: str) -> None:
    with pytest.raises(Finding):
        check_refusal(ValueError(text))


def search(target: Target) -> None:
    for nth in range(3000):
        judge(target, damaged(target, nth), exact=False)


def nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "where", "what"),
    [
        ("frames", messages, "_check_head"),
        ("frames", messages, "check_text"),
        ("greetings", messages, "check_text"),
        ("deltas", dictionary_delta, "check_indices"),
        ("deltas", dictionary_delta, "check_delta"),
        ("rounds", round_session, "check_lateral"),
    ],
)
def test_a_check_that_is_left_out_is_found(
    name: str, where: object, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (where, dictionary) if where is dictionary_delta else (where,):  # a replica asks again
        monkeypatch.setattr(module, what, nothing)
    with pytest.raises(Exception) as caught:  # whatever a missing check leads to
        search(TARGETS[name])
    assert not isinstance(caught.value, RemoteProtocolError | CheckpointError)


def test_a_size_that_is_believed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = messages._head_from_pb

    def believing(head: messages.pb.MessageHead, limits: messages.Limits) -> messages.Head:
        return real(head, messages.Limits(message_bytes=2**64, chunk_bytes=limits.chunk_bytes))

    monkeypatch.setattr(messages, "_head_from_pb", believing)
    with pytest.raises((Finding, MemoryError, OverflowError)):
        search(TARGETS["frames"])
