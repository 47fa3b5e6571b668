"""What `thinpipe plan` found, for people: tables of the whole, its stages, boundaries, chunks and lanes, and lines on
what to change. All figures are those of `plan --json`; nothing is computed here."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ...protocol.schedule import schedule_title

WAITS_BELOW = 0.9  # of the tokens/s without links: more is within what a plan is off by


def plan_tables(figures: dict[str, Any]) -> list[Table]:
    """What `thinpipe plan` found, for people."""
    one = ", one lane" if figures["lanes"] else ""
    schedule = schedule_title(figures["schedule"])
    overlap = ", steps overlap," if figures["delay"] else ""
    whole = Table(title=f"{schedule}{overlap} over {figures['link']}{one} (simulated, not measured)")
    for column in ("seconds a step", "tokens/s", "of uncapped", "of the machines", "busiest", "ratio to dense bf16"):
        whole.add_column(column, justify="right")
    whole.add_row(
        f"{figures['step_s']:.3g}",
        f"{figures['tokens_per_s']:,.0f}",
        f"{figures['tokens_per_s'] / figures['uncapped_tokens_per_s']:.1%}",
        f"{figures['machines_used']:.1%}",
        figures["bottleneck"],
        f"{figures['ratio']:.1f}x",
    )
    stages = Table(title="stages, for one microbatch")
    for column in ("stage", "layers", "forward", "backward", "computes", "in flight at most"):
        stages.add_column(column, justify="right")
    for index, stage in enumerate(figures["stages"]):
        milliseconds = [f"{stage[way] * 1000:.3g} ms" for way in ("forward_s", "backward_s")]
        layers, in_flight = str(stage["layers"]), str(stage["microbatches_in_flight"])
        stages.add_row(str(index), layers, *milliseconds, f"{stage['compute_share']:.1%}", in_flight)
    lanes = lane_tables(figures["lanes"]) if figures["lanes"] else []
    if figures["chunks"]:
        lanes = [*chunk_tables(figures["chunks"]), *lanes]
    if not figures["boundaries"]:
        return [whole, stages, *lanes]
    sizes = figures["bytes_per_microbatch"]
    links = Table(
        title="boundaries",
        caption=f"a microbatch is {sizes['forward']:,} bytes down and {sizes['backward']:,} up, framed",
    )
    for column in ("boundary", "down, busy", "up, busy", "compute-bound from", "bits a token then"):
        links.add_column(column, justify="right")
    for index, boundary in enumerate(figures["boundaries"]):
        bound = boundary["compute_bound_at_ratio"]
        links.add_row(
            f"{index}-{index + 1}",
            f"{boundary['forward_share']:.1%}",
            f"{boundary['backward_share']:.1%}",
            "any" if bound is None or bound <= 1 else f"{bound:.1f}x",
            "any" if boundary["budget_bits"] is None else f"{boundary['budget_bits']:,}",
        )
    return [whole, stages, links, *lanes]


def lane_tables(lanes: dict[str, Any]) -> list[Table]:
    """All lanes together, and what each stage has to send to its own in another lane."""
    count = lanes["count"]
    whole = Table(
        title=f"{count} lanes, {lanes['average']}",
        caption=f"the round at the run's end, of all weights, takes {lanes['last_round_s']:.3g} s",
    )
    for column in ("tokens/s of all", f"of {count} x one lane", "averaging, bytes/token", "lost, a step"):
        whole.add_column(column, justify="right")
    size = f"{lanes['bytes_per_token']:,.1f}"
    whole.add_row(f"{lanes['tokens_per_s']:,.0f}", f"{lanes['share']:.3f}", size, _seconds(lanes["stall_s"]))
    stages = Table(
        title="rounds",
        caption="Mb/s that a lateral link needs: mean, to carry all rounds; peak, so that nobody waits",
    )
    for column in ("stage", "MB", "bytes/token", "takes", "mean", "peak", "hidden", "waits, a step"):
        stages.add_column(column, justify="right")
    for index, stage in enumerate(lanes["stages"]):
        peak = stage["peak_bits_per_s"]
        stages.add_row(
            str(index),
            f"{stage['contribution_bytes'] / 1e6:,.1f}",
            f"{stage['bytes_per_token']:,.1f}",
            _seconds(stage["round_s"]),
            f"{stage['mean_bits_per_s'] / 1e6:,.1f}",
            "-" if peak is None else f"{peak / 1e6:,.1f}",
            "yes" if stage["hidden"] else "no",
            _seconds(stage["wait_s"]),
        )
    return [whole, stages]


def chunk_tables(chunks: dict[str, Any]) -> list[Table]:
    """All chunks together, what each stage waits for keys and values, and how else these could cross."""
    sizes = chunks["bytes_per_token"]
    whole = Table(
        title=f"{chunks['count']} chunks, {chunks['method']}, {chunks['order']} order",
        caption="bytes: of a token and layer, framed, to each lane that looks at it; tokens/s: before averaging",
    )
    for column in ("tokens/s of all", "without links", "bytes forward", "bytes back", "ratio to dense bf16"):
        whole.add_column(column, justify="right")
    rates = [f"{chunks[name]:,.0f}" for name in ("tokens_per_s", "uncapped_tokens_per_s")]
    ratio = f"{chunks['ratio']:.1f}x"
    whole.add_row(*rates, f"{sizes['forward']:,.1f}", f"{sizes['backward']:,.1f}", ratio)
    stages = Table(
        title="keys and values, for one microbatch",
        caption="exposed: what a layer takes longer; sent: by the lane that sends the most; kept: of others, in flight",
    )
    for column in ("stage", "exposed, forward", "exposed, back", "waits", "sent", "kept"):
        stages.add_column(column, justify="right")
    for index, stage in enumerate(chunks["stages"]):
        waits, sent = f"{stage['waiting_share']:.1%}", f"{stage['sent_bytes_per_microbatch'] / 1e6:,.1f} MB"
        stages.add_row(str(index), *_exposed(stage), waits, sent, f"{stage['stored_bytes_in_flight'] / 1e6:,.1f} MB")
    ways = Table(title="direct, as nodes send, or from neighbour to neighbour")
    for column in ("way", "links", "tokens/s of all", "exposed, forward", "exposed, back"):
        ways.add_column(column, justify="left" if column in ("way", "links") else "right")
    for way in chunks["ways"]:
        ways.add_row(way["route"], way["links"], f"{way['tokens_per_s']:,.0f}", *_exposed(way))
    return [whole, stages, ways]


def _exposed(figures: dict[str, Any]) -> list[str]:
    return [_milliseconds(figures[f"exposed_{way}_s"]) for way in ("forward", "backward")]


def _milliseconds(value: float) -> str:
    return "-" if value < 1e-6 else f"{value * 1000:.3g} ms"


def _seconds(value: float) -> str:
    """Below a tenth of a millisecond it is what a simulation rounds."""
    return "-" if value < 1e-4 else f"{value:.3g} s"


def cut_lines(figures: dict[str, Any]) -> list[str]:
    """Which layers the stages have, what that gains over stages of equal length, and what would be faster: an order of
    the machines, a deeper schedule."""
    cut, gain = ",".join(str(stage["layers"]) for stage in figures["stages"]), figures["gain_over_equal_cut"]
    lines = [
        f"layers of the stages: {cut}"
        + ("" if gain is None else f"; {gain:.2f} times the tokens/s of stages of equal length")
    ]
    if better := figures["better_order"]:
        order = ",".join(f"{speed:g}" for speed in better["speeds"])
        lines.append(f"the same machines in another order, --speeds {order}: {better['gain']:.2f}x")
    whole, plain = figures["tokens_per_s"] / figures["uncapped_tokens_per_s"], figures["schedule"].partition(":")[0]
    if figures["chunks"]:  # what stages wait for in other lanes no depth hides
        goes_to = figures["chunks"]["step_goes_to_s"]
        whole = goes_to["computing"] / (goes_to["computing"] + goes_to["boundaries"])
    busiest = max((max(of["forward_share"], of["backward_share"]) for of in figures["boundaries"]), default=1.0)
    # The links would carry what the machines can compute: it is their delay that costs.
    if whole < WAITS_BELOW and busiest < whole and plain in ("gpipe", "1f1b", "zb"):
        waits = "stages wait for what is on its way, and links are idle"
        if "rtt_ratio" not in figures["schedule"]:
            deeper = "zb" if plain == "zb" else "1f1b"
            lines.append(f"{waits}: --schedule {deeper}:rtt_ratio=auto does more microbatches meanwhile")
        elif not figures["delay"] and not figures["lanes"]:
            lines.append(
                f"{waits}: --set pipeline.delay=1 does the next step's microbatches meanwhile, with gradients that are "
                "applied one step late"
            )
    return lines


def chunk_lines(figures: dict[str, Any]) -> list[str]:
    """Where the time of a step goes, and what would help."""
    if not (chunks := figures["chunks"]):
        return []
    goes_to = chunks["step_goes_to_s"]
    whole = sum(goes_to.values())
    parts = [f"{part / whole:.0%} {name.replace('_', ' ')}" for name, part in goes_to.items() if part > 0.005 * whole]
    bound, before = chunks["bounded_by"], chunks["bounded_before_averaging_by"]
    bound += "" if before == bound else f", and before that by {before}"
    lines = [
        f"a step of {whole:.3g} s: {', '.join(parts)}; bounded by {bound}",
        f"tokens/s of all, before averaging: {chunks['no_latency_tokens_per_s']:,.0f} without the latency of keys and "
        f"values, {chunks['no_cap_tokens_per_s']:,.0f} without their cap",
    ]
    if otherwise := chunks["otherwise_tokens_per_s"]:
        now, then = ("two microbatches", "one") if chunks["in_flight"] == 2 else ("one microbatch", "two")
        lines.append(
            f"with {now} in flight; with {then} (context.in_flight = {3 - chunks['in_flight']}), "
            f"{otherwise:,.0f} tokens/s of all, before averaging"
        )
    if (unsent := chunks["unsent_bytes"]) > (buffer := chunks["send_buffer_bytes"]):
        lines.append(
            f"a node has up to {unsent:,} bytes of keys and values for each lane at once, and stands still as long as "
            f"more than link.send_buffer_bytes = {buffer:,} are queued, which is not simulated; raise that"
        )
    if first := chunks["at_first"]:
        lines.append(
            f"in its first steps the method sends {first['forward_bytes_per_token']:,.1f} bytes a token and layer, at "
            f"{first['tokens_per_s']:,.0f} tokens/s"
        )
    return lines


def lane_lines(figures: dict[str, Any]) -> list[str]:
    """How to average so that no stage waits for another lane."""
    lanes = figures["lanes"]
    if not lanes or not lanes["advice"]:
        return []
    slowest = lanes["stages"][lanes["bottleneck"]]
    lost = f"stage {lanes['bottleneck']} waits {slowest['wait_s']:.3g} s a step for other lanes"
    return [f"{lost}: {lanes['advice']}"]
