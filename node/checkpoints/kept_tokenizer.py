"""The tokenizer of a run, beside the checkpoints of its first stage.

Token ids mean nothing without it, and it cannot always be made again: a BPE that was trained on a text is another one
as soon as the text is (each release of Python has another standard library). Stage 0 has read it, so it leaves a copy
where its checkpoints go, with what names the end of a document. Why not in every checkpoint: it never changes, and
copies on a neighbour would carry it along.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .durable_files import make, remove, sync_directory
from .manifest import CheckpointError
from .store import CheckpointStore

TOKENIZER = "tokenizer"  # a directory


def keep_tokenizer(store: CheckpointStore, write: Callable[[Path], object], *, anew: bool) -> None:
    """Have its files written into a directory beside the checkpoints of `store`. anew: by a run that begins; one that
    goes on leaves what is there. Raises CheckpointError for a disk that does not take them."""
    there = store.directory / TOKENIZER
    if not anew and there.exists() and store.numbers():
        return
    aside = store.directory / f".{TOKENIZER}-{os.getpid()}"
    try:
        make(aside)
        write(aside)
        for path in aside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(aside)
        if there.exists():
            remove(there)
        os.rename(aside, there)
        sync_directory(store.directory)
    except OSError as error:
        with suppress(OSError):
            remove(aside)
        raise CheckpointError(
            f"cannot write {there}: {error.strerror}; make room there, or set checkpoint.directory"
        ) from None


def kept_tokenizer(directory: Path) -> Path | None:
    """In the checkpoints' directory of a run; None where its first stage left none."""
    found = directory / "stage-0" / TOKENIZER
    return found if (found / "tokenizer.json").is_file() else None
