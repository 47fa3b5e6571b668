"""Tokenizers as they are published: where their files are, which token ends a document, what they cannot spell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thinpipe.node.config_file import merge, parse_config
from thinpipe.node.data import DataError, vocabulary_size
from thinpipe.node.data.vocabulary import read_vocabulary
from thinpipe.node.preparation import prepare_corpus, resolve_architecture
from tokenizers import Tokenizer, models

from .corpora import byte_level, fault, open_it, save, settings, texts, write_jsonl

# --- where it is ---


def test_a_tokenizer_is_a_file_or_a_directory_with_one(tmp_path):
    folder = save(tmp_path / "model", byte_level())
    rows = write_jsonl(tmp_path / "rows.jsonl", texts())
    batches = [
        open_it(tmp_path, rows, tokenizer=given).batch(0, 0, microbatches=1, batch_size=9)
        for given in (folder, folder / "tokenizer.json")
    ]
    np.testing.assert_array_equal(*batches)
    assert vocabulary_size(settings(tmp_path, rows, tokenizer=folder), None) == 300
    (tmp_path / "bare").mkdir()
    assert fault(tmp_path, rows, tokenizer=tmp_path / "bare") == (
        f"the directory {tmp_path / 'bare'} has no tokenizer.json; save one there, or name a file"
    )


# --- how a document ends ---


@pytest.mark.parametrize(
    ("files", "end", "said_by"),
    [
        ({}, "<|endoftext|>", "its name"),
        ({"config": {"eos_token_id": 1}}, "<|eos|>", "config.json"),
        ({"config": {"eos_token_id": [1, 0]}}, "<|eos|>", "config.json"),
        # ids of a model that never met this tokenizer
        ({"config": {"eos_token_id": 50}}, "<|endoftext|>", "its name"),
        ({"config": {"eos_token_id": None}}, "<|endoftext|>", "its name"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "</s>", "tokenizer_config.json"),
        ({"tokenizer_config": {"eos_token": {"content": "<|eos|>"}}}, "<|eos|>", "tokenizer_config.json"),
        (
            {"tokenizer_config": {"eos_token": "<|eos|>", "pad_token": "</s>"}, "config": {"eos_token_id": 2}},
            "<|eos|>",
            "tokenizer_config.json",
        ),
        ({"tokenizer_config": {"pad_token": "<|endoftext|>"}}, "</s>", "its name"),
        ({"tokenizer_config": {"eos_token": None, "pad_token": "</s>"}}, "<|endoftext|>", "its name"),
    ],
    ids=str,
)
def test_the_files_beside_a_tokenizer_say_what_ends_a_document(tmp_path, files, end, said_by):
    vocabulary = read_vocabulary(save(tmp_path / "model", byte_level(), **files))
    assert (vocabulary.end_token, vocabulary.end_said_by) == (end, said_by)


def test_documents_end_with_that_token_and_a_run_says_so(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", texts())
    folder = save(tmp_path / "model", byte_level(), config={"eos_token_id": 1, "pad_token_id": 0})
    corpus = open_it(tmp_path, rows, tokenizer=folder)
    assert corpus.line.endswith("documents end with <|eos|> (config.json)")
    (train,) = (tmp_path / "cache").glob("*-train.npy")
    (heldout,) = (tmp_path / "cache").glob("*-heldout.npy")
    ids = np.concatenate([np.load(train), np.load(heldout)])
    assert [int((ids == each).sum()) for each in (0, 1, 2)] == [0, len(texts()), 0]
    # another end is another corpus
    save(folder, byte_level(), config={"eos_token_id": 2})
    assert open_it(tmp_path, rows, tokenizer=folder).digest != corpus.digest


def test_files_beside_a_tokenizer_of_another_name_are_not_its_own(tmp_path):
    folder = save(tmp_path / "model", byte_level(), config={"eos_token_id": 1})
    mine = (folder / "tokenizer.json").rename(folder / "mine.json")
    assert read_vocabulary(mine).end_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", '{"eos_token": "<nowhere>"}', "names '<nowhere>' as eos_token, which the tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: Expecting property name"),
        ("config.json", "\xff", "config.json: "),
    ],
)
def test_files_that_say_nothing_of_use_are_refused(tmp_path, name, content, said):
    folder = save(tmp_path / "model", byte_level())
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=said):
        read_vocabulary(folder)


# --- a pretrained model's own ---


def pretrained(tmp_path: Path, **more: object) -> dict[str, Any]:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
    ).save_pretrained(tmp_path / "model")
    return {
        "model.path": str(tmp_path / "model"),
        "model.pretrained": True,
        "data.source": str(write_jsonl(tmp_path / "rows.jsonl", texts())),
        "data.cache": str(tmp_path / "cache"),
        "data.sequence_length": 16,
        "data.heldout_sequences": 8,
        "pipeline.batch_size": 8,
        **more,
    }


def test_a_pretrained_model_brings_its_own_tokenizer(tmp_path):
    given = pretrained(tmp_path)
    config = parse_config(merge({}, given))
    for use in (prepare_corpus, resolve_architecture):
        with pytest.raises(
            DataError, match=r"model\.pretrained: .*model has no tokenizer\.json, and .* data\.tokenizer"
        ):
            use(config)
    assert not (tmp_path / "cache").exists()
    save(tmp_path / "model", byte_level())
    corpus = prepare_corpus(config)
    assert corpus.line.endswith("documents end with <|eos|> (config.json)")
    assert not list((tmp_path / "cache").glob("tokenizer-*"))
    assert resolve_architecture(config).vocab_size == 300
    # which a stated one overrides
    other = save(tmp_path / "other", byte_level(("<|endoftext|>",)))
    stated = parse_config(merge({}, {**given, "data.tokenizer": str(other)}))
    assert prepare_corpus(stated).line.endswith("documents end with <|endoftext|> (its name)")


# --- what it cannot spell ---


def unigram() -> Tokenizer:
    return Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0), ("b", -1.0), (" ", -1.0)]))


def letters_alone() -> Tokenizer:
    vocabulary = {"</s>": 0, "a": 1, "b": 2, " ": 3}
    return Tokenizer(models.BPE(vocabulary, []))


def test_a_tokenizer_that_refuses_a_character_is_refused_by_name(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", ["abab ab"] * 300 + ["abab ab z"])
    folder = save(tmp_path / "model", unigram())
    said = fault(tmp_path, rows, tokenizer=folder)
    assert said.startswith(f"the tokenizer {folder} cannot spell 'z' in document 301: ")
    assert "choose one that has an unknown token or falls back to bytes" in said
    docs = [f"{'ab' * (i + 1)} z" for i in range(200)]
    streamed = f"hf:{write_jsonl(tmp_path / 'set' / 'train.jsonl', docs).parent}"
    assert f"cannot spell 'z' in a document of {streamed}: 'abab" in fault(tmp_path, streamed, tokenizer=folder)


def test_characters_that_a_tokenizer_drops_are_counted_and_said(tmp_path):
    docs = [f"abab ab{' ' * (i % 7)}b\n" * 20 for i in range(100)]
    docs[40] += "zz y"
    docs[60] += "z"
    rows = write_jsonl(tmp_path / "rows.jsonl", docs)
    folder = save(tmp_path / "model", letters_alone())
    for _ in range(2):  # the second from the cache
        corpus = open_it(tmp_path, rows, tokenizer=folder)
        assert corpus.found
        assert corpus.found.dropped == {"y": 1, "z": 3}
        (line,) = corpus.warnings
        assert line.startswith(
            f"the tokenizer {folder} drops 4 of {sum(map(len, docs)):,} characters ('z' 'y'; the first in document 41)"
        )


def test_dropped_characters_of_a_stream_are_said_once(tmp_path, capsys):
    docs = [f"{'ab' * (i + 9)} z" for i in range(200)]
    source = f"hf:{write_jsonl(tmp_path / 'set' / 'train.jsonl', docs).parent}"
    folder = save(tmp_path / "model", letters_alone())
    open_it(tmp_path, source, tokenizer=folder).batch(0, 0, microbatches=1, batch_size=8)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"thinpipe: warning: the tokenizer {folder} drops ")


def test_nothing_is_dropped_by_a_tokenizer_of_bytes(tmp_path):
    vocabulary = read_vocabulary(save(tmp_path / "model", byte_level()))
    assert not vocabulary.dropped("Stück 😀 \x00 \u2028 中", "here")
    # with an unknown token nothing is dropped: it stands for what is not known
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    assert not read_vocabulary(save(tmp_path / "words", words)).dropped("a z", "here")


def test_a_copy_ends_documents_with_the_same_token(tmp_path):
    source = save(tmp_path / "model", byte_level(), config={"eos_token_id": 1}, tokenizer_config={"bos_token": "</s>"})
    (tmp_path / "copy").mkdir()

    def copy(path):
        for name, content in read_vocabulary(path).files().items():
            (tmp_path / "copy" / name).write_bytes(content)

    copy(source / "tokenizer.json")
    copied = read_vocabulary(tmp_path / "copy")
    assert (copied.end_token, copied.end_said_by) == ("<|eos|>", "tokenizer_config.json")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["bos_token"] == "</s>"
    # beside a file of another name lie settings of others
    mine = (source / "tokenizer.json").rename(source / "mine.json")
    copy(mine)
    assert read_vocabulary(tmp_path / "copy").end_token == "<|endoftext|>"
