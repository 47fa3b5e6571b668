"""Paths as people write them: with a ~ that no shell has replaced, with brackets, in a file that begins with a mark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from thinpipe.cli import app
from thinpipe.node.config_file import dump_config, read_toml
from thinpipe.node.config_sections import CheckpointSection, DataSection, ModelSection
from thinpipe.node.data.local_files import expanded
from typer.testing import CliRunner

from .conftest import TinyConfig
from .corpora import texts, write_jsonl


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_paths_in_settings_may_begin_at_home(home):
    assert ModelSection.model_validate({"path": "~/model"}).path == home / "model"
    assert CheckpointSection.model_validate({"directory": "~/kept"}).directory == home / "kept"
    data = DataSection.model_validate({"tokenizer": "~/t.json", "cache": "~"})
    assert (data.tokenizer, data.cache) == (home / "t.json", home)
    assert expanded("~/text") == home / "text"
    # nobody's, and a name like any other
    assert expanded("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert DataSection.model_validate({"cache": "a~b/~"}).cache == Path("a~b/~")


def test_a_file_of_settings_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\nsteps = 1\n")
    assert read_toml(path) == {"run": {"steps": 1}}


def test_a_run_between_brackets_and_tildes(home, tiny: TinyConfig):
    """All that is printed of them is what they are, to the last line."""
    docs = write_jsonl(home / "[red]" / "a[/b]" / "rows.jsonl", texts(400))
    config = tiny({"run.steps": 1, "pipeline.stages": 2, "data.cache": str(home / "cache")})
    (home / "run.toml").write_text(dump_config(config), encoding="utf-8-sig")
    out = home / "[lr=0.1]" / "b[/b]"
    given = ["--config=~/run.toml", f"--data=~/{docs.parent.relative_to(home)}", "--out=~/[lr=0.1]/b[/b]"]
    result = CliRunner().invoke(app, ["up", "--one-process", *given])
    assert result.exit_code == 0, result.output
    said = result.stdout.replace("\n", "")
    assert f"{docs.parent}: 400 documents, " in said
    assert f"everything is in {out}: run.toml" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"]["documents"] == 400
    assert f"{summary['data']['tokens']:,} tokens, {summary['data']['heldout_tokens']:,} of them held out" in said
    assert summary["parameters"] > 64 * 512
    assert f"the model: {summary['parameters']:,} parameters in 2 stages" in said
    wrong = CliRunner().invoke(app, ["up", "--config=~/run.toml", "--data=~/[red]/[/x]", f"--out={home}/n"])
    assert wrong.exit_code == 2
    assert f"no such file or directory: {home}/[red]/[/x]; set" in wrong.stderr
