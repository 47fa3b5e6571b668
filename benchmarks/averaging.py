"""What averaging costs over thin links: thinpipe's rounds, hivemind's averager and gloo's all-reduce, side by side.

    sudo .venv/bin/python benchmarks/averaging.py [--peers 2,3] [--caps 80mbit,300mbit] [--rounds 3] [--programs A,B]
        [--lost kill,unplug] [--preset 150m] [--stages 8] [--json FILE] [--quick]

All average the same tensors: those of an inner stage of the preset, float32, filled anew for each round. Each peer is a
process in a network namespace of its own behind tbf (`sim.links.netns`), without latency; one arithmetic thread each,
nothing encrypted but by hivemind, which knows no other way. A round begins when all peers are told, and ends when the
last of them has the mean; the first one at a cap does not count, of the others the median is taken.

- bytes: what a peer's interface has sent for a round, whole frames, mean over peers; and that over the bytes of
  numbers that the algorithm has to send (`payload`): (P - 1) contributions for thinpipe's mesh, 2 (P - 1) / P for the
  others, who send each number to one peer that adds it up, and the sum back.
- of the link: how much of a peer's sending direction was used while the round lasted.
- CPU: seconds of all processes of a peer, a round; with packing, encryption and the disk.
- off: the distance of what came out of the first round from the float64 mean, relative. thinpipe carries what it
  rounds away to the next round; the others forget it.
- same bits: whether all peers ended every round with the same bits. By arrival (three peers): whether the same tensors
  give other bits when the peers come in the opposite order.

Then peer P - 1 is lost in the middle of a round of each tool's first program, at the first cap: `kill` ends its
processes by SIGKILL, `unplug` pulls the cable before. Every tool was told to give a silent peer `--patience` seconds.
Needs root. Writes a table, and with --json all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from averaging_crew import PeerFailed
from averaging_rounds import Benchmark, shapes
from averaging_table import lost_table, rounds_table
from described import described
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from thinpipe.node.model.architecture import ModelError
from thinpipe.sim.links.netns import network
from thinpipe.sim.links.shaper import LinkError, LinkProfile
from thinpipe.sim.links.tc import KernelLinkError

TOOLS = {  # and in which formats each averages here
    "thinpipe": [f"{mode}-{fmt}" for mode in ("outer", "gradients") for fmt in ("int4", "int8", "bf16", "fp32")],
    "hivemind": ["float32", "float16", "uniform8", "blockwise8"],  # the last one needs bitsandbytes
    "gloo": ["float32", "bf16"],
}
PROGRAMS = (
    "thinpipe outer-int4",
    "thinpipe outer-bf16",
    "thinpipe outer-fp32",
    "thinpipe gradients-int8",
    "hivemind float16",
    "hivemind uniform8",
    "gloo float32",
    "gloo bf16",
)
QUICK: dict[str, Any] = {"peers": "2", "caps": "80mbit", "preset": "tiny", "stages": 4, "patience": 4.0}
QUICK |= {"programs": "thinpipe outer-int4,thinpipe outer-fp32,hivemind float16,gloo float32", "lost": ""}
PEERS_MAX = 8  # on the cores of one machine


def main() -> None:
    parser = described(__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tensors, two peers, one cap: under a minute")
    parser.add_argument("--peers", default="2,3")
    parser.add_argument("--caps", default="80mbit,300mbit", help="of each peer's link, both ways; no latency")
    parser.add_argument("--rounds", type=int, default=3, help="that count, at each cap; 0: only lose peers")
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="TOOL FORMAT, with commas between")
    parser.add_argument("--lost", default="kill", help="ways to lose a peer: kill,unplug; '' for none")
    parser.add_argument("--losses", type=int, default=1, help="how often each way")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds that a tool gives a silent peer")
    parser.add_argument("--preset", default="150m")
    parser.add_argument("--stages", type=int, default=8, help="the preset's layers are cut into")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="keep the peers' logs here (an empty directory)")
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end, namespaces and processes too
    tools = read(parser, given)
    try:
        tensors = shapes(given.preset, given.stages)
    except (ModelError, ValueError) as error:
        parser.error(f"--preset, --stages: {error}")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bench, exit_code = None, 0
    try:
        with (
            network(max(given.peers), LinkProfile.parse("none")) as made,
            tempfile.TemporaryDirectory() as temporary,
            Progress(*columns, console=console) as progress,
        ):
            bench = Benchmark(given, tensors, made, given.out or Path(temporary), progress)
            for peers in given.peers if given.rounds else ():
                for tool, specs in tools.items():
                    bench.measure(tool, specs, peers)
            losses = itertools.product(given.lost, given.peers, tools.items(), range(given.losses))
            for how, peers, (tool, specs), number in losses:
                bench.lose(tool, specs[0], peers, how, number)
    except KeyboardInterrupt:
        exit_code = 130
    except (KernelLinkError, PeerFailed) as error:
        print(f"averaging.py: {error}", file=sys.stderr)
        exit_code = 1
    if bench:  # also what was measured before an end that nobody planned
        report(bench, given.json)
    sys.exit(exit_code)


def read(parser: argparse.ArgumentParser, given: argparse.Namespace) -> dict[str, list[str]]:
    """Make lists of what has commas between. Returns the formats of each tool; ends with one line for what is none."""
    for name in ("peers", "programs", "lost", "caps"):
        setattr(given, name, [part.strip() for part in getattr(given, name).split(",") if part.strip()])
    if not given.peers or not all(part.isdecimal() and 2 <= int(part) <= PEERS_MAX for part in given.peers):
        parser.error(f"--peers {','.join(given.peers)}: counts from 2 to {PEERS_MAX}, such as 2,3")
    given.peers = list(map(int, given.peers))
    if unknown := set(given.lost) - {"kill", "unplug"}:
        parser.error(f"--lost {unknown.pop()}: kill or unplug")
    try:
        given.caps = [str(LinkProfile.parse(part)) for part in given.caps]
    except LinkError as error:
        parser.error(f"--caps: {error}")
    tools: dict[str, list[str]] = {}
    for program in given.programs:
        tool, _, spec = program.partition(" ")
        if spec not in TOOLS.get(tool, ()):
            known = ", ".join(f"{tool} {spec}" for tool, specs in TOOLS.items() for spec in specs)
            parser.error(f"--programs: no '{program}'; there are {known}")
        tools.setdefault(tool, []).append(spec)
    return tools


def report(bench: Benchmark, path: Path | None) -> None:
    rounds, lost = list(map(asdict, bench.held)), list(map(asdict, bench.lost))
    tables = [rounds_table(rounds, bench.by_arrival)] if rounds else []
    tables += [lost_table(lost)] if lost else []
    print("\n\n".join(tables))
    if path:
        found: dict[str, Any] = {"command": sys.argv[1:], "load": os.getloadavg(), "by_arrival": bench.by_arrival}
        path.write_text(json.dumps({**found, "rounds": rounds, "lost": lost}, indent=1))


if __name__ == "__main__":
    main()
