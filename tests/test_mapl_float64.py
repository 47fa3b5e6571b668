"""Invariant 2 for MAPL: in float64 and without rounding, a swarm is one graph with projections in it, to 1e-8.

The yardstick is one Hugging Face model over the whole batch, under the training loop of `textbook`. Between two groups
of its layers a hook does what a boundary does, Z = (H - T[t] - E[t] P) A and H' = Z Aᵀ + T[t] + E'[t] P', with one leaf
A: autograd then adds up the two halves of its gradient, which the swarm has on two machines. An interior stage's E has
two uses. With pairs, the rows F[hash] of a second table stand beside E[t], the hash in plain integers, id by id.
Nothing of the codec is used but its first numbers: weights, T, P and A.

Plain training is what the swarm does although its projectors travel, because the step that uses A is the step that
brings it. Only held-out text after the last step is coded with the A of that step's start, not with what it became.

Measured, the worst of 50 steps: losses 6e-16, gradient norms 2e-14, weights 4e-14, anchors 2e-13, projectors 1e-14, and
1e-12 of the way they went. The retraction is an exact polar factor here and three cubic steps in the swarm, and the
projector's gradient a mean here and a sum there: neither is seen, for the steps are short and the matrix sign forgets
a size. Two things are seen. A matrix sign in float32 within the projector's step ends at 2e-6. And the swarm's Muon
divides a matrix whose norm is below 1e-7 by 1e-7, which `textbook` does not: gradients in Starcoder2's four stages are
so small behind a token table of scale 1, and weights then differ by 6e-3. Hence a table of scale 0.1 there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.compress import anchors as anchors_module
from thinpipe.compress.anchors import Anchors
from thinpipe.compress.codec_interface import BoundaryContext, Decoder, Encoder
from thinpipe.compress.mapl import MaplCodec
from thinpipe.compress.mapl_halves import MaplEncoder
from thinpipe.compress.registry import parse_codec
from thinpipe.node.config import RunConfig
from thinpipe.node.model import partition
from thinpipe.node.preparation import prepare, prepare_corpus
from thinpipe.node.stage import Stage
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from . import in_memory, textbook
from .conftest import TinyConfig
from .float64 import assert_clipped_now_and_then, batches_of, recipe_of, settings
from .in_memory import Outcome, run_in_memory
from .test_anchors import plain_bucket
from .test_float64_parity import LAYERS, TOLERANCE, norm_in_float64, plain_model, relative

STEPS, SOME_STEPS, FEW_STEPS = 50, 12, 8
WITHOUT_ROUNDING = "delta=fp64,gradient=fp64"

Compare = Callable[..., dict[str, float]]


class PlainModel:
    """The whole model with the formulas of a boundary between its groups of layers, one group a stage.

    `stages` give the numbers to start from; `codec` says which parts there are and how fast they learn.
    """

    def __init__(self, architecture: str, stages: Sequence[Stage], codec: MaplCodec) -> None:
        self.causal = plain_model(architecture)
        start = {name: p.detach().clone() for stage in stages for name, p in stage.model.full_names()}
        self.causal.load_state_dict(start, strict=True)
        vocab, width = self.causal.model.embed_tokens.weight.shape
        table = stages[0].model.token_table_VD
        self.table = torch.zeros(vocab, width, dtype=torch.float64) if table is None else table.clone()
        rank = {"none": 0, "factorized": codec.known.rank, "full": width}[codec.known.anchors]
        self.anchors = [torch.zeros(vocab, rank, dtype=torch.float64, requires_grad=True) for _ in stages]
        self.pairs = [torch.zeros(codec.known.pairs, rank, dtype=torch.float64, requires_grad=True) for _ in stages]
        self.context = [context_of(stage) for stage in stages]
        self.frozen = [frozen_part(stage, rank, width) for stage in stages]
        self.projectors = [
            textbook.Projector(
                matrix=master.clone().requires_grad_(True),
                rate=codec.rate,
                beta=codec.beta,
                every=0 if codec.projector == "fixed" else codec.every,
                manifold={"grassmann": "grassmann", "free": None}.get(codec.projector, "stiefel"),
            )
            for master in masters(stages)
        ]
        self._halves = 1 if codec.gradient == "none" else 2
        self._groups = partition(LAYERS, len(stages))
        self._ids = torch.empty(0)
        for boundary, group in enumerate(self._groups[1:]):
            crossing = lambda _, args, boundary=boundary: (self._cross(boundary, *args),)  # noqa: E731
            self.causal.model.layers[group.start].register_forward_pre_hook(crossing)

    def __call__(self, input_ids: Tensor) -> Any:
        self._ids = input_ids
        return self.causal(inputs_embeds=self.causal.model.embed_tokens(input_ids) + self.table[input_ids])

    def _cross(self, boundary: int, hidden: Tensor) -> Tensor:
        a = self.projectors[boundary].matrix
        z = (hidden - self._known(boundary)) @ a
        return z @ (a if self._halves == 2 else a.detach()).T + self._known(boundary + 1)

    def _known(self, stage: int) -> Tensor:
        learned = self.anchors[stage][self._ids]
        if len(self.pairs[stage]):
            learned = learned + self.pairs[stage][self._rows_of_pairs(len(self.pairs[stage]))]
        return self.table[self._ids] + learned @ self.frozen[stage] + self._from_context(stage)

    def _from_context(self, stage: int) -> Tensor | float:
        """A product for each distance, of the tokens that far back."""
        if not self.context[stage]:
            return 0.0
        embedding, inner, outer = self.context[stage]
        nothing, width = len(embedding) - 1, embedding.shape[1]
        tokens = inner.shape[1] // width
        units: Tensor | float = 0.0
        for place, part in enumerate(inner.split(width, dim=1)):
            far = tokens - 1 - place
            before = torch.full((len(self._ids), far), nothing)
            ids = torch.cat([before, self._ids], dim=1)[:, : self._ids.shape[1]]
            units = units + embedding[ids] @ part.T
        assert isinstance(units, Tensor)
        return (units * torch.sigmoid(units)) @ outer.T

    def _rows_of_pairs(self, count: int) -> Tensor:
        nothing = len(self.table)
        return torch.tensor(
            [
                [plain_bucket(before, own, count) for before, own in itertools.pairwise([nothing, *ids])]
                for ids in self._ids.tolist()
            ]
        )

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        own = [(f"anchors {stage}", e) for stage, e in enumerate(self.anchors)]
        own += [(f"anchors {stage} of pairs", f) for stage, f in enumerate(self.pairs) if len(f)]
        for stage, (embedding, *matrices) in enumerate(filter(None, self.context)):
            own.append((f"anchors {stage} context", embedding))
            own += [(f"anchors {stage} context.layers.{i}", matrix) for i, matrix in enumerate(matrices)]
        return [*self.causal.named_parameters(), *own]

    def stage_of(self, name: str) -> int:
        """The group in which a parameter is clipped."""
        if name.startswith("anchors "):
            return int(name.split()[1])
        if ".layers." not in name:
            return 0 if "embed_tokens" in name else len(self._groups) - 1
        layer = int(name.partition(".layers.")[2].partition(".")[0])
        return next(stage for stage, layers in enumerate(self._groups) if layer in layers)


def frozen_part(stage: Stage, rank: int, width: int) -> Tensor:
    """P (rank, D) of a stage."""
    if isinstance(stage.tokens, Anchors) and stage.tokens.projection is not None:
        return stage.tokens.projection.clone()
    return torch.eye(width, dtype=torch.float64)[:rank]


def context_of(stage: Stage) -> list[Tensor]:
    """Its network's matrices, as leaves of their own."""
    if not isinstance(stage.tokens, Anchors) or stage.tokens.context is None:
        return []
    return [p.detach().clone().requires_grad_(True) for p in stage.tokens.context.parameters()]


