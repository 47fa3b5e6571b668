"""Mixtures of Subspaces: what one node sends is what all use, and the gradients are those of one plain graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from thinpipe.compress.byte_format import CodecError
from thinpipe.compress.context_method import ContextShape
from thinpipe.compress.exact_orthonormal import ExactRotation, exact_orthonormal
from thinpipe.compress.mixture_of_subspaces import MixtureLayer, MixtureOfSubspaces
from thinpipe.compress.mixture_projection import MixtureProjection, Phase
from thinpipe.compress.principal_components import add_to_gram, principal
from thinpipe.compress.spec_strings import built
from thinpipe.compress.turned_subspace import frame_of, orthogonality_error, subspace_at
from thinpipe.node.model import StageModel, build_stage
from thinpipe.node.model.deferred import defer_linears
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .test_model import EXACT, whole_model

SHAPE = ContextShape(
    seed=3, layer=1, width=20, heads=3, head_width=4, segments=2, segment_length=5, dtype=torch.float64
)
BATCH, RANKS = 2, (2, 4)
K = SHAPE.heads * SHAPE.head_width


class Attention(nn.Module):
    """As much of one as the method needs."""

    def __init__(self, shape: ContextShape = SHAPE, *, bias: bool = False, seed: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.k_proj = nn.Linear(shape.width, shape.heads * shape.head_width, bias=bias, dtype=shape.dtype)
        self.v_proj = nn.Linear(shape.width, shape.heads * shape.head_width, bias=bias, dtype=shape.dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def method_of(spec: str = "mos:k=0.17,v=0.33") -> MixtureOfSubspaces:
    return built(MixtureOfSubspaces, "context method", spec)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hidden(seed: int = 5) -> Tensor:
    return random(BATCH, SHAPE.segments * SHAPE.segment_length, SHAPE.width, seed=seed)


def attached(spec: str, **options: Any) -> tuple[Attention, MixtureLayer]:
    """With heads that are not zero any more."""
    attention = Attention(**options)
    layer = method_of(spec).attach(attention, SHAPE)
    for seed, projection in enumerate((layer.keys, layer.values)):
        if projection.angle_bias is not None and projection.angle_weight is not None:
            with torch.no_grad():
                projection.angle_weight.copy_(random(SHAPE.width, seed=20 + seed))
                projection.angle_bias.fill_(0.3)
    return attention, layer


def of_heads(rows_BTK: Tensor) -> Tensor:
    return rows_BTK.unflatten(-1, (SHAPE.heads, SHAPE.head_width)).transpose(1, 2)


def turned_by(shift: float) -> Callable[[Tensor], Tensor]:
    """Something that is not the identity, in the place of a rotary embedding."""
    return lambda k_BHTD: k_BHTD * 2 + shift * k_BHTD.flip(-1)


# -- the subspace ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (7, 3), (24, 24), (130, 17)])
def test_the_subspace_turns_as_a_matrix_exponential_does(rows: int, columns: int) -> None:
    """A is found from A X for X = I: skew, of norm 1, and U(θ) is exp(θ A) Ū up to θ³ / 6."""
    frame = frame_of(torch.eye(rows, dtype=torch.float64), 3, 9)
    skew = frame[1]
    assert (skew + skew.mT).abs().max() < 1e-14
    assert torch.linalg.matrix_norm(skew, 2) == pytest.approx(float(rows > 1), abs=1e-12)
    assert (frame[2] - skew @ skew).abs().max() < 1e-13
    u = exact_orthonormal(3, 1, rows, columns)
    narrow = frame_of(u, 3, 9)
    assert (narrow[1] - skew @ u).abs().max() < 1e-13
    for theta in (0.0, 0.01, 0.3):
        at = subspace_at(narrow, torch.tensor(theta, dtype=torch.float64))
        exact = torch.linalg.matrix_exp(theta * skew) @ u
        assert torch.linalg.matrix_norm(at - exact, 2) <= theta**3 / 6 + 1e-13
    assert (
        orthogonality_error(narrow, torch.tensor([0.1, 0.3], dtype=torch.float64))
        <= 0.25 * 0.3**4 * columns**0.5 + 1e-12
    )


def test_turning_moves_the_span() -> None:
    """With equal rates in all planes A² = -I, and with A Ū in span(Ū) nothing would move at all."""
    u = exact_orthonormal(3, 1, 40, 8)
    turned = torch.linalg.qr(subspace_at(frame_of(u, 3, 9), torch.tensor(0.3)))[0]
    sines = torch.linalg.svdvals(turned - u @ (u.mT @ turned))
    assert sines.min() > 0.005
    assert sines.max() - sines.min() > 0.05


def test_a_rotation_and_its_inverse() -> None:
    x = random(9, 4, seed=1).numpy()
    turned = x.copy()
    rotation = ExactRotation(1, 2, 9)
    rotation.turn(turned)
    assert abs(turned - x).max() > 0.1
    rotation.turn_back(turned)
    assert abs(turned - x).max() < 1e-14


def test_the_frame_has_the_same_bits_everywhere() -> None:
    """Fixed for good: nodes of two versions that differ here could not read each other's keys."""
    frame = next(method_of().frozen(replace(SHAPE, layer=2)))
    assert [x.hex() for x in frame[:, 0, 0].tolist()] == GOLDEN


