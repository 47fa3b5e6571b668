"""`thinpipe export`: the trained model of a run, as a directory that transformers loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Json, Lane, Override, configuration, fail, run_of


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run: its --out, which holds run.toml.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write, new or empty.")],
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, help="After so many steps. (the newest that all stages have a checkpoint of)"),
    ] = None,
    lane: Lane = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="An ordinary checkpoint, without boundaries; prints what that costs. (off)"),
    ] = False,
    overrides: Override = None,
    as_json: Json = False,
) -> None:
    """Write the trained model as a Hugging Face directory: config.json, safetensors, tokenizer.

    Dense codecs and ssn give an ordinary checkpoint. With the others the boundaries are a part of the model: the
    directory has a file that computes them, and loads with trust_remote_code=True, without thinpipe. The held-out loss
    of what was written is printed beside the one that the run recorded.
    """
    run, lane = run_of(run, lane)
    if not (run / "run.toml").is_file():
        fail(f"{run} is not the directory of a run: it holds no run.toml; name the --out of a run", 2)
    own = configuration(run / "run.toml", {}, None)
    settings = configuration(run / "run.toml", {}, overrides)
    if settings.digest() != own.digest():
        from ..node.discovery.shared_config import LOCAL, differences

        fail(f"--set: {differences(settings, own)}; a run's model is what it is: only {LOCAL} may change", 2)
    from safetensors import SafetensorError

    from ..node.checkpoints.manifest import CheckpointError
    from ..node.export.export import export_run
    from ..node.export.portable_model import ExportError
    from ..node.preparation import BAD_INPUT

    def report(line: str) -> None:
        print(f"thinpipe: {line}", file=sys.stderr)

    try:
        written = export_run(run, out, step=step, lane=lane, plain=plain, config=settings, report=report)
    except (ExportError, CheckpointError, *BAD_INPUT) as error:
        fail(str(error), 2)
    except (OSError, SafetensorError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        fail(f"cannot write {out}: {cause}; choose another --out", 1)
    print(json.dumps(written, indent=2) if as_json else _told(written))


def _told(written: dict[str, Any]) -> str:
    """For people."""
    size = sum(written["files"].values()) / 1e6
    boundaries, left_out, held_out = written["boundaries"], written["boundaries_left_out"], written["held_out"]
    kind = f"{written['architecture']}, {written['parameters']:,} parameters"
    if boundaries:
        kind += f", {_counted(boundaries)} of {written['codec']}"
    of = f"lane {written['lane']} of {written['run']}" if "lane" in written else written["run"]
    lines = [
        f"{written['out']}: {kind}, after step {written['step']} of {of} ({size:.1f} MB)",
        f"held-out loss, {held_out['sequences']} sequences of {held_out['sequence_length']} tokens:",
        *(f"  {'   -  ' if loss is None else f'{loss:.4f}'}  {what}" for loss, what in _losses(written)),
    ]
    if written.get("angles_left_out"):
        lines.append(f"without the angles of {written['context']}, which no plain projection computes")
    if left_out:
        lines.append(f"{_counted(left_out)} left out: omit --plain to have the model that was trained")
    more = ", trust_remote_code=True" if boundaries else ""
    return "\n".join([*lines, f'load it: AutoModelForCausalLM.from_pretrained("{written["out"]}"{more})'])


def _counted(boundaries: int) -> str:
    return "1 boundary" if boundaries == 1 else f"{boundaries} boundaries"


def _losses(written: dict[str, Any]) -> list[tuple[float | None, str]]:
    held_out = written["held_out"]
    unknown = f" (unknown: {held_out['reason']})" if held_out["reason"] else ""
    recorded = "as the run recorded it, with what its wire rounds"
    if held_out["loss_recorded"] is None:
        recorded = "the run did not evaluate after this step"
    rows = [(held_out["loss_recorded"], recorded)]
    if written["boundaries_left_out"]:
        rows += [
            (held_out["loss_with_boundaries"], f"with its boundaries{unknown}"),
            (held_out["loss"], f"this model, without them{unknown}"),
        ]
    else:
        rows.append((held_out["loss"], f"this model{unknown}"))
    return rows