def masters(stages: Sequence[Stage]) -> list[Tensor]:
    return [stage.sender.master for stage in stages[:-1]]


def anchors(stages: Sequence[Stage]) -> list[Tensor]:
    """E of every stage, where there is one."""
    every = [stage.tokens.weight for stage in stages if isinstance(stage.tokens, Anchors)]
    return [weight.detach() for weight in every if weight is not None]


def pairs(stages: Sequence[Stage]) -> list[Tensor]:
    """F of every stage, where there is one."""
    every = [stage.tokens.pairs for stage in stages if isinstance(stage.tokens, Anchors)]
    return [rows.detach() for rows in every if rows is not None]


def shipped(stages: Sequence[Stage]) -> list[Tensor]:
    """What both sides of every boundary hold."""
    ends: list[Tensor] = []
    for upper, lower in itertools.pairwise(stages):
        assert isinstance(upper.sender, MaplEncoder)
        assert lower.upstream_endpoint
        assert lower.upstream_endpoint.table
        ends += [upper.sender.shipped.detach(), lower.upstream_endpoint.table.state_tensors()["replica"]]
    return ends


@pytest.fixture
def compare(tiny: TinyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compare:
    """Train as a swarm and by the book; how far, relatively, the one is from the other."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    torch.set_num_threads(1)
    trained: list[Stage] = []
    read = in_memory.read_outcome

    def read_and_keep(out: Path, stages: Sequence[Stage]) -> Outcome:
        trained.extend(stages)
        return read(out, stages)

    monkeypatch.setattr(in_memory, "read_outcome", read_and_keep)

    def both(
        options: str,
        *,
        architecture: str = "llama",
        stages: int = 4,
        steps: int = FEW_STEPS,
        polynomials: str,
        **more: Any,
    ) -> dict[str, float]:
        plain_model(architecture).config.to_json_file(tmp_path / "config.json")
        config = tiny(
            settings(tmp_path, steps)
            | {
                "optim.msign_coefficients": polynomials,
                "codec.codec": "mapl:r=8," + everything_on(options),
                "pipeline.stages": stages,
                **{name.replace("__", "."): value for name, value in more.items()},
            }
        )
        codec = parse_codec(config.codec.codec).codec
        assert isinstance(codec, MaplCodec)
        plain = PlainModel(architecture, [prepare(config, index)[0] for index in range(stages)], codec)
        return errors_of(plain, config, run_in_memory(config, tmp_path / "run"), trained)

    return both


def everything_on(options: str) -> str:
    """`options`, and for what they leave out anchors, the token table and a projector that moves every step."""
    given = dict(option.split("=") for option in options.split(","))
    usual = {"anchors": "factorized", "context": "0", "table": "1", "every": "1"}
    return ",".join(f"{name}={value}" for name, value in (usual | given).items())


def errors_of(plain: PlainModel, config: RunConfig, got: Outcome, stages: Sequence[Stage]) -> dict[str, float]:
    """Train `plain` by the book; how far, relatively, the swarm is from it."""
    starts = [projector.used for projector in plain.projectors]
    losses, norms = textbook.train(plain, batches_of(config), recipe_of(config), plain.stage_of, plain.projectors)
    assert losses[-1] < losses[0]
    assert_clipped_now_and_then(norms, config.optim.clip)
    learned = [projector.matrix.detach() for projector in plain.projectors]
    for projector in plain.projectors:
        projector.matrix = projector.used
    heldout = torch.from_numpy(prepare_corpus(config).heldout_batch(0, config.data.heldout_sequences)).long()
    with torch.no_grad():
        val_loss = textbook.mean_loss(plain, heldout).item()
    weights = dict(plain.causal.named_parameters())
    assert got.weights.keys() == weights.keys()
    assert all(of_stage == got.losses[0] for of_stage in got.losses)
    way = [[a - start for a, start in zip(end, starts, strict=True)] for end in (masters(stages), learned)]
    return {
        "loss": relative(got.losses[0], losses),
        "val_loss": relative(got.val_losses[0], [val_loss]),
        "gradient norm": relative(
            got.grad_norms, [[of_step[index] for of_step in norms] for index in range(len(stages))]
        ),
        "weight": farthest(got.weights.values(), [weights[name] for name in got.weights]),
        "anchors": farthest(anchors(stages), [e for e in plain.anchors if e.numel()]),
        "pairs": farthest(pairs(stages), [f for f in plain.pairs if f.numel()]),
        "context": farthest(itertools.chain(*map(context_of, stages)), itertools.chain(*plain.context)),
        "projector": farthest(masters(stages), learned),
        "way of a projector": farthest(*way),
        "projector in use": farthest(
            shipped(stages), [projector.used for projector in plain.projectors for _ in range(2)]
        ),
    }


def farthest(got: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest relative distance of two lists of tensors; what should not have moved is measured as it is."""
    lengths = [
        (torch.linalg.vector_norm(ours - theirs).item(), torch.linalg.vector_norm(theirs).item())
        for ours, theirs in zip(got, wanted, strict=True)
    ]
    return max((error / length if length else error for error, length in lengths), default=0.0)


@pytest.mark.pairwise(1)
@pytest.mark.parametrize(
    ("architecture", "stages", "steps", "options", "polynomials"),
    [
        ("llama", 2, SOME_STEPS, WITHOUT_ROUNDING, "polar_express"),
        ("llama", 4, STEPS, WITHOUT_ROUNDING, "polar_express"),
        ("starcoder2", 4, STEPS, f"{WITHOUT_ROUNDING},table=0.1", "quintic"),
    ],
)
def test_a_swarm_learns_projectors_as_one_graph_would(
    architecture: str, stages: int, steps: int, options: str, polynomials: str, compare: Compare
) -> None:
    errors = compare(options, architecture=architecture, stages=stages, steps=steps, polynomials=polynomials)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.pairwise(1)
@pytest.mark.parametrize(
    ("options", "schedule", "predict", "steps"),
    [
        ("every=2,anchors=full", "zb", "orthogonal", SOME_STEPS),
        ("every=1", "gpipe", "none", STEPS),
        ("every=3", "1f1b", "momentum", SOME_STEPS),
    ],
)
def test_so_it_does_with_gradients_that_are_late(
    options: str, schedule: str, predict: str, steps: int, compare: Compare
) -> None:
    """The projector that codes a step's messages is as late as the step's weights."""
    late = {"pipeline__delay": 1, "pipeline__schedule": schedule, "pipeline__predict": predict}
    errors = compare(f"{WITHOUT_ROUNDING},{options}", steps=steps, polynomials="polar_express", **late)
    assert max(errors.values()) < TOLERANCE, errors


VARIANTS = [
    "anchors=full",
    "anchors=full,pairs=61",
    "context=3,ce=5,ch=7",
    "anchors=none",
    "projector=fixed",
    "projector=grassmann",
    "projector=free",
    "every=2",
    "lr=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("options", [*VARIANTS, "table=0,ar=16", "ar=16,pairs=300"])
def test_so_does_every_variant(options: str, compare: Compare) -> None:
    errors = compare(f"{WITHOUT_ROUNDING},{options}", polynomials="polar_express")
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.slow
def test_the_senders_half_alone_is_a_graph_that_is_cut_at_the_receiver(compare: Compare) -> None:
    errors = compare("delta=fp64,gradient=none", polynomials="polar_express")
    assert max(errors.values()) < TOLERANCE, errors


# -- a small bug is seen ------------------------------------------------------------------------------------------


def receivers_half(patch: pytest.MonkeyPatch, factor: float) -> None:
    """The receiver's half of the projector's gradient counts `factor` times."""
    take = MaplEncoder.take_gradient

    def wrong(self: MaplEncoder, received: Tensor | None) -> Tensor:
        assert received is not None
        return take(self, factor * received)

    patch.setattr(MaplEncoder, "take_gradient", wrong)


def rate_without_schedule(patch: pytest.MonkeyPatch) -> None:
    learn = MaplEncoder.learn
    patch.setattr(MaplEncoder, "learn", lambda self, gradient, **_: learn(self, gradient, rate=0.005))


class Known(nn.Module):
    """What a stage knows of its tokens, changed in value or gradient by `how`."""

    def __init__(self, own: nn.Module | None, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        assert own is not None
        self.own, self.how = own, how

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.how(self.own(ids_BT), ids_BT)


def anchors_of_the_sender(patch: pytest.MonkeyPatch) -> None:
    """The receiver adds what the sender subtracted: its own anchors learn, but are not used."""
    tokens, decoder = MaplCodec.tokens, MaplCodec.decoder
    of_stage: dict[int, nn.Module] = {}

    def remember(self: MaplCodec, context: Any, table_VD: Tensor | None) -> nn.Module | None:
        known = tokens(self, context, table_VD)
        assert known is not None
        of_stage[context.stage] = known
        return known

    def wrong(self: MaplCodec, context: BoundaryContext) -> Decoder:
        other = of_stage[context.boundary]
        known = Known(context.tokens, lambda own, ids: own + (other(ids) - own).detach())
        return decoder(self, replace(context, tokens=known))

    patch.setattr(MaplCodec, "tokens", remember)
    patch.setattr(MaplCodec, "decoder", wrong)


def one_use_forgotten(patch: pytest.MonkeyPatch) -> None:
    """An interior stage's anchors learn from what comes in and not from what goes out."""
    encoder = MaplCodec.encoder

    def wrong(self: MaplCodec, context: BoundaryContext) -> Encoder:
        known = Known(context.tokens, lambda own, _: own.detach()) if context.boundary else context.tokens
        return encoder(self, replace(context, tokens=known))

    patch.setattr(MaplCodec, "encoder", wrong)


def no_token_table_below(patch: pytest.MonkeyPatch) -> None:
    """The receiver forgets the frozen token table."""
    decoder = MaplCodec.decoder

    def wrong(self: MaplCodec, context: BoundaryContext) -> Decoder:
        def without(own: Tensor, ids_BT: Tensor) -> Tensor:
            assert isinstance(context.tokens, Anchors)
            assert context.tokens.table is not None
            return own - context.tokens.table[ids_BT]

        return decoder(self, replace(context, tokens=Known(context.tokens, without)))

    patch.setattr(MaplCodec, "decoder", wrong)


def one_projector_late(patch: pytest.MonkeyPatch) -> None:
    """The sender codes with the projector before the one that it shipped."""
    use, before = MaplEncoder.use_table, dict[int, Tensor]()

    def wrong(self: MaplEncoder, table: Tensor) -> None:
        use(self, before.get(id(self), table))
        before[id(self)] = table.detach().clone()

    patch.setattr(MaplEncoder, "use_table", wrong)


def one_projector_early(patch: pytest.MonkeyPatch) -> None:
    """The sender codes held-out text with what it has learned and not shipped."""
    encode = MaplEncoder.encode

    def wrong(self: MaplEncoder, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        shipped = self.shipped
        if not torch.is_grad_enabled():
            self._leaves.table = self.master
        z_BTR = encode(self, hidden_BTD, ids_BT)
        self._leaves.table = shipped
        return z_BTR

    patch.setattr(MaplEncoder, "encode", wrong)


def pairs_the_other_way_round(patch: pytest.MonkeyPatch) -> None:
    """A token is paired with the one that follows it."""
    buckets = anchors_module.pair_buckets
    patch.setattr(anchors_module, "pair_buckets", lambda ids, *sizes: buckets(ids.flip(1), *sizes).flip(1))


def pairs_run_on_from_the_last_sequence(patch: pytest.MonkeyPatch) -> None:
    """The first token of a sequence is paired with the last one of the sequence before."""
    buckets = anchors_module.pair_buckets
    patch.setattr(
        anchors_module, "pair_buckets", lambda ids, *sizes: buckets(ids.reshape(1, -1), *sizes).view(ids.shape)
    )


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "receiver's half dropped": lambda patch: receivers_half(patch, 0.0),
    "receiver's half counted twice": lambda patch: receivers_half(patch, 2.0),
    "projector's rate does not warm up": rate_without_schedule,
    "sender's anchors on both sides": anchors_of_the_sender,
    "one use of the anchors forgotten": one_use_forgotten,
    "token table on one side": no_token_table_below,
    "pairs the other way round": pairs_the_other_way_round,
    "pairs across sequences": pairs_run_on_from_the_last_sequence,
    "sender one projector late": one_projector_late,
    "sender one projector early": one_projector_early,
}


@pytest.mark.pairwise(1, slow=4)
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_small_bug_is_seen(
    bug: Callable[[pytest.MonkeyPatch], None], compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    errors = compare(f"{WITHOUT_ROUNDING},lr=1,pairs=300", polynomials="polar_express")
    assert max(errors.values()) > 10 * TOLERANCE, errors
