"""A run that goes on from a checkpoint is the run that never stopped, bit for bit; and only whole checkpoints are read.

The first part drives stages through steps, breaks them off anywhere, and compares digests with an undisturbed run. The
second tears, spoils and swaps what is on disk, and lets the writing process die at each of its system calls.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinpipe.cli import app
from thinpipe.node.checkpoints import store as checkpoint_module
from thinpipe.node.checkpoints.background_writer import CheckpointWriter
from thinpipe.node.checkpoints.listing import other_format
from thinpipe.node.checkpoints.manifest import (
    MANIFEST,
    MANIFEST_BYTES_MAX,
    CheckpointError,
    Fingerprint,
    ForeignCheckpoint,
    OtherFormat,
    read_manifest,
)
from thinpipe.node.checkpoints.restore_points import RestorePoints
from thinpipe.node.checkpoints.store import STATE, CheckpointStore
from thinpipe.node.config import ConfigError, RunConfig
from thinpipe.node.config_file import dump_config, parse_config
from thinpipe.node.lane_in_process import LaneInProcess
from thinpipe.node.preparation import prepare_corpus, resolve_architecture
from thinpipe.node.stage_state import StageSnapshot, StateError
from thinpipe.protocol.errors import LocalProtocolError
from thinpipe.protocol.messages import Kind, Message
from thinpipe.protocol.schedule import Action, Forward, get_schedule, interleave
from thinpipe.protocol.step_orders import DelayedOrder, interleave_steps
from torch import Tensor
from typer.testing import CliRunner

from .conftest import TinyConfig
from .manifests import as_format_1, resealed

PUBLISHED = "mapl:anchors=factorized,context=0,table=1,every=1"  # everything switched on
BOOKS = "rvq:codes=16,delta=drift/4"
STEPS = 8
STAGES = 3
LATE = {"pipeline.delay": 1}
VARIANTS: dict[str, str | tuple[str, dict[str, Any]]] = {  # of a tuple: with other settings
    "mapl": f"{PUBLISHED},r=8",
    "every third step": "mapl:r=8,every=3,anchors=factorized,table=1",
    "every third step, sender's half": "mapl:r=8,every=3,gradient=none,anchors=full,table=1",
    "sender's half": f"{PUBLISHED},r=8,gradient=none",
    "fixed": f"{PUBLISHED},r=8,projector=fixed",
    "grassmann, int4 gradient, bf16 changes": f"{PUBLISHED},r=8,projector=grassmann,gradient=int4,delta=bf16",
    "a context": "mapl:r=8,anchors=none,context=3,ce=6,ch=10",
    "a trained bottleneck": "resbm:b=8,anchors=full,table=1",
    "a model in a subspace": "ssn:k=8",
    "neither anchors nor table": "mapl:r=8,anchors=none,table=0,every=1",
    "codebooks both ways": f"{PUBLISHED},r=8 {BOOKS} {BOOKS}",
    "a codebook for gradients": f"identity bf16 {BOOKS}",
    "axes and bits that follow": "mapl:r=auto,bits=20,every=3 transform:bits=20,every=3 transform:bits=20,every=2",
    "carried errors": "identity int4:hadamard=true,feedback=true topk:k=8,feedback=true",
    "identity": "identity",
    "identity with the token table": "identity:table=1",
    "late gradients": (f"{PUBLISHED},r=8", LATE),
    "late gradients every third step, codebooks": (f"mapl:r=8,every=3,anchors=full {BOOKS} {BOOKS}", LATE),
    "late gradients, predicted": ("mapl:r=8,every=3,anchors=full", {**LATE, "pipeline.predict": "orthogonal"}),
    "late gradients, a model in a subspace": ("ssn:k=8", {**LATE, "pipeline.predict": "momentum"}),
}


def configure(tiny: TinyConfig, codec: str = f"{PUBLISHED},r=8", **more: Any) -> RunConfig:
    """`codec`, and if they are not int4 and int3 the formats of activations and gradients behind it."""
    spec, *formats = codec.split()
    formats = formats or ["int4", "int3"] * spec.startswith("mapl")
    codecs = dict(zip(("codec.codec", "codec.forward", "codec.backward"), [spec, *formats], strict=False))
    return tiny({"pipeline.stages": STAGES, "run.steps": STEPS, "pipeline.microbatches": 2, **codecs, **more})


# -- a run that can be stopped anywhere ----------------------------------------------------------------------------


class Run(LaneInProcess):
    """One process that takes a step, or only its first actions, when told to."""

    def __init__(self, config: RunConfig) -> None:
        torch.set_num_threads(1)
        super().__init__(config, resolve_architecture(config), prepare_corpus(config), 0, None)

    def act(self, step: int, actions: int | None = None) -> float:
        """The step's loss, or nan after the first `actions` of it."""
        schedule = get_schedule(self.config.pipeline.schedule)
        loss = float("nan")
        order = list(interleave(schedule, len(self.stages), self.config.pipeline.microbatches))
        for index, action in order[:actions]:
            loss = self.do(index, step, action)
        return loss if actions is None else float("nan")

    def do(self, index: int, step: int, action: Action) -> float:
        """One action of one stage; the loss of a step that ends with it."""
        if self._computes(index, action, step):
            return float("nan")
        self.stages[index].gather(step, self._table_gradient(index, step))
        return self.stages[index].finish(step)[0]

    def orders(self, first: int, end: int) -> list[DelayedOrder]:
        """Of all stages, over steps that overlap."""
        shape = {"stages": len(self.stages), "microbatches": self.config.pipeline.microbatches}
        schedule = get_schedule(self.config.pipeline.schedule)
        return [DelayedOrder(schedule, stage=s, **shape, first=first, end=end) for s in range(len(self.stages))]

    def overlap(self, first: int, end: int, actions: int | None = None) -> None:
        """Those steps, overlapping, or only the first `actions` of them."""
        for index, step, action in itertools.islice(interleave_steps(self.orders(first, end)), actions):
            self.do(index, step, action)

    def actions(self) -> int:
        schedule = get_schedule(self.config.pipeline.schedule)
        return len(list(interleave(schedule, len(self.stages), self.config.pipeline.microbatches)))

    def train_from(self, first: int, steps: int = STEPS) -> list[float]:
        return [self.act(step) for step in range(first, steps)]

    def snapshots(self) -> list[StageSnapshot]:
        return [stage.snapshot() for stage in self.stages]

    def rollback(self, snapshots: list[StageSnapshot], generation: int) -> None:
        self._mail.clear()
        for stage, snapshot in zip(self.stages, snapshots, strict=True):
            stage.restore(snapshot)
            stage.set_generation(generation)

    def digests(self) -> list[str]:
        return [stage.state_sha256() for stage in self.stages]


