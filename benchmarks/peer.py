"""thinpipe against what a user would pick instead, torch.distributed.pipelining, over the same kernel-capped links.

    sudo .venv/bin/python benchmarks/peer.py [--repeats 3] [--steps 12] [--stages 2] [--caps 80mbit,300mbit]
        [--emulate 20,40] [--set section.key=value] [--json FILE] [--out DIRECTORY]

Both train the same stages from the same weights on the same batches (see peer_torch.py), 1F1B, bf16 on the wire, one
arithmetic thread a process; each stage in a network namespace of its own, behind tbf (`sim.links.netns`); thinpipe's
nodes are those of its command line, over gRPC and with no cap of their own. In a repeat every program runs at every
cap, in an order that turns round from one repeat to the next. tokens/s: of the steps after the first `--skip`, by the
moments at which stage 0 ended them; bytes a token: what the kernel counted on all nodes' links between two of these
moments.

Ratios are taken within a repeat; printed are their geometric mean and a 95 % interval (Student's t over logarithms).
`mapl` cannot be faster than the link is relieved, bytes of the peer / its own, nor than compute allows, itself
uncapped / the peer at the cap: the smaller one is the bound that stands beside it. Beside the ratio of times stands
that of CPU seconds, of all stages and threads. With `--emulate F,B` a stage sleeps F and B ms a microbatch instead of
computing, so a cap binds that a laptop's compute would not reach, and a fourth program is there: "bare gRPC"
(peer_grpc.py), which passes on messages of the same size and does nothing else. It is the floor of the library: what
thinpipe costs above it is thinpipe's own. Needs root, for the namespaces.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from described import described
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config, merge, parse_config, parse_override
from thinpipe.node.preparation import prepare_corpus
from thinpipe.sim.launch.node_launch import node_environment
from thinpipe.sim.links.netns import Network, network
from thinpipe.sim.links.shaper import LinkProfile
from thinpipe.sim.links.tc import KernelLinkError
from thinpipe.sim.reports.summary import read_records

PROGRAMS = {"thinpipe bf16": "bf16", "torch bf16": "bf16", "thinpipe mapl": "mapl", "bare gRPC": "bf16"}  # and codecs
PORT = 7001
# Narrow and shallow: many bytes for little arithmetic, so that a thin link can bind at the pace of a few cores.
COMPUTED = {"model.layers": 2, "model.width": 128, "model.vocab_size": 1024, "data.sequence_length": 128}
COMPUTED |= {"pipeline.batch_size": 64, "pipeline.microbatches": 8, "data.heldout_sequences": 8}
EMULATED = {"model.preset": "150m", "data.sequence_length": 1024, "data.heldout_sequences": 1, "checkpoint.every": 0}
EMULATED |= {"pipeline.batch_size": 16, "pipeline.microbatches": 16}
Counted = tuple[int, float, list[tuple[int, int]]]  # steps, moment, what each node had sent and received
# Student's t, two-sided 95 %, by degrees of freedom from 1.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one run's steady part. bytes_per_token: whole frames, by the kernel, both ways, all boundaries."""

    program: str
    cap: str
    repeat: int
    tokens_per_s: float
    bytes_per_token: float
    cpu_s_per_step: float
    seconds_per_step: float
    first_loss: float
    last_loss: float
    link_share: float  # of what the busiest direction of a node's link could carry; 0 where nothing caps it


def settings(given: argparse.Namespace, program: str) -> RunConfig:
    values: dict[str, Any] = {"run.steps": given.steps, "pipeline.stages": given.stages, "link.link": "none"}
    values |= {"checkpoint.every": 0, "codec.codec": PROGRAMS[program]}
    values |= {"pipeline.cut": "equal"}  # as torch's stages are cut
    values |= {"optim.muon_lr": 0.02, "optim.adamw_lr": 0.005}  # for every codec the same
    if given.emulate:
        forward_ms, backward_ms = given.emulate
        preset = EMULATED["model.preset"]
        values |= {**EMULATED, "compute.emulate": f"{preset}@{given.stages}x{forward_ms:g}ms+{backward_ms:g}ms"}
    else:
        layers = max(COMPUTED["model.layers"], given.stages)
        values |= {**COMPUTED, "model.layers": layers}
    return parse_config(merge({}, {**values, **dict(map(parse_override, given.overrides))}))


