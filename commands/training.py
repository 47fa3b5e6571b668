"""`thinpipe up`: a swarm on this machine. `thinpipe node`: one stage of it, or of a swarm of many machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Config,
    Insecure,
    KeysDirectory,
    Link,
    Override,
    Prometheus,
    TensorBoard,
    configuration,
    fail,
    model_setting,
    one_arithmetic_thread,
    run_errors,
    run_toml,
    said,
)
from .swarm import Announce, DhtPort, Joins

if TYPE_CHECKING:
    from ..node.config import RunConfig

AUTO = -1


def up(
    stages: Annotated[int | None, typer.Option(help="Pipeline stages, one process each. (4)")] = None,
    model: Annotated[str | None, typer.Option(help="Preset tiny, 150m, 500m, 1b, or a directory. (tiny)")] = None,
    data: Annotated[str | None, typer.Option(help="'stdlib', a file or directory, or hf:NAME. (stdlib)")] = None,
    codec: Annotated[
        str | None,
        typer.Option(help="What crosses a boundary: fp32, bf16, int8, int4, int3, or mapl, mapl:r=64,... (bf16)"),
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(help="Byte format of activations: one of those, or rvq:groups=8,codes=256,... (the codec's)"),
    ] = None,
    backward: Annotated[str | None, typer.Option(help="Byte format of gradients, the same. (the codec's)")] = None,
    link: Link = None,
    steps: Annotated[int | None, typer.Option(help="Training steps. (200)")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="gpipe, 1f1b, zb; for slow links 1f1b:hop=1.8, zb:hop=1.8; hop=auto finds out. (1f1b)"),
    ] = None,
    microbatches: Annotated[int | None, typer.Option(help="Parts of a step's batch. (8)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step. (16)")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence. (128)")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; 0: at the end. (0)")] = None,
    seed: Annotated[int | None, typer.Option(help="Weights, data order and rounding follow from it. (1)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for run.toml, records and summary.json. (runs/latest)")
    ] = None,
    config: Config = None,
    overrides: Override = None,
    one_process: Annotated[
        bool, typer.Option("--one-process", help="The same modules in one process, without links.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in --out already.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also trace.json (see ui.perfetto.dev) and trace.png: what ran when.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            help="Go on with the run in this directory, from its newest common checkpoint. What it computes stays.",
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="How often a stage that was lost is started again; the others wait for it.")
    ] = 0,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0: none. (100)")] = None,
    isolate: Annotated[
        str | None,
        typer.Option(
            help="netns: each node in a network namespace, its one interface capped by the kernel (tbf); needs root."
        ),
    ] = None,
    keys: KeysDirectory = None,
    prometheus: Annotated[
        str | None,
        typer.Option(help="Serve figures over HTTP: stage N at this port, or host:port, plus N (none: nowhere)."),
    ] = None,
    tensorboard: TensorBoard = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json on stdout, and nothing else.")] = False,
) -> None:
    """Train on this machine: a swarm of stage processes joined by capped links, watched until it ends."""
    one_arithmetic_thread()
    if isolate not in (None, "netns"):
        fail(f"--isolate: there is no '{isolate}'; it is netns, or left away", 2)
    options = {
        "pipeline.stages": stages,
        model_setting(model): model,
        "data.source": data,
        "codec.codec": codec,
        "codec.forward": forward,
        "codec.backward": backward,
        "link.link": link,
        "run.steps": steps,
        "pipeline.schedule": schedule,
        "pipeline.microbatches": microbatches,
        "pipeline.batch_size": batch_size,
        "data.sequence_length": sequence_length,
        "run.eval_every": eval_every,
        "run.seed": seed,
        "checkpoint.every": checkpoint_every,
    }
    options |= {"watch.prometheus": prometheus, "watch.tensorboard": tensorboard}
    auto = schedule if schedule and schedule.endswith(":hop=auto") else None
    if auto:
        options["pipeline.schedule"] = auto.removesuffix(":hop=auto")
    if resume is None:
        settings = configuration(config, options, overrides)
    elif one_process:
        fail("--resume: only a swarm writes checkpoints; leave --one-process away", 2)
    elif overwrite:
        fail("--resume goes on with a run, --overwrite replaces one; leave one away", 2)
    elif out not in (None, resume):
        fail(
            f"--resume {resume}: goes on where it is and not in {out}; leave --out away, or begin another run there", 2
        )
    else:
        settings, out = _resumed(resume, said(config, options, overrides), auto), resume
        auto = None  # the depth is the run's own
    from ..node.local import run_local

    out = out or Path("runs/latest")
    with run_errors(out):
        summary = run_local(
            settings,
            out,
            one_process=one_process,
            overwrite=overwrite,
            trace=trace,
            quiet=as_json,
            resume=resume is not None,
            restarts=restarts,
            schedule=auto,
            isolate=isolate is not None,
            keys=keys,
        )
    if as_json:
        print(json.dumps(summary, indent=2))


def _resumed(run: Path, given: dict[str, Any], auto: str | None) -> RunConfig:
    """The settings to go on with: the run's, and what is given now, where that may differ between nodes too. auto: the
    schedule with hop=auto, if that was given: whatever depth was found for the run is meant."""
    path = run_toml(run, "--resume")
    own = configuration(path, {}, None)
    if auto and auto.partition(":")[0] == own.pipeline.schedule.partition(":")[0]:
        del given["pipeline.schedule"]
    settings = configuration(path, given, None)
    from ..node.discovery.shared_config import LOCAL, differences

    if settings.digest() != own.digest():
        fail(
            f"--resume {run}: {differences(settings, own)}; a run that goes on keeps what it computes: leave that "
            f"away, or begin another run with --out (only {LOCAL} may change)",
            2,
        )
    return settings


def _stage(text: str) -> int:
    """The option --stage: a number, or -1 for auto."""
    if text == "auto":
        return AUTO
    if text.isascii() and text.isdecimal():
        return int(text)
    raise typer.BadParameter(f"'{text}' is neither a stage, from 0, nor auto")


def node(
    stage: Annotated[
        int, typer.Option(help="Which stage this node hosts, from 0; auto: the one that needs a node.", parser=_stage)
    ],
    config: Annotated[
        Path | None, typer.Option("--config", help="The run.toml that all nodes of the run share.")
    ] = None,
    listen: Annotated[str | None, typer.Option(help="host:port where the stage above reaches this node.")] = None,
    next_: Annotated[str | None, typer.Option("--next", help="host:port of the stage below.")] = None,
    join: Joins = None,
    announce: Announce = None,
    dht_port: DhtPort = None,
    run: Annotated[str | None, typer.Option(help="With --join: which run, where several are told of.")] = None,
    link: Link = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for this node's records. (beside run.toml; with --join runs/RUN)")
    ] = None,
    overrides: Override = None,
    trace: Annotated[bool, typer.Option("--trace", help="Write what ran when, for ui.perfetto.dev.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Take the stage's place in a run that has begun, from its newest checkpoint. (--join knows by itself)",
        ),
    ] = False,
    keys: KeysDirectory = None,
    insecure: Insecure = False,
    prometheus: Prometheus = None,
    tensorboard: TensorBoard = None,
    parent: Annotated[int | None, typer.Option(hidden=True, help="End when this process is gone.")] = None,
    check: Annotated[bool, typer.Option("--check", hidden=True, help="Only say what cannot work.")] = False,
) -> None:
    """Host one stage. Neighbours may start in any order and wait for each other.

    Either all addresses are given (--config, --listen, --next), or the node joins a swarm (--join) and needs nothing
    else.
    """
    one_arithmetic_thread()
    options = {
        "link.link": link,
        "compute.device": device,
        "watch.prometheus": prometheus,
        "watch.tensorboard": tensorboard,
    }
    if join and not check:
        if next_:
            fail("--next and --join contradict each other: the DHT says where the stage below is; leave one away", 2)
        wish = {"stage": None if stage == AUTO else stage, "listen": listen, "announce": announce, "config": config}
        wish |= {"join": tuple(join), "dht_port": dht_port, "run": run, "out": out}
        wish |= {"keys": keys, "insecure": insecure}
        return _join(wish, options, overrides, trace=trace, parent=parent, resume=resume)
    for option, given in (
        ("--stage auto", stage == AUTO),
        ("--announce", announce),
        ("--dht-port", dht_port),
        ("--run", run),
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
    if check:
        return _check(settings, stage)
    from ..node.addresses import ListenError
    from ..node.host import Addresses, HostError, HostOptions, check_input, host
    from ..node.local import LocalRunError, writable
    from ..node.security.keys import KeysError
    from ..node.security.policy import choose

    addresses = Addresses(listen=listen, next=next_)
    try:
        check_input(settings, stage, addresses)
        name, who = settings.run.name, [stage]
        security = choose(keys, insecure=insecure, listen=listen, dial=next_, run=name, stages=who)
        if security.warning:
            print(f"thinpipe: warning: {security.warning}", file=sys.stderr)
        directory = writable(out or config.parent)
        how = HostOptions(out=directory, trace=trace, parent=parent, resume=resume, security=security)
        host(settings, stage, addresses, how)
    except (KeysError, ListenError) as error:
        fail(str(error), 2)
    except (HostError, LocalRunError) as error:
        fail(str(error), error.exit_code)
    return None


def _check(settings: RunConfig, stage: int) -> None:
    """What `up` checks before it starts a process. The data is stage 0's alone."""
    from ..node.data import check_source
    from ..node.preparation import BAD_INPUT, check_settings

    try:
        check_settings(settings)
        if stage == 0 and not settings.compute.pace:
            check_source(settings.data)
    except BAD_INPUT as error:
        fail(str(error), 2)


