"""Files as people have them: packed, linked, marked, with columns that differ. Each is read, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from thinpipe.node.data import DataError, readers
from thinpipe.node.data.local_files import files_below, local_files

from .corpora import documents_in, fault, open_it, texts, write_jsonl, write_parquet, write_text


def read(path: Path, kind: str = "jsonl", field: str = "text") -> list[str]:
    """The documents of a file, as `open_corpus` gets them."""
    parts = list(readers.read_documents([path], kind, field))
    assert [part.read_bytes for part in parts] == sorted(part.read_bytes for part in parts)
    assert all(part.read_bytes <= path.stat().st_size for part in parts)
    return "".join(part.text + ("\0" if part.ends else "") for part in parts).split("\0")[:-1]


def refusal(path: Path, kind: str = "jsonl") -> str:
    with pytest.raises(DataError) as caught:
        read(path, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- packed ---

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_is_read_by_what_it_holds(tmp_path, suffix):
    plain = write_jsonl(tmp_path / "plain.jsonl", texts()).read_bytes()
    half = len(plain) // 2
    packed = PACK[suffix](plain[:half]) + PACK[suffix](plain[half:])  # two streams one after the other are one file
    for name in (f"rows.jsonl.{suffix}", "rows.jsonl"):  # and whatever its name says
        path = tmp_path / name
        path.write_bytes(packed)
        assert read(path) == texts()
    path = tmp_path / "text.txt"
    path.write_bytes(PACK[suffix]("Stück für Stück\r\n".encode()))
    assert read(path, "text") == ["Stück für Stück\n"]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, suffix, damage):
    content = bytearray(PACK[suffix](write_jsonl(tmp_path / "plain.jsonl", texts()).read_bytes()))
    if damage == "cut":
        del content[-len(content) // 2 :]
    else:
        content[len(content) // 2 : len(content) // 2 + 16] = b"\xff" * 16
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_plain_text_with_the_name_of_a_compressed_file_is_read(tmp_path):
    path = write_jsonl(tmp_path / "plain.jsonl", texts(3))
    assert read(path.rename(tmp_path / "rows.jsonl.xz")) == texts(3)


def write_zip(path: Path, content: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(content, content.name)


def write_tar(path: Path, content: Path) -> None:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        archive.add(content, content.name)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("corpus.zip", write_zip),
        ("corpus.tar", write_tar),
        ("corpus.tar.gz", write_tar),
        ("corpus.tgz", write_tar),
        ("zip.txt", write_zip),
        ("zip.jsonl", write_zip),
        ("tar", write_tar),
        ("tar.txt.gz", write_tar),
    ],
)
def test_an_archive_is_refused_whatever_it_is_called(tmp_path, name, write):
    content = write_jsonl(tmp_path / "rows.jsonl", texts())
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "corpus" / name
    write(path, content)
    assert f"{path} is a" in (said := fault(tmp_path, path))
    assert "archive; unpack it" in said
    # beside what can be read it would be left out
    write_text(tmp_path / "corpus" / "more", texts(8))
    assert fault(tmp_path, tmp_path / "corpus") == said


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"%PDF-1.7\n", "a PDF file"),
        (b"SQLite format 3\x00", "an SQLite database"),
        (b"PAR1", "a parquet file"),
        (b"\x89HDF\r\n", "an HDF5 file"),
    ],
)
def test_other_formats_are_not_taken_for_text(tmp_path, head, name):
    (tmp_path / "book.txt").write_bytes(head + b"and so on")
    assert f"{tmp_path / 'book.txt'} is {name}, not text" in fault(tmp_path, tmp_path / "book.txt")


def test_what_is_left_out_beside_rows_is_said(tmp_path):
    corpus = tmp_path / "corpus"
    write_jsonl(corpus / "a.jsonl", texts())
    for name in ("README.md", "LICENSE", "x/1.txt", "x/2.txt"):
        (corpus / name).parent.mkdir(exist_ok=True)
        (corpus / name).write_text("no document")
    assert open_it(tmp_path, corpus).warnings == (
        f"{corpus}: 1 jsonl files are read; 4 others are left out (LICENSE, README.md, x/1.txt, ...)",
    )


# --- linked ---


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files_below(root)]


def test_links_to_directories_are_followed_and_cycles_end(tmp_path):
    write_text(tmp_path / "elsewhere", ["far"])
    root = tmp_path / "corpus"
    write_text(root, ["near"])
    (root / "b").symlink_to("../elsewhere", target_is_directory=True)
    (root / "b" / "deep").mkdir()
    (root / "b" / "deep" / "1.txt").write_text("deep")
    for name, target in (("again", "b"), ("back", "."), ("b/up", "../corpus"), ("b/deep/loop", "..")):
        (root / name).symlink_to(target, target_is_directory=True)
    (root / "one.txt").symlink_to("b/deep/1.txt")
    # each real directory once, by its first name
    assert names(root) == ["0000 [part].txt", "again/0000 [part].txt", "again/deep/1.txt", "one.txt"]
    assert names(root) == names(root)


def test_documents_behind_a_link_are_trained_on(tmp_path):
    docs = texts()
    write_jsonl(tmp_path / "corpus" / "a" / "1.jsonl", docs[:20])
    write_jsonl(tmp_path / "elsewhere" / "2.jsonl", docs[20:])
    (tmp_path / "corpus" / "b").symlink_to("../elsewhere", target_is_directory=True)
    found = open_it(tmp_path, tmp_path / "corpus").found
    assert found
    assert found.documents == len(docs)
    assert sorted(documents_in(tmp_path)) == sorted(docs)


@pytest.mark.parametrize("target", ["nowhere", "gone"])
def test_a_link_to_nothing_is_refused(tmp_path, target):
    root = write_text(tmp_path / "corpus", texts(3))
    (root / "gone").symlink_to(target)  # the second: to itself
    assert f"{root / 'gone'} is a link to {target}, which is not there" in fault(tmp_path, root)


def test_hidden_files_are_no_data(tmp_path):
    root = write_text(tmp_path / "corpus", ["seen"])
    (root / ".git").mkdir()
    for name in (".hidden.txt", ".git/x.txt"):
        (root / name).write_text("unseen")
    assert names(root) == ["0000 [part].txt"]
    assert local_files(root, "auto").left_out == []


# --- columns ---


def test_other_columns_may_differ_between_files_and_rows(tmp_path):
    docs, row = texts(), 0
    for name, scores in (("a", [None, 1, {"x": 1}]), ("b", ["high", [1], 2.5])):
        rows = [json.dumps({"text": text, "score": scores[i % 3]}) for i, text in enumerate(docs[row : row + 80])]
        (tmp_path / "jsonl").mkdir(exist_ok=True)
        (tmp_path / "jsonl" / f"{name}.jsonl").write_text("\n".join(rows))
        row += 80
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"id": list(range(80)), "text": docs[:80]}), tmp_path / "parquet" / "a.parquet")
    other = pa.table({"lang": ["en"] * 80, "text": pa.array(docs[80:], pa.large_string()), "id": ["x"] * 80})
    pq.write_table(other, tmp_path / "parquet" / "b.parquet", row_group_size=7)
    plain = open_it(tmp_path, write_jsonl(tmp_path / "plain.jsonl", docs))
    for kind in ("jsonl", "parquet"):
        corpus = open_it(tmp_path, tmp_path / kind)
        assert corpus.found == plain.found
        np.testing.assert_array_equal(
            corpus.batch(0, 0, microbatches=1, batch_size=64), plain.batch(0, 0, microbatches=1, batch_size=64)
        )
        streamed = open_it(tmp_path, f"hf:{tmp_path / kind}")
        assert streamed.batch(0, 0, microbatches=1, batch_size=8).shape == (8, 17)


@pytest.mark.parametrize("feature", ["Audio", "Image"])
def test_text_beside_sound_and_pictures(tmp_path, feature):
    docs = texts()
    table = pa.table({"text": docs, "clip": [{"bytes": b"x", "path": None} for _ in docs]})
    features = {"text": {"dtype": "string", "_type": "Value"}, "clip": {"_type": feature}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    assert read(tmp_path / "set" / "train.parquet", "parquet") == docs
    open_it(tmp_path, f"hf:{tmp_path / 'set'}").batch(0, 0, microbatches=1, batch_size=8)


def test_a_file_without_the_field_is_refused_beside_others_with_it(tmp_path):
    for write, suffix in ((write_jsonl, "jsonl"), (write_parquet, "parquet")):
        root = write(tmp_path / suffix / f"a.{suffix}", texts(9)).parent
        write(root / f"b.{suffix}", texts(9), "body")
        assert fault(tmp_path, root) == f"no field 'text' in {root / f'b.{suffix}'}, only body, id; set data.text_field"


def test_a_misspelt_field_is_found_before_the_end_of_a_large_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "x"}\n' * 1000 + "nobody has read this far\n")
    assert refusal(path) == f"no field 'text' in {path}, only body; set data.text_field"
    path.write_text('{"body": "x"}\n' * 900 + '{"text": "here"}\n{"body": "x"}\n')
    assert read(path) == ["here"]


# --- JSON as it is written ---


def test_json_that_python_reads(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(
        "\ufeff"
        r'{"text": "half \ud83d of a pair"}' + "\n\n"
        r'{"text": "\ud83d\ude00 whole"}' + "\r\n"
        '{"text": "a", "id": 1, "id": 2}\n'
        '{"text": "b", "score": NaN, "most": -Infinity}\n'
        '{"text": null}\n'
        '{"text": "last", "deep": {"text": [1]}}',
        encoding="utf-8",
    )
    assert read(path) == ["half \ufffd of a pair", "😀 whole", "a", "b", "last"]


def test_a_line_is_named_by_its_own_number_in_any_packing(tmp_path):
    lines = [json.dumps({"text": text}) for text in texts()]
    lines[107] = ""
    lines[140] = '{"text": "cut'
    for name, pack in {"": bytes, ".zst": PACK["zst"], ".gz": gzip.compress}.items():
        path = tmp_path / f"rows.jsonl{name}"
        path.write_bytes(pack("\n".join(lines).encode()))
        assert refusal(path).startswith(f"{path} line 141 is not valid JSON: Unterminated string")


def test_one_list_and_objects_over_many_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK_CHARACTERS", 50)  # less than an object
    rows = [{"text": text, "id": i} for i, text in enumerate(texts(12))]
    for content in (
        json.dumps(rows),
        json.dumps(rows, indent=1, ensure_ascii=False),
        "\n".join(json.dumps(row, indent=2) for row in rows),
        "\ufeff [\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    ):
        path = tmp_path / "rows.json"
        path.write_text(content, encoding="utf-8")
        assert read(path) == texts(12)
    path.write_text("[]")
    assert read(path) == []
    broken = json.dumps(rows, indent=1)
    for content, said in (
        (broken[:-2], "row 13 of {} is not valid JSON: ',' is missing"),
        (broken.replace('"id": 4', '"id": '), "row 5 of {} is not valid JSON: Expecting value"),
        (broken + '\n{"text": "more"}', "row 13 of {} is not valid JSON: something follows the end of the list"),
        ("[1, 2]", "row 1 of {} is int, not an object with fields"),
    ):
        path.write_text(content)
        assert refusal(path).startswith(said.format(path))


def test_a_row_too_large_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROW_BYTES_MAX", 2**20)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "x" * 2**20}) + "\n")
    assert f"{path} line 2 has over 1 MiB" in refusal(path)
    path.write_text("[" + json.dumps({"text": "x" * 2**22}) + "]")
    assert f"row 1 of {path} is not valid JSON: it has over 1 MiB" in refusal(path)


# --- text ---


def test_the_mark_at_the_start_of_a_file_is_dropped(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_bytes("\ufeffone\r\ntwo \ufeff three".encode())
    assert read(path, "text") == ["one\ntwo \ufeff three"]
    path.write_bytes("\ufeff".encode())
    assert read(path, "text") == []


def test_the_byte_at_fault_is_counted_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "late.txt"
    path.write_bytes("é".encode() * 700_000 + b"x\xff")
    assert f"{path} is not UTF-8 text: invalid start byte at byte 1400001" in refusal(path, "text")
    path.write_bytes(b"cut \xc3")
    assert "unexpected end of data at byte 4" in refusal(path, "text")


def test_a_file_of_text_is_never_whole_in_memory(tmp_path):
    """Of any size: what is asked of the file at a time is bounded."""
    path = tmp_path / "book.txt"
    path.write_text("a line of it\n" * 700_000)  # 9 MB
    parts = list(readers.read_documents([path], "text", "text"))
    assert len(parts) >= 8
    assert max(len(part.text) for part in parts) <= 2 * 2**20
    assert sum(part.ends for part in parts) == 1
    # read as it is asked for, not ahead
    first = next(readers.read_documents([path], "text", "text"))
    assert first.read_bytes < 4 * 2**20


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", texts(3))

    def away(*_: object, **__: object) -> io.BufferedReader:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", away)
    assert refusal(path) == f"cannot read {path}: Input/output error"
