"""What a run would do on given machines and links, without running it: `thinpipe plan`.

Everything that can be known is taken from where it is true: message sizes from the byte formats and the framing that
nodes use, the order of work from the schedule that they execute (`sim.pipeline` charges it to a virtual clock), the
multiplications from the model's own shapes. What cannot be known is how fast a machine computes; that is given, as a
rate that it achieves (`--pace 150m@4x66tflops`) or by a run that was measured (`--from RUN`).

A multiply-add is two operations; a weight matrix takes one for each of its numbers and token forward, twice that
backward, once for the input gradient and once for its own; attention takes 2 T D a token and layer more (its products
with keys and values, half of them masked), and has no weights. The
optimizer, norms and the codec's work are left out of `--pace`, and are in what a run measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compress.bits import packed_bytes
from ..compress.boundary import BoundaryContext, ByteFormat, CodecError, LearnedTable
from ..compress.registry import parse_codec
from ..protocol.delta import DIGEST_BYTES, encode_delta, join_deltas
from ..protocol.dictionary import Publisher
from ..protocol.messages import Kind, Message
from ..protocol.schedule import get_schedule
from ..protocol.selection import budget
from ..sim.pipeline import Boundary, Rule, Simulation, StageTimes, simulate
from ..sim.report import read_records
from ..sim.shaper import LinkError, LinkProfile
from .config import ConfigError, RunConfig
from .data import DataError, vocabulary_size
from .host import check_codec
from .model import ModelError, partition, resolve_model
from .model.slices import skeleton
from .one_process import accounted
from .outgoing import chunk_bytes_for
from .ports import BoundaryShape
from .projector_gradient import gradient_bytes
from .stage import DTYPES
from .tables import dictionary_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLANNED = (ConfigError, CodecError, LinkError, ModelError, DataError)  # what cannot be planned
VOCABULARY = 32768  # of a paced model, unless model.vocab_size says otherwise: no text is read for a plan
_PACE = re.compile(r"(?P<preset>[a-z0-9]+)@(?P<stages>[1-9][0-9]*)x(?P<tflops>[0-9]+(?:\.[0-9]+)?)tflops")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Stages that achieve `tflops` each on a preset."""

    preset: str
    stages: int
    tflops: float

    @classmethod
    def parse(cls, text: str) -> Pace:
        """Raises ConfigError."""
        match = _PACE.fullmatch(text)
        if match is None or float(match["tflops"]) <= 0:
            raise ConfigError(f"a pace is PRESET@STAGESxRATEtflops, such as 150m@4x66tflops; got '{text}'")
        return cls(preset=match["preset"], stages=int(match["stages"]), tflops=float(match["tflops"]))

    def settings(self) -> dict[str, Any]:
        """Of a run at this pace: a step of 262,144 tokens, unless the user says otherwise."""
        return {
            "model.preset": self.preset,
            "pipeline.stages": self.stages,
            "pipeline.batch_size": 256,
            "pipeline.microbatches": 64,
            "data.sequence_length": 1024,
        }


def times_at(config: RunConfig, architecture: PretrainedConfig, tflops: float) -> list[StageTimes]:
    """Seconds of each stage at that rate."""
    cuts = partition(architecture.num_hidden_layers, config.pipeline.stages)
    causal = skeleton(architecture, DTYPES["float32"])
    matrices = sum(p.numel() for name, p in causal.named_parameters() if p.ndim == 2 and ".layers." in name)
    per_layer = matrices / architecture.num_hidden_layers
    attention = 2 * config.data.sequence_length * architecture.hidden_size
    head = architecture.vocab_size * architecture.hidden_size
    tokens = config.microbatch_size * config.data.sequence_length
    times = []
    for stage, layers in enumerate(cuts):
        last = stage == len(cuts) - 1
        weights = tokens * (len(layers) * 2 * per_layer + (2 * head if last else 0))
        forward, rate = weights + tokens * len(layers) * attention, tflops * 1e12
        times.append(StageTimes(forward_s=forward / rate, backward_s=2 * forward / rate, weight_s=weights / rate))
    return times