@dataclass(frozen=True, slots=True)
class Undisturbed:
    losses: list[float]
    digests: list[list[str]]  # after so many steps
    snapshots: list[list[StageSnapshot]]


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def variant(request: pytest.FixtureRequest, tiny: TinyConfig) -> tuple[RunConfig, Undisturbed]:
    codec, more = request.param if isinstance(request.param, tuple) else (request.param, {})
    config = configure(tiny, codec, **more)
    run = Run(config)
    digests, snapshots, losses = [run.digests()], [run.snapshots()], []
    for step in range(STEPS):
        losses.append(run.act(step))
        digests.append(run.digests())
        snapshots.append(run.snapshots())
    return config, Undisturbed(losses, digests, snapshots)


def same(a: StageSnapshot, b: StageSnapshot) -> bool:
    return (
        (a.completed, a.tensors.keys()) == (b.completed, b.tensors.keys())
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        and a.dictionaries == b.dictionaries
    )


@pytest.mark.pairwise(6, slow=18)
@pytest.mark.parametrize("completed", [0, 1, 3, 4])
def test_a_fresh_run_goes_on_from_a_snapshot(completed: int, variant: tuple[RunConfig, Undisturbed]) -> None:
    config, undisturbed = variant
    run = Run(config)
    for stage in run.stages:
        for frozen in stage._state._frozen_tokens().values():
            frozen.zero_()  # another machine draws others
    run.rollback(undisturbed.snapshots[completed], generation=0)
    assert run.digests() == undisturbed.digests[completed]
    for ours, theirs in zip(run.snapshots(), undisturbed.snapshots[completed], strict=True):
        assert same(ours, theirs)
    assert run.train_from(completed) == undisturbed.losses[completed:]
    assert run.digests() == undisturbed.digests[STEPS]


@pytest.mark.pairwise(2, slow=6)
def test_a_run_is_rewound_from_anywhere(variant: tuple[RunConfig, Undisturbed]) -> None:
    """It breaks off after each number of actions of a step, is rolled back under a new generation, and ends the
    same."""
    config, undisturbed = variant
    run = Run(config)
    run.train_from(0, 5)
    for generation, actions in enumerate(range(0, run.actions() + 1, 3), start=1):
        run.act(run.stages[0].completed, actions)
        completed = generation % 6
        run.rollback(undisturbed.snapshots[completed], generation)
        assert [snapshot.completed for snapshot in run.snapshots()] == [completed] * STAGES
        assert run.digests() == undisturbed.digests[completed]
        assert run.stages[0].measures().get("angle_moved_rad", 0) == 0
        assert run.act(completed) == undisturbed.losses[completed]
        assert run.digests() == undisturbed.digests[completed + 1]
    assert run.train_from(completed + 1) == undisturbed.losses[completed + 1 :]
    assert run.digests() == undisturbed.digests[STEPS]
    for above, below in zip(run.snapshots(), run.snapshots()[1:], strict=False):
        ends = above.dictionaries.get("table_below"), below.dictionaries.get("table_above")
        assert ends[0] == ends[1]
        assert ends[0] is None or ends[0]["version"][0] == generation


def test_a_run_that_splits_its_backward_is_rewound_from_anywhere(tiny: TinyConfig) -> None:
    """And ends, and is between, as one that does not split it."""
    settings = {"pipeline.microbatches": 4, "run.steps": 2}
    whole = Run(configure(tiny, **settings))
    run = Run(configure(tiny, **settings, **{"pipeline.schedule": "zb"}))
    begin, expected = run.snapshots(), [(whole.act(step), whole.digests()) for step in range(2)]
    for generation, actions in enumerate(range(1, run.actions(), 5), start=1):
        run.act(0, actions)
        with pytest.raises(StateError, match="in the middle of step"):
            run.snapshots()
        run.rollback(begin, generation)
        assert not any(stage._owed for stage in run.stages)
    assert [(run.act(step), run.digests()) for step in range(2)] == expected


