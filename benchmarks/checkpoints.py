"""What checkpoints cost in throughput: the same swarm with and without them, in turn.

    .venv/bin/python benchmarks/checkpoints.py [--every 10] [--repeats 3] [--steps 40]

Prints, pair by pair and as a median: tokens/s with a checkpoint every `--every` steps / tokens/s without, the bytes of
one stage's checkpoint and the seconds that its writing took (in the background). A copy of the state is made on the
compute thread, so part of the cost is there whatever the disk does.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from efficiency import run, steady
from thinpipe.sim.report import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stages", type=int, default=4)
    given = parser.parse_args()
    shape = ["--stages", str(given.stages), "--steps", str(given.steps), "--link", "none"]
    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(given.repeats):
            speed = {}
            for every in (0, given.every):
                out = Path(directory) / f"{repeat}-{every}"
                run(out, *shape, "--checkpoint-every", str(every))
                speed[every] = steady(out, given.stages)[0]
            ratios.append(speed[given.every] / speed[0])
            print(f"with / without: {ratios[-1]:.3f}  ({speed[given.every]:.0f} / {speed[0]:.0f} tokens/s)", flush=True)
            written = [
                record
                for stage in range(given.stages)
                for record in read_records(out / f"stage-{stage}.jsonl")
                if record["event"] == "checkpoint"
            ]
    print(f"\nwith a checkpoint every {given.every} steps: {statistics.median(ratios):.3f} of the throughput (median)")
    sizes = [record["bytes"] for record in written]
    seconds = statistics.median(record["seconds"] for record in written)
    print(f"a stage's checkpoint: {min(sizes) / 2**20:.1f} to {max(sizes) / 2**20:.1f} MiB, {seconds:.2f} s to write")


if __name__ == "__main__":
    main()
