"""A run knows its text: other text and another tokenizer are refused by name, wherever stage 0 comes back."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from thinpipe.cli import app
from thinpipe.node.checkpoints.kept_tokenizer import keep_tokenizer, kept_tokenizer
from thinpipe.node.checkpoints.manifest import FORMAT, NOTES, Manifest, seal
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.data import DataError
from thinpipe.node.run_corpus import RECORD, RunCorpus, open_run_corpus, read_record, tokenizer_of_run
from tokenizers import Tokenizer
from typer.testing import CliRunner

from .cluster import run_cluster
from .conftest import TinyConfig
from .faults_reference import SETTINGS

MORE = "zebra = quagga(zebra, quagga) + zebra\n" * 2000


class Text:
    """A file of text that may change, and a run of it."""

    def __init__(self, tiny: TinyConfig, tiny_text: Path, directory: Path) -> None:
        self.path, self.out = directory / "text.txt", directory / "run"
        self.path.write_text(tiny_text.read_text(encoding="utf-8"), encoding="utf-8")
        self.config: RunConfig = tiny({"data.source": str(self.path), **SETTINGS})
        self.out.mkdir()

    def change(self) -> None:
        self.path.write_text(self.path.read_text(encoding="utf-8") + MORE, encoding="utf-8")

    def begin(self) -> RunCorpus:
        begun = open_run_corpus(self.config, self.out, resume=False)
        begun.keep(self.out)
        keep_tokenizer(self.checkpoints, begun.corpus.tokenizer_files)
        return begun

    @property
    def checkpoints(self) -> Path:
        return self.config.checkpoint.path(self.out)

    def named(self, tokenizer: Path) -> None:
        """The same run, whose settings name this one."""
        data = self.config.data.model_copy(update={"tokenizer": tokenizer})
        self.config = self.config.model_copy(update={"data": data})

    def resume(self, *, changed: bool = False) -> RunCorpus:
        return open_run_corpus(self.config, self.out, resume=True, changed=changed)


@pytest.fixture
def text(tiny: TinyConfig, tiny_text: Path, tmp_path: Path) -> Text:
    return Text(tiny, tiny_text, tmp_path)


def checkpoint(corpus: str, tokenizer: str) -> Manifest:
    """After 4 steps, of that text."""
    return seal(
        {
            "format": FORMAT,
            "notes": NOTES,
            "run": "run",
            "configuration": "c0ffee",
            "stage": 0,
            "stages": 2,
            "completed": 4,
            "generation": 0,
            "corpus": corpus,
            "tokenizer": tokenizer,
            "beside": {},
            "dictionaries": {},
            "file_bytes": 0,
            "file_sha256": "0" * 64,
            "torch": "2",
            "written_s": 0,
        }
    )


def test_the_same_text_is_the_same(text: Text) -> None:
    begun = text.begin()
    kept = {path: path.read_bytes() for path in text.out.rglob("*") if path.is_file()}
    assert [path.name for path in sorted(kept)] == ["tokenizer.json", "tokenizer_config.json", RECORD]
    again = text.resume()
    again.keep(text.out)
    keep_tokenizer(text.checkpoints, again.corpus.tokenizer_files)
    assert again.record == begun.record == read_record(text.out)
    assert {path: path.read_bytes() for path in text.out.rglob("*") if path.is_file()} == kept


def test_a_line_more_is_refused_and_goes_on_if_it_is_meant(text: Text) -> None:
    begun = text.begin()
    assert begun.record
    text.change()
    with pytest.raises(DataError, match=r"data\.source has changed: the run in .* was trained on .*; give it"):
        text.resume()
    meant = text.resume(changed=True)
    assert meant.corpus.digest != begun.corpus.digest
    assert meant.corpus.tokenizer_files == begun.corpus.tokenizer_files  # or all ids would mean something else
    anew = open_run_corpus(text.config, text.out, resume=False)
    assert anew.corpus.tokenizer_files != begun.corpus.tokenizer_files
    meant.keep(text.out)
    again = text.resume()  # meant once is meant
    assert again.record
    assert again.record.earlier == [begun.record.corpus]
    again.check([checkpoint(begun.record.corpus, begun.record.tokenizer)])  # of before the change


def test_another_tokenizer_is_refused_even_then(text: Text, tmp_path: Path) -> None:
    text.begin()
    text.change()
    other = tmp_path / "tokenizer.json"
    files = open_run_corpus(text.config, tmp_path, resume=False).corpus.tokenizer_files
    other.write_bytes(files["tokenizer.json"])
    text.named(other)
    with pytest.raises(DataError, match=r"the tokenizer is not the run's: .* here, .* in .*corpus\.json") as refused:
        text.resume(changed=True)
    kept = text.checkpoints / "stage-0" / "tokenizer"
    assert str(refused.value).endswith(f"the run has kept its own: set data.tokenizer={kept}")
    text.named(kept)
    text.resume(changed=True)


def test_whose_tokenizer_has_changed_or_is_gone_is_told_where_it_was_kept(text: Text, tmp_path: Path) -> None:
    files = open_run_corpus(text.config, tmp_path, resume=False).corpus.tokenizer_files
    (named := tmp_path / "mine.json").write_bytes(files["tokenizer.json"])
    text.named(named)
    text.begin()
    (text.out / "run.toml").write_text(dump_config(text.config))
    changed = Tokenizer.from_file(str(named))
    changed.add_special_tokens(["<one more>"])  # so the vocabulary has another size
    changed.save(str(named))
    result = CliRunner().invoke(app, ["up", "--resume", str(text.out)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    told = rf"the tokenizer {named} is not the run's: its digest is .*; the run has kept its own: set data\.tokenizer="
    assert re.search(told, result.stderr)
    named.unlink()
    result = CliRunner().invoke(app, ["up", "--resume", str(text.out)])
    kept = text.checkpoints / "stage-0" / "tokenizer"
    assert (result.exit_code, result.stderr) == (
        2,
        f"thinpipe: error: cannot read the tokenizer {named}: No such file or directory; the run has kept its own: set "
        f"data.tokenizer={kept}\n",
    )
    text.named(kept)
    assert text.resume().record == read_record(text.out)
    (text.out / "run.toml").write_text(dump_config(text.config))
    anew = CliRunner().invoke(app, ["up", "--config", f"{text.out}/run.toml", "--out", str(text.out), "--overwrite"])
    assert (anew.exit_code, anew.stderr.count("\n")) == (2, 1)
    assert f"data.tokenizer = {kept} is a part of the run that would be replaced; copy it" in anew.stderr
    assert tokenizer_of_run(text.checkpoints, text.out) == kept


def test_a_damaged_tokenizer_is_not_used(text: Text) -> None:
    """A neighbour's copy is, and without one it is made again, which gives the same as long as the text is the same."""
    begun = text.begin()
    run_cluster(text.config, text.out, [], hurry=True)
    own = text.checkpoints / "stage-0"
    shutil.copytree(own, copy := text.checkpoints / "copies" / "stage-0")
    (own / "tokenizer" / "tokenizer.json").write_text("{}")
    assert kept_tokenizer(text.checkpoints) == copy / "tokenizer"
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert kept_tokenizer(text.checkpoints) is None
    assert text.resume().record == begun.record
    text.change()
    there = re.escape(str(own / "tokenizer"))
    with pytest.raises(DataError, match=rf"the tokenizer is not the run's: .*; bring the directory {there} from where"):
        text.resume()