@pytest.mark.slow
def test_another_process_goes_on_from_the_disk(tiny: TinyConfig, tmp_path: Path) -> None:
    config = configure(tiny, "mapl:r=8,every=3,anchors=factorized,table=1")
    run = Run(config)
    run.train_from(0, 4)
    for index, snapshot in enumerate(run.snapshots()):
        store_of(tmp_path, stage=index).write(snapshot, generation=0, written_s=0)
    losses = run.train_from(4)
    (tmp_path / "run.toml").write_text(dump_config(config))
    program = (
        "import sys, json; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from thinpipe.node.config_file import load_config\n"
        "from tests.test_checkpoint import Run, store_of, STAGES\n"
        "out = Path(sys.argv[1]); run = Run(load_config(out / 'run.toml'))\n"
        "run.rollback([store_of(out, stage=index).load(4) for index in range(STAGES)], generation=1)\n"
        "print(json.dumps([run.train_from(4), run.digests()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [losses, run.digests()]


def test_the_next_steps_messages_are_no_part_of_a_snapshot(tiny: TinyConfig) -> None:
    """Another thread unpacks ahead: the replica may be a step further than what is computed with it."""
    run = Run(configure(tiny))
    run.train_from(0, 3)
    before, digest = run.stages[1].snapshot(), run.stages[1].state_sha256()
    run._together(0, 3, Forward(microbatch=0), (0,))
    port = run.stages[1].upstream_endpoint
    assert port is not None
    assert port.table is not None
    port.unpack_activation(run._take(1, Kind.ACTIVATION))
    assert port.table.dictionary_state()["version"] == [0, 3, 0, 0]
    assert same(run.stages[1].snapshot(), before)
    assert run.stages[1].state_sha256() == digest


def owed(run: Run, gradient: Tensor) -> Callable[[], Message]:
    """A projector's gradient that was taken and is not packed yet."""
    port = run.stages[1].upstream_endpoint
    assert port is not None
    table = port.table
    assert table is not None
    return port.pack_queue.submit(lambda: table.pack_gradient(gradient, 2))


@pytest.mark.parametrize("packed_by", ["the codec's thread", "the snapshot"])
def test_a_gradient_that_is_not_packed_yet_is_part_of_a_snapshot(packed_by: str, tiny: TinyConfig) -> None:
    """What rounding takes from it is the state; the message has the same bytes whoever packs it."""
    run, other = Run(configure(tiny)), Run(configure(tiny))
    run.train_from(0, 2)
    other.train_from(0, 2)
    gradient = torch.randn(64, 8)
    message, expected = owed(run, gradient), owed(other, gradient)()
    if packed_by == "the snapshot":
        run.stages[1].snapshot()
    assert message() == expected
    assert message() == expected
    assert same(run.stages[1].snapshot(), other.stages[1].snapshot())


def test_a_gradient_of_a_step_that_was_broken_off_is_forgotten(tiny: TinyConfig) -> None:
    run = Run(configure(tiny))
    run.train_from(0, 2)
    stage, before = run.stages[1], run.stages[1].snapshot()
    for packed in (False, True):
        message = owed(run, torch.randn(64, 8))
        if packed:
            stage.snapshot()
        stage.restore(before)
        assert same(stage.snapshot(), before)
        if not packed:
            with pytest.raises(RuntimeError, match="broken off"):
                message()
    gradient = torch.randn(64, 8)
    packed_again = owed(run, gradient)()
    stage.restore(before)
    assert owed(run, gradient)() == packed_again


def test_a_receiver_that_forgets_goes_back_to_what_was_restored(tiny: TinyConfig) -> None:
    run = Run(configure(tiny))
    run.train_from(0, 2)
    snapshot = run.stages[1].snapshot()
    run.act(2)
    run.stages[1].restore(snapshot)
    run.stages[1].set_generation(1)
    run.stages[0].set_generation(1)
    table = run.stages[1].upstream_endpoint.table  # pyright: ignore
    assert table is not None
    named = table.dictionary_state()
    table.forget()
    assert table.dictionary_state() == named
    assert named["version"] == [1, 1, 0, 0]


def test_a_snapshot_is_a_copy_and_has_its_time(tiny: TinyConfig) -> None:
    run = Run(configure(tiny))
    run.act(0)
    before = run.snapshots()
    kept = [{name: tensor.clone() for name, tensor in snapshot.tensors.items()} for snapshot in before]
    for actions in range(1, run.actions(), 4):
        run.rollback(before, 0)
        run.act(1, actions)
        with pytest.raises(StateError, match="stage 0: a snapshot in the middle of step 1; take it after the step's"):
            run.stages[0].snapshot()
    run.rollback(before, 0)
    run.act(1)
    for snapshot, tensors in zip(before, kept, strict=True):
        assert all(torch.equal(snapshot.tensors[name], tensors[name]) for name in tensors)
        assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in snapshot.tensors.values())


def test_generations_only_rise(tiny: TinyConfig) -> None:
    run = Run(configure(tiny))
    run.act(0)
    for stage in run.stages:
        digest = stage.state_sha256()
        stage.set_generation(3)
        stage.set_generation(3)
        assert stage.state_sha256() == digest
        for bad in (2, -1, 2**64):
            with pytest.raises(
                LocalProtocolError, match=f"table 'projector' is in generation 3 and cannot go to {bad}"
            ):
                stage.set_generation(bad)


def test_a_restored_state_goes_on_in_the_later_generation(tiny: TinyConfig) -> None:
    """Whichever comes first, the state or the word of a new generation."""
    run = Run(configure(tiny))
    run.train_from(0, 2)
    before = run.snapshots()
    for stage, snapshot in zip(run.stages, before, strict=True):
        stage.set_generation(3)
        stage.restore(snapshot)
    names = [held for snapshot in run.snapshots() for held in snapshot.dictionaries.values()]
    assert [held["version"] for held in names] == [[3, 1, 0, 0]] * 2 * (STAGES - 1)
    fresh = Run(configure(tiny))
    for stage, snapshot in zip(fresh.stages, run.snapshots(), strict=True):
        stage.restore(snapshot)
        assert same(stage.snapshot(), run.stages[stage.index].snapshot())
    assert fresh.act(2) == run.act(2)


# -- a state that does not fit -------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, _: tensors.pop(name)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    return lambda tensors, _: tensors.update({name: change(tensors[name])})


def in_table(**fields: Any) -> Callable[..., None]:
    return lambda _, dictionaries: dictionaries["table_above"].update(fields)


NORM = "weight/codec.stage_1.weight"
UNFIT = {
    "a weight is missing": (without(NORM), rf"lacks '{NORM}', wanted float32 \(512, 8\)"),
    "momentum is missing": (without("codec/sender/momentum"), r"lacks 'codec/sender/momentum'"),
    "gathered is missing": (without("codec/sender/gathered"), r"lacks 'codec/sender/gathered'"),
    "error is missing": (without("codec/table_above/error"), r"lacks 'codec/table_above/error'"),
    "a replica is missing": (without("codec/table_above/replica"), r"lacks 'codec/table_above/replica'"),
    "one too many": (
        lambda tensors, _: tensors.update(x=torch.zeros(2)),
        r"has 'x' \(float32 \(2,\)\), wanted no such",
    ),
    "another shape": (replaced(NORM, lambda t: t[:-1].clone()), rf"'{NORM}' is float32 \(511, 8\), wanted"),
    "another dtype": (replaced(NORM, torch.Tensor.double), rf"'{NORM}' is float64 \(512, 8\), wanted float32"),
    "an optimizer's shape": (
        replaced(f"adamw.exp_avg/{NORM[7:]}", lambda t: t.mT.contiguous()),
        r"is float32 \(8, 512\), wanted float32 \(512, 8\)",
    ),
    "a table of other numbers": (
        replaced("codec/table_above/replica", lambda t: t + 1),
        r"dictionary 'projector' does not match its digest",
    ),
    "another digest": (in_table(digest="00" * 16), r"does not match its digest"),
    "no digest": (in_table(digest="hex"), r"is damaged"),
    "no version": (in_table(version=None), r"has 'codec/table_above/replica' \(float32 \(64, 8\)\), wanted no such"),
    "a version of three": (in_table(version=[0, 3, 0]), r"is damaged"),
    "the tensor's version": (
        replaced("codec/table_above/version", lambda t: t + 1),
        r"is as of \[4, 1, 1\] and says \[3, 0, 0\]",
    ),
    "no dictionary": (lambda _, d: d.pop("table_above"), r"has the dictionaries \['table_below'\], wanted"),
    "a dictionary of nothing": (lambda _, d: d.update(table_above={}), r"is damaged"),
    "a dictionary that is none": (lambda _, d: d.update(table_above=3), r"is no table"),
}


