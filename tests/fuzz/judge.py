"""What every input is held to, whatever it is: an end, a bounded peak of memory, a bounded time.

A target takes the bytes that a stranger would send, feeds them to the code that reads them, and returns how often they
were taken and refused. Only the error class that the code names may come of a refusal, and its text has to be one line
that can be printed; whatever else escapes is a finding.

Memory is measured in two ways, because neither sees everything: `tracemalloc` (all that Python and NumPy allocate,
touched or not) where `exact` says so, which takes several times the time, and the process's peak resident size (also
what C++ and Rust allocate, once it is touched) around every input. Time is the thread's own, so that a busy machine
does not matter; a true hang is ended by whoever drives (libFuzzer's or pytest's timeout).
"""

from __future__ import annotations

import resource
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

CPU_S_MAX = 1.0
RESIDENT_SLACK_BYTES = 48 * 2**20  # allocators take memory in large pieces, and a collection may come at any moment
REASON_CHARACTERS_MAX = 2000


class Ends(NamedTuple):
    """How often an input, or a part of one, was taken and refused."""

    taken: int
    refused: int


class Finding(AssertionError):
    """An input that cost too much, or left something that it should not have changed."""


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of untrusted input. peak_bytes: the most that reading one input may take; see where it is computed."""

    name: str
    run: Callable[[bytes], Ends]
    mutate: Callable[[bytes, Random], bytes]
    seeds: list[bytes]
    peak_bytes: int
    input_bytes_max: int


def check_refusal(error: Exception) -> None:
    """What a stranger sent ends up on somebody's terminal."""
    text = str(error)
    if not text.isprintable() or len(text) > REASON_CHARACTERS_MAX:
        raise Finding(f"a refusal of {len(text)} characters that is not one printable line: {text[:200]!a}")


def judge(target: Target, data: bytes, *, exact: bool) -> Ends:
    """Run one input. Raises Finding, or whatever escaped from the code under test.

    What took too much is run once more and has to take it again: a table of the interpreter's own (of interned strings,
    say) that grows or is cleaned up in the middle of an input is no input's fault.
    """
    try:
        return _measured(target, data, exact=exact)
    except Finding:
        return _measured(target, data, exact=exact)


def _measured(target: Target, data: bytes, *, exact: bool) -> Ends:
    began, resident = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if exact:
        tracemalloc.start()
    try:
        ends = target.run(data)
        peak = tracemalloc.get_traced_memory()[1] if exact else 0
    finally:
        if exact:
            tracemalloc.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024
    if grown > target.peak_bytes + RESIDENT_SLACK_BYTES:  # a peak of all times: it will not rise again
        raise MemoryError(f"{target.name}: {len(data)} bytes made the process {grown} bytes larger")
    if peak > target.peak_bytes:
        raise Finding(f"{target.name}: {len(data)} bytes took {peak} bytes of memory, at most {target.peak_bytes}")
    if (spent := time.thread_time() - began) > CPU_S_MAX:
        raise Finding(f"{target.name}: {len(data)} bytes took {spent:.2f} s of the processor, at most {CPU_S_MAX}")
    return ends