@pytest.mark.parametrize("recorded", [True, False], ids=["after the first step", "before it"])
def test_a_tokenizer_that_another_run_left_there_is_not_used(
    recorded: bool, text: Text, tiny: TinyConfig, tiny_text: Path, tmp_path: Path
) -> None:
    """Until the first checkpoint only the record beside run.toml says whose it is, and until the first step nothing."""
    (tmp_path / "earlier").mkdir()
    earlier = Text(tiny, tiny_text, tmp_path / "earlier")
    earlier.change()
    others = earlier.begin().corpus.tokenizer_files
    shutil.copytree(earlier.checkpoints, text.checkpoints)
    begun = open_run_corpus(text.config, text.out, resume=False)
    if recorded:
        begun.keep(text.out)
    assert text.resume().corpus.tokenizer_files == begun.corpus.tokenizer_files != others


def test_checkpoints_say_what_they_were_trained_on(text: Text) -> None:
    begun = text.begin()
    assert begun.record
    other, own = "f" * 64, begun.record
    assert begun.check([checkpoint(own.corpus, own.tokenizer)]).record == own
    with pytest.raises(DataError, match=r"the checkpoint after 4 steps is of the text with digest ffffffffffff"):
        begun.check([checkpoint(own.corpus, own.tokenizer), checkpoint(other, own.tokenizer)])
    with pytest.raises(DataError, match=r"ffffffffffff in the checkpoint after 4 steps"):
        begun.check([checkpoint(own.corpus, other)])
    found = RunCorpus(corpus=begun.corpus, record=own, own="", changed=True).check([checkpoint(other, own.tokenizer)])
    assert found.record
    assert found.record.earlier == [other]


def test_stage_0_of_another_text_on_another_machine_is_refused(text: Text) -> None:
    """It has its checkpoints, and nothing else of the run: with the tokenizer that is there, or without it."""
    run_cluster(text.config, text.out, [], hurry=True)
    (text.out / RECORD).unlink()
    text.change()
    with pytest.raises(DataError, match=r"has changed: the checkpoint after 6 steps is of the text with digest"):
        run_cluster(text.config, text.out, [], resume=True, hurry=True)
    shutil.rmtree(text.checkpoints / "stage-0" / "tokenizer")
    with pytest.raises(DataError, match=r"the tokenizer is not the run's: .* in the checkpoint after 6 steps"):
        run_cluster(text.config, text.out, [], resume=True, hurry=True)


def test_up_refuses_before_anything_starts(text: Text) -> None:
    text.begin()
    (text.out / "run.toml").write_text(dump_config(text.config))
    text.change()
    result = CliRunner().invoke(app, ["up", "--resume", str(text.out)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "data.source has changed" in result.stderr
    assert "--data-changed" in result.stderr


def test_a_damaged_record_is_named(text: Text) -> None:
    text.begin()
    (text.out / RECORD).write_text("{")
    with pytest.raises(DataError, match=r"corpus\.json is damaged; remove it"):
        text.resume()
