"""A new run from the weights of another one: what it begins with, what it takes over, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.cli import app
from thinpipe.compress.byte_format import Direction, Key
from thinpipe.node.checkpoints.assemble import Assembled, assemble
from thinpipe.node.codec_start import FILE
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.config_file import dump_config, load_config
from thinpipe.node.data.batches import draw
from thinpipe.node.evaluating.chain import Chain
from thinpipe.node.export.portable_model import plain_model
from thinpipe.node.export.tokenizer_files import portable_tokenizer
from thinpipe.node.model import ModelError
from thinpipe.node.one_process import OneProcess
from thinpipe.node.origin import begin_from
from thinpipe.node.preparation import prepare_vocabulary
from thinpipe.node.run_corpus import vocabulary_of_run
from thinpipe.node.run_directory import START, hold_aside
from thinpipe.node.stage import Stage
from thinpipe.protocol.messages import Kind
from thinpipe.protocol.schedule import Forward
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from typer.testing import CliRunner

from .cluster import run_cluster
from .conftest import TinyConfig
from .faults_reference import MAPL
from .in_memory import run_reference
from .real_faults import records
from .test_convert import SMALL

CODECS: dict[str, dict[str, Any]] = {
    "mapl": {
        "codec.codec": "mapl:r=8,anchors=factorized,pairs=16,every=2,context=2,ce=4,ch=8",
        "codec.forward": "rvq:groups=2,codes=16,delta=robin/4",
        "codec.backward": "rvq:groups=4,codes=8,levels=1,delta=drift/2,encoding=int8,hadamard=true",
    },
    "resbm": {"codec.codec": "resbm:b=8,anchors=full"},
    "identity": {"codec.codec": "fp32"},
}
LEARNER = ("/counts", "/sums", "/updates")  # of a codebook


@pytest.fixture(scope="module", params=CODECS)
def trained(request: pytest.FixtureRequest, tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has ended."""
    run = tmp_path_factory.mktemp("trained")
    config = tiny(SMALL | CODECS[request.param] | {"run.steps": 4})
    run_cluster(config, run, [], hurry=True)
    (run / "run.toml").write_text(dump_config(config))
    return run


def up(*options: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["up", "--one-process", *options])
    assert done.exit_code == code, done.output
    return done


def began(config: RunConfig) -> list[dict[str, torch.Tensor]]:
    """The state of each stage before the first step, and the codebooks that its ends begin with."""
    states = []
    for stage in OneProcess(config).stages:
        states.append(stage.state_tensors())
        ends = {
            "activation_codebook_below": stage.downstream_endpoint,
            "gradient_codebook_above": stage.upstream_endpoint,
        }
        for name, end in ends.items():
            if end and end.codebook:
                assert not any(name in each for each in states[-1])  # nothing was sent yet
                learned = end.codebook._format.state_tensors()
                states[-1] |= {f"codec/{name}/{part}": tensor for part, tensor in learned.items()}
    return states


def assert_weights(states: list[dict[str, torch.Tensor]], found: Assembled) -> None:
    weights = {
        name.removeprefix("weight/"): tensor
        for state in states
        for name, tensor in state.items()
        if name.startswith("weight/") and not name.startswith("weight/codec.")
    }
    assert weights.keys() == found.weights.keys()
    assert all(torch.equal(tensor, found.weights[name]) for name, tensor in weights.items())


def test_it_begins_with_all_that_the_run_had_learned(trained: Path, tmp_path: Path) -> None:
    """Weights, and what the codec knows at each boundary; no moments."""
    found = assemble(trained)
    config = begin_from(trained, {}).place(tmp_path / "new")
    states = began(config)
    assert_weights(states, found)
    for stage, (state, before) in enumerate(zip(states, found.snapshots, strict=True)):
        for name, tensor in before.tensors.items():
            learned = name.startswith("weight/codec.") or name in ("codec/sender/master",) or "codec/tokens/" in name
            if learned or name.endswith(LEARNER):
                assert torch.equal(state[name], tensor), (stage, name)
        assert not any(tensor.any() for name, tensor in state.items() if name.startswith(("muon", "adamw")))
    assert (config.run.origin, config.run.steps) == (f"{trained} after 4 steps", 4)
    assert config.data.tokenizer == tmp_path / "new" / "tokenizer.json"
    assert (config.run.origin_codec != "") == (config.codec.codec != "fp32")


