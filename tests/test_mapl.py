"""MAPL in the swarm: one process bit for bit, on the manifold at every step, each side with its own half only.

What the parts promise alone stands in test_stiefel, test_anchors and test_dictionary; that the gradients are autograd's
in test_mapl_float64. Here real nodes train with them, joined by queues or as processes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.compress.anchors import Anchors
from thinpipe.compress.byte_format import CodecError
from thinpipe.compress.codec_interface import BoundaryContext, StageContext
from thinpipe.compress.mapl import MaplCodec
from thinpipe.compress.mapl_halves import MaplDecoder, MaplEncoder
from thinpipe.node.boundary.learned_tables import TableOwner, TableReplica, gradient_due
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.local import run_local
from thinpipe.node.preparation import check_codec, prepare, run_digest
from thinpipe.node.stage import Stage
from thinpipe.protocol.errors import Fault, RemoteProtocolError
from thinpipe.protocol.greeting import NodeIdentity, check_greeting
from thinpipe.protocol.grid_place import GridPlace
from thinpipe.protocol.messages import Greeting, Kind, Message
from thinpipe.sim.reports.summary import read_records

from .conftest import TinyConfig
from .in_memory import Cut, Outcome, read_outcome, run_in_memory, run_reference
from .preloaded import forks

PUBLISHED = "mapl:anchors=factorized,context=0,table=1,every=1"  # everything switched on
VARIANTS = {
    "as published": (f"{PUBLISHED},r=8", {}),
    "as it comes": (
        "mapl:r=8",
        {"codec.forward": MaplCodec.default_forward, "codec.backward": MaplCodec.default_backward},
    ),
    "int4, four stages": (
        f"{PUBLISHED},r=8",
        {"pipeline.stages": 4, "codec.forward": "int4", "codec.backward": "int4"},
    ),
    "full anchors, gpipe": (
        "mapl:r=8,anchors=full,table=1,every=1",
        {"pipeline.stages": 4, "pipeline.schedule": "gpipe"},
    ),
    "anchors of more rank": (f"{PUBLISHED},r=8,ar=16,delta=bf16,gradient=int4", {}),
    "anchors of pairs": (f"{PUBLISHED},r=8,ar=16,pairs=97", {}),
    "full anchors of pairs, int3, four stages": (
        "mapl:r=8,anchors=full,pairs=512,table=1,every=1",
        {"pipeline.stages": 4, "codec.forward": "int3", "codec.backward": "int3"},
    ),
    "a context": ("mapl:r=8,anchors=factorized,table=1,every=1,context=3,ce=6,ch=10", {}),
    "neither anchors nor table": ("mapl:r=16,anchors=none,table=0,delta=bf16,every=1", {}),
    "every second step": ("mapl:r=8,every=2,anchors=factorized,table=1", {"pipeline.stages": 4, "run.steps": 5}),
    "fixed": (f"{PUBLISHED},r=8,projector=fixed", {"codec.forward": "int8"}),
    "sender's half": (f"{PUBLISHED},r=8,gradient=none", {}),
    "along the Grassmannian": (f"{PUBLISHED},r=8,projector=grassmann", {"pipeline.stages": 4}),
    "free": (f"{PUBLISHED},r=8,projector=free", {}),
    "autocast": (f"{PUBLISHED},r=8", {"compute.dtype": "bfloat16", "pipeline.microbatches": 1}),
    "dense with the token table": ("identity:table=1", {}),
}


def configure(tiny: TinyConfig, codec: str, more: dict[str, Any]) -> RunConfig:
    """With formats that learn nothing, unless `more` says others: codebooks have tests of their own."""
    formats = {"codec.forward": "int4", "codec.backward": "int3"}
    return tiny({"pipeline.stages": 2, "run.eval_every": 2, "codec.codec": codec, **formats, **more})


def both(config: RunConfig, directory: Path) -> tuple[Outcome, Outcome]:
    return run_reference(config, directory / "reference"), run_in_memory(config, directory / "swarm")


@pytest.mark.pairwise(2)
@pytest.mark.parametrize(("codec", "more"), VARIANTS.values(), ids=VARIANTS)
def test_a_swarm_is_one_process(codec: str, more: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    reference, swarm = both(configure(tiny, codec, more), tmp_path)
    assert swarm == reference
    assert all(math.isfinite(loss) for loss in swarm.losses[0])


def test_the_variants_differ(tiny: TinyConfig, tmp_path: Path) -> None:
    codecs = [codec for codec, more in VARIANTS.values() if not more]
    finals = [run_reference(configure(tiny, codec, {}), tmp_path / str(i)) for i, codec in enumerate(codecs)]
    assert len({outcome.state_sha256[0] for outcome in finals}) == len(codecs)
    assert len({tuple(outcome.losses[0]) for outcome in finals}) == len(codecs)


@pytest.mark.parametrize("at", ["read", "write"])
def test_broken_connections_change_no_bit(at: Any, tiny: TinyConfig, tmp_path: Path) -> None:
    config = configure(tiny, f"{PUBLISHED},r=8", {"pipeline.stages": 3, "codec.forward": "int4"})
    cuts = {0: [Cut(frame=frame, at=at) for frame in (3, 4, 9, 7)], 1: [Cut(frame=frame, at=at) for frame in (7, 3, 5)]}
    disturbed = run_in_memory(config, tmp_path / "swarm", cuts=cuts)
    assert disturbed.connections == {0: 5, 1: 4}
    assert disturbed == run_reference(config, tmp_path / "reference")


@pytest.mark.slow
def test_processes_are_one_process(tiny: TinyConfig, tmp_path: Path) -> None:
    """With a codebook that streams in each direction, too."""
    formats = {"codec.forward": "rvq:groups=2,codes=16,delta=drift/4", "codec.backward": "rvq:groups=2,codes=16"}
    config = configure(tiny, f"{PUBLISHED},r=8", {"pipeline.stages": 4, **formats})
    run_local(config, tmp_path / "swarm", quiet=True, forks=forks())
    assert read_outcome(tmp_path / "swarm", 4) == run_reference(config, tmp_path / "reference")


# -- what is recorded ---------------------------------------------------------------------------------------------


def measures(directory: Path, stage: int) -> list[dict[str, float]]:
    return [record["codec"] for record in read_records(directory / f"stage-{stage}.jsonl") if record["event"] == "step"]


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("delta", ["int8", "bf16"])
def test_projectors_stay_on_the_manifold(delta: str, tiny: TinyConfig, tmp_path: Path) -> None:
    steps = {"run.steps": 34, "pipeline.microbatches": 1, "run.eval_every": 0, "optim.muon_lr": 0.02}
    run_reference(configure(tiny, f"{PUBLISHED},r=16,delta={delta}", steps), tmp_path)
    figures = measures(tmp_path, 0)
    assert len(figures) == 34
    assert max(of["orthonormality_error_master"] for of in figures) <= 1e-5
    assert max(of["orthonormality_error_shipped"] for of in figures) <= 1e-4
    assert all(of["angle_moved_rad"] > 1e-5 for of in figures)
    assert all(0 < of["reconstruction_error"] < 1 for of in figures)
    turned = [of["angle_turned_rad"] for of in figures]
    assert 0 < turned[0] < turned[9] < turned[-1] <= sum(of["angle_moved_rad"] for of in figures)
    assert all(0 < of["energy_kept"] <= of["energy_best"] <= 1 for of in figures)
    assert len({of["energy_best"] for of in figures}) == 3  # a look at steps 0, 16 and 32
    norms = [of["anchor_norm"] for of in figures]
    assert norms[0] < norms[9] < norms[-1]
    assert measures(tmp_path, 1) == [{}] * 34  # the last stage owns no projector


def test_a_free_projector_leaves_the_manifold_and_a_fixed_one_rests(tiny: TinyConfig, tmp_path: Path) -> None:
    steps = {"run.steps": 12, "pipeline.microbatches": 1, "run.eval_every": 0}
    for projector in ("free", "fixed"):
        run_reference(configure(tiny, f"{PUBLISHED},r=16,projector={projector}", steps), tmp_path / projector)
    free, fixed = (measures(tmp_path / projector, 0)[-1] for projector in ("free", "fixed"))
    assert free["orthonormality_error_master"] > 1e-4
    assert fixed["orthonormality_error_master"] < 1e-5
    assert fixed["angle_moved_rad"] == fixed["angle_turned_rad"] == 0


@pytest.mark.parametrize("start", ["own", "shared"])
def test_boundaries_start_with_one_projector_or_their_own(start: str, tiny: TinyConfig) -> None:
    config = configure(tiny, f"{PUBLISHED},r=8,start={start}", {"pipeline.stages": 4})
    first, *others = [prepare(config, index)[0].sender.master for index in range(3)]
    assert [torch.equal(first, other) for other in others] == [start == "shared"] * 2
    kept = [(first.T @ other).norm().item() ** 2 / 8 for other in others]  # of what one has carried, by the next
    assert all((share > 0.999) == (start == "shared") for share in kept)


def rows(outcome: Outcome) -> dict[str, int]:
    return dict(outcome.sent_bytes)


def test_every_byte_has_its_row(tiny: TinyConfig, tmp_path: Path) -> None:
    """d = 64, r = 8: the snapshot is 2,048 bytes of fp32, a change 64 rows of 8 codes and a scale, all with a head."""
    steps, formats = 5, {"codec.forward": "bf16", "codec.backward": "bf16"}
    full, half, seldom, fixed = (
        rows(run_reference(configure(tiny, codec, {"run.steps": steps, **formats}), tmp_path / str(i)))
        for i, codec in enumerate(
            [
                f"{PUBLISHED},r=8",
                f"{PUBLISHED},r=8,gradient=none",
                "mapl:r=8,every=2,anchors=factorized,table=1",
                f"{PUBLISHED},r=8,projector=fixed",
            ]
        )
    )
    gradient = steps * (64 * 8 + 2 * 64 * 8 // 128)
    assert full["projector_gradient"] == gradient
    assert "projector_gradient" not in half
    assert "projector_gradient" not in fixed
    assert seldom["projector_gradient"] == 2 * gradient // 5
    head = full["dictionary"] - (2048 + (steps - 1) * (64 * 8 + 2 * 64))
    assert 0 < head < steps * 100
    assert 2048 < fixed["dictionary"] < 2048 + 100
    assert fixed["dictionary"] < seldom["dictionary"] < full["dictionary"] == half["dictionary"]
    tokens = steps * 8 * 32
    assert full["activation"] == full["gradient"] == tokens * 8 * 2  # bf16


def test_evaluation_brings_no_change(tiny: TinyConfig, tmp_path: Path) -> None:
    seldom, often = (
        run_reference(configure(tiny, f"{PUBLISHED},r=8", {"run.eval_every": every}), tmp_path / str(every))
        for every in (0, 1)
    )
    assert seldom.state_sha256 == often.state_sha256
    assert seldom.sent_bytes["dictionary"] == often.sent_bytes["dictionary"]


# -- each side its own half ---------------------------------------------------------------------------------------


def storages(stage: Stage, part: str) -> set[int]:
    tensors: list[torch.Tensor] = list(getattr(stage, part).state_dict().values()) if hasattr(stage, part) else []
    tensors += [tensor for tensor in vars(getattr(stage, part, object)).values() if isinstance(tensor, torch.Tensor)]
    tensors += list(stage.state_tensors().values())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def test_the_two_sides_share_nothing(tiny: TinyConfig) -> None:
    config = configure(tiny, f"{PUBLISHED},r=8", {"pipeline.stages": 3})
    stages = [prepare(config, index)[0] for index in range(3)]
    assert [hasattr(stage, "sender") for stage in stages] == [True, True, False]
    assert [hasattr(stage, "receiver") for stage in stages] == [False, True, True]
    for upper, lower in itertools.pairwise(stages):
        assert isinstance(upper.sender, MaplEncoder)
        assert isinstance(lower.receiver, MaplDecoder)
        assert not storages(upper, "sender") & storages(lower, "receiver")
        assert not any(key.endswith(("master", "momentum")) for key in lower.state_tensors() if "above" in key)
        hidden, ids = torch.zeros(1, 4, 64), torch.zeros(1, 4, dtype=torch.int64)
        with pytest.raises(CodecError, match="before the projector"):
            lower.receiver.decode(hidden[..., :8], ids)  # it cannot draw the first one for itself


def test_an_interior_stage_has_one_table_for_both_sides(tiny: TinyConfig) -> None:
    stage, _ = prepare(configure(tiny, f"{PUBLISHED},r=8", {"pipeline.stages": 3}), 1)
    assert isinstance(stage.sender, MaplEncoder)
    assert isinstance(stage.receiver, MaplDecoder)
    assert stage.sender._tokens is stage.receiver._tokens is stage.tokens
    names = [name for name, _ in stage.trained if name.startswith("codec")]
    assert names == ["codec.stage_1.weight"]


def test_pairs_are_trained_state_of_the_stage_and_no_byte_of_a_message(tiny: TinyConfig, tmp_path: Path) -> None:
    config = configure(tiny, f"{PUBLISHED},r=8,pairs=97", {"run.steps": 2})
    stage, _ = prepare(config, 1)
    state = stage.state_tensors()
    assert state["weight/codec.stage_1.pairs"].shape == (97, 8)
    assert {name for name in state if name.endswith("/codec.stage_1.pairs")} == {
        f"{part}/codec.stage_1.pairs" for part in ("weight", "adamw.exp_avg", "adamw.exp_avg_sq")
    }
    with_pairs = run_reference(config, tmp_path / "with")
    without = run_reference(configure(tiny, f"{PUBLISHED},r=8", {"run.steps": 2}), tmp_path / "without")
    assert with_pairs.state_sha256 != without.state_sha256
    assert with_pairs.sent_bytes == without.sent_bytes


def test_every_node_draws_the_same_token_table_and_says_so(tiny: TinyConfig) -> None:
    config = configure(tiny, f"{PUBLISHED},r=8", {"pipeline.stages": 3})
    stages, digests = zip(*(prepare(config, index) for index in range(3)), strict=True)
    assert len(set(digests)) == 1
    tables = [stage.tokens.table for stage in stages if isinstance(stage.tokens, Anchors)]
    assert len(tables) == 3
    for table in tables[1:]:
        assert torch.equal(table, tables[0])
    architecture = stages[0].model.causal.config
    mine, theirs = (run_digest(config, architecture, table) for table in (stages[0].token_table_digest, "0" * 64))
    assert digests[0] == mine
    identity = NodeIdentity(run_id="r", configuration=mine, stage=0, stages=3, incarnation=1)
    peer = Greeting(
        run_id="r", configuration=theirs, stage=1, stages=3, incarnation=2, next_sequence=0, granted_bytes=0
    )
    with pytest.raises(
        RemoteProtocolError, match=r"digest of what every node generates: stage 0 expects \w+…, .* says 000000"
    ):
        check_greeting(peer, identity, GridPlace(1, 0))
    check_greeting(replace(peer, configuration=mine), identity, GridPlace(1, 0))


# -- formulas -----------------------------------------------------------------------------------------------------


def halves(**options: Any) -> tuple[MaplEncoder, MaplDecoder, Anchors, Anchors]:
    codec = MaplCodec(r=3, **options)
    stage = StageContext(seed=5, stage=0, width=12, vocab_size=7, dtype=torch.float64)
    table = torch.randn(7, 12, dtype=torch.float64)
    own = [codec.tokens(replace(stage, stage=index), table) for index in (0, 1)]
    boundary = BoundaryContext(seed=5, boundary=0, width=12, vocab_size=7, dtype=torch.float64)
    sender, receiver = codec.encoder(replace(boundary, tokens=own[0])), codec.decoder(replace(boundary, tokens=own[1]))
    assert isinstance(sender, MaplEncoder)
    assert isinstance(receiver, MaplDecoder)
    assert isinstance(own[0], Anchors)
    assert isinstance(own[1], Anchors)
    for anchors in own:
        for parameter in anchors.parameters():
            torch.nn.init.normal_(parameter)
    sender.use_table(sender.master.clone())
    receiver.use_table(sender.master.clone())
    return sender, receiver, own[0], own[1]


@pytest.mark.parametrize("pairs", [0, 5])
@pytest.mark.parametrize("anchors", ["factorized", "full"])
def test_encode_and_decode_are_the_papers(anchors: Any, pairs: int) -> None:
    sender, receiver, above, below = halves(anchors=anchors, pairs=pairs)
    hidden = torch.randn(2, 5, 12, dtype=torch.float64)
    ids = torch.randint(0, 7, (2, 5))
    a = sender.master
    z = sender.encode(hidden, ids)
    known_above, known_below = above(ids), below(ids)
    assert known_above is not None
    assert known_below is not None
    torch.testing.assert_close(z, (hidden - known_above) @ a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(receiver.decode(z, ids), z @ a.T + known_below, rtol=1e-12, atol=1e-12)


def test_both_halves_of_the_gradient_make_a_symmetric_one() -> None:
    """Aᵀ(X̃ᵀ dZ + Gᵀ Z) is symmetric without rounding; the sender's half alone is not."""
    sender, receiver, _, _ = halves()
    hidden, ids = torch.randn(4, 6, 12, dtype=torch.float64), torch.randint(0, 7, (4, 6))
    z = sender.encode(hidden, ids)
    leaf = z.detach().requires_grad_(True)
    receiver.decode(leaf, ids).sin().sum().backward()
    z.backward(leaf.grad)
    own, other = sender.shipped.grad, receiver.take_gradient()
    assert own is not None
    whole, alone = sender.master.T @ (own + other), sender.master.T @ own
    torch.testing.assert_close(whole, whole.T, rtol=1e-10, atol=1e-10)
    assert (alone - alone.T).abs().max() > 0.1


