"""Targets for what is read from a disk: a checkpoint's manifest, and its file of tensors.

Files are rewritten in one directory of a memory file system, where there is one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save
from thinpipe.node.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    MANIFEST_BYTES_MAX,
    NOTES,
    CheckpointError,
    Fingerprint,
    Manifest,
    read_manifest,
    seal,
)
from thinpipe.node.checkpoints.store import STATE, CheckpointStore, _stamp

from . import mutators
from .judge import Ends, Finding, Target, check_refusal

COMPLETED = 7
FINGERPRINT = Fingerprint(run="run", stages=4, configuration="c0ffee table beef")
FILE_BYTES_MAX = 8 * 1024
# hashlib.file_digest reads by pieces of 256 KiB; the header of the file, as text and as a tree, and what stands in it.
LOADING_BYTES = 512 * 1024 + 32 * FILE_BYTES_MAX


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="thinpipe-fuzz-", dir=memory if memory.is_dir() else None)


@cache
def _directory() -> Path:
    """Of the one checkpoint."""
    path = _store().path(COMPLETED)
    path.mkdir(parents=True)
    return path


def _store() -> CheckpointStore:
    return CheckpointStore(Path(_scratch().name), stage=1, fingerprint=FINGERPRINT)


def sealed(state: bytes) -> Manifest:
    table = {"version": [3, 6, 0, 0], "digest": "00" * 16}
    return seal(
        {
            "format": FORMAT,
            "notes": NOTES,
            "run": FINGERPRINT.run,
            "configuration": FINGERPRINT.configuration,
            "stage": 1,
            "stages": FINGERPRINT.stages,
            "completed": COMPLETED,
            "generation": 3,
            "corpus": "c0" * 32,
            "tokenizer": "",
            "beside": {},
            "dictionaries": {"table_above": table, "table_below": {"version": None, "digest": ""}},
            "file_bytes": len(state),
            "file_sha256": hashlib.sha256(state).hexdigest(),
            "torch": "2.13.0",
            "written_s": 1_700_000_000,
        }
    )


def _of_another_version() -> bytes:
    tree = sealed(b"").model_dump(mode="json", exclude={"manifest_sha256"}) | {"format": 1, "more": [{}]}
    text = json.dumps(tree, indent=1, sort_keys=True) + "\n"
    return _with_digest(text.encode())


def manifests(data: bytes) -> Ends:
    """manifest.json of a checkpoint."""
    path = _directory() / MANIFEST
    path.write_bytes(data)
    try:
        manifest = read_manifest(path.parent)
    except CheckpointError as error:
        check_refusal(error)
        return Ends(0, 1)
    if manifest.rendered() != data:
        raise Finding(f"{data[:200]!r} is read as {manifest}")
    return Ends(1, 0)


@cache
def _template() -> bytes:
    """A manifest of a file of no bytes, up to the digest of itself."""
    tree = sealed(b"").model_dump(mode="json", exclude={"manifest_sha256"})
    return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()


def _manifest_of(state: bytes) -> bytes:
    """What `_sealed` renders to, in a tenth of the time."""
    unsealed = _template().replace(b'"file_bytes": 0,', b'"file_bytes": %d,' % len(state), 1)
    unsealed = unsealed.replace(hashlib.sha256().hexdigest().encode(), hashlib.sha256(state).hexdigest().encode(), 1)
    return _with_digest(unsealed)


def _with_digest(unsealed: bytes) -> bytes:
    own = b'\n "manifest_sha256": "%s",\n "notes"' % hashlib.sha256(unsealed).hexdigest().encode()
    return unsealed.replace(b'\n "notes"', own, 1)


def checkpoints(data: bytes) -> Ends:
    """The file of tensors, beside a manifest that has its length and its digest."""
    directory = _directory()
    (directory / STATE).write_bytes(data)
    (directory / MANIFEST).write_bytes(_manifest_of(data))
    store = _store()
    if len(data) % 8:  # its digest, which is right, is computed for one input in eight only
        store._verified[COMPLETED] = _stamp((directory / STATE).stat())
    try:
        snapshot = store.load(COMPLETED)
    except CheckpointError as error:
        check_refusal(error)
        return Ends(0, 1)
    held = sum(tensor.nbytes for tensor in snapshot.tensors.values())
    if held > len(data):
        raise Finding(f"{held} bytes of tensors in a file of {len(data)}")
    return Ends(1, 0)


def _many_faults() -> bytes:
    """A thing wrong with every few bytes of it."""
    tree = sealed(b"").model_dump(mode="json")
    tree["dictionaries"] = {f"{nth:x}": 0 for nth in range(1000)}
    return json.dumps(tree).encode()


def _states() -> list[bytes]:
    plain = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int64), "none": torch.empty(0, 5)}
    other = {"replica": torch.ones(3, 2, dtype=torch.float64), "half": torch.ones(3, dtype=torch.bfloat16)}
    return [save(plain), save(other, metadata={"format": "pt"}), save({"x": torch.tensor(1, dtype=torch.uint8)})]


DISK = [
    Target(
        name="manifests",
        run=manifests,
        mutate=mutators.manifest,
        seeds=[sealed(b"").rendered(), _many_faults(), _of_another_version()],
        peak_bytes=16 * MANIFEST_BYTES_MAX,  # 64 KiB of text, its tree, and what it is compared with
        input_bytes_max=MANIFEST_BYTES_MAX + 1000,
    ),
    Target(
        name="checkpoints",
        run=checkpoints,
        mutate=mutators.tensors,
        seeds=_states(),
        peak_bytes=LOADING_BYTES,
        input_bytes_max=FILE_BYTES_MAX,
    ),
]