GOLDEN = ["-0x1.dbf0861169555p-4", "-0x1.1312fdce27c51p-3", "-0x1.221ca880436a4p-4"]


# -- one layer -------------------------------------------------------------------------------------------------------

SPECS = [
    "mos:k=0.17,v=0.33",
    "mos:k=0.17,v=0.33,mixture=none",
    "mos:k=0.17,v=0.33,mixture=random",
    "mos:k=0.17,v=0.33,head=first,bound=1",
    "mos:k=1,v=1",
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_what_others_decode_is_what_the_node_itself_uses(spec: str, bias: bool) -> None:
    attention, layer = attached(spec, bias=bias)
    method = method_of(spec)
    rotate = turned_by(0.5)
    keys, values = (of_heads(part(hidden())) for part in (attention.k_proj, attention.v_proj))
    for segment in range(SHAPE.segments):
        rows = slice(segment * SHAPE.segment_length, (segment + 1) * SHAPE.segment_length)
        z, s = layer.encode(segment, keys[:, :, rows], values[:, :, rows])
        assert z.shape == (BATCH, SHAPE.segment_length, method.wire_width(SHAPE))
        assert s.shape == (BATCH, method.scalars(SHAPE))
        k, v = layer.decode(z, s, rotate)
        torch.testing.assert_close(k, rotate(keys[:, :, rows]), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(v, values[:, :, rows], rtol=1e-13, atol=1e-13)


def test_keys_are_limited_in_rank_and_each_segment_has_its_own_subspace() -> None:
    attention, layer = attached("mos:k=0.17,v=0.33")
    assert method_of().ranks(SHAPE) == RANKS
    attention.v_proj(hidden())
    keys_BSTK = attention.k_proj(hidden()).unflatten(1, (SHAPE.segments, SHAPE.segment_length))
    for sequence in keys_BSTK:
        for segment in sequence:
            assert torch.linalg.matrix_rank(segment) == RANKS[0]
        assert torch.linalg.matrix_rank(sequence.flatten(0, 1)) == 2 * RANKS[0]
    fixed, _ = attached("mos:k=0.17,v=0.33,mixture=none")
    assert torch.linalg.matrix_rank(fixed.k_proj(hidden()).flatten(0, 1)) == RANKS[0]
    assert {"keys_angle", "values_energy_kept", "keys_orthogonality"} <= layer.measures().keys()


def plain_rows(projection: MixtureProjection, x_BLD: Tensor) -> Tensor:
    """x W with W = B U(θ) U(θ)ᵀ for each segment, as one would write it down."""
    dense = x_BLD @ projection.weight.mT + (0 if projection.bias is None else projection.bias)
    rows: list[Tensor] = []
    for start in range(0, x_BLD.shape[1], SHAPE.segment_length):
        part = slice(start, start + SHAPE.segment_length)
        for sequence in range(BATCH):
            x_TD = x_BLD[sequence, part]
            u = projection.frame[0]
            if projection.angle_weight is not None:
                seen_D = x_TD[0] if projection.looks == "first" else x_TD.mean(0)
                raw = (seen_D * projection.angle_weight).sum() / SHAPE.width**0.5
                if projection.angle_bias is not None:
                    raw = raw + projection.angle_bias[0]
                theta = projection.bound * raw.tanh()
                u = u + theta * projection.frame[1] + theta**2 / 2 * projection.frame[2]
            rows.append(dense[sequence, part] @ (u @ u.mT))
    return torch.stack([torch.cat(rows[sequence::BATCH]) for sequence in range(BATCH)])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_one_graph(spec: str, bias: bool) -> None:
    """The node's own loss, and those of two others, who know z and s and send back dz and ds."""
    attention, layer = attached(spec, bias=bias)
    trained = [each for each in attention.parameters() if each.requires_grad]
    x, same = hidden().requires_grad_(), hidden().requires_grad_()
    shape = (BATCH, SHAPE.heads, SHAPE.segment_length, SHAPE.head_width)
    pulls = {
        (user, segment, which): random(*shape, seed=100 + 10 * user + 2 * segment + which)
        for user in range(3)
        for segment in range(SHAPE.segments)
        for which in range(2)
    }
    rotates = [turned_by(0.3), turned_by(0.7), turned_by(1.1)]

    def loss(user: int, segment: int, k: Tensor, v: Tensor) -> Tensor:
        of_keys = (k.sin() * pulls[user, segment, 0]).sum()
        return of_keys + (v * v * pulls[user, segment, 1]).sum()

    rows = [slice(s * SHAPE.segment_length, (s + 1) * SHAPE.segment_length) for s in range(SHAPE.segments)]
    keys, values = (of_heads(plain_rows(part, same)) for part in (layer.keys, layer.values))
    whole = sum(
        loss(user, segment, rotates[user](keys[:, :, rows[segment]]), values[:, :, rows[segment]])
        for user in range(3)
        for segment in range(SHAPE.segments)
    )
    assert isinstance(whole, Tensor)
    expected = torch.autograd.grad(whole, [same, *trained])

    keys, values = (of_heads(part(x)) for part in (attention.k_proj, attention.v_proj))
    roots: list[Tensor] = []
    pulled: list[Tensor | None] = []
    for segment, part in enumerate(rows):
        k, v = keys[:, :, part], values[:, :, part]
        roots.append(loss(0, segment, rotates[0](k), v))
        pulled.append(None)
        encoded = layer.encode(segment, k, v)
        back = [torch.zeros_like(each) for each in encoded]
        for user in (1, 2):
            taken = [each.detach().requires_grad_() for each in encoded]
            theirs = loss(user, segment, *layer.decode(taken[0], taken[1], rotates[user]))
            for total, own in zip(
                back, torch.autograd.grad(theirs, taken, allow_unused=not taken[1].numel()), strict=True
            ):
                if own is not None:
                    total += own
        for each, total in zip(encoded, back, strict=True):
            if each.requires_grad and each.numel():
                roots.append(each)
                pulled.append(total)
    found = torch.autograd.grad(roots, [x, *trained], pulled)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()  # what terms cancel of a small one is rounding


def test_decode_has_the_gradients_of_differences() -> None:
    _, layer = attached("mos:k=0.17,v=0.33")
    z = random(BATCH, SHAPE.segment_length, sum(RANKS), seed=7).requires_grad_()
    s = (0.2 * random(BATCH, 2, seed=8)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, s: layer.decode(z, s, turned_by(0.4)), (z, s))


def test_forwards_that_wait_for_their_backward_keep_what_they_need() -> None:
    """Two microbatches go forward, then both back: as each alone."""
    attention, layer = attached("mos:k=0.17,v=0.33")

    def forward(seed: int) -> Tensor:
        keys = attention.k_proj(hidden(seed))
        attention.v_proj(hidden(seed))
        z, s = layer.encode(1, keys, keys)
        return z.square().sum() + s.sum() + keys.sin().sum()

    trained = [each for name, each in attention.named_parameters() if each.requires_grad]
    alone = [torch.autograd.grad(forward(seed), trained) for seed in (1, 2)]
    losses = [forward(seed) for seed in (1, 2)]
    for loss, expected in zip(losses, alone, strict=True):
        for one, other in zip(torch.autograd.grad(loss, trained), expected, strict=True):
            assert torch.equal(one, other)


def test_weight_gradients_of_its_matrix_can_wait() -> None:
    attention, _ = attached("mos:k=0.17,v=0.33", bias=True)
    pull = random(BATCH, SHAPE.segments * SHAPE.segment_length, K, seed=4)
    attention.k_proj(hidden()).backward(pull)
    expected = {name: each.grad for name, each in attention.named_parameters() if each.grad is not None}
    attention.zero_grad()
    deferral = defer_linears(attention, compiled=False)
    with deferral.putting_aside() as owed:
        attention.k_proj(hidden()).backward(pull)
    assert len(owed) == 1
    assert attention.k_proj.weight.grad is None
    assert torch.equal(attention.k_proj.get_parameter("angle_weight").grad, expected["k_proj.angle_weight"])
    owed.add_up()
    for name, each in attention.named_parameters():
        if name in expected:
            assert torch.equal(each.grad, expected[name]), name


def test_under_autocast_what_crosses_is_narrow_and_the_subspace_is_not_rounded() -> None:
    shape = replace(SHAPE, dtype=torch.float32)
    attention = Attention(shape)
    layer = method_of().attach(attention, shape)
    x = hidden().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys, values = (of_heads(part(x)) for part in (attention.k_proj, attention.v_proj))
        z, s = layer.encode(0, keys, values)
        k, v = layer.decode(z, s, lambda k: k)
    assert (z.dtype, s.dtype, k.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert torch.equal(k, keys[:, :, : SHAPE.segment_length])
    assert torch.equal(v, values[:, :, : SHAPE.segment_length])
    assert layer.measures()["keys_orthogonality"] < 1e-5
    (keys.float().sum() + values.float().sum()).backward()
    assert attention.k_proj.weight.grad is not None


def test_the_published_head_sees_tokens_to_come_and_the_other_does_not() -> None:
    """Of a segment: does its first key know its last token?"""
    for spec, leaks in (("mos:k=0.17,v=0.33", True), ("mos:k=0.17,v=0.33,head=first", False)):
        attention, _ = attached(spec)
        x, changed = hidden(), hidden()
        changed[:, SHAPE.segment_length - 1] += 1
        differs = not torch.equal(attention.k_proj(x)[:, 0], attention.k_proj(changed)[:, 0])
        assert differs == leaks


# -- phases ----------------------------------------------------------------------------------------------------------


def test_phases_of_a_run() -> None:
    method = method_of("mos:warm=3,fold=0.3")
    phases: list[Phase] = [method.phase(step, 10) for step in range(10)]
    assert phases == ["warm"] * 3 + ["mixed"] * 4 + ["folding"] * 3
    assert [step for step in range(10) if method.gathers(step)] == [2]
    assert not any(method_of().gathers(step) for step in range(10))
    assert method_of().phase(0, 1) == "mixed"
    method.check_steps(10)
    with pytest.raises(
        CodecError, match=r"warm=3 of 4 steps, 1 of which fold, leaves none between; lower warm or fold"
    ):
        method.check_steps(4)


@pytest.mark.parametrize("mixture", ["learned", "random", "none"])
def test_warm_projections_are_the_plain_ones(mixture: str) -> None:
    attention, layer = attached(f"mos:k=0.17,v=0.33,warm=2,mixture={mixture}", bias=True)
    plain = Attention(bias=True)
    keys, values = (of_heads(part(hidden())) for part in (attention.k_proj, attention.v_proj))
    assert torch.equal(keys, of_heads(plain.k_proj(hidden())))
    z, s = layer.encode(1, keys, values)
    assert z.shape == (BATCH, SHAPE.segment_length, method_of().width_in("warm", SHAPE))
    k, v = layer.decode(z, s, turned_by(0.5))
    own = slice(SHAPE.segment_length, None)
    assert torch.equal(k, turned_by(0.5)(keys[:, :, own]))
    assert torch.equal(v, values[:, :, own])


@pytest.mark.parametrize("phase", ["warm", "mixed", "folding"])
def test_every_parameter_that_learns_has_a_gradient_in_every_phase(phase: Phase) -> None:
    attention, layer = attached("mos:k=0.17,v=0.33,warm=2")
    layer.begin(phase)
    keys, values = (of_heads(part(hidden())) for part in (attention.k_proj, attention.v_proj))
    z, s = layer.encode(0, keys, values)
    assert z.shape[-1] == method_of().width_in(phase, SHAPE)
    assert bool(s.abs().max() > 0) == (phase == "mixed")
    taken = [each.detach().requires_grad_() for each in (z, s)]
    k, v = layer.decode(taken[0], taken[1], turned_by(0.5))
    dz, ds = torch.autograd.grad(k.sum() + v.sum(), taken)
    torch.autograd.backward([keys.sum() + values.sum(), z, s], [None, dz, ds])
    for name, each in attention.named_parameters():
        if each.requires_grad:
            assert each.grad is not None, name
            if "angle" in name:
                assert bool(each.grad.abs().max() > 0) == (phase == "mixed"), name


def test_principal_components_have_fixed_signs_and_order() -> None:
    x = random(50, 6, seed=3) * torch.tensor([1.0, 5, 0.2, 3, 0.1, 2])
    gram = torch.zeros(6, 6, dtype=torch.float64)
    for part in x.reshape(5, 2, 5, 6):
        add_to_gram(gram, part)
    torch.testing.assert_close(gram, x.mT @ x)
    u = principal(gram, 3)
    assert (u.mT @ u - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-13
    kept = (x @ u).square().sum(0)
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)
    assert kept.sum() == pytest.approx(float(torch.linalg.svdvals(x)[:3].square().sum()))
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(principal(gram.mT.clone(), 3), u)
    for bad, r, words in ((gram, 0, "no 0 principal"), (gram, 7, "no 7"), (gram * torch.nan, 2, "not finite")):
        with pytest.raises(ValueError, match=words):
            principal(bad, r)


def test_after_the_warm_steps_the_subspace_is_that_of_the_tokens_of_all_lanes() -> None:
    """Tokens of one node and those of another: their Gram matrices add up, and the best subspace of both keeps more
    than the generated one."""
    spec = "mos:k=0.17,v=0.33,warm=2"
    grams: list[tuple[Tensor, Tensor]] = []
    for seed in (1, 2):
        attention, layer = attached(spec)
        layer.begin("warm", gathers=True)
        with torch.no_grad():  # as in an evaluation, which adds nothing
            attention.k_proj(hidden(7))
        for own in (10 * seed, 10 * seed + 1):
            attention.k_proj(hidden(own))
            attention.v_proj(hidden(own))
        grams.append(layer.grams())
    rows = torch.cat([Attention().k_proj(hidden(seed)).flatten(0, 1) for seed in (10, 11, 20, 21)])
    torch.testing.assert_close(grams[0][0] + grams[1][0], (rows.mT @ rows).detach())
    attention, layer = attached(spec)
    layer.begin("mixed")

    def kept() -> dict[str, float]:
        attention.k_proj(hidden(10))
        attention.v_proj(hidden(10))
        return layer.measures()

    before = kept()
    layer.use_subspaces(*layer.choose(grams[0][0] + grams[1][0], grams[0][1] + grams[1][1]))
    after = kept()
    assert after["keys_energy_kept"] > before["keys_energy_kept"]
    assert after["values_energy_kept"] > before["values_energy_kept"]
    frames = {name: each for name, each in attention.named_parameters() if not each.requires_grad}
    assert set(frames) == {"k_proj.frame", "v_proj.frame"}  # parameters, so a checkpoint and a digest have them
    best = frame_of(principal(grams[0][0] + grams[1][0], RANKS[0]), 3, 0)[0]
    torch.testing.assert_close(layer.keys.frame[0], best)
    with pytest.raises(CodecError, match="'mos': layer 1: a Gram matrix that is not finite"):
        layer.choose(grams[0][0] * torch.inf, grams[0][1])


def test_folded_projections_are_plain_ones() -> None:
    attention, layer = attached("mos:k=0.17,v=0.33,fold=0.5", bias=True)
    layer.begin("folding")
    folded = Attention(bias=True)
    folded.load_state_dict(layer.folded())
    for name in ("k_proj", "v_proj"):
        one, other = (each.get_submodule(name)(hidden()) for each in (attention, folded))
        torch.testing.assert_close(one, other)
    layer.begin("mixed")
    assert not torch.allclose(attention.k_proj(hidden()), folded.k_proj(hidden()))


@pytest.mark.parametrize("options", ["", ",mixture=none", ",warm=2"])
def test_a_models_weights_without_the_model(options: str) -> None:
    """As an export has them: by their names, from a checkpoint."""
    spec = f"mos:k=0.17,v=0.33{options}"
    attention, layer = attached(spec, bias=True)
    if "warm" in options:
        gram = random(K, K, seed=1)
        layer.use_subspaces(*layer.choose(gram @ gram.mT, gram.mT @ gram))
    named = {f"model.layers.1.self_attn.{name}": each for name, each in attention.named_parameters()}
    other = random(3, seed=1)
    found = method_of(spec).plain_weights({**named, "model.norm.weight": other}, seed=SHAPE.seed, step=2)
    assert found.pop("model.norm.weight") is other
    expected = {f"model.layers.1.self_attn.{name}": each for name, each in layer.folded().items()}
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-13, atol=1e-13)


def test_a_plain_model_starts_it_and_generated_parts_are_in_no_checkpoint() -> None:
    plain = Attention()
    attention, _ = attached("mos:k=0.17,v=0.33")
    assert torch.equal(attention.k_proj.weight, plain.k_proj.weight)
    names = {f"{each}_proj.{part}" for each in "kv" for part in ("weight", "angle_weight", "angle_bias")}
    assert set(attention.state_dict()) == set(dict(attention.named_parameters())) == names


def test_layers_and_seeds_have_subspaces_of_their_own_and_keys_and_values_too() -> None:
    method = method_of("mos:k=0.33,v=0.33,mixture=random")
    shapes = [SHAPE, replace(SHAPE, layer=2), replace(SHAPE, seed=4)]
    parts = [part for shape in shapes for part in method.frozen(shape)]
    assert len(parts) == 12
    for number, part in enumerate(parts):
        assert not any(part.shape == other.shape and torch.equal(part, other) for other in parts[:number])
    again = list(method.frozen(SHAPE))
    assert all(torch.equal(one, other) for one, other in zip(again, parts[:4], strict=True))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("k=0", "k=0 is no share of the keys' width; give one above 0"),
        ("v=1.5", "v=1.5 is no share of the values' width"),
        ("k=-0.1", "k=-0.1 is no share"),
        ("bound=0", "bound=0 is no bound"),
        ("bound=2", "bound=2 is no bound"),
        ("warm=-1", "warm=-1 is no number of steps"),
        ("fold=1", "fold=1 is no share of the steps"),
        ("mixture=all", "'mixture' cannot be 'all'"),
        ("ranks=3", "has no option 'ranks'"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: str, words: str) -> None:
    with pytest.raises(CodecError, match=f"context method 'mos'.*{words}"):
        method_of(f"mos:{options}")


def test_ranks_are_at_least_one() -> None:
    assert method_of("mos:k=0.0001,v=1").ranks(SHAPE) == (1, K)


ARCHITECTURES = {
    "llama": None,
    "qwen2": None,
    "mistral": None,
    "gemma": None,
    "granite": None,
    "qwen3": "normalises after projecting (k_norm)",
    "gemma3": "normalises after projecting (k_norm)",
    "nanochat": "normalises after projecting (k_norm)",
    "apertus": "normalises after projecting (k_norm)",
    "gpt_neox": "with one matrix (query_key_value)",
    "gpt2": "with one matrix (c_attn)",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    """Those that fit compute, the others are refused by name."""
    config = EXACT[name]()
    model = whole_model(config, torch.float32)
    words = ("self_attn", "attention", "attn")
    attention = next(module for path, module in model.named_modules() if path.rpartition(".")[2] in words)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    shape = ContextShape(
        seed=1,
        layer=0,
        width=config.hidden_size,
        heads=heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        segments=2,
        segment_length=4,
        dtype=torch.float32,
    )
    fault = ARCHITECTURES[name]
    if fault is None:
        method_of().attach(attention, shape)
        ids = torch.arange(16).reshape(2, 8)
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        with pytest.raises(CodecError, match="7 tokens are not whole segments of 4"):
            model(input_ids=ids[:, :7], use_cache=False)
        with pytest.raises(CodecError, match="has no 'k_proj' that is a linear map"):
            method_of().attach(attention, shape)
    else:
        with pytest.raises(CodecError, match=r"context method 'mos': layer 0, .*choose") as refused:
            method_of().attach(attention, shape)
        assert fault in str(refused.value)
    if fault is None:
        with pytest.raises(CodecError, match="outputs for"):
            method_of().attach(Attention(), replace(SHAPE, heads=heads + 7))


# -- in a model ------------------------------------------------------------------------------------------------------


def test_in_a_decoder_others_make_the_very_keys_that_its_attention_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of Llama with grouped heads, its own rotary embedding, and a split backward."""
    config = EXACT["llama"]()
    shape = ContextShape(
        seed=1,
        layer=0,
        width=config.hidden_size,
        heads=config.num_key_value_heads,
        head_width=config.hidden_size // config.num_attention_heads,
        segments=2,
        segment_length=4,
        dtype=torch.float64,
    )
    layers: list[MixtureLayer] = []

    def constrain(model: StageModel) -> None:
        for number, module in zip(model.layers, model.layer_modules, strict=True):
            attention = module.get_submodule("self_attn")
            layers.append(method_of("mos:k=0.3,v=0.5,warm=1").attach(attention, replace(shape, layer=number)))

    plain = build_stage(config, stage=0, stages=1, seed=1, dtype=torch.float64, device="cpu")
    model = build_stage(
        config, stage=0, stages=1, seed=1, dtype=torch.float64, device="cpu", constrain=constrain, deferred=True
    )
    given: list[tuple[Tensor, Tensor]] = []

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
        given.append((key, value))
        return sdpa(module, query, key, value, *args, **more)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))  # warm, with the weights of the plain model
    for layer in layers:
        layer.begin("mixed")
    given.clear()
    assert model.deferral
    with model.deferral.putting_aside() as owed:
        model(ids).square().sum().backward()
    owed.add_up()
    assert all(each.grad is not None for _, each in model.full_names() if each.requires_grad)
    cos, sin = model.base.rotary_emb(given[0][0], torch.arange(8)[None])
    for layer, (key, value) in zip(layers, given, strict=True):
        for segment in range(2):
            part = slice(4 * segment, 4 * segment + 4)

            def rotate(k_BHTD: Tensor, part: slice = part) -> Tensor:
                return apply_rotary_pos_emb(k_BHTD, k_BHTD, cos[:, part], sin[:, part])[1]

            k, v = layer.decode(*layer.encode(segment, key[:, :, part], value[:, :, part]), rotate)
            torch.testing.assert_close(k, key[:, :, part])
            torch.testing.assert_close(v, value[:, :, part])