def test_the_reconstruction_error_is_what_the_projection_loses() -> None:
    sender, _, above, _ = halves()
    hidden, ids = torch.randn(3, 5, 12, dtype=torch.float64), torch.randint(0, 7, (3, 5))
    sender.encode(hidden, ids)
    known = above(ids)
    assert known is not None
    x = (hidden - known).reshape(-1, 12)
    lost = x - x @ sender.master @ sender.master.T
    assert sender.measures()["reconstruction_error"] == pytest.approx((lost.norm() / x.norm()).item(), rel=1e-6)
    assert sender.measures()["reconstruction_error"] == 0  # nothing since


# -- bad input ----------------------------------------------------------------------------------------------------

BAD = {
    "mapl:r=0": "r=0 has to be at least 1",
    "mapl:r=65": "r=65 is above the model's width 64; lower r",
    "mapl:r=64,projector=grassmann": "r=64 is the whole width, which no subspace can move in; lower r",
    "mapl:r=8,anchors=factorized,ar=65": "ar=65 is above the model's width 64; lower ar",
    "mapl:r=8,pairs=-1": "pairs=-1 has to be from 0 (none) to 16777216",
    "mapl:r=8,pairs=16777217": "pairs=16777217 has to be from 0 (none) to 16777216",
    "mapl:r=8,anchors=none,pairs=5": "pairs=5 has to be 0 beside anchors=none, which learn nothing",
    "mapl:r=8,every=0": "every=0 has to be at least 1",
    "mapl:r=8,table=-1": "table=-1 has to be 0 (no token table) or from 1e-30 to 1e30",
    "mapl:r=8,table=1e31": "table=1e+31 has to be 0",
    "mapl:r=8,lr=0": "lr=0 has to be above 0",
    "mapl:r=8,beta=1": "beta=1 has to be at least 0 and below 1",
    "mapl:r=8,anchors=half": "'anchors' cannot be 'half'",
    "mapl:r=8,delta=int4": "'delta' cannot be 'int4'",
    "mapl:rank=8": "has no option 'rank'",
    "mapl:r=8,gradient=all": "'gradient' cannot be 'all'",
    "identity:table=-2": "table=-2 has to be 0 (no token table)",
}