@pytest.fixture(scope="module")
def trained(tiny: TinyConfig) -> tuple[Run, list[StageSnapshot]]:
    run = Run(configure(tiny, "mapl:r=8,every=3,anchors=factorized,table=1"))
    run.train_from(0, 5)
    snapshots = run.snapshots()
    run.train_from(5, 7)
    return run, snapshots


@pytest.mark.parametrize(("spoil", "line"), UNFIT.values(), ids=UNFIT)
def test_a_state_that_does_not_fit_changes_nothing(
    spoil: Callable[..., None], line: str, trained: tuple[Run, list[StageSnapshot]]
) -> None:
    run, snapshots = trained
    stage, good = run.stages[1], snapshots[1]
    tensors, dictionaries = dict(good.tensors), {name: dict(held) for name, held in good.dictionaries.items()}
    spoil(tensors, dictionaries)
    before = stage.snapshot()
    with pytest.raises(StateError, match=line) as caught:
        stage.restore(replace(good, tensors=tensors, dictionaries=dictionaries))
    assert "stage 1" in str(caught.value)
    assert "restore a" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(stage.snapshot(), before)


def test_an_error_that_cannot_have_been_carried_changes_nothing(tiny: TinyConfig) -> None:
    codec = VARIANTS["carried errors"]
    assert isinstance(codec, str)
    run = Run(configure(tiny, codec))
    run.train_from(0, 1)
    stage = run.stages[1]
    before = stage.snapshot()
    for name in ("activation_memory_below", "gradient_memory_above"):
        spoilt = {**before.tensors, f"codec/{name}/error": torch.full_like(before.tensors[f"codec/{name}/error"], nan)}
        with pytest.raises(StateError, match=r"stage 1: .* not finite; restore an older checkpoint"):
            stage.restore(replace(before, tensors=spoilt))
        assert same(stage.snapshot(), before)


def test_another_stages_state_is_refused(trained: tuple[Run, list[StageSnapshot]]) -> None:
    run, snapshots = trained
    for stage, snapshot in zip(run.stages, [*snapshots[1:], snapshots[0]], strict=True):
        with pytest.raises(StateError, match="restore a checkpoint of the same stage"):
            stage.restore(snapshot)
    with pytest.raises(StateError, match="after -1 steps"):
        run.stages[0].restore(replace(snapshots[0], completed=-1))


# -- on disk -------------------------------------------------------------------------------------------------------

FINGERPRINT = Fingerprint(run="run", stages=STAGES, configuration="c0ffee")


def store_of(directory: Path, *, stage: int = 1, **options: Any) -> CheckpointStore:
    return CheckpointStore(directory, stage=stage, fingerprint=options.pop("fingerprint", FINGERPRINT), **options)


def small(completed: int) -> StageSnapshot:
    version = [0, completed - 1, 0, 0] if completed else None
    tensors = {"weight/a": torch.arange(300.0) + completed, "b": torch.full((2, 3), completed, dtype=torch.float64)}
    digest = "ab" * 16 if completed else ""
    return StageSnapshot(
        completed=completed, tensors=tensors, dictionaries={"table_above": {"version": version, "digest": digest}}
    )


def write(store: CheckpointStore, *numbers: int, generation: int = 0) -> None:
    for completed in numbers:
        store.write(small(completed), generation=generation, written_s=1.7e9)


def intact(store: CheckpointStore) -> list[int]:
    """All that is listed, each read in full."""
    for completed in store.steps():
        store.verify(completed)
        loaded = store.load(completed)
        assert same(loaded, small(completed))
    return store.steps()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a" / "b")
    assert store.steps() == store.numbers() == store.newest_intact(3, report=pytest.fail) == []
    size = store.write(small(0), generation=0, written_s=1.7e9)
    write(store, 20, generation=4)
    assert intact(store) == [0, 20]
    assert store.newest_intact(3, report=pytest.fail) == [20, 0]
    assert store.newest_intact(1, report=pytest.fail) == [20]
    assert (store.manifest(0).generation, store.manifest(20).generation) == (0, 4)
    manifest = store.verify(20)
    assert size == manifest.file_bytes == (store.path(20) / STATE).stat().st_size
    assert manifest.torch == torch.__version__
    assert "position in the data" in manifest.notes
    assert sorted(path.name for path in store.path(20).iterdir()) == [MANIFEST, STATE]
    assert store.path(20) == tmp_path / "a" / "b" / "stage-1" / "step-00000020"


