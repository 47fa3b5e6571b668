"""ResBM: the formula, the swarm bit for bit, and plain autograd over one graph in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.compress.codec_interface import BoundaryContext, StageContext
from thinpipe.compress.registry import parse_codec
from thinpipe.node.local import run_local
from thinpipe.node.model import partition
from thinpipe.node.preparation import prepare, prepare_corpus
from thinpipe.node.stage import Stage
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from . import in_memory, textbook
from .conftest import TinyConfig
from .float64 import assert_clipped_now_and_then, batches_of, recipe_of, settings
from .in_memory import Outcome, read_outcome, run_in_memory, run_reference
from .preloaded import forks
from .test_float64_parity import LAYERS, TOLERANCE, norm_in_float64, plain_model, relative

D, V, B = 24, 40, 6
VARIANTS = {
    "as published": ("resbm:b=8", {}),
    "linear": ("resbm:b=8,kind=linear", {"codec.forward": "int8"}),
    "with what both ends know": ("resbm:b=8,mid=12,anchors=full,context=3,table=1", {"pipeline.stages": 4}),
    "autocast": ("resbm:b=8,table=1", {"compute.dtype": "bfloat16", "pipeline.schedule": "gpipe"}),
    "split backward": ("resbm:b=8", {"pipeline.schedule": "zb", "codec.forward": "rvq:groups=2,codes=16"}),
}


def halves(spec: str, boundary: int = 0) -> Any:
    codec = parse_codec(spec).codec
    known = [codec.tokens(StageContext(seed=3, stage=boundary + i, width=D, vocab_size=V), None) for i in (0, 1)]
    contexts = [
        BoundaryContext(seed=3, boundary=boundary, width=D, vocab_size=V, tokens=tokens, dtype=torch.float64)
        for tokens in known
    ]
    return codec.encoder(contexts[0]), codec.decoder(contexts[1])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 7, D, generator=generator, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.int64)


@pytest.mark.parametrize("kind", ["silu", "linear"])
def test_values_are_the_formula(kind: str) -> None:
    sender, receiver = halves(f"resbm:b={B},kind={kind}")
    x, ids = batch()
    matrices = [p.detach() for p in (*sender.parameters(), *receiver.parameters())]
    if kind == "silu":
        assert [m.shape for m in matrices] == [(64, D), (B, 64), (64, B), (D, 64)]
        a, b, c, d = matrices
        z = F.silu(x @ a.T) @ b.T + x[..., :B]
        back = F.silu(z @ c.T) @ d.T
    else:
        assert [m.shape for m in matrices] == [(B, D), (D, B)]
        z = x @ matrices[0].T + x[..., :B]
        back = z @ matrices[1].T
    torch.testing.assert_close(sender.encode(x, ids), z)
    back[..., :B] += z
    torch.testing.assert_close(receiver.decode(z, ids), back)


def test_it_starts_as_a_cut_to_the_first_channels() -> None:
    sender, receiver = halves(f"resbm:b={B}")
    x, ids = batch()
    z = sender.encode(x, ids)
    assert 0 < (z - x[..., :B]).norm() < 0.1 * z.norm()
    assert 0 < receiver.decode(z, ids)[..., B:].norm() < 0.1 * z.norm()


def test_first_weights_belong_to_seed_and_boundary() -> None:
    def matrices(boundary: int) -> list[Tensor]:
        return [p.detach() for half in halves(f"resbm:b={B},mid={D}", boundary) for p in half.parameters()]

    first = matrices(0)
    assert all(torch.equal(*pair) for pair in zip(first, matrices(0), strict=True))
    flat = [m.flatten()[: B * D] for m in (*first, *matrices(1))]
    assert all(not torch.equal(*pair) for pair in itertools.combinations(flat, 2))
    assert torch.cat(flat).std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.pairwise(2)
@pytest.mark.parametrize(("codec", "more"), VARIANTS.values(), ids=VARIANTS)
def test_a_swarm_is_one_process(codec: str, more: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 2, "run.eval_every": 2, "codec.codec": codec, **more})
    assert run_in_memory(config, tmp_path / "swarm") == run_reference(config, tmp_path / "reference")


@pytest.mark.slow
def test_processes_are_one_process(tiny: TinyConfig, tmp_path: Path) -> None:
    config = tiny({"pipeline.stages": 4, "codec.codec": "resbm:b=8,anchors=full"})
    run_local(config, tmp_path / "swarm", quiet=True, forks=forks())
    assert read_outcome(tmp_path / "swarm", 4) == run_reference(config, tmp_path / "reference")


def test_both_halves_are_trained_and_in_the_state(tiny: TinyConfig) -> None:
    stages = [
        prepare(tiny({"pipeline.stages": 3, "codec.codec": "resbm:b=8,anchors=full"}), index)[0] for index in range(3)
    ]
    names = [name for name in stages[1].state_tensors() if "boundary" in name]
    wanted = [
        f"{what}/codec.boundary_{half}.layers.{layer}.weight"
        for what in ("weight", "muon.momentum")
        for half in ("0.receiver", "1.sender")
        for layer in (0, 2)
    ]
    assert names == wanted


class PlainModel:
    """The whole model, and between its groups of layers the formula of a boundary."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.causal = plain_model("llama")
        start = {name: p.detach().clone() for stage in stages for name, p in stage.model.full_names()}
        self.causal.load_state_dict(start, strict=True)
        self.networks = networks(stages)
        for matrix in itertools.chain(*self.networks):
            matrix.requires_grad_(True)
        for boundary, group in enumerate(partition(LAYERS, len(stages))[1:]):
            crossing = lambda _, args, boundary=boundary: (self._cross(boundary, *args),)  # noqa: E731
            self.causal.model.layers[group.start].register_forward_pre_hook(crossing)
        self._groups = partition(LAYERS, len(stages))

    def __call__(self, input_ids: Tensor) -> Any:
        return self.causal(input_ids=input_ids)

    def _cross(self, boundary: int, x: Tensor) -> Tensor:
        a, b, c, d = self.networks[boundary]
        z = F.silu(x @ a.T) @ b.T + x[..., : len(b)]
        rest = torch.zeros(*z.shape[:-1], x.shape[-1] - z.shape[-1], dtype=z.dtype)
        return F.silu(z @ c.T) @ d.T + torch.cat([z, rest], dim=-1)

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        own = [(f"{b + (i > 1)}.layers.{b}.{i}", m) for b, of in enumerate(self.networks) for i, m in enumerate(of)]
        return [*self.causal.named_parameters(), *own]

    def stage_of(self, name: str) -> int:
        if name[0].isdigit():
            return int(name.partition(".")[0])
        if ".layers." not in name:
            return 0 if "embed_tokens" in name else len(self._groups) - 1
        layer = int(name.partition(".layers.")[2].partition(".")[0])
        return next(stage for stage, layers in enumerate(self._groups) if layer in layers)


