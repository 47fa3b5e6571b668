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
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import DataSection
from .documents import DataError, first_line

FORMAT_VERSION = 1  # raise it when the same source would give other tokens or another layout


def content_key(*parts: object) -> str:
    """Hex SHA-256 of the parts that an entry in the cache was made from."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *parts]).encode()).hexdigest()


def cache_directory(settings: DataSection) -> Path:
    """`data.cache`, else $THINPIPE_CACHE, else ~/.cache/thinpipe."""
    return Path(settings.cache or os.environ.get("THINPIPE_CACHE") or "~/.cache/thinpipe").expanduser()


def make_directory(directory: Path) -> None:
    """Make the cache directory. Raises DataError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from None


def _unwritable(directory: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write to the cache directory {directory}: {error.strerror or first_line(error)}; "
        "set data.cache or THINPIPE_CACHE to one that can be written"
    )


def build_once(paths: list[Path], is_whole: Callable[[Path], bool], build: Callable[[list[Path]], None]) -> None:
    """Make files of the cache, unless all are there and whole. `build` gets the names to write aside.

    Raises DataError when the cache cannot be written; what `build` raises passes through.
    """
    if all(map(is_whole, paths)):
        return
    directory = paths[0].parent
    asides = [path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.aside") for path in paths]
    make_directory(directory)
    try:
        with _locked(paths[0].with_name(f"{paths[0].name}.lock")) as locked:
            if all(map(is_whole, paths)):  # another process built it while this one waited
                return
            if locked:  # then nobody is writing: what lies aside was left by a process that died
                for path in paths:
                    for left in directory.glob(f"{path.name}.*.aside"):
                        left.unlink(missing_ok=True)
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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True  # closing the file, or dying, lets go