def test_what_a_copy_may_need_is_not_pruned(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    write(store, 10, 20, 30, 40)
    assert store.steps() == [20, 30, 40]
    store.floor = 30
    write(store, 50, 60)
    assert store.steps() == [30, 40, 50, 60]
    assert store.newest_intact(2, report=pytest.fail) == [60, 50, 40, 30]
    write(store, *range(70, 300, 10))
    assert store.steps() == list(range(180, 300, 10))  # one that has fallen so far behind is of no use
    store.floor = 0
    write(store, 300)
    assert store.steps() == [280, 290, 300]


def test_a_real_state_survives_the_disk(trained: tuple[Run, list[StageSnapshot]], tmp_path: Path) -> None:
    for index, snapshot in enumerate(trained[1]):
        store = store_of(tmp_path, stage=index)
        store.write(snapshot, generation=0, written_s=0)
        assert same(store.load(5), snapshot)


def test_it_hashes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    digest = checkpoint_module.hashlib.file_digest
    monkeypatch.setattr(
        checkpoint_module.hashlib, "file_digest", lambda file, name: (hashed.append(file.name), digest(file, name))[1]
    )
    store = store_of(tmp_path)
    write(store, 1, 2)
    assert len(hashed) == 2
    assert store.newest_intact(2, report=pytest.fail) == [2, 1]
    store.load(2)
    assert len(hashed) == 4
    store_of(tmp_path).load(2)
    assert len(hashed) == 5
    flip(store.path(2) / STATE, 0.9)
    os.utime(store.path(2) / STATE, (1, 1))
    with pytest.raises(CheckpointError, match="is damaged: it has the digest"):
        store.load(2)


def test_the_newest_stay(tmp_path: Path) -> None:
    store = store_of(tmp_path, keep=3)
    write(store, 10, 20, 30, 40, 50)
    assert intact(store) == [30, 40, 50]
    write(store, 20)  # after a rollback: what is later is not newer, and must not push it out
    assert intact(store) == [20, 30, 40, 50]
    write(store, 30, generation=1)
    assert intact(store) == [20, 30, 40, 50]
    assert store.manifest(30).generation == 1
    (store.path(20) / STATE).write_bytes(b"")
    write(store, 60)
    assert intact(store) == [40, 50, 60]
    assert store.numbers() == [40, 50, 60]  # the damaged one is gone too
    assert [path.name for path in store.directory.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(ValueError, match="keep = 2"):
        store_of(tmp_path, keep=2)


def test_another_runs_checkpoint_is_neither_replaced_nor_pruned(tmp_path: Path) -> None:
    other = store_of(tmp_path, fingerprint=replace(FINGERPRINT, run="other"))
    write(other, 10)
    store = store_of(tmp_path)
    with pytest.raises(ForeignCheckpoint, match="step-00000010 is of another run: its run is 'other', here 'run'"):
        write(store, 10)
    write(store, 20, 30, 40, 50)
    assert intact(store) == [30, 40, 50]
    assert intact(other) == [10]


# -- torn ----------------------------------------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[min(int(place * len(raw)), len(raw) - 1)] ^= 0x10
    path.write_bytes(raw)


def cut(path: Path, place: float) -> None:
    os.truncate(path, int(place * path.stat().st_size))


def forge_version(path: Path) -> None:
    """Another format, and the digest of ours."""
    tree = json.loads(path.read_bytes()) | {"format": 9}
    path.write_bytes((json.dumps(tree, indent=1, sort_keys=True) + "\n").encode())


PLACES = (0.0, 0.1, 0.5, 0.9, 1.0)
TEARS: dict[str, Callable[[Path], object]] = {
    **{
        f"flip {name} at {place}": lambda at, n=name, p=place: flip(at / n, p)
        for name in (STATE, MANIFEST)
        for place in PLACES
    },
    **{
        f"cut {name} at {place}": lambda at, n=name, p=place: cut(at / n, p)
        for name in (STATE, MANIFEST)
        for place in PLACES[:-1]
    },
    **{f"no {name}": lambda at, n=name: (at / n).unlink() for name in (STATE, MANIFEST)},
    **{
        f"{name} is a directory": lambda at, n=name: ((at / n).unlink(), (at / n).mkdir()) for name in (STATE, MANIFEST)
    },
    **{f"{name} is a pipe": lambda at, n=name: ((at / n).unlink(), os.mkfifo(at / n)) for name in (STATE, MANIFEST)},
    "state is longer": lambda at: (at / STATE).write_bytes((at / STATE).read_bytes() + b"x"),
    "manifest is longer": lambda at: (at / MANIFEST).write_bytes((at / MANIFEST).read_bytes() + b" "),
    "manifest is huge": lambda at: (at / MANIFEST).write_bytes(b" " * (MANIFEST_BYTES_MAX + 1)),
    "manifest is a list": lambda at: (at / MANIFEST).write_bytes(b"[]"),
    "manifest is deep": lambda at: (at / MANIFEST).write_bytes(b"[" * 60000),
    "manifest of an empty file": lambda at: (resealed(at / MANIFEST, file_bytes=0), (at / STATE).write_bytes(b"")),
    "manifest of another step": lambda at: resealed(at / MANIFEST, completed=19),
    "manifest of another digest": lambda at: resealed(at / MANIFEST, file_sha256="0" * 64),
    "manifest of a version that nobody wrote": lambda at: forge_version(at / MANIFEST),
    "manifest with more": lambda at: resealed(at / MANIFEST, more=1),
    "manifest with a number as text": lambda at: resealed(at / MANIFEST, generation="0"),
    "both of another stage": lambda at: resealed(at / MANIFEST, stage=2),
    "both of another number of stages": lambda at: resealed(at / MANIFEST, stages=9),
    "both of another run": lambda at: resealed(at / MANIFEST, run="\x1b[31m\nx"),
    "both of another configuration": lambda at: resealed(at / MANIFEST, configuration="beef"),
    "no tensors": lambda at: forge(at, b"\x08\0\0\0\0\0\0\0notjson!"),
    "tensors beyond the file": lambda at: forge(at, b"\xff" * 7 + b"\x7f{}"),
}


def forge(at: Path, raw: bytes) -> None:
    """Another file, and a manifest that agrees."""
    import hashlib

    (at / STATE).write_bytes(raw)
    resealed(at / MANIFEST, file_bytes=len(raw), file_sha256=hashlib.sha256(raw).hexdigest())


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS)
def test_what_is_torn_is_named_and_left_out(tear: Callable[[Path], object], tmp_path: Path) -> None:
    store = store_of(tmp_path)
    write(store, 10, 20)
    at = store.path(20)
    tear(at)
    with pytest.raises(CheckpointError) as caught:
        store.load(20)
    line = str(caught.value)
    assert str(at) in line
    assert "older one" in line or "another run" in line
    assert line.isprintable()
    if "cannot be loaded" not in line:  # a forger knows the digests
        lines: list[str] = []
        assert store_of(tmp_path).newest_intact(2, lines.append) == [10]
        assert len(lines) == 1
        assert str(at) in lines[0]
    store.load(10)
    if "another run" not in line:
        write(store, 20)  # the step comes again
        assert intact(store) == [10, 20]


VERSIONS: dict[str, Callable[[Path], object]] = {
    "format 1": as_format_1,
    "format 3": lambda path: resealed(path, format=3, more={"than": ["is", "known"]}),
}


@pytest.mark.parametrize(("version", "rewrite"), VERSIONS.items(), ids=VERSIONS)
def test_a_checkpoint_of_another_version_is_named_and_kept(
    version: str, rewrite: Callable[[Path], object], tmp_path: Path
) -> None:
    store = store_of(tmp_path)
    write(store, 10, 20)
    rewrite(store.path(20) / MANIFEST)
    line = f"{store.path(20) / MANIFEST} is of {version}, and this version reads format 2 only: "
    line += "another version of thinpipe wrote it; go on with that one"
    lines: list[str] = []
    assert store.newest_intact(2, lines.append) == [10]
    assert lines == [line]
    with pytest.raises(OtherFormat):  # what it was is not lost to this version's
        write(store, 20)
    assert other_format(tmp_path, run="run", stages=STAGES) == line
    assert other_format(tmp_path / "none", run="run", stages=2) is None


def test_a_swap_of_two_checkpoints_is_seen(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    write(store, 10, 20)
    for one, other in ((10, 20), (20, 10)):
        shutil.copy(store.path(one) / STATE, store.path(other) / "new")
    for number in (10, 20):
        os.replace(store.path(number) / "new", store.path(number) / STATE)
    assert store.steps() == [10, 20]  # alike in length
    assert store.newest_intact(2, report=print) == []


def test_names_that_are_no_checkpoints(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    write(store, 10)
    for name in ("step-10", "step-000000010", "step-0000001x", "step-", "notes", f"step-{'9' * 30}"):
        (store.directory / name).mkdir()
    (store.directory / "step-00000030").write_text("a file")
    assert intact(store) == [10]
    assert store.numbers() == [10, 30]
    write(store, 30)
    assert intact(store) == [10, 30]
    (tmp_path / "stage-2").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot list .*stage-2: Not a directory; set checkpoint\.directory"):
        store_of(tmp_path, stage=2).steps()


@pytest.fixture(scope="module")
def good_manifest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    store = store_of(tmp_path_factory.mktemp("good"))
    write(store, 20)
    return (store.path(20) / MANIFEST).read_bytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_manifest_is_refused_by_name(
    data: st.DataObject, good_manifest: bytes, tmp_path: Path
) -> None:
    kind = data.draw(st.sampled_from(["bytes", "splice", "field", "json"]))
    if kind == "bytes":
        raw = data.draw(st.binary(max_size=300))
    elif kind == "json":
        raw = json.dumps(data.draw(JSON)).encode()
    elif kind == "splice":
        begin = data.draw(st.integers(0, len(good_manifest)))
        end = data.draw(st.integers(begin, min(len(good_manifest), begin + 40)))
        raw = good_manifest[:begin] + data.draw(st.binary(max_size=20)) + good_manifest[end:]
    else:
        tree = json.loads(good_manifest)
        tree[data.draw(st.sampled_from(sorted(tree)) | st.text(max_size=10))] = data.draw(JSON)
        raw = (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()
    (tmp_path / MANIFEST).write_bytes(raw)
    if raw == good_manifest:
        assert read_manifest(tmp_path).completed == 20
        return
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


# -- a write that is broken off ------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone: nothing that it would have done after this happens."""


class Mortal:
    """Lets this process die at the n-th of the calls that change the disk."""

    CALLS = ("os.fsync", "os.rename", "os.mkdir", "shutil.rmtree")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lives: int) -> None:
        self.left = lives
        for call in self.CALLS:
            room, name = call.split(".")
            monkeypatch.setattr(sys.modules[room], name, self._guard(getattr(sys.modules[room], name)))
        monkeypatch.setattr(safetensors.torch, "save_file", self._guard(safetensors.torch.save_file))

    def _guard(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Died
            return real(*args, **options)

        return guarded


@pytest.mark.parametrize("what", ["a new one", "one that is there"])
def test_death_at_any_call_leaves_whole_checkpoints(what: str, tmp_path: Path) -> None:
    number = 50 if what == "a new one" else 40
    outcomes = []
    for lives in range(60):
        directory = tmp_path / str(lives)
        write(store_of(directory), 20, 30, 40)
        with pytest.MonkeyPatch.context() as patch:
            mortal = Mortal(patch, lives)
            try:
                write(store_of(directory), number, generation=1)
            except Died:
                pass
            else:
                assert mortal.left >= 0
                break
        after = store_of(directory)
        listed = intact(after)
        assert {20, 30} <= set(listed) or listed == [30, 40, 50]
        after.newest_intact(3, report=pytest.fail)  # puts away what was left
        assert {20, 30, 40} <= set(intact(after)) or intact(after) == [30, 40, 50]
        assert [path.name for path in after.directory.iterdir() if path.name.startswith(".")] == []
        outcomes.append(intact(after)[-1] if number == 50 else after.manifest(40).generation)
        write(after, 60)
        assert len(intact(after)) == 3
    else:
        pytest.fail("it never survived")
    assert lives > 5
    assert set(outcomes) == ({40, 50} if number == 50 else {0, 1})
    assert outcomes == sorted(outcomes)  # once it is there, it stays


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, calls = store_of(tmp_path), []
    sync, rename = os.fsync, os.rename
    name = lambda path: str(path).replace(str(os.getpid()), "pid").removeprefix(f"{tmp_path}/")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(name(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"{name(a)} -> {name(b)}"), rename(a, b)))
    write(store, 10)
    temporary = "stage-1/.tmp-step-00000010-pid"
    assert calls == [
        str(tmp_path),
        f"{temporary}/{STATE}",
        f"{temporary}/{MANIFEST}",
        temporary,
        f"{temporary} -> stage-1/step-00000010",
        "stage-1",
    ]


@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "os.mkdir", "save_file"])
def test_a_full_disk_leaves_all_as_it_was(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path)
    write(store, 10, 20)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    room = safetensors.torch if call == "save_file" else checkpoint_module.os
    with monkeypatch.context() as patch:
        patch.setattr(room, call.removeprefix("os."), full)
        with pytest.raises(
            CheckpointError, match=r"cannot write the checkpoint .*step-00000030: No space left"
        ) as caught:
            write(store, 30)
        assert "make room there, or set checkpoint.directory" in str(caught.value)
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-00000010", "step-00000020"]
    write(store, 30)
    assert intact(store) == [10, 20, 30]


def test_a_real_limit_is_an_error_by_name_too(tmp_path: Path) -> None:
    """The library writes by itself, not through Python: a file that may not grow stands for a full disk."""
    store = store_of(tmp_path)
    write(store, 10)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, old[1]))
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-00000020: .*File too large"):
            write(store, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in store.directory.iterdir()] == ["step-00000010"]
    assert intact(store) == [10]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*taken/stage-1/step-00000010: "):
        write(store_of(tmp_path / "taken"), 10)


