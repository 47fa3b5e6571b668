"""`thinpipe eval` and `thinpipe generate`: what a trained model is worth, and what it writes.

Both take a run, of which they use the newest checkpoint, or a model's directory of Hugging Face's layout, which need
not have been trained here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, Lane, fail, one_arithmetic_thread, run_of

Target = Annotated[
    Path, typer.Argument(metavar="RUN|DIR", help="A run (its --out), or a model's directory with its config.json.")
]
Step = Annotated[int | None, typer.Option(min=1, help="Checkpoint after so many steps of a run. (the newest)")]
Device = Annotated[str, typer.Option(help="Where a directory's model computes: cpu, cuda, cuda:1.")]
Trust = Annotated[
    bool,
    typer.Option("--trust-code", help="Run code that a directory brings along. thinpipe's own needs no trust. (off)"),
]


def evaluate(
    target: Target,
    data: Annotated[
        str | None, typer.Option(help="Text: stdlib, a file or directory, or hf:NAME. (a run's held-out part)")
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="Where the text is in a row of jsonl, parquet or a dataset.")
    ] = "text",
    choices: Annotated[
        Path | None,
        typer.Option(
            help='Also ask questions with choices: JSON lines of {"context": "...", "choices": ["...", "..."], '
            '"answer": 0}.'
        ),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window of text. (as trained; of a directory 1024 or less)")
    ] = None,
    step: Step = None,
    lane: Lane = None,
    device: Device = "cpu",
    trust_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a trained model on text (loss, perplexity, bits a byte) and on questions with choices.

    A run is measured with its boundaries, as its messages round them and without rounding. The second is what an export
    computes. Questions are answered without rounding: the choice with the highest log-probability behind the context,
    summed over its tokens, and divided by its bytes.
    """
    one_arithmetic_thread()
    from ..node.checkpoints.manifest import CheckpointError
    from ..node.evaluating.evaluation import Asked
    from ..node.evaluating.evaluation import evaluate as measure
    from ..node.evaluating.subject import EvaluationError
    from ..node.preparation import BAD_INPUT

    target, lane = run_of(target, lane)
    asked = Asked(
        data=data,
        text_field=text_field,
        choices=choices,
        step=step,
        lane=lane,
        length=sequence_length,
        trusted=trust_code,
        device=device,
    )
    try:
        found = measure(target, asked, report=_warn)
    except (*BAD_INPUT, EvaluationError, CheckpointError) as error:
        fail(str(error), 2)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console

    from ..node.evaluating.tables import evaluation_tables

    console = Console()
    for each in evaluation_tables(found):
        console.print(each, highlight=False, soft_wrap=isinstance(each, str))


def generate(
    target: Target,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model goes on with.")],
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens to write. Fewer if the model ends its text.")
    ] = 100,
    temperature: Annotated[
        float, typer.Option(help="0: always the most likely token; 1: as likely as the model holds it.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most likely tokens that together have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the draws.")] = 1,
    step: Step = None,
    lane: Lane = None,
    device: Device = "cpu",
    trust_code: Trust = False,
) -> None:
    """Write text with a trained model: TEXT and what comes after it, on stdout, while it is made.

    A run is used as its export would be: with its boundaries, without the rounding of its messages.
    """
    one_arithmetic_thread()
    from ..node.checkpoints.manifest import CheckpointError
    from ..node.evaluating.generation import Sampling, load
    from ..node.evaluating.generation import generate as go_on
    from ..node.evaluating.subject import EvaluationError
    from ..node.export.portable_model import ExportError
    from ..node.preparation import BAD_INPUT

    target, lane = run_of(target, lane)

    def write(part: str) -> None:
        print(part, end="", flush=True)

    try:
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        sampling.check(text)
        model, words = load(target, step=step, lane=lane, trusted=trust_code, device=device, report=_warn)
        sampling.check_fits(model, words, text)
        write(text)
        go_on(model, words, text, sampling, write)
        print()
    except (*BAD_INPUT, EvaluationError, ExportError, CheckpointError) as error:
        fail(str(error), 2)


def _warn(line: str) -> None:
    print(f"thinpipe: {line}", file=sys.stderr)
