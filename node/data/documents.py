"""Documents: one text after another, from whatever the user named, always in the same order.

What: `open_source` turns `data.source` into a `Source`: a digest of its content and a reader that yields documents.
A file of text is one document, a row of jsonl or parquet is one, a file of the Python standard library is one.

How: local_files.py says which files those are, readers.py reads them in parts, so that a document of any size takes the
same memory. The digest is over the files' bytes, so that a cache entry made from them can be found again on any
machine. The embedded default reads the standard library itself: it needs no network, and is the same wherever the same
Python is.

Why not hash the path, size and time of a file, which is quicker? Two machines would never agree on it, and a file
edited within one clock tick would be missed. Why leave out part of the standard library? `test` directories are 20 MB
of assertions, and `encodings` is 1.4 MB of tables that are near copies of each other: some would be held out while
their twins are trained on, and the held-out loss would measure memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config_sections import DataSection
from .local_files import DataError, expanded, left_out_line, local_files
from .pieces import pieces
from .readers import Part, read_documents

HELDOUT_SHARE = 0.05

_STDLIB_SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
_STDLIB_SKIPPED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})  # the machine's, not Python's


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where documents come from. `read()` starts again from the first; empty documents are left out. size_bytes: of
    what is read; 0: unknown. remark: what the user should know of it."""

    name: str
    digest: str
    size_bytes: int
    read: Callable[[], Iterator[Part]]
    remark: str | None = None


class HeldoutRule:
    """Whether a document is never trained on: by its content, so that copies go the same way whatever their order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def update(self, part: str) -> None:
        self._hash.update(part.encode("utf-8", "surrogatepass"))

    @property
    def holds_out(self) -> bool:
        return int.from_bytes(self._hash.digest(), "big") < HELDOUT_SHARE * 2**64


def is_heldout(text: str) -> bool:
    rule = HeldoutRule()
    rule.update(text)
    return rule.holds_out


def open_source(settings: DataSection) -> Source:
    """The local files or the standard library that `settings.source` names.

    Raises DataError when nothing is there or the format cannot be told.
    """
    if settings.source == "stdlib":
        paths = _stdlib_files()
        return Source(
            name="the Python standard library",
            digest=files_digest(paths, "stdlib"),
            size_bytes=sum(path.stat().st_size for path in paths),
            read=lambda: _read_stdlib(paths),
        )
    found = local_files(expanded(settings.source), settings.format)
    field = "text" if found.kind == "text" else settings.text_field
    return Source(
        name=settings.source,
        digest=files_digest(found.paths, found.kind, field),
        size_bytes=sum(path.stat().st_size for path in found.paths),
        read=lambda: read_documents(found.paths, found.kind, field),
        remark=left_out_line(found, settings.source),
    )


def check_source(settings: DataSection) -> None:
    """Raises DataError where `open_source` would for what is not there, without reading what is. A dataset of a hub is
    not asked for."""
    if settings.source != "stdlib" and not settings.source.startswith("hf:"):
        local_files(expanded(settings.source), settings.format)


def files_digest(paths: Iterable[Path], *salt: str) -> str:
    """Hex SHA-256 over the bytes of files in the given order (not their names), and what else shapes the documents."""
    total = hashlib.sha256(json.dumps(salt).encode())
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
    return total.hexdigest()


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for directory, inside, names in os.walk(root):  # never into site-packages, which can be large
        top = Path(directory) == root
        inside[:] = set(inside) - _STDLIB_SKIPPED_DIRECTORIES
        inside[:] = [name for name in inside if not (top and name.startswith("config-"))]  # of where Python was built
        found += [
            Path(directory, name)
            for name in names
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and name not in _STDLIB_SKIPPED_FILES
        ]
    if not found:
        raise DataError(f"no source of the standard library in {root}; set data.source to a file or directory of text")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_stdlib(paths: list[Path]) -> Iterator[Part]:
    read_bytes = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            read_bytes += path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        if text:
            for piece, last in pieces(text):
                yield Part(piece, last, read_bytes)