# -- in the background ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reported:
    written: list[tuple[int, int, float]]
    errors: list[str]


@pytest.fixture
def told() -> Reported:
    return Reported([], [])


@pytest.fixture
def writer(told: Reported, tmp_path: Path) -> Iterator[CheckpointWriter]:
    writer = CheckpointWriter(
        store_of(tmp_path),
        on_written=lambda *what: told.written.append(what),
        on_error=told.errors.append,
        calendar=lambda: 1.7e9,
    )
    yield writer
    writer.close()


def test_it_writes_what_it_is_given_in_order(writer: CheckpointWriter, told: Reported, tmp_path: Path) -> None:
    for completed in (1, 2, 3):
        writer.submit(small(completed), generation=0)
    assert writer.flush(30)
    assert intact(store_of(tmp_path)) == [1, 2, 3] == [completed for completed, _, _ in told.written]
    assert all(size > 1000 and seconds > 0 for _, size, seconds in told.written)
    assert told.errors == []
    writer.submit(small(4), generation=0)
    writer.close()  # finishes what was submitted
    writer.close()
    assert intact(store_of(tmp_path)) == [2, 3, 4]
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(small(5), generation=0)


def test_a_newer_one_waits(writer: CheckpointWriter, told: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, writing = threading.Event(), threading.Event()
    real = CheckpointStore.write

    def slow(*args: Any, **options: Any) -> int:
        writing.set()
        assert may_write.wait(30)
        return real(*args, **options)

    monkeypatch.setattr(CheckpointStore, "write", slow)
    assert writer.submit(small(1), generation=0) < 5
    assert writing.wait(30)
    assert not writer.flush(0)
    second = threading.Thread(target=writer.submit, args=(small(2),), kwargs={"generation": 0})
    second.start()
    second.join(0.05)
    assert second.is_alive()  # it waits for the first
    assert told.written == []
    may_write.set()
    second.join(30)
    assert writer.flush(30)
    assert [completed for completed, _, _ in told.written] == [1, 2]
    assert writer.waited_s >= 0.05


def test_a_failed_write_is_told_of_and_the_next_one_is_written(
    writer: CheckpointWriter, told: Reported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise KeyError("a bug\nof two lines")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.os, "rename", bug)
        writer.submit(small(1), generation=0)
        assert writer.flush(30)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_fill", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        writer.submit(small(2), generation=0)
        assert writer.flush(30)
    assert told.errors[0].startswith("KeyError: ")
    assert "step-00000002: broken" in told.errors[1]
    assert not [line for line in told.errors if "\n" in line]
    writer.submit(small(3), generation=0)
    assert writer.flush(30)
    assert intact(store_of(tmp_path)) == [3]


def test_whoever_is_told_may_fail(tmp_path: Path) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("records are closed")

    writer = CheckpointWriter(store_of(tmp_path), on_written=fails, on_error=fails)
    for completed in (1, 2):
        writer.submit(small(completed), generation=0)
    writer.close()
    assert intact(store_of(tmp_path)) == [1, 2]


# -- settings and the command --------------------------------------------------------------------------------------


def test_settings_are_a_nodes_own(tiny: TinyConfig, tmp_path: Path) -> None:
    plain = configure(tiny)
    other = configure(tiny, **{"checkpoint.every": 5, "checkpoint.keep": 7, "checkpoint.directory": str(tmp_path)})
    assert plain.digest() == other.digest()
    assert (plain.checkpoint.every, plain.checkpoint.keep, plain.checkpoint.directory) == (100, 3, None)
    assert plain.checkpoint.path(Path("run")) == Path("run/checkpoints")
    assert other.checkpoint.path(Path("run")) == tmp_path
    with pytest.raises(ConfigError, match=r"checkpoint\.keep: .*greater than or equal to 3 \(got 2\)"):
        parse_config({"checkpoint": {"keep": 2}})


@pytest.fixture
def run_directory(tiny: TinyConfig, tmp_path: Path) -> Path:
    """Step 30 at all three stages, 20 at two, 40 at one."""
    (tmp_path / "run.toml").write_text(dump_config(configure(tiny)))
    for stage, numbers in enumerate([(20, 30), (20, 30, 40), (30,)]):
        write(store_of(tmp_path / "checkpoints", stage=stage), *numbers)
    return tmp_path


def command(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, words)], env={"COLUMNS": "120"})
    return result.exit_code, result.stdout, result.stderr


