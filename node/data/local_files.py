"""Which files a path names, in which order, and in which of three formats they are.

What: `local_files` gives the files of one format below a directory, or the one file; `opened` gives a file's bytes,
unpacked where it is compressed.

How: links are followed, to directories too, and each real directory is read once, so that a link to its own parent
ends. What a name does not tell is read off the first bytes: what compressed a file, and whether it is an archive or
another format that must not be taken for text. Why refuse an archive and not leave it out? Whoever put it there means
its content to be trained on, and would not notice that it was not.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

_FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_COMPRESSED = frozenset({".gz", ".xz", ".bz2", ".zst"})
_ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar"})
_HEAD_BYTES = 512
_COMPRESSION_OF_HEAD = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ARCHIVE_OF_HEAD = {b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar"}
_OTHER_OF_HEAD = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"%PDF-": "a PDF file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"SQLite format 3\x00": "an SQLite database",
}
_NAMES_SHOWN = 3


class DataError(ValueError):
    """Text, a tokenizer or the cache cannot be used; the message is one line that names which and the remedy."""


def expanded(path: str | Path) -> Path:
    """With the home directory for ~; ~NAME of nobody stays as it is."""
    return Path(os.path.expanduser(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
    """`paths` of one `kind` (text, jsonl, parquet), sorted. left_out: files of other kinds beside them."""

    paths: list[Path]
    kind: str
    left_out: list[str]


def local_files(root: Path, wanted: str) -> LocalFiles:
    """The file `root`, or the files of one format below the directory, but hidden ones; `wanted` is data.format.

    Raises DataError when nothing is there, for archives, and when the format cannot be told.
    """
    if root.is_file():
        _refuse_archive(root)
        return LocalFiles(paths=[root], kind=format_of(root) if wanted == "auto" else wanted, left_out=[])
    if not root.is_dir():
        raise DataError(
            f"no such file or directory: {root}; set data.source to text, jsonl, parquet, hf:NAME or stdlib"
        )
    files = files_below(root)
    if not files:
        raise DataError(f"the directory {root} holds no files; put text, jsonl or parquet there")
    for path in files:
        _refuse_archive(path)
    if wanted == "text":
        return LocalFiles(paths=files, kind="text", left_out=[])
    kinds = {format_of(path) for path in files}
    if wanted == "auto":
        # beside rows, plain files are a README or a licence; two kinds of rows are a question only the user can answer
        rows = sorted(kinds - {"text"})
        if len(rows) > 1:
            raise DataError(f"{root} holds both {' and '.join(rows)} files; choose one with data.format")
        wanted = rows[0] if rows else "text"
    chosen = [path for path in files if format_of(path) == wanted]
    if not chosen:
        raise DataError(f"{root} holds no {wanted} files, only {', '.join(sorted(kinds))}; change data.format")
    left_out = [path.relative_to(root).as_posix() for path in files if format_of(path) != wanted]
    return LocalFiles(paths=chosen, kind=wanted, left_out=left_out)


def left_out_line(found: LocalFiles, source: str) -> str | None:
    """What of a directory is not read, for people; None for nothing."""
    if not found.left_out:
        return None
    named = ", ".join(found.left_out[:_NAMES_SHOWN]) + (", ..." if len(found.left_out) > _NAMES_SHOWN else "")
    return (
        f"{source}: {len(found.paths)} {found.kind} files are read; {len(found.left_out)} others are left out ({named})"
    )


def files_below(root: Path) -> list[Path]:
    """All files below a directory, sorted by their paths in it, those behind links too. Hidden ones are left out.

    Raises DataError for a link that leads to nothing and a directory that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; mend or remove it")

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for directory, inside, names in os.walk(root, followlinks=True, onerror=unreadable):
        state = os.stat(directory)
        if (state.st_dev, state.st_ino) in seen:  # by another way; a link to a parent would lead here for ever
            inside.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for path in (Path(directory, name) for name in names if not name.startswith(".")):
            if path.is_file():
                found.append(path)
            elif path.is_symlink() and not path.exists():
                raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove it")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def format_of(path: Path) -> str:
    """text, jsonl or parquet, by the end of the name before that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _FORMAT_OF_SUFFIX.get(suffixes[-1], "text") if suffixes else "text"


def _refuse_archive(path: Path) -> None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and (suffixes[-1] in _ARCHIVES or (suffixes[-1] in _COMPRESSED and suffixes[0] == ".tar")):
        raise DataError(f"{path} is an archive; unpack it, and name the directory with its files")


def _name_of(head: bytes, names: dict[bytes, str]) -> str | None:
    return next((name for start, name in names.items() if head.startswith(start)), None)


def _refuse_other_formats(path: Path, head: bytes) -> None:
    archive = _name_of(head, _ARCHIVE_OF_HEAD) or ("tar" if head[257:262] == b"ustar" else None)
    if archive:
        raise DataError(f"{path} is a {archive} archive; unpack it, and name the directory with its files")
    if other := _name_of(head, _OTHER_OF_HEAD):
        raise DataError(f"{path} is {other}, not text; convert it, name it after its format, or remove it")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's bytes, decompressed by what it holds and not by its name; and the file itself, whose `tell()` says how
    far the reader is. Raises DataError where the file cannot be opened, is damaged, or is of a known other format."""
    try:
        with path.open("rb") as raw:
            compression = _name_of(raw.peek(_HEAD_BYTES)[:_HEAD_BYTES], _COMPRESSION_OF_HEAD)
            stream = io.BufferedReader(cast(io.RawIOBase, _decompressed(raw, compression))) if compression else raw
            _refuse_other_formats(path, stream.peek(_HEAD_BYTES)[:_HEAD_BYTES])
            yield stream, raw
    except gzip.BadGzipFile as error:
        raise damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # what bz2 says of bytes that it did not write
            raise damaged(path, error) from None
        raise
    except (EOFError, lzma.LZMAError, zstandard.ZstdError, zlib.error) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged: {first_line(error)}; mend or remove it")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _decompressed(raw: BinaryIO, compression: str) -> io.BufferedIOBase | io.RawIOBase:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if compression == "bzip2":
        return bz2.BZ2File(raw)
    return lzma.LZMAFile(raw) if compression == "xz" else _Zstd(raw)


class _Zstd(io.RawIOBase):
    """zstandard's own reader takes a file that breaks off for one that ends."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._plain:
            self._packed = self._packed or self._raw.read(2**14)
            if not self._packed:
                if self._frame:
                    raise EOFError("it breaks off in the middle of a frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count