def test_the_first_tensors_are_coded_as_the_run_would_have_coded_them(trained: Path, tmp_path: Path) -> None:
    """So the new run's first loss is what the old run's evaluation gives for that text, to the last bit; the second
    microbatch is coded with what the first one taught the codebook."""
    found = assemble(trained)
    config = begin_from(trained, {"optim.muon_lr": 0.003}).place(tmp_path / "new")
    new, was = OneProcess(config).lanes[0], Chain(found, vocabulary_of_run(trained, found).tokenizer, begin_id=0)
    for index in range(config.pipeline.stages):
        new._together(index, 0, Forward(microbatch=0), (0,))
    ids_BS = draw(new.corpus, config, Kind.ACTIVATION, 0, 0)
    logits = was.rounded_logits(ids_BS, 0)
    targets = torch.from_numpy(ids_BS[:, 1:].astype("int64"))
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert new.stages[-1]._saved[0, 0].loss_sum == wanted.item()


def test_other_byte_formats_begin_their_codebooks_anew(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(SMALL | CODECS["mapl"] | {"run.steps": 2})
    run_cluster(config, tmp_path / "run", [], hurry=True)
    (tmp_path / "run" / "run.toml").write_text(dump_config(config))

    def begun(number: int, **given: Any) -> tuple[list[str], list[dict[str, torch.Tensor]]]:
        settings = {f"codec.{direction}": spec for direction, spec in given.items()}
        origin = begin_from(tmp_path / "run", settings | {"pipeline.microbatches": 1})
        states = began(origin.place(tmp_path / f"{number}"))
        return [line for line in origin.boundary_lines() if "codebooks" in line], states

    anew = "begin untrained: their byte format is another than that of"
    lines, states = begun(0, forward="rvq:groups=2,codes=32")
    assert lines == [f"codebooks of activations {anew} {tmp_path / 'run'}"]
    assert not any("activation_codebook" in name for name in states[0])
    assert "codec/gradient_codebook_above/counts" in states[1]
    # rotated vectors are other vectors; what none packs needs no word
    lines, states = begun(1, forward="int4", backward="rvq:groups=4,codes=8,levels=1")
    assert lines == [f"codebooks of gradients {anew} {tmp_path / 'run'}"]
    # how it goes on learning, and how it is sent, may be another way; and tensors may be larger
    lines, states = begun(2, forward="rvq:groups=2,codes=16,delta=full,decay=0.9,scale=log4")
    assert lines == []
    before = assemble(tmp_path / "run").boundaries[0].codebooks["activations"]
    own = {name: states[0][f"codec/activation_codebook_below/{name}"] for name in ("counts", "sums")}
    assert torch.equal(own["counts"], 2 * before["counts"])  # a microbatch is twice as large
    assert torch.equal(own["sums"], 2 * before["sums"])


def test_what_a_tokenizer_adds_by_itself_is_not_what_weights_know(tiny: TinyConfig, tmp_path: Path) -> None:
    """Of a run from random weights, the next one's export would otherwise begin each text with a token that no training
    ever saw."""
    raw = prepare_vocabulary(tiny()).tokenizer
    raw.add_special_tokens(["<s>"])
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])  # pyright: ignore[reportAttributeAccessIssue]
    raw.save(str(tmp_path / "mine.json"))
    given = {"data.tokenizer": str(tmp_path / "mine.json"), "model.vocab_size": None, "run.steps": 2}
    config = tiny(SMALL | CODECS["identity"] | given)
    run_cluster(config, tmp_path / "run", [], hurry=True)
    (tmp_path / "run" / "run.toml").write_text(dump_config(config))
    text, source = "def alpha(x):", tmp_path / "run"
    plain = raw.encode(text, add_special_tokens=False).ids
    assert raw.encode(text).ids != plain
    for name in ("second", "third"):
        origin = begin_from(source, {})
        assert origin.lines == []
        new = origin.place(tmp_path / name / START)
        run_cluster(new, tmp_path / name, [], hurry=True)
        source = tmp_path / name
        (source / "run.toml").write_text(dump_config(new))
        found = assemble(source)
        words = portable_tokenizer(vocabulary_of_run(source, found), found.config, longest=None)
        assert words(text)["input_ids"] == plain, name