def test_ls_says_what_can_be_resumed(run_directory: Path) -> None:
    code, shown, errors = command("ls", run_directory)
    assert (code, errors) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert rows == [
        ["20", "0.0 MB", "0.0 MB", "missing", "no"],
        ["30", "0.0 MB", "0.0 MB", "0.0 MB", "yes"],
        ["40", "missing", "0.0 MB", "missing", "no"],
    ]
    code, shown, _ = command("ls", run_directory, "--json")
    assert code == 0
    tree = json.loads(shown)
    assert tree["directory"] == str(run_directory / "checkpoints")
    assert [(row["step"], row["resumable"]) for row in tree["checkpoints"]] == [(20, False), (30, True), (40, False)]
    assert [held["state"] for held in tree["checkpoints"][0]["stages"]] == ["ok", "ok", "missing"]
    assert tree["checkpoints"][1]["stages"][0]["bytes"] > 1000


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_verify_finds_what_ls_cannot(as_json: list[str], run_directory: Path) -> None:
    assert command("verify", run_directory, *as_json)[0] == 0
    path = run_directory / "checkpoints" / "stage-1" / "step-00000030" / STATE
    flip(path, 0.99)
    assert command("ls", run_directory, *as_json)[0] == 0
    code, shown, errors = command("verify", run_directory, *as_json)
    assert code == 1
    assert "damaged" in shown
    (line,) = errors.splitlines()
    assert line.startswith(f"thinpipe: {path} is damaged: it has the digest ")
    flip(run_directory / "checkpoints" / "stage-0" / "step-00000030" / MANIFEST, 0.5)
    code, shown, errors = command("ls", run_directory, *as_json)
    assert (code, len(errors.splitlines())) == (0, 1)
    assert len(command("verify", run_directory, *as_json)[2].splitlines()) == 2


