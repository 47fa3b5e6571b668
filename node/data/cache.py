"""The cache: files that are made once and then only read, by any number of processes.

What: `build_once` makes files under names that hold the digest of what they were made from (`content_key`), so nothing
in the cache is ever out of date, and all of it can be deleted at any time.

How: a file is written aside, synced and renamed into place, under a lock that lets one of several processes do the work
while the others wait. The rename alone is what makes it correct, because two builders write the same bytes; the lock
only saves work, so a file system without locks is no fault. Why not a lock file that is created and removed? It stays
behind when its process dies, and someone has to guess its age; `flock` ends with its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config_sections import DataSection
from .local_files import DataError, expanded, first_line

FORMAT_VERSION = 2  # raise it when the same source would give other tokens or another layout

_ASIDE = re.compile(r"(.+)\.\d+-\d+-[0-9a-f]+\.aside")


def content_key(*parts: object) -> str:
    """Hex SHA-256 of the parts that an entry in the cache was made from."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *parts]).encode()).hexdigest()


def cache_directory(settings: DataSection) -> Path:
    """`data.cache`, else $THINPIPE_CACHE, else ~/.cache/thinpipe."""
    return expanded(settings.cache or os.environ.get("THINPIPE_CACHE") or "~/.cache/thinpipe")


def make_directory(directory: Path) -> None:
    """Make the cache directory. Raises DataError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from None


def _unwritable(directory: Path, error: OSError) -> DataError:
    remedy = "set data.cache or THINPIPE_CACHE to one that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room, or set data.cache or THINPIPE_CACHE to a directory that has some"
    return DataError(
        f"cannot write to the cache directory {directory}: {error.strerror or first_line(error)}; {remedy}"
    )


def build_once(paths: list[Path], is_whole: Callable[[Path], bool], build: Callable[[list[Path]], None]) -> None:
    """Make files of the cache, unless all are there and whole. `build` gets the names to write aside.

    Raises DataError when the cache cannot be written; what `build` raises passes through.
    """
    if all(map(is_whole, paths)):
        return
    directory, first = paths[0].parent, paths[0].name
    # All begin with the name of their lock, so that whoever finds one left can tell whether its builder lives.
    asides = [
        directory / f"{first}.{number}-{os.getpid()}-{secrets.token_hex(4)}.aside" for number in range(len(paths))
    ]
    make_directory(directory)
    try:
        with _locked(directory / f"{first}.lock") as locked:
            if all(map(is_whole, paths)):  # another process built it while this one waited
                return
            if locked:  # then nobody is writing: what lies aside was left by a process that died
                _remove_asides(directory, first)
            sweep(directory)
            build(asides)
            for aside, path in zip(asides, paths, strict=True):
                with aside.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside, path)
    except OSError as error:
        raise _unwritable(directory, error) from None
    finally:
        for aside in asides:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Remove what dead builders of other entries left: those whose lock nobody holds."""
    for entry in {name[1] for path in directory.glob("*.aside") if (name := _ASIDE.fullmatch(path.name))}:
        with contextlib.suppress(OSError), (directory / f"{entry}.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_asides(directory, entry)


def _remove_asides(directory: Path, entry: str) -> None:
    for path in directory.glob("*.aside"):
        if (name := _ASIDE.fullmatch(path.name)) and name[1] == entry:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True  # closing the file, or dying, lets go
