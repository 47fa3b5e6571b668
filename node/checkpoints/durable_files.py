"""Crash-safe writing: a directory on disk gets its final name only when its content is complete.

A writer puts everything into a directory with a temporary name (`temporary_name`, which ends in the process's number),
flushes it, and renames it. So everything with a final name is complete, and what a dead process left can be told from
what a living one is writing.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path


def temporary_name(final: str) -> str:
    """For what will be called `final`."""
    return f".tmp-{final}-{os.getpid()}"


def incoming_path(directory: Path, stage: int) -> Path:
    """For a state of `stage` that is on its way here from another machine."""
    return directory / f".incoming-stage-{stage}-{os.getpid()}"


def sweep_incoming(directory: Path) -> None:
    """Put away what dead processes were receiving."""
    for left in directory.glob(".incoming-stage-*"):
        named = re.fullmatch(r"\.incoming-stage-[0-9]+-([0-9]+)", left.name)
        if named and not _lives(int(named[1])):
            left.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Whatever it is that bears the name."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def another_writes(temporary: Path) -> bool:
    """Whether another process, whose number the name ends in, may be at it still."""
    named = re.fullmatch(r"\.tmp-step-[0-9]+-([0-9]+)", temporary.name)
    return bool(named) and int(named[1]) != os.getpid() and _lives(int(named[1]))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def make(directory: Path) -> None:
    """Create a directory and its parents, and have the disk know of each."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """A rename or a new file is on the disk when its directory is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)
