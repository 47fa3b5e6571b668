"""Steps that overlap, with gradients that are applied one step late (`pipeline.delay = 1`).

Their bits are those of one process that does one step after the other with the same late weights, whatever overlaps;
that this is what a textbook's loop with late gradients computes is in test_float64_parity.py and test_mapl_float64.py,
the laws of the order itself are in test_schedules.py, and what a snapshot restores in test_checkpoint.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from thinpipe.node.boundary.learned_tables import TableReplica
from thinpipe.node.config import RunConfig
from thinpipe.node.optim import NonFiniteGradient
from thinpipe.node.stage import Stage
from thinpipe.node.stage_state import StateError
from thinpipe.node.weight_versions import WeightVersions, ahead
from thinpipe.protocol.messages import Kind
from thinpipe.protocol.schedule import Forward, Step, get_schedule
from thinpipe.protocol.step_orders import DelayedOrder, interleave_steps

from .cluster import run_cluster
from .conftest import TinyConfig
from .faults import Drain, Frame, Phase, kill
from .faults_reference import SETTINGS, STAGES, assert_equal
from .in_memory import Outcome, run_in_memory, run_reference
from .test_checkpoint import Run

LATE = {"pipeline.delay": 1}
BOOKS = "rvq:codes=16,delta=drift/4"

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"codec.codec": "bf16"},
    "a projector that moves every step": {"codec.codec": "mapl:r=8,anchors=full,every=1", "codec.forward": "int4"},
    "a projector that moves now and then": {"codec.codec": "mapl:r=8,anchors=full,every=3", "pipeline.schedule": "zb"},
    "a projector that rests": {"codec.codec": "mapl:r=8,projector=fixed", "pipeline.predict": "orthogonal"},
    "codebooks both ways": {"codec.codec": "mapl:r=8,every=2", "codec.forward": BOOKS, "codec.backward": BOOKS},
    "a trained bottleneck": {"codec.codec": "resbm:b=8", "pipeline.predict": "momentum"},
    "a model in a subspace": {"codec.codec": "ssn:k=8", "pipeline.schedule": "gpipe"},
    "predicted weights": {"codec.codec": "mapl:r=8,every=1", "pipeline.predict": "orthogonal"},
    "carried errors": {
        "codec.codec": "identity",
        "codec.forward": "int4:feedback=true",
        "codec.backward": "topk:k=8,feedback=true",
        "pipeline.schedule": "1f1b:rtt_ratio=1",
    },
    "bfloat16, recomputed": {
        "codec.codec": "bf16",
        "compute.dtype": "bfloat16",
        "compute.activation_checkpointing": True,
        "pipeline.schedule": "zb:rtt_ratio=0.5",
    },
    "one stage": {"pipeline.stages": 1},
}


def late(tiny: TinyConfig, **more: Any) -> RunConfig:
    return tiny({"pipeline.stages": 3, "run.steps": 7, "checkpoint.every": 0, **LATE, **more})


@pytest.mark.pairwise(2)
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_swarm_whose_steps_overlap_is_one_process(settings: dict[str, Any], tiny: TinyConfig, tmp_path: Path) -> None:
    config = late(tiny, **settings, **{"run.eval_every": 5})
    reference = run_reference(config, tmp_path / "reference")
    assert run_in_memory(config, tmp_path / "swarm") == reference
    assert len(set(reference.losses[0])) == 7
    if settings is KINDS["dense"]:
        without = run_reference(late(tiny, **settings, **{"run.eval_every": 5, "pipeline.delay": 0}), tmp_path / "now")
        assert without.losses[0][0] == reference.losses[0][0]
        assert without.losses[0][2] != reference.losses[0][2]  # the second step's gradient is not in the third's


def test_one_process_may_walk_any_order(tiny: TinyConfig) -> None:
    """That of steps that overlap, and one after the other."""
    settings = KINDS["a projector that moves now and then"] | {"pipeline.predict": "orthogonal"}
    config = late(tiny, **settings, **{"codec.forward": BOOKS})
    apart, overlapping = Run(config), Run(config)
    apart.train_from(0, 6)
    overlapping.overlap(0, 6)
    assert overlapping.digests() == apart.digests()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler provokes warnings in its own tracing and swallows them
def test_compiled_layers_find_the_weights_of_their_forward(tiny: TinyConfig) -> None:
    more = {"pipeline.stages": 2, "compute.compile": True, "pipeline.schedule": "1f1b:rtt_ratio=1"}
    config = late(tiny, **more, **{"codec.codec": "mapl:r=8,every=1"})
    apart, overlapping = Run(config), Run(config)
    apart.train_from(0, 4)
    overlapping.overlap(0, 4)
    assert overlapping.digests() == apart.digests()


class Spied(Run):
    """Says how many steps are begun and not ended, at most."""

    most = 0

    def do(self, *args: Any) -> float:
        done = super().do(*args)
        self.most = max(self.most, *(stage._begun - stage.completed for stage in self.stages))
        return done


def test_two_steps_are_under_way_at_once_and_no_more(tiny: TinyConfig) -> None:
    for schedule in ("gpipe", "1f1b", "zb"):
        run = Spied(late(tiny, **{"pipeline.schedule": schedule}))
        run.overlap(0, 4)
        assert run.most == 2


def test_a_snapshot_wants_the_pipeline_empty(tiny: TinyConfig) -> None:
    config = late(tiny)
    run = Run(config)
    for stage, step, action in interleave_steps(run.orders(0, 3)):
        run.do(stage, step, action)
        if stage == 0 and isinstance(action, Step) and step == 0:
            with pytest.raises(StateError, match="in the middle of step 1"):
                run.stages[0].snapshot()
            return
    raise AssertionError


def test_a_table_that_rests_is_that_of_all_versions(tiny: TinyConfig) -> None:
    config = late(tiny, **KINDS["a projector that rests"])
    apart, overlapping = Run(config), Run(config)
    apart.train_from(0, 3)
    overlapping.overlap(0, 3)
    assert overlapping.digests() == apart.digests()


@pytest.mark.parametrize("kind", ["codebooks both ways", "a projector that moves every step"])
def test_messages_of_two_steps_ahead_are_no_part_of_a_snapshot(kind: str, tiny: TinyConfig) -> None:
    """The stage above may be as far, behind the same drain, while this one still takes its optimizer step."""
    run = Run(late(tiny, **KINDS[kind], **{"pipeline.stages": 2, "pipeline.microbatches": 1}))
    run.train_from(0, 3)
    before = run.stages[1].snapshot()
    port = run.stages[1].upstream_endpoint
    assert port
    for step in (3, 4):
        run._together(0, step, Forward(microbatch=0), (0,))
        port.unpack_activation(run._take(1, Kind.ACTIVATION))
    newest = [end.version.step for end in port.ends.values() if isinstance(end, TableReplica) and end.version]
    assert max(newest) == 4
    now = run.stages[1].snapshot()
    assert now.dictionaries == before.dictionaries
    assert now.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in now.tensors.items())


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("kind", ["codebooks both ways", "a projector that moves now and then", "predicted weights"])
def test_steps_that_overlap_are_rewound_from_anywhere(kind: str, tiny: TinyConfig) -> None:
    config = late(tiny, **KINDS[kind])
    undisturbed, run = Run(config), Run(config)
    undisturbed.train_from(0, 3)
    snapshots = undisturbed.snapshots()
    undisturbed.train_from(3, 6)
    actions = len(list(interleave_steps(run.orders(3, 6))))
    for generation, count in enumerate(range(0, actions, 17), start=1):
        run.rollback(snapshots, generation)
        run.overlap(3, 6, count)
    run.rollback(snapshots, generation + 1)
    run.overlap(3, 6)
    assert run.digests() == undisturbed.digests()


# -- a small bug is seen ------------------------------------------------------------------------------------------


def backward_with_others(patch: pytest.MonkeyPatch) -> None:
    """A backward finds the weights of the next step in its parameters."""
    backward = Stage.backward

    def wrong(self: Stage, *args: Any) -> Any:
        assert self.versions
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.versions, "use", lambda step: WeightVersions.use(self.versions, step + 1))
            return backward(self, *args)

    patch.setattr(Stage, "backward", wrong)


def forward_too_early(patch: pytest.MonkeyPatch) -> None:
    """Forwards take the newest weights that there are when they run."""
    forward = Stage.forward

    def wrong(self: Stage, *args: Any) -> Any:
        assert self.versions
        newest = max(self.versions._of_step)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.versions, "use", lambda _: WeightVersions.use(self.versions, newest))
            return forward(self, *args)

    patch.setattr(Stage, "forward", wrong)


def table_too_early(patch: pytest.MonkeyPatch) -> None:
    """The projector that is published is the newest."""
    patch.setattr(WeightVersions, "table", lambda self, _: self._tables[max(self._tables)])


@pytest.mark.pairwise(1)
@pytest.mark.parametrize("bug", [backward_with_others, forward_too_early, table_too_early])
def test_other_versions_are_seen(
    bug: Callable[[pytest.MonkeyPatch], None], tiny: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = late(tiny, **KINDS["a projector that moves every step"])
    expected = run_reference(config, tmp_path / "reference")
    bug(monkeypatch)
    assert run_reference(config, tmp_path / "wrong").losses != expected.losses


def test_a_refused_gradient_leaves_the_masters_as_they_are(tiny: TinyConfig) -> None:
    run = Run(late(tiny, **{"pipeline.stages": 1}))
    run.act(0)
    stage = run.stages[0]
    before = stage.snapshot()
    actions = run.actions()
    run.act(1, actions - 1)
    next(iter(stage.model.parameters())).grad.fill_(torch.inf)  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(NonFiniteGradient):
        stage.finish(1)
    masters = dict(stage.trained)
    assert all(torch.equal(masters[name], before.tensors[f"weight/{name}"]) for name in masters)


# -- prediction ---------------------------------------------------------------------------------------------------


def test_where_a_weight_is_expected() -> None:
    before, after, momentum = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0]), torch.tensor([0.0, 4.0])
    straight, along = before.clone(), before.clone()
    ahead(straight, after, None)
    assert straight.tolist() == [2.0, 0.0]
    ahead(along, after, momentum)
    assert along[0] == 1.5
    assert torch.isclose(1.0 - along[1], torch.linalg.vector_norm(after - before))
    still = before.clone()
    ahead(still, after, torch.zeros(2))
    assert torch.equal(still, after)


# -- kills, ends, checkpoints -------------------------------------------------------------------------------------

DISTURBED = {**SETTINGS, **LATE, "run.steps": 9, "checkpoint.every": 4, "run.eval_every": 0}
# While the steps before and after overlap (steps 4 to 7 do), at a drain, and where no checkpoint is yet.
KILLS = [
    kill(stage, step, phase)
    for stage, step, phase in itertools.product(
        range(STAGES), (2, 5, 6, 7), (Phase.MID_BACKWARD, Phase.BEFORE_COMMIT, Phase.BEFORE_SEND)
    )
    if stage < STAGES - 1 or phase is not Phase.BEFORE_SEND
]


@pytest.fixture(scope="module", params=["none", "orthogonal"])
def undisturbed(
    request: pytest.FixtureRequest, tiny: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Outcome]:
    config = tiny(DISTURBED | {"pipeline.predict": request.param})
    return config, run_reference(config, tmp_path_factory.mktemp("reference"))


@pytest.mark.pairwise(1, slow=7)
@pytest.mark.parametrize("undisturbed", ["none"], indirect=True)
@pytest.mark.parametrize("fault", KILLS, ids=str)
def test_a_killed_stage_of_overlapping_steps(
    fault: Any, undisturbed: tuple[RunConfig, Outcome], tmp_path: Path
) -> None:
    config, reference = undisturbed
    ended = run_cluster(config, tmp_path / "swarm", [fault])
    assert_equal(ended, reference)
    assert ended.happened == [fault]
    assert ended.generations == 2


@pytest.mark.pairwise(1, slow=4)
@pytest.mark.parametrize("undisturbed", ["orthogonal"], indirect=True)
@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("frame", [60, 150, 260])
def test_a_run_that_is_ended_from_outside_goes_on_to_the_same_bits(
    stage: int, frame: int, undisturbed: tuple[RunConfig, Outcome], tmp_path: Path
) -> None:
    """It ends after the newest step that is begun, whichever steps overlap; nothing waits for what does not come."""
    config, reference = undisturbed
    first = run_cluster(config, tmp_path / "swarm", [Drain(at=Frame(number=frame), stage=stage)])
    done = [len(of_stage) for of_stage in first.losses]
    assert 0 < done[0] < 9
    assert len(set(done)) == 1
    assert [written[-1] for written in first.checkpoints] == done
    ended = run_cluster(config, tmp_path / "swarm", [], resume=True)
    assert_equal(ended, reference)


def test_nodes_that_stop_for_checkpoints_at_other_steps_refuse_each_other(tiny: TinyConfig) -> None:
    """One would wait for the pipeline to run empty, and the other for it to go on. Without overlap it is their own."""
    every = [late(tiny, **{"checkpoint.every": every}) for every in (2, 3)]
    assert every[0].digest() != every[1].digest()
    assert every[0].of_any_length().digest() == every[1].of_any_length().digest()  # a checkpoint may be gone on from
    apart = [late(tiny, **{"checkpoint.every": every, "pipeline.delay": 0}) for every in (2, 3)]
    assert apart[0].digest() == apart[1].digest()


def test_the_pipeline_runs_empty_where_something_wants_it_to(tiny: TinyConfig) -> None:
    config = late(tiny, **{"run.steps": 20, "run.eval_every": 6, "checkpoint.every": 4})
    assert list(itertools.accumulate(range(6), lambda done, _: config.next_drain(done), initial=0)) == [
        0, 4, 6, 8, 12, 16, 18
    ]  # fmt: skip
    assert config.next_drain(18) == config.next_drain(19) == 20


def test_an_order_that_is_cut_short_ends_with_what_is_begun() -> None:
    order = DelayedOrder(get_schedule("1f1b"), stage=0, stages=3, microbatches=4, first=5, end=50)
    seen = []
    for step, action in order:
        if step == 8 and action == Forward(microbatch=0):
            order.end = 8
            continue
        seen.append((step, action))
    assert seen == list(DelayedOrder(get_schedule("1f1b"), stage=0, stages=3, microbatches=4, first=5, end=8))
