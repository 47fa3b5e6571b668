"""Models that come in: directories as transformers writes them, small and random, in a run of two stages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from thinpipe.cli import app
from thinpipe.node import preparation
from thinpipe.node.config import ConfigError
from thinpipe.node.config_file import dump_config
from thinpipe.node.data import DataError
from thinpipe.node.model import ModelError, check_checkpoint
from thinpipe.node.one_process import OneProcess
from thinpipe.node.preparation import check_settings, prepare, resolve_architecture
from typer.testing import CliRunner

from .cluster import run_cluster
from .conftest import TinyConfig
from .in_memory import run_reference
from .published import SHAPES, SIZES, VOCABULARY, save, tokenizer

EXACT: dict[str, Any] = {"codec.codec": "fp32", "pipeline.stages": 2, "run.steps": 2, "model.pretrained": True}
EXACT |= {"model.width": None, "model.layers": None, "model.vocab_size": None}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save(tmp_path / "model", SHAPES["llama"]())
    return tmp_path / "model"


def coming_in(tiny: TinyConfig, directory: Path, **changes: Any) -> Any:
    given = {"model.path": directory, "data.tokenizer": directory / "tokenizer.json"}
    return tiny({**EXACT, **given, **changes})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_directory_of_transformers_trains_on_from_its_own_loss(shape: str, tiny: TinyConfig, tmp_path: Path) -> None:
    """The first loss of a run of two stages is the loss that transformers computes with that directory."""
    save(tmp_path, SHAPES[shape]())
    config = coming_in(tiny, tmp_path)
    check_settings(config)
    run = OneProcess(config)
    seeing = "sees" in shape
    auto = transformers.AutoModelForImageTextToText if seeing else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, dtype=torch.float32)
    loss_sum = 0.0
    for number in range(config.pipeline.microbatches):
        ids_BS = torch.from_numpy(run.corpus.batch(0, number, microbatches=4, batch_size=2)).long()
        with torch.no_grad():
            logits_BTV = theirs(input_ids=ids_BS[:, :-1], use_cache=False).logits
        loss_sum += float(F.cross_entropy(logits_BTV.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum"))
    losses, _ = run.train()
    assert losses[0] == pytest.approx(loss_sum / config.tokens_per_step, rel=1e-5)
    assert losses[1] != losses[0]


@pytest.mark.slow
def test_a_published_directory_trains_in_a_swarm(llama: Path, tiny: TinyConfig, tmp_path: Path) -> None:
    config = coming_in(tiny, llama, **{"run.steps": 20, "codec.codec": "mapl:r=8"})
    (tmp_path / "run.toml").write_text(dump_config(config))
    ended = []
    for out, more in (("swarm", []), ("one", ["--one-process"])):
        given = ["up", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / out), "--json", *more]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        ended.append(json.loads((tmp_path / out / "summary.json").read_text()))
    assert [stage["state_sha256"] for stage in ended[0]["stages"]] == [
        stage["state_sha256"] for stage in ended[1]["stages"]
    ]


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_gpt2_in_a_swarm_has_the_bits_of_one_process(schedule: str, tiny: TinyConfig, tmp_path: Path) -> None:
    """Its positions are the first stage's, its matrices lie the other way round, and no weight gradient can wait."""
    save(tmp_path / "model", SHAPES["gpt2"]())
    given = {"codec.codec": "mapl:r=8", "pipeline.stages": 3, "pipeline.schedule": schedule, "run.steps": 3}
    config = coming_in(tiny, tmp_path / "model", **given)
    ended = run_cluster(config, tmp_path / "swarm", [], hurry=True)
    reference = run_reference(config, tmp_path / "one")
    assert ended.losses == reference.losses
    assert ended.state_sha256 == reference.state_sha256
    stages = [prepare(config, index)[0].model for index in range(3)]
    named = [[name for name, _ in stage.full_names()] for stage in stages]
    assert [sum("wpe" in name for name in of_stage) for of_stage in named] == [1, 0, 0]
    assert [name for name in named[1] if name.endswith("c_fc.weight")] == ["transformer.h.2.mlp.c_fc.weight"]


