"""A chain of stages is the whole Hugging Face model, bit for bit; what cannot be so is refused by name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from thinpipe.node.config_sections import ModelSection
from thinpipe.node.model import (
    PRESETS,
    ModelError,
    StageModel,
    architecture,
    architecture_digest,
    build_stage,
    check_sliceable,
    exactness,
    partition,
    resolve_model,
    slices,
    was_tied,
)
from thinpipe.node.model.pretrained import INDEX
from thinpipe.node.model.slices import skeleton
from thinpipe.node.model.stage_cut import layer_ranges

VOCABULARY, TOKENS = 64, 12


def small(cls: type, attention: str = "sdpa", **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = cls(**(sizes | changes))
    config._attn_implementation = attention
    return config


@pytest.fixture(autouse=True)
def nothing_is_found_exact_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier test has found is remembered; here, code is exchanged that it was found with."""
    monkeypatch.setattr(exactness, "found_exact", set())


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # which is what these ship with
EXACT = {
    "llama": lambda: small(transformers.LlamaConfig),
    "llama eager": lambda: small(transformers.LlamaConfig, "eager"),
    "qwen2": lambda: small(transformers.Qwen2Config),
    "qwen3": lambda: small(transformers.Qwen3Config),
    # full attention in layers 0-2, a window in 3 and 4: wrong wherever lists are read from 0
    "qwen3 window": lambda: small(
        transformers.Qwen3Config, use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
    "mistral": lambda: small(transformers.MistralConfig, sliding_window=4),
    "gemma": lambda: small(transformers.GemmaConfig),
    "gemma2": lambda: small(transformers.Gemma2Config, "eager", sliding_window=4, final_logit_softcapping=3.0),
    "gemma3": lambda: small(
        transformers.Gemma3TextConfig, sliding_window=4, num_hidden_layers=6, sliding_window_pattern=3
    ),
    "granite": lambda: small(transformers.GraniteConfig, embedding_multiplier=12.0, logits_scaling=3.0),
    "nanochat": lambda: small(transformers.NanoChatConfig),  # its last norm is its first, too
    "gpt_neox": lambda: small(transformers.GPTNeoXConfig),  # other names for the same parts
    "gpt_neox in a row": lambda: small(transformers.GPTNeoXConfig, use_parallel_residual=False),
    "gpt2": lambda: small(transformers.GPT2Config, **NO_DROPOUT),  # learned positions; matrices the other way round
    "gpt2 scaled by layer": lambda: small(
        transformers.GPT2Config, "eager", scale_attn_by_inverse_layer_idx=True, **NO_DROPOUT
    ),
    "apertus": lambda: small(transformers.ApertusConfig),  # constants that only a constructor knows
}


def whole_model(config: Any, dtype: torch.dtype) -> Any:
    """Hugging Face's own model in memory, all parameters (norm gains too) random."""
    config.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=config._attn_implementation
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.1)
    return model


def build_all(config: Any, stages: int, **options: Any) -> list[StageModel]:
    settings = {"seed": 1, "dtype": torch.float32, "device": "cpu"} | options
    return [build_stage(config, stage=stage, stages=stages, **settings) for stage in range(stages)]


