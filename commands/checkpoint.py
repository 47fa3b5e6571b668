"""`thinpipe checkpoint ls|verify|convert`: list and verify the checkpoints of a run, or make a run with other stages of
them. None changes the run that it reads."""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, configuration, fail, from_home, one_arithmetic_thread, run_of, said
from .options import settings_of, shared

if TYPE_CHECKING:
    from ..node.config import RunConfig

checkpoint = typer.Typer(
    help="List or verify the checkpoints of a run, without changing anything; or convert it to other stages.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run: its --out, which holds run.toml.")]
OfLane = Annotated[int | None, typer.Option("--lane", min=0, help="Only this lane, of a run that has several. (all)")]


@checkpoint.command("ls")
@from_home
def checkpoint_ls(run: Run, lane: OfLane = None, as_json: Json = False) -> None:
    """List the checkpoints by step: which stages have one, and whether the run can resume from it.

    Only manifests and file lengths are checked; `verify` also reads the tensors. A line says whether the run is under
    way, has ended or was broken off: while it is under way, new checkpoints come and old ones go.
    """
    _show_checkpoints(run, lane, as_json, thorough=False)


@checkpoint.command("verify")
@from_home
def checkpoint_verify(run: Run, lane: OfLane = None, as_json: Json = False) -> None:
    """Read every checkpoint and compare its digests with its manifest.

    Exit code 1 if any is damaged or of another format, or there is none, 2 if RUN is not the directory of a run.
    """
    if _show_checkpoints(run, lane, as_json, thorough=True):
        raise typer.Exit(1)


