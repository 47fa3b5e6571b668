"""Weight gradients that wait: not there before they are asked for, and then those of plain autograd, bit for bit."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import pytest
import torch
from thinpipe.node.config import RunConfig
from thinpipe.node.model import StageModel, build_stage, resolve_model
from thinpipe.node.model.deferred import DeferredLinear, defer_linears
from thinpipe.node.stage import Stage
from thinpipe.node.stage_state import StateError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .conftest import TinyConfig
from .test_model import EXACT, TOKENS, VOCABULARY, token_ids

DTYPES = {"float32": (torch.float32, False), "float64": (torch.float64, False), "bf16 autocast": (torch.float32, True)}
MICROBATCHES = 3


def precision(autocast: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()


def pull_like(y: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)


# -- one matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 7, 33), (5, 64), (1, 1, 16)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_has_the_bits_of_autograd(dtype: str, bias: bool, shape: tuple[int, ...]) -> None:
    """Output, input gradient, and what two microbatches add up to in the parameters."""
    wide, autocast = DTYPES[dtype]
    torch.manual_seed(0)
    plain = nn.Linear(shape[-1], 48, bias=bias, dtype=wide)
    model = nn.Sequential(nn.Linear(shape[-1], 48, bias=bias, dtype=wide))
    model[0].load_state_dict(plain.state_dict())
    deferral = defer_linears(model, compiled=False)
    waiting = []
    for microbatch in range(2):
        x, same = (pull_like(torch.empty(shape, dtype=wide), microbatch).requires_grad_() for _ in range(2))
        with precision(autocast):
            expected, y = plain(x), model(same)
        assert torch.equal(y, expected)
        assert y.dtype == expected.dtype
        pull = pull_like(y, 9)
        expected.backward(pull)
        with deferral.putting_aside() as owed:
            y.backward(pull)
        waiting.append(owed)
        assert torch.equal(same.grad, x.grad)
    assert all(p.grad is None for p in model.parameters())
    for owed in waiting:
        owed.add_up()
        assert not len(owed)  # and nothing of it is held any more
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_names_frozen_parameters_and_foreign_modules_stay_as_they_are() -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    deferral = defer_linears(model, compiled=False)
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(module) for module in model] == [DeferredLinear, Own, DeferredLinear]
    with deferral.putting_aside() as owed:
        model(torch.ones(3, 4)).sum().backward()
    assert model[1].weight.grad is not None
    assert model[2].weight.grad is None
    owed.add_up()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None
    assert model[2].weight.grad is not None


# -- whole models ------------------------------------------------------------------------------------------------------


def train_once(model: StageModel, autocast: bool) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Outputs of some microbatches, and the gradients; if the model can split, all weight gradients at the end."""
    outputs, waiting = [], []
    matrices = {name for name, p in model.full_names() if p.ndim == 2 and "embed" not in name}
    for microbatch in range(MICROBATCHES):
        with precision(autocast):
            y = model(token_ids(microbatch))
        outputs.append(y.detach())
        if model.deferral is None:
            y.backward(pull_like(y, microbatch))
            continue
        with model.deferral.putting_aside() as owed:
            y.backward(pull_like(y, microbatch))
        there = {name for name, p in model.full_names() if p.grad is not None}
        assert there == {name for name, p in model.full_names() if name not in matrices and "bias" not in name}
        assert len(owed) == len(matrices), "one product each, also where a layer ran twice"
        waiting.append(owed)
    for owed in waiting:
        owed.add_up()
    return outputs, {name: p.grad for name, p in model.full_names()}


def built(name: str, *, deferred: bool, dtype: str = "float32", **options: bool) -> StageModel:
    wide = DTYPES[dtype][0]
    return build_stage(EXACT[name](), stage=0, stages=1, seed=1, dtype=wide, device="cpu", deferred=deferred, **options)


@pytest.mark.pairwise(8)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "granite"])  # qwen2 has biases
def test_a_model_has_the_bits_of_autograd(name: str, dtype: str, recompute: bool) -> None:
    options: dict[str, Any] = {"dtype": dtype, "activation_checkpointing": recompute}
    (outputs, theirs), (same, ours) = (
        train_once(built(name, deferred=deferred, **options), DTYPES[dtype][1]) for deferred in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(same, outputs, strict=True))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # as in test_model
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_compiled_model_defers_too(name: str, recompute: bool) -> None:
    """Every matrix, in every layer; the graph breaks around them, and what lies between is compiled."""
    torch.compiler.reset()
    counters = importlib.import_module("torch._dynamo.utils").counters
    counters.clear()
    outputs, theirs = train_once(built(name, deferred=False), False)
    same, ours = train_once(built(name, deferred=True, compile=True, activation_checkpointing=recompute), False)
    assert counters["stats"]["unique_graphs"] > 0
    again = train_once(built(name, deferred=True, compile=True, activation_checkpointing=recompute), False)[1]
    for a, b in zip(same, outputs, strict=True):
        torch.testing.assert_close(a, b)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4)  # a compiler rounds elsewhere
        assert torch.equal(ours[key], again[key])


