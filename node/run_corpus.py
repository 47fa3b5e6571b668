"""The text that a run is trained on, and a record of it beside the run, so that no other text takes its place unseen.

A tokenizer is trained on the text, so one more line of it may be another tokenizer, and to weights that were trained
with the old one every id means something else: the loss rises, and nothing fails. Python's own library, the default
text, is another one in another version of Python. So stage 0 writes `corpus.json`, with the digests of the tokens and
of the tokenizer, and keeps the tokenizer itself beside its checkpoints (`checkpoints.kept_tokenizer`). Those name both
digests too, for a stage that comes back on another machine has nothing else. A run that is resumed uses the tokenizer
that was kept, unless its settings name one. Other text is refused unless the user says that it is meant
(`--data-changed`); another tokenizer always is.

Why not in the digest that neighbours compare: only stage 0 reads the data.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .checkpoints.kept_tokenizer import FIRST, TOKENIZER, kept_tokenizer
from .checkpoints.manifest import Manifest
from .config import RunConfig
from .data import Corpus, DataError, Preparing, Vocabulary, read_vocabulary, silently
from .preparation import prepare_corpus, prepare_vocabulary

if TYPE_CHECKING:
    from .checkpoints.assemble import Assembled

RECORD = "corpus.json"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CorpusRecord(BaseModel):
    """corpus.json. corpus: of all tokens and what made them. python: the version whose library `stdlib` is. earlier:
    corpora that the run was trained on before, and that checkpoints may still name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    python: str
    corpus: Digest
    tokenizer: Digest
    earlier: list[Digest] = []

    @property
    def title(self) -> str:
        """What the text is, for people."""
        of = f"the library of Python {self.python}" if self.source == "stdlib" else self.source
        return f"{of}, digest {self.corpus[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCorpus:
    """An open corpus, and what the run's checkpoints may say of theirs. changed: the user says that other text is
    meant."""

    corpus: Corpus
    record: CorpusRecord | None  # None: nobody reads the ids (an emulated run)
    remedy: str  # for another tokenizer than the run's
    changed: bool = False

    def check(self, manifests: Iterable[Manifest]) -> RunCorpus:
        """Compare with the checkpoints that training may go on from. Returns it with what they add to its record.
        Raises DataError."""
        record = self.record
        for found in manifests if record else ():
            assert record
            if not found.tokenizer:  # made by who does not read the text
                continue
            if found.tokenizer != record.tokenizer:
                where = f"the checkpoint after {found.completed} steps"
                raise _another_tokenizer(where, found.tokenizer, record, self.remedy)
            if found.corpus in (record.corpus, *record.earlier):
                continue
            there = f"the checkpoint after {found.completed} steps is of the text with digest {found.corpus[:12]}"
            if not self.changed:
                raise _another_text(there, record)
            record = record.model_copy(update={"earlier": [*record.earlier, found.corpus]})
        return replace(self, record=record)

    def keep(self, out: Path) -> None:
        """Write the record into the run's directory. Raises DataError."""
        if self.record is None:
            return
        content = (self.record.model_dump_json(indent=1) + "\n").encode()
        path, aside = out / RECORD, out / f".{RECORD}-{os.getpid()}"
        try:
            if not path.exists() or path.read_bytes() != content:
                aside.write_bytes(content)
                aside.replace(path)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; make room, or choose another --out") from None


def open_run_corpus(
    config: RunConfig, out: Path, *, resume: bool, changed: bool = False, report: Preparing = silently
) -> RunCorpus:
    """Open the text of the run whose records are in `out`, and `corpus_of_run`. Raises DataError."""
    corpus = prepare_corpus(config, report, kept=kept_tokenizer(config.checkpoint.path(out)) if resume else None)
    return corpus_of_run(corpus, config, out, resume=resume, changed=changed)