def gather(models: list[StageModel]) -> dict[str, torch.nn.Parameter]:
    pairs = [pair for model in models for pair in model.full_names()]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def run_chain(models: list[StageModel], ids: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """Forward and backward with a cut graph at every boundary, as over a wire."""
    x, boundaries = ids, []
    for model in models:
        left = model(x)
        x = left.detach().requires_grad_()
        boundaries.append((left, x))
    gradient = pull
    for left, entered in reversed(boundaries):
        if entered.grad is not None:
            gradient = entered.grad
        left.backward(gradient)
    return x.detach()


def token_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


@pytest.mark.pairwise(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", EXACT)
def test_stages_are_the_whole_model_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    config = EXACT[name]()
    check_sliceable(config)
    whole = whole_model(config, dtype)
    expected = whole(input_ids=token_ids(), use_cache=False).logits
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
    expected.backward(pull)
    for stages in (1, 2, 4):
        models = build_all(config, stages, dtype=dtype)
        ours = gather(models)
        assert list(ours) == [name for name, _ in whole.named_parameters()]
        with torch.no_grad():
            for full_name, parameter in whole.named_parameters():
                assert ours[full_name].dtype == dtype
                ours[full_name].copy_(parameter)
        assert torch.equal(run_chain(models, token_ids(), pull), expected)
        for full_name, parameter in whole.named_parameters():
            assert torch.equal(ours[full_name].grad, parameter.grad), full_name


def test_the_check_finds_per_layer_lists_that_were_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(config: Any, layers: range) -> Any:
        part = architecture.with_layers(config, range(config.num_hidden_layers))
        part.num_hidden_layers = len(layers)
        return part

    monkeypatch.setattr(slices, "with_layers", careless)
    check_sliceable(EXACT["llama"]())
    for name in ("qwen3 window", "gemma3", "gemma2"):
        with pytest.raises(ModelError, match=r"architecture '(qwen3|gemma3_text|gemma2)' cannot be cut .* differ"):
            check_sliceable(EXACT[name]())


def test_the_check_finds_buffers_that_were_not_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(causal: Any, **_: Any) -> None:
        for buffer in causal.buffers():
            buffer.zero_()

    monkeypatch.setattr(exactness, "set_constants", careless)
    with pytest.raises(ModelError, match="'llama' cannot be cut into stages exactly: logits differ"):
        check_sliceable(EXACT["llama"]())


def test_the_check_finds_a_repeated_embedding_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(causal: Any, layers: range, **ends: bool) -> StageModel:
        model = slices.cut(causal, layers, **ends)
        model.base.embedding_multiplier = 12.0
        return model

    monkeypatch.setattr(exactness, "cut", careless)
    with pytest.raises(ModelError, match="'granite' cannot be cut into stages exactly: logits differ"):
        check_sliceable(EXACT["granite"]())


BARE_ENDS = {"first": [0, 5], "last": [5, 0], "both": [0, 5, 0]}


@pytest.mark.parametrize("counts", BARE_ENDS.values(), ids=BARE_ENDS)
def test_the_check_tries_ends_without_a_layer(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only with such an end are there more than two stages, so a cut that loses a layer of an inner one shows."""

    def careless(causal: Any, layers: range, *, first: bool, last: bool) -> StageModel:
        return slices.cut(causal, layers if first or last else layers[1:], first=first, last=last)

    for name in ("llama", "qwen3 window", "gemma2", "granite"):
        check_sliceable(EXACT[name](), layer_ranges(counts))
    exactness.found_exact.clear()
    monkeypatch.setattr(exactness, "cut", careless)
    check_sliceable(EXACT["llama"]())
    check_sliceable(EXACT["llama"](), layer_ranges([3, 2]))
    with pytest.raises(ModelError, match="'llama' cannot be cut into stages exactly: logits differ"):
        check_sliceable(EXACT["llama"](), layer_ranges(counts))


UNSUPPORTED = [
    (
        lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4),
        r"gpt2 has resid_pdrop = 0.1, embd_pdrop = 0.1, attn_pdrop = 0.1: .* set resid_pdrop and embd_pdrop and attn_p",
    ),
    (lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4), r"'bloom' .*: it has no 'embed_tokens' to"),
    (lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2), r"'mamba' .*: it has no 'embed_tokens'"),
    (lambda: transformers.RwkvConfig(hidden_size=32, num_hidden_layers=2), r"'rwkv' .*: it has no 'embed_tokens'"),
    (
        lambda: transformers.ModernBertDecoderConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        ),
        r"'modernbert-decoder' .*: it has no 'embed_tokens'",
    ),
    (
        lambda: small(transformers.Gemma4TextConfig, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8),
        r"'gemma4_text' .*: it has a part 'embed_tokens_per_layer' that belongs to no stage",
    ),
    (
        lambda: transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        r"'bert' .*: it has no 'embed_tokens'",
    ),
    (lambda: small(transformers.MixtralConfig), r"mixtral is a mixture of experts \(num_local_experts = 8\)"),
    (
        lambda: small(transformers.LlamaConfig, attention_dropout=0.1),
        r"llama has attention_dropout = 0.1: .* set attention_dropout to 0",
    ),
    (
        lambda: small(transformers.Gemma2Config, "sdpa"),
        r"'gemma2' cannot be built: .*; set model.attention = 'eager'$",
    ),
]


@pytest.mark.parametrize(
    ("make", "fault"),
    UNSUPPORTED,
    ids=[fault.split("'")[1:2][0] if "'" in fault else fault.split()[0] for _, fault in UNSUPPORTED],
)
def test_unsupported_architectures_are_refused_by_name(make: Any, fault: str) -> None:
    """Whether it is supported at all is asked before what its settings say, such as BERT's dropout."""
    config = make()
    config._attn_implementation = config._attn_implementation or "eager"
    for act in (lambda: check_sliceable(config), lambda: build_all(config, 2)):
        with pytest.raises(ModelError, match=fault):
            act()


def test_an_architecture_that_leaves_a_constant_unset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither drawn, nor set by its code, nor in a checkpoint: memory would be trained on, another one in each run."""
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", lambda *_: None)
    with pytest.raises(ModelError, match=r"neither its code nor a checkpoint sets model.layers.0.input_layernorm.weig"):
        build_all(EXACT["llama"](), 2)
    monkeypatch.setattr(slices, "CONSTANTS", set())  # nor by its constructor
    with pytest.raises(ModelError, match=r"'llama' cannot be built: .* sets model.rotary_emb.inv_freq; start it from"):
        check_sliceable(EXACT["llama"]())


def test_what_was_found_exact_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same architecture with the same ends; what was refused is refused again."""
    tried: list[bool] = []

    def difference(_: Any, *, first_bare: bool, last_bare: bool) -> str | None:
        tried.append(last_bare)
        return "logits differ" if first_bare else None

    monkeypatch.setattr(exactness, "_difference", difference)
    for _ in range(2):
        check_sliceable(EXACT["llama"](), layer_ranges([3, 2]))
        check_sliceable(EXACT["llama"](), layer_ranges([5, 0]))
    assert tried == [False, True]
    check_sliceable(EXACT["llama eager"](), layer_ranges([3, 2]))
    for count in (4, 5):
        with pytest.raises(ModelError, match="logits differ"):
            check_sliceable(EXACT["llama"](), layer_ranges([0, 5]))
        assert len(tried) == count


def test_the_check_leaves_the_global_generator_and_the_configuration_alone() -> None:
    config = EXACT["gemma3"]()
    before, tree = torch.get_rng_state(), config.to_dict()
    check_sliceable(config)
    build_all(config, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert config.to_dict() == tree


@given(layers=st.integers(1, 200), stages=st.integers(1, 200))
def test_partition_laws(layers: int, stages: int) -> None:
    if layers < stages:
        with pytest.raises(ModelError, match=f"{stages} stages, but the model has {layers} layers; set pipeline"):
            partition(layers, stages)
        return
    parts = partition(layers, stages)
    assert len(parts) == stages
    assert [layer for part in parts for layer in part] == list(range(layers))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_partition_refuses_no_stages() -> None:
    with pytest.raises(ModelError, match=r"pipeline.stages = 0"):
        partition(4, 0)
    with pytest.raises(ModelError, match="stage 2 of 2: stages count from 0 to 1"):
        build_stage(EXACT["llama"](), stage=2, stages=2, seed=1, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_the_number_of_stages_does_not_change_the_initial_weights(name: str) -> None:
    config = EXACT[name]()
    one = gather(build_all(config, 1))
    for stages in (2, 5):
        torch.manual_seed(stages)  # nor does the process' own generator
        many = gather(build_all(config, stages))
        assert many.keys() == one.keys()
        assert all(torch.equal(many[key], one[key]) for key in one)
    double = gather(build_all(config, 2, dtype=torch.float64))
    assert all(torch.equal(double[key], one[key].double()) for key in one)
    other = gather(build_all(config, 1, seed=2))
    assert all(torch.equal(other[key], one[key]) == (one[key].ndim < 2) for key in one)


def test_initial_weights_follow_the_architecture() -> None:
    weights = gather(build_all(small(transformers.Qwen2Config, hidden_size=128, initializer_range=0.05), 1))
    for key, value in weights.items():
        if value.ndim < 2:
            assert torch.equal(value, torch.full_like(value, float("norm" in key))), key
        else:
            scale = 10**-0.5 if key.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            assert value.std().item() == pytest.approx(0.05 * scale, rel=0.08), key
            assert abs(value.mean().item()) < 0.01
    gains = [value for key, value in gather(build_all(EXACT["gemma2"](), 2)).items() if "norm" in key]
    assert gains
    assert not any(gain.any() for gain in gains)  # Gemma's gains are centred on zero


def test_a_vector_that_the_architecture_draws_at_random_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws_biases(_: Any, module: Any) -> None:
        for parameter in module.parameters(recurse=False):
            importlib.import_module("transformers.initialization").normal_(parameter)

    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", draws_biases)
    with pytest.raises(ModelError, match=r"llama draws model.layers.0.input_layernorm.weight at random; start it from"):
        build_all(EXACT["llama"](), 1)


def test_a_stage_never_allocates_another_stages_tensors() -> None:
    config = small(transformers.LlamaConfig, vocab_size=2**40, num_hidden_layers=4)  # an embedding of 128 TiB
    middle = build_stage(config, stage=1, stages=4, seed=1, dtype=torch.float32, device="cpu")
    assert all(key.startswith("model.layers.1.") for key, _ in middle.full_names())
    assert (middle.first, middle.last, middle.width, middle.vocab_size) == (False, False, 32, 2**40)
    assert middle(torch.zeros(1, 3, 32)).shape == (1, 3, 32)


def test_activation_checkpointing_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = transformers.models.llama.modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaMLP,
        "forward",
        lambda self, x: calls.append(self) or forward(self, x),
    )
    config = EXACT["llama"]()
    pull = torch.randn(2, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(4))
    plain, saving = build_all(config, 2), build_all(config, 2, activation_checkpointing=True)
    expected = run_chain(plain, token_ids(), pull)
    assert len(calls) == 5
    assert torch.equal(run_chain(saving, token_ids(), pull), expected)
    assert len(calls) == 5 + 10  # each layer ran twice
    theirs, ours = gather(plain), gather(saving)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key].grad, theirs[key].grad) for key in theirs)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler provokes warnings in its own tracing and swallows them
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_layers_compute_the_same_model(activation_checkpointing: bool) -> None:
    pull = torch.randn(2, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(4))
    torch.compiler.reset()
    counters = importlib.import_module("torch._dynamo.utils").counters
    counters.clear()
    plain = build_all(EXACT["llama"](), 2)
    compiled = build_all(EXACT["llama"](), 2, compile=True, activation_checkpointing=activation_checkpointing)
    torch.testing.assert_close(run_chain(compiled, token_ids(), pull), run_chain(plain, token_ids(), pull))
    assert counters["stats"]["unique_graphs"] > 0
    theirs, ours = gather(plain), gather(compiled)
    assert theirs.keys() == ours.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key].grad, theirs[key].grad)