def networks(stages: Sequence[Stage]) -> list[list[Tensor]]:
    """The four matrices of each boundary."""
    return [
        [p.detach().clone() for half in (upper.sender, lower.receiver) for p in half.parameters()]
        for upper, lower in itertools.pairwise(stages)
    ]


@pytest.mark.parametrize("steps", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_it_is_plain_autograd_over_one_graph(
    steps: int, tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    torch.set_num_threads(1)
    trained: list[Stage] = []
    read = in_memory.read_outcome

    def read_and_keep(out: Path, stages: Sequence[Stage]) -> Outcome:
        trained.extend(stages)
        return read(out, stages)

    monkeypatch.setattr(in_memory, "read_outcome", read_and_keep)
    plain_model("llama").config.to_json_file(tmp_path / "config.json")
    # at 0.005, 1e-16 has grown to 1e-8 after 24 steps
    config = tiny(settings(tmp_path, steps) | {"optim.muon_lr": 0.001, "codec.codec": "resbm:b=8"})
    plain = PlainModel([prepare(config, index)[0] for index in range(4)])
    got = run_in_memory(config, tmp_path / "run")
    losses, norms = textbook.train(plain, batches_of(config), recipe_of(config), plain.stage_of)
    assert_clipped_now_and_then(norms, config.optim.clip)
    heldout = torch.from_numpy(prepare_corpus(config).heldout_batch(0, config.data.heldout_sequences)).long()
    with torch.no_grad():
        val_loss = textbook.mean_loss(plain, heldout).item()
    errors = {
        "loss": relative(got.losses[0], losses),
        "val_loss": relative(got.val_losses[0], [val_loss]),
        "gradient norm": relative(got.grad_norms, [[of_step[index] for of_step in norms] for index in range(4)]),
        "networks": max(
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(itertools.chain(*networks(trained)), itertools.chain(*plain.networks), strict=True)
        ),
    }
    assert max(errors.values()) < TOLERANCE, errors
