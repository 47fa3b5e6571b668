"""The stage optimizer against torch's own, and the laws of its schedule, clip, errors and state."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from thinpipe.node.config_sections import OptimSection
from thinpipe.node.model.transposed import mark_transposed
from thinpipe.node.optim import (
    MissingGradient,
    NonFiniteGradient,
    OptimizerError,
    StageOptimizer,
    is_hidden_matrix,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

SHAPES = {
    "embed_tokens.weight": (50, 16),
    "layers.0.self_attn.q_proj.weight": (16, 16),
    "layers.0.mlp.up_proj.weight": (40, 16),
    "layers.0.mlp.down_proj.weight": (16, 40),
    "layers.0.self_attn.q_proj.bias": (16,),
    "layers.0.input_layernorm.weight": (16,),
    "norm.weight": (16,),
    "lm_head.weight": (50, 16),
}
FLAT = {"warmup_steps": 0, "decay_fraction": 0.0, "clip": 0.0}  # no schedule, no clip


def make(dtype=torch.float32, total_steps=100, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        (name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))
        for name, shape in SHAPES.items()
    ]
    return parameters, StageOptimizer(parameters, OptimSection(**options), total_steps=total_steps)


def gradients(step, parameters, scale=1.0):
    """The same for the same step, whoever asks; of very different sizes over parameters."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        (scale * 10.0 ** -(i % 4) * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        for i, (_, p) in enumerate(parameters)
    ]


def give(parameters, grads):
    for (_, parameter), grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()


def values(parameters):
    return {name: p.detach().clone() for name, p in parameters}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def hidden(parameters):
    return [(n, p) for n, p in parameters if is_hidden_matrix(n, p)]


def test_muon_takes_the_matrices_of_decoder_layers_only():
    parameters, optimizer = make()
    assert {n for n, _ in hidden(parameters)} == {n for n in SHAPES if n.endswith("_proj.weight")}
    state = optimizer.state_tensors()
    muon = {n for n, _ in hidden(parameters)}
    expected = {f"muon.momentum/{n}" for n in muon}
    expected |= {f"adamw.{kind}/{n}" for n in SHAPES.keys() - muon for kind in ("exp_avg", "exp_avg_sq")}
    assert state.keys() == expected
    numbers = sum(math.prod(s) * (1 if n in muon else 2) for n, s in SHAPES.items())
    assert optimizer.state_bytes() == 4 * numbers


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_equals_torch_to_the_bit(weight_decay):
    parameters, optimizer = make(
        muon_lr=0.02, weight_decay=weight_decay, msign_dtype="bfloat16", msign_coefficients="quintic", **FLAT
    )
    theirs = [nn.Parameter(p.detach().clone()) for _, p in hidden(parameters)]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=weight_decay, momentum=0.95)
    for step in range(10):
        give(parameters, gradients(step, parameters))
        for (_, ours), other in zip(hidden(parameters), theirs, strict=True):
            other.grad = ours.grad.clone()
        optimizer.step(step, tokens=1)
        reference.step()
    for (name, ours), other in zip(hidden(parameters), theirs, strict=True):
        assert torch.equal(ours, other), name


