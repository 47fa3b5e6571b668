"""How long until it works: `thinpipe up` to its first step, in units of one import of torch and transformers.

An import is what a process cannot do without, and how fast a machine does it says how fast it is. So everything is
divided by it, and everything is measured in turns: import, commands, import, commands. Seconds are those of the wall
and, beside them, of the processors (all processes of the command), which a machine that does something else leaves
nearly alone.

    python benchmarks/startup.py --repeats 5
    python benchmarks/startup.py --before DIR    # and DIR/thinpipe, another state of it, in the same turns

Prints one line of JSON: for each state, for each command, best and median of the wall's seconds over the import's, and
the best of the processors'. `up` is four stages of `tiny`, one step, one evaluation; `first_step` is the moment that
stage 0 has recorded it. `node` is one stage alone, until it could begin.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from thinpipe.sim.reports.summary import read_records

DEADLINE_S = 300.0
COMMAND = (str(Path(sys.executable).with_name("thinpipe")),)  # what a user types
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Times = dict[str, tuple[float, float]]  # what -> seconds of the wall, of the processors


def timed(command: list[str], path: str) -> tuple[float, float]:
    """Run it to its end; seconds of the wall and of the processors, its children's included."""

    def used_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before_s, began_s = used_s(), time.perf_counter()
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**ENVIRONMENT, "PYTHONPATH": path}, timeout=DEADLINE_S
    )
    return time.perf_counter() - began_s, used_s() - before_s


def seconds_to(event: str, out: Path, began_s: float) -> float:
    records = read_records(out / "stage-0.jsonl")
    return next(record["time_s"] for record in records if record["event"] == event) - began_s


def one_turn(path: str, directory: Path) -> Times:
    """Every command once, of the package that `path` leads to; "": the installed one."""
    found: Times = {"import": timed([sys.executable, "-c", "import torch, transformers"], path)}
    found["help"] = timed([*COMMAND, "--help"], path)
    found["node --help"] = timed([*COMMAND, "node", "--help"], path)
    out, began_s = directory / "up", time.time()
    found["up --steps 1"] = timed([*COMMAND, "up", "--steps", "1", "--json", "--overwrite", "--out", str(out)], path)
    found["first_step"] = (seconds_to("step", out, began_s), 0.0)
    found["node"] = node_alone(path, directory / "node")
    return found


def node_alone(path: str, out: Path) -> tuple[float, float]:
    """One stage that is a whole run, until it is ready; then it is killed."""
    out.mkdir(exist_ok=True)
    (out / "run.toml").write_text("[pipeline]\nstages = 1\n")
    (out / "stage-0.jsonl").unlink(missing_ok=True)
    command = [*COMMAND, "node", "--config", str(out / "run.toml"), "--stage", "0"]
    began_s = time.time()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**ENVIRONMENT, "PYTHONPATH": path}) as node:
        try:
            while time.time() - began_s < DEADLINE_S and node.poll() is None:
                records = out / "stage-0.jsonl"
                if records.exists() and any(record["event"] == "ready" for record in read_records(records)):
                    return seconds_to("ready", out, began_s), 0.0
                time.sleep(0.02)
            raise SystemExit(f"benchmarks/startup.py: the node was not ready within {DEADLINE_S:g} s; see {out}")
        finally:
            node.kill()


def ratios(turns: list[Times]) -> dict[str, dict[str, float]]:
    told: dict[str, dict[str, float]] = {}
    for what in turns[0]:
        wall, used = ([turn[what][i] for turn in turns] for i in (0, 1))
        unit_wall, unit_used = ([turn["import"][i] for turn in turns] for i in (0, 1))
        told[what] = {
            "best": round(min(wall) / min(unit_wall), 2),
            "median": round(statistics.median(w / u for w, u in zip(wall, unit_wall, strict=True)), 2),
            "best_s": round(min(wall), 2),
        }
        if any(used):
            told[what]["processors"] = round(min(used) / min(unit_used), 2)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", help="directory that holds another state of the package, called thinpipe")
    given = parser.parse_args()
    states = {"after" if given.before else "now": "", **({"before": given.before} if given.before else {})}
    turns: defaultdict[str, list[Times]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        one_turn("", Path(directory))  # files come into the machine's memory, and text is tokenised
        for _ in range(given.repeats):
            for name, path in states.items():
                turns[name].append(one_turn(path, Path(directory)))
    told: dict[str, Any] = {name: ratios(measured) for name, measured in turns.items()}
    if given.before:
        for what in ("first_step", "up --steps 1", "node"):
            told[f"{what}, after / before"] = round(told["after"][what]["best"] / told["before"][what]["best"], 2)
    print(json.dumps({"cores": os.cpu_count(), "repeats": given.repeats, **told}))


if __name__ == "__main__":
    main()
