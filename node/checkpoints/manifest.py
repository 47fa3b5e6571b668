"""A checkpoint's manifest: whose state it is, after which step, and what its file of tensors must be.

A small JSON file beside the tensors, so that a listing reads kilobytes and not gigabytes. It may be incomplete, damaged
or from another machine, so it is read like a message from a stranger: up to a limit, by a strict schema (pydantic), in
the one spelling in which it is written, and only if the digest that it carries of itself is right. Sizes
that it states are compared with what is there, and never used to allocate. One that another version of thinpipe wrote,
in another format, is refused by that name, and not as damaged. Why not as metadata in the tensors' file:
whether that file is whole could not be seen without hashing all of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST = "manifest.json"
COPIES = "copies"  # of neighbours' checkpoints, a directory beside those of this machine's stages
FORMAT = 2  # rises with each field: 2 has what goes with a copy (`beside`)
MANIFEST_BYTES_MAX = 64 * 1024  # what is written takes about 1.5 KB
_LINE_CHARACTERS_MAX = 1500
_FAULTS_LISTED_MAX = 100  # the list of all that is wrong with a file of this size would take a hundred times as much
NOTES = (
    "completed counts finished steps and is the position in the data: training goes on with the batch of step number "
    "`completed`, counted from 0. No generator has a state: all random draws are functions of (seed, step, ...)."
)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DictionaryName = Literal[
    "table_above",
    "table_below",
    "activation_codebook_above",
    "activation_codebook_below",
    "gradient_codebook_above",
    "gradient_codebook_below",
]
BesideName = Literal["tokenizer.json", "tokenizer_config.json"]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is damaged; one line with its path, what was found, and the remedy. What
    it quotes of a file (a library's text does) is cut short, and cannot steer a terminal."""

    def __init__(self, line: str) -> None:
        if len(line) > _LINE_CHARACTERS_MAX:
            line = f"{line[: _LINE_CHARACTERS_MAX - 200]}…{line[-200:]}"
        if not line.isprintable():
            line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        super().__init__(line)


class ForeignCheckpoint(CheckpointError):
    """It may be whole, but it is another run's, model's or stage's."""


class OtherFormat(ForeignCheckpoint):
    """It is whole, and another version of thinpipe wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What all checkpoints of a run have in common."""

    run: str
    stages: int
    configuration: str | None  # `preparation.state_digest`; None: any, to look at
    corpus: str = ""  # of stage 0: which tokens it trains on (`node.run_corpus`), written and not compared here
    tokenizer: str = ""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Dictionary(_Strict):
    """A boundary's table, beside its numbers: what must not enter the state's own digest (see `StageSnapshot`)."""

    version: Annotated[list[Annotated[int, Field(ge=0, lt=2**64)]], Field(min_length=4, max_length=4)] | None
    digest: str = Field(pattern=r"^[0-9a-f]{0,128}$")


class Beside(_Strict):
    """A file that is kept once beside all checkpoints of a stage, and goes with each copy of one."""

    bytes: Count
    sha256: Sha256


class Manifest(_Strict):
    """manifest.json: whose state it is, after which step, and what its file must be."""

    format: Literal[2]  # FORMAT
    notes: str = Field(max_length=1000)
    run: str = Field(max_length=64)
    configuration: str = Field(max_length=1000)
    stage: Count
    stages: Count
    completed: Count  # steps, and so the position in the data
    generation: Annotated[int, Field(ge=0, lt=2**64)]  # of the run, when it was written
    corpus: str = Field(pattern=r"^([0-9a-f]{64})?$")  # of stage 0 alone: digests of what it trains on
    tokenizer: str = Field(pattern=r"^([0-9a-f]{64})?$")
    beside: dict[BesideName, Beside]  # of stage 0 alone: its tokenizer (`kept_tokenizer.py`), first in a copy
    dictionaries: dict[DictionaryName, _Dictionary]
    file_bytes: Count
    file_sha256: Sha256
    torch: str = Field(max_length=100)  # the bits that follow are the same under the same version only
    written_s: Count  # seconds since 1970; for people
    manifest_sha256: Sha256  # of all above

    @property
    def beside_bytes(self) -> int:
        return sum(file.bytes for file in self.beside.values())

    @property
    def copy_bytes(self) -> int:
        """Of a copy on its way: what goes with it, and then the file."""
        return self.beside_bytes + self.file_bytes

    def rendered(self) -> bytes:
        """The one spelling that is read."""
        return _render(self.model_dump(mode="json"))


