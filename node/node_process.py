"""Run one node process: configuration -> stage -> links -> loop, and end with one clear line whatever happens.

Expected failures are `NodeError` with an exit code: 2 for what the user can correct (a busy port, another run's
neighbour, a missing file), 1 for what happened to the run (a deadline that passed, a neighbour that is gone), 130 for a
node that was told to stop.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..compress.byte_format import CodecError
from ..protocol.greeting import NodeIdentity
from ..protocol.grid_place import GridPlace
from ..protocol.rollback_actions import SIDES, Side
from ..sim.launch.end_signals import ignore_draining, words_for
from ..sim.reports.metrics_address import MetricsAddressError
from ..sim.reports.preparation_console import PreparationDisplay
from .addresses import check_listen, split_address
from .averaging.averager import Averager
from .checkpoints.kept_tokenizer import keep_tokenizer
from .checkpoints.manifest import CheckpointError, Fingerprint, Manifest
from .checkpoints.store import CheckpointStore
from .config import ConfigError, RunConfig
from .context.context_links import link_for
from .data import Corpus
from .lanes.held_rounds import HeldRounds
from .link_settings import make_lateral_links
from .links.control_stream import Control
from .links.dialling import Where, dial, dial_control
from .links.link import Link
from .links.transport import LinkStreams, control_handler, listening
from .links.transport import serving as serving_only
from .measuring.pipeline_costs import pipeline_costs
from .model import ModelError
from .node_ending import ParentGone, Stopped, first_to_end, until_signal, watch_parent, while_calling
from .preparation import (
    BAD_INPUT,
    check_codec,
    check_device,
    check_lanes,
    check_link,
    prepare,
    prepare_corpus,
    resolve_architecture,
    state_digest,
)
from .recovery_loop import RecoveryLoop
from .run_corpus import check_named_tokenizer, corpus_of_run, tokenizer_of_run
from .run_records import MetricsWriter, Tracer
from .security.policy import PLAIN, Security
from .stage_failure import FAILED, StageFailed, first_of
from .watching.views import Watching
from .worker_thread import Reporter

if TYPE_CHECKING:
    from .data import Corpus
    from .discovery.membership import Membership


class NodeError(RuntimeError):
    """The node ends; `str(error)` is the one line that says why."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


