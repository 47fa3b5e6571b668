"""An exported model computes what the stages of its run compute, loads without this package, and generates alike with
and without a cache. Each codec that is registered, on two architectures; and what cannot be exported is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from thinpipe.cli import app
from thinpipe.compress.codec_interface import Codec
from thinpipe.compress.identity import IdentityCodec
from thinpipe.compress.registry import codec_names
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.export import export as export_module
from thinpipe.node.export import modeling_thinpipe
from thinpipe.node.export.export import export_run
from thinpipe.node.preparation import prepare_vocabulary
from thinpipe.node.stage import Stage
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from transformers.modeling_outputs import CausalLMOutputWithPast
from typer.testing import CliRunner

from .conftest import TinyConfig
from .published import tokenizer
from .test_bad_input import refused
from .test_model import EXACT
from .trained_run import shake, train

CONTEXT = "mapl:r=8,context=4,ce=6,ch=10,every=1"
VARIANTS = {
    "identity": "identity",
    "identity, table": "identity:table=1",
    "mapl": CONTEXT,
    "mapl, all of it": f"{CONTEXT},anchors=factorized,ar=6,pairs=64,table=1",
    "mapl, projector alone": "mapl:r=8,anchors=none,context=0,projector=fixed",
    "mapl, every third step": "mapl:r=8,context=0,every=3,pairs=32",
    "resbm": "resbm:b=8",
    "resbm, all of it": "resbm:b=8,anchors=full,pairs=64,context=3,ce=6,ch=10,table=1",
    "resbm, linear": "resbm:b=8,kind=linear",
    "ssn": "ssn:k=8",
    "ssn, wider": "ssn:k=8,spend=ffn,table=0",
}
PLAIN = [name for name in VARIANTS if name.startswith(("identity", "ssn"))]
LOOKS_BACK = ["mapl", "mapl, all of it", "resbm, all of it"]
STEPS, STAGES, TOKENS = 4, 3, 24
# Of float32: what a model multiplies out beforehand is summed in another order.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies the modelling file of a directory to."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr(sys, "path", [*sys.path])


def qwen3(directory: Path) -> dict[str, Any]:
    """The settings of a decoder from a file, with heads that share keys."""
    directory.mkdir(exist_ok=True)
    transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ).to_json_file(directory / "config.json")
    return {"model.path": str(directory), "model.width": None, "model.layers": None}


def configure(tiny: TinyConfig, spec: str, **more: Any) -> RunConfig:
    """An export has nothing of byte formats, and codebooks of 256 codes take their time to begin."""
    formats = {"codec.forward": "int4", "codec.backward": "int4"} if spec.startswith("mapl") else {}
    return tiny({"pipeline.stages": STAGES, "run.steps": STEPS, "codec.codec": spec, **formats, **more})


@torch.no_grad()
def stages_compute(stages: list[Stage], ids_BT: Tensor) -> Tensor:
    """Logits (B, T, V) as a swarm's evaluation has them, with nothing rounded between the stages."""
    crossing = ids_BT
    for stage in stages:
        hidden = stage.model(crossing if stage.first else stage.receiver.decode(crossing, ids_BT))
        crossing = hidden if stage.last else stage.sender.encode(hidden, ids_BT)
    return crossing


def load(directory: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    return model.eval()


def some_ids(rows: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 512, (rows, tokens)))


# -- what it computes ---------------------------------------------------------------------------------------------


def test_every_codec_is_here() -> None:
    assert {spec.partition(":")[0] for spec in VARIANTS.values()} >= set(codec_names())