@pytest.mark.parametrize(("codec", "line"), BAD.items(), ids=BAD)
def test_bad_options_are_one_line(codec: str, line: str, tiny: TinyConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(configure(tiny, codec, {}), 0)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_beside_trained_embeddings_is_refused(tiny: TinyConfig, tmp_path: Path) -> None:
    pretrained = {"model.pretrained": True, "model.path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"table=1 adds a random table .* say table=0"):
        check_codec(configure(tiny, f"{PUBLISHED},r=8", pretrained))
    check_codec(configure(tiny, "mapl:r=8,table=0,anchors=factorized,every=1", pretrained))


@pytest.fixture
def ends(tiny: TinyConfig) -> tuple[Stage, Stage]:
    config = configure(tiny, f"{PUBLISHED},r=8", {})
    return prepare(config, 0)[0], prepare(config, 1)[0]


def messages(upper: Stage, steps: int) -> list[Message]:
    """Activations of the first microbatch of some steps; the projector is moved by hand between them."""
    port = upper.downstream_endpoint
    assert port is not None
    config, out = upper.config, []
    for step in range(steps):
        ids = torch.zeros(config.microbatch_size, config.data.sequence_length + 1, dtype=torch.int32).numpy()
        encoded = upper.forward(step, 0, ids, None)
        assert encoded is not None
        out.append(port.pack_activation(encoded, ids, step, 0, Kind.ACTIVATION))
        upper.sender.shipped.grad = torch.randn(64, 8)  # pyright: ignore
        upper.sender.learn(torch.zeros(64, 8), rate=0.02)
    return out


def refused(end: Stage, message: Message) -> RemoteProtocolError:
    assert end.upstream_endpoint
    before = {name: tensor.clone() for name, tensor in end.state_tensors().items()}
    with pytest.raises(RemoteProtocolError) as caught:
        end.upstream_endpoint.unpack_activation(message)
    after = end.state_tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return caught.value


def test_a_projector_message_that_does_not_follow_is_refused(ends: tuple[Stage, Stage]) -> None:
    upper, lower = ends
    first, second, third = messages(upper, 3)
    assert lower.upstream_endpoint
    table = lower.upstream_endpoint.table
    assert table is not None
    assert refused(lower, second).fault is Fault.OUT_OF_ORDER  # no snapshot yet
    assert refused(lower, replace(first, dictionary=b"")).fault is Fault.OUT_OF_ORDER  # coded with what is not here
    assert refused(lower, replace(first, dictionary=bytes(first.dictionary)[:-1])).fault is Fault.MALFORMED
    _, received = lower.upstream_endpoint.unpack_activation(first)
    assert received.table is not None
    assert upper.downstream_endpoint
    assert upper.downstream_endpoint.table
    assert torch.equal(table.state_tensors()["replica"], received.table)
    assert refused(lower, first).fault is Fault.OUT_OF_ORDER  # a replay
    assert refused(lower, third).fault is Fault.OUT_OF_ORDER  # a gap
    assert refused(lower, replace(second, kind=Kind.EVALUATION)).fault is Fault.UNEXPECTED
    header = {key: value for key, value in second.codec_header.items() if key != "projector"}
    assert "names no version of 'projector'" in str(refused(lower, replace(second, codec_header=header)))


def test_a_projector_that_changes_within_a_step_is_refused(ends: tuple[Stage, Stage]) -> None:
    """It would drop what the receiver had gathered of the gradient."""
    upper, lower = ends
    assert lower.upstream_endpoint
    first, second = messages(upper, 2)
    assert refused(lower, replace(first, microbatch=1)).fault is Fault.UNEXPECTED
    lower.upstream_endpoint.unpack_activation(first)
    assert refused(lower, replace(second, step=2)).fault is Fault.UNEXPECTED


def test_what_is_gathered_between_two_steps_of_the_projector_is_state(tiny: TinyConfig, tmp_path: Path) -> None:
    """Five steps at every=2: the last one's halves wait on both sides."""
    config = configure(tiny, "mapl:r=8,every=2,anchors=factorized,table=1", {"run.steps": 5})
    stages = [prepare(config, index)[0] for index in range(2)]
    assert not any("gathered" in name for stage in stages for name in stage.state_tensors())
    outcome = run_reference(config, tmp_path)
    assert outcome == run_in_memory(config, tmp_path / "swarm")
    [message] = messages(stages[0], 1)
    assert stages[1].upstream_endpoint
    ids_BS, received = stages[1].upstream_endpoint.unpack_activation(message)
    stages[1].forward(0, 0, ids_BS, received)
    stages[1].backward(0, None, None)
    names = [name for name in stages[1].state_tensors() if name.startswith("codec/receiver")]
    assert names == ["codec/receiver/gathered"]


def test_the_frozen_part_of_anchors_is_state_and_the_table_is_not(ends: tuple[Stage, Stage]) -> None:
    names = [name for name in ends[0].state_tensors() if name.startswith("codec/tokens")]
    assert names == ["codec/tokens/projection"]


def test_a_projector_that_cannot_be_stepped_says_which(ends: tuple[Stage, Stage]) -> None:
    upper, _ = ends
    messages(upper, 1)
    upper.sender.shipped.grad = torch.full((64, 8), torch.inf)  # pyright: ignore
    with pytest.raises(CodecError, match="the projector of boundary 0 cannot be stepped"):
        upper.sender.learn(upper.sender.take_gradient(None), rate=0.02)


def test_autocast_leaves_the_projector_alone(tiny: TinyConfig) -> None:
    stage, _ = prepare(configure(tiny, f"{PUBLISHED},r=8", {"compute.dtype": "bfloat16"}), 0)
    ids = torch.zeros(2, 33, dtype=torch.int32).numpy()
    out = stage.forward(0, 0, ids, None)
    assert out is not None
    assert not torch.equal(out.z_BTW, out.z_BTW.to(torch.bfloat16).to(torch.float32))


def test_a_projector_of_another_generation_is_refused(ends: tuple[Stage, Stage]) -> None:
    upper, lower = ends
    assert upper.downstream_endpoint
    assert upper.downstream_endpoint.table
    upper.downstream_endpoint.table = TableOwner(
        upper.downstream_endpoint.table.table,
        generation=1,
        seed=1,
        boundary=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    [message] = messages(upper, 1)
    assert refused(lower, message).fault is Fault.GENERATION


GRADIENTS = {
    "short": lambda message: replace(message, body=bytes(message.body)[:-1]),
    "another shape": lambda message: replace(message, codec_header={"shape": [8, 64]}),
    "another format": lambda message: replace(message, codec="int4"),
    "not finite": lambda message: replace(message, body=b"\x80\x7f" + bytes(message.body)[2:]),
}


@pytest.mark.parametrize("spoil", GRADIENTS.values(), ids=GRADIENTS)
def test_a_bad_projector_gradient_is_refused_by_name(spoil: Any, ends: tuple[Stage, Stage]) -> None:
    upper, lower = ends
    assert lower.upstream_endpoint
    assert lower.upstream_endpoint.table
    assert upper.downstream_endpoint
    assert upper.downstream_endpoint.table
    good = lower.upstream_endpoint.table.pack_gradient(torch.randn(64, 8), 3)
    upper.downstream_endpoint.table.unpack_gradient(good)
    with pytest.raises(RemoteProtocolError, match="projector gradient of step 3 at boundary 0"):
        upper.downstream_endpoint.table.unpack_gradient(spoil(good))


def test_what_rounding_takes_from_a_gradient_comes_with_the_next() -> None:
    table = MaplCodec(r=8, gradient="int4").table(64)
    place: dict[str, Any] = {"seed": 1, "boundary": 0, "dtype": torch.float32, "device": torch.device("cpu")}
    below, above = TableReplica(table, generation=0, **place), TableOwner(table, generation=0, **place)
    wanted, got = torch.zeros(64, 8), torch.zeros(64, 8)
    for step in range(50):
        gradient = torch.randn(64, 8)
        wanted += gradient
        got += above.unpack_gradient(below.pack_gradient(gradient, step))
    assert 0 < (wanted - got).abs().max() < 0.5  # one step's rounding, not fifty's
    torch.testing.assert_close(wanted - got, below.state_tensors()["error"], atol=1e-4, rtol=0)


def test_the_gradient_is_due_where_both_ends_expect_it() -> None:
    every = MaplCodec(r=8, every=3).table(64)
    assert [gradient_due(every, step) for step in range(7)] == [False, False, True, False, False, True, False]
    assert not any(gradient_due(MaplCodec(r=8, projector="fixed").table(64), step) for step in range(4))
    assert not any(gradient_due(MaplCodec(r=8, gradient="none").table(64), step) for step in range(4))
    assert not gradient_due(None, 0)
