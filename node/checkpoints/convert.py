"""The same run at another cut: its checkpoint, taken apart by layers and put together for other stages.

Weights and the optimizer's buffers belong to parameters, whose names in the whole model do not depend on the cut, so
they move with their layers. The state of a codec belongs to a boundary: one that stays between the same layers goes on
with all of it, a new one begins as it would at the run's start, and that of a closed one is dropped
(`kept_boundaries`). The position in the
data is the number of steps. A new boundary's dictionaries have no version yet; they begin with its first message, as at
a run's start.

Each new stage is built as a node would build it, is filled, and takes the state as it would take a checkpoint of its
own, so what is written has been restored once. One stage is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...compress.registry import parse_codec
from ...sim.reports.wording import counted
from ..codec_start import layers_at_start
from ..config import ConfigError, RunConfig
from ..config_file import dump_config, merge, parse_config
from ..preparation import state_digest
from ..stage import Stage
from ..stage_costs import stage_layers
from ..stage_state import StageSnapshot
from .assemble import Assembled
from .kept_boundaries import KeptBoundaries, kept_boundaries
from .kept_tokenizer import keep_tokenizer, read_kept
from .manifest import CheckpointError, Fingerprint
from .store import CheckpointStore

# The parts of a stage's state that belong to its lower boundary, and to its upper one (`StageState`).
SENDER_PARTS = ("sender", "table_below", "activation_codebook_below", "gradient_codebook_below")
SENDER_PARTS += ("activation_memory_below", "table_versions_below")
RECEIVER_PARTS = ("receiver", "table_above", "activation_codebook_above", "gradient_codebook_above")
RECEIVER_PARTS += ("gradient_memory_above",)


# What goes with the number of stages: more of them want more microbatches, or a deeper schedule, to be busy. The batch
# does not: which sequences a step has follows from it, and so does where in the data the run is.
CUT_SETTINGS = tuple(f"pipeline.{name}" for name in ("stages", "cut", "speeds", "schedule", "microbatches"))


def recut(config: RunConfig, asked: Mapping[str, Any]) -> RunConfig:
    """The settings of the same run with other stages, and checkpoints in its own directory. asked: of CUT_SETTINGS,
    each spelt as in a run.toml, and stages in any case; cut and speeds are not the old ones. Raises ConfigError."""
    tree = config.model_dump(mode="json", exclude_none=True, exclude={"checkpoint": {"directory"}})
    return parse_config(merge(tree, {"pipeline.cut": "auto", "pipeline.speeds": [], **asked}))


def convert(found: Assembled, config: RunConfig, out: Path, *, written_s: float) -> list[str]:
    """Write the run that `found` is of, at the cut of `config`, into the empty directory `out`; returns what became of
    boundaries and what else is not as it was, a line each.

    config: `recut` of the run's, checked. written_s: seconds since 1970, for people. run.toml is written last, so that
    what was broken off is no run. Raises ConfigError for the cut that the run has, and for microbatches of another size
    where a byte format remembers what it left out of one, StateError for a state that does not
    fit, CheckpointError for a disk that does not take it, and what `node.preparation.BAD_INPUT` names.
    """
    old, new = (stage_layers(each, found.architecture) for each in (found.config, config))
    if old == new:
        counts = ",".join(str(len(layers)) for layers in old)
        raise ConfigError(f"its {len(old)} stages have {counts} layers already; choose another --stages or --cut")
    kept = kept_boundaries(old, new)
    _check_memory(found.config, config, kept)
    generation = max((version[0] for version in _versions(found.snapshots)), default=0)
    for index in range(len(new)):
        stage = Stage(config, found.architecture, index)
        snapshot = _filled(stage.untrained(found.completed), found, kept, index)
        stage.restore(snapshot)
        written = state_digest(config, found.architecture, stage.token_table_digest)
        corpus, tokenizer = found.text if index == 0 else ("", "")
        fingerprint = Fingerprint(
            run=config.run.name, stages=len(new), configuration=written, corpus=corpus, tokenizer=tokenizer
        )
        store = CheckpointStore(config.checkpoint.path(out), stage=index, fingerprint=fingerprint)
        if index == 0 and found.tokenizer:
            keep_tokenizer(config.checkpoint.path(out), read_kept(found.tokenizer))
        store.write(snapshot, generation=generation, written_s=written_s)
    try:
        (out / "run.toml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {out}/run.toml: {error.strerror}; make room there") from None
    at_start = {layers.stop for layers in (layers_at_start(config) or [])[:-1]}
    lines = kept.lines(at_start) if any("codec" in name for each in found.snapshots for name in each.tensors) else []
    if config.optim.clip and config.optim.clip_norm == "stage":
        lines.append(
            f"gradients are clipped by stage (optim.clip = {config.optim.clip:g}), and stages have other parts now: "
            "where it clips, the next steps are not bit for bit those that the run would have taken"
        )
    if config.microbatch_size != found.config.microbatch_size:
        lines.append(
            f"a step is computed in {config.pipeline.microbatches} parts and not in "
            f"{found.config.pipeline.microbatches}: what is summed is rounded otherwise, so the next steps are not bit "
            "for bit those that the run would have taken"
        )
    if found.config.checkpoint.directory is not None:
        lines.append(f"checkpoints are in {out} from now on, and not in {found.config.checkpoint.directory}")
    return lines


def _check_memory(before: RunConfig, after: RunConfig, kept: KeptBoundaries) -> None:
    if before.microbatch_size == after.microbatch_size or all(old is None for old in kept.boundaries):
        return
    codec = parse_codec(after.codec.codec, after.codec.forward, after.codec.backward)
    if remembering := next((fmt for fmt in (codec.forward, codec.backward) if fmt.remembers), None):
        raise ConfigError(
            f"pipeline.microbatches = {after.pipeline.microbatches}: byte format '{remembering.id}' carries what it "
            f"left out of a microbatch of {counted(before.microbatch_size, 'sequence')} to the next one, and these "
            f"have {after.microbatch_size}; leave pipeline.microbatches = {before.pipeline.microbatches}"
        )


def _versions(snapshots: Iterable[StageSnapshot]) -> list[list[int]]:
    held = [said["version"] for snapshot in snapshots for said in snapshot.dictionaries.values()]
    return [version for version in held if version is not None]


def _filled(blank: StageSnapshot, found: Assembled, kept: KeptBoundaries, index: int) -> StageSnapshot:
    """The state of stage `index` of the new cut."""
    tensors, dictionaries = dict(blank.tensors), dict(blank.dictionaries)
    model = found.optimizer | {f"weight/{name}": tensor for name, tensor in found.weights.items()}
    tensors |= {name: model[name] for name in tensors if name in model and not _of_codec(name)}
    if (source := kept.tokens[index]) is not None:
        _move(found.snapshots[source], tensors, f"codec.stage_{source}.", f"codec.stage_{index}.", ["tokens"])
    ends: list[tuple[int, str, tuple[str, ...]]] = []
    if index < len(kept.boundaries):
        ends.append((index, "sender", SENDER_PARTS))
    if index:
        ends.append((index - 1, "receiver", RECEIVER_PARTS))
    for boundary, half, parts in ends:
        if (old := kept.boundaries[boundary]) is None:
            continue
        snapshot = found.snapshots[old if half == "sender" else old + 1]
        here, there = (f"codec.boundary_{number}.{half}." for number in (boundary, old))
        _move(snapshot, tensors, there, here, parts)
        dictionaries |= {name: said for name, said in snapshot.dictionaries.items() if name in parts}
    return replace(blank, tensors=tensors, dictionaries=dictionaries)


def _of_codec(name: str) -> bool:
    return name.partition("/")[2].startswith("codec.")


def _move(source: StageSnapshot, tensors: dict[str, Tensor], there: str, here: str, parts: Iterable[str]) -> None:
    """Into `tensors`: the parameters whose names begin with `there`, and their moments, under `here`; and these parts
    of the state, in the place of what is untrained."""
    prefixes = tuple(f"codec/{part}/" for part in parts)
    for name in [name for name in tensors if name.startswith(prefixes)]:
        del tensors[name]
    for name, tensor in source.tensors.items():
        kind, _, parameter = name.partition("/")
        if name.startswith(prefixes):
            tensors[name] = tensor
        elif parameter.startswith(there):
            tensors[f"{kind}/{here}{parameter.removeprefix(there)}"] = tensor