@pytest.mark.pairwise(6)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_computes_what_the_stages_compute(name: str, kind: str, tiny: TinyConfig, tmp_path: Path) -> None:
    more = qwen3(tmp_path / "qwen3") if kind == "qwen3" else {}
    stages = train(configure(tiny, VARIANTS[name], **more), tmp_path / "run", after=shake)
    written = export_run(tmp_path / "run", tmp_path / "out")

    assert (written["boundaries"], written["step"]) == (0 if name in PLAIN else STAGES - 1, STEPS)
    model = load(tmp_path / "out")
    wanted_BTV = stages_compute(stages, ids_BT := some_ids())
    with torch.no_grad():
        assert (model(ids_BT).logits - wanted_BTV).abs().max() <= TOLERANCE * wanted_BTV.abs().max()
        if name not in PLAIN:  # and the boundaries are worth something here
            model.without_boundaries = True
            assert (model(ids_BT).logits - wanted_BTV).abs().max() > 0.01 * wanted_BTV.abs().max()


# -- generating ---------------------------------------------------------------------------------------------------

# What this version calls it; earlier ones of transformers 5 call it past_key_values.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
PADDED = ["alpha beta gamma", "link", "node wire stage token layer loss"]  # of different lengths


@pytest.fixture(scope="module")
def looking_back(
    tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], modeling_thinpipe.ThinpipeForCausalLM]:
    """By name, models whose boundaries look at earlier tokens."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            place = tmp_path_factory.mktemp("looking")
            train(configure(tiny, VARIANTS[name]), place / "run", after=shake)
            export_run(place / "run", place / "out")
            made[name] = modeling_thinpipe.ThinpipeForCausalLM.from_pretrained(place / "out").eval()
            made[name].tokenizer = AutoTokenizer.from_pretrained(place / "out", padding_side="left")
        return made[name]

    return make


@pytest.mark.pairwise(4)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("name", LOOKS_BACK)
def test_a_cache_changes_nothing(name: str, how: dict[str, Any], looking_back: Any) -> None:
    model = looking_back(name)
    asked = model.tokenizer(PADDED, return_tensors="pt", padding=True, return_token_type_ids=False)
    if "prompt_lookup_num_tokens" in how:  # one sequence at a time; it crops the cache
        asked = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])}
    ways = {**how, "max_new_tokens": 12, "eos_token_id": None}
    torch.manual_seed(1)
    with_cache = model.generate(**asked, **ways)
    ways.pop("prompt_lookup_num_tokens", None)
    torch.manual_seed(1)
    without = model.generate(**asked, **{**ways, "use_cache": False})
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", LOOKS_BACK)
def test_padding_at_the_left_is_no_token(name: str, looking_back: Any) -> None:
    model = looking_back(name)
    asked = model.tokenizer(PADDED, return_tensors="pt", padding=True, return_token_type_ids=False)
    together = model(**asked).logits
    for row, text in enumerate(PADDED):
        alone = model(**model.tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        assert (together[row, -len(alone) :] - alone).abs().max() <= TOLERANCE * alone.abs().max()


@pytest.mark.parametrize("name", LOOKS_BACK)
def test_token_by_token_and_piece_by_piece(name: str, looking_back: Any) -> None:
    model, ids_BT = looking_back(name), some_ids()
    with torch.no_grad():
        whole = model(ids_BT).logits
        cache, parts = None, []
        for start, stop in [(0, 1), (1, 2), (2, 9), (9, 10), (10, TOKENS)]:
            found = model(ids_BT[:, start:stop], **{CACHE: cache}, use_cache=True)
            cache = getattr(found, CACHE)
            parts.append(found.logits)
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= TOLERANCE * whole.abs().max()


def test_what_it_cannot_know_is_refused(looking_back: Any) -> None:
    model, ids_BT = looking_back("mapl"), some_ids()
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids_BT))
    foreign = getattr(model.decoder.model(ids_BT, use_cache=True), CACHE)
    with pytest.raises(ValueError, match="the cache has tokens that this model has not seen"):
        model(ids_BT, **{CACHE: foreign})
    padded = model.tokenizer(PADDED, return_tensors="pt", padding=True, return_token_type_ids=False)
    with pytest.raises(ValueError, match="which a static one cannot grow by: use a dynamic one"):
        model.generate(**padded, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match=r"tell padding from tokens: give an attention mask \(B, T\)"):
        model(ids_BT, attention_mask=torch.ones(3, 1, TOKENS, TOKENS, dtype=torch.bool))
    with pytest.raises(ValueError, match="an attention mask of 5 tokens, but there are 0 in the cache and 24 new ones"):
        model(ids_BT, attention_mask=torch.ones(3, 5, dtype=torch.int64))
    recompute = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    with pytest.raises(ValueError, match=r"does not support (activation|gradient) checkpointing"):
        recompute()


def test_it_can_be_trained_further(looking_back: Any) -> None:
    model, ids_BT = looking_back("mapl, all of it"), some_ids()
    model(ids_BT, labels=ids_BT).loss.backward()
    lacking = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    model.zero_grad()
    assert not lacking


ALONE = """
import sys
sys.modules["thinpipe"] = None  # whoever imports it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2])
torch.save(model(ids).logits, sys.argv[3])
asked = tokenizer("alpha beta", return_tensors="pt", return_token_type_ids=False)
cached, plain = (model.generate(**asked, max_new_tokens=8, use_cache=use) for use in (True, False))
assert torch.equal(cached, plain)
model.save_pretrained(sys.argv[4])  # and what it saves is as good
again = AutoModelForCausalLM.from_pretrained(sys.argv[4], trust_remote_code=True)
assert torch.equal(again(ids).logits, model(ids).logits)
"""


@pytest.mark.slow
def test_it_loads_without_this_package(tiny: TinyConfig, tmp_path: Path) -> None:
    stages = train(configure(tiny, VARIANTS["mapl, all of it"]), tmp_path / "run", after=shake)
    export_run(tmp_path / "run", tmp_path / "out")
    torch.save(ids_BT := some_ids(), tmp_path / "ids.pt")
    places = [str(tmp_path / name) for name in ("out", "ids.pt", "logits.pt", "again")]
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", ALONE, *places], check=True, env=environment, cwd=tmp_path)
    wanted_BTV = stages_compute(stages, ids_BT)
    found_BTV = torch.load(tmp_path / "logits.pt")
    assert (found_BTV - wanted_BTV).abs().max() <= TOLERANCE * wanted_BTV.abs().max()


def test_with_boundaries_it_never_loads_as_a_plain_model(tiny: TinyConfig, tmp_path: Path) -> None:
    train(configure(tiny, CONTEXT), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


# -- what is in the directory -------------------------------------------------------------------------------------


def test_weights_are_the_stages_own(tiny: TinyConfig, tmp_path: Path) -> None:
    """Bit for bit, in several files too."""
    stages = train(configure(tiny, CONTEXT), tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "SHARD_BYTES", 100_000)
        export_run(tmp_path / "run", tmp_path / "out")
    found = load(tmp_path / "out").decoder.state_dict()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    own = {name: each.detach() for stage in stages for name, each in stage.model.full_names()}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_float64_stays(tiny: TinyConfig, tmp_path: Path) -> None:
    stages = train(configure(tiny, CONTEXT, **{"compute.dtype": "float64"}), tmp_path / "run", after=shake)
    export_run(tmp_path / "run", tmp_path / "out")
    wanted_BTV, model = stages_compute(stages, ids_BT := some_ids()), load(tmp_path / "out")
    assert model.dtype == torch.float64
    with torch.no_grad():
        assert (model(ids_BT).logits - wanted_BTV).abs().max() <= 1e-6 * wanted_BTV.abs().max()


def test_its_tokenizer_gives_the_ids_that_it_was_trained_on(tiny: TinyConfig, tmp_path: Path) -> None:
    config = configure(tiny, "identity", **{"pipeline.stages": 2})
    train(config, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out"), prepare_vocabulary(config)
    text = "def alpha_beta(x7):\n    return node(x, 31) + β\n"
    assert [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] == vocabulary.encode([text])[0].tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    said = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    end = vocabulary.end_id
    assert (said.bos_token_id, said.eos_token_id, said.pad_token_id) == (end, end, end)
    assert load(tmp_path / "out").config.eos_token_id == end
    assert load(tmp_path / "out").config.pad_token_id is None  # its row would not train


def test_a_published_tokenizer_keeps_its_special_tokens(tiny: TinyConfig, tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    vocabulary = prepare_vocabulary(tiny())
    raw = vocabulary.tokenizer
    raw.add_special_tokens(["<s>", "</s>"])
    published = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    published._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    published.save_pretrained(source)
    assert published("alpha")["input_ids"][0] == raw.token_to_id("<s>")
    given = {"data.tokenizer": str(source / "tokenizer.json"), "model.vocab_size": None, "pipeline.stages": 2}
    train(configure(tiny, "identity", **given), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")  # what ended documents here
    assert tokenizer("alpha")["input_ids"] == raw.encode("alpha", add_special_tokens=False).ids


def test_gemma_scales_its_embedding(tiny: TinyConfig, tmp_path: Path) -> None:
    """So the token table that becomes a part of it is divided by that."""
    transformers.Gemma3TextConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 6,
    ).to_json_file(tmp_path / "config.json")
    given = {"model.path": str(tmp_path), "model.width": None, "model.layers": None}
    stages = train(configure(tiny, "identity:table=1", **given), tmp_path / "run", after=shake)
    export_run(tmp_path / "run", tmp_path / "out")
    wanted_BTV = stages_compute(stages, ids_BT := some_ids())
    with torch.no_grad():
        assert (load(tmp_path / "out")(ids_BT).logits - wanted_BTV).abs().max() <= TOLERANCE * wanted_BTV.abs().max()


@pytest.mark.pairwise(3)
@pytest.mark.parametrize("stages", [3, 2])
@pytest.mark.parametrize("name", EXACT)
def test_every_architecture_that_can_be_cut(name: str, stages: int, tiny: TinyConfig, tmp_path: Path) -> None:
    """Of two stages, the last has no layer."""
    architecture = EXACT[name]()
    architecture.vocab_size = 512
    architecture.to_json_file(tmp_path / "config.json")
    given = {"model.path": str(tmp_path), "model.width": None, "model.layers": None, "pipeline.stages": stages}
    given |= {"pipeline.cut": f"{architecture.num_hidden_layers},0"} if stages == 2 else {}
    given |= {"model.attention": architecture._attn_implementation}
    trained = train(configure(tiny, f"{CONTEXT},table=1", **given), tmp_path / "run", after=shake)
    export_run(tmp_path / "run", tmp_path / "out")
    wanted_BTV = stages_compute(trained, ids_BT := some_ids())
    with torch.no_grad():
        assert (load(tmp_path / "out")(ids_BT).logits - wanted_BTV).abs().max() <= TOLERANCE * wanted_BTV.abs().max()


def test_constants_of_the_weights_that_a_run_began_with(tiny: TinyConfig, tmp_path: Path) -> None:
    """They are no parameters, so no stage saves them."""
    architecture = EXACT["apertus"]()
    architecture.vocab_size = 512
    first: Any = transformers.AutoModelForCausalLM.from_config(architecture)
    first.model.layers[1].mlp.act_fn.beta.fill_(0.25)
    first.save_pretrained(tmp_path / "first")
    tokenizer().save(str(tmp_path / "first" / "tokenizer.json"))
    given = {"model.path": str(tmp_path / "first"), "model.pretrained": True, "model.width": None, "model.layers": None}
    stages = train(configure(tiny, "identity", **given), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    wanted_BTV = stages_compute(stages, ids_BT := some_ids())
    found = load(tmp_path / "out")
    assert [float(layer.mlp.act_fn.beta) for layer in found.model.layers] == [0.5, 0.25, 0.5, 0.5, 0.5]
    with torch.no_grad():
        assert (found(ids_BT).logits - wanted_BTV).abs().max() <= TOLERANCE * wanted_BTV.abs().max()


@pytest.mark.parametrize("cut", ["4,0", "0,4"])
def test_a_stage_without_layers(cut: str, tiny: TinyConfig, tmp_path: Path) -> None:
    """Its boundary lies before the last norm, or behind the embedding."""
    given = {"pipeline.stages": 2, "pipeline.cut": cut}
    stages = train(configure(tiny, CONTEXT, **given), tmp_path / "run", after=shake)
    export_run(tmp_path / "run", tmp_path / "out")
    wanted_BTV = stages_compute(stages, ids_BT := some_ids())
    with torch.no_grad():
        assert (load(tmp_path / "out")(ids_BT).logits - wanted_BTV).abs().max() <= TOLERANCE * wanted_BTV.abs().max()


# -- losses, and the command --------------------------------------------------------------------------------------


def told(arguments: list[str]) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["export", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("spec", "more"),
    [
        ("identity", {}),
        (CONTEXT, {}),
        ("resbm:b=8", {}),
        ("ssn:k=8", {}),
        (CONTEXT, {"pipeline.delay": 1}),  # all gradients are in it
        ("ssn:k=8", {"pipeline.delay": 1, "pipeline.predict": "orthogonal"}),
    ],
)
def test_the_loss_is_the_runs_own_but_for_the_wire(
    spec: str, more: dict[str, Any], tiny: TinyConfig, tmp_path: Path
) -> None:
    """Here, a wire that does not round."""
    exact = {"codec.forward": "fp32", "codec.backward": "fp32", **more}
    train(configure(tiny, spec, **exact), tmp_path / "run")
    written = told([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert written["held_out"]["loss"] == pytest.approx(written["held_out"]["loss_recorded"], rel=1e-6)


def test_plain_says_what_the_boundaries_are_worth(tiny: TinyConfig, tmp_path: Path) -> None:
    train(configure(tiny, CONTEXT), tmp_path / "run", after=shake)
    whole = told([str(tmp_path / "run"), "--out", str(tmp_path / "whole")])
    plain = told([str(tmp_path / "run"), "--out", str(tmp_path / "plain"), "--plain"])
    assert (whole["boundaries"], plain["boundaries"], plain["boundaries_left_out"]) == (2, 0, 2)
    assert plain["held_out"]["loss_with_boundaries"] == pytest.approx(whole["held_out"]["loss"], rel=1e-6)
    assert plain["held_out"]["loss"] > plain["held_out"]["loss_with_boundaries"] + 0.01
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")) is transformers.LlamaForCausalLM

    shown = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--plain"])
    assert "with its boundaries" in shown.stdout
    assert "this model, without them" in shown.stdout
    assert "2 boundaries left out" in shown.stdout


def test_without_the_text_there_is_no_loss_and_a_model(tiny: TinyConfig, tiny_text: Path, tmp_path: Path) -> None:
    """The tokenizer is beside the checkpoints, or beside a neighbour's copies; where both are gone too, nothing can be
    made of the ids."""
    (text := tmp_path / "text.txt").write_bytes(tiny_text.read_bytes())
    config = configure(tiny, "identity", **{"data.source": str(text), "pipeline.stages": 2})
    train(config, tmp_path / "run")
    first = told([str(tmp_path / "run"), "--out", str(tmp_path / "first")])
    assert first["held_out"]["loss"] == pytest.approx(first["held_out"]["loss_recorded"], rel=1e-6)
    text.unlink()
    second = told([str(tmp_path / "run"), "--out", str(tmp_path / "second")])
    assert second["held_out"]["loss"] is None
    assert "no such file or directory" in second["held_out"]["reason"]
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]

    copies = tmp_path / "run" / "checkpoints" / "copies" / "stage-0" / "tokenizer"
    copies.parent.mkdir(parents=True)
    (kept := tmp_path / "run" / "checkpoints" / "stage-0" / "tokenizer").rename(copies)
    told([str(tmp_path / "run"), "--out", str(tmp_path / "of-copies")])
    assert (tmp_path / "of-copies" / "tokenizer.json").read_bytes() == files[0]
    copies.rename(tmp_path / "moved")
    line = refused(["export", str(tmp_path / "run"), "--out", str(tmp_path / "third")])
    assert "no such file or directory" in line
    moved = ["--set", f"data.tokenizer={tmp_path / 'moved'}"]
    assert told([str(tmp_path / "run"), "--out", str(tmp_path / "third"), *moved])["parameters"] > 0
    assert not kept.exists()


def test_the_tokenizer_is_the_runs_own_whatever_the_text_is_now(
    tiny: TinyConfig, tiny_text: Path, tmp_path: Path
) -> None:
    (text := tmp_path / "text.txt").write_bytes(tiny_text.read_bytes())
    train(configure(tiny, "identity", **{"data.source": str(text), "pipeline.stages": 2}), tmp_path / "run")
    told([str(tmp_path / "run"), "--out", str(tmp_path / "first")])
    text.write_text("quite other words, of which another tokenizer would be made\n" * 2000)
    second = told([str(tmp_path / "run"), "--out", str(tmp_path / "second")])
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    assert second["held_out"]["loss"] is None  # of other text, beside the one that the run recorded
    fault = (
        r"data\.source has changed: the run in .*run was trained on .*text\.txt, digest .*, here is .*; name the run's"
    )
    assert re.match(fault, second["held_out"]["reason"])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "stage-0" / "tokenizer")
    line = refused(["export", str(tmp_path / "run"), "--out", str(tmp_path / "third")])
    assert re.search(r"the tokenizer is not the run's: .* here, .* in the checkpoint after 4 steps", line)


@pytest.mark.slow
def test_what_a_real_swarm_leaves(tiny: TinyConfig, tmp_path: Path) -> None:
    config = configure(tiny, CONTEXT, **{"pipeline.stages": 2, "codec.forward": "fp32", "codec.backward": "fp32"})
    (tmp_path / "run.toml").write_text(dump_config(config))
    given = ["up", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), "--json"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    kept = tmp_path / "run" / "checkpoints" / "stage-0" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == prepare_vocabulary(config).path.read_bytes()
    written = told([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert written["held_out"]["loss"] == pytest.approx(written["held_out"]["loss_recorded"], rel=1e-6)


@pytest.fixture(scope="module")
def small_run(tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("small") / "run"
    train(configure(tiny, "identity", **{"pipeline.stages": 2}), place)
    return place


def test_refusals(small_run: Path, tiny: TinyConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("")
    (tmp_path / "never").mkdir()
    (tmp_path / "never" / "run.toml").write_text(dump_config(tiny({"pipeline.stages": 2})))
    out = ["--out", str(tmp_path / "out")]
    cases = [
        ([str(tmp_path / "empty"), *out], r"empty is not the directory of a run: it holds no run\.toml"),
        ([str(small_run), "--out", str(tmp_path / "taken")], r"--out .*taken is not empty; choose a new one"),
        ([str(small_run), "--out", str(tmp_path / "taken" / "precious")], r"precious is no directory; choose a new"),
        ([str(small_run), *out, "--step", "3"], r"stage 0 has no checkpoint after 3 steps in .*; all stages have 4"),
        ([str(tmp_path / "never"), *out], r"there is no checkpoint in .*never/checkpoints"),
        ([str(small_run), *out, "--set", "codec.codec=mapl"], r"--set: .*codec.*only data\.source"),
        ([str(small_run), *out, "--set", "optim.muon_lr=0.5"], r"--set: .*muon_lr.*only data\.source"),
    ]
    for arguments, expected in cases:
        line = refused(["export", *arguments])
        assert re.search(expected, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "never", "taken"]
    assert told([str(small_run), "--out", str(tmp_path / "empty")])["step"] == STEPS  # an empty one will do


def test_a_codec_that_says_nothing_of_its_boundaries_is_refused(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdentityCodec, "boundary_function", Codec.boundary_function)
    line = refused(["export", str(small_run), "--out", str(tmp_path / "out")])
    assert "codec 'identity' cannot be exported: it does not say what its boundaries compute" in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_module, "_write_weights", full)
    result = CliRunner().invoke(app, ["export", str(small_run), "--out", str(tmp_path / "new" / "out")])
    assert result.exit_code == 1
    assert re.fullmatch(r"thinpipe: error: cannot write .*out: No space left on device; .*\n", result.stderr)
    assert not list(tmp_path.iterdir())