def test_a_whole_run_toml_asks_for_nothing_else(trained: Path) -> None:
    """That of the run itself: it says a preset and a width, and that nothing is pretrained."""
    tree = tomllib.loads((trained / "run.toml").read_text())
    whole = {f"{section}.{name}": value for section, table in tree.items() for name, value in table.items()}
    assert begin_from(trained, whole).config.model_dump() == begin_from(trained, {}).config.model_dump()


def test_another_cut_keeps_what_belongs_to_a_boundary(trained: Path, tmp_path: Path) -> None:
    origin = begin_from(trained, {"pipeline.stages": 3, "pipeline.cut": "1,1,2"})
    states = began(origin.place(tmp_path / "new"))
    assert_weights(states, found := assemble(trained))
    said = origin.boundary_lines()
    if origin.config.codec.codec == "fp32":
        assert said == []
        return
    assert said == [
        "boundary 0, after 1 layer: is new, its codec begins untrained",
        "boundary 1, after 2 layers: goes on as boundary 0 was",
    ]
    for stage, source in ((1, 0), (2, 1)):
        for name, tensor in found.tokens[source].items():
            own = f"weight/codec.stage_{stage}.{name}"
            assert torch.equal(
                states[stage].get(own, states[stage].get(f"codec/tokens/{name}", torch.zeros(()))), tensor
            )


def test_another_codec_begins_untrained(trained: Path, tmp_path: Path) -> None:
    origin = begin_from(trained, {"codec.codec": "mapl:r=4"})
    config = origin.place(tmp_path / "new")
    assert_weights(began(config), assemble(trained))
    assert config.run.origin_codec == ""
    assert (config.optim.muon_lr, config.optim.adamw_lr) == (0.01, 0.02)  # those recommended for the new one
    (line,) = origin.boundary_lines()
    assert line.startswith("codec mapl:r=4 is another than that of")


@pytest.mark.pairwise(1)
def test_a_swarm_that_begins_so_has_the_bits_of_one_process(trained: Path, tmp_path: Path) -> None:
    """Also when all are set back to the first step, which is built from the settings."""
    config = begin_from(trained, {"run.seed": 5, "checkpoint.every": 0}).place(tmp_path / "new")
    ended = run_cluster(config, tmp_path / "swarm", [], hurry=True)
    reference = run_reference(config, tmp_path / "reference")
    assert ended.losses == reference.losses
    assert ended.state_sha256 == reference.state_sha256
    first = records(trained, 0, "step")[0]["loss"]
    assert ended.losses[0][0] < first  # it has learned something


