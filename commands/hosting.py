"""`thinpipe node`: the process that serves one pipeline stage, of a swarm on this machine or on many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    DataChanged,
    Insecure,
    KeysDirectory,
    Override,
    Prometheus,
    TensorBoard,
    configuration,
    fail,
    may_outlast_its_output,
    one_arithmetic_thread,
)
from .discovery import Announce, DhtPort, Joins
from .options import shared

if TYPE_CHECKING:
    from ..node.config import RunConfig

AUTO = -1


def _stage(text: str) -> int:
    """The option --stage: a number, or -1 for auto."""
    return _number_or_auto(text, "stage")


def _lane(text: str) -> int:
    """The option --lane: the same."""
    return _number_or_auto(text, "lane")


def _number_or_auto(text: str, what: str) -> int:
    if text == "auto":
        return AUTO
    if text.isascii() and text.isdecimal():
        return int(text)
    raise typer.BadParameter(f"'{text}' is neither a {what}, from 0, nor auto")


def node(
    stage: Annotated[
        int,
        typer.Option(
            help="Stage to serve, counted from 0, such as 2; auto (with --join): the stage that needs a node most.",
            parser=_stage,
        ),
    ],
    config: Annotated[
        Path | None, typer.Option("--config", help="The run.toml of the run. All its nodes need the same.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port at which the previous stage connects, such as 0.0.0.0:7001.")
    ] = None,
    next_: Annotated[
        str | None, typer.Option("--next", help="host:port of the next stage, such as stage2.example:7002.")
    ] = None,
    lane: Annotated[
        int | None,
        typer.Option(
            help="Lane to serve the stage in, counted from 0, in a run that has several; auto, the default with "
            "--join: the one that needs a node most.",
            parser=_lane,
            show_default=False,
        ),
    ] = None,
    lateral: Annotated[
        list[str] | None,
        typer.Option(
            help="LANE=host:port of the same stage in a lower lane, such as 0=stage2.example:7002. Repeat it for each."
        ),
    ] = None,
    join: Joins = None,
    announce: Announce = None,
    dht_port: DhtPort = None,
    run: Annotated[str | None, typer.Option(help="With --join: name of the run, if the DHT has several.")] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="With --stage auto: this machine's speed, in the unit of pipeline.speeds (thinpipe doctor measures "
            "it). Of the stages that need a node alike, it takes one for a machine like this. (any)",
        ),
    ] = None,
    link: Annotated[str | None, shared("--link", "of the run")] = None,
    device: Annotated[str | None, typer.Option(help="Device to compute on: cpu, cuda or cuda:N. (cpu)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for this node's records. (beside run.toml; with --join: runs/RUN)")
    ] = None,
    overrides: Override = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write a timeline of what ran when, for ui.perfetto.dev. (off)")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the stage from its newest checkpoint, in a run that has begun. (off; --join finds out)",
        ),
    ] = False,
    data_changed: DataChanged = False,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    prometheus: Prometheus = None,
    tensorboard: TensorBoard = None,
    parent: Annotated[int | None, typer.Option(hidden=True, help="End when this process is gone.")] = None,
    check: Annotated[bool, typer.Option("--check", hidden=True, help="Only say what cannot work.")] = False,
) -> None:
    """Host one stage of a run. Nodes may start in any order; neighbours wait for each other.

    Either give all addresses (--config, --listen, --next), or join a swarm with --join, which finds everything else.
    """
    one_arithmetic_thread()
    may_outlast_its_output()
    options = {
        "link.link": link,
        "compute.device": device,
        "watch.prometheus": prometheus,
        "watch.tensorboard": tensorboard,
    }
    if join and not check:
        if speed is not None and stage != AUTO:
            fail("--speed goes with --stage auto, which chooses a stage by it; omit one of the two", 2)
        for option, given, what in (("--next", next_, "stage below is"), ("--lateral", lateral, "other lanes are")):
            if given:
                fail(f"{option} and --join contradict each other: the DHT says where the {what}; omit one", 2)
        wish = {"stage": None if stage == AUTO else stage, "lane": None if lane == AUTO else lane, "config": config}
        wish |= {"listen": listen, "announce": announce}
        wish |= {"join": tuple(join), "dht_port": dht_port, "run": run, "out": out}
        wish |= {"keys": keys, "insecure": insecure, "speed": speed, "data_changed": data_changed}
        how = {"trace": trace, "parent": parent, "resume": resume, "data_changed": data_changed}
        return _join(wish, options, overrides, how)
    for option, given in (
        ("--stage auto", stage == AUTO),
        ("--lane auto", lane == AUTO),
        ("--announce", announce),
        ("--dht-port", dht_port),
        ("--run", run),
        ("--speed", speed),
    ):
        if given:
            fail(f"{option} goes with --join host:port, which names any node or bootstrap of the swarm", 2)
    if config is None:
        fail("say which run: --config run.toml and the addresses, or --join host:port of any node or bootstrap", 2)
    settings = configuration(config, options, overrides)
    if stage >= settings.pipeline.stages:
        fail(
            f"--stage {stage}: the run has {settings.pipeline.stages} stages, so 0 to {settings.pipeline.stages - 1}", 2
        )
    from ..node.config import ConfigError
    from ..node.run_lanes import check_lane, check_text_stays, of_lane

    if lane is None and settings.lanes.count > 1:
        fail(f"the run has {settings.lanes.count} lanes: say which one this node is in, --lane N, from 0", 2)
    lane = lane or 0
    try:
        check_lane(settings, lane)
        check_text_stays(settings, data_changed=data_changed)
    except ConfigError as error:
        fail(str(error), 2)
    if check:
        return _check(settings, stage)
    from ..node.config import recommended_line

    if line := recommended_line(settings):
        print(line)
    from ..node.addresses import ListenError, lateral_addresses
    from ..node.node_options import Addresses, NodeOptions
    from ..node.node_process import NodeError, check_input, run_node
    from ..node.run_directory import LocalRunError, writable
    from ..node.security.key_directory import KeysError
    from ..node.security.policy import choose
    from ..protocol.grid_place import GridPlace

    try:
        others = lateral_addresses(lateral or [], lane, settings.lanes.count)
        addresses = Addresses(listen=listen, next=next_, lateral=others)
        check_input(settings, stage, addresses, lane)
        name, who = settings.run.name, [GridPlace(stage, lane)]
        for address in others.values():
            choose(keys, insecure=insecure, dial=address, dial_option="--lateral", run=name, places=who)
        security = choose(keys, insecure=insecure, listen=listen, dial=next_, run=name, places=who)
        if security.warning:
            print(f"thinpipe: warning: {security.warning}", file=sys.stderr)
        home = writable(out or config.parent)
        settings, directory = of_lane(settings, home, lane)
        how = NodeOptions(
            out=writable(directory),
            run=home,
            lane=lane,
            trace=trace,
            parent=parent,
            resume=resume,
            data_changed=data_changed,
            security=security,
        )
        run_node(settings, stage, addresses, how)
    except (ConfigError, KeysError, ListenError) as error:
        fail(str(error), 2)
    except (NodeError, LocalRunError) as error:
        fail(str(error), error.exit_code)
    return None


def _check(settings: RunConfig, stage: int) -> None:
    """What `up` checks before it starts a process. Only stage 0 reads the data."""
    from ..node.data import check_source
    from ..node.preparation import BAD_INPUT, check_settings

    try:
        check_settings(settings)
        if stage == 0 and not settings.compute.emulate:
            check_source(settings.data)
    except BAD_INPUT as error:
        fail(str(error), 2)


def _join(
    wish: dict[str, Any],
    options: dict[str, Any],
    overrides: list[str] | None,
    how: dict[str, Any],
) -> None:
    from ..node.addresses import ListenError
    from ..node.config import ConfigError
    from ..node.config_file import parse_override
    from ..node.discovery.claiming import RunFinished, StageTaken
    from ..node.discovery.client import DiscoveryError
    from ..node.discovery.joining import JoinOptions, join
    from ..node.security.key_directory import KeysError

    try:
        given = {key: value for key, value in options.items() if value is not None}
        joined = join(JoinOptions(**wish, overrides={**given, **dict(map(parse_override, overrides or []))}))
    except RunFinished as error:
        print(str(error))
        return
    except DiscoveryError as error:
        fail(str(error), error.exit_code)
    except (ConfigError, KeysError, ListenError, StageTaken) as error:
        fail(str(error), 2)
    from ..node.node_options import Addresses, NodeOptions
    from ..node.node_process import NodeError, run_node

    how["resume"] = joined.resume or how["resume"]
    chosen = NodeOptions(
        out=joined.out,
        run=joined.run,
        lane=joined.lane,
        security=joined.security,
        membership=joined.membership,
        **how,
    )
    try:
        run_node(joined.config, joined.stage, Addresses(listen=joined.listen, next=None), chosen)
    except NodeError as error:
        fail(str(error), error.exit_code)
