"""Chunks in a planned run: what keys and values between lanes make of each stage's times, and what a step loses by it.

`StageExchange` gives the times of all stages with their waits, for the link of the run or for another one; a pipeline
is simulated with these. `chunks_figures` says where a step's time goes: computing, boundaries of stages, keys and
values, averaging. Each part is what it adds to a step in which the parts before it are there, since parts hide behind
one another and no sum of them alone would be a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...protocol.stage_orders import PREFIX
from ...sim.links.context_exchange import ContextTimes, ContextWork, Route, simulate_context
from ...sim.links.pipeline import Boundary, Rule, StageTimes, simulate
from ...sim.links.shaper import LinkProfile
from ..config import RunConfig
from ..stage_costs import operations
from .context_plan import ContextSizes, context_sizes, context_work, stored_bytes, widths, with_exchange

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SETTLED = 10**9  # a step by which every method is as narrow as it gets
FREE = LinkProfile(rate_bits_per_s=None)
BINDS_FROM = 0.5  # of a stage's time: more waiting than computing


class StageExchange:
    """Keys and values between the lanes of each stage. times: of a microbatch, of a lane with the mean attention, which
    waits for nobody; layers: of each stage. inner: no stage has a head, and all have two boundaries. Raises CodecError.
    """

    def __init__(
        self,
        config: RunConfig,
        architecture: PretrainedConfig,
        times: Sequence[StageTimes],
        layers: Sequence[int],
        *,
        inner: bool = False,
    ) -> None:
        self._config, self._architecture, self._inner = config, architecture, inner
        self.times, self.layers, self.link = list(times), list(layers), LinkProfile.parse(config.link.link)
        self._costs = costs = operations(config, architecture)
        self._others = [2 * costs.codec_end] * len(layers) if inner else costs.of_ends(len(layers))
        self._found: dict[tuple[ContextWork, LinkProfile, Route, bool, int], ContextTimes] = {}  # most stages are alike
        self.sizes, self.first_sizes = (context_sizes(config, architecture, step=step) for step in (SETTLED, 0))

    @cached_property
    def held(self) -> list[StageTimes]:
        """With the waits of the run's own link: a wire to each other lane, or one interface where the kernel caps."""
        return self.over(self.link)

    def with_in_flight(self, config: RunConfig) -> StageExchange:
        """Of the same run with another number of microbatches in flight."""
        return StageExchange(config, self._architecture, self.times, self.layers, inner=self._inner)

    @cached_property
    def instant(self) -> list[StageTimes]:
        """As if all arrived at once: of the lane that computes the most."""
        return self.over(FREE)

    def over(
        self,
        link: LinkProfile,
        *,
        route: Route = "direct",
        interface: bool | None = None,
        sizes: ContextSizes | None = None,
    ) -> list[StageTimes]:
        """With the waits of another link, way or size. interface: all links of a lane share the rate; None: as the run
        has it."""
        stages = range(len(self.layers))
        return [self._stage(stage, link, route, interface, sizes or self.sizes)[0] for stage in stages]

    def exposed_s(self, held: Sequence[StageTimes]) -> list[tuple[float, float]]:
        """What the exchange adds to each stage's layer, forward and backward."""
        return [
            (
                (each.mean_forward_s - free.mean_forward_s) / max(1, layers),
                (each.mean_backward_s - free.mean_backward_s) / max(1, layers),
            )
            for each, free, layers in zip(held, self.instant, self.layers, strict=True)
        ]

    def waiting_share(self, stage: int) -> float:
        """Of the stage's time for a microbatch."""
        held, free = self.held[stage], self.instant[stage]
        computes_s = free.mean_forward_s + free.mean_backward_s
        return 1 - computes_s / (held.mean_forward_s + held.mean_backward_s)

    def stored_bytes(self, stage: int, in_flight: int) -> int:
        """What a lane keeps of others' segments until its backwards."""
        return stored_bytes(self._config, self.sizes, layers=self.layers[stage], in_flight=in_flight)

    def sent_bytes(self, stage: int) -> tuple[int, int]:
        """In a microbatch, both ways: of all lanes together, and of the one that sends the most."""
        _, found = self._stage(stage, FREE, "direct", None, self.sizes)
        by_lane = [0] * self._config.lanes.count
        for (sender, _), nbytes in found.sent_bytes.items() if found else ():
            by_lane[sender] += nbytes
        return sum(by_lane), max(by_lane)

    def work(self, stage: int, sizes: ContextSizes | None = None) -> ContextWork | None:
        """Of the stage in all lanes; None: it has no layers."""
        times, layers, other = self.times[stage], self.layers[stage], self._others[stage]
        if not layers:
            return None
        return context_work(
            self._config,
            self._architecture,
            self._costs,
            sizes or self.sizes,
            times,
            layers=layers,
            other_operations=other,
        )

    def _stage(
        self, stage: int, link: LinkProfile, route: Route, interface: bool | None, sizes: ContextSizes
    ) -> tuple[StageTimes, ContextTimes | None]:
        """Of a stage without layers: its times as they were, and None."""
        if (work := self.work(stage, sizes)) is None:
            return self.times[stage], None
        found: list[ContextTimes] = []
        for in_flight in range(1, self._config.in_flight + 1):
            case = (work, link, route, bool(self.link.kernel) if interface is None else interface, in_flight)
            if case not in self._found:
                self._found[case] = simulate_context(work, link, route=route, interface=case[3], in_flight=in_flight)
            found.append(self._found[case])
        one, two = found[0], found[1] if found[1:] else None
        return with_exchange(self.times[stage], one, two), one