def test_without_putting_aside_a_backward_is_whole() -> None:
    model, plain = built("llama", deferred=True), built("llama", deferred=False)
    for each in (model, plain):
        y = each(token_ids())
        y.backward(pull_like(y, 1))
    assert all(
        torch.equal(a.grad, b.grad) for (_, a), (_, b) in zip(model.full_names(), plain.full_names(), strict=True)
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_each_half_multiplies_its_own(name: str, recompute: bool) -> None:
    """Nothing is multiplied before its time, and nothing twice: operations are counted, not gradients looked at."""

    def operations(work: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    counted = {}
    for deferred in (False, True):
        model = built(name, deferred=deferred, activation_checkpointing=recompute)
        y = model(token_ids())
        if model.deferral is None:
            counted["whole"] = operations(lambda y=y: y.backward(torch.ones_like(y)))
            continue
        with model.deferral.putting_aside() as owed:
            counted["input"] = operations(lambda y=y: y.backward(torch.ones_like(y)))
        counted["weight"] = operations(owed.add_up)
    matrices = [p for key, p in model.full_names() if p.ndim == 2 and "embed" not in key]
    assert counted["weight"] == 2 * 2 * TOKENS * sum(p.numel() for p in matrices)
    assert counted["input"] + counted["weight"] == counted["whole"]


def test_what_waits_is_inputs_and_output_gradients_alone() -> None:
    """Not what attention or the activation function kept: the first half has freed it."""
    model = built("llama", deferred=True)
    assert model.deferral
    with model.deferral.putting_aside() as owed:
        y = model(token_ids())
        y.backward(torch.ones_like(y))
    rows, (width, kv, ffn) = 2 * TOKENS, (32, 16, 48)
    of_layer = (2 * width + 2 * kv) + 2 * width + 3 * ffn + 2 * width  # qkv and their input; o; gate, up, down
    assert 0 < owed.nbytes() <= 4 * rows * (5 * of_layer + width + VOCABULARY)


# -- a stage -----------------------------------------------------------------------------------------------------------


def stage_of(config: RunConfig, index: int) -> Stage:
    vocabulary = config.model.vocab_size
    assert vocabulary
    length = config.data.sequence_length
    return Stage(config, resolve_model(config.model, vocab_size=vocabulary, sequence_length=length), index)


@pytest.mark.parametrize("index", [0, 1])
def test_an_input_gradient_leaves_before_any_weight_gradient(index: int, tiny: TinyConfig) -> None:
    """First and last stage: what goes up, and what learns beside the matrices, is whole; of the matrices nothing is."""
    settings = {"pipeline.stages": 2, "codec.codec": "mapl:r=8,every=1", "pipeline.microbatches": 2}
    split, whole = (stage_of(tiny({**settings, "pipeline.schedule": name}), index) for name in ("zb", "1f1b"))
    ids = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(0)).numpy()
    z = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(1))
    sent = []
    for stage in (whole, split):
        for microbatch in range(2):
            received = None
            if index == 1:
                stage.receiver.use_table(torch.eye(64)[:, :8].contiguous())
                received = type("Received", (), {"z_BTW": z.clone(), "table": None})()
            stage.forward(0, microbatch, ids, received)
        backward = stage.input_gradient if stage is split else stage.backward
        sent.append([backward(microbatch, None if index else z.clone(), 1.0) for microbatch in range(2)])
    for theirs, ours in zip(*sent, strict=True):
        assert (ours is None) == (index == 0)
        assert ours is None or torch.equal(ours, theirs)
    if index == 1:
        assert torch.equal(split.gradient_to_send(0), whole.gradient_to_send(0))  # due after the last input gradient
    linears = {id(module.weight) for module in split.model.modules() if isinstance(module, DeferredLinear)}
    assert linears
    assert all((p.grad is None) == (id(p) in linears) for _, p in split.model.full_names())
    with pytest.raises(StateError, match="in the middle of step 0"):
        split.snapshot()
    with pytest.raises(AssertionError, match=r"ends step 0 without the weight gradients of \[0, 1\]"):
        split.finish(0)
    for microbatch in range(2):
        split.weight_gradient(microbatch)
    for (name, theirs), (_, ours) in zip(whole.model.full_names(), split.model.full_names(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_step_that_is_broken_off_owes_nothing(tiny: TinyConfig) -> None:
    stage = stage_of(tiny({"pipeline.stages": 1, "pipeline.schedule": "zb", "pipeline.microbatches": 2}), 0)
    before = stage.snapshot()
    ids = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(0)).numpy()
    stage.forward(0, 0, ids, None)
    stage.input_gradient(0, None, None)
    stage.restore(before)
    stage.snapshot()
    with pytest.raises(KeyError):
        stage.weight_gradient(0)


def test_a_schedule_that_does_not_split_has_plain_linears(tiny: TinyConfig) -> None:
    stage = stage_of(tiny({"pipeline.stages": 1}), 0)
    assert not any(isinstance(module, DeferredLinear) for module in stage.model.modules())
    with pytest.raises(AssertionError, match="'1f1b' splits no backward"):
        stage.input_gradient(0, None, None)
