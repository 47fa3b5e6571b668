"""The text that a run is trained on, and a record of it beside the run, so that no other text takes its place unseen.

A tokenizer is trained on the text, so one more line of it may be another tokenizer, and to weights that were trained
with the old one every id means something else: the loss rises, and nothing fails. Python's own library, the default
text, is another one in another version of Python. So stage 0 writes `corpus.json`, with the digests of the tokens and
of the tokenizer, and keeps the tokenizer itself beside its checkpoints (`checkpoints.kept_tokenizer`). Those name both
digests too, for a stage that comes back on another machine has nothing else. A run that is resumed uses the tokenizer
that was kept, unless its settings name one. Other text is refused unless the user says that it is meant
(`--data-changed`); another tokenizer always is. Whoever measures the run on its held-out text (`check_trained_on`)
compares the same two digests by the same function.

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
from .preparation import prepare_corpus, prepare_vocabulary, text_settings
from .run_lanes import of_lane

if TYPE_CHECKING:
    from .checkpoints.assemble import Assembled

RECORD = "corpus.json"
RESUMED = "give it as it was, or say --data-changed to go on with this one and the run's own tokenizer"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class AnotherText(DataError):
    """The text is not the one that the run was trained on, and the tokenizer is."""


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
    own: str  # where the run's own tokenizer is, in words
    changed: bool = False

    def check(self, manifests: Iterable[Manifest]) -> RunCorpus:
        """Compare with the checkpoints that training may go on from. Returns it with what they add to its record.
        Raises DataError."""
        record = self.record
        for found in manifests if record else ():
            assert record
            if not found.tokenizer:  # made by who does not read the text
                continue
            try:
                _compare(record, _of_checkpoint(found.corpus, found.tokenizer, found.completed), own=self.own)
            except AnotherText:
                if found.corpus in record.earlier:
                    continue
                if not self.changed:
                    raise
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
    checkpoints = first_checkpoints(config, out)
    corpus = prepare_corpus(config, report, kept=tokenizer_of_run(checkpoints, out) if resume else None)
    return corpus_of_run(corpus, config, out, checkpoints=checkpoints, resume=resume, changed=changed)


def first_checkpoints(config: RunConfig, out: Path) -> Path:
    """The checkpoints' directory of the run in `out`: where there are lanes, of the first of them."""
    own, place = of_lane(config, out, 0)
    return own.checkpoint.path(place)


def corpus_of_run(
    corpus: Corpus, config: RunConfig, out: Path, *, checkpoints: Path, resume: bool, changed: bool = False
) -> RunCorpus:
    """An open corpus as that of the run whose records are in `out`. resume: what was kept there has to agree with it.
    checkpoints: the directory that its tokenizer is kept in. Raises DataError."""
    kept = read_record(out) if resume else None
    own = _own_tokenizer(config, checkpoints, kept)
    if not corpus.digest:
        return RunCorpus(corpus=corpus, record=None, own=own)
    record = _record(corpus, config)
    if kept:
        try:
            _compare(record, _of_record(kept, out), own=own)
        except AnotherText:
            if not changed:
                raise
        before = dict.fromkeys([*kept.earlier, kept.corpus])
        record = record.model_copy(update={"earlier": [each for each in before if each != record.corpus]})
    return RunCorpus(corpus=corpus, record=record, own=own, changed=changed)


def tokenizer_of_run(checkpoints: Path, out: Path) -> Path | None:
    """`kept_tokenizer` of the run whose records are in `out`. Raises DataError for a damaged record."""
    return kept_tokenizer(checkpoints, _tokenizer_of(read_record(out)))


def check_named_tokenizer(config: RunConfig, checkpoints: Path, out: Path) -> None:
    """Raises DataError where the settings lead to a tokenizer that cannot be read, or is another one than is kept with
    the `checkpoints` of the run in `out`. Before anything else of a run that is resumed: with another one the model has
    another vocabulary, and its checkpoints seem to be of other settings; and to code a text takes hours."""
    record = read_record(out)
    kept = kept_tokenizer(checkpoints, _tokenizer_of(record))
    if kept is None or not (config.data.tokenizer or config.model.pretrained):
        return
    own = _own_tokenizer(config, checkpoints, record)
    try:
        named = read_vocabulary(text_settings(config).tokenizer or kept)
        run = read_vocabulary(kept)
    except DataError as error:
        raise DataError(f"{str(error).removesuffix('; check data.tokenizer')}; {own}") from None
    if named.content != run.content:
        here, there = (hashlib.sha256(each.content).hexdigest()[:12] for each in (named, run))
        raise DataError(f"{named.name} is not the run's: its digest is {here}, the run's was {there}; {own}")


