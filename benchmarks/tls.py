"""What mutual TLS costs: the same emulated two-stage swarm over loopback with and without keys, in turns.

    .venv/bin/python benchmarks/tls.py [--repeats 3] [--machines 150m@2x20ms+40ms,150m@2x1ms+1ms] [--window-steps 3]

Processes, schedules, messages and gRPC are real, links have no cap, and a stage sleeps instead of computing. At the
first pace (a message lasts longer on any thin link) compute hides the transport; at the second one nothing does, so
that throughput is what the transport can move. Printed are, run by run and as medians of the pairs' ratios: tokens/s
with TLS / without, and CPU seconds of both ends for each GB moved. Pairs turn round from one repeat to the next. The
median of tokens/s is over the pairs whose runs were both steady (windows within 3 %), or, where none were, over all.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from described import described
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config, merge, parse_config
from thinpipe.node.security.key_directory import clock, init, issue
from thinpipe.sim.launch.bench_cell import STEADY_WITHIN, Cell, measure
from thinpipe.sim.launch.local_swarm import run_swarm

SETTINGS = {"model.preset": "150m", "data.sequence_length": 1024, "data.heldout_sequences": 1, "checkpoint.every": 0}
SETTINGS |= {"pipeline.stages": 2, "pipeline.batch_size": 16, "pipeline.microbatches": 16, "codec.codec": "bf16"}


def settings(machine: str, steps: int) -> RunConfig:
    return parse_config(merge({}, {**SETTINGS, "compute.emulate": machine, "run.steps": steps}))


def run(out: Path, machine: str, cell: Cell, keys: Path | None) -> dict[str, Any]:
    out.mkdir(parents=True)
    (out / "run.toml").write_text(dump_config(settings(machine, cell.steps)))
    run_swarm(out, stages=cell.stages, keys=keys)
    return measure(out, cell)


def ratio(name: str, pairs: list[dict[str, dict[str, Any]]]) -> float:
    return statistics.median(pair["tls"][name] / pair["plain"][name] for pair in pairs)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--machines", default="150m@2x20ms+40ms,150m@2x1ms+1ms")
    parser.add_argument("--window-steps", type=int, default=3, help="steps in each of a run's three windows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        init("run", root / "authority", days=2, now=clock())
        issue([0, 1], root / "authority", root / "keys", days=1, now=clock())
        cell = Cell(name="tls", stages=2, window_steps=given.window_steps, emulated=True)
        for machine in given.machines.split(","):
            pairs: list[dict[str, dict[str, Any]]] = []
            for repeat in range(given.repeats):
                pair: dict[str, dict[str, Any]] = {}
                for kind in ("plain", "tls") if repeat % 2 == 0 else ("tls", "plain"):
                    keys = root / "keys" if kind == "tls" else None
                    found = pair[kind] = run(root / f"{machine}-{repeat}-{kind}", machine, cell, keys)
                    moved = found["bytes_per_token"] * found["tokens_per_s"] * 8e-9
                    print(
                        f"{machine} {kind:5}: {found['tokens_per_s']:,.0f} tokens/s, {moved:.2f} Gb/s both ways, "
                        f"{found['cpu_s_per_gb']:.2f} CPU s/GB, windows within {found['spread']:.1%}",
                        flush=True,
                    )
                pairs.append(pair)
            steady = [pair for pair in pairs if max(found["spread"] for found in pair.values()) <= STEADY_WITHIN]
            speed = ratio("tokens_per_s", steady or pairs)
            cpu = ratio("cpu_s_per_gb", pairs)
            extra = statistics.median(p["tls"]["cpu_s_per_gb"] - p["plain"]["cpu_s_per_gb"] for p in pairs)
            print(
                f"{machine}: TLS / plain = {speed:.3f} in tokens/s ({len(steady)} of {len(pairs)} pairs steady), "
                f"{cpu:.3f} in CPU s/GB ({extra:+.2f} s/GB)\n"
            )


if __name__ == "__main__":
    main()