def commands(made: Network, program: str, stages: int, out: Path) -> list[list[str]]:
    """What runs on each node."""
    here = Path(__file__).parent
    lines = []
    for stage in range(stages):
        line = [*made.prefix(stage), sys.executable]
        if program.startswith("torch"):
            line += [str(here / "peer_torch.py"), "--master", f"{made.addresses[0]}:{PORT}"]
        else:
            bare = [str(here / "peer_grpc.py")]
            thinpipe = ["-m", "thinpipe.cli", "node", "--insecure", "--parent", str(os.getpid())]
            line += bare if program == "bare gRPC" else thinpipe
            line += ["--listen", f"{made.addresses[stage]}:{PORT}"] if stage else []
            line += ["--next", f"{made.addresses[stage + 1]}:{PORT}"] if stage + 1 < stages else []
        lines.append([*line, "--config", str(out / "run.toml"), "--stage", str(stage), "--out", str(out)])
    return lines


def measure(made: Network, program: str, cap: str, repeat: int, given: argparse.Namespace, out: Path) -> Figures:
    """One run of all steps. Raises RuntimeError when a stage ends early or nothing happens for long."""
    config = settings(given, program)
    out.mkdir(parents=True)
    (out / "run.toml").write_text(dump_config(config))
    link = LinkProfile.parse(cap)
    made.cap(link)
    environment = {**node_environment(), "GLOO_SOCKET_IFNAME": "eth0", "PYTHONWARNINGS": "ignore"}
    processes: list[subprocess.Popen[bytes]] = []
    counted: list[Counted] = []
    try:
        for stage, command in enumerate(commands(made, program, given.stages, out)):
            with (out / f"stage-{stage}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                    )
                )
        changed, seen = time.monotonic(), 0
        while any(process.poll() is None for process in processes):
            steps = _steps(out, 0)
            if len(steps) > seen:
                changed, seen = time.monotonic(), len(steps)
                if seen == given.skip or given.skip < seen < given.steps:
                    counters = [made.counters(index) for index in range(given.stages)]
                    passed = [(each.sent_bytes, each.received_bytes) for each in counters]
                    counted = [*counted[:1], (seen, time.time(), passed)]  # the first and the newest
            failed = [stage for stage, process in enumerate(processes) if process.poll()]
            if failed or time.monotonic() - changed > given.timeout:
                tail = (out / f"stage-{failed[0] if failed else 0}.log").read_text(errors="replace")[-1500:]
                raise RuntimeError(f"{program} at {cap}: stage {failed or 'of all'} ended or is stuck: {tail}")
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return _figures(program, link, repeat, given, out, counted)


def _steps(out: Path, stage: int) -> list[dict[str, Any]]:
    path = out / f"stage-{stage}.jsonl"
    return [record for record in read_records(path) if record["event"] == "step"] if path.exists() else []


def _figures(
    program: str,
    link: LinkProfile,
    repeat: int,
    given: argparse.Namespace,
    out: Path,
    counted: list[Counted],
) -> Figures:
    steps = [_steps(out, stage) for stage in range(given.stages)]
    kept = steps[0][given.skip :]
    tokens = kept[0]["tokens"]
    seconds_per_step = (kept[-1]["time_s"] - steps[0][given.skip - 1]["time_s"]) / len(kept)
    (begin, begin_s, before), (end, end_s, after) = counted
    # The counters are read a little after a step has ended, when some of the next one has passed already.
    late_s = (end_s - steps[0][end - 1]["time_s"]) - (begin_s - steps[0][begin - 1]["time_s"])
    spanned = end - begin + late_s / seconds_per_step
    sent = [(a[0] - b[0]) / spanned for a, b in zip(after, before, strict=True)]
    received = [(a[1] - b[1]) / spanned for a, b in zip(after, before, strict=True)]
    rate = link.rate_bits_per_s
    losses = [record["loss"] or 0.0 for record in steps[-1]]
    return Figures(
        program=program,
        cap=str(link),
        repeat=repeat,
        tokens_per_s=tokens / seconds_per_step,
        bytes_per_token=sum(sent) / tokens,
        cpu_s_per_step=sum(record["cpu_s"] for stage in steps for record in stage[given.skip :]) / len(kept),
        seconds_per_step=seconds_per_step,
        first_loss=losses[0],
        last_loss=losses[-1],
        link_share=max(*sent, *received) * 8 / (rate * seconds_per_step) if rate else 0.0,
    )


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean with the 95 % interval of Student's t over logarithms; infinitely wide for one."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    half = T_95[min(len(logs) - 1, len(T_95)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def compare(rows: list[Figures], caps: list[str]) -> list[dict[str, Any]]:
    """The ratios, each over the repeats."""
    by = {(row.program, row.cap, row.repeat): row for row in rows}
    repeats = sorted({row.repeat for row in rows})
    results = []
    for cap in caps:
        for program in ("thinpipe bf16", "thinpipe mapl"):
            pairs = [
                (by[program, cap, repeat], by["torch bf16", cap, repeat], by[program, "none", repeat])
                for repeat in repeats
                if {(program, cap, repeat), ("torch bf16", cap, repeat)} <= set(by)
            ]
            if not pairs:  # left out by --programs
                continue
            result: dict[str, Any] = {"cap": cap, "programs": f"{program} / torch bf16"}
            result["speed"] = interval([own.tokens_per_s / peer.tokens_per_s for own, peer, _ in pairs])
            result["bytes"] = interval([own.bytes_per_token / peer.bytes_per_token for own, peer, _ in pairs])
            result["cpu"] = interval([own.cpu_s_per_step / peer.cpu_s_per_step for own, peer, _ in pairs])
            if program == "thinpipe mapl" and cap != "none":
                bounds = [
                    min(peer.bytes_per_token / own.bytes_per_token, free.tokens_per_s / peer.tokens_per_s)
                    for own, peer, free in pairs
                ]
                result["bound"] = interval(bounds)[0]
            results.append(result)
    return results