def test_a_token_table_is_part_of_the_embedding(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(SMALL | MAPL | {"run.steps": 2})
    run_cluster(config, tmp_path / "run", [], hurry=True)
    (tmp_path / "run" / "run.toml").write_text(dump_config(config))
    first = OneProcess(config).stages[0]
    new = begin_from(tmp_path / "run", {"codec.codec": "fp32"}).place(tmp_path / "new")
    own = OneProcess(new).stages[0].model.base.embed_tokens.weight
    assert first.model.token_table_VD is not None
    was = assemble(tmp_path / "run").weights["model.embed_tokens.weight"]
    assert torch.equal(own, was + first.model.token_table_VD)


def test_a_subspace_is_multiplied_out(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(SMALL | {"codec.codec": "ssn:k=8", "run.steps": 2})
    run_cluster(config, tmp_path / "run", [], hurry=True)
    (tmp_path / "run" / "run.toml").write_text(dump_config(config))
    plain = plain_model(assemble(tmp_path / "run")).weights
    states = began(begin_from(tmp_path / "run", {"codec.codec": "mapl:r=8"}).place(tmp_path / "new"))
    weights = {name: tensor for state in states for name, tensor in state.items()}
    assert all(torch.equal(weights[f"weight/{name}"], tensor) for name, tensor in plain.items())
    refused = up("--from", str(tmp_path / "run"), "--out", str(tmp_path / "other"), code=2).stderr
    assert "codec 'ssn' starts from weights of its own" in refused


def test_both_ends_have_to_begin_with_the_same_file(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny(SMALL | CODECS["mapl"] | {"run.steps": 2})
    run_cluster(config, tmp_path / "run", [], hurry=True)
    (tmp_path / "run" / "run.toml").write_text(dump_config(config))
    new = begin_from(tmp_path / "run", {}).place(tmp_path / "new")
    path = tmp_path / "new" / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(ModelError, match=r"is not what the run began with: its digest is .*; copy .* from the machine"):
        OneProcess(new)
    path.unlink()
    with pytest.raises(ModelError, match=r"cannot read .*codec\.safetensors: No such file or directory; copy"):
        OneProcess(new)


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    config = tiny(SMALL | CODECS["identity"] | {"run.steps": 2})
    run_cluster(config, directory, [], hurry=True)
    (directory / "run.toml").write_text(dump_config(config))
    return directory


def test_a_run_from_a_run_needs_nothing_of_it(run: Path, tmp_path: Path) -> None:
    """Its directory has all: it can be gone on with, and begun again, when the other one is gone."""
    shutil.copytree(run, source := tmp_path / "source")
    out = tmp_path / "new"
    up("--from", str(source), "--out", str(out), "--steps", "3", "--seed", "9")
    shutil.rmtree(source)
    config = load_config(out / "run.toml")
    assert (config.model.path, config.model.pretrained, config.run.seed) == ((out / START).resolve(), True, 9)
    assert config.run.origin == f"{source} after 2 steps"
    assert sorted(path.name for path in (out / START).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",  # which token ends a document
    ]
    before = json.loads((out / "summary.json").read_text())
    up("--config", str(out / "run.toml"), "--out", str(out), "--overwrite")
    again = json.loads((out / "summary.json").read_text())
    assert again["stages"][0]["state_sha256"] == before["stages"][0]["state_sha256"]
    assert not list(out.glob(".*"))
    up("--from", str(out / START), "--config", str(out / "run.toml"), "--out", str(tmp_path / "third"))
    third = json.loads((tmp_path / "third" / "summary.json").read_text())
    assert third["stages"][0]["state_sha256"] == before["stages"][0]["state_sha256"]


@pytest.fixture
def begun(trained: Path, tmp_path: Path) -> Path:
    """A run of a swarm that began from another one."""
    out = tmp_path / "begun"
    config = begin_from(trained, {"run.steps": 2, "checkpoint.every": 1}).place(out / START)
    run_cluster(config, out, [], hurry=True)
    (out / "run.toml").write_text(dump_config(config))
    return out


@pytest.mark.pairwise(1)
def test_a_converted_run_has_what_it_began_with(begun: Path, tmp_path: Path) -> None:
    """So the run that it was made of may go."""
    other = tmp_path / "other"
    done = CliRunner().invoke(app, ["checkpoint", "convert", str(begun), "--out", str(other), "--cut", "1,1,2"])
    assert done.exit_code == 0, done.output
    files = {path.name: path.read_bytes() for path in (begun / START).iterdir()}
    shutil.rmtree(begun)
    assert {path.name: path.read_bytes() for path in (other / START).iterdir()} == files
    config = load_config(other / "run.toml")
    assert (config.model.path, config.data.tokenizer) == (other / START, other / START / "tokenizer.json")
    longer = config.model_copy(update={"run": config.run.model_copy(update={"steps": 3})})
    ended = run_cluster(longer, other, [], resume=True)
    assert len(ended.losses[0]) == 1


def test_a_boundary_that_only_the_start_had_begins_as_it_did(trained: Path, tmp_path: Path) -> None:
    """After two layers: the earlier run had one there, the run has none, and the converted one has one again."""
    out, other = tmp_path / "begun", tmp_path / "other"
    config = begin_from(trained, {"run.steps": 2, "checkpoint.every": 1, "pipeline.cut": "1,3"}).place(out / START)
    run_cluster(config, out, [], hurry=True)
    (out / "run.toml").write_text(dump_config(config))
    done = CliRunner().invoke(app, ["checkpoint", "convert", str(out), "--out", str(other), "--cut", "1,1,2"])
    assert done.exit_code == 0, done.output
    if config.codec.codec == "fp32":
        assert "boundary 0" not in done.stdout
        return
    assert done.stdout.splitlines()[:2] == [
        "boundary 0, after 1 layer: goes on as boundary 0 was",
        "boundary 1, after 2 layers: is new, its codec begins with what the run began with there",
    ]
    then, now = assemble(trained).boundaries[0], assemble(other).boundaries[1]
    if then.master is not None:
        assert torch.equal(now.master, then.master)
    for half in ("sender", "receiver"):
        learned = getattr(then, half)
        assert all(torch.equal(tensor, learned[name]) for name, tensor in getattr(now, half).items())
    found = assemble(other)
    stage, before = Stage(found.config, found.architecture, 1), found.snapshots[1]
    for _ in range(2):  # and once more after it was set back
        stage.restore(before)
        port = stage.downstream_endpoint
        if port and port.codebook and (learned := then.codebooks["activations"]):
            now_learned = port.codebook._format.state_tensors()
            assert now_learned
            assert all(torch.equal(tensor, learned[name]) for name, tensor in now_learned.items())
            z = torch.randn(port.shape.z_shape)
            key = Key(seed=1, boundary=1, direction=Direction.FORWARD, step=2, microbatch=0)
            port.codebook.pack(z, key, training=True)
            assert torch.equal(torch.tensor(port.codebook.shipped), learned["shipped"])
    longer = load_config(other / "run.toml")
    longer = longer.model_copy(update={"run": longer.run.model_copy(update={"steps": 3})})
    assert len(run_cluster(longer, other, [], resume=True).losses[0]) == 1


@pytest.mark.pairwise(1)
def test_a_run_that_was_moved_is_found_with_its_first_weights(begun: Path, tmp_path: Path) -> None:
    moved = begun.rename(tmp_path / "moved")
    assert assemble(moved).config.model.path == moved / START
    up("--from", str(moved), "--out", str(tmp_path / "new"), "--steps", "1")
    shutil.rmtree(moved / START)
    for command in (["checkpoint", "convert", "--stages", "3"], ["up", "--one-process", "--from"], ["export"]):
        done = CliRunner().invoke(app, [*command, str(moved), "--out", str(tmp_path / "other")])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert f"{begun / START} is not there, and the run in {moved} began from " in done.stderr
        assert "bring it back, or set model.path in" in done.stderr
        assert not (tmp_path / "other").exists()


def test_what_a_killed_command_left_is_swept(run: Path, tmp_path: Path) -> None:
    """And not what another one is about to write."""
    left, used = (tmp_path / f".{START}-{number}" for number in (1, 2))
    os.close(hold_aside(left))
    (left / "model.safetensors").write_text("half")
    held = hold_aside(used)
    up("--from", str(run), "--out", str(tmp_path), "--steps", "1")
    assert (left.exists(), used.exists()) == (False, True)
    os.close(held)
    up("--from", str(run), "--out", str(tmp_path), "--steps", "1", "--overwrite")
    assert not list(tmp_path.glob(".*"))


def test_another_tokenizer_is_warned_of_and_must_fit(run: Path, tmp_path: Path) -> None:
    own = begin_from(run, {}).tokenizer
    assert own
    tree = json.loads(own.content)
    other, large = tmp_path / "other.json", tmp_path / "large.json"
    other.write_text(json.dumps(tree))
    tree["model"]["vocab"]["<|endoftext|>"] = tree["added_tokens"][0]["id"] = 600
    large.write_text(json.dumps(tree))
    (tmp_path / "as-published").mkdir()
    other = other.rename(tmp_path / "as-published" / "tokenizer.json").parent
    said = up("--from", str(run), "--out", str(tmp_path / "new"), "--set", f"data.tokenizer={other}").stdout
    assert f"data.tokenizer = {other} is not the tokenizer of {run}: the same ids mean other text now" in said
    refused = up("--from", str(run), "--out", str(tmp_path / "b"), "--set", f"data.tokenizer={large}", code=2).stderr
    assert (
        "the text has token 600 ('<|endoftext|>'), but the model's vocabulary ends at 511; use the model's" in refused
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from", "{dir}"], r"there is neither a run.toml nor a config.json in {dir}, so neither a run nor a model"),
        (["--from", "{dir}/missing"], r"there is neither a run.toml nor a config.json in {dir}/missing"),
        (["--set", "model.width=64"], "model.width = 64, but the model of the run has 32; omit it"),
        (["--set", "model.layers=2"], "model.layers = 2, but the model of the run has 4; omit it"),
        (["--set", "model.vocab_size=600"], "model.vocab_size = 600, but the model of the run has 512; omit it"),
        (["--model", "150m"], "model.preset = 150m, but the model of the run has tiny; omit it"),
        (["--model", "{dir}"], "model.path = {dir}, but --from brings a model of its own; omit one of the two"),
        (["--sequence-length", "4096"], "data.sequence_length = 4096, but the model's context is"),
        (["--stages", "9"], "9 stages, but the model has 4 layers; set pipeline.stages = 6 or fewer"),
        (["--codec", "ssn"], "codec 'ssn' starts from weights of its own"),
        (["--codec", "mapl:r=8,table=1"], "say table=0"),
        (["--resume", "{dir}"], "--from begins a new run, --resume goes on with one; omit one of the two"),
        (["--out", "{run}"], "the new run would replace it; choose another --out"),
        (["--set", "run.seed=no"], "run.seed: "),
    ],
    ids=str,
)
def test_what_no_run_can_begin_from(options: list[str], said: str, run: Path, tmp_path: Path) -> None:
    given = [option.format(dir=tmp_path, run=run) for option in options]
    source = [] if "--from" in options else ["--from", str(run)]
    out = [] if "--out" in options else ["--out", str(tmp_path / "a" / "b")]
    before = sorted(run.rglob("*"))
    done = up(*source, *out, *given, code=2)
    assert done.stderr.count("\n") == 1
    assert said.format(dir=tmp_path) in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert sorted(run.rglob("*")) == before


def test_runs_without_weights_to_begin_from(tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(dump_config(tiny({"pipeline.stages": 2})))
    done = up("--from", str(tmp_path), "--out", str(tmp_path / "new"), code=2)
    assert f"--from {tmp_path}: there is no checkpoint in {tmp_path / 'checkpoints'}" in done.stderr
    (tmp_path / "run.toml").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "other", "auto_map": {}}')
    with pytest.raises(ConfigError, match="has code of its own"):
        begin_from(tmp_path, {})
