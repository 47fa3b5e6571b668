"""The documents of a dataset one after the other, from any state that the reader was in, through hiccups of its source.

What: `FileDocuments` reads files of jsonl or parquet, `DatasetDocuments` whatever else `datasets` can stream; both can
`rewind` to a `state`. `PatientDocuments` is one of them whose source may be away for a moment.

How: after a fault of the network or the disk the documents are opened anew at the last known state, and those that were
read since are read again, so that the same ones follow. A pause doubles up to half a minute. After PATIENCE_S it gives
up: the other stages wait LEAST_S (node/receive_deadline.py) for a message, so to wait longer would help nobody. Why are
there two kinds of end? A misspelt name stays wrong however often it is tried; a server comes back, and a supervisor may
try again.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .local_files import DataError, first_line
from .readers import no_field, text_in, texts_of

PATIENCE_S = 240.0
PAUSE_MAX_S = 30.0
# What a disk says that will say the same again.
_STAYS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT, errno.ELOOP)
_OF_NETWORKS = ("aiohttp", "httpx", "httpx2", "httpcore", "requests", "urllib3")
State = dict[str, Any]
T = TypeVar("T")


class SourceLost(RuntimeError):
    """A source of documents stayed away: it may be there when the node is started again."""


class Documents(Protocol):
    """Texts in an order that can be found again. All raise DataError for what cannot be used, and errors of their
    libraries where a source is away."""

    source: str

    def rewind(self, state: State | None) -> None:
        """To the beginning (None), or to where `state` was taken."""
        ...

    def state(self) -> State:
        """Where the next document begins."""
        ...

    def next(self) -> str | None:
        """The next document, '' for an empty one, None at the end."""
        ...


class FileDocuments:
    """The rows of files of one kind (jsonl or parquet)."""

    def __init__(self, paths: list[Path], kind: str, field: str, source: str) -> None:
        self._paths, self._kind, self._field, self.source = paths, kind, field, source
        self._file = self._row = 0
        self._rows: Iterator[tuple[int, str, int]] | None = None

    def rewind(self, state: State | None) -> None:
        self._file, self._row = (state["file"], state["row"]) if state else (0, 0)
        self._rows = None

    def state(self) -> State:
        return {"file": self._file, "row": self._row}

    def next(self) -> str | None:
        while self._file < len(self._paths):
            if self._rows is None:
                self._rows = texts_of(self._paths[self._file], self._kind, self._field, skip=self._row)
            if row := next(self._rows, None):
                self._row, text, _ = row
                return text
            self._file, self._row, self._rows = self._file + 1, 0, None
        return None


class DatasetDocuments:
    """A dataset that the library `datasets` streams."""

    def __init__(self, open_dataset: Callable[[], Any], field: str, source: str) -> None:
        self._open, self._field, self.source = open_dataset, field, source
        self._dataset: Any = None
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._number = 0

    def rewind(self, state: State | None) -> None:
        self._dataset = self._open()
        if state is not None:
            self._dataset.load_state_dict(state)
        self._rows = iter(self._dataset)
        self._number = 0

    def state(self) -> State:
        return self._dataset.state_dict()

    def next(self) -> str | None:
        row = next(self._rows, None)
        if row is None:
            return None
        if self._field not in row:  # of all rows or of none: the library makes one table of them
            raise no_field(self._field, self.source, row)
        self._number += 1
        return text_in(row, self._field, f"row {self._number} of {self.source}")


class Patience:
    """Waits for a source that is away. say: is told when that begins, and when it ends."""

    def __init__(
        self,
        source: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = lambda line: print(f"thinpipe: warning: {line}", file=sys.stderr, flush=True),
    ) -> None:
        self._source, self._clock, self._pause, self._say = source, clock, pause, say

    def do(self, work: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """What `work` returns; `again` is tried in its place once it has failed. Raises DataError for a fault that will
        stay, SourceLost for a source that stayed away."""
        try:
            with _reported(self._source):
                return work()
        except _Away as error:
            reason = str(error)
        began, pause_s = self._clock(), 1.0
        self._say(f"{self._source} cannot be read for the moment: {reason}; trying again for {PATIENCE_S:g} s")
        while self._clock() - began < PATIENCE_S:
            self._pause(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
            with contextlib.suppress(_Away), _reported(self._source):
                result = (again or work)()
                self._say(f"{self._source} can be read again, after {self._clock() - began:.0f} s")
                return result
        raise SourceLost(f"{self._source} could not be read for {PATIENCE_S:g} s: {reason}; go on when it can be")


class PatientDocuments:
    """`documents`, waited for while they are away. Raises DataError for what cannot be used, and SourceLost."""

    def __init__(self, documents: Documents, patience: Patience | None = None) -> None:
        self._documents, self._patience = documents, patience or Patience(documents.source)
        self.source = documents.source
        self._state: State | None = None  # of the last rewind or question for the state
        self._since = 0  # documents read after it

    def rewind(self, state: State | None) -> None:
        self._state, self._since = state, 0
        self._patience.do(lambda: self._documents.rewind(state))

    def state(self) -> State:
        self._state, self._since = self._documents.state(), 0
        return self._state

    def next(self) -> str | None:
        text = self._patience.do(self._documents.next, self._next_anew)
        self._since += 1
        return text

    def _next_anew(self) -> str | None:
        self._documents.rewind(self._state)
        for _ in range(self._since):
            self._documents.next()
        return self._documents.next()

    def sample(self, characters: int) -> Iterator[str]:
        """Documents from the beginning until that many characters were given."""
        self.rewind(None)
        while characters > 0 and (text := self.next()) is not None:
            if text:
                characters -= len(text)
                yield text


class _Away(Exception):
    """The source cannot be reached, or not at present."""


@contextlib.contextmanager
def _reported(source: str) -> Iterator[None]:
    """Raises DataError for a fault that will stay, _Away for one that may pass."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # network, hub, file and parser faults have no common ancestor
        if _may_pass(error):
            raise _Away(first_line(error)) from None
        raise DataError(
            f"cannot read the dataset {source}: {first_line(error)}; check its name, the network and data.text_field"
        ) from None


def _may_pass(error: BaseException | None) -> bool:
    """Whether trying again can help: faults of the disk and the network, and what a busy server answers."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status in (408, 425, 429) or status >= 500
        of_library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) and (of_library == "datasets" or error.errno in _STAYS):
            return False  # the library's own: no such dataset, no such files
        if isinstance(error, OSError) or of_library in _OF_NETWORKS:
            return type(error).__name__ != "OfflineModeIsEnabled"
        error = error.__cause__
    return False
