"""What a finished run says of the choices that were not made: dense bf16 over the same link, both over a thinner one,
from which rate on a link no longer holds the stages up, and what to try next.

The stages' times are this run's own (`stage_times.times_measured`), the sizes those of each codec's messages, the rest
is the simulation that `thinpipe plan` makes: so these are figures of machines as fast as this one, and not measured.
They cost a fraction of a second, and a run that cannot be simulated loses nothing but them.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compress.context_registry import parse_context
from ...compress.identity import IdentityCodec
from ...compress.registry import parse_codec
from ...sim.links.pipeline import StageTimes
from ...sim.links.shaper import LinkProfile
from ...sim.reports.cut_advice import MICROBATCHES_MAX, advice_on_record
from ...sim.reports.lanes import lane_path
from ..config import RunConfig
from ..config_file import parse_config
from ..config_sections import CodecSection
from ..preparation import resolve_architecture
from ..stage_costs import stage_layers
from .message_sizes import Sizes
from .plan import plan
from .stage_times import times_measured

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DENSE = CodecSection(codec="bf16")
LEARNED = CodecSection()
USUAL_LINK = "300mbit,25ms"
OPTIONS = {  # of `thinpipe up`; other settings are spelled with --set
    "pipeline.stages": "--stages",
    "model.preset": "--model",
    "model.path": "--model",
    "data.source": "--data",
    "codec.codec": "--codec",
    "codec.forward": "--forward",
    "codec.backward": "--backward",
    "link.link": "--link",
    "run.steps": "--steps",
    "pipeline.schedule": "--schedule",
    "lanes.count": "--lanes",
    "lanes.average": "--average",
    "pipeline.microbatches": "--microbatches",
    "pipeline.batch_size": "--batch-size",
    "data.sequence_length": "--sequence-length",
    "run.eval_every": "--eval-every",
    "run.seed": "--seed",
}
SAYS_NOTHING = ("run.name", "run.extended", "checkpoint.", "watch.")  # of what a run computes or how fast


def add_comparison(summary: dict[str, Any], run: Path, config: RunConfig) -> None:
    """Put `run_simulation`, `dense_simulation`, `learned_simulation` (where this run was dense), or the reason why not
    in `simulation_left_out`, `cut_advice` (of a swarm), and `try_next` into the summary of the run in the directory
    `run`."""
    found: dict[str, Any] = dict.fromkeys(("run_simulation", "dense_simulation", "learned_simulation"))
    found |= {"simulation_left_out": None, "cut_advice": None}
    chain = lane_path(run, 0, config.lanes.count)  # lanes are alike, and each is simulated by itself
    try:
        found |= _simulations(chain, config)
    except Exception as error:  # the run has ended well, whatever this is
        found["simulation_left_out"] = " ".join(str(error).split()) or type(error).__name__
    if summary["mode"] == "swarm":
        shares = [stage["compute_share"] for stage in summary["stages"][: config.pipeline.stages]]
        converts = config.lanes.count == 1 and config.checkpoint.every  # `thinpipe checkpoint convert`
        found["cut_advice"] = advice_on_record(chain, shares, run if converts else None)
    summary |= found
    summary["try_next"] = _try_next(summary, run, config)


def _simulations(run: Path, config: RunConfig) -> dict[str, Any]:
    stages, microbatches = config.pipeline.stages, config.pipeline.microbatches
    if stages < 2:
        raise ValueError("one stage has no link")
    if stages * microbatches > MICROBATCHES_MAX:
        raise ValueError(f"{stages} stages and {microbatches} microbatches take long to simulate; use thinpipe plan")
    architecture, times = resolve_architecture(config), times_measured(run, config)
    layers = [len(of_stage) for of_stage in stage_layers(config, architecture)]  # whatever another codec's cut would be
    dense = Sizes(config.model_copy(update={"codec": DENSE}), architecture).boundary()
    thinner = _thinner(dense.link, _bound_below_bits_per_s(dense.forward_bytes, dense.backward_bytes, times))
    found = {
        "run_simulation": simulation(config, config.codec, architecture, times, layers=layers, thinner=thinner),
        "dense_simulation": simulation(config, DENSE, architecture, times, layers=layers, thinner=thinner),
    }
    if is_dense(config):
        found["learned_simulation"] = simulation(config, LEARNED, architecture, times, layers=layers, thinner=thinner)
    return found


def simulation(
    config: RunConfig,
    codec: CodecSection,
    architecture: PretrainedConfig,
    times: Sequence[StageTimes],
    *,
    layers: Sequence[int],
    thinner: str | None,
) -> dict[str, Any]:
    """What the run would do with another codec, its stages as long and as fast: tokens/s over its link and over a
    thinner one, and the rate of a link, each way, below which that and not the busiest stage is the bottleneck."""

    def figures(link: str) -> dict[str, Any]:
        changed = {"codec": codec, "link": config.link.model_copy(update={"link": link})}
        return plan(config.model_copy(update=changed), architecture, times, layers=layers)[0]

    planned = figures(config.link.link)
    sizes = planned["bytes_per_microbatch"]
    tokens = config.microbatch_size * config.data.sequence_length
    return {
        "codec": " ".join(filter(None, (codec.codec, codec.forward, codec.backward))),
        "link": planned["link"],
        "tokens_per_s": planned["tokens_per_s"],
        "bytes_per_token": sum(sizes.values()) * (config.pipeline.stages - 1) / tokens,
        "bound_below_bits_per_s": _bound_below_bits_per_s(sizes["forward"], sizes["backward"], times),
        "thinner_link": thinner,
        "thinner_tokens_per_s": figures(thinner)["tokens_per_s"] if thinner else None,
    }


def _bound_below_bits_per_s(forward_bytes: int, backward_bytes: int, times: Sequence[StageTimes]) -> float:
    """At this rate a microbatch takes a wire for as long as the busiest stage."""
    return max(forward_bytes, backward_bytes) * 8 / max(each.forward_s + each.backward_s for each in times)


def is_dense(config: RunConfig) -> bool:
    """Whether hidden states cross the boundaries as they are, in whatever byte format."""
    return isinstance(parse_codec(config.codec.codec).codec, IdentityCodec)


def _thinner(link: LinkProfile, bound_below_bits_per_s: float) -> str | None:
    """A link of 1, 2 or 5 times a power of ten that holds dense training up by a factor of two and more; None where
    this run's is as thin."""
    wanted = bound_below_bits_per_s / 2
    power = 10.0 ** math.floor(math.log10(wanted))
    rate = max(part * power for part in (1, 2, 5) if part * power <= wanted)
    if link.rate_bits_per_s is not None and link.rate_bits_per_s <= rate:
        return None
    latency_s = link.latency_s or LinkProfile.parse(USUAL_LINK).latency_s
    return str(LinkProfile(rate_bits_per_s=rate, latency_s=latency_s))