def test_either_end_of_a_tied_pair_is_enough(tiny: TinyConfig, tmp_path: Path) -> None:
    whole = save(tmp_path, transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = coming_in(tiny, tmp_path)
    check_settings(config)
    stage = prepare(config, 0)[0]
    assert torch.equal(stage.model.full_state()["model.embed_tokens.weight"], whole.model.embed_tokens.weight)


# What is coded, or of another model


def quantised_in_words(directory: Path) -> None:
    tree = json.loads((directory / "config.json").read_text())
    tree["quantization_config"] = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (directory / "config.json").write_text(json.dumps(tree))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def as_float8(stored: dict[str, torch.Tensor]) -> None:
    stored[NAME] = stored[NAME].to(torch.float8_e4m3fn)


def as_int8(stored: dict[str, torch.Tensor]) -> None:
    stored[NAME] = (stored[NAME] * 100).to(torch.int8)


def with_scales(stored: dict[str, torch.Tensor]) -> None:
    stored["model.layers.1.mlp.up_proj.weight_scale"] = torch.ones(1)


def with_bias(stored: dict[str, torch.Tensor]) -> None:
    stored["model.layers.3.self_attn.q_proj.bias"] = torch.ones(32)


def shorter(stored: dict[str, torch.Tensor]) -> None:
    del stored["model.layers.3.mlp.up_proj.weight"]


BAD = [
    (quantised_in_words, r"the checkpoint .* is quantised \(compressed-tensors\), .*; give one in bf16, fp16 or fp32"),
    (as_float8, r"is quantised: it has model.layers.1.mlp.up_proj.weight as F8_E4M3, .*; give one in bf16"),
    (as_int8, r"is quantised: it has model.layers.1.mlp.up_proj.weight as I8, .*; give one in bf16"),
    (with_scales, r"has model.layers.1.mlp.up_proj.weight_scale, which this architecture has not: .* quantised, or of"),
    (with_bias, r"has model.layers.3.self_attn.q_proj.bias, which this architecture has not: .*, or of another"),
    (shorter, r"lacks model.layers.3.mlp.up_proj.weight; is it of this architecture\?"),
]


@pytest.mark.parametrize(("change", "fault"), BAD, ids=[change.__name__ for change, _ in BAD])
def test_a_checkpoint_that_does_not_fit_is_refused_before_the_text_is_read(
    change: Any, fault: str, llama: Path, tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if change is quantised_in_words:
        change(llama)
    else:
        rewrite(llama, change)
    config = coming_in(tiny, llama)
    (tmp_path / "run.toml").write_text(dump_config(config))
    line = refused_early(monkeypatch, ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")])
    assert re.search(fault, line), line
    if change is not quantised_in_words:  # the node that holds the tensor says the same
        with pytest.raises(ModelError, match=fault):
            prepare(config, 0 if "layers.1" in fault else 1)


def refused_early(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> str:
    """The one line of an `up` that neither reads text nor starts a process."""

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the input is refused too late")

    for name in ("open_run_corpus", "fork_server", "run_swarm"):
        monkeypatch.setattr(f"thinpipe.node.local.{name}", too_late)
    result = CliRunner().invoke(app, ["up", *given])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    return line


def test_random_weights_need_no_plain_checkpoint(llama: Path, tiny: TinyConfig) -> None:
    quantised_in_words(llama)
    architecture = resolve_architecture(coming_in(tiny, llama, **{"model.pretrained": False}))
    assert not hasattr(architecture, "quantization_config")


EARLY = [
    (
        {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 4},
        [],
        r"gpt2 has resid_pdrop = 0.1, embd_pdrop = 0.1, attn_pdrop = 0.1: dropout draws differently",
    ),
    ({"model_type": "mamba", "hidden_size": 32}, [], r"architecture 'mamba' is not supported"),
    ({"model_type": "t5"}, [], r"architecture 't5' is not supported: transformers has no text decoder for it"),
    ({"model_type": "siglip"}, [], r"architecture 'siglip' is not supported: transformers has no text decoder"),
    ({}, ["--codec", "mapl:r=33"], r"r=33"),
    ({}, ["--codec", "ssn:k=40"], r"codec 'ssn': "),
    ({}, ["--set", "compute.device=mps"], r"compute.device 'mps' is unknown; use cpu, cuda or cuda:N"),
    ({}, ["--set", "compute.device=meta"], r"compute.device 'meta' is unknown"),
    ({}, ["--set", "compute.compile=true"], r"compute.compile needs a compiler, and this machine has no g\+\+ or clan"),
]


@pytest.mark.parametrize(("tree", "given", "fault"), EARLY, ids=[fault[:40] for *_, fault in EARLY])
def test_what_cannot_be_trained_is_refused_before_the_text_is_read(
    tree: dict[str, Any],
    given: list[str],
    fault: str,
    tiny: TinyConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(preparation.shutil, "which", lambda _: None)
    described = tree or transformers.LlamaConfig(**SIZES).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(described))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = coming_in(tiny, tmp_path, **{"model.pretrained": False})
    (tmp_path / "run.toml").write_text(dump_config(config))
    base = ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    line = refused_early(monkeypatch, [*base, *given])
    assert re.search(fault, line), line


def test_a_compiler_that_is_named_is_looked_for(tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"no no-such-compiler; install one \(apt-get install g\+\+\), name it in CXX"
    ):
        preparation.check_device(tiny({"compute.compile": True}))


# A tokenizer beside its model


def test_a_tokenizer_may_have_more_ids_than_its_model(tiny: TinyConfig, tmp_path: Path) -> None:
    """As published pairs have: what counts are the ids of the text."""
    save(tmp_path, SHAPES["llama"](), extra_ids=2)
    config = coming_in(tiny, tmp_path)
    assert check_settings(config) == 32
    assert resolve_architecture(config).vocab_size == VOCABULARY
    OneProcess(config).train()


@pytest.mark.parametrize("cached", [False, True])
def test_an_id_of_the_text_that_the_model_lacks_is_refused(cached: bool, tiny: TinyConfig, tmp_path: Path) -> None:
    """Also where the ids are in the cache, made for another model."""
    for name, ids in (("wide", VOCABULARY), ("narrow", VOCABULARY - 20)):
        save(tmp_path / name, transformers.LlamaConfig(**{**SIZES, "vocab_size": ids}))
    given = {"data.tokenizer": tmp_path / "wide" / "tokenizer.json", "data.cache": tmp_path / "cache"}
    if cached:
        preparation.prepare_corpus(coming_in(tiny, tmp_path / "wide", **given))
    narrow = coming_in(tiny, tmp_path / "narrow", **given)
    check_settings(narrow)
    with pytest.raises(
        DataError, match=r"token 3\d\d \('.*'\), but the model's vocabulary ends at 299; use the model's"
    ):
        preparation.prepare_corpus(narrow)


def test_a_checkpoint_is_checked_whole_from_its_headers(llama: Path, tiny: TinyConfig) -> None:
    config = coming_in(tiny, llama)
    check_checkpoint(resolve_architecture(config), llama)
    (llama / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"cannot read .*model.safetensors: .*; copy the checkpoint again"):
        check_settings(config)
