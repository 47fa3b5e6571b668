"""One node from its settings to its end: build the stage, put links, rounds and checkpoints to it, listen, call, train.

What may be asked for before it is there (the state machine that a greeting needs while the stage's first link is made,
the rounds that a lateral link belongs to) is looked up when it is needed, and not handed over: all of it outlives any
link.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..compress.byte_format import CodecError
from ..protocol.greeting import NodeIdentity
from ..sim.reports.preparation_console import PreparationDisplay
from .averaging.averager import Averager
from .checkpoints.kept_tokenizer import keep_tokenizer
from .checkpoints.manifest import CheckpointError, Fingerprint, Manifest
from .checkpoints.store import CheckpointStore
from .config import RunConfig
from .context.context_links import link_for
from .data import Corpus
from .lanes.held_rounds import HeldRounds
from .lanes.lateral_links import LateralLinks
from .link_settings import make_lateral_links
from .links.link import Link
from .links.transport import LinkStreams, control_handler, listening
from .links.transport import serving as serving_only
from .measuring.pipeline_costs import pipeline_costs
from .model import ModelError
from .node_calls import NodeCalls
from .node_ending import ParentGone, Stopped, first_to_end, until_signal, watch_parent, while_calling
from .node_options import NodeSetup
from .preparation import prepare, prepare_corpus, resolve_architecture, state_digest
from .recovery_loop import RecoveryLoop
from .run_corpus import check_named_tokenizer, corpus_of_run, tokenizer_of_run
from .run_records import MetricsWriter


async def run_stage(setup: NodeSetup) -> None:
    """Host the stage until the run's steps are done. Raises what is wrong with the input (`preparation.BAD_INPUT`),
    Stopped, ParentGone, and what `RecoveryLoop.run` does."""
    await _NodeRun(setup).run()


class _NodeRun:
    """Made in the event loop in which it runs."""

    def __init__(self, setup: NodeSetup) -> None:
        config, index, options, metrics = setup.config, setup.stage, setup.options, setup.metrics
        self._config, self._index, self._addresses, self._options = config, index, setup.addresses, options
        self._on_fault = setup.on_fault
        self._grouped = bool(config.context.method)
        self._checkpoints = config.checkpoint.path(options.out)
        if index == 0 and options.resume:
            check_named_tokenizer(config, self._checkpoints, options.home)
        self._stage, digest = prepare(config, index, options.lane)
        if index == 0:
            _write_costs(config, metrics)
        membership = options.membership
        self._identity = NodeIdentity(
            run_id=config.run.name,
            configuration=digest,
            stage=index,
            stages=config.pipeline.stages,
            incarnation=membership.record.incarnation if membership else secrets.randbits(63),
            lane=options.lane,
            lanes=config.lanes.count,
        )
        written = state_digest(config, resolve_architecture(config), self._stage.token_table_digest)
        fingerprint = Fingerprint(run=config.run.name, configuration=written, stages=config.pipeline.stages)
        self._store = CheckpointStore(
            self._checkpoints, stage=index, fingerprint=fingerprint, keep=config.checkpoint.keep
        )
        self._calls = NodeCalls(setup, lambda: self._loop)
        self._lateral = self._lateral_links() if self._stage.averager else None
        self._loop = RecoveryLoop(
            config,
            self._stage,
            self._identity,
            joining=options.resume,
            rebuild=lambda: prepare(config, index, options.lane)[0],
            store=self._store,
            dial=self._calls.dial_link,
            open_corpus=self._open_corpus if index == 0 else None,
            on_corpus=lambda corpus: tell_of_text(corpus, metrics),
            metrics=metrics,
            tracer=setup.tracer,
            on_fault=setup.on_fault,
            accept_corpus=self._accept_corpus,
            lateral=self._lateral,
        )

    async def run(self) -> None:
        """Listen, call and train, until all is done or one of them fails."""
        membership, loop = self._options.membership, self._loop
        async with AsyncExitStack() as open_ends:
            await self._listen(open_ends)
            endless: list[Awaitable[None]] = [until_signal(loop.drain)]
            if membership:
                endless.append(membership.keep_current(loop, self._config.tokens_per_step, self._on_fault))
            if self._options.parent is not None:
                endless.append(watch_parent(self._options.parent))
            work = loop.run()
            if lateral := self._lateral:
                endless.append(self._rounds_now().run())
                open_ends.push_async_callback(lateral.close)
                work = while_calling(work, lateral.run(), lambda: self._config.link.greeting_timeout_s)
            try:
                await first_to_end(self._calls.beside(work), *endless)
            except (Stopped, ParentGone):
                raise
            except Exception as error:  # also of what runs beside the stage
                await loop.farewell(error)
                raise

    async def _listen(self, open_ends: AsyncExitStack) -> None:
        """Where a stage is above, or other lanes or new nodes may call; until `open_ends` is closed."""
        listen, security = self._addresses.listen, self._options.security
        timeout_s, report = self._config.link.greeting_timeout_s, self._on_fault
        membership, leaving = self._options.membership, asyncio.Event()
        methods = membership.methods(report) if membership else {}
        if self._lateral:
            methods["Rounds"] = self._lateral.server.handler
        streams = self._config.lanes.count - 1  # that last, beside those to neighbours
        if self._grouped:
            given: dict[str, Any] = {"greeting_timeout_s": timeout_s, "report": report, "security": security}
            methods["Context"] = LinkStreams(self._context_link, what="context link", **given).serve
            streams += self._config.lanes.count  # of the chain of all of them there is one more
        if self._stage.upstream_endpoint:
            assert listen
            serving = listening(
                listen,
                lambda: self._loop.generations.link_above,
                greeting_timeout_s=timeout_s,
                report=report,
                control=self._loop.control,
                security=security,
                more=methods,
                more_streams=streams,
            )
            port = await open_ends.enter_async_context(serving)
            print(f"stage {self._index} listens on {listen.rpartition(':')[0]}:{port}", flush=True)
        elif methods and listen:  # no stage is above, but new nodes may join here
            if self._grouped:  # and the next lane is beside
                methods["Control"] = control_handler(
                    self._loop.control, timeout_s, report, security, stopping=lambda: leaving.is_set()
                )
            await open_ends.enter_async_context(serving_only(listen, methods, security, more_streams=streams))
            open_ends.callback(leaving.set)

    def _context_link(self, frame: bytes | None) -> Link | None:
        return link_for(frame, self._loop.generations.context, self._identity)

    # -- other lanes --------------------------------------------------------------------------------------------------

    def _lateral_links(self) -> LateralLinks:
        directory = self._options.out / "rounds" / f"stage-{self._index}"
        if self._grouped or not self._options.resume:  # of another run that was here, or a generation that is over
            shutil.rmtree(directory, ignore_errors=True)
        return make_lateral_links(
            self._config,
            self._identity,
            addresses=self._calls.laterals(),
            directory=directory,
            contribution_bytes=lambda number: self._averager_now().bytes_of(number),
            heartbeat=lambda: self._loop.heartbeat(),
            joining=lambda: self._loop.machine.joining,
            report=self._on_fault,
            security=self._options.security,
            on_held=lambda: self._rounds_now().held(),
            rounds=lambda: self._averager_now().plan.count,
            check=lambda number, lane, content: self._averager_now().check(number, lane, content),
            status=(lambda: self._rounds_now().status()) if self._index == 0 else None,
            on_status=lambda lane, status: self._rounds_now().told(lane, status),
            on_met=lambda lane: self._rounds_now().met(lane),
            on_copy=lambda lane, frame: self._rounds_now().copy_frame(lane, frame),
            on_ended=lambda lane: self._rounds_now().ended(lane),
            generation=lambda: self._loop.heartbeat().generation if self._grouped else None,
        )

    def _averager_now(self) -> Averager:
        averager = self._loop.stage.averager  # of the stage as it is: it may have been built anew
        assert averager
        return averager

    def _rounds_now(self) -> HeldRounds:
        assert self._loop.rounds
        return self._loop.rounds

    # -- the text -----------------------------------------------------------------------------------------------------

    def _open_corpus(self) -> Corpus:
        kept = tokenizer_of_run(self._checkpoints, self._options.home) if self._options.resume else None
        return open_text(self._config, kept)

    def _accept_corpus(self, corpus: Corpus, manifests: list[Manifest]) -> Callable[[], None]:
        home = self._options.home
        given: Mapping[str, Any] = {
            "resume": self._options.resume,
            "changed": self._options.data_changed,
            "checkpoints": self._checkpoints,
        }
        found = corpus_of_run(corpus, self._config, home, **given).check(manifests)
        if record := found.record:
            known = {"corpus": record.corpus, "tokenizer": record.tokenizer}
            self._store.fingerprint = replace(self._store.fingerprint, **known)

        def keep() -> None:
            found.keep(home)
            if found.record:
                try:
                    keep_tokenizer(self._checkpoints, corpus.tokenizer_files)
                except CheckpointError as error:  # as of any other write there: the run goes on
                    self._on_fault("checkpoint", str(error))

        return keep


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
