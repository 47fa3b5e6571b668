"""The whole model of a run, put together from the checkpoints of its stages.

Each stage writes its own part under the names that its tensors have in the whole model, so putting parts together is
taking the union of them: whoever wants the model (an export, a new run that starts from this one, another number of
stages) begins here, and cuts afterwards as it likes.

    found = assemble(Path("runs/demo"))          # or assemble(..., step=40, report=print)
    found.weights["model.layers.3.mlp.up_proj.weight"]      # float32, as the optimizer holds it
    found.boundaries[0].table                               # the projector that both ends of boundary 0 compute with
    found.tokens[1]["context.embedding"]                    # what stage 1 knows of its tokens
    found.optimizer["muon.momentum/model.layers.3.mlp.up_proj.weight"]

Every file's digest is compared before anything of it is used; where a stage's own checkpoint is damaged, its
neighbour's copy is as good. Tensors are mapped from the files: memory holds one copy of what is looked at, and a model
larger than it can be assembled. Do not write to them.

Why not build the stages and ask them: that allocates and draws a whole model first, needs each stage's device, and can
only make the stages that the run had.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...protocol.greeting import TABLE_DIGEST
from ..config import RunConfig
from ..config_file import load_config
from ..preparation import resolve_architecture, state_digest
from ..run_directory import with_start
from ..stage_state import StageSnapshot
from .kept_tokenizer import kept_tokenizer
from .manifest import COPIES, CheckpointError, Fingerprint
from .store import CheckpointStore

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WEIGHT, _CODEC, _ROUNDS = "weight/", "codec/", "lanes/"  # of rounds: each stage's own, and no part of the model
_STEPS_LISTED = 5
Codebook = Literal["activations", "gradients"]


class AssembleError(CheckpointError):
    """The checkpoints that are here are not those of one whole model after one step."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundaryState:
    """What training made of the codec between stages `boundary` and `boundary + 1`.

    table: the learned table (entries, width) that both ends compute with, as it was shipped last; for MAPL the
    projector (D, R). None where the codec has none. master: what its owner has learned since (None: no table).
    sender, receiver: the parameters of the two halves, by their names in `Codec.encoder` and `Codec.decoder`.
    codebooks: of the byte formats of both directions, where they have one and it was shipped: what its owner has
        learned (`ByteFormat.state_tensors`), and beside it "shipped", which both ends code with.
    """

    boundary: int
    table: Tensor | None
    master: Tensor | None
    sender: dict[str, Tensor]
    receiver: dict[str, Tensor]
    codebooks: dict[Codebook, dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Assembled:
    """A run's whole model after `completed` steps; all tensors are mapped from its files, on the CPU.

    config, architecture: of the run; `architecture.num_hidden_layers` layers.
    weights: each parameter under its name in the whole model, once, in the run's dtype (float32, or float64). Under a
        codec that constrains its stages (`Codec.constrains`) some are replaced by what that codec trains in their
        place (`model.layers.0.mlp.down_proj.inner.weight`).
    tokens: by stage, what the codec knows of tokens there, named as in the `state_dict` of `Codec.tokens`; its frozen
        parts too, but no table that every node generates for itself.
    boundaries: by boundary, one fewer than stages.
    optimizer: the optimizers' buffers, `muon.momentum/<name>`, `adamw.exp_avg/<name>`, `adamw.exp_avg_sq/<name>`; the
        codec's own parameters are `codec.stage_1.<name>` and `codec.boundary_0.sender.<name>` there.
    snapshots: by stage, all that its checkpoint holds, as `Stage.restore` takes it.
    tokenizer: its directory, which stage 0 leaves beside its checkpoints; None where it is not there. Either way
        `run_corpus.vocabulary_of_run` knows it.
    text: digests of the tokens and of the tokenizer that stage 0 trained on, as its checkpoint has them; "": unknown.
    """

    config: RunConfig
    architecture: PretrainedConfig
    completed: int
    weights: dict[str, Tensor]
    tokens: list[dict[str, Tensor]]
    boundaries: list[BoundaryState]
    optimizer: dict[str, Tensor]
    snapshots: list[StageSnapshot]
    tokenizer: Path | None
    text: tuple[str, str]


def assemble(
    run: Path,
    *,
    step: int | None = None,
    config: RunConfig | None = None,
    report: Callable[[str], None] | None = None,
) -> Assembled:
    """The model of the run in directory `run`, whose run.toml says where its checkpoints are.

    step: completed steps; None for the newest that all stages have intact. What is damaged is `report`ed, a line each,
    and whether a copy took its place. config: in the place of run.toml, for paths that differ on this machine.

    Raises AssembleError, or the CheckpointError of one file, where that is not there; ConfigError, ModelError and
    DataError for a run.toml, a model or a tokenizer that cannot be read.
    """
    config = with_start(config or load_config(run / "run.toml"), run)
    directory = config.checkpoint.path(run)
    tokenizer = kept_tokenizer(directory)
    if tokenizer and config.data.tokenizer:  # what is named may be gone, or be another one by now
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer})})
    architecture = resolve_architecture(config)
    fingerprint = Fingerprint(run=config.run.name, configuration=None, stages=config.pipeline.stages)
    held = [_held(directory, stage, fingerprint) for stage in range(config.pipeline.stages)]
    _check_present(directory, held, step)
    common = sorted(set.intersection(*map(set, held)), reverse=True)
    wanted, say = state_digest(config, architecture), report or (lambda _: None)
    for completed in common if step is None else [step]:
        try:
            loaded = [_load(of_stage[completed], completed, wanted, say) for of_stage in held]
            stores = [store for store, _ in loaded]
            _check_tables(stores, completed)
        except CheckpointError as error:
            if step is not None or completed == common[-1]:
                raise
            say(str(error))
            continue
        head = stores[0].manifest(completed)
        found = _joined(config, architecture, [snapshot for _, snapshot in loaded], tokenizer)
        return replace(found, text=(head.corpus, head.tokenizer))
    raise AssertionError("unreachable: `common` is not empty")


