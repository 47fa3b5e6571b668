"""The tokenizer of a run: one copy, beside the checkpoints of its first stage.

Token ids mean nothing without it, and it cannot always be made again: a BPE that was trained on a text is another one
as soon as the text is (each release of Python has another standard library), and a file that the settings name may be
moved. So stage 0 leaves a copy where its checkpoints go, with what names the end of a document:

    <directory>/stage-0/tokenizer/tokenizer.json
                                  tokenizer_config.json

Whoever needs it asks `kept_tokenizer`: a run that is resumed, an export, an evaluation, a new run from this one. Each
checkpoint's manifest has its digest, and so has the record of the text beside run.toml; another one in its place (of a
run that had its checkpoints there before) is not taken for it. A checkpoint that is copied to a
neighbour takes it along (`beside`), and so does one that comes back from there.

Why not in every checkpoint: it never changes. Why not beside run.toml: a stage 0 that comes back on another machine has
its checkpoints, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, get_args

from .durable_files import make, remove, sync_directory, temporary_name
from .manifest import COPIES, Beside, BesideName, CheckpointError, read_manifest

TOKENIZER = "tokenizer"  # a directory
FIRST = "stage-0"


def keep_tokenizer(checkpoints: Path, files: Mapping[str, bytes]) -> None:
    """Write its files into the checkpoints' directory of a run, unless they are there already. Raises CheckpointError
    for a disk that does not take them."""
    there = checkpoints / FIRST / TOKENIZER
    with suppress(OSError):
        if read_kept(there) == dict(files):
            return

    def write(aside: Path) -> None:
        for name, content in files.items():
            (aside / name).write_bytes(content)

    try:
        _put(there, write)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {there}: {error.strerror}; make room there, or set checkpoint.directory"
        ) from None


def kept_tokenizer(checkpoints: Path, recorded: str = "") -> Path | None:
    """Its directory, in the checkpoints' directory of a run or among the copies of a neighbour's; None where it is not
    there whole, so that it has to be made again and compared. recorded: its digest, for a run that has no checkpoint
    yet; without either nobody knows whose a tokenizer is."""
    places = [checkpoints / FIRST, checkpoints / COPIES / FIRST]
    wanted = next(filter(None, map(_digest_in_manifests, places)), recorded)
    for place in places:
        with suppress(OSError):
            if hashlib.sha256((place / TOKENIZER / "tokenizer.json").read_bytes()).hexdigest() == wanted:
                return place / TOKENIZER
    return None


def _digest_in_manifests(stage: Path) -> str | None:
    for path in sorted(stage.glob("step-*"), reverse=True):
        with suppress(CheckpointError):
            if digest := read_manifest(path).tokenizer:
                return digest
    return None


# -- with a copy ------------------------------------------------------------------------------------------------------


def beside(stage: Path) -> dict[str, Beside]:
    """What goes with a copy of a checkpoint in this stage's directory: the tokenizer's files, by name; none for a stage
    that keeps no tokenizer. Raises CheckpointError."""
    try:
        found = read_kept(stage / TOKENIZER)
    except OSError as error:
        raise CheckpointError(f"cannot read {stage / TOKENIZER}: {error.strerror}") from None
    return {
        name: Beside(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()) for name, content in found.items()
    }


def take_beside(source: IO[bytes], wanted: Mapping[BesideName, Beside], stage: Path) -> None:
    """Write what came with a copy into this stage's directory: `source` stands where the first of these files begins.
    Raises CheckpointError for files that are not what the manifest says, OSError for a disk that does not take them."""

    def write(aside: Path) -> None:
        for name, file in wanted.items():
            digest, left = hashlib.sha256(), file.bytes
            with (aside / name).open("wb") as to:
                while left and (part := source.read(min(left, 2**20))):
                    digest.update(part)
                    to.write(part)
                    left -= len(part)
            if left or digest.hexdigest() != file.sha256:
                raise CheckpointError(f"{name}, which came with the copy, is damaged: its digest differs")

    if wanted and beside(stage) != wanted:
        _put(stage / TOKENIZER, write)


def read_kept(there: Path) -> dict[str, bytes]:
    """The files of `kept_tokenizer`, by name. Raises OSError."""
    paths = [there / name for name in get_args(BesideName)]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def _put(there: Path, write: Callable[[Path], None]) -> None:
    """Have a directory filled aside, and give it its name once it is on the disk. Raises OSError."""
    aside = there.with_name(temporary_name(there.name))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        make(aside)
        write(aside)
        for path in aside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(aside)
        if there.exists():
            remove(there)
        aside.rename(there)
        sync_directory(there.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
