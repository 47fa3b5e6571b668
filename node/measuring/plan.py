"""`thinpipe plan`: predicts what a run would do on given machines and links, without running it.

Everything that is known is taken from its source: message sizes from the byte formats and the framing that
nodes use, the order of work from the schedule that they execute (`sim.links.pipeline` charges it to a virtual clock),
the multiplications from the model's own shapes. What cannot be known is how fast a machine computes; that is given, as
a rate that it achieves (`--emulate 150m@4x66tflops`) or by a run that was measured (`--from RUN`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compress.byte_format import CodecError
from ...sim.links.pipeline import Boundary, Rule, Simulation, StageTimes, simulate
from ...sim.links.shaper import LinkError, LinkProfile
from ...sim.reports.cut_advice import WORTH_SAYING
from ..config import ConfigError, RunConfig
from ..config_file import load_config
from ..data import DataError
from ..model import ModelError, resolve_model
from ..preparation import check_codec, check_lanes, resolve_architecture
from ..stage_costs import best_order, speeds, stage_layers
from .chunks_plan import StageExchange, bottleneck_with, chunks_figures, exchange_of
from .emulated_machine import VOCABULARY, EmulatedMachine
from .lanes_plan import lanes_figures
from .message_sizes import Sizes
from .schedule_search import resolved_schedule, with_pipeline
from .stage_times import times_measured, times_recut

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLANNED = (ConfigError, CodecError, LinkError, ModelError, DataError)  # what cannot be planned


def plan(
    config: RunConfig,
    architecture: PretrainedConfig,
    times: Sequence[StageTimes],
    *,
    rule: Rule = "duplex",
    layers: Sequence[int] | None = None,
    exchange: StageExchange | None = None,
) -> tuple[dict[str, Any], Simulation]:
    """The figures, of one lane, as JSON holds them, and the simulation that they are from. layers: of each stage, where
    they are not those of the whole model. exchange: of these times, where lanes wait for keys and values."""
    sizes, stages = Sizes(config, architecture), config.pipeline.stages
    boundary = sizes.boundary()
    layers = layers or [len(of_stage) for of_stage in stage_layers(config, architecture)]
    held = exchange.held if exchange else times
    took_s = [each.mean_forward_s + each.mean_backward_s for each in held]
    simulated = simulate(
        config.training_schedule,
        held,
        [boundary] * (stages - 1),
        microbatches=config.pipeline.microbatches,
        rule=rule,
        delay=config.pipeline.delay,
    )
    free = LinkProfile(rate_bits_per_s=None)
    uncapped = simulate(
        config.training_schedule,
        exchange.instant if exchange else times,
        [Boundary(forward_bytes=0, backward_bytes=0, link=free)] * (stages - 1),
        microbatches=config.pipeline.microbatches,
        delay=config.pipeline.delay,
    )
    tokens = config.microbatch_size * config.lane_tokens
    dense_bytes, rate = 2 * tokens * architecture.hidden_size, boundary.link.rate_bits_per_s
    norm_bytes = boundary.norm_bytes / config.pipeline.microbatches
    forward_bytes, backward_bytes = (each + norm_bytes for each in (boundary.forward_bytes, boundary.backward_bytes))
    return {
        "schedule": config.pipeline.schedule,
        "delay": config.pipeline.delay,
        "link": str(boundary.link),
        "step_s": simulated.step_s,
        "tokens_per_s": config.tokens_per_step / simulated.step_s,
        "uncapped_tokens_per_s": config.tokens_per_step / uncapped.step_s,
        "bottleneck": bottleneck_with(exchange, simulated.bottleneck) if exchange else simulated.bottleneck,
        "machines_used": _machines_used(config, times, simulated.step_s),
        "bytes_per_microbatch": {"forward": round(forward_bytes), "backward": round(backward_bytes)},
        "ratio": 2 * dense_bytes / (forward_bytes + backward_bytes),
        "stages": [
            {
                "layers": layers[stage],
                "forward_s": each.mean_forward_s,
                "backward_s": each.mean_backward_s,
                "weight_gradient_s": each.weight_gradient_s,
                "compute_share": simulated.compute_share[stage]
                * (1 - exchange.waiting_share(stage) if exchange else 1),
                "microbatches_in_flight": in_flight,
                "activation_bytes_in_flight": in_flight * _saved_bytes(config, architecture, layers[stage])
                + (exchange.stored_bytes(stage, in_flight) if exchange else 0),
            }
            for stage, (each, in_flight) in enumerate(zip(held, simulated.peak_in_flight, strict=True))
        ],
        "boundaries": [
            {
                "forward_share": simulated.wire_share[stage, stage + 1],
                "backward_share": simulated.wire_share[stage + 1, stage],
                # Each direction of a full-duplex link may take as long as the slower neighbour computes.
                "compute_bound_at_ratio": rate and dense_bytes * 8 / rate / max(took_s[stage : stage + 2]),
                "budget_bits": rate and sizes.budget_bits(rate * max(took_s[stage : stage + 2]), boundary),
            }
            for stage in range(stages - 1)
        ],
    }, simulated


def _machines_used(config: RunConfig, times: Sequence[StageTimes], step_s: float) -> float:
    """What the stages compute in a step, as a share of what their machines could, each by its speed."""
    fast = speeds(config)
    done = sum((each.forward_s + each.backward_s) * speed for each, speed in zip(times, fast, strict=True))
    return config.pipeline.microbatches * done / sum(fast) / step_s


def _saved_bytes(config: RunConfig, architecture: PretrainedConfig, layers: int) -> int:
    """About what so many layers keep of one microbatch for their backward, in 16 bits, with fused attention and without
    activation checkpointing: 34 bytes a token, layer and unit of width (Korthikanti et al., arXiv 2205.05198, eq. 2
    less the attention scores). What a head keeps is left out."""
    return 34 * config.microbatch_size * config.lane_tokens * architecture.hidden_size * layers


def planned(
    config: RunConfig, emulated: EmulatedMachine | None, measured: Path | None, *, schedule: str, rule: Rule
) -> tuple[dict[str, Any], Simulation]:
    """`plan`, at a pace or with the times of a run on record, of a schedule that may have to be found. Besides,
    what averaging between lanes costs (None: there is one), what keys and values between chunks do (None: there are
    none), what the cut gains over stages of equal length, and an order of the machines that is faster: None where there
    is nothing to gain, or where nobody knows. Raises what PLANNED names."""
    check_lanes(config, trains=False)
    if config.context.method and rule != "duplex":
        raise ConfigError(
            f"--rule {rule} is for the links of one chain, and chunks have others between lanes; omit it, or say "
            "--link RATE,LATENCY,kernel=rate for an interface that all links of a node share"
        )
    if emulated:
        # A model from a directory has a vocabulary of its own.
        vocabulary = None if config.model.path else config.model.vocab_size or VOCABULARY
        length = config.data.sequence_length
        architecture = resolve_model(config.model, vocab_size=vocabulary, sequence_length=length)
        check_codec(config, architecture)
        times = emulated.times(config, architecture)
        layers = [len(of_stage) for of_stage in emulated.layers(config, architecture)]
    else:
        assert measured is not None
        ran, architecture = load_config(measured / "run.toml"), resolve_architecture(config)
        check_codec(config, architecture)
        times = times_recut(ran, config, architecture, times_measured(measured, ran), ran=resolve_architecture(ran))
        layers = [len(of_stage) for of_stage in stage_layers(config, architecture)]
    of_run = config.compute.emulate and EmulatedMachine.parse(config.compute.emulate)
    inner = bool((machine := emulated or of_run) and machine.part)
    exchange = exchange_of(config, architecture, times, layers, inner=inner)
    held = exchange.held if exchange else times
    config = with_pipeline(config, schedule=resolved_schedule(schedule, config, architecture, held, rule=rule))
    figures, simulated = plan(config, architecture, times, rule=rule, layers=layers, exchange=exchange)
    step_s = figures["step_s"]
    lanes = lanes_figures(config, architecture, held, layers, step_s=step_s, rule=rule, inner=inner)
    figures |= {"lanes": lanes, "chunks": None, "gain_over_equal_cut": None, "better_order": None}
    if exchange and lanes:
        figures["chunks"] = chunks_figures(
            config,
            architecture,
            exchange,
            Sizes(config, architecture).boundary(),
            uncapped_step_s=config.tokens_per_step / figures["uncapped_tokens_per_s"],
            step_s=step_s,
            in_flight=simulated.peak_in_flight,
            lanes=lanes,
        )
    if emulated and emulated.knows_cuts and emulated.stages <= architecture.num_hidden_layers:

        def found_for(**pipeline: Any) -> dict[str, Any]:
            other = with_pipeline(config, **pipeline)
            of_stages = emulated.times(other, architecture)
            counts = [len(of_stage) for of_stage in emulated.layers(other, architecture)]
            waits = exchange_of(other, architecture, of_stages, counts)
            deep = resolved_schedule(schedule, other, architecture, waits.held if waits else of_stages, rule=rule)
            return plan(with_pipeline(other, schedule=deep), architecture, of_stages, rule=rule, exchange=waits)[0]

        before = found_for(cut="equal")
        if [stage["layers"] for stage in before["stages"]] != layers:
            figures["gain_over_equal_cut"] = figures["tokens_per_s"] / before["tokens_per_s"]
        order = best_order(config, architecture)
        if config.pipeline.cut == "auto" and order != speeds(config):
            gain = found_for(speeds=tuple(order))["tokens_per_s"] / figures["tokens_per_s"]
            if gain >= WORTH_SAYING:
                figures["better_order"] = {"speeds": order, "gain": gain}
    return figures, simulated


def events(simulated: Simulation) -> list[dict[str, Any]]:
    """The simulated spans in the Chrome trace format, as nodes write theirs (`sim.reports.trace` draws both)."""
    found = []
    for span in simulated.spans:
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(span.action).__name__).lower()  # as nodes name their jobs
        alone = {"step": "optimizer step", "reduce norm": "gradient norm", "broadcast norm": "gradient norm"}
        name = alone.get(kind) or f"{kind} {getattr(span.action, 'microbatch', '')}"
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