EXIT_CODES = {BAD_INPUT: 2, (*FAILED, StageFailed, ParentGone): 1, (Stopped,): 130}


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where this node listens for the stage above and for higher lanes (None: it has neither), where the stage below
    is, and where its own stage is in each lower lane."""

    listen: str | None
    next: str | None
    lateral: Mapping[int, str] = field(default_factory=dict)


def check_input(config: RunConfig, stage: int, addresses: Addresses, lane: int = 0) -> None:
    """Raises NodeError for what can be seen to be wrong before minutes go into building the stage: its addresses (one
    that it needs and does not have, a port that is taken), the device, the codec, the link."""
    try:
        check_device(config)
        check_codec(config)
        check_link(config)
        check_lanes(config)
        if stage > 0:
            missing = f"stage {stage} has a stage above it: say where it listens, --listen host:port"
            check_listen(_need(addresses.listen, missing))
        elif lane < config.lanes.count - 1:
            missing = f"stage 0 of lane {lane} is dialled by higher lanes: say where it listens, --listen host:port"
            check_listen(_need(addresses.listen, missing))
        if stage < config.pipeline.stages - 1:
            missing = f"stage {stage} has a stage below it: say where that is, --next host:port"
            split_address(_need(addresses.next, missing))
    except BAD_INPUT as error:
        raise NodeError(str(error), 2) from None


def _need(address: str | None, missing: str) -> str:
    if not address:
        raise ConfigError(missing)
    return address


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """How a node runs that is nobody else's business. out: for its records and checkpoints. run: the run's own
    directory, where that is another one because there are lanes. lane: which of them it is in. resume: take the stage's
    place in a run that has begun. data_changed: though the text is another one. security: how it listens and dials.
    membership: of one that finds the others by the DHT, and knows where the stage below is.
    """

    out: Path
    run: Path | None = None
    lane: int = 0
    trace: bool = False
    parent: int | None = None
    resume: bool = False
    data_changed: bool = False
    security: Security = PLAIN
    membership: Membership | None = None


def run_node(config: RunConfig, stage: int, addresses: Addresses, options: NodeOptions) -> None:
    """Run one stage until the configured steps are done. Raises NodeError."""
    out, trace = options.out, options.trace
    try:
        watching, metrics = _records(config, stage, options)
    except BaseException:
        if options.membership:
            options.membership.leave()  # or the stage stays claimed
        raise
    tracer = Tracer(stage=stage, enabled=trace)

    def on_fault(code: str, line: str) -> None:
        metrics.write("fault", code=code, reason=line)
        print(f"stage {stage}: {line}", file=sys.stderr, flush=True)

    # An idle event loop that wakes up to send a frame must not wait 5 ms (Python's default) for the compute thread.
    sys.setswitchinterval(0.0005)
    try:
        metrics.write(
            "start",
            stage=stage,
            run=config.run.name,
            stages=config.pipeline.stages,
            lane=options.lane,
            lanes=config.lanes.count,
            steps=config.run.steps,
            host=socket.gethostname(),
            process=os.getpid(),
            listen=addresses.listen,
            next=addresses.next,
            lateral={str(lane): address for lane, address in addresses.lateral.items()},
            resume=options.resume,
            tls=options.security.keys is not None,
        )
        try:
            asyncio.run(_run(config, stage, addresses, options, metrics, tracer, on_fault))
            ignore_draining()
        except KeyboardInterrupt as told:  # before the loop had begun to listen to signals
            raise Stopped(str(told) or words_for(signal.SIGINT)) from None
        metrics.write("exit", exit_code=0)
    except Exception as error:
        cause = first_of(error)
        exit_code = next((code for kinds, code in EXIT_CODES.items() if isinstance(cause, kinds)), None)
        line = str(cause) or type(cause).__name__
        if isinstance(cause, Stopped):  # which is no fault
            metrics.write("stop", reason=line)
        else:
            metrics.write("fault", code=type(cause).__name__, reason=line)
        metrics.write("exit", exit_code=1 if exit_code is None else exit_code)
        if exit_code is None:
            raise  # a bug, with its traceback
        raise NodeError(line, exit_code) from None
    finally:
        if options.membership:
            options.membership.leave()
        watching.close()
        try:
            tracer.save(out / f"trace-stage-{stage}.json")
        except OSError as error:
            print(f"stage {stage}: warning: no trace is written: {error.strerror}", file=sys.stderr, flush=True)
        metrics.close()


def _records(config: RunConfig, stage: int, options: NodeOptions) -> tuple[Watching, MetricsWriter]:
    """Who watches, and where the node's records go. Raises NodeError for a port that is taken or a file that cannot be
    written."""
    try:
        lanes = {"lane": options.lane, "lanes": config.lanes.count}
        watching = Watching(config.watch, options.out, stage=stage, **lanes, replaces=options.resume)
    except MetricsAddressError as error:
        raise NodeError(str(error), 2) from None
    path = options.out / f"stage-{stage}.jsonl"
    try:
        return watching, MetricsWriter(path, append=options.resume, view=watching.take)
    except OSError as error:
        watching.close()
        raise NodeError(f"no records can be written to {path}: {error.strerror}; choose another --out", 2) from None


async def _run(
    config: RunConfig,
    index: int,
    addresses: Addresses,
    options: NodeOptions,
    metrics: MetricsWriter,
    tracer: Tracer,
    on_fault: Reporter,
) -> None:
    link = config.link
    checkpoints = config.checkpoint.path(options.out)
    if index == 0 and options.resume:
        check_named_tokenizer(config, checkpoints, options.run or options.out)
    stage, digest = prepare(config, index, options.lane)
    if index == 0:
        _write_costs(config, metrics)
    identity = NodeIdentity(
        run_id=config.run.name,
        configuration=digest,
        stage=index,
        stages=config.pipeline.stages,
        incarnation=options.membership.record.incarnation if options.membership else secrets.randbits(63),
        lane=options.lane,
        lanes=config.lanes.count,
    )
    written = state_digest(config, resolve_architecture(config), stage.token_table_digest)
    fingerprint = Fingerprint(run=config.run.name, configuration=written, stages=config.pipeline.stages)
    home = options.run or options.out  # which has the record of the text

    grouped = bool(config.context.method)

    def deadline_s(side: Side | None = None) -> float:
        """For the neighbour on that side of the chain (None: for the stage below): one that was there may have been
        lost, and somebody has to start it again."""
        was_there = recovery_loop.was_met if grouped and side is None else False
        was_there = was_there or recovery_loop.control.met[side or "below"].is_set()
        return max(link.connect_timeout_s, link.replacement_timeout_s) if was_there else link.connect_timeout_s

    security = options.security
    waits = {"greeting_timeout_s": link.greeting_timeout_s, "report": on_fault}
    waits |= {"security": security, "paused_ago_s": lambda: recovery_loop.pause.ago_s()}
    membership, below = options.membership, index + 1

    def where(place: GridPlace) -> str | Where:
        if membership:
            return membership.where(place, on_fault)
        return (addresses.next if place.stage != index else addresses.lateral.get(place.lane)) or ""

    def laterals() -> Mapping[int, str | Where]:
        if membership is None:
            return addresses.lateral
        return {lane: membership.where(GridPlace(index, lane), on_fault) for lane in range(options.lane)}

    def dial_link(link: Link) -> Coroutine[Any, Any, None]:
        """To the stage below, or to the own one in a lower lane; of a later generation one may be lost anew."""
        if not link.of_context:
            return dial(where(GridPlace(below, options.lane)), link, deadline_s=deadline_s, **waits)
        timeout_s = config.link.connect_timeout_s
        if link.session.identity.generation:
            timeout_s = max(timeout_s, config.link.replacement_timeout_s)
        return dial(laterals()[link.session.place.lane], link, deadline_s=lambda: timeout_s, **waits)

    def context_link(frame: bytes | None) -> Link | None:
        return link_for(frame, recovery_loop.context, identity)

    store = CheckpointStore(checkpoints, stage=index, fingerprint=fingerprint, keep=config.checkpoint.keep)

    def open_data() -> Corpus:
        return open_text(config, tokenizer_of_run(checkpoints, home) if options.resume else None)

    def accept_corpus(corpus: Corpus, manifests: list[Manifest]) -> Callable[[], None]:
        given = {"resume": options.resume, "changed": options.data_changed, "checkpoints": checkpoints}
        found = corpus_of_run(corpus, config, home, **given).check(manifests)
        if record := found.record:
            store.fingerprint = replace(store.fingerprint, corpus=record.corpus, tokenizer=record.tokenizer)

        def keep() -> None:
            found.keep(home)
            if found.record:
                try:
                    keep_tokenizer(checkpoints, corpus.tokenizer_files)
                except CheckpointError as error:  # as of any other write there: the run goes on
                    on_fault("checkpoint", str(error))

        return keep

    def averager_now() -> Averager:
        averager = recovery_loop.stage.averager  # of the stage as it is: it may have been built anew
        assert averager
        return averager

    def rounds_now() -> HeldRounds:
        assert recovery_loop.rounds
        return recovery_loop.rounds

    lateral = None
    if stage.averager:
        rounds = options.out / "rounds" / f"stage-{index}"
        if grouped or not options.resume:  # of another run that was here, or a generation that is over
            shutil.rmtree(rounds, ignore_errors=True)
        lateral = make_lateral_links(
            config,
            identity,
            addresses=laterals(),
            directory=rounds,
            contribution_bytes=lambda number: averager_now().bytes_of(number),
            heartbeat=lambda: recovery_loop.heartbeat(),
            joining=lambda: recovery_loop.machine.joining,
            report=on_fault,
            security=security,
            on_held=lambda: rounds_now().held(),
            rounds=lambda: averager_now().plan.count,
            check=lambda number, lane, content: averager_now().check(number, lane, content),
            status=(lambda: rounds_now().status()) if index == 0 else None,
            on_status=lambda lane, status: rounds_now().told(lane, status),
            on_met=lambda lane: rounds_now().met(lane),
            on_copy=lambda lane, frame: rounds_now().copy_frame(lane, frame),
            on_ended=lambda lane: rounds_now().ended(lane),
            generation=lambda: recovery_loop.heartbeat().generation if grouped else None,
        )
    recovery_loop = RecoveryLoop(
        config,
        stage,
        identity,
        joining=options.resume,
        rebuild=lambda: prepare(config, index, options.lane)[0],
        store=store,
        dial=dial_link,
        open_corpus=open_data if index == 0 else None,
        on_corpus=lambda corpus: tell_of_text(corpus, metrics),
        metrics=metrics,
        tracer=tracer,
        on_fault=on_fault,
        accept_corpus=accept_corpus,
        lateral=lateral,
    )
    async with AsyncExitStack() as open_ends:
        methods, leaving = membership.methods(on_fault) if membership else {}, asyncio.Event()
        if lateral:
            methods["Rounds"] = lateral.server.handler
        streams = config.lanes.count - 1  # that last, beside those to neighbours
        if grouped:
            given = {"greeting_timeout_s": link.greeting_timeout_s, "report": on_fault, "security": security}
            methods["Context"] = LinkStreams(context_link, what="context link", **given).serve
            streams += config.lanes.count  # of the chain of all of them there is one more
        if stage.upstream_endpoint:
            assert addresses.listen
            serving = listening(
                addresses.listen,
                lambda: recovery_loop.link_above,
                greeting_timeout_s=link.greeting_timeout_s,
                report=on_fault,
                control=recovery_loop.control,
                security=security,
                more=methods,
                more_streams=streams,
            )
            port = await open_ends.enter_async_context(serving)
            print(f"stage {index} listens on {addresses.listen.rpartition(':')[0]}:{port}", flush=True)
        elif methods and addresses.listen:  # no stage is above, but new nodes may join here
            if grouped:  # and the next lane is beside
                methods["Control"] = control_handler(
                    recovery_loop.control,
                    link.greeting_timeout_s,
                    on_fault,
                    security,
                    stopping=lambda: leaving.is_set(),
                )
            serving = serving_only(addresses.listen, methods, security, more_streams=streams)
            await open_ends.enter_async_context(serving)
            open_ends.callback(leaving.set)
        endless: list[Awaitable[None]] = [until_signal(recovery_loop.drain)]
        if membership:
            endless.append(membership.keep_current(recovery_loop, config.tokens_per_step, on_fault))
        if options.parent is not None:
            endless.append(watch_parent(options.parent))
        work = recovery_loop.run()
        if lateral:
            endless.append(rounds_now().run())
            open_ends.push_async_callback(lateral.close)
            work = while_calling(work, lateral.run(), lambda: link.greeting_timeout_s)
        control, chained = recovery_loop.control, recovery_loop.machine.identity
        for side in SIDES:
            if not chained.dials(side):
                continue
            there = where(chained.place_of(chained.beside(side)))
            due_s = partial(deadline_s, side)
            calling = dial_control(there, control, side=side, deadline_s=due_s, **waits)
            work = while_calling(work, calling, partial(_farewell_s, control, side, link.greeting_timeout_s))
        try:
            await first_to_end(work, *endless)
        except (Stopped, ParentGone):
            raise
        except Exception as error:  # also of what runs beside the stage
            await recovery_loop.farewell(error)
            raise


def _farewell_s(control: Control, side: Side, timeout_s: float) -> float:
    """For how long the call to that neighbour may go on when this node is through."""
    return timeout_s if control.said_last_word(side) else 0


def _write_costs(config: RunConfig, metrics: MetricsWriter) -> None:
    """What readers need to advise another cut. An advice is not worth a run, so who cannot tell writes nothing."""
    with suppress(ModelError, CodecError):
        if costs := pipeline_costs(config, resolve_architecture(config)):
            metrics.write("costs", **costs.record())


def open_text(config: RunConfig, kept: Path | None) -> Corpus:
    """The corpus, prepared if need be, and said while it is. kept: the run's own tokenizer. Raises DataError or
    SourceLost."""
    with PreparationDisplay(Console(), config.data.source) as display:
        return prepare_corpus(config, display.report, kept=kept)


def tell_of_text(corpus: Corpus, metrics: MetricsWriter) -> None:
    """Record what it holds, and say it. Not in the thread that prepares it: records are written by one thread."""
    metrics.write("data", **corpus.record())
    if corpus.line:
        print(corpus.line, flush=True)
    for line in corpus.warnings:
        print(f"stage 0: warning: {line}", file=sys.stderr, flush=True)