@checkpoint.command("convert")
@from_home
def checkpoint_convert(
    run: Run,
    out: Annotated[Path, typer.Option(help="Directory for the converted run; a new or an empty one.")],
    stages: Annotated[int | None, shared("--stages", "as many as --cut has")] = None,
    cut: Annotated[str | None, shared("--cut", "auto")] = None,
    speeds: Annotated[str | None, shared("--speeds", "alike")] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Steps completed. (the newest that all stages have intact)")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="What else goes with the stages: pipeline.microbatches=16, pipeline.schedule=zb."),
    ] = None,
) -> None:
    """Make the same run with other stages: weights, optimizer, position in the data, and what codecs learned at
    boundaries that stay between the same layers. `thinpipe up --resume OUT` goes on with it.
    """
    one_arithmetic_thread()
    settings = _settings(run)
    if (lanes := settings.lanes.count) > 1:  # what averaging carries from round to round is of each stage's own part
        cut_as = f"--stages {stages}" if stages else f"--cut {cut}" if cut else "--stages N"
        fail(
            f"{run}: checkpoint convert takes runs of one lane, and this one has {lanes}; a new run takes its weights "
            f"to other stages, with fresh moments: thinpipe up --from {run} --lanes {lanes} {cut_as} --out {out}",
            2,
        )
    asked = _asked(said(None, settings_of(stages=stages, cut=cut, speeds=speeds), overrides))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"--out {out}: it is there already, and not empty; choose another directory", 2)
    from ..node.checkpoints.assemble import AssembleError, assemble
    from ..node.checkpoints.convert import convert, recut
    from ..node.checkpoints.manifest import CheckpointError
    from ..node.preparation import BAD_INPUT, check_settings
    from ..node.run_corpus import carry_corpus, check_named_tokenizer, first_checkpoints
    from ..node.run_directory import LocalRunError, carry_start, with_start, writable
    from ..node.stage_state import StateError

    missing = [each for each in (out, *out.parents) if not each.exists()]
    done = False
    try:
        begun = with_start(settings, run)
        check_named_tokenizer(begun, first_checkpoints(begun, run), run)
        config = recut(begun, asked)
        check_settings(config)
        found = assemble(run, step=step, report=lambda line: print(f"thinpipe: {line}", file=sys.stderr))
        carry_corpus(run, writable(out))
        config = carry_start(config, run, out)
        lines = convert(found, config, out, written_s=time.time())
        done = True
    except (*BAD_INPUT, AssembleError) as error:
        fail(f"{run}: {error}", 2)
    except LocalRunError as error:
        fail(str(error), error.exit_code)
    except (CheckpointError, StateError) as error:
        fail(str(error), 1)
    finally:
        if not done:
            _remove(out, missing)
    for line in lines:
        print(line)
    parts = "1 stage" if config.pipeline.stages == 1 else f"{config.pipeline.stages} stages"
    done_steps = "1 step" if found.completed == 1 else f"{found.completed} steps"
    print(f"{parts} after {done_steps}: {out}; go on: thinpipe up --resume {out}")


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the new cut, with the number of stages; ends with 2 for what is no part of a cut."""
    from ..node.checkpoints.convert import CUT_SETTINGS
    from ..node.config_file import known_keys

    if foreign := [name for name in given if name in known_keys() and name not in CUT_SETTINGS]:
        fail(
            f"--set {', '.join(foreign)}: a converted run is the same run, so only what goes with its stages may "
            f"change here ({', '.join(CUT_SETTINGS)}); thinpipe up --resume takes settings of each machine, and a new "
            "run, up --from, any other",
            2,
        )
    if "pipeline.stages" in given:
        return given
    cut = given.get("pipeline.cut", "")
    counts = cut if isinstance(cut, list) else str(cut).split(",")
    if len(counts) < 2:
        fail("say how many stages: --stages N, or --cut with the layers of each, such as --cut 3,3,2", 2)
    return {**given, "pipeline.stages": len(counts)}


def _remove(out: Path, missing: list[Path]) -> None:
    """What an attempt has left, and the directories that were not there before it."""
    for left in out.glob("*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    with suppress(OSError):
        for directory in missing:
            directory.rmdir()


def _settings(run: Path) -> RunConfig:
    """Of the run in that directory; ends with 2 where there is none."""
    if not (run / "run.toml").is_file():
        fail(f"{run} is not the directory of a run: it holds no run.toml; name the --out of a run", 2)
    return configuration(run / "run.toml", {}, None)


def _show_checkpoints(run: Path, lane: int | None, as_json: bool, *, thorough: bool) -> int:
    """Print what is there, of all lanes or of one. Returns how many faults there are: each that is damaged has its line
    on stderr, and so has it that there is nothing to verify."""
    run, lane = run_of(run, lane)
    settings = _settings(run)
    from ..node.checkpoints.manifest import CheckpointError
    from ..node.config import ConfigError
    from ..node.run_lanes import check_lane, of_lane
    from ..sim.reports.liveness import liveness

    try:
        if lane is not None:
            check_lane(settings, lane)
        lanes = range(settings.lanes.count) if lane is None else [lane]
        found = [_listed(*of_lane(settings, run, each), thorough=thorough) for each in lanes]
    except ConfigError as error:
        fail(str(error), 2)
    except CheckpointError as error:
        fail(str(error), 1)
    alive = liveness(run, time.time())
    if as_json:
        head = {"verified": thorough, "run": alive.record()}
        several = {"lanes": [{"lane": each, **of_lane} for each, of_lane in zip(lanes, found, strict=True)]}
        print(json.dumps({**head, **(found[0] if settings.lanes.count == 1 else several)}, indent=2))
    else:
        for each, of_lane in zip(lanes, found, strict=True):
            _print_checkpoints(of_lane, f"checkpoints of lane {each}" if settings.lanes.count > 1 else "checkpoints")
        more = "; checkpoints come and go" if alive.state == "under way" else ""
        print(f"the run {alive.line()}{more}")
    return sum(_faults(of_lane, thorough=thorough) for of_lane in found)


def _listed(settings: RunConfig, directory: Path, *, thorough: bool) -> dict[str, Any]:
    """{"directory", "checkpoints"} of a chain of stages. Raises CheckpointError."""
    from ..node.checkpoints.listing import list_checkpoints

    saved = settings.checkpoint.path(directory)
    rows = list_checkpoints(saved, run=settings.run.name, stages=settings.pipeline.stages, thorough=thorough)
    return {"directory": str(saved), "checkpoints": rows}


def _print_checkpoints(found: dict[str, Any], title: str) -> None:
    if not found["checkpoints"]:
        print(f"no checkpoints in {found['directory']}; set checkpoint.every to have some")
        return
    from rich.console import Console

    from ..node.checkpoints.listing import checkpoint_table

    Console(markup=False).print(checkpoint_table(found["checkpoints"], title))


def _faults(found: dict[str, Any], *, thorough: bool) -> int:
    damaged = [held["problem"] for row in found["checkpoints"] for held in row["stages"] if held["problem"]]
    for line in damaged:
        print(f"thinpipe: {line}", file=sys.stderr)
    if thorough and not found["checkpoints"]:
        print(f"thinpipe: there is no checkpoint in {found['directory']}, so nothing was verified", file=sys.stderr)
        return 1
    return len(damaged)
