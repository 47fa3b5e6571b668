"""The settings of a run as one tree (pydantic): what its sections have to agree on, and what nodes compare of it.

One `run.toml` describes the whole swarm and every node reads the same file; what differs between nodes (stage index,
addresses) is given on the command line. Neighbours compare `RunConfig.digest()` in their greeting, so two nodes that
would compute different things refuse each other before a tensor moves. Why pydantic and not argparse defaults: a typed
tree gives one spelling to the TOML key, the command-line override and the error message.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

from pydantic import model_validator

from ..compress.recommended_rates import recommended_for
from ..protocol.control_messages import LISTED_MAX
from ..protocol.global_norm import WithGlobalNorm
from ..protocol.paired import Paired
from ..protocol.schedule import Schedule, ScheduleError, get_schedule
from ..protocol.stage_orders import PREFIX
from .config_sections import (
    CheckpointSection,
    CodecSection,
    ComputeSection,
    ContextSection,
    DataSection,
    LanesSection,
    LinkSection,
    ModelSection,
    OptimSection,
    PipelineSection,
    RunSection,
    Section,
    WatchSection,
)
from .context.chunk_layout import ChunkLayout


class ConfigError(ValueError):
    """A setting is unknown, malformed or contradicts another; the message names it and the remedy."""


class RunConfig(Section):
    """The whole tree; `run.toml` has one table per section."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    codec: CodecSection = CodecSection()
    pipeline: PipelineSection = PipelineSection()
    lanes: LanesSection = LanesSection()
    context: ContextSection = ContextSection()
    link: LinkSection = LinkSection()
    compute: ComputeSection = ComputeSection()
    checkpoint: CheckpointSection = CheckpointSection()
    watch: WatchSection = WatchSection()

    @model_validator(mode="after")
    def _codec_recommends(self) -> Self:
        """Settings of the optimizer that nobody set, as the codec would have them. They count as not set still, so that
        `recommended` can tell; in a run.toml they stand like all others."""
        if found := recommended(self):
            optim = {**self.optim.__dict__, **found}
            optim = OptimSection.model_construct(_fields_set=self.optim.model_fields_set, **optim)
            object.__setattr__(self, "optim", optim)  # frozen for everybody else
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        batch, parts = self.pipeline.batch_size, self.pipeline.microbatches
        if batch % parts:
            raise ValueError(
                f"pipeline.microbatches = {parts} does not divide pipeline.batch_size = {batch}; "
                f"choose a divisor such as {max(n for n in range(1, min(batch, parts) + 1) if batch % n == 0)}"
            )
        self._check_in_flight()
        try:
            self.training_schedule.check(0, self.pipeline.stages, parts)
        except ScheduleError as error:
            raise ValueError(f"pipeline.schedule: {error}") from None
        if (speeds := self.pipeline.speeds) and len(speeds) != self.pipeline.stages:
            raise ValueError(
                f"pipeline.speeds = {','.join(f'{speed:g}' for speed in speeds)} is for {len(speeds)} stages, but "
                f"pipeline.stages = {self.pipeline.stages}; give one speed for each"
            )
        if self.run.extended and (done := self.run.extended[-1][0]) > self.run.steps:
            raise ValueError(f"run.steps = {self.run.steps}, but run.extended says that {done} are done; raise it")
        if self.compute.emulate and self.checkpoint.every:
            raise ValueError(
                "compute.emulate: a run that computes nothing has no state to keep; set checkpoint.every = 0"
            )
        if self.data.heldout_sequences < self.microbatch_size:
            raise ValueError(
                f"data.heldout_sequences = {self.data.heldout_sequences} is less than the {self.microbatch_size} "
                "sequences of a microbatch; raise it"
            )
        return self

    @model_validator(mode="after")
    def _delay_fits(self) -> Self:
        pipeline = self.pipeline
        if not pipeline.delay:
            if pipeline.predict != "none":
                raise ValueError(
                    f"pipeline.predict = '{pipeline.predict}' is for gradients that are applied late, and "
                    "pipeline.delay = 0; set pipeline.delay = 1, or omit it"
                )
            return self
        for what, is_there, remedy in (
            ("chunks (context.method)", bool(self.context.method), "omit one of the two"),
            (f"lanes.count = {self.lanes.count}", self.lanes.count > 1, "set it to 1"),
            ("a schedule of written orders", pipeline.schedule.startswith(PREFIX), "say gpipe, 1f1b or zb"),
            (
                "optim.clip_norm = 'global', for which stages wait for each other between steps",
                self.optim.clip > 0 and self.optim.clip_norm == "global",
                "say 'stage'",
            ),
        ):
            if is_there:
                raise ValueError(f"pipeline.delay = 1 does not go with {what}; {remedy}")
        return self

    @model_validator(mode="after")
    def _chunks_fit(self) -> Self:
        if not self.context.method:
            return self
        if self.lanes.count == 1:
            raise ValueError(
                f"context.method = '{self.context.method}' is for several chunks, and lanes.count = 1; set the number "
                "of chunks, --chunks 2 or more"
            )
        nodes = self.pipeline.stages * self.lanes.count
        if nodes > LISTED_MAX:
            product = f"{self.pipeline.stages} x {self.lanes.count} = {nodes}"
            raise ValueError(
                f"pipeline.stages x lanes.count = {product}: nodes that hold chunks are lost and go back together, and "
                f"no more than {LISTED_MAX} nodes can agree on that; have fewer of one of the two"
            )
        try:
            self.chunk_layout  # noqa: B018
        except ValueError as error:
            raise ValueError(f"data.sequence_length: {error}") from None
        return self

    @property
    def chunk_layout(self) -> ChunkLayout:
        """Which positions of a sequence each lane holds; of one chunk where lanes hold different sequences."""
        chunks = self.lanes.count if self.context.method else 1
        return ChunkLayout(self.data.sequence_length, chunks, self.context.order)

    @property
    def lane_tokens(self) -> int:
        """Tokens of one sequence that a node computes."""
        return self.chunk_layout.lane_length

    @property
    def ids_before(self) -> int:
        """How many ids before each of its segments a lane is given, for what codecs know of the last few tokens."""
        if not self.context.method:
            return 0
        from ..compress.byte_format import CodecError  # late: they lead to torch, and who reads settings needs none
        from ..compress.registry import parse_codec

        try:
            return parse_codec(self.codec.codec, self.codec.forward, self.codec.backward).codec.looks_back
        except CodecError as error:
            raise ConfigError(str(error)) from None

    def _check_in_flight(self) -> None:
        if self.context.in_flight != 2:
            return
        if not self.context.method:
            fault = "lanes that hold sequences of their own do not wait within a layer; omit it, or set context.method"
        elif self.pipeline.microbatches == 1:
            fault = "a step has one microbatch (pipeline.microbatches = 1); omit it, or raise that"
        elif self.pipeline.schedule.startswith(PREFIX):
            fault = "written orders are of single microbatches; omit it, or set pipeline.schedule to gpipe, 1f1b or zb"
        else:
            return
        raise ValueError(f"context.in_flight = 2: {fault}")

    @property
    def in_flight(self) -> int:
        """Microbatches that a stage computes in turns, so that one does while another waits for keys and values."""
        pipeline, given = self.pipeline, self.context.in_flight
        if not self.context.method:
            return 1
        alone = pipeline.stages == 1 and pipeline.microbatches > 1 and not pipeline.schedule.startswith(PREFIX)
        return given or (2 if alone else 1)

    @property
    def evaluation_microbatches(self) -> int:
        """Held-out microbatches in one evaluation; what does not fill a microbatch is left out."""
        return self.data.heldout_sequences // self.microbatch_size

    @property
    def microbatch_size(self) -> int:
        """Sequences in one microbatch."""
        return self.pipeline.batch_size // self.pipeline.microbatches

    @property
    def clips_by_global_norm(self) -> bool:
        """Whether stages have to agree on one gradient norm in each step."""
        return self.optim.clip > 0 and self.optim.clip_norm == "global" and self.pipeline.stages > 1

    @property
    def training_schedule(self) -> Schedule:
        """What each stage does in a training step, and in which order."""
        schedule = get_schedule(self.pipeline.schedule)
        if self.in_flight == 2:
            schedule = Paired(schedule)
        return WithGlobalNorm(schedule) if self.clips_by_global_norm else schedule

    def next_drain(self, completed: int) -> int:
        """After how many steps the pipeline has to be empty next, where steps overlap: for an evaluation, a checkpoint,
        or the end."""
        periods = [every for every in (self.run.eval_every, self.checkpoint.every) if every]
        return min([self.run.steps, *((completed // every + 1) * every for every in periods)])

    @property
    def tokens_per_step(self) -> int:
        """Of one lane."""
        return self.pipeline.batch_size * self.lane_tokens

    def shared(self) -> dict[str, Any]:
        """All that must agree between the nodes of a run, by section.

        Left out: paths (they differ between machines), the device, how a node's own link is shaped and buffered,
        when it writes checkpoints (unless steps overlap: then all have to stop for them at once), and who looks at it.
        """
        exclude: dict[str, Any] = {
            "data": {"cache", "source", "tokenizer"},
            "model": {"path"},
            "link": True,
            "compute": {"device"},
            "checkpoint": set(CheckpointSection.model_fields) - {"every"} if self.pipeline.delay else True,
            "watch": True,
        }
        return self.model_dump(mode="json", exclude=exclude)

    def digest(self) -> str:
        """Hex SHA-256 of `shared`, by which nodes compare it.

        The architecture that `model.path` leads to has its own digest, which the greeting adds to this one, and with it
        the layers of each stage.
        """
        return hashlib.sha256(json.dumps(self.shared(), sort_keys=True).encode()).hexdigest()

    def of_any_length(self) -> RunConfig:
        """The same but for its length, and when it stops on the way: what a checkpoint must have in common with the run
        that goes on from it."""
        run = self.run.model_copy(update={"steps": 1, "extended": ()})
        return self.model_copy(update={"run": run, "checkpoint": CheckpointSection()})


def recommended(config: RunConfig) -> dict[str, float]:
    """The settings of the optimizer, by name, that are what the codec recommends because nobody set them. None in a run
    that was read from its run.toml, where all of them stand."""
    said = config.optim.model_fields_set
    return {name: value for name, value in recommended_for(config.codec.codec).items() if name not in said}


def recommended_line(config: RunConfig) -> str | None:
    """What of `recommended` there is, for people; None for nothing."""
    told = ", ".join(f"optim.{name}={value:g}" for name, value in recommended(config).items())
    return f"{told}: recommended for codec {config.codec.codec}; set them to override" if told else None
