"""What a stage's memory is made of, and that it stays flat.

    .venv/bin/python benchmarks/memory.py [--steps 500] [options of `thinpipe up`, such as --codec mapl]

Prints per stage: weights + optimizer state, link buffers (bound from the configuration), resident memory early and late
in the run, and the growth between them. Early: the median of steps 500 to 700, once tables and as many snapshots and
copies of a neighbour's as are kept have come in, which takes the first five checkpoints; of a run of fewer than 1,400
steps, of its second tenth. Late: of the last 200, or the last tenth. Flat is less than 1 % more.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from described import described
from thinpipe.node.config_file import load_config
from thinpipe.sim.reports.summary import read_records

MIB = 2**20
FLAT = 0.01


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--stages", type=int, default=4)
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "-m", "thinpipe.cli", "up", "--out", str(out), "--stages", str(given.stages)]
        command += ["--codec", "bf16"]  # unless `more` names another
        command += ["--steps", str(given.steps), "--batch-size", "8", "--sequence-length", "64", "--eval-every", "100"]
        command += more
        subprocess.run(command, check=True)
        link = load_config(out / "run.toml").link
        buffers = (link.send_buffer_bytes + link.receive_buffer_bytes + link.uncapped_window_bytes) / MIB
        print(f"link buffers: at most {buffers:.0f} MiB a boundary (send + receive + window)")
        for stage in range(given.stages):
            records = read_records(out / f"stage-{stage}.jsonl")
            rss = [record["rss_bytes"] / MIB for record in records if record["event"] == "step"]
            state = next(record for record in records if record["event"] == "end")["state_bytes"] / MIB
            early, late, apart = early_and_late(rss)
            growth = late / early - 1
            print(
                f"stage {stage}: state {state:6.1f} MiB   resident {early:6.1f} MiB early, {late:6.1f} MiB late"
                f"   growth {growth:+.2%}, {(late - early) / apart * 100:+.2f} MiB per 100 steps"
                f"   {'flat' if growth < FLAT else 'NOT FLAT'}"
            )


def early_and_late(rss: list[float]) -> tuple[float, float, float]:
    """Medians of an early and a late stretch, and how many steps are from the middle of one to that of the other."""
    first, length = (500, 200) if len(rss) >= 1400 else (len(rss) // 10, max(1, len(rss) // 10))
    early, late = rss[first : first + length], rss[-length:]
    return statistics.median(early), statistics.median(late), max(1.0, len(rss) - first - length)


if __name__ == "__main__":
    main()
