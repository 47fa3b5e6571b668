"""An uncapped swarm on all cores against one single-threaded process, and where the difference goes.

    .venv/bin/python benchmarks/efficiency.py [--repeats 3] [--stages 4] [--microbatches 16] [--sequences 8]

Prints, pair by pair and as a median: swarm tokens/s / (cores x tokens/s of one process). The two run in turn, so that
a machine whose speed drifts slows both. The rest is CPU time that the swarm spent beyond the reference (packing,
messages, a second Python) and time in which cores idled (waiting for a neighbour: the pipeline's bubble).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from described import described
from thinpipe.sim.reports.summary import read_records


def run(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "thinpipe.cli", "up", "--out", str(out), "--json", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


CPU = ("cpu_s", "compute_cpu_s", "codec_cpu_s", "loop_cpu_s")


def steady(out: Path, stages: int) -> tuple[float, dict[str, float], float]:
    """(tokens/s, CPU seconds of all stages by thread, seconds) after the first quarter, in which memory is mapped."""
    by_stage = [
        [record for record in read_records(out / f"stage-{stage}.jsonl") if record["event"] == "step"]
        for stage in range(stages)
    ]
    kept = [steps[len(steps) // 4 :] for steps in by_stage]
    seconds = sum(record["seconds"] for record in kept[0])
    cpu: dict[str, float] = {name: sum(record[name] for steps in kept for record in steps) for name in CPU}
    cpu["other_cpu_s"] = cpu["cpu_s"] - sum(cpu[name] for name in CPU[1:])
    return sum(record["tokens"] for record in kept[0]) / seconds, cpu, seconds


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=8, help="of 128 tokens in one microbatch")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states; 256 is `tiny`")
    parser.add_argument("--schedule", default="1f1b")
    given = parser.parse_args()
    cores = min(len(os.sched_getaffinity(0)), given.stages)
    shape = ["--stages", str(given.stages), "--steps", str(given.steps), "--microbatches", str(given.microbatches)]
    shape += ["--set", f"model.width={given.width}", "--schedule", given.schedule]
    shape += ["--codec", "bf16", "--batch-size", str(given.sequences * given.microbatches), "--link", "none"]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(given.repeats):
            one = run(Path(directory) / f"one-{repeat}", *shape, "--one-process")
            swarm = run(Path(directory) / f"swarm-{repeat}", *shape)
            same = [s["state_sha256"] for s in one["stages"]] == [s["state_sha256"] for s in swarm["stages"]]
            assert same, "the swarm's state differs from the reference's: the figures would mean nothing"
            one_rate, reference, _ = steady(Path(directory) / f"one-{repeat}", given.stages)
            swarm_rate, cpu, seconds = steady(Path(directory) / f"swarm-{repeat}", given.stages)
            available = cores * seconds
            row = {
                "efficiency": swarm_rate / (cores * one_rate),
                "idle": 1 - cpu["cpu_s"] / available,
                "arithmetic": (cpu["compute_cpu_s"] - reference["compute_cpu_s"]) / available,
                "packing": (cpu["codec_cpu_s"] - reference["codec_cpu_s"]) / available,
                "event_loops": cpu["loop_cpu_s"] / available,
                "grpc_threads": cpu["other_cpu_s"] / available,
                "swarm_tokens_per_s": swarm_rate,
                "one_process_tokens_per_s": one_rate,
            }
            rows.append(row)
            print("  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print(f"\nefficiency: swarm / ({cores} x one process) = {median['efficiency']:.3f} (median of {len(rows)} pairs)")
    lost = ("idle", "arithmetic", "packing", "event_loops", "grpc_threads")
    print(f"the rest, as shares of {cores} cores: " + ", ".join(f"{name} {median[name]:.3f}" for name in lost))
    print("(arithmetic: what the same work takes longer on shared caches; idle: waiting for a neighbour)")


if __name__ == "__main__":
    main()
