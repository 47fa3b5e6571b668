"""Small corpora in every format, and how tests open them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from thinpipe.node.config_sections import DataSection
from thinpipe.node.data import DataError, open_corpus
from thinpipe.node.data.corpus import Corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 300
LENGTH = 16


def texts(count: int = 160) -> list[str]:
    """Documents that differ, with line ends, accents and a spelled-out special token."""
    return [
        f"# Stück {i}\n"
        + "\n".join(" ".join(str((i + 3) * j * k % 89) for j in range(9)) for k in range(7))
        # what a file may hold and no tokenizer may take for the end of the document
        + (" <|endoftext|> " if i % 5 == 0 else "\n")
        for i in range(count)
    ]


def write_text(folder: Path, docs: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(docs):
        (folder / f"{i:04d} [part].txt").write_text(text, encoding="utf-8")
    return folder


def write_jsonl(path: Path, docs: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(docs))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return path


def write_parquet(path: Path, docs: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(docs))), field: docs}), path, row_group_size=32)
    return path


def settings(tmp_path: Path, source: Path | str, **others: object) -> DataSection:
    values = {"sequence_length": LENGTH, "heldout_sequences": 8, "cache": tmp_path / "cache", **others}
    return DataSection.model_validate({"source": str(source), **values})


def open_it(
    tmp_path: Path, source: Path | str, seed: int = 1, vocab_size: int = VOCABULARY, **others: object
) -> Corpus:
    return open_corpus(settings(tmp_path, source, **others), vocab_size=vocab_size, seed=seed)


def the_tokenizer(directory: Path) -> Tokenizer:
    (path,) = directory.glob("tokenizer-*.json")
    return Tokenizer.from_file(str(path))


def fault(tmp_path: Path, source: Path | str, vocab_size: int = VOCABULARY, **others: object) -> str:
    """The one line that refuses it."""
    with pytest.raises(DataError) as caught:
        open_it(tmp_path, source, vocab_size=vocab_size, **others).batch(0, 0, microbatches=1, batch_size=1)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def documents_in(tmp_path: Path) -> list[str]:
    """All documents of the only corpus in the cache, as its ids spell them, training first."""
    tokenizer = the_tokenizer(tmp_path / "cache")
    end = tokenizer.token_to_id("<|endoftext|>")
    found = []
    for part in ("train", "heldout"):
        (path,) = (tmp_path / "cache").glob(f"tokens-*-{part}.npy")
        ids = np.load(path)
        cuts = np.flatnonzero(ids == end) + 1
        found += [tokenizer.decode(each[:-1].tolist(), skip_special_tokens=False) for each in np.split(ids, cuts)[:-1]]
    return found


ENDS = ("</s>", "<|eos|>", "<|endoftext|>")


def byte_level(special: tuple[str, ...] = ENDS, vocab_size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, **files: dict[str, Any]) -> Path:
    """As Hugging Face lays them out: `save(folder, tokenizer, config={...})` writes config.json too."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