def _try_next(summary: dict[str, Any], run: Path, config: RunConfig) -> dict[str, str]:
    """A command that shows what this run did not, and why it is worth running."""
    dense, thinner = summary["dense_simulation"], (summary["run_simulation"] or {}).get("thinner_link")
    given = _given(config)
    learned = {key: value for key, value in given.items() if not key.startswith("codec.")}
    if config.context.method:
        whole = {key: value for key, value in given.items() if not key.startswith(("lanes.", "context."))}
        exact = parse_context(config.context.method).name == "full"
        told = "the same up to rounding" if exact else "what narrow keys and values cost"
        return _command(whole, run, "whole", f"whole sequences in one lane: {told}")
    if summary["mode"] == "one-process":
        link = USUAL_LINK if config.link.link == "none" else config.link.link
        return _command({**given, "link.link": link}, run, "swarm", "the same, a process for each stage: the same bits")
    if is_dense(config):
        return _command(learned, run, LEARNED.codec, f"the codec {LEARNED.codec} instead of dense training")
    if thinner:
        there = f"where dense bf16 would have {dense['thinner_tokens_per_s']:,.0f} tokens/s (simulated)"
        return _command({**given, "link.link": thinner}, run, "thin", there)
    return _command({**learned, "codec.codec": "bf16"}, run, "dense", "dense training over the same link")


def _given(config: RunConfig) -> dict[str, Any]:
    """The settings that this run would not have had by itself, as `section.key`. Learning rates that its codec
    recommends come by themselves, and so do another codec's."""
    plain = parse_config({"codec": config.codec.model_dump()}).model_dump(mode="json")
    plain["codec"] = CodecSection().model_dump(mode="json")
    return {
        f"{section}.{key}": value
        for section, table in config.model_dump(mode="json").items()
        for key, value in table.items()
        if value != plain[section][key] and not f"{section}.{key}".startswith(SAYS_NOTHING)
    }


def _command(settings: dict[str, Any], run: Path, name: str, why: str) -> dict[str, str]:
    words = ["thinpipe", "up"]
    for key, value in settings.items():
        told = value if isinstance(value, str) else json.dumps(value)
        words += [OPTIONS[key], told] if key in OPTIONS else ["--set", f"{key}={told}"]
    number, out = 1, run.parent / name  # beside the run; "." has no name to replace
    while out.exists():
        number += 1
        out = run.parent / f"{name}-{number}"
    return {"command": shlex.join([*words, "--out", str(out)]), "why": why}