# The checkpoints of a stage by completed steps, with the stores that have each: its own, then a neighbour's copy.
_Held = dict[int, list[CheckpointStore]]


def _held(directory: Path, stage: int, fingerprint: Fingerprint) -> _Held:
    held: _Held = {}
    for place in (directory, directory / COPIES):
        store = CheckpointStore(place, stage=stage, fingerprint=fingerprint)
        for number in store.numbers():
            held.setdefault(number, []).append(store)
    return held


def _load(
    stores: list[CheckpointStore], completed: int, wanted: str, say: Callable[[str], None]
) -> tuple[CheckpointStore, StageSnapshot]:
    """The state of a stage from the first of these that has it intact, and which one that is. Raises what is wrong with
    the first of them if none has, and AssembleError for other settings than those with the digest `wanted`."""
    faults: list[CheckpointError] = []
    for store in stores:
        try:
            _check_settings(store, completed, wanted)
            snapshot = store.load(completed)
        except CheckpointError as error:
            faults.append(error)
            continue
        for error in faults:
            fault = str(error).rpartition("; ")[0] or str(error)  # without its remedy, which is found
            say(f"{fault}; the copy {store.path(completed)} is taken instead")
        return store, snapshot
    raise faults[0]


def _check_present(directory: Path, held: list[_Held], step: int | None) -> None:
    """Raises AssembleError unless all stages have that step, or any step in common."""
    if not any(held):
        raise AssembleError(
            f"there is no checkpoint in {directory}; a run writes them every checkpoint.every steps, to "
            "checkpoint.directory if that is set"
        )
    for stage, steps in enumerate(held):
        if not steps:
            raise AssembleError(
                f"stage {stage} has no checkpoint in {directory}; copy its directory stage-{stage} there from the "
                "machine that served it"
            )
    common = set.intersection(*map(set, held))
    if step is not None and (lacking := [stage for stage, steps in enumerate(held) if step not in steps]):
        first = lacking[0]
        others = f"all stages have {_listed(common)}" if common else f"it has {_listed(held[first])}"
        raise AssembleError(f"stage {first} has no checkpoint after {step} steps in {directory}; {others}")
    if not common:
        each = "; ".join(f"stage {stage} has {_listed(steps)}" for stage, steps in enumerate(held))
        raise AssembleError(f"the stages have no step in common in {directory}: {each}")