def test_a_matrix_that_lies_the_other_way_round_moves_as_far():
    """As GPT-2 keeps them: the same linear map takes the same step, however its matrix is stored."""
    draw = torch.Generator().manual_seed(5)
    weight, gradient = (torch.randn(48, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    own, other = nn.Parameter(weight.clone()), nn.Parameter(weight.mT.clone())
    turned = Conv1D(48, 16)
    turned.weight = other
    mark_transposed(turned)
    settings = OptimSection(muon_lr=0.02, msign_dtype="float64", **FLAT)
    for parameter, grad in ((own, gradient), (other, gradient.mT)):
        optimizer = StageOptimizer([("h.0.mlp.c_fc.weight", parameter)], settings, total_steps=10)
        parameter.grad = grad.clone()
        optimizer.step(0, tokens=1)
    assert torch.allclose(own, other.mT, rtol=0, atol=1e-12)
    assert (own - weight).square().mean().sqrt() > 1e-3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch_in_float64(weight_decay):
    parameters, optimizer = make(torch.float64, adamw_lr=0.01, weight_decay=weight_decay, **FLAT)
    rest = [(n, p) for n, p in parameters if not is_hidden_matrix(n, p)]
    theirs = {n: nn.Parameter(p.detach().clone()) for n, p in rest}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(20):
        give(parameters, gradients(step, parameters))
        for name, ours in rest:
            theirs[name].grad = ours.grad.clone()
        optimizer.step(step, tokens=1)
        reference.step()
    for name, ours in rest:
        assert torch.dist(ours, theirs[name]) <= 1e-12 * theirs[name].norm(), name


def test_float64_runs_entirely_in_float64():
    ends = {}
    for dtype, msign_dtype in (("float64", "float64"), ("float64", "float32")):
        parameters, optimizer = make(getattr(torch, dtype), msign_dtype=msign_dtype, **FLAT)
        name, weight = hidden(parameters)[1]
        start = weight.detach().clone()
        grads = gradients(0, parameters)
        give(parameters, grads)
        optimizer.step(0, tokens=1)
        ends[msign_dtype] = (weight.detach() - start) / optimizer.learning_rate(0)
        assert optimizer.state_tensors()[f"muon.momentum/{name}"].dtype == torch.float64
    gap = torch.dist(ends["float64"], ends["float32"]) / ends["float64"].norm()
    assert 1e-9 < gap < 1e-4  # the setting is obeyed: float32 rounding where it was asked for, none where not


def test_update_is_scaled_by_the_shape():
    parameters, optimizer = make(msign_dtype="float64", muon_lr=0.1, **FLAT)
    before = values(parameters)
    give(parameters, gradients(0, parameters))
    optimizer.step(0, tokens=1)
    size = {n: torch.linalg.matrix_norm(p.detach() - before[n], 2).item() for n, p in hidden(parameters)}
    low, high = 0.1 * 0.87, 0.1 * 1.13  # msign's five-step interval
    assert low < size["layers.0.self_attn.q_proj.weight"] < high
    assert low < size["layers.0.mlp.down_proj.weight"] < high
    assert low < size["layers.0.mlp.up_proj.weight"] / math.sqrt(40 / 16) < high


def test_gradients_are_sums_over_tokens():
    mean_run, mean = make(clip=1.0)
    sum_run, total = make(clip=1.0)
    tokens = 256  # a power of two, so that dividing is exact and the bits must agree
    for step in range(3):
        give(mean_run, gradients(step, mean_run))
        give(sum_run, gradients(step, sum_run, scale=tokens))
        ours, other = mean.step(step, tokens=1), total.step(step, tokens=tokens)
        assert ours.grad_norm == other.grad_norm
    assert_same(values(mean_run), values(sum_run))


def test_clip_scales_the_gradient_of_the_whole_stage():
    parameters, optimizer = make(clip=0.5, warmup_steps=0)
    give(parameters, gradients(0, parameters))
    norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for _, p in parameters))
    assert norm > 0.5
    clipped = {n: p.grad.double() * (0.5 / norm) for n, p in parameters}
    stats = optimizer.step(0, tokens=1)
    assert stats.grad_norm == pytest.approx(norm, rel=1e-6)
    assert stats.clip_coefficient == pytest.approx(0.5 / norm, rel=1e-6)
    assert stats.clip_coefficient * stats.grad_norm == pytest.approx(0.5)
    for name, first_moment in optimizer.state_tensors().items():
        kind, _, parameter = name.partition("/")
        share = {"adamw.exp_avg": 0.1, "muon.momentum": 0.05}.get(kind)
        if share:
            torch.testing.assert_close(first_moment.double(), share * clipped[parameter], rtol=1e-5, atol=0)


def test_stages_that_share_a_norm_clip_as_torch_clips_the_whole_model():
    """At a norm far above the 1e-6 that torch adds to it before it divides."""
    parameters, _ = make(dtype=torch.float64)
    give(parameters, gradients(0, parameters, scale=1e4))
    whole = [(name, nn.Parameter(p.detach().clone())) for name, p in parameters]
    give(whole, [p.grad for _, p in parameters])
    norm = nn.utils.clip_grad_norm_([p for _, p in whole], 0.5).item()
    settings = OptimSection(clip=0.5, clip_norm="global", warmup_steps=0)
    above, below = (StageOptimizer(part, settings, total_steps=10) for part in (parameters[:3], parameters[3:]))
    squares = above.sum_of_squares(0, below.sum_of_squares(0))
    assert math.sqrt(squares) == pytest.approx(norm, rel=1e-14)
    clipped = dict(whole)
    for optimizer in (above, below):
        stats = optimizer.step(0, 1, squares)
        assert stats.grad_norm == math.sqrt(squares)
        for kept, first_moment in optimizer.state_tensors().items():
            kind, _, name = kept.partition("/")
            if share := {"adamw.exp_avg": 0.1, "muon.momentum": 0.05}.get(kind):
                torch.testing.assert_close(first_moment, share * clipped[name].grad, rtol=1e-8, atol=0)