def _join(
    wish: dict[str, Any],
    options: dict[str, Any],
    overrides: list[str] | None,
    *,
    trace: bool,
    parent: int | None,
    resume: bool,
) -> None:
    from ..node.addresses import ListenError
    from ..node.config import ConfigError, parse_override
    from ..node.discovery.claiming import RunThrough, StageTaken
    from ..node.discovery.client import DiscoveryError
    from ..node.discovery.joining import Wish, join
    from ..node.security.keys import KeysError

    try:
        given = {key: value for key, value in options.items() if value is not None}
        joined = join(Wish(**wish, overrides={**given, **dict(map(parse_override, overrides or []))}))
    except RunThrough as error:
        print(str(error))
        return
    except DiscoveryError as error:
        fail(str(error), error.exit_code)
    except (ConfigError, KeysError, ListenError, StageTaken) as error:
        fail(str(error), 2)
    from ..node.host import Addresses, HostError, HostOptions, host

    how = HostOptions(
        out=joined.out,
        trace=trace,
        parent=parent,
        resume=joined.resume or resume,
        security=joined.security,
        membership=joined.membership,
    )
    try:
        host(joined.config, joined.stage, Addresses(listen=joined.listen, next=None), how)
    except HostError as error:
        fail(str(error), error.exit_code)