def times_measured(run: Path, config: RunConfig) -> list[StageTimes]:
    """Seconds of each stage in a run on record: medians of its steps, codec work included; a forward counts a third,
    weight gradients another. Raises ConfigError for a run that has no steps."""
    times = []
    for stage in range(config.pipeline.stages):
        path = run / f"stage-{stage}.jsonl"
        records = read_records(path) if path.exists() else []
        steps = [record for record in records if record["event"] == "step"][1:]  # the first one warms up
        if not steps:
            raise ConfigError(f"{run} has no second step of stage {stage} on record; name the --out of a finished run")
        compute_s = float(np.median([step["compute_s"] + step["codec_s"] for step in steps]))
        each = compute_s / config.pipeline.microbatches
        times.append(StageTimes(forward_s=each / 3, backward_s=each * 2 / 3))
    return times


def boundary_of(config: RunConfig, architecture: PretrainedConfig) -> Boundary:
    """What crosses each boundary for one microbatch, framed, once the dictionaries have begun; what crosses once in
    some steps is spread over all messages."""
    codec = parse_codec(config.codec.codec, config.codec.forward, config.codec.backward)
    context = BoundaryContext(seed=0, boundary=0, width=architecture.hidden_size, vocab_size=architecture.vocab_size)
    shape = BoundaryShape.of(
        codec,
        context,
        microbatch_size=config.microbatch_size,
        sequence_length=config.data.sequence_length,
        microbatches=config.pipeline.microbatches,
    )
    link = LinkProfile.parse(config.link.link)
    chunk_bytes = config.link.chunk_bytes or chunk_bytes_for(link)

    def framed(message: Message) -> int:
        return sum(accounted(message, chunk_bytes).values())

    def tensor(kind: Kind, fmt: ByteFormat, *tables: LearnedTable | None, token_ids: bytes = b"") -> int:
        """Framed bytes of a message, but for changes of a table that does not change with each."""
        known = [table for table in tables if table]
        named = {table.name: [0, 1000, 1, 0, bytes(DIGEST_BYTES)] for table in known}
        return framed(
            Message(
                kind=kind,
                step=1000,
                microbatch=1,
                codec=fmt.id,
                codec_header={"shape": list(shape.z_shape), **named},
                token_ids=token_ids,
                dictionary=join_deltas(_change(table) for table in known if table.streamed),
                body=bytes(fmt.body_bytes(shape.z_shape)),
            )
        )

    ids = bytes(packed_bytes(shape.token_ids, shape.token_id_bits))
    table, width = shape.table, shape.wire_width
    forward = tensor(Kind.ACTIVATION, shape.forward, table, shape.forward.table(width), token_ids=ids)
    backward = tensor(Kind.GRADIENT, shape.backward, shape.backward.table(width))
    if table and table.every:
        messages = table.every * config.pipeline.microbatches
        forward += round(len(join_deltas([_change(table)])) / messages)
        if table.gradient:
            body, header = bytes(gradient_bytes(table)), {"shape": [table.entries, table.width]}
            backward += round(
                framed(Message(kind=Kind.PROJECTOR_GRADIENT, step=1000, microbatch=0, codec_header=header, body=body))
                / messages
            )
    return Boundary(forward_bytes=forward, backward_bytes=backward, link=link)


def _change(table: LearnedTable) -> bytes:
    """A change of the table as it usually is: of the second message and later."""
    spec = dictionary_of(table, DTYPES["float32"])
    publisher, zeros = Publisher(spec, 0), np.zeros((table.entries, table.width), np.float32)
    publisher.publish(zeros, step=0, microbatch=0)
    count = budget(table.policy, table.divisor, table.entries)
    entries = None if count == table.entries else np.arange(count)
    return encode_delta(publisher.publish(zeros, step=1, microbatch=0, entries=entries))