def exchange_of(
    config: RunConfig,
    architecture: PretrainedConfig,
    times: Sequence[StageTimes],
    layers: Sequence[int],
    *,
    inner: bool = False,
) -> StageExchange | None:
    """None where lanes hold different sequences."""
    return StageExchange(config, architecture, times, layers, inner=inner) if config.context.method else None


def with_other_in_flight(config: RunConfig) -> RunConfig | None:
    """The same run with two microbatches in flight and not one, or the other way round; None: that cannot be."""
    if config.pipeline.microbatches == 1 or config.pipeline.schedule.startswith(PREFIX):
        return None
    context = config.context.model_copy(update={"in_flight": 3 - config.in_flight})
    return config.model_copy(update={"context": context})


def bottleneck_with(exchange: StageExchange, bottleneck: str) -> str:
    """What is busiest, where a stage may be so by waiting for other lanes."""
    stage = bottleneck.removeprefix("compute of stage ")
    waits = stage.isdigit() and exchange.waiting_share(int(stage)) > BINDS_FROM
    return f"keys and values of stage {stage}" if waits else bottleneck


def chunks_figures(
    config: RunConfig,
    architecture: PretrainedConfig,
    exchange: StageExchange,
    boundary: Boundary,
    *,
    uncapped_step_s: float,
    step_s: float,
    in_flight: Sequence[int],
    lanes: dict[str, Any],
    rule: Rule = "duplex",
) -> dict[str, Any]:
    """For `plan`, as JSON holds it; otherwise_tokens_per_s: with one microbatch in flight and not two, or the other way
    round, None where that cannot be. uncapped_step_s: of a step without links; step_s: with boundaries, keys and
    values; in_flight: microbatches, of each stage; lanes: the figures of `lanes_plan`. tokens/s are of all lanes."""
    count, stages = config.lanes.count, range(len(exchange.layers))

    def seconds(times: Sequence[StageTimes], of: RunConfig = config) -> float:
        boundaries = [boundary] * (len(times) - 1)
        microbatches = config.pipeline.microbatches
        return simulate(of.training_schedule, times, boundaries, microbatches=microbatches, rule=rule).step_s

    def tokens_per_s(seconds: float) -> float:
        return count * config.tokens_per_step / seconds

    def way(link: LinkProfile, **more: Any) -> dict[str, Any]:
        times = exchange.over(link, **more)
        forward_s, backward_s = (max(ways) for ways in zip(*exchange.exposed_s(times), strict=True))
        rate = tokens_per_s(seconds(times))
        return {"tokens_per_s": rate, "exposed_forward_s": forward_s, "exposed_backward_s": backward_s}

    link, sizes, first = exchange.link, exchange.sizes, exchange.first_sizes
    instant_step_s = seconds(exchange.instant)
    goes_to = {
        "computing": uncapped_step_s,
        "boundaries": max(0.0, instant_step_s - uncapped_step_s),  # below 0 by rounding
        "keys_and_values": max(0.0, step_s - instant_step_s),
        "averaging": max(0.0, lanes["stall_s"]),
    }
    otherwise = None
    if other := with_other_in_flight(config):
        otherwise = tokens_per_s(seconds(exchange.with_in_flight(other).held, other))
    no_latency = way(replace(link, latency_s=0.0, jitter_s=0.0))
    no_cap = way(replace(FREE, latency_s=link.latency_s))
    exposed = exchange.exposed_s(exchange.held)
    sent = [exchange.sent_bytes(stage) for stage in stages]
    of_microbatch = count * config.microbatch_size * config.lane_tokens
    dense_bytes = 2 * 2 * widths(architecture)[1]
    forward_bytes, backward_bytes = sizes.forward_bytes / sizes.tokens, sizes.backward_bytes / sizes.tokens
    return {
        "count": count,
        "method": config.context.method,
        "order": config.context.order,
        "segment_length": config.chunk_layout.segment_length,
        "in_flight": config.in_flight,
        "otherwise_tokens_per_s": otherwise,
        "bytes_per_token": {"forward": forward_bytes, "backward": backward_bytes, "dense": dense_bytes},
        "ratio": 2 * dense_bytes / (forward_bytes + backward_bytes),
        "sent_bytes_per_token": sum(total for total, _ in sent) / of_microbatch,
        "tokens_per_s": tokens_per_s(step_s),
        "uncapped_tokens_per_s": tokens_per_s(uncapped_step_s),
        "step_goes_to_s": goes_to,
        "bounded_by": _bounded_by(goes_to, exchange, lanes, no_latency, no_cap),
        "bounded_before_averaging_by": _bounded_by({**goes_to, "averaging": 0.0}, exchange, lanes, no_latency, no_cap),
        "no_latency_tokens_per_s": no_latency["tokens_per_s"],
        "no_cap_tokens_per_s": no_cap["tokens_per_s"],
        "ways": [
            {"route": route, "links": name, **way(link, route=route, interface=interface)}
            for interface, name in ((False, "each its own rate"), (True, "all of a lane share one"))
            for route in ("direct", "ring")
        ],
        "unsent_bytes": max(sizes.forward_bytes, sizes.backward_bytes) * config.chunk_layout.segments_per_lane,
        "send_buffer_bytes": config.link.send_buffer_bytes,
        "at_first": None
        if first == sizes
        else {
            "forward_bytes_per_token": first.forward_bytes / first.tokens,
            "backward_bytes_per_token": first.backward_bytes / first.tokens,
            **way(link, sizes=first),
        },
        "stages": [
            {
                "exposed_forward_s": exposed[stage][0],
                "exposed_backward_s": exposed[stage][1],
                "waiting_share": exchange.waiting_share(stage),
                "sent_bytes_per_microbatch": sent[stage][1],
                "stored_bytes_in_flight": exchange.stored_bytes(stage, in_flight[stage]),
            }
            for stage in stages
        ],
    }


def _bounded_by(
    goes_to: dict[str, float],
    exchange: StageExchange,
    lanes: dict[str, Any],
    no_latency: dict[str, Any],
    no_cap: dict[str, Any],
) -> str:
    """What most of a step goes to, in words."""

    def slowest(times: Sequence[StageTimes]) -> int:
        return max(range(len(times)), key=lambda stage: times[stage].mean_forward_s + times[stage].mean_backward_s)

    match max(goes_to, key=goes_to.__getitem__):
        case "computing":
            return f"compute of stage {slowest(exchange.instant)}"
        case "boundaries":
            return "the links between stages"
        case "averaging":
            return f"averaging of stage {lanes['bottleneck']}"
        case _:
            why = "rate" if no_cap["tokens_per_s"] > no_latency["tokens_per_s"] else "latency"
            return f"keys and values of stage {slowest(exchange.held)}, by the {why} of their links"