def _tokenizer_of(record: CorpusRecord | None) -> str:
    return record.tokenizer if record else ""


def _own_tokenizer(config: RunConfig, checkpoints: Path, record: CorpusRecord | None) -> str:
    """Where the run's is, for who has another one. record: what is kept beside the run."""
    if kept := kept_tokenizer(checkpoints, _tokenizer_of(record)):
        return f"the run has kept its own: set data.tokenizer={kept}"
    there = checkpoints / FIRST / TOKENIZER
    if config.data.tokenizer is not None:
        return f"set data.tokenizer to what it was when the run began; {there}, where it was kept, is gone or damaged"
    return f"bring the directory {there} from where the run was begun"


def check_trained_on(corpus: Corpus, run: Path, found: Assembled, remedy: str) -> None:
    """Raises AnotherText unless `corpus`, as the settings of the run in `run` lead to it now, is what its checkpoint
    was trained on, and DataError where the tokenizer is not. What the checkpoint says counts, else what is kept beside
    the run; where nobody knows, nothing is compared. remedy: what to do, in words."""
    kept = read_record(run)
    if found.text[1] and not (kept and (kept.corpus, kept.tokenizer) == found.text):
        there = _of_checkpoint(*found.text, found.completed)
    elif kept:
        there = _of_record(kept, run)
    else:
        return
    own = _own_tokenizer(found.config, first_checkpoints(found.config, run), kept)
    _compare(_record(corpus, found.config), there, remedy, own=own)


def vocabulary_of_run(run: Path, found: Assembled) -> Vocabulary:
    """The tokenizer of the run in `run`: the one that it keeps, or what its settings lead to. Raises DataError where
    that is another one than its checkpoint names: without the first it is trained anew, on whatever text is here."""
    vocabulary = prepare_vocabulary(found.config, found.tokenizer)
    here = hashlib.sha256(vocabulary.content).hexdigest()
    if found.text[1] and here != found.text[1]:
        there = _of_checkpoint(*found.text, found.completed)
        raise _another_tokenizer(here, there, _own_tokenizer(found.config, first_checkpoints(found.config, run), None))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stated:
    """What something that is kept says of the run's text. where: the thing; line: what it says, for people."""

    corpus: str
    tokenizer: str
    where: str
    line: str


def _of_checkpoint(corpus: str, tokenizer: str, completed: int) -> _Stated:
    where = f"the checkpoint after {completed} steps"
    line = f"{where} is of the text with digest {corpus[:12]}"
    return _Stated(corpus=corpus, tokenizer=tokenizer, where=where, line=line)


def _of_record(kept: CorpusRecord, run: Path) -> _Stated:
    line = f"the run in {run} was trained on {kept.title}"
    return _Stated(corpus=kept.corpus, tokenizer=kept.tokenizer, where=f"{run}/{RECORD}", line=line)


def _record(corpus: Corpus, config: RunConfig) -> CorpusRecord:
    """Of an open corpus, whatever the run was trained on."""
    return CorpusRecord(
        source=config.data.source,
        python=platform.python_version(),
        corpus=corpus.digest,
        tokenizer=hashlib.sha256(corpus.tokenizer_files["tokenizer.json"]).hexdigest(),
    )


def _compare(here: CorpusRecord, there: _Stated, remedy: str = RESUMED, *, own: str) -> None:
    """The one place where a text is held against what a run says of its own. own: where the run's own tokenizer is.
    Raises DataError for another tokenizer, else AnotherText for another text, with that remedy."""
    if here.tokenizer != there.tokenizer:
        raise _another_tokenizer(here.tokenizer, there, own)
    if here.corpus != there.corpus:
        raise AnotherText(f"data.source has changed: {there.line}, here is {here.title}; {remedy}")


def _another_tokenizer(here: str, there: _Stated, own: str) -> DataError:
    return DataError(
        f"the tokenizer is not the run's: {here[:12]} here, {there.tokenizer[:12]} in {there.where}, so ids would mean "
        f"other tokens than the weights were trained on; {own}"
    )
