"""Run one node process (`node.node_run`), and end with one clear line whatever happens.

Expected failures are `NodeError` with an exit code: 2 for what the user can correct (a busy port, another run's
neighbour, a missing file), 1 for what happened to the run (a deadline that passed, a neighbour that is gone), 130 for a
node that was told to stop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from ..sim.launch.end_signals import ignore_draining, words_for
from ..sim.reports.metrics_address import MetricsAddressError
from .addresses import check_listen, split_address
from .config import ConfigError, RunConfig
from .node_ending import ParentGone, Stopped
from .node_options import Addresses, NodeOptions, NodeSetup
from .node_run import run_stage
from .preparation import (
    BAD_INPUT,
    check_codec,
    check_device,
    check_lanes,
    check_link,
)
from .run_records import MetricsWriter, Tracer
from .stage_failure import FAILED, StageFailed, first_of
from .watching.views import Watching

if TYPE_CHECKING:
    pass


class NodeError(RuntimeError):
    """The node ends; `str(error)` is the one line that says why."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


EXIT_CODES = {BAD_INPUT: 2, (*FAILED, StageFailed, ParentGone): 1, (Stopped,): 130}


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
            written = {"metrics": metrics, "tracer": tracer, "on_fault": on_fault}
            asyncio.run(
                run_stage(NodeSetup(config=config, stage=stage, addresses=addresses, options=options, **written))
            )
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