_OWN_DIGEST = re.compile(rb'^ "manifest_sha256": "([0-9a-f]{64})",\n', re.MULTILINE)  # without it, what it is of


def _render(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()


def seal(tree: dict[str, Any]) -> Manifest:
    """The manifest with these fields and the digest of them. Raises pydantic's ValidationError for what is none."""
    return Manifest.model_validate({**tree, "manifest_sha256": hashlib.sha256(_render(tree)).hexdigest()})


def read_manifest(directory: Path) -> Manifest:
    """The manifest in a checkpoint's directory. Raises CheckpointError unless it is whole; never reads more than
    MANIFEST_BYTES_MAX."""
    path, remedy = directory / MANIFEST, "delete that checkpoint, an older one is used"
    try:
        regular_size(path)
        with path.open("rb") as file:
            raw = file.read(MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    return parse_manifest(raw, where=str(path), remedy=remedy)


def parse_manifest(raw: bytes, *, where: str, remedy: str) -> Manifest:
    """The manifest that these bytes are; `where` they come from and the `remedy` are for the error. Raises
    OtherFormat, or CheckpointError unless it is whole and spelled as it was written."""
    if len(raw) > MANIFEST_BYTES_MAX:
        raise CheckpointError(f"{where} is longer than the {MANIFEST_BYTES_MAX} bytes that one can have; {remedy}")
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        if (other := _other_format(raw)) is not None:
            raise OtherFormat(
                f"{where} is of format {other}, and this version reads format {FORMAT} only: another version of "
                "thinpipe wrote it; go on with that one"
            ) from None
        if (count := error.error_count()) > _FAULTS_LISTED_MAX:
            raise CheckpointError(f"{where} is damaged: it has {count} faults; {remedy}") from None
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(f"{part!a:.40}" for part in first["loc"]) or "it"
        raise CheckpointError(f"{where} is damaged: {field}: {first['msg']!a:.200}; {remedy}") from None
    if manifest.rendered() != raw:
        raise CheckpointError(f"{where} is damaged: it is not spelled as it was written; {remedy}")
    stated = _OWN_DIGEST.search(raw)
    assert stated  # it is spelled as `rendered` does
    content = hashlib.sha256(raw[: stated.start()] + raw[stated.end() :]).hexdigest()
    if content != manifest.manifest_sha256:
        raise CheckpointError(
            f"{where} is damaged: its content has the digest {content[:16]}…, "
            f"it says {manifest.manifest_sha256[:16]}…; {remedy}"
        )
    return manifest


def _other_format(raw: bytes) -> int | None:
    """Of a manifest that is whole by its own digest, whatever fields it has; None: it is of ours, or damaged. By its
    lines, as `_render` spells them: what has no known shape is not made into a tree."""
    found = re.search(rb'^ "format": ([0-9]{1,9}),$', raw, re.MULTILINE)
    stated = _OWN_DIGEST.search(raw)
    if not found or not stated:
        return None
    whole = hashlib.sha256(raw[: stated.start()] + raw[stated.end() :]).hexdigest().encode() == stated[1]
    return int(found[1]) if whole and int(found[1]) != FORMAT else None


def regular_size(path: Path) -> int:
    """Bytes of a file. Raises OSError for what is missing, or is no regular file: a pipe would be read for ever."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return found.st_size
