"""Memory that is free is given back, so that what a stage holds is what it uses.

glibc gives every thread a heap of its own, and a heap gives back only what is free at its end. A stage has a thread
that computes, one that packs, one that writes checkpoints, and those of the event loop and of gRPC; what one allocates,
another frees. So free pieces collect in the middle of a dozen heaps: what is in use stays the same to a MiB, and
resident memory creeps up. `malloc_trim` looks through all heaps and gives whole free pages back.

Why not one heap for all (M_ARENA_MAX): threads would wait for each other, and pieces collect in that one too. Why not
another allocator: it would have to be loaded before the process begins, on every machine. Where there is no glibc
(macOS, musl) nothing is done: their allocators give back by themselves, or cannot.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc; TypeError: Windows has no "this process"
        return None


def give_back_free_memory() -> bool:
    """Give free pages to the operating system; whether any were. Takes milliseconds, in which other threads that
    allocate may have to wait; lets go of the interpreter."""
    trim = _trim()
    return bool(trim and trim(0))
