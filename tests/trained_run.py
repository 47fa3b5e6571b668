"""A run's directory as a swarm leaves it, made in this process within a second: records, run.toml and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from thinpipe.node.checkpoints.kept_tokenizer import keep_tokenizer
from thinpipe.node.checkpoints.manifest import Fingerprint
from thinpipe.node.checkpoints.store import CheckpointStore
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.one_process import OneProcess
from thinpipe.node.preparation import resolve_architecture, state_digest
from thinpipe.node.run_corpus import open_run_corpus
from thinpipe.node.run_lanes import of_lane
from thinpipe.node.stage import Stage


def train(config: RunConfig, out: Path, *, after: Callable[[list[Stage]], None] | None = None) -> list[Stage]:
    """Train `config` and write checkpoints after its last step, of all lanes; returns the stages of the first as they
    stand. `after`: what is done to those of each before that."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.toml").write_text(dump_config(config), encoding="utf-8")
    reference = OneProcess(config, out)
    reference.train()
    reference.close()
    for lane in reference.lanes:
        if after:
            after(lane.stages)
        write_checkpoints(config, out, lane.stages, lane.lane)
    return reference.stages


def write_checkpoints(config: RunConfig, out: Path, stages: Sequence[Stage], lane: int = 0) -> None:
    """As each stage of a swarm would write its own, after the steps that are done."""
    architecture = resolve_architecture(config)
    text = open_run_corpus(config, out, resume=False)
    text.keep(out)
    own, place = of_lane(config, out, lane)
    for stage in stages:
        digest = state_digest(config, architecture, stage.token_table_digest)
        fingerprint = Fingerprint(run=config.run.name, configuration=digest, stages=len(stages))
        if stage.first and text.record:
            keep_tokenizer(own.checkpoint.path(place), text.corpus.tokenizer_files)
            fingerprint = replace(fingerprint, corpus=text.record.corpus, tokenizer=text.record.tokenizer)
        store = CheckpointStore(own.checkpoint.path(place), stage=stage.index, fingerprint=fingerprint)
        store.write(stage.snapshot(), generation=0, written_s=0)


@torch.no_grad()
def shake(stages: list[Stage]) -> None:
    """Add noise to all that is trained, so that each part of a model counts for much after a few steps."""
    generator = torch.Generator().manual_seed(5)
    for stage in stages:
        for _, parameter in stage.trained:
            scale = 0.3 if parameter.ndim < 2 else 0.5 / parameter.shape[-1] ** 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)
