"""Options that several commands share: one spelling, one text, one meaning.

A command declares `steps: Annotated[int | None, shared("--steps", "200")] = None` and hands what it was given to
`settings_of`, which knows the setting that each option stands for. What differs from command to command is the default
alone, so that is said where the command is. Why not ready types, as in common.py: those have no place for a default or
for a variable of the environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from .common import fail

HELP = {
    "--stages": "Number of pipeline stages, one process each.",
    "--model": "Model: preset tiny, 150m, 500m, 800m, 1b or 8b, or the directory of a Hugging Face decoder.",
    "--data": "Text to train on: stdlib, a file or directory, or hf:NAME.",
    "--codec": "Codec, which compresses tensors between stages: mapl, mapl:r=64,... or dense bf16, int8. Byte formats "
    "may follow: CODEC [FORWARD [BACKWARD]].",
    "--forward": "Byte format of activations: fp32 to int2, topk:k=16, rvq:groups=8,codes=256,...",
    "--backward": "Byte format of gradients: the same choices.",
    "--link": "Rate limit and delay of every link, in each direction: rate,latency such as 300mbit,25ms; or none.",
    "--cut": "Layers of each stage, such as 3,3,2,0; auto: by speed; equal.",
    "--speeds": "Speed of each stage's machine, relative, such as 1,1,0.5,0.25.",
    "--lanes": "Number of lanes: replicas of the whole chain of stages, each with its own part of the data.",
    "--average": "How lanes become one model: gradients, outer:every=20,lr=0.7,... or sparta:p=0.05,every=10,...",
    "--chunks": "Number of chunks: lanes that hold parts of the same sequences, and exchange keys and values.",
    "--context": "How keys and values cross to the other chunks: full, full:format=int8, mos:k=0.02,v=0.05,...",
    "--steps": "Number of training steps.",
    "--schedule": "Schedule: gpipe, 1f1b or zb; for slow links such as 1f1b:rtt_ratio=1.8. rtt_ratio=auto chooses the "
    "depth by simulation; best, best:in_flight=8: the quickest order. Or a CSV file of orders, a row a stage.",
    "--microbatches": "Microbatches per step: parts of its batch.",
    "--batch-size": "Sequences per step.",
    "--sequence-length": "Tokens per sequence.",
    "--eval-every": "Steps between evaluations; 0: only at the end.",
    "--seed": "Random seed, for weights, data order and rounding.",
    "--checkpoint-every": "Steps between checkpoints; 0 writes none.",
}
SETTING = {
    "stages": "pipeline.stages",
    "data": "data.source",
    "link": "link.link",
    "cut": "pipeline.cut",
    "speeds": "pipeline.speeds",
    "lanes": "lanes.count",
    "average": "lanes.average",
    "context": "context.method",
    "steps": "run.steps",
    "schedule": "pipeline.schedule",
    "microbatches": "pipeline.microbatches",
    "batch_size": "pipeline.batch_size",
    "sequence_length": "data.sequence_length",
    "eval_every": "run.eval_every",
    "seed": "run.seed",
    "checkpoint_every": "checkpoint.every",
}


def shared(option: str, default: str = "", *, more: str = "", envvar: str | None = None) -> Any:
    """The option of that name. default: in words, for who leaves it away. more: what else this command does with it."""
    text = " ".join(part for part in (HELP[option], more, default and f"({default})") if part)
    return typer.Option(option, help=text, envvar=envvar)


def settings_of(
    *,
    model: str | None = None,
    codec: str | None = None,
    forward: str | None = None,
    backward: str | None = None,
    chunks: int | None = None,
    **given: Any,
) -> dict[str, Any]:
    """The settings that were given, by the names of their options; None is not given. Ends with 2 for a --codec that
    cannot be taken apart, and for options that exclude each other."""
    from ..node.codec_words import codec_settings
    from ..node.config import ConfigError

    try:
        found: dict[str, Any] = {} if model is None else {model_setting(model): model}
        found |= codec_settings(codec, forward, backward)
    except ConfigError as error:
        fail(str(error), 2)
    if chunks is not None:
        if given.get("lanes") is not None:
            fail(
                "--chunks are lanes of the same sequences, --lanes of different ones; omit one of the two",
                2,
            )
        if given.get("context") == "" and chunks > 1:
            fail(f"--chunks {chunks}, but --context names no way for keys and values to cross; say --context full", 2)
        found |= {"lanes.count": chunks, "lanes.average": "gradients", "context.method": "full"}
    return found | {SETTING[name]: value for name, value in given.items() if value is not None}


def model_setting(model: str) -> str:
    """Which setting --model means: a directory, or a preset."""
    return "model.path" if model and (os.sep in model or Path(model).is_dir()) else "model.preset"


def without_auto(schedule: str | None) -> tuple[str | None, str | None]:
    """The schedule to begin with, and the one that was asked for, if that is found by simulation later: rtt_ratio=auto
    or best."""
    from ..protocol.sought_schedule import is_sought, plain_schedule

    auto = schedule if schedule and is_sought(schedule) else None
    return (plain_schedule(auto) if auto else schedule), auto
