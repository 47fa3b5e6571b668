"""`thinpipe supervise`: start one stage's node, and start it again when it fails. A container or a service runs it.

See sim/launch/service_supervisor.py for what it does. Options can come from the environment (THINPIPE_STEPS, ...),
because docker-compose.yml, `docker run -e` and a systemd unit can all set that.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Config, Override, configuration, fail, may_outlast_its_output, one_arithmetic_thread, said
from .options import settings_of, shared

if TYPE_CHECKING:
    from ..node.config import RunConfig
    from ..protocol.grid_place import GridPlace
    from ..sim.links.shaper import LinkProfile

CAPS = ("user", "kernel", "auto")
CHECK_S = 600  # enough for a large model on a slow disk


def supervise(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", envvar="THINPIPE_RUN", help="Directory of the run, shared by all its stages on this machine."
        ),
    ],
    stage: Annotated[
        int | None, typer.Option(min=0, envvar="THINPIPE_STAGE", help="Stage to serve, counted from 0, such as 2.")
    ] = None,
    lane: Annotated[
        int | None,
        typer.Option(
            min=0, envvar="THINPIPE_LANE", help="Lane to serve the stage in, from 0, in a run that has several. (0)"
        ),
    ] = None,
    lanes: Annotated[int | None, shared("--lanes", "1", envvar="THINPIPE_LANES")] = None,
    average: Annotated[str | None, shared("--average", "outer", envvar="THINPIPE_AVERAGE")] = None,
    standby: Annotated[
        bool, typer.Option("--standby", help="Serve no stage until one is lost, then serve that one. (off)")
    ] = False,
    peers: Annotated[
        str,
        typer.Option(envvar="THINPIPE_PEERS", help="host:port of every stage, in order, lane after lane, with commas."),
    ] = "",
    link: Annotated[str | None, shared("--link", envvar="THINPIPE_LINK")] = None,
    cap: Annotated[
        str,
        typer.Option(
            envvar="THINPIPE_CAP",
            help="What enforces the link. user: the node. kernel: a tbf queue on every interface of this machine, "
            "which stays after the run. auto: the kernel if it is permitted, else the node.",
        ),
    ] = "user",
    user: Annotated[
        str | None,
        typer.Option(envvar="THINPIPE_USER", help="Switch to this user once the interfaces are capped. (stay)"),
    ] = None,
    model: Annotated[str | None, shared("--model", envvar="THINPIPE_MODEL")] = None,
    data: Annotated[str | None, shared("--data", envvar="THINPIPE_DATA")] = None,
    codec: Annotated[str | None, shared("--codec", envvar="THINPIPE_CODEC")] = None,
    steps: Annotated[int | None, shared("--steps", envvar="THINPIPE_STEPS")] = None,
    schedule: Annotated[str | None, shared("--schedule", envvar="THINPIPE_SCHEDULE")] = None,
    seed: Annotated[int | None, shared("--seed", envvar="THINPIPE_SEED")] = None,
    checkpoint_every: Annotated[int | None, shared("--checkpoint-every", envvar="THINPIPE_CHECKPOINT_EVERY")] = None,
    config: Config = None,
    overrides: Override = None,
    settings_text: Annotated[
        str,
        typer.Option(
            "--settings", envvar="THINPIPE_SET", help="Further settings, as for --set, separated by blanks. (none)"
        ),
    ] = "",
    node_options: Annotated[
        str,
        typer.Option(
            "--node", envvar="THINPIPE_NODE", help="Further options for `thinpipe node`, as one string. (none)"
        ),
    ] = "",
    restarts: Annotated[int, typer.Option(min=0, help="How many times a node that failed is started again.")] = 5,
    health: Annotated[
        Path | None,
        typer.Option(
            envvar="THINPIPE_HEALTH", help="Touch this file while the stage makes progress, for health checks. (none)"
        ),
    ] = None,
) -> None:
    """Keep one stage of a run served, in a container or as a service. Start its node, and start it again when it fails.

    The first supervisor writes RUN/run.toml. The others are refused if their settings would change what the run
    computes. A stage that was started before is resumed. It ends with the run; stage 0 then prints the summary.
    --standby waits until a stage of RUN is lost, and then serves that stage.
    """
    one_arithmetic_thread()
    may_outlast_its_output()
    names = [name.strip() for name in peers.split(",") if name.strip()]
    if (stage is None) != standby:
        fail("say which stage to serve: --stage N, or --standby for any that is lost", 2)
    if standby and lane is not None:
        fail("--standby serves any stage that is lost, in whatever lane; omit --lane", 2)
    if cap not in CAPS:
        fail(f"--cap: there is no '{cap}'; choose {', '.join(CAPS)}", 2)
    if health and not health.parent.is_dir():
        fail(f"--health {health}: there is no directory {health.parent}; make it, or name another file", 2)
    sets = [*settings_text.split(), *(overrides or [])]
    there = run / "run.toml"
    source = config or (there if there.is_file() else None)
    count = configuration(source, {"lanes.count": lanes}, sets).lanes.count
    if not names or len(names) % count or (stage or 0) >= len(names) // count:
        of = "" if count == 1 else f" of {count} lanes"
        known = f"{len(names)} addresses, for {len(names) / count:g} stages{of}" if of else f"{len(names)} stages"
        fail(f"--peers has {known}; name host:port of every one, in order, stage 0 first", 2)
    given = settings_of(
        stages=len(names) // count,
        lanes=lanes,
        average=average,
        model=model,
        data=data,
        codec=codec or None,
        link=link,
        steps=steps,
        schedule=schedule,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    settings = configuration(source, given, sets)
    from ..node.addresses import ListenError, split_address
    from ..node.config import ConfigError
    from ..node.run_lanes import check_lane, of_lane
    from ..protocol.grid_place import GridPlace
    from ..sim.launch.privileges import become, known
    from ..sim.launch.service_supervisor import Assignment, Supervisor
    from ..sim.launch.stage_lock import SupervisorError
    from ..sim.links.shaper import LinkError, LinkProfile
    from ..sim.reports.lanes import node_name

    try:
        node_words = shlex.split(node_options)
    except ValueError as error:
        fail(f'--node "{node_options}": {error}; write it as in a shell', 2)
    place = GridPlace(stage or 0, lane or 0)
    who = "standby" if standby else node_name(*place, settings.lanes.count)
    try:
        for name in names:
            split_address(name)
        check_lane(settings, place.lane)
        profile = LinkProfile.parse(settings.link.link)
        given_here = said(config, given, sets)
        if user:  # from here on, what can be refused is refused before an interface is capped
            known(user)
        if there.is_file():
            _shared(there, settings, given_here)
        else:
            _check(settings, place, node_words, user)
        if cap != "user":
            profile = _cap(profile, who, must=cap == "kernel")
        if user:
            try:
                become(user)
            except SupervisorError:
                if profile.kernel:
                    _uncap()
                raise
        shared, own = _agree(there, settings, given_here)
        if not (standby or any("checkpoint.directory" in word for word in (*own, *node_words))):
            _check_checkpoints(*of_lane(shared, run, place.lane))
        node = ["--link", str(profile), *own, *node_words]
        assignment = Assignment(
            run=run,
            stage=stage,
            lane=place.lane,
            lanes=settings.lanes.count,
            peers=names,
            steps=shared.run.steps,
            node=node,
            health=health,
            restarts=restarts,
        )
        code = Supervisor(assignment).run()
    except (ConfigError, LinkError, ListenError, SupervisorError) as error:
        fail(str(error), 2)
    if code:
        raise typer.Exit(code)


def _check(settings: RunConfig, place: GridPlace, node_words: list[str], user: str | None) -> None:
    """Refuse what cannot work before it stands in RUN, where its correction would be another run's settings. In a
    process that ends: the supervisor itself has no use for torch, and may stay for days. As `user`, who is to read the
    model and the data. Raises SupervisorError."""
    from ..node.config_file import dump_config
    from ..sim.launch.node_ends import ERROR_PREFIX
    from ..sim.launch.node_launch import node_environment
    from ..sim.launch.privileges import known, may_not_become
    from ..sim.launch.stage_lock import SupervisorError

    environment, credentials = node_environment(), dict[str, Any]()
    if user and os.getuid() != (entry := known(user)).pw_uid:
        credentials = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": os.getgrouplist(user, entry.pw_gid)}
        environment["HOME"] = entry.pw_dir
    try:
        with NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
            file.write(dump_config(settings))
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            command = [sys.executable, "-m", "thinpipe.cli", "node", "--config", file.name, "--stage", str(place.stage)]
            command += ["--lane", str(place.lane)] if settings.lanes.count > 1 else []
            done = subprocess.run(
                [*command, "--check", *node_words],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=CHECK_S,
                **credentials,
            )
    except OSError as error:
        if user and credentials and isinstance(error, PermissionError):
            raise may_not_become(user) from None
        raise SupervisorError(f"cannot check the settings: {error}") from None
    except subprocess.TimeoutExpired:
        raise SupervisorError(
            f"checking the settings (model, data) took more than {CHECK_S} s; look at its disk"
        ) from None
    if done.returncode:
        last = [f"the check of the settings ended with {done.returncode}", *done.stderr.strip().splitlines()][-1]
        fail(last.removeprefix(ERROR_PREFIX), 2 if done.returncode == 2 else 1)


def _check_checkpoints(config: RunConfig, run: Path) -> None:
    """End with 2 where they are lost, and the run would begin again with its first step."""
    from ..node.checkpoints.lost import lost_line
    from ..node.checkpoints.manifest import CheckpointError

    try:
        line = lost_line(config, run, time.time())
    except CheckpointError as error:
        line = str(error)
    if line:
        fail(line, 2)


def _cap(profile: LinkProfile, who: str, *, must: bool) -> LinkProfile:
    """Put the cap on every interface here, and say what the kernel does of it; returns the link for the node."""
    from ..sim.links import tc

    if profile.rate_bits_per_s is None:
        if freed := _uncap():
            print(f"{who}: {', '.join(freed)} no longer capped", flush=True)
        return profile
    try:
        names = tc.interfaces()
        if not names:
            raise tc.KernelLinkError("no network interface is up here")
        whole, *others = [tc.cap_most(name, profile) for name in names]
        if any(other != whole for other in others):
            raise tc.KernelLinkError("it can delay on only some of the interfaces")
    except tc.KernelLinkError as error:
        _uncap()
        why = f"the kernel does not cap the links here: {error}"
        if "not permitted" in str(error) or "may not change" in str(error):
            why += "; in a container: give it the capability NET_ADMIN (cap_add: [NET_ADMIN], --cap-add NET_ADMIN)"
        if must:
            fail(why, 2)
        print(f"{who}: {why}. So the node caps its links itself, in user space", flush=True)
        return profile
    delay = (
        ""
        if not profile.latency_s
        else ", delay by netem"
        if whole
        else ", delay by the node: this kernel has no netem"
    )
    print(f"{who}: {', '.join(names)} capped at {profile}: rate by tbf{delay}", flush=True)
    return replace(profile, kernel="all" if whole else "rate")


def _uncap() -> list[str]:
    """Take what thinpipe put on the interfaces here off again, now or in an earlier life; the names of those."""
    from ..sim.links import tc

    freed = []
    with suppress(tc.KernelLinkError):  # who may not change them has put nothing there
        for name in tc.interfaces():
            with suppress(tc.KernelLinkError):
                freed += [name] if tc.uncap(name) else []
    return freed


def _agree(path: Path, settings: RunConfig, given: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """The settings in RUN/run.toml, which who comes first writes; what was given here must agree with them. Where nodes
    may differ it need not: then the second are options for the node."""
    from ..node.config import recommended_line
    from ..node.config_file import dump_config

    aside = path.with_name(f".run.toml-{os.uname().nodename}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(dump_config(settings), encoding="utf-8")
        try:
            os.link(aside, path)  # fails if it is there: whole, or not at all
            if line := recommended_line(settings):
                print(line, flush=True)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; choose another directory, or another --user", 2)
    return _shared(path, settings, given)


def _shared(path: Path, settings: RunConfig, given: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """What stands in RUN/run.toml, and options for the node: what was `given` here and may differ from it. Ends with 2
    where it may not."""
    from ..node.config import ConfigError
    from ..node.config_file import load_config
    from ..node.discovery.shared_config import differences

    try:
        shared = load_config(path)
    except ConfigError as error:
        fail(str(error), 2)
    if settings.digest() != shared.digest():
        if settings.of_any_length().digest() == shared.of_any_length().digest():
            steps = f"run.steps = {settings.run.steps}"
            fail(
                f"{path} has run.steps = {shared.run.steps}, here {steps}; to go on with that run, write {steps} "
                "into it, on every machine; or name another directory",
                2,
            )
        fail(f"{path} is another run's: {differences(settings, shared)}; name another directory, or remove that one", 2)
    here, there = (each.model_dump(mode="json") for each in (settings, shared))
    own: list[str] = []
    for key in given:
        section, _, name = key.partition(".")
        if here[section][name] != there[section][name] and key != "link.link":  # which is an option of its own
            own += ["--set", f"{key}={json.dumps(here[section][name], ensure_ascii=False)}"]
    return shared, own