def test_a_sum_of_squares_that_float64_cannot_hold_is_refused():
    """With those of other stages; its own are refused by name before."""
    parameters, optimizer = make(dtype=torch.float64)
    give(parameters, [torch.full_like(p, 1e152) for _, p in parameters])
    assert math.isfinite(optimizer.sum_of_squares(3))
    with pytest.raises(NonFiniteGradient, match="step 3: the squares of the gradients add up to more than float64"):
        optimizer.sum_of_squares(3, 1.79e308)
    give(parameters, [torch.full_like(p, 1e160) for _, p in parameters])
    with pytest.raises(NonFiniteGradient, match=r"step 3: the gradient of 'embed_tokens\.weight' is not finite"):
        optimizer.sum_of_squares(3)


@pytest.mark.parametrize("clip", [0.0, 1e6])
def test_no_clip_below_the_threshold_or_at_zero(clip):
    runs = []
    for setting in (clip, 0.0):
        parameters, optimizer = make(**FLAT | {"clip": setting})
        give(parameters, gradients(0, parameters, scale=100.0))
        assert optimizer.step(0, tokens=1).clip_coefficient == 1.0
        runs.append(values(parameters))
    assert_same(*runs)


@given(
    total=st.integers(1, 400),
    warmup=st.integers(0, 100),
    fraction=st.floats(0, 1),
)
def test_schedule_laws(total, warmup, fraction):
    optimizer = StageOptimizer([], OptimSection(warmup_steps=warmup, decay_fraction=fraction), total_steps=total)
    factors = [optimizer.learning_rate(step) for step in range(total + 1)]
    decay = round(fraction * total)
    assert all(0 < factor <= 1 for factor in factors[:total])  # no step is wasted at rate zero
    assert factors[total] == 0
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert all(factor == 1 for factor in factors[max(0, warmup - 1) : total - decay])  # the plateau
    if warmup and total > decay:
        assert factors[0] == pytest.approx(1 / warmup)
    tail = factors[max(total - decay, warmup) :]
    assert all(a - b == pytest.approx(1 / decay) for a, b in pairwise(tail) if decay)


def test_both_rates_follow_the_schedule():
    parameters, optimizer = make(total_steps=10, warmup_steps=4, decay_fraction=0.5, muon_lr=0.02, adamw_lr=0.005)
    factors = []
    for step in range(10):
        give(parameters, gradients(step, parameters))
        stats = optimizer.step(step, tokens=1)
        factors.append(stats.muon_lr / 0.02)
        assert stats.adamw_lr == pytest.approx(stats.muon_lr / 4)
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_state_round_trip_goes_on_to_the_bit(dtype):
    straight, one = make(dtype, weight_decay=0.1)
    for step in range(4):
        give(straight, gradients(step, straight))
        one.step(step, tokens=3)
    stored, weights = save(one.state_tensors()), values(straight)

    resumed, other = make(dtype, seed=9, weight_decay=0.1)
    with torch.no_grad():
        for name, parameter in resumed:
            parameter.copy_(weights[name])
    other.load_state_tensors(load(stored))
    assert_same(one.state_tensors(), other.state_tensors())
    for step in range(4, 8):
        for parameters, optimizer in ((straight, one), (resumed, other)):
            give(parameters, gradients(step, parameters))
            optimizer.step(step, tokens=3)
    assert_same(values(straight), values(resumed))
    assert_same(one.state_tensors(), other.state_tensors())