# Pretrained starts


def save_whole(directory: Path, *, tied: bool, **options: Any) -> Any:
    config = small(transformers.LlamaConfig, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(directory, **options)
    return model


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pretrained_round_trip(tmp_path: Path, tied: bool, sharded: bool) -> None:
    whole = save_whole(tmp_path, tied=tied, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / INDEX).exists() == sharded
    config = resolve_model(ModelSection(path=tmp_path, pretrained=True), vocab_size=VOCABULARY, sequence_length=TOKENS)
    assert was_tied(config) == tied
    assert not config.tie_word_embeddings
    models = build_all(config, 3, checkpoint=tmp_path)
    ours = gather(models)
    assert ours["lm_head.weight"] is not ours["model.embed_tokens.weight"]
    assert torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"]) == tied
    assert all(torch.equal(ours[key], value) for key, value in whole.state_dict().items())
    expected = whole(input_ids=token_ids(), use_cache=False).logits
    assert torch.equal(run_chain(models, token_ids(), torch.zeros_like(expected)), expected)

    # An export is untied: two matrices that have since moved apart come back as they are.
    export = tmp_path / "export"
    state = {key: value.detach().clone() for key, value in ours.items()}
    state["lm_head.weight"] += 1
    config.save_pretrained(export)
    save_file(state, export / "model.safetensors", metadata={"format": "pt"})
    section = ModelSection(path=export, pretrained=True)
    again = resolve_model(section, vocab_size=VOCABULARY, sequence_length=TOKENS)
    assert not was_tied(again)
    assert architecture_digest(again) == architecture_digest(config)
    back = gather(build_all(again, 2, checkpoint=export))
    assert all(torch.equal(back[key], value) for key, value in state.items())
    hugging_face = transformers.AutoModelForCausalLM.from_pretrained(export)
    assert all(torch.equal(hugging_face.state_dict()[key], value) for key, value in state.items())


def test_a_stage_reads_only_its_own_tensors(tmp_path: Path) -> None:
    whole = save_whole(tmp_path, tied=False)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    kept = {key: value for key, value in state.items() if key.startswith("model.layers.2.")}
    save_file(kept, tmp_path / "model.safetensors")
    config = resolve_model(ModelSection(path=tmp_path), vocab_size=VOCABULARY, sequence_length=TOKENS)
    settings = {"stages": 5, "seed": 1, "dtype": torch.float64, "device": "cpu", "checkpoint": tmp_path}
    middle = build_stage(config, stage=2, **settings)
    assert all(torch.equal(value, kept[key].double()) for key, value in middle.full_names())
    with pytest.raises(ModelError, match=r"lacks model\.norm\.weight|lacks model\.layers\.4\..* and 10 more"):
        build_stage(config, stage=4, **settings)
    with pytest.raises(ModelError, match=r"lacks model\.embed_tokens\.weight and 9 more"):
        build_stage(config, stage=0, **settings)


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    whole = save_whole(tmp_path, tied=False)
    config = resolve_model(ModelSection(path=tmp_path), vocab_size=VOCABULARY, sequence_length=TOKENS)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    state["model.norm.weight"] = torch.zeros(31)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"has model.norm.weight \[31\], expected \[32\]"):
        build_all(config, 2, checkpoint=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match=r"cannot read .*model.safetensors: .*; copy the checkpoint again"):
        build_all(config, 2, checkpoint=tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(ModelError, match=r"lacks model\.embed_tokens\.weight"):
        build_all(config, 2, checkpoint=tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ModelError, match=r"cannot read .*index.json"):
        build_all(config, 2, checkpoint=tmp_path)
    with pytest.raises(ModelError, match=r"no \*.safetensors in"):
        build_all(config, 2, checkpoint=tmp_path / "elsewhere")


# Settings to configuration


def resolve(corpus: int = 4096, sequence_length: int = 128, **settings: Any) -> Any:
    return resolve_model(ModelSection(**settings), vocab_size=corpus, sequence_length=sequence_length)


@pytest.mark.parametrize(
    ("preset", "vocab_size", "size"),
    [
        ("tiny", 4096, 5e6),
        ("150m", 32000, 150e6),
        ("500m", 32000, 500e6),
        ("800m", 32000, 800e6),
        ("1b", 32000, 1e9),
        ("8b", 32000, 8e9),
    ],
)
def test_preset_sizes(preset: str, vocab_size: int, size: float) -> None:
    config = resolve(vocab_size, preset=preset)
    count = sum(parameter.numel() for parameter in skeleton(config, torch.float32).parameters())
    assert count == pytest.approx(size, rel=0.1)
    row = next(line for line in (architecture.__doc__ or "").splitlines() if line.startswith(f"| {preset} "))
    numbers = [int(cell.replace(",", "")) for cell in row.split("|")[2:-1]]
    chosen = PRESETS[preset]
    assert numbers == [chosen.width, chosen.layers, chosen.width // 64, chosen.ffn_width, count]


def test_presets_take_the_changes_that_settings_ask_for() -> None:
    config = resolve(preset="tiny", layers=6, width=128, vocab_size=5000)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 128, 5000)
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (2, 64, 352)
    assert not config.use_cache
    assert not was_tied(config)
    assert resolve(width=32).num_attention_heads == 1
    assert resolve(attention="eager")._attn_implementation == "eager"
    check_sliceable(config)
    check_sliceable(resolve(layers=1))


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_whole(tmp_path, tied=True)
    here = {"path": tmp_path, "vocab_size": None}
    for fault, change in (
        ("unknown model.preset 'huge'; known: tiny, 150m, 500m, 800m, 1b, 8b", {"preset": "huge"}),
        ("model.width = 100 does not divide into heads of 64", {"width": 100}),
        (
            "the corpus has 4096 token ids, the model's vocabulary 4000; .* model.vocab_size = 4096",
            {"vocab_size": 4000},
        ),
        ("the corpus has 4096 token ids, the model's vocabulary 64", here),
        ("model.pretrained needs model.path", {"pretrained": True}),
        ("has no config.json", {"path": tmp_path / "nowhere"}),
        ("model.width = 64, but .* is 32 wide", here | {"width": 64}),
        ("model.layers = 9, but .* has 5", here | {"layers": 9}),
        ("model.vocab_size = 70, but the weights in .* have 64", here | {"vocab_size": 70, "pretrained": True}),
    ):
        with pytest.raises(ModelError, match=fault):
            resolve(**change)
    with pytest.raises(ModelError, match=r"data.sequence_length = 4096, but the model's context is 2048 tokens"):
        resolve(64, sequence_length=4096, path=tmp_path)


def test_directories_are_read_without_running_their_code(tmp_path: Path) -> None:
    tree = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"cannot read .*config.json"):
        resolve(path=tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*config.json"):
        resolve(path=tmp_path)
    tree = small(transformers.LlamaConfig).to_dict() | {"auto_map": tree["auto_map"]}
    (tmp_path / "config.json").write_text(json.dumps(tree, default=str))
    build_all(resolve(64, path=tmp_path), 2)  # a known architecture never needs the code beside it
    assert not (tmp_path / "ran").exists()


def test_a_directory_may_be_shortened_to_its_first_layers(tmp_path: Path) -> None:
    EXACT["gemma3"]().save_pretrained(tmp_path)
    config = resolve(64, path=tmp_path, layers=4)
    assert config.num_hidden_layers == 4
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert was_tied(config)  # Gemma's own choice
    assert set(gather(build_all(config, 2))) >= {"lm_head.weight", "model.embed_tokens.weight"}


def test_the_digest_is_the_architecture_and_nothing_else(tmp_path: Path) -> None:
    digest = architecture_digest(resolve())
    assert digest == architecture_digest(resolve())
    assert len(bytes.fromhex(digest)) == 32
    others = [resolve(attention="eager"), resolve(layers=5), resolve(width=128), resolve(vocab_size=5000)]
    assert len({digest, *map(architecture_digest, others)}) == 5
    homes = [tmp_path / "here", tmp_path / "there"]
    for home in homes:
        resolve().save_pretrained(home)
    assert {architecture_digest(resolve(path=home)) for home in homes} == {digest}
