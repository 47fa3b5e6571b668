"""What checkpoints, and copies of them on neighbours, cost in throughput: the same swarm without and with them.

    .venv/bin/python benchmarks/checkpoint_copies.py [--every 10] [--repeats 3] [--steps 40] [--link 300mbit,25ms]

Prints, for each repeat and as a median, tokens/s as a share of those without checkpoints: with one every `--every`
steps on a disk that all share, and with a disk for each stage, so that each is copied to a neighbour too; then the size
of a checkpoint, how long its writing took (in the background), and how many were copied. A snapshot of the state is
taken on the compute thread, so part of the cost does not depend on the disk. Beside it, CPU seconds a step beyond
those of the arithmetic and the codec, as a share of all CPU seconds of a step: what other work on the machine changes
less.
"""

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from described import described
from efficiency import steady
from thinpipe.node.config import RunConfig
from thinpipe.node.config_file import dump_config
from thinpipe.node.config_sections import CheckpointSection, CodecSection, LinkSection, OptimSection, RunSection
from thinpipe.sim.launch.local_swarm import run_swarm
from thinpipe.sim.reports.summary import read_records

VARIANTS = ("none", "checkpoints", "checkpoints and copies")


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--link", default="none")
    given = parser.parse_args()
    shares: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        for repeat in range(given.repeats):
            speed: dict[str, float] = {}
            cpu: dict[str, dict[str, float]] = {}
            for variant in VARIANTS:
                out = Path(directory) / f"{repeat} {variant}"
                out.mkdir()
                config = RunConfig(
                    run=RunSection(steps=given.steps, eval_every=0),
                    codec=CodecSection(codec="mapl", forward="int4", backward="int3"),
                    optim=OptimSection(muon_lr=0.02, adamw_lr=0.005),
                    link=LinkSection(link=given.link),
                    checkpoint=CheckpointSection(every=0 if variant == "none" else given.every),
                )
                config = config.model_copy(
                    update={"pipeline": config.pipeline.model_copy(update={"stages": given.stages})}
                )
                (out / "run.toml").write_text(dump_config(config))
                run_swarm(out, stages=given.stages, disks=out / "disks" if "copies" in variant else None)
                speed[variant], cpu[variant], _ = steady(out, given.stages)
            for variant in VARIANTS[1:]:
                shares[variant].append(speed[variant] / speed["none"])
                more = sum(cpu[variant][name] - cpu["none"][name] for name in ("loop_cpu_s", "other_cpu_s"))
                spent[variant].append(more / cpu["none"]["cpu_s"])
            told = ", ".join(f"{variant} {speed[variant]:.0f}" for variant in VARIANTS)
            print(f"tokens/s: {told}", flush=True)
        records = [record for stage in range(given.stages) for record in read_records(out / f"stage-{stage}.jsonl")]
    written = [record for record in records if record["event"] == "checkpoint"]
    copied = [record for record in records if record["event"] == "copy"]
    for variant, ratios in shares.items():
        every = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{variant}: {statistics.median(ratios):.3f} of the throughput without ({every})")
        every = ", ".join(f"{100 * share:.1f}" for share in spent[variant])
        print(f"{variant}: {100 * statistics.median(spent[variant]):.1f} % more CPU time ({every})")
    sizes = [record["bytes"] for record in written]
    seconds = statistics.median(record["seconds"] for record in written)
    print(f"a stage's checkpoint: {min(sizes) / 2**20:.1f} to {max(sizes) / 2**20:.1f} MiB, {seconds:.2f} s to write")
    print(f"{len(copied)} of {len(written)} were copied to a neighbour before the run ended")


if __name__ == "__main__":
    main()