def plan(
    config: RunConfig,
    architecture: PretrainedConfig,
    times: Sequence[StageTimes],
    *,
    rule: Rule = "duplex",
) -> tuple[dict[str, Any], Simulation]:
    """The figures, as JSON holds them, and the simulation that they are from."""
    boundary, stages = boundary_of(config, architecture), config.pipeline.stages
    simulated = simulate(
        get_schedule(config.pipeline.schedule),
        times,
        [boundary] * (stages - 1),
        microbatches=config.pipeline.microbatches,
        rule=rule,
    )
    free = LinkProfile(rate_bits_per_s=None)
    uncapped = simulate(
        get_schedule(config.pipeline.schedule),
        times,
        [Boundary(forward_bytes=0, backward_bytes=0, link=free)] * (stages - 1),
        microbatches=config.pipeline.microbatches,
    )
    tokens = config.microbatch_size * config.data.sequence_length
    dense_bytes, rate = 2 * tokens * architecture.hidden_size, boundary.link.rate_bits_per_s
    both = boundary.forward_bytes + boundary.backward_bytes
    return {
        "schedule": config.pipeline.schedule,
        "link": str(boundary.link),
        "step_s": simulated.step_s,
        "tokens_per_s": config.tokens_per_step / simulated.step_s,
        "uncapped_tokens_per_s": config.tokens_per_step / uncapped.step_s,
        "bottleneck": simulated.bottleneck,
        "bytes_per_microbatch": {"forward": boundary.forward_bytes, "backward": boundary.backward_bytes},
        "ratio": 2 * dense_bytes / both,
        "stages": [
            {
                "forward_s": each.forward_s,
                "backward_s": each.backward_s,
                "weight_gradient_s": each.weight_gradient_s,
                "compute_share": simulated.compute_share[stage],
                "microbatches_in_flight": simulated.peak_in_flight[stage],
            }
            for stage, each in enumerate(times)
        ],
        "boundaries": [
            {
                "forward_share": simulated.wire_share[stage, stage + 1],
                "backward_share": simulated.wire_share[stage + 1, stage],
                # Each direction of a full-duplex link may take as long as the slower neighbour computes.
                "compute_bound_at_ratio": rate
                and dense_bytes * 8 / rate / max(each.forward_s + each.backward_s for each in times[stage : stage + 2]),
            }
            for stage in range(stages - 1)
        ],
    }, simulated


def planned(
    config: RunConfig, paced: Pace | None, measured: Path | None, *, rule: Rule
) -> tuple[dict[str, Any], Simulation]:
    """`plan`, at a pace or with the times of a run on record. Raises what PLANNED names."""
    given = config.model.vocab_size
    vocabulary = vocabulary_size(config.data, given) if measured else given or VOCABULARY
    length = config.data.sequence_length
    architecture = resolve_model(config.model, vocab_size=vocabulary, sequence_length=length)
    check_codec(config, architecture)
    if paced:
        times = times_at(config, architecture, paced.tflops)
    else:
        assert measured is not None
        times = times_measured(measured, config)
    return plan(config, architecture, times, rule=rule)


def events(simulated: Simulation) -> list[dict[str, Any]]:
    """The simulated spans in the Chrome trace format, as nodes write theirs (`sim.trace` draws both)."""
    found = []
    for span in simulated.spans:
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(span.action).__name__).lower()  # as nodes name their jobs
        name = "optimizer step" if kind == "step" else f"{kind} {getattr(span.action, 'microbatch', '')}"
        if span.sender is None:
            process, lane = span.stage, "compute"
        else:
            process, lane = span.sender, f"boundary {min(span.sender, span.stage)}-{max(span.sender, span.stage)}"
        found.append(
            {
                "ph": "X",
                "pid": process,
                "tid": lane,
                "name": name,
                "ts": span.start_s * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
            }
        )
    return found
