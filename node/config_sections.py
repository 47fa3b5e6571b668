"""The sections of a run's settings: one class for each table of run.toml, each setting with its bounds and what is said
of it (pydantic).

What holds within one section is checked here; what two have to agree on, and what nodes compare, is in `node.config`.
What is said of a setting is also its text in docs/settings.md and in the error that refuses it, so it stands with the
bounds and nowhere else.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..protocol.messages import CHUNK_BYTES_MAX
from ..protocol.schedule import ScheduleError, StageOrders, get_schedule
from ..protocol.sought_schedule import is_sought
from ..sim.reports.metrics_address import MetricsAddress
from .schedule_file import schedule_setting


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="after")
    @classmethod
    def _home(cls, value: object) -> object:
        """A path may begin with ~, which no shell has replaced in a file or behind an equals sign."""
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


class RunSection(Section):
    """What the run is: its length, seed and pauses for evaluation."""

    seed: int = Field(
        default=1, ge=0, lt=2**63, description="first weights, order of the data and random rounding follow from it"
    )
    steps: int = Field(default=200, ge=1, description="training steps: batches, and updates of the weights")
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only after the last step")
    extended: tuple[tuple[int, int], ...] = Field(
        default=(),
        max_length=1024,
        description="how its length was changed, as `up --resume --steps` writes it: each [steps done then, steps that "
        "it should have had], such as [[60, 60]]",
    )
    origin: str = Field(
        default="", max_length=4096, description="where its first weights came from, as `up --from` writes it"
    )
    origin_codec: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="SHA-256 of what its codec began with, codec.safetensors in `model.path`; `up --from` writes it",
    )
    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="the run id that neighbours compare"
    )

    @field_validator("extended")
    @classmethod
    def _are_lengths(cls, given: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        done = [0, *(after for after, _ in given)]
        if any(one >= other for one, other in itertools.pairwise(done)) or any(
            after > length for after, length in given
        ):
            raise ValueError(
                "is a list of [steps done, steps that there were to be], the first of them ascending from 1 and never "
                "above the second"
            )
        return given


class ModelSection(Section):
    """Which decoder is trained."""

    preset: str = Field(default="tiny", description="tiny, 150m, 500m, 800m, 1b or 8b; ignored when `path` is given")
    path: Path | None = Field(default=None, description="directory with a Hugging Face config.json (and safetensors)")
    pretrained: bool = Field(
        default=False, description="start from the safetensors in `path` instead of random weights"
    )
    vocab_size: int | None = Field(
        default=None, ge=2, le=2**20, description="token ids; default: those of the tokenizer"
    )
    layers: int | None = Field(
        default=None, ge=1, le=1024, description="layers of the whole model; default: the preset's"
    )
    width: int | None = Field(
        default=None, ge=8, le=65536, description="numbers in a hidden state; default: the preset's"
    )
    attention: Literal["eager", "sdpa"] = Field(
        default="sdpa", description="how attention is computed: sdpa is PyTorch's fused one, eager the plain one"
    )


class DataSection(Section):
    """Where text comes from and how it is cut."""

    source: str = Field(
        default="stdlib", description="'stdlib' (embedded default), a local file or directory, or hf:NAME"
    )
    format: Literal["auto", "text", "jsonl", "parquet"] = Field(
        default="auto", description="how the files are read; auto: by their names' endings"
    )
    text_field: str = Field(default="text", description="where the text is in a row of jsonl, parquet or a dataset")
    tokenizer: Path | None = Field(
        default=None,
        description="a tokenizer.json or a directory with one; default: a pretrained model's own, else a byte-level "
        "BPE that is trained once",
    )
    sequence_length: int = Field(default=128, ge=2, le=2**20, description="tokens in a sequence")
    heldout_sequences: int = Field(default=64, ge=1, description="length of the fixed held-out set, in sequences")
    cache: Path | None = Field(
        default=None, description="where tokens are kept; default: $THINPIPE_CACHE or ~/.cache/thinpipe"
    )


class OptimSection(Section):
    """Muon for hidden matrices, AdamW for the rest; warm-up, then linear decay.

    What is not set takes the value that the run's codec recommends (`recommended`), and only then the default here.
    """

    muon_lr: float = Field(default=0.02, gt=0, description="learning rate of Muon, for hidden matrices")
    adamw_lr: float = Field(default=0.005, gt=0, description="learning rate of AdamW, for everything else")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of Muon (Nesterov)")
    adamw_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    adamw_beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's decay of the mean squared gradient")
    weight_decay: float = Field(
        default=0.0, ge=0, description="each step takes this share, times the learning rate, off every weight"
    )
    warmup_steps: int = Field(default=10, ge=0, description="steps over which the rates rise from 0")
    decay_fraction: float = Field(
        default=0.4, ge=0, le=1, description="share of the run, at its end, with a falling rate"
    )
    clip: float = Field(
        default=1.0, ge=0, description="gradients are scaled down to this norm where theirs is larger; 0: no clipping"
    )
    clip_norm: Literal["stage", "global"] = Field(
        default="stage",
        description="whose norm: each stage's own, so that another number of stages clips otherwise, or the whole "
        "model's, which goes up and down the pipeline once a step",
    )
    msign_dtype: Literal["float64", "float32", "bfloat16"] = Field(
        default="float32", description="in which Muon computes the sign of a matrix"
    )
    msign_coefficients: Literal["polar_express", "quintic"] = Field(
        default="polar_express", description="of Muon's iteration; quintic in bfloat16 is what torch.optim.Muon does"
    )


class CodecSection(Section):
    """What crosses a boundary, and in how many bits."""

    codec: str = Field(
        default="mapl", description="mapl, ssn, resbm or identity; or a byte format for dense training: bf16, int8, ..."
    )
    forward: str | None = Field(default=None, description="byte format of activations; default: the codec's own")
    backward: str | None = Field(default=None, description="byte format of gradients; default: the codec's own")


class PipelineSection(Section):
    """How the model is cut and in which order a stage works."""

    stages: int = Field(default=4, ge=1, le=1024, description="parts of the model, one process each")
    schedule: str = Field(
        default="1f1b",
        description="gpipe, 1f1b, zb; 1f1b:rtt_ratio=1.8, zb:rtt_ratio=1.8 for slow links; a CSV file of written "
        "orders, which become `order:` and a word for each stage",
    )
    batch_size: int = Field(default=16, ge=1, description="sequences a step")
    microbatches: int = Field(default=8, ge=1, description="parts into which a step's batch is cut")
    delay: int = Field(
        default=0,
        ge=0,
        le=1,
        description="steps by which gradients are applied late; 1: no stage waits for the pipeline to run empty "
        "between two steps, and each keeps two versions of its weights (2BW)",
    )
    predict: Literal["none", "momentum", "orthogonal"] = Field(
        default="none",
        description="with delay = 1, where the weights of a step are taken to be by then: one more of the optimizer's "
        "own last steps ahead (orthogonal), or as far along its raw momentum (momentum)",
    )
    cut: str = Field(
        default="auto",
        description="layers of each stage, such as 3,3,2,0; equal: as many for each; auto: so that the slowest stage "
        "is as fast as it can be",
    )
    speeds: tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...] = Field(
        default=(), max_length=1024, description="of the stages' machines, relative, such as 1,1,0.5,0.25; none: alike"
    )

    @field_validator("cut", mode="before")
    @classmethod
    def _is_a_cut(cls, given: object) -> str:
        text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given).replace(" ", "")
        if text not in ("auto", "equal") and not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", text):
            raise ValueError(f"'{text}' is not a cut; say auto, equal, or the layers of each stage such as 3,3,2,0")
        return text

    @field_validator("speeds", mode="before")
    @classmethod
    def _are_speeds(cls, given: object) -> object:
        if isinstance(given, str):
            return [part.strip() for part in given.split(",")] if given.strip() else []
        return [given] if isinstance(given, int | float) else given

    @field_validator("schedule")
    @classmethod
    def _trains(cls, given: str) -> str:
        if is_sought(given):
            raise ScheduleError(
                f"schedule '{given}' is found by simulation before a run, and settings have what was found; say it to "
                "--schedule of up, plan, bench or compare"
            )
        spec = schedule_setting(given)
        schedule = get_schedule(spec)
        if schedule.name == "evaluation":
            raise ScheduleError("schedule 'evaluation' does not train; choose gpipe, 1f1b or zb")
        return schedule.spec if isinstance(schedule, StageOrders) else spec  # orders in one spelling


class LanesSection(Section):
    """Replicas of the whole chain of stages, each with its own part of the data."""

    count: int = Field(default=1, ge=1, le=64, description="lanes: how many nodes each stage has")
    average: str = Field(
        default="outer",
        description="how lanes become one model: gradients; outer:every=20,lr=0.7,momentum=0.9,fragments=1,delay=0,"
        "format=int4; sparta:p=0.05,every=10",
    )
    round_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="how long a round waits for a lane; then the others go on without it, and it has to come back",
    )


class ContextSection(Section):
    """Lanes that hold chunks of the same sequences, and not sequences of their own."""

    method: str = Field(
        default="",
        description="how keys and values cross to the other chunks: full, full:format=int8, mos:k=0.06,v=0.12; "
        "empty: lanes hold different sequences",
    )
    order: Literal["zigzag", "plain"] = Field(
        default="zigzag",
        description="zigzag: each lane holds an early and a late part of each sequence, and all compute alike; plain: "
        "one part, and the last lane computes the most",
    )
    in_flight: Literal[1, 2] | None = Field(
        default=None,
        description="2: two microbatches are computed in turns, one while the other waits for keys and values, and "
        "kept in memory; default: 2 with one stage and several microbatches, else 1",
    )


class LinkSection(Section):
    """The thin link and the buffers around it."""

    link: str = Field(
        default="none",
        description="rate,latency[,jitter=..][,burst=..] such as 300mbit,25ms; none: no cap; "
        "kernel=rate or kernel=all: what the operating system does of it already",
    )
    verify: Literal["warn", "fail"] = Field(
        default="warn", description="what a node does if the link, measured at the start, is over 10 % off `link`"
    )
    chunk_bytes: int | None = Field(
        default=None,
        ge=64 * 1024,
        le=CHUNK_BYTES_MAX,
        description="parts of a tensor; default: 5 ms of the link's rate, the most without one",
    )
    send_buffer_bytes: int = Field(
        default=16 * 2**20, ge=2**20, description="queued bytes from which a stage waits for its link"
    )
    receive_buffer_bytes: int = Field(
        default=16 * 2**20,
        ge=2**20,
        description="the credit of a neighbour: bytes that it may send ahead of need; more where a message or "
        "the depth of the schedule needs more",
    )
    uncapped_window_bytes: int = Field(
        default=16 * 2**20, ge=2**20, description="unacknowledged bytes where no rate is known"
    )
    greeting_timeout_s: float = Field(
        default=10.0, gt=0, description="how long a new connection may take to say who it is"
    )
    connect_timeout_s: float = Field(
        default=120.0, gt=0, description="how long a node waits for a neighbour to be there"
    )
    progress_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="how long a node waits for one message while all stages are there; default: computed from bytes, "
        "rate and what steps have taken",
    )
    replacement_timeout_s: float = Field(
        default=1800.0, gt=0, description="how long a node holds its state and waits for a lost stage to come back"
    )


class CheckpointSection(Section):
    """When a stage writes its state to disk, and where. Each node may differ: what is written is the same."""

    every: int = Field(
        default=100,
        ge=0,
        description="steps between two checkpoints, and one at the end; 0: none. With pipeline.delay = 1 nodes compare "
        "it",
    )
    keep: int = Field(
        default=3, ge=3, description="newest ones that stay; fewer could leave stages without a common one"
    )
    directory: Path | None = Field(
        default=None, description="a relative one is in the run's directory; default: checkpoints"
    )
    copy_bytes_max: int = Field(
        default=16 * 2**30,
        ge=0,
        description="the largest state of a neighbour that a node keeps copies of (three); 0: none",
    )

    def path(self, out: Path) -> Path:
        """Where the checkpoints of a run are whose records are in `out`."""
        return out / self.directory.expanduser() if self.directory else out / "checkpoints"


class ComputeSection(Section):
    """How a stage computes."""

    device: str = Field(default="cpu", description="where this node computes: cpu, cuda, cuda:1")
    dtype: Literal["float64", "float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast, weights fp32"
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute a layer's inside again in the backward instead of keeping it"
    )
    compile: bool = Field(default=False, description="torch.compile the layers")
    emulate: str | None = Field(
        default=None,
        description="compute nothing and take the time of another machine, such as 150m@4x66tflops; needs "
        "checkpoint.every = 0",
    )


class WatchSection(Section):
    """Who may look at a node while it runs. Each node may differ: nothing of it reaches the arithmetic."""

    prometheus: str = Field(
        default="", description="PORT of this machine, or host:port, where this node serves its figures; none: nowhere"
    )
    tensorboard: bool = Field(default=False, description="write events for TensorBoard beside the records")

    @field_validator("prometheus")
    @classmethod
    def _is_an_endpoint(cls, text: str) -> str:
        return "" if text in ("", "none") else str(MetricsAddress.parse(text))
