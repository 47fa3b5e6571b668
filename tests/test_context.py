"""What a stage works out from its last few tokens: the formula, what it may depend on, how it starts and learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from thinpipe.compress.anchors import Anchors, make_anchors
from thinpipe.compress.byte_format import CodecError
from thinpipe.compress.context_network import Context
from thinpipe.compress.registry import parse_codec
from thinpipe.node.optim import is_hidden_matrix

V, D, N, E, H = 37, 24, 3, 5, 7
SIZES = {"context": N, "context_embedding": E, "context_hidden": H}


def build(kind: Any = "full", **changed: Any) -> Anchors:
    sizes = {"vocab_size": V, "width": D, "rank": 10, "seed": 3, "stage": 2, **SIZES}
    return make_anchors(kind, **(sizes | changed)).double()


def trained(**changed: Any) -> Context:
    """A network as training might leave it."""
    context = build(**changed).context
    assert context is not None
    with torch.no_grad():
        context.outer.copy_(torch.randn(D, H, generator=torch.Generator().manual_seed(1)))
    return context


def some_ids(batch: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(0))


def test_values_are_the_formula() -> None:
    context, ids = trained(), some_ids()
    got = context(ids)
    assert got.shape == (3, 11, D)
    for b, row in enumerate(ids.tolist()):
        padded = [V] * (N - 1) + row
        for i in range(len(row)):
            units = [0.0] * H
            for h in range(H):
                known = torch.cat([context.embedding[token] for token in padded[i : i + N]])
                pre = (context.inner[h] @ known).item()
                units[h] = pre / (1 + math.exp(-pre))
            wanted = context.outer @ torch.tensor(units, dtype=torch.float64)
            torch.testing.assert_close(got[b, i], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["factorized", "full", "none"])
def test_it_starts_at_zero_and_learns_at_once(kind: str) -> None:
    ids = some_ids()
    with_it, without = build(kind), build(kind, context=0)
    said = with_it(ids)
    assert said is not None
    assert not said.any()
    assert kind == "none" or torch.equal(said, without(ids))
    assert without.context is None
    context = with_it.context
    assert context is not None
    said.sum().backward()
    assert context.outer.grad is not None
    assert context.outer.grad.abs().sum() > 0


def test_it_is_added_to_what_the_anchors_know() -> None:
    anchors, ids = build(), some_ids()
    assert anchors.weight is not None
    assert anchors.context is not None
    with torch.no_grad():
        anchors.weight.normal_(generator=torch.Generator().manual_seed(2))
        anchors.context.outer.normal_(generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(anchors(ids), anchors.weight[ids] + anchors.context(ids))


@pytest.mark.parametrize("tokens", [1, 2, N])
def test_a_place_depends_on_its_last_tokens_alone(tokens: int) -> None:
    context, ids = trained(context=tokens), some_ids(1)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % V
        differs = (context(ids) != context(other)).any(-1)[0].nonzero().flatten().tolist()
        assert differs == list(range(changed, min(changed + tokens, ids.shape[1])))


def test_every_sequence_starts_anew_and_a_piece_of_one_is_the_whole() -> None:
    context, ids = trained(), some_ids()
    torch.testing.assert_close(context(ids)[1:2], context(ids[1:2]))
    torch.testing.assert_close(context(ids[:, :4]), context(ids)[:, :4])


def test_all_that_it_has_learns() -> None:
    context, ids = trained(), some_ids()
    names = [name for name, _ in context.named_parameters()]
    assert names == ["embedding", "layers.0", "layers.1"]

    def value(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(context, dict(zip(names, parameters, strict=True)), (ids,)).square().sum()

    assert torch.autograd.gradcheck(value, [p.detach().requires_grad_(True) for p in context.parameters()])


def test_first_weights_belong_to_seed_and_stage() -> None:
    first, again = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for changed in ({"seed": 4}, {"stage": 1}):
        other = trained(**changed)
        assert not torch.equal(first.embedding, other.embedding)
        assert not torch.equal(first.inner, other.inner)
    assert first.embedding.std().item() == pytest.approx(1, rel=0.2)
    assert first.inner.std().item() == pytest.approx(1 / math.sqrt(N * E), rel=0.2)
    one = trained(context=1)  # then both have rows of the same width, which must not be the same draws
    assert not torch.equal(one.embedding[:H] / math.sqrt(E), one.inner)


def test_checkpoint_restores_another_start() -> None:
    source, target = build(), build(seed=8, stage=0)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(1)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(some_ids()), source(some_ids()))


@pytest.mark.parametrize("bad", [-1, V])
def test_an_id_outside_the_vocabulary_is_refused_by_name(bad: int) -> None:
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of {V}"):
        trained()(torch.tensor([[0, bad]]))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("context=-1", r"context=-1 has to be from 0 \(none\) to 64"),
        ("context=65", r"context=65 has to be from 0 \(none\) to 64"),
        ("context=4,ce=0", "ce=0 has to be at least 1"),
        ("context=4,ch=0", "ch=0 has to be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: str, line: str) -> None:
    with pytest.raises(CodecError, match=line):
        parse_codec(f"mapl:r=4,{options}")


def test_its_matrices_take_muon_and_its_embedding_does_not() -> None:
    context = build().context
    assert context is not None
    taken = [name for name, p in context.named_parameters(prefix="codec.stage_2.context") if is_hidden_matrix(name, p)]
    assert taken == ["codec.stage_2.context.layers.0", "codec.stage_2.context.layers.1"]
