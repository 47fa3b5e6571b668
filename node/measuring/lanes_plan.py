"""What averaging between lanes costs in a planned run: bytes, the rate that a lateral link needs, and what steps lose.

The rounds are the run's own (`node.averaging`: when, and of which size), their time on the wire is simulated beside the
pipeline's (`sim.links.lane_rounds`). Each lateral link has the stated rate for itself, as in a run. Only where the
kernel caps an interface is that rate shared: between the links to all other lanes, and with what crosses boundaries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...compress.registry import parse_codec
from ...sim.links.lane_rounds import LaneRounds, simulate_rounds
from ...sim.links.pipeline import Boundary, Rule, StageTimes
from ...sim.links.shaper import LinkProfile
from ..averaging.averager import Averager
from ..averaging.modes import AveragingMode, parse_averaging
from ..averaging.round_plan import Round, RoundPlan
from ..config import RunConfig
from ..links.outgoing import part_bytes_for
from ..model.stage_cut import layer_ranges
from .contribution_sizes import framed_contribution, sized_averager
from .message_sizes import Sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENDLESS = 10**9  # steps: no round of these is the last one
HIDDEN_FROM = 0.995  # of the throughput without averaging: a round that takes less is not worth a word
EVERY = 20  # steps between rounds, where these are advised


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRounds:
    """The rounds of one stage. contribution_bytes: the largest; framed_bytes: that on the wire, to one other lane;
    mean_framed_bytes: of all. wire_s: of the largest. last_s: of the last round, of everything."""

    contribution_bytes: int
    framed_bytes: int
    mean_framed_bytes: float
    wire_s: float
    last_s: float


def lanes_figures(
    config: RunConfig,
    architecture: PretrainedConfig,
    times: Sequence[StageTimes],
    layers: Sequence[int],
    *,
    step_s: float,
    rule: Rule = "duplex",
    inner: bool = False,
) -> dict[str, Any] | None:
    """For `plan`, as JSON holds it; None of one lane.

    layers: of each stage. step_s: of one lane that averages nothing. inner: no stage has embedding or head. Raises
    ConfigError for a mode that does not fit, ModelError and CodecError.
    """
    if config.lanes.count == 1:
        return None
    boundary = Sizes(config, architecture).boundary()
    mode, latency_s = parse_averaging(config.lanes.average), boundary.link.latency_s
    stride, count = mode.every // mode.fragments, config.lanes.count

    def rounds_of(asked: RunConfig) -> list[StageRounds]:
        cycle = _cycle(asked, architecture)
        return [
            stage_rounds(
                sized_averager(asked, architecture, index, of_stage, inner=inner),
                boundary.link,
                _lateral_rate(asked, boundary, index, step_s),
                cycle=cycle,
            )
            for index, of_stage in enumerate(layer_ranges(layers))
        ]

    stages = rounds_of(config)
    held = simulate_rounds(
        config.training_schedule,
        times,
        [boundary] * (len(layers) - 1),
        LaneRounds(
            stride=stride,
            delay=mode.delay,
            wire_s=tuple(stage.wire_s for stage in stages),
            latency_s=latency_s,
            of_gradients=mode.of_gradients,
        ),
        microbatches=config.pipeline.microbatches,
        step_s=step_s,
        rule=rule,
    )
    held_step_s = held.period_s / stride
    slowest = max(range(len(stages)), key=lambda index: stages[index].wire_s)
    sent = [(count - 1) * stage.mean_framed_bytes / stride for stage in stages]  # of a lane, a step
    return {
        "count": count,
        "average": config.lanes.average,
        "every": mode.every,
        "fragments": mode.fragments,
        "delay": mode.delay,
        "step_s": held_step_s,
        "stall_s": held_step_s - step_s,
        "tokens_per_s": count * config.tokens_per_step / held_step_s,
        "share": step_s / held_step_s,
        "bytes_per_token": sum(sent) / config.tokens_per_step,
        "bottleneck": slowest,
        "last_round_s": max(stage.last_s for stage in stages),
        "advice": None if step_s >= HIDDEN_FROM * held_step_s else _advice(config, rounds_of, latency_s, step_s),
        "stages": [
            {
                "contribution_bytes": stage.contribution_bytes,
                "framed_bytes": stage.framed_bytes,
                "bytes_per_step": nbytes,
                "bytes_per_token": nbytes / config.tokens_per_step,
                "round_s": stage.wire_s + latency_s,
                "mean_bits_per_s": stage.mean_framed_bytes * 8 / (stride * step_s),
                "peak_bits_per_s": _peak_rate(stage, mode, latency_s, step_s),
                "hidden": _hidden(stage.wire_s, latency_s, step_s, stride, mode.delay),
                "wait_s": waited_s / stride,
            }
            for stage, nbytes, waited_s in zip(stages, sent, held.waited_s, strict=True)
        ],
    }


def stage_rounds(averager: Averager, link: LinkProfile, rate_bits_per_s: float | None, *, cycle: int) -> StageRounds:
    """link: for how it cuts a contribution into parts. rate_bits_per_s: of a lateral link; None is uncapped. cycle:
    rounds after which sizes repeat."""
    mode, part_bytes = averager.mode, part_bytes_for(link)

    def framed(rounds: Sequence[Round]) -> list[int]:
        sizes = Counter(averager.contribution_bytes(each) for each in rounds)
        known = {size: framed_contribution(size, round=1, part_bytes=part_bytes) for size in sizes}
        return [known[size] for size in sizes.elements()]

    def wire_s(nbytes: float) -> float:
        return nbytes * 8 / rate_bits_per_s if rate_bits_per_s else 0.0

    plan = RoundPlan(mode, ENDLESS)
    usual = [plan.round(number) for number in range(cycle)]
    sizes = framed(usual)
    return StageRounds(
        contribution_bytes=max(averager.contribution_bytes(each) for each in usual),
        framed_bytes=max(sizes),
        mean_framed_bytes=sum(sizes) / len(sizes),
        wire_s=wire_s(max(sizes)),
        last_s=wire_s(sum(framed(RoundPlan(mode, mode.every).made_at(mode.every)))) + link.latency_s,
    )


def _cycle(config: RunConfig, architecture: PretrainedConfig) -> int:
    """Rounds after which sizes repeat: fragments take turns; gradients bring that of a learned table now and then."""
    mode = parse_averaging(config.lanes.average)
    table = parse_codec(config.codec.codec).codec.table(architecture.hidden_size)
    return max(1, table.every) if mode.of_gradients and table else mode.fragments


def _lateral_rate(config: RunConfig, boundary: Boundary, stage: int, step_s: float) -> float | None:
    """Of one lateral link of that stage, in bits/s."""
    rate, others = boundary.link.rate_bits_per_s, config.lanes.count - 1
    if rate is None or not boundary.link.kernel:
        return rate
    last = config.pipeline.stages - 1
    below, above = stage < last, stage > 0
    sent = config.pipeline.microbatches * (below * boundary.forward_bytes + above * boundary.backward_bytes)
    fair = rate / (others + below + above)  # what TCP leaves each connection of a full interface, about
    return max(fair, (rate - sent * 8 / step_s) / others)


def _hidden(wire_s: float, latency_s: float, step_s: float, stride: int, delay: int) -> bool:
    """Whether the steps until a round is used last longer than it travels, and it has left before the next one."""
    return wire_s + latency_s <= delay * step_s and wire_s <= stride * step_s


def _peak_rate(stage: StageRounds, mode: AveragingMode, latency_s: float, step_s: float) -> float | None:
    """In bits/s, at which a contribution has arrived when it is used; None where no rate would do."""
    left_s = mode.delay * step_s - latency_s
    return stage.framed_bytes * 8 / left_s if left_s > 0 else None


def _advice(
    config: RunConfig, rounds_of: Callable[[RunConfig], list[StageRounds]], latency_s: float, step_s: float
) -> str | None:
    """The next way to average whose rounds nobody waits for; None where none can be named."""
    spec = config.lanes.average
    if parse_averaging(spec).of_gradients:
        spec = f"outer:every={EVERY}"
    mode = parse_averaging(spec)
    asked = config.model_copy(update={"lanes": config.lanes.model_copy(update={"average": spec})})
    wire_s = max(stage.wire_s for stage in rounds_of(asked))
    delay = max(mode.delay, 1, math.ceil((wire_s + latency_s) / step_s))
    stride = max(mode.every // mode.fragments, math.ceil(wire_s / step_s))
    every = mode.fragments * max(stride, delay // mode.fragments + 1)  # above the delay
    changed = {name: value for name, value in (("every", every), ("delay", delay)) if value != getattr(mode, name)}
    found = with_options(spec, changed)
    return None if found == config.lanes.average else f"nobody waits with --average {found}"


def with_options(spec: str, options: dict[str, int]) -> str:
    """The same way to average with these options, such as `every`, in the place of its own."""
    name, _, rest = spec.partition(":")
    items = [(each.partition("=")[0].strip(), each) for each in rest.split(",") if each]
    items = [(key, f"{key}={options[key]}" if key in options else each) for key, each in items]
    known = {key for key, _ in items}
    fresh = [(option, f"{option}={value}") for option, value in options.items() if option not in known]
    at = next((place for place, (key, _) in enumerate(items) if key == "format"), len(items))  # then come its own
    return f"{name.strip()}:{','.join(each for _, each in [*items[:at], *fresh, *items[at:]])}"
