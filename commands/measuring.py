"""`thinpipe plan|bench|probe`: simulate throughput, measure it, and measure the path between two machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Config,
    Insecure,
    Json,
    KeysDirectory,
    Override,
    configuration,
    fail,
    is_own_process,
    one_arithmetic_thread,
    run_errors,
    run_toml,
)
from .options import settings_of, shared, without_auto


def plan(
    emulate: Annotated[
        str | None,
        typer.Option(help="Model, stages and speed of each stage: PRESET@STAGESxRATEtflops such as 150m@4x66tflops."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--from", help="Instead of --emulate: a finished run, for its model, stages and times."),
    ] = None,
    codec: Annotated[str | None, shared("--codec", "mapl; of the run")] = None,
    forward: Annotated[str | None, shared("--forward", "the codec's")] = None,
    backward: Annotated[str | None, shared("--backward", "the codec's")] = None,
    link: Annotated[str | None, shared("--link", "none; of the run")] = None,
    schedule: Annotated[str | None, shared("--schedule", "1f1b; of the run")] = None,
    cut: Annotated[str | None, shared("--cut", "auto; of the run")] = None,
    speeds: Annotated[str | None, shared("--speeds", "alike; of the run")] = None,
    microbatches: Annotated[int | None, shared("--microbatches", "64; of the run")] = None,
    batch_size: Annotated[int | None, shared("--batch-size", "256; of the run")] = None,
    sequence_length: Annotated[int | None, shared("--sequence-length", "1024; of the run")] = None,
    lanes: Annotated[int | None, shared("--lanes", "1; of the run")] = None,
    average: Annotated[str | None, shared("--average", "outer; of the run; gradients with --chunks")] = None,
    chunks: Annotated[int | None, shared("--chunks", "none; of the run")] = None,
    context: Annotated[str | None, shared("--context", "full, where there are chunks; of the run")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Write a picture of what runs when, such as timeline.png. (none)")
    ] = None,
    write_schedule: Annotated[
        Path | None,
        typer.Option(
            help="Write the schedule that was simulated as a CSV file, which --schedule and "
            "torch.distributed.pipelining read. (none)"
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            help="How a link is simulated. duplex: one wire per direction. "
            "shared: all that comes into a stage shares one wire, and latency occupies it."
        ),
    ] = "duplex",
    config: Config = None,
    overrides: Override = None,
    as_json: Json = False,
) -> None:
    """Predict a run without running it: tokens/s, the bottleneck, and what the links must carry.

    This simulates the schedule that nodes execute and the bytes that they would send, on a virtual clock. With --lanes
    it says what averaging costs too, and how to average so that no stage waits; with --chunks what keys and values do.
    """
    one_arithmetic_thread()
    plain, auto = without_auto(schedule)
    given = settings_of(
        codec=codec,
        forward=forward,
        backward=backward,
        link=link,
        schedule=None if auto else plain,
        cut=cut,
        speeds=speeds,
        microbatches=microbatches,
        batch_size=batch_size,
        sequence_length=sequence_length,
        lanes=lanes,
        average=average,
        chunks=chunks,
        context=context,
    )
    from ..node.config import ConfigError
    from ..node.measuring.emulated_machine import EmulatedMachine
    from ..node.measuring.plan import PLANNED, planned
    from ..node.schedule_file import ENDING, csv_text, names_a_file

    if write_schedule and not names_a_file(write_schedule.name):
        fail(
            f"--write-schedule {write_schedule}: --schedule knows a file by its ending; say {write_schedule}{ENDING}", 2
        )
    try:
        emulated = None if emulate is None else EmulatedMachine.parse(emulate)
    except ConfigError as error:
        fail(str(error), 2)
    if (emulated is None) == (measured is None):
        fail("say how fast stages compute: --emulate 150m@4x66tflops, or --from a run that was measured", 2)
    if rule not in ("duplex", "shared"):
        fail(f"--rule: there is no '{rule}'; choose duplex or shared", 2)
    if measured is not None:
        config = run_toml(measured, "--from")
    settings = configuration(config, {**(emulated.settings() if emulated else {}), **given}, overrides)
    try:
        spec = auto or settings.pipeline.schedule
        figures, simulated = planned(settings, emulated, measured, schedule=spec, rule=rule)
    except PLANNED as error:
        fail(str(error), 2)
    if write_schedule:
        if (chunks_of := figures["chunks"]) and chunks_of["in_flight"] == 2:
            fail(
                "--write-schedule: this plan computes two microbatches in turns, a written order single ones; "
                "say --set context.in_flight=1",
                2,
            )
        pipeline = settings.pipeline
        text = csv_text(figures["schedule"], stages=pipeline.stages, microbatches=pipeline.microbatches)
        try:
            write_schedule.write_text(text, encoding="utf-8")
        except OSError as error:
            fail(f"--write-schedule: cannot write {write_schedule}: {error.strerror}; choose another file", 2)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        from rich.console import Console

        from ..sim.reports.plan_console import chunk_lines, cut_lines, lane_lines, plan_tables

        console = Console(markup=False)
        console.print(*plan_tables(figures), sep="\n")
        lines = (*cut_lines(figures), *chunk_lines(figures), *lane_lines(figures))
        console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
    if timeline:
        from ..node.measuring.plan import events
        from ..sim.reports.trace import draw

        draw(events(simulated), settings.pipeline.stages, timeline, window_s=figures["step_s"])


def bench(
    emulate: Annotated[
        list[str] | None,
        typer.Option(
            help="Stages that compute nothing and take the time of another machine: 150m@4x66tflops, 1b@4x66tflops, "
            "or 150m@4x5ms+10ms (forward+backward of a microbatch). Repeat it for more."
        ),
    ] = None,
    free_running: Annotated[
        list[str] | None,
        typer.Option(help="Stages that really train, as fast as they can: PRESET@STAGES such as tiny@2."),
    ] = None,
    codec: Annotated[
        str, typer.Option(help="Codecs to compare, separated by commas. Each is CODEC [FORWARD [BACKWARD]].")
    ] = "bf16,int8,int4,mapl",
    link: Annotated[list[str] | None, shared("--link", more="Repeat it for more.")] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure over links of 10, 80, 300 and 1000 Mb/s, 25 ms each. (off)")
    ] = False,
    schedule: Annotated[
        str,
        typer.Option(help="Schedules to compare, separated by commas. rtt_ratio=auto chooses the depth for each link."),
    ] = "1f1b:rtt_ratio=auto",
    lanes: Annotated[list[int] | None, shared("--lanes", "1", more="Repeat it for more.")] = None,
    average: Annotated[
        list[str] | None, shared("--average", "outer; gradients with --chunks", more="Repeat it for more.")
    ] = None,
    chunks: Annotated[list[int] | None, shared("--chunks", "none", more="Repeat it for more.")] = None,
    context: Annotated[
        list[str] | None, shared("--context", "full, where there are chunks", more="Repeat it for more.")
    ] = None,
    microbatches: Annotated[int | None, shared("--microbatches", "64; free-running 8")] = None,
    batch_size: Annotated[int | None, shared("--batch-size", "256; free-running 16")] = None,
    sequence_length: Annotated[int | None, shared("--sequence-length", "1024; free-running 128")] = None,
    window: Annotated[
        float, typer.Option(min=0.5, help="Minimum seconds of each of the three measured windows.")
    ] = 5.0,
    limit: Annotated[
        float, typer.Option(min=1, help="Maximum seconds for a cell. A cell that needs more is only simulated.")
    ] = 600.0,
    out: Annotated[Path, typer.Option(help="Directory for the records of all cells, bench.json and bench.png.")] = Path(
        "runs/bench"
    ),
    overrides: Override = None,
    as_json: Json = False,
) -> None:
    """Measure throughput over rate-limited links, for each codec, link, schedule and number of lanes or chunks, and
    once without a limit.

    One such measurement is a cell. Cells that are already in --out are not run again. Exit code 1 if a cell failed or
    does not count.
    """
    one_arithmetic_thread()
    from ..node.codec_words import split_codecs
    from ..node.config import ConfigError
    from ..node.config_file import parse_override
    from ..node.measuring.bench_cells import BenchGrid
    from ..node.measuring.bench_grid import run_bench
    from ..node.measuring.plan import PLANNED

    links = (*(link or ()), *(f"{rate}mbit,25ms" for rate in (10, 80, 300, 1000) if sweep))
    if not (emulate or free_running):
        fail("say how stages compute: --emulate 150m@4x66tflops or --free-running tiny@2", 2)
    if not links:
        fail("say over which links: --link 300mbit,25ms or --sweep", 2)
    settings = settings_of(microbatches=microbatches, batch_size=batch_size, sequence_length=sequence_length)
    try:
        settings |= dict(map(parse_override, overrides or []))
        if context and not (chunks or "context.method" in settings):
            fail("--context is for chunks; say how many, --chunks 2 or more", 2)
        for option, given, setting in (
            ("--lanes", lanes, "lanes.count"),
            ("--average", average, "lanes.average"),
            ("--chunks", chunks, "lanes.count"),
            ("--context", context, "context.method"),
        ):
            if given and setting in settings:
                fail(f"{option} beside --set {setting}: which of the two is meant? Omit one", 2)
        grid = BenchGrid(
            machines=tuple(emulate or ()),
            free_running=tuple(free_running or ()),
            codecs=tuple(split_codecs(codec)),
            links=links,
            schedules=tuple(schedule.split(",")),
            settings=settings,
            lanes=tuple(lanes or ()),
            averages=tuple(average or ()),
            chunks=tuple(chunks or ()),
            contexts=tuple(context or ()),
            window_s=window,
            limit_s=limit,
        )
        with run_errors(out):
            found = run_bench(grid, out, quiet=as_json, forks=is_own_process())
    except (ConfigError, *PLANNED) as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(found, indent=2))
    if any(cell["state"] in ("failed", "refused") for cell in found["cells"]):
        raise typer.Exit(1)


def probe(
    to: Annotated[
        str | None,
        typer.Option("--to", help="host:port to measure to: a `thinpipe probe --listen`, or a node's --listen."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="Answer probes at this host:port until Ctrl-C.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link", help="Limit both directions to rate,latency such as 300mbit,25ms, and check them. (none)"
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Seconds to measure each direction, 0.2 to 10. (2)")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="With --listen: stop after one probe. (off)")] = False,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Measure rate and round trip between two machines, both ways, before a run.

    Start `thinpipe probe --listen 0.0.0.0:7001` on one machine and `thinpipe probe --to HOST:7001` on the other. A node
    that waits for its neighbours answers too. A node in a run answers round trips only. With --link both sides limit
    what they send, and a result that is more than 10 % off is reported. The keys of any stage of the run will do for
    --keys. Exit code 1: no answer in time; 2: nothing listens there.
    """
    one_arithmetic_thread()
    if (to is None) == (listen is None):
        fail("say --to host:port, to measure, or --listen host:port, to be measured", 2)
    for option, given, other in (("--once", once, to), ("--link", link, listen), ("--seconds", seconds, listen)):
        if given and other:
            fail(f"{option} does not go with --{'to' if other is to else 'listen'}; omit it", 2)
    from ..node.addresses import ListenError
    from ..node.probing.probe import listen as answer
    from ..node.probing.probe import print_probe
    from ..node.probing.reach import ProbeError
    from ..node.security.key_directory import KeysError
    from ..node.security.policy import choose

    try:
        security = choose(keys, insecure=insecure, listen=listen, dial=to, dial_option="--to")
        if listen is not None:
            answer(listen, once=once, security=security)
        elif to is not None:
            span = 2.0 if seconds is None else seconds
            print_probe(to, link or "none", span, as_json=as_json, security=security)
    except (KeysError, ListenError) as error:
        fail(str(error), 2)
    except ProbeError as error:
        fail(str(error), error.exit_code)
