"""How long a new machine takes: seconds from the start of `thinpipe node --join` to its first training step.

A bootstrap, then one node for each stage of `tiny`, all with `--stage auto`; when they train, the last stage is killed
and one more node comes in its place. Printed as JSON, for each node: until it has a stage, and until its first step.
All on one machine, so the imports of several processes share its cores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinpipe.node.config_file import dump_config, merge, parse_config
from thinpipe.node.preparation import prepare_corpus
from thinpipe.sim.launch.node_launch import node_environment
from thinpipe.sim.reports.summary import read_records

DEADLINE_S = 180.0


@contextmanager
def process(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        command = [sys.executable, "-m", "thinpipe.cli", *arguments]
        started = subprocess.Popen(command, stdout=out, stderr=out, env=node_environment())
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()


def said(log: Path, pattern: str) -> re.Match[str]:
    return until(lambda: re.search(pattern, log.read_text()), f"{log} to say {pattern}")


def until(look: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + DEADLINE_S
    while not (found := look()):
        if time.monotonic() > deadline_s:
            raise SystemExit(f"waited {DEADLINE_S:g} s for {what}")
        time.sleep(0.02)
    return found


def moment(out: Path, stage: int, event: str) -> float | None:
    """When the stage wrote its first record of that kind."""
    path = out / f"stage-{stage}.jsonl"
    return next((r["time_s"] for r in read_records(path) if r["event"] == event), None) if path.exists() else None


class Joiner:
    """A node, from its start to its first step."""

    def __init__(self, directory: Path, name: str, rendezvous: str) -> None:
        self.out, self.log = directory / name, directory / f"{name}.log"
        self.began_s = time.time()
        self.running = process(self.log, "node", "--join", rendezvous, "--stage", "auto", "--out", str(self.out))
        self.process = self.running.__enter__()

    def figures(self) -> dict[str, Any]:
        found = said(self.log, r"as stage (\d+) of \d+ at (\S+),")
        stage = int(found[1])
        when = {event: until(lambda e=event: moment(self.out, stage, e), event) for event in ("start", "step")}
        seconds = {event: round(at_s - self.began_s, 2) for event, at_s in when.items()}
        return {"stage": stage, "claimed_s": seconds["start"], "first_step_s": seconds["step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    given = parser.parse_args()
    settings = {"pipeline.stages": given.stages, "run.steps": 100_000, "checkpoint.every": 10, "codec.codec": "bf16"}
    config = parse_config(merge({}, settings))
    prepare_corpus(config)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "run.toml").write_text(dump_config(config))
        bootstrap = directory / "bootstrap.log"
        options = ["--listen", "127.0.0.1:0", "--config", str(directory / "run.toml")]
        with process(bootstrap, "dht", *options):
            rendezvous = said(bootstrap, r"node --join (\S+) --stage auto")[1]
            nodes = [Joiner(directory, f"node-{number}", rendezvous) for number in range(given.stages)]
            try:
                figures: dict[str, Any] = {"stages": given.stages, "nodes": [node.figures() for node in nodes]}
                lost = next(n for n, f in zip(nodes, figures["nodes"], strict=True) if f["stage"] == given.stages - 1)
                lost.process.kill()
                nodes.append(Joiner(directory, "replacement", rendezvous))
                figures["replacement"] = nodes[-1].figures()
            finally:
                for node in nodes:
                    node.process.kill()
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
