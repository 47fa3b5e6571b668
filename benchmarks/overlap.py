"""Sends overlap compute: a real swarm at a cap that binds, its trace, its picture, and the share as a figure.

    .venv/bin/python benchmarks/overlap.py [--link 40mbit,10ms] [--out runs/overlap]

Writes trace.json (open it at ui.perfetto.dev) and trace.png into --out, and prints per stage how long its links were
carrying something and in what share of that time the same stage was computing.
"""

import json
import subprocess
import sys
from pathlib import Path

from described import described
from thinpipe.sim.reports.trace import overlap


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--link", default="40mbit,10ms")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/overlap"))
    given = parser.parse_args()
    command = [sys.executable, "-m", "thinpipe.cli", "up", "--trace", "--overwrite", "--json", "--out", str(given.out)]
    command += ["--stages", str(given.stages), "--steps", str(given.steps), "--link", given.link]
    command += ["--microbatches", "16", "--batch-size", "32", "--codec", "bf16"]
    summary = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    events = json.loads((given.out / "trace.json").read_text())["traceEvents"]
    for stage in range(given.stages):
        seconds, share = overlap(events, stage)
        print(f"stage {stage}: {seconds:6.2f} s with something on its links, computing in {share:.1%} of that time")
    for entry in summary["boundaries"]:
        print(f"boundary {entry['boundary']}: cap used {entry['utilisation']:.1%} of the run")
    print(f"{given.out}/trace.png, {given.out}/trace.json")


if __name__ == "__main__":
    main()
