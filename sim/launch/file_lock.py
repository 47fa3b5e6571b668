"""A file that one process holds at a time, and that the kernel (`flock`) frees when it dies, whatever the cause.

A lock belongs to a descriptor: a child that is given it holds the lock too, and it is free once all of them are gone.
Why not a file that is made and removed, or a process id in one: what was killed removes nothing, and a number soon
names another process. The id that `sign` writes is for people only. The file stays when the lock is free: who removed
it might remove one that somebody has just taken.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class LockError(RuntimeError):
    """A lock that nobody can take; one line says why."""


def take(path: Path) -> int | None:
    """A descriptor that holds the lock of `path` until it is closed; None while somebody else holds it. The file is
    made if it is not there, its directory is not. Raises LockError."""
    try:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LockError(
            f"cannot open {path}: {error.strerror}; was it made by another user? Remove it, or start as that user"
        ) from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    except OSError as error:
        os.close(held)
        raise LockError(f"cannot lock {path}: {error.strerror}; choose a directory on another disk") from None
    return held


def sign(held: int) -> None:
    """Write down who holds it. Raises OSError."""
    os.ftruncate(held, 0)
    os.pwrite(held, f"{os.getpid()}\n".encode(), 0)


def holder(path: Path) -> str:
    """Who signed it last, in words for a person."""
    try:
        return f"process {int(path.read_text(encoding='ascii'))}"
    except (OSError, ValueError):  # taken a moment ago, and not signed yet
        return "another process"