def corpus_of_run(corpus: Corpus, config: RunConfig, out: Path, *, resume: bool, changed: bool = False) -> RunCorpus:
    """An open corpus as that of the run whose records are in `out`. resume: what was kept there has to agree with it.
    Raises DataError."""
    kept = read_record(out) if resume else None
    remedy = _remedy(config, out)
    if not corpus.digest:
        return RunCorpus(corpus=corpus, record=None, remedy=remedy)
    digest = hashlib.sha256(corpus.tokenizer_files["tokenizer.json"]).hexdigest()
    version = platform.python_version()
    record = CorpusRecord(source=config.data.source, python=version, corpus=corpus.digest, tokenizer=digest)
    if kept:
        if kept.tokenizer != record.tokenizer:
            raise _another_tokenizer(f"{out}/{RECORD}", kept.tokenizer, record, remedy)
        if kept.corpus != record.corpus and not changed:
            raise _another_text(f"the run in {out} was trained on {kept.title}", record)
        before = dict.fromkeys([*kept.earlier, kept.corpus])
        record = record.model_copy(update={"earlier": [each for each in before if each != record.corpus]})
    return RunCorpus(corpus=corpus, record=record, remedy=remedy, changed=changed)


def check_named_tokenizer(config: RunConfig, out: Path) -> None:
    """Raises DataError where the settings name a tokenizer that cannot be read, and the run in `out` has kept it."""
    if (named := config.data.tokenizer) is None or kept_tokenizer(config.checkpoint.path(out)) is None:
        return
    try:
        read_vocabulary(named)
    except DataError as error:
        raise DataError(f"{str(error).removesuffix('; check data.tokenizer')}; {_remedy(config, out)}") from None


def _remedy(config: RunConfig, out: Path) -> str:
    """For a tokenizer that is not the run's."""
    checkpoints = config.checkpoint.path(out)
    if kept := kept_tokenizer(checkpoints):
        return f"the run has kept its own: set data.tokenizer={kept}"
    there = checkpoints / FIRST / TOKENIZER
    if config.data.tokenizer is not None:
        return f"set data.tokenizer to what it was when the run began; {there}, where it was kept, is gone or damaged"
    return f"bring the directory {there} from where the run was begun"


def vocabulary_of_run(found: Assembled) -> Vocabulary:
    """The tokenizer that the text of a run was coded with: the one that it keeps, or else one that is made again.
    Raises DataError, also where that is another one."""
    vocabulary = prepare_vocabulary(found.config, found.tokenizer)
    digest, wanted = hashlib.sha256(vocabulary.content).hexdigest(), found.text[1]
    if wanted and digest != wanted:
        raise DataError(
            f"{vocabulary.name} is not the run's: {digest[:12]} here, {wanted[:12]} in the checkpoints, so ids would "
            f"mean other tokens than the weights were trained on; bring the directory {FIRST}/{TOKENIZER} to those "
            "checkpoints from where the run was begun"
        )
    return vocabulary


def read_record(out: Path) -> CorpusRecord | None:
    """What is kept in the run's directory, if something is. Raises DataError."""
    path = out / RECORD
    try:
        return CorpusRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError:
        raise DataError(f"{path} is damaged; remove it, and checkpoints alone say what the text was") from None


def carry_corpus(run: Path, out: Path) -> None:
    """What is kept in `run` is so in `out`, for the same run in another form. Raises DataError."""
    try:
        if (run / RECORD).exists():
            shutil.copyfile(run / RECORD, out / RECORD)
    except OSError as error:
        raise DataError(f"cannot write {out}/{RECORD}: {error.strerror}; make room, or choose another --out") from None


def _another_text(there: str, record: CorpusRecord) -> DataError:
    return DataError(
        f"data.source has changed: {there}, here is {record.title}; give it as it was, or say --data-changed to go on "
        "with this one and the run's own tokenizer"
    )


def _another_tokenizer(where: str, wanted: str, record: CorpusRecord, remedy: str) -> DataError:
    return DataError(
        f"the tokenizer is not the run's: {record.tokenizer[:12]} here, {wanted[:12]} in {where}, so ids would mean "
        f"other tokens than the weights were trained on; {remedy}"
    )
