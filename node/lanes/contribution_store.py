"""Contributions to rounds on a disk: this node's own until every peer has them, those of a peer until they are used.

Own ones have to outlive the step that made them, since a lane that was set back asks for them again; and a run with
checkpoints far apart keeps many. So they are files and not memory: DIRECTORY/ROUND-XXH3, with the checksum of the whole
in the name, and DIRECTORY/ROUND-XXH3-STAY where lanes had been left out before (`stays.Stays`). What is on its way is
DIRECTORY/.partial-ROUND-XXH3, and gets its name when all bytes are there and are the right ones. The name also tells
whether a machine that lost its power had written them: `restore` reads all that it finds. So nothing that comes is
flushed, since it can be asked for again; and own ones may be used before they are.

Why not in the checkpoints: those are written now and then, and a contribution is needed at once by who is waiting; and
what a peer has given can be asked for again, so it need not be in every copy of a state.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from ...protocol.round_transfer import Contribution, ContributionBytes, Position, StayOf
from ..checkpoints.durable_files import make, sync_directory

_WHOLE = re.compile(r"([0-9]{1,15})-([0-9a-f]{16})(?:-([0-9a-f]{1,12}))?")
_PARTIAL = re.compile(r"\.partial-([0-9]{1,15})-([0-9a-f]{16})")


class ContributionError(RuntimeError):
    """A contribution cannot be kept or used; the message is one line with the remedy."""


class ContributionStore:
    """The contributions of one node to rounds, or those of one peer, in a directory of their own.

    `kept` says which are whole. It is changed on the event loop alone, since others look at it there: by `keep`,
    `unkeep` and `unkeep_others`, when `write` or `append` is through, and before `remove`. All other methods touch the
    disk and belong on a thread; what is coming is one job at a time. They raise ContributionError for a disk that does
    not take or give what it should.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kept: dict[int, Contribution] = {}
        self._stays: dict[int, int] = {}  # of those

    def keep(self, round: int, made: Contribution, stay: int = 0) -> None:
        self.kept[round], self._stays[round] = made, stay

    def unkeep(self, before: int) -> list[Path]:
        """All earlier rounds are needed by nobody: they are for `remove`."""
        return self._unkeep([each for each in self.kept if each < before])

    def unkeep_others(self, stay_of: StayOf) -> list[Path]:
        """All that are not of the stay that counts: they are for `remove`."""
        return self._unkeep([each for each in self.kept if stay_of(each) != self._stays[each]])

    def _unkeep(self, rounds: list[int]) -> list[Path]:
        return [self._path(each, self.kept.pop(each), self._stays.pop(each)) for each in rounds]

    def restore(self) -> list[str]:
        """Find what an earlier process left. Returns a line for each file that was removed, being damaged."""
        lines: list[str] = []
        try:
            paths = list(self.directory.iterdir()) if self.directory.exists() else []
            paths.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
            for path in paths:
                if found := _WHOLE.fullmatch(path.name):
                    content, xxh3 = path.read_bytes(), int(found[2], 16)
                    if xxhash.xxh3_64_intdigest(content) == xxh3:
                        if int(found[1]) in self.kept:  # of another stay, and older
                            self.remove(self._unkeep([int(found[1])]))
                        made = Contribution(total_bytes=len(content), xxh3=xxh3)
                        self.keep(int(found[1]), made, int(found[3] or "0", 16))
                    else:
                        lines.append(f"{path} is damaged and was removed")
                        path.unlink()
                elif path.name.startswith(".") and not _PARTIAL.fullmatch(path.name):
                    path.unlink()  # was being written
        except OSError as error:
            raise ContributionError(f"{self.directory} cannot be read: {error.strerror}") from None
        return lines

    # -- whole ones ---------------------------------------------------------------------------------------------------

    def write(self, round: int, content: bytes | memoryview, stay: int = 0) -> Contribution:
        """Write one, which may be used then, and lost with the machine until `flush`. It may be there already, after a
        step that was done again, if it has the same bytes."""
        made = Contribution(total_bytes=len(content), xxh3=xxhash.xxh3_64_intdigest(content))
        if (before := self.kept.get(round)) is not None and self._stays[round] == stay:
            if before != made:
                raise ContributionError(
                    f"the contribution to round {round} was made again with other bytes (checksum {made.xxh3:016x}, "
                    f"before {before.xxh3:016x} in {self.directory}), and other lanes may have used the first ones; "
                    "start all lanes again from one checkpoint, without that directory"
                )
            return made
        temporary = self.directory / f".tmp-{round}"
        try:
            make(self.directory)
            temporary.write_bytes(content)
            temporary.rename(self._path(round, made, stay))
        except OSError as error:
            raise self._refusing(round, error) from None
        return made

    def flush(self, round: int, made: Contribution, stay: int = 0) -> None:
        """Have the disk know of it, unless it was removed."""
        try:
            with suppress(FileNotFoundError), self._path(round, made, stay).open("rb") as file:
                os.fsync(file.fileno())
                sync_directory(self.directory)
        except OSError as error:
            raise self._refusing(round, error) from None

    def read(self, round: int, offset: int, length: int) -> bytes:
        """Some of its bytes."""
        path = self._path(round, self.kept[round], self._stays[round])
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise ContributionError(f"{path} cannot be read: {error.strerror}") from None
        if len(data) != length:
            raise ContributionError(f"{path} ends at byte {offset + len(data)}, {offset + length} were written")
        return data

    def load(self, round: int) -> bytes:
        """All of them, with the right checksum."""
        made = self.kept[round]
        content = self.read(round, 0, made.total_bytes)
        if xxhash.xxh3_64_intdigest(content) != made.xxh3:
            path = self._path(round, made, self._stays[round])
            raise ContributionError(f"{path} is damaged; delete it and start this node again with --resume")
        return content

    def remove(self, dropped: Sequence[Path]) -> None:
        """Their files, too."""
        for path in dropped:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise ContributionError(f"{path} cannot be removed: {error.strerror}") from None

    # -- what is coming -----------------------------------------------------------------------------------------------

    def lacking(self, round: int, contribution_bytes: ContributionBytes) -> tuple[Position, int | None]:
        """Of this round and those after it: where the first that is not whole goes on and, if there is some of it, the
        checksum that the whole has to have. What is there of any other one goes."""
        while round in self.kept:
            round += 1
        found: tuple[Position, int | None] = ((round, 0), None)
        try:
            for path in self.directory.glob(".partial-*"):
                named = _PARTIAL.fullmatch(path.name)
                size = path.stat().st_size if named and int(named[1]) == round else 0
                if named and 0 < size < contribution_bytes(round) and not found[0][1]:
                    found = ((round, size), int(named[2], 16))
                else:
                    path.unlink()
        except OSError as error:
            raise ContributionError(f"{self.directory} cannot be read: {error.strerror}") from None
        return found

    def append(
        self,
        round: int,
        made: Contribution,
        offset: int,
        datas: Sequence[bytes | memoryview],
        stay: int = 0,
        check: Callable[[bytes], None] = lambda _: None,
    ) -> bool | None:
        """Its next bytes, which begin at `offset`. True: now it is whole; None: all bytes are there and have
        another checksum than `made`, so they are dropped; False: more have to come. What `check` raises of the whole is
        passed on, and they are dropped too: a file that has its name was checked."""
        path = self.directory / f".partial-{round}-{made.xxh3:016x}"
        try:
            make(self.directory)
            with path.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.writelines(datas)
                file.truncate()
                if file.tell() < made.total_bytes:
                    return False
            content = path.read_bytes()
            if xxhash.xxh3_64_intdigest(content) != made.xxh3:
                path.unlink()
                return None
            try:
                check(content)
            except BaseException:
                path.unlink()
                raise
            path.rename(self._path(round, made, stay))
        except OSError as error:
            raise self._refusing(round, error) from None
        return True

    def drop_partial(self) -> None:
        """Begin again with what is coming."""
        try:
            for path in self.directory.glob(".partial-*"):
                path.unlink()
        except OSError as error:
            raise ContributionError(f"{self.directory} cannot be cleared: {error.strerror}") from None

    # -- files --------------------------------------------------------------------------------------------------------

    def _path(self, round: int, made: Contribution, stay: int = 0) -> Path:
        return self.directory / (f"{round}-{made.xxh3:016x}" + (f"-{stay:x}" if stay else ""))

    def _refusing(self, round: int, error: OSError) -> ContributionError:
        where = f"to {self.directory}: {error.strerror}; make room there"
        return ContributionError(f"the contribution to round {round} cannot be written {where}")