def spell(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{mean:.3f}" + (f" ({low:.3f} to {high:.3f})" if math.isfinite(high) else "")


def table(rows: list[Figures], results: list[dict[str, Any]]) -> str:
    lines = [
        "| cap | program | tokens/s | bytes/token | CPU s a step | busiest link | loss |",
        "|---|---|" + "---|" * 5,
    ]
    for cap, program in dict.fromkeys((row.cap, row.program) for row in sorted(rows, key=lambda row: row.repeat)):
        of = [row for row in rows if (row.cap, row.program) == (cap, program)]
        mean = {name: statistics.fmean(getattr(row, name) for row in of) for name in asdict(of[0]) if name not in
                ("program", "cap", "repeat")}  # fmt: skip
        share = f"{100 * mean['link_share']:.0f} %" if mean["link_share"] else ""
        figures = f"{mean['tokens_per_s']:.0f} | {mean['bytes_per_token']:.1f} | {mean['cpu_s_per_step']:.2f} | {share}"
        lines.append(f"| {cap} | {program} | {figures} | {of[0].first_loss:.3f} -> {of[0].last_loss:.3f} |")
    lines += ["", "| cap | ratio | tokens/s (95 %) | bound | bytes | CPU seconds |", "|---|---|---|---|---|---|"]
    for result in results:
        bound = f"{result['bound']:.3f}" if "bound" in result else ""
        cpu = spell(result["cpu"]) if "cpu" in result else ""
        speeds = f"{spell(result['speed'])} | {bound} | {result['bytes'][0]:.4f} | {cpu}"
        lines.append(f"| {result['cap']} | {result['programs']} | {speeds} |")
    return "\n".join(lines)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=2, help="first steps that do not count, 1 at least")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which of them run")
    parser.add_argument("--caps", default="80mbit,300mbit", help="rates, with commas between; uncapped is run too")
    parser.add_argument(
        "--emulate", type=lambda text: tuple(map(float, text.split(","))), metavar="FORWARD_MS,BACKWARD_MS"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds in which a step has to come")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="keep all records here (an empty directory)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end, namespaces and processes too
    if given.steps < given.skip + 3 or given.skip < 1:
        parser.error("--steps has to be --skip + 3 at least, and --skip 1 at least")
    if unknown := set(given.programs.split(",")) - set(PROGRAMS):
        parser.error(f"--programs: no '{unknown.pop()}'; there are {', '.join(PROGRAMS)}")
    caps = ["none", *map(str, map(LinkProfile.parse, filter(None, given.caps.split(","))))]
    prepare_corpus(settings(given, "torch bf16"))  # tokenised once, before anybody measures
    rows: list[Figures] = []
    try:
        with network(given.stages, LinkProfile.parse("none")) as made, tempfile.TemporaryDirectory() as temporary:
            cells = [(cap, program) for cap in caps for program in given.programs.split(",")]
            for repeat in range(given.repeats):
                for cap, program in cells if repeat % 2 == 0 else cells[::-1]:
                    out = (given.out or Path(temporary)) / f"{repeat}-{cap}-{program.replace(' ', '-')}"
                    row = measure(made, program, cap, repeat, given, out)
                    rows.append(row)
                    print(f"{row}", flush=True)
    except KernelLinkError as error:
        sys.exit(f"peer.py: {error}")
    results = compare(rows, caps)
    print(f"\n{table(rows, results)}")
    if given.json:
        command = sys.argv[1:]
        given.json.write_text(
            json.dumps({"command": command, "runs": list(map(asdict, rows)), "ratios": results}, indent=1)
        )


if __name__ == "__main__":
    main()
