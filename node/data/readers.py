"""From files to documents: the text of each, in parts, one after the other.

What: a file of text is one document; a row of jsonl or parquet is one. `read_documents` yields `Part`s, `rows_of` the
rows of one file from any of them on.

How: json and parquet are read by their own libraries, one line or a few rows at a time, and only the column of text is
looked at: what other columns hold, and whether they are the same everywhere, is nobody's business here. Why not
`datasets`? It makes one table of all rows, so that columns that differ, halves of surrogate pairs and doubled keys end
a run over text that it does not read; and it holds a whole text file several times.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .local_files import DataError, damaged, first_line, opened
from .pieces import PIECE_CHARACTERS, pieces, pieces_of_stream

ROW_BYTES_MAX = 2**28  # a row is read whole, and needs several times its size
_ROWS_AT_A_TIME = 256  # of parquet
_ROWS_TO_FIND_A_FIELD = 1000
_CHUNK_CHARACTERS = 2**18
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 and tokenizers cannot


class Part(NamedTuple):
    """Of a document; `ends` with its last one. read_bytes: of the files, up to here."""

    text: str
    ends: bool
    read_bytes: int


class Row(NamedTuple):
    """One row of a file: which, for people too; how far the file is read; and its fields, as far as they are wanted."""

    number: int
    where: str
    read_bytes: int
    fields: object


def text_in(fields: object, field: str, where: str) -> str:
    """The text in one row, '' where there is none. Raises DataError where the row, or what is in its field, is none."""
    if not isinstance(fields, dict):
        raise DataError(f"{where} is {type(fields).__name__}, not an object with fields; mend or remove it")
    text = fields.get(field)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where} holds {type(text).__name__}, not text, in '{field}'; set data.text_field")
    return _LONE_SURROGATES.sub("\ufffd", text)


def no_field(field: str, source: object, fields: dict[str, Any]) -> DataError:
    return DataError(f"no field '{field}' in {source}, only {', '.join(sorted(fields))}; set data.text_field")


def read_documents(paths: list[Path], kind: str, field: str) -> Iterator[Part]:
    """All documents of files of one kind, but empty ones. Raises DataError, which names file and line or row."""
    before = 0
    for path in paths:
        try:
            parts = _read_text(path) if kind == "text" else _read_rows(path, kind, field)
            for part in parts:
                yield part._replace(read_bytes=before + part.read_bytes)
            before += path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or first_line(error)}") from None


def whole_documents(parts: Iterable[Part]) -> Iterator[str]:
    """Each document in one."""
    held: list[str] = []
    for part in parts:
        held.append(part.text)
        if part.ends:
            yield "".join(held)
            held = []


def _read_rows(path: Path, kind: str, field: str) -> Iterator[Part]:
    for _, text, read_bytes in texts_of(path, kind, field):
        if text:
            for piece, last in pieces(text):
                yield Part(piece, last, read_bytes)


def texts_of(path: Path, kind: str, field: str, skip: int = 0) -> Iterator[tuple[int, str, int]]:
    """(rows up to and with this one, its text, bytes read) of a file of jsonl or parquet, after the first `skip` rows.

    A field that some rows lack is empty there; one that none has is a fault. Blank lines of jsonl count as rows, so
    that a line's number is its own. Raises DataError for what cannot be used, OSError where the file cannot be read.
    """
    found, row = skip > 0, None
    for row in (_parquet_rows if kind == "parquet" else _json_rows)(path, field, skip):
        yield row.number, text_in(row.fields, field, row.where), row.read_bytes
        assert isinstance(row.fields, dict)
        found = found or field in row.fields
        if not found and row.number >= _ROWS_TO_FIND_A_FIELD:
            break
    if row and not found:
        assert isinstance(row.fields, dict)
        raise no_field(field, path, row.fields)


def _read_text(path: Path) -> Iterator[Part]:
    with opened(path) as (stream, raw):
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        try:
            chunks = iter(lambda: text.read(_CHUNK_CHARACTERS), "")
            first = next(chunks, None)
            if first is not None:
                for piece, last in pieces_of_stream(_chained(first, chunks), PIECE_CHARACTERS):
                    yield Part(piece, last, raw.tell())
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text: {error.reason} at byte {_first_bad_byte(path)}; convert or remove it"
            ) from None
        finally:
            text.detach()  # who opened the stream closes it


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _first_bad_byte(path: Path) -> int:
    """A decoder that is given chunks counts from the beginning of each."""
    before, held = 0, b""
    with opened(path) as (stream, _):
        while chunk := stream.read(2**20):
            held += chunk
            try:
                held.decode()
            except UnicodeDecodeError as error:
                if error.end < len(held) or "unexpected end" not in error.reason:
                    return before + error.start
                before, held = before + error.start, held[error.start :]
            else:
                before, held = before + len(held), b""
    return before


def _json_rows(path: Path, _field: str, skip: int) -> Iterator[Row]:
    with opened(path) as (stream, raw):
        head = stream.peek(512)[:512].removeprefix(b"\xef\xbb\xbf").lstrip()  # pyright: ignore[reportAttributeAccessIssue]
        listed = head.startswith(b"[")
        if listed or head.partition(b"\n")[0].strip() == b"{":  # not a line each
            for number, fields in enumerate(_values(path, stream, listed=listed), start=1):
                if number > skip:
                    yield Row(number, f"row {number} of {path}", raw.tell(), fields)
            return
        number = 0
        while line := stream.readline(ROW_BYTES_MAX + 1):
            number += 1
            if len(line) > ROW_BYTES_MAX:
                raise DataError(f"{path} line {number} has over {ROW_BYTES_MAX >> 20} MiB; cut it, or give it as text")
            if number > skip and not line.isspace():
                yield Row(number, f"{path} line {number}", raw.tell(), _parsed(path, number, line))


def _parsed(path: Path, number: int, line: bytes) -> object:
    try:
        return json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} line {number} is not valid JSON: {first_line(error)}; mend or remove the line"
        ) from None


class _Scanner:
    """What of a text is not yet used, from `at` on; more is read where that is not enough."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self._decoder = text, json.JSONDecoder()
        self.held, self.at = "", 0

    def more(self) -> bool:
        """Whether there was more. Twice as much each time, since a value is tried anew."""
        held = self.held[self.at :]
        if len(held) > ROW_BYTES_MAX:
            raise ValueError(f"it has over {ROW_BYTES_MAX >> 20} MiB")
        chunk = self._text.read(max(_CHUNK_CHARACTERS, len(held)))
        self.held, self.at = held + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no white space, '' at the end."""
        while True:
            while self.at < len(self.held) and self.held[self.at].isspace():
                self.at += 1
            if self.at < len(self.held):
                return self.held[self.at]
            if not self.more():
                return ""

    def take(self, wanted: str) -> None:
        if self.peek() != wanted:
            raise ValueError(f"'{wanted}' is missing")
        self.at += 1

    def value(self) -> object:
        self.peek()
        while True:
            try:
                value, self.at = self._decoder.raw_decode(self.held, self.at)
                return value
            except ValueError:
                if not self.more():
                    raise


def _values(path: Path, stream: BinaryIO, *, listed: bool) -> Iterator[object]:
    """The items of one list, or objects one after the other, over many lines, without holding all of them."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    scanner, number = _Scanner(text), 1
    try:
        if listed:
            scanner.take("[")
        while scanner.peek() != ("]" if listed else ""):
            if listed and number > 1:
                scanner.take(",")
            yield scanner.value()
            number += 1
        if listed:
            scanner.take("]")
            if scanner.peek():
                raise ValueError("something follows the end of the list")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}; convert or remove it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"row {number} of {path} is not valid JSON: {first_line(error)}; mend or remove it") from None
    finally:
        text.detach()


def _parquet_rows(path: Path, field: str, skip: int) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise DataError(f"{path} is not a parquet file; remove it or set data.format")
        try:
            table = pq.ParquetFile(file)
            names, total, number = table.schema_arrow.names, max(1, table.metadata.num_rows), 0
            size = path.stat().st_size
            if field not in names:
                raise no_field(field, path, dict.fromkeys(names))
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if number + rows <= skip:  # without reading it
                    number += rows
                    continue
                for batch in table.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[field]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        if number > skip:
                            yield Row(number, f"row {number} of {path}", size * number // total, {field: text})
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise damaged(path, error) from None
