"""The tokenizer of a run, beside the checkpoints of its first stage.

Token ids mean nothing without it, and it cannot always be made again: a BPE that was trained on a text is another one
as soon as the text is (each release of Python has another standard library). Stage 0 has read it, so it leaves a copy
where its checkpoints go. Why not in every checkpoint: it never changes, and copies on a neighbour would carry it along.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .durable_files import make, sync_directory
from .manifest import CheckpointError
from .store import CheckpointStore

TOKENIZER = "tokenizer.json"


def keep_tokenizer(store: CheckpointStore, tokenizer: Path) -> None:
    """Copy the file `tokenizer` beside the checkpoints of `store`, unless the run that wrote those has left its own.
    Raises CheckpointError for a disk that does not take it."""
    there = store.directory / TOKENIZER
    if there.exists() and store.numbers():
        return
    aside = there.with_name(f".{TOKENIZER}-{os.getpid()}")
    try:
        make(store.directory)
        shutil.copyfile(tokenizer, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, there)
        sync_directory(store.directory)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {there}: {error.strerror}; make room there, or set checkpoint.directory"
        ) from None


def kept_tokenizer(directory: Path) -> Path | None:
    """In the checkpoints' directory of a run; None where its first stage left none."""
    found = directory / "stage-0" / TOKENIZER
    return found if found.is_file() else None
