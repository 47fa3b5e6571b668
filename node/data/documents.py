"""Documents: one text after another, from whatever the user named, always in the same order.

What: `open_source` turns `data.source` into a `Source`: a digest of its content and a reader that yields documents.
A file of text is one document, a row of jsonl or parquet is one, a file of the Python standard library is one.

How: local files go through `datasets` in streaming mode, which brings decompression, json dialects and parquet, and
which never copies the text to disk. The digest is over the files' bytes, so that a cache entry made from them can be
found again on any machine. The embedded default reads the standard library itself: it needs no network and no
`datasets`, and is the same wherever the same Python is.

Why not hash the path, size and time of a file, which is quicker? Two machines would never agree on it, and a file
edited within one clock tick would be missed. Why leave out part of the standard library? `test` directories are 20 MB
of assertions, and `encodings` is 1.4 MB of tables that are near copies of each other: some would be held out while
their twins are trained on, and the held-out loss would measure memory.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataSection

HELDOUT_SHARE = 0.05

_STDLIB_SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
_STDLIB_SKIPPED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})  # the machine's, not Python's
_FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_COMPRESSED = frozenset({".gz", ".xz", ".bz2", ".zst"})
_LOADER = {"text": "text", "jsonl": "json", "parquet": "parquet"}  # what `datasets` calls them


class DataError(ValueError):
    """Text, a tokenizer or the cache cannot be used; the message is one line that names which and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where documents come from. `read()` starts again from the first; empty documents are left out."""

    name: str
    digest: str
    size_bytes: int
    read: Callable[[], Iterator[str]]


def is_heldout(text: str) -> bool:
    """Whether a document is never trained on: by its content, so that copies go the same way whatever their order."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64


def open_source(settings: DataSection, cache: Path) -> Source:
    """The local files or the standard library that `settings.source` names; `cache` is for `datasets` to work in.

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
    paths, kind = _local_files(Path(settings.source).expanduser(), settings.format)
    field = "text" if kind == "text" else settings.text_field
    return Source(
        name=settings.source,
        digest=files_digest(paths, kind, field),
        size_bytes=sum(path.stat().st_size for path in paths),
        read=lambda: _read_files(paths, kind, field, settings.source, cache),
    )


def check_source(settings: DataSection) -> None:
    """Raises DataError where `open_source` would for what is not there, without reading what is. A dataset of a hub is
    not asked for."""
    if settings.source != "stdlib" and not settings.source.startswith("hf:"):
        _local_files(Path(settings.source).expanduser(), settings.format)


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


def _read_stdlib(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        if text:
            yield text


def _format_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _FORMAT_OF_SUFFIX.get(suffixes[-1], "text") if suffixes else "text"


def _local_files(root: Path, wanted: str) -> tuple[list[Path], str]:
    """The files of one format under `root`, sorted, and that format. Hidden files are not data."""
    if root.is_file():
        return [root], _format_of(root) if wanted == "auto" else wanted
    if not root.is_dir():
        raise DataError(
            f"no such file or directory: {root}; set data.source to text, jsonl, parquet, hf:NAME or stdlib"
        )
    files = [
        path
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    if not files:
        raise DataError(f"the directory {root} holds no files; put text, jsonl or parquet there")
    if wanted == "text":
        return files, "text"
    kinds = {_format_of(path) for path in files}
    if wanted == "auto":
        # beside rows, plain files are a README or a licence; two kinds of rows are a question only the user can answer
        rows = sorted(kinds - {"text"})
        if len(rows) > 1:
            raise DataError(f"{root} holds both {' and '.join(rows)} files; choose one with data.format")
        wanted = rows[0] if rows else "text"
    chosen = [path for path in files if _format_of(path) == wanted]
    if not chosen:
        raise DataError(f"{root} holds no {wanted} files, only {', '.join(sorted(kinds))}; change data.format")
    return chosen, wanted


@contextlib.contextmanager
def quiet_datasets() -> Iterator[Any]:
    """The `datasets` module, without its log lines and bars: faults are reported once, as a DataError."""
    import datasets

    logger = logging.getLogger("datasets")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def text_of(record: dict[str, Any], field: str, number: int, source: str) -> str:
    """The document in one row, '' for a null. Raises DataError when the field is missing or is not text."""
    if field not in record:
        raise DataError(f"no field '{field}' in {source}, only {', '.join(sorted(record))}; set data.text_field")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"row {number} of {source} holds {type(text).__name__}, not text, in '{field}'; set data.text_field"
        )
    return text


def _read_files(paths: list[Path], kind: str, field: str, source: str, cache: Path) -> Iterator[str]:
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    with quiet_datasets() as datasets:
        try:
            rows = datasets.load_dataset(
                _LOADER[kind],
                data_files=[glob.escape(str(path.resolve())) for path in paths],
                split="train",
                streaming=True,
                cache_dir=str(cache / "datasets"),
                **options,
            )
            for number, record in enumerate(rows, start=1):
                if text := text_of(record, field, number, source):
                    yield text
        except DataError:
            raise
        except Exception as error:  # pyarrow, json, codec and file system faults all arrive here
            raise _diagnose(paths, kind, source, error) from None


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _diagnose(paths: list[Path], kind: str, source: str, error: Exception) -> DataError:
    """Which file and line is at fault: the loaders report a chunk, so after a failure the files are read again."""
    for path in paths:
        if path.suffix.lower() in _COMPRESSED:
            continue
        if kind == "jsonl" and (fault := _bad_line(path)):
            return DataError(fault)
        if kind == "text":
            try:
                with path.open(encoding="utf-8") as file:
                    for _ in file:
                        pass
            except UnicodeDecodeError as bad:
                return DataError(f"{path} is not UTF-8 text: {bad.reason} at byte {bad.start}; convert or remove it")
        if kind == "parquet":
            with path.open("rb") as file:
                if file.read(4) != b"PAR1":
                    return DataError(f"{path} is not a parquet file; remove it or set data.format")
    return DataError(f"cannot read {source} as {kind}: {first_line(error)}; check the file or data.format")


def _bad_line(path: Path) -> str | None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.lstrip().startswith(b"["):
                return None  # one list over many lines, which the loader reads too
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                return f"{path} line {number} is not valid JSON: {first_line(error)}; mend or remove the line"
            if not isinstance(row, dict):
                return f"{path} line {number} is {type(row).__name__}, not an object with fields; mend or remove it"
    return None