def test_an_update_does_not_depend_on_its_neighbours():
    """Cutting the model elsewhere must not change the bits: each stage has only part of the parameters."""
    whole, everything = make(**FLAT)
    parts, _ = make()
    halves = [parts[:3], parts[3:]]
    optimizers = [StageOptimizer(half, OptimSection(**FLAT), total_steps=100) for half in halves]
    for step in range(3):
        grads = gradients(step, whole)
        give(whole, grads)
        give(parts, grads)
        everything.step(step, tokens=5)
        for optimizer in optimizers:
            optimizer.step(step, tokens=5)
    assert_same(values(whole), values(parts))


def test_gradients_are_dropped_after_the_step():
    parameters, optimizer = make()
    give(parameters, gradients(0, parameters))
    optimizer.step(0, tokens=1)
    assert all(p.grad is None for _, p in parameters)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", list(SHAPES)[:3])
def test_non_finite_gradient_is_named_and_changes_nothing(name, poison):
    parameters, optimizer = make()
    give(parameters, gradients(0, parameters))
    optimizer.step(0, tokens=1)
    before = values(parameters)
    state = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    give(parameters, gradients(1, parameters))
    dict(parameters)[name].grad.view(-1)[-1] = poison
    with pytest.raises(NonFiniteGradient, match=f"step 1: .*'{name}'"):
        optimizer.step(1, tokens=1)
    assert_same(values(parameters), before)
    assert_same(optimizer.state_tensors(), state)


def test_huge_but_finite_gradients_are_clipped_not_refused():
    parameters, optimizer = make()
    give(parameters, [torch.full_like(p, 3e38) for _, p in parameters])
    stats = optimizer.step(0, tokens=1)
    assert stats.grad_norm > 1e39
    assert all(p.isfinite().all() for _, p in parameters)


def test_missing_gradient_is_named_and_changes_nothing():
    parameters, optimizer = make()
    before = values(parameters)
    give(parameters, gradients(0, parameters))
    dict(parameters)["norm.weight"].grad = None
    with pytest.raises(MissingGradient, match=r"step 7: .*'norm\.weight'"):
        optimizer.step(7, tokens=1)
    assert_same(values(parameters), before)


def test_frozen_parameters_are_left_alone():
    parameters, _ = make()
    parameters[0][1].requires_grad_(False)
    optimizer = StageOptimizer(parameters, OptimSection(), total_steps=10)
    before = values(parameters)
    give(parameters[1:], gradients(0, parameters)[1:])
    optimizer.step(0, tokens=1)
    assert torch.equal(parameters[0][1], before[parameters[0][0]])
    assert not any(parameters[0][0] in key for key in optimizer.state_tensors())


def test_a_stage_without_parameters_steps():
    optimizer = StageOptimizer([], OptimSection(), total_steps=10)
    assert optimizer.step(0, tokens=1).grad_norm == 0
    assert optimizer.state_bytes() == 0


def test_bad_arguments_are_refused():
    parameters, optimizer = make()
    weight = parameters[0][1]
    with pytest.raises(OptimizerError, match="'a'"):
        StageOptimizer([("a", weight), ("a", parameters[1][1])], OptimSection(), total_steps=1)
    with pytest.raises(OptimizerError, match="'a' and 'b' are one parameter"):
        StageOptimizer([("a", weight), ("b", weight)], OptimSection(), total_steps=1)
    with pytest.raises(OptimizerError, match="total_steps = 0"):
        StageOptimizer(parameters, OptimSection(), total_steps=0)
    give(parameters, gradients(0, parameters))
    with pytest.raises(OptimizerError, match="got 0"):
        optimizer.step(0, tokens=0)
    with pytest.raises(OptimizerError, match="got -1"):
        optimizer.step(-1, tokens=1)


def test_a_foreign_state_is_refused_whole():
    _, optimizer = make()
    good = {name: tensor + 1 for name, tensor in optimizer.state_tensors().items()}
    first, last = min(good), list(good)[-1]
    untouched = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    cases = [
        ({name: tensor for name, tensor in good.items() if name != first}, f"lacks '{first}'"),
        (good | {"muon.momentum/other": torch.zeros(1)}, "no 'muon.momentum/other'"),
        (good | {last: torch.zeros(1)}, last),
        (good | {last: good[last].double()}, "float64"),
    ]
    for state, word in cases:
        with pytest.raises(OptimizerError, match=word):
            optimizer.load_state_tensors(state)
        assert_same(optimizer.state_tensors(), untouched)