def _listed(steps: Mapping[int, object] | set[int]) -> str:
    newest = sorted(steps)[-_STEPS_LISTED:]
    return f"{'..., ' if len(steps) > len(newest) else ''}{', '.join(map(str, newest))}"


def _check_settings(store: CheckpointStore, completed: int, wanted: str) -> None:
    """Raises AssembleError unless it was written under the settings of this run.toml."""
    settings = store.manifest(completed).configuration.partition(TABLE_DIGEST)[0]
    if settings != wanted:
        raise _of_other_settings(
            store.path(completed), f"configuration hash {settings[:12]}… there, {wanted[:12]}… here"
        )


def _check_tables(stores: Sequence[CheckpointStore], completed: int) -> None:
    """Raises AssembleError unless all generated the same token table."""
    found = [store.manifest(completed).configuration for store in stores]
    for store, configuration in zip(stores, found, strict=True):
        if configuration != found[0]:
            fault = "it was written with another token table than stage 0's"
            raise _of_other_settings(store.path(completed), fault)


def _of_other_settings(path: Path, fault: str) -> AssembleError:
    remedy = "use the run.toml and the version that it was written with"
    return AssembleError(f"{path} is of other settings: {fault}; {remedy}")


def _joined(
    config: RunConfig, architecture: PretrainedConfig, snapshots: list[StageSnapshot], tokenizer: Path | None
) -> Assembled:
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for stage, snapshot in enumerate(snapshots):
        for name, tensor in snapshot.tensors.items():
            if name.startswith((_CODEC, _ROUNDS, f"{_WEIGHT}codec.")):
                continue
            target, key = (weights, name.removeprefix(_WEIGHT)) if name.startswith(_WEIGHT) else (optimizer, name)
            if key in target:
                raise AssembleError(f"stage {stage} has '{key}', and so has a stage above it; they are of two runs")
            target[key] = tensor
    trained = [_under(snapshot, f"{_WEIGHT}codec.stage_{stage}.") for stage, snapshot in enumerate(snapshots)]
    return Assembled(
        config=config,
        architecture=architecture,
        completed=snapshots[0].completed,
        weights=weights,
        tokens=[own | _under(each, f"{_CODEC}tokens/") for own, each in zip(trained, snapshots, strict=True)],
        boundaries=[
            _boundary(boundary, above, below) for boundary, (above, below) in enumerate(itertools.pairwise(snapshots))
        ],
        optimizer=optimizer,
        snapshots=snapshots,
        tokenizer=tokenizer,
        text=("", ""),
    )


def _boundary(boundary: int, above: StageSnapshot, below: StageSnapshot) -> BoundaryState:
    """Raises AssembleError if the two ends hold different tables, which would be another function at either."""
    shipped, replica = above.tensors.get("codec/table_below/shipped"), below.tensors.get("codec/table_above/replica")
    if (shipped is None) != (replica is None) or (
        shipped is not None and replica is not None and not torch.equal(shipped, replica)
    ):
        raise AssembleError(
            f"the two ends of boundary {boundary} hold different tables after {above.completed} steps; "
            "take another step"
        )
    master = above.tensors.get("codec/sender/master")
    return BoundaryState(
        boundary=boundary,
        table=master if shipped is None else shipped,  # before the first step nothing has been shipped
        master=master,
        sender=_under(above, f"{_WEIGHT}codec.boundary_{boundary}.sender."),
        receiver=_under(below, f"{_WEIGHT}codec.boundary_{boundary}.receiver."),
        codebooks={
            "activations": _codebook(above, "activation_codebook_below"),
            "gradients": _codebook(below, "gradient_codebook_above"),
        },
    )


def _codebook(owner: StageSnapshot, name: str) -> dict[str, Tensor]:
    held = _under(owner, f"{_CODEC}{name}/")
    held.pop("version", None)
    return held if "shipped" in held else {}  # not of a boundary that was made by a conversion and not used yet


def _under(snapshot: StageSnapshot, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in snapshot.tensors.items() if name.startswith(prefix)}
