"""`thinpipe plan|bench|probe`: what throughput would be, what it is, and what a path between two machines carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Config,
    Insecure,
    KeysDirectory,
    Link,
    Override,
    configuration,
    fail,
    one_arithmetic_thread,
    run_errors,
    run_toml,
)


def plan(
    emulate: Annotated[
        str | None,
        typer.Option(help="Model, stages and what each stage computes: PRESET@STAGESxRATEtflops, as 150m@4x66tflops."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", help="Instead, a run on record: its model, stages and times.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="What crosses a boundary, as for up. (mapl; of the run)")] = None,
    forward: Annotated[str | None, typer.Option(help="Byte format of activations. (the codec's)")] = None,
    backward: Annotated[str | None, typer.Option(help="Byte format of gradients. (the codec's)")] = None,
    link: Link = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="gpipe, 1f1b, zb; 1f1b:rtt_ratio=1.8, zb:rtt_ratio=1.8; rtt_ratio=auto finds the depth. (1f1b)"
        ),
    ] = None,
    microbatches: Annotated[int | None, typer.Option(help="Parts of a step's batch. (64; of the run)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step. (256; of the run)")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence. (1024; of the run)")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Draw what runs when, as PNG.")] = None,
    rule: Annotated[
        str, typer.Option(help="duplex: each direction a wire. shared: all into a stage is one, latency occupies it.")
    ] = "duplex",
    config: Config = None,
    overrides: Override = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")] = False,
) -> None:
    """Say what a run would do, without running it: tokens/s, bottleneck, what the links must carry.

    A simulation on a virtual clock, with the schedule that nodes execute and the bytes that they would send.
    """
    one_arithmetic_thread()
    options = {
        "codec.codec": codec,
        "codec.forward": forward,
        "codec.backward": backward,
        "link.link": link,
        "pipeline.microbatches": microbatches,
        "pipeline.batch_size": batch_size,
        "data.sequence_length": sequence_length,
    }
    from ..node.config import ConfigError
    from ..node.measuring.emulated_machine import EmulatedMachine
    from ..node.measuring.plan import PLANNED, planned

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
    given = {key: value for key, value in options.items() if value is not None}
    if schedule and not schedule.endswith(":rtt_ratio=auto"):
        given["pipeline.schedule"] = schedule
    settings = configuration(config, {**(emulated.settings() if emulated else {}), **given}, overrides)
    try:
        spec = schedule or settings.pipeline.schedule
        figures, simulated = planned(settings, emulated, measured, schedule=spec, rule=rule)
    except PLANNED as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        from rich.console import Console

        from ..sim.reports.console import plan_tables

        Console().print(*plan_tables(figures), sep="\n")
    if timeline:
        from ..node.measuring.plan import events
        from ..sim.reports.trace import draw

        draw(events(simulated), settings.pipeline.stages, timeline, window_s=figures["step_s"])


def bench(
    emulate: Annotated[
        list[str] | None,
        typer.Option(
            help="Stages that take the time of another machine: 150m@4x66tflops, 1b@4x66tflops, 150m@4x5ms+10ms."
        ),
    ] = None,
    free_running: Annotated[
        list[str] | None, typer.Option(help="Stages that really train, as fast as they can: PRESET@STAGES, as tiny@2.")
    ] = None,
    codec: Annotated[
        str, typer.Option(help="Codecs, each CODEC [FORWARD [BACKWARD]], with commas between them.")
    ] = "bf16,int8,int4,mapl",
    link: Annotated[
        list[str] | None, typer.Option("--link", help="Rate and latency, as 300mbit,25ms. Give it once for each link.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Links of 10, 80, 300 and 1000 Mb/s, 25 ms each.")] = False,
    schedule: Annotated[
        str, typer.Option(help="Schedules, with commas between them; rtt_ratio=auto finds the depth for each link.")
    ] = "1f1b:rtt_ratio=auto",
    microbatches: Annotated[int | None, typer.Option(help="Parts of a step's batch. (64; free-running 8)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step. (256; free-running 16)")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence. (1024; free-running 128)")] = None,
    window: Annotated[float, typer.Option(min=0.5, help="Seconds of each of a cell's three windows, at least.")] = 5.0,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds of a cell; one that needs more is only planned.")
    ] = 600.0,
    out: Annotated[Path, typer.Option(help="Directory for the cells, bench.json and bench.png.")] = Path("runs/bench"),
    overrides: Override = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print bench.json on stdout, and nothing else.")] = False,
) -> None:
    """Measure throughput over capped links: a swarm for each codec and link, beside the same without a cap.

    Cells that --out holds already are not run again. Exit code 1 if a cell failed or does not count.
    """
    one_arithmetic_thread()
    from ..node.config import ConfigError, parse_override
    from ..node.measuring.bench_grid import BenchGrid, run_bench, split_codecs
    from ..node.measuring.plan import PLANNED

    links = (*(link or ()), *(f"{rate}mbit,25ms" for rate in (10, 80, 300, 1000) if sweep))
    if not (emulate or free_running):
        fail("say how stages compute: --emulate 150m@4x66tflops or --free-running tiny@2", 2)
    if not links:
        fail("say over which links: --link 300mbit,25ms or --sweep", 2)
    options = {
        "pipeline.microbatches": microbatches,
        "pipeline.batch_size": batch_size,
        "data.sequence_length": sequence_length,
    }
    try:
        settings = {key: value for key, value in options.items() if value is not None}
        settings |= dict(map(parse_override, overrides or []))
        grid = BenchGrid(
            machines=tuple(emulate or ()),
            free_running=tuple(free_running or ()),
            codecs=tuple(split_codecs(codec)),
            links=links,
            schedules=tuple(schedule.split(",")),
            settings=settings,
            window_s=window,
            limit_s=limit,
        )
        with run_errors(out):
            found = run_bench(grid, out, quiet=as_json)
    except (ConfigError, *PLANNED) as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(found, indent=2))
    if any(cell["state"] in ("failed", "refused") for cell in found["cells"]):
        raise typer.Exit(1)


def probe(
    to: Annotated[
        str | None, typer.Option("--to", help="host:port of a node's listener, or of a probe --listen.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="Answer probes at this host:port until Ctrl-C.")
    ] = None,
    link: Annotated[
        str | None, typer.Option("--link", help="Shape both ways: rate,latency such as 300mbit,25ms. (none)")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="For each direction, 0.2 to 10. (2)")] = None,
    once: Annotated[bool, typer.Option("--once", help="With --listen: end after one probe.")] = False,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")] = False,
) -> None:
    """Measure rate and round trip between two machines, both ways, before a run.

    Start `thinpipe probe --listen 0.0.0.0:7001` on one machine and `thinpipe probe --to HOST:7001` on the other. A node
    that waits for its neighbours answers too; one in a run answers round trips only. With --link both sides shape what
    they send, and what is more than 10 % off is said. The --keys may be those of any stage of the run. Exit code 1: no
    answer in time; 2: nobody to ask there.
    """
    one_arithmetic_thread()
    if (to is None) == (listen is None):
        fail("say --to host:port, to measure, or --listen host:port, to be measured", 2)
    for option, given, other in (("--once", once, to), ("--link", link, listen), ("--seconds", seconds, listen)):
        if given and other:
            fail(f"{option} does not go with --{'to' if other is to else 'listen'}; leave it away", 2)
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