def test_stages_of_two_configurations_cannot_be_resumed(run_directory: Path) -> None:
    other = store_of(run_directory / "checkpoints", stage=2, fingerprint=replace(FINGERPRINT, configuration="decaf"))
    shutil.rmtree(other.path(30))
    write(other, 30)
    tree = json.loads(command("ls", run_directory, "--json")[1])
    assert not any(row["resumable"] for row in tree["checkpoints"])


@pytest.mark.parametrize("verb", ["ls", "verify"])
def test_what_is_no_run_is_said_in_one_line(verb: str, tiny: TinyConfig, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        code, shown, errors = command(verb, path)
        assert (code, shown) == (2, "")
        assert errors == (
            f"thinpipe: error: {path} is not the directory of a run: it holds no run.toml; name the --out of a run\n"
        )
    assert command(verb)[0] == 2
    (tmp_path / "run.toml").write_text("[")
    assert command(verb, tmp_path)[0] == 2
    (tmp_path / "run.toml").write_text(dump_config(configure(tiny)))
    code, shown, errors = command(verb, tmp_path)
    nothing = f"thinpipe: there is no checkpoint in {tmp_path / 'checkpoints'}, so nothing was verified\n"
    assert (code, errors) == ((0, "") if verb == "ls" else (1, nothing))
    assert shown.splitlines() == [
        f"no checkpoints in {tmp_path / 'checkpoints'}; set checkpoint.every to have some",
        "the run has not begun: no stage has records here",
    ]
    assert json.loads(command(verb, tmp_path, "--json")[1])["checkpoints"] == []


@pytest.mark.parametrize("words", [(), ("ls",), ("verify",), ("convert",)], ids=" ".join)
def test_help_is_helpful(words: tuple[str, ...]) -> None:
    code, shown, _ = command(*words, "--help")
    assert code == 0
    own = ["--stages" if words == ("convert",) else "--json", "RUN", "run.toml"]
    for phrase in own if words else ["ls", "convert", "verify", "without changing anything"]:
        assert phrase in shown


def test_a_listing_waits_for_no_tensor_library(run_directory: Path) -> None:
    program = (
        "import sys; from thinpipe.cli import app\n"
        "import thinpipe.node.checkpoints.lost\n"  # which stays for days in `supervise`
        f"app(['checkpoint', 'verify', {str(run_directory)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumable" in done.stdout


def test_no_pickle_is_near() -> None:
    modules = list((Path(__file__).parent.parent / "node" / "checkpoints").glob("*.py"))
    assert len(modules) > 9
    for module in modules:
        source = module.read_text()
        imports = [line for line in source.splitlines() if "import" in line]
        assert not [line for line in imports if "pickle" in line]
        assert "torch.load" not in source


def test_a_stage_goes_back_to_memory_or_disk_and_forgets_what_comes_after(tmp_path: Path) -> None:
    async def story() -> None:
        points = RestorePoints(store_of(tmp_path), on_written=lambda *_: None, on_error=pytest.fail)
        for completed in (1, 2, 3):
            await points.keep(small(completed), generation=0)
        await points.flush(30)
        assert [completed in points for completed in (1, 2, 3)] == [False, True, True]
        assert await points.offered() == {1, 2, 3}
        assert [(await points.find(completed))[1] for completed in (0, 1, 2)] == ["settings", "disk", "memory"]
        points.forget_after(2)
        assert [completed in points for completed in (1, 2, 3)] == [False, True, False]
        await points.close()

    asyncio.run(story())


def test_how_far_a_rollback_may_lead(tmp_path: Path) -> None:
    """A run that has just begun, and a new disk that was given two copies, have few checkpoints."""

    async def story() -> None:
        points = RestorePoints(store_of(tmp_path), on_written=lambda *_: None, on_error=pytest.fail)
        found = [points.oldest]
        for completed in (8, 9):
            await points.keep(small(completed), generation=0)
        await points.flush(30)
        found.append(points.oldest)
        points.gone_back(9)
        found.append(points.oldest)
        points.gone_back(7)  # lost here
        await points.keep(small(10), generation=1)
        await points.flush(30)
        found.append(points.oldest)
        assert found == [0, 0, 9, 8]
        await points.close()

    asyncio.run(story())


def test_what_is_void_is_neither_kept_nor_gone_back_to(tmp_path: Path) -> None:
    """Other lanes have decided otherwise on a round that was used with step 3. Training goes on until it is told."""

    async def story() -> None:
        points = RestorePoints(store_of(tmp_path), on_written=lambda *_: None, on_error=pytest.fail)
        for completed in (1, 2, 3):
            await points.keep(small(completed), generation=0)
        await points.flush(30)
        await points.make_void(3)
        await points.keep(small(5), generation=0)
        await points.flush(30)
        assert await points.offered() == {1, 2}
        assert [points.is_void(completed) for completed in (2, 3, 5)] == [False, True, True]
        points.gone_back(4)  # agreed before that was known: it will not stay so
        assert points.is_void(4)
        points.gone_back(2)
        await points.keep(small(3), generation=1)
        await points.flush(30)
        assert await points.offered() == {1, 2, 3}
        await points.close()

    asyncio.run(story())
