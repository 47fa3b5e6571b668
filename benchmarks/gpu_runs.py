"""What benchmarks/gpu.py runs: at which scale, each run as a `thinpipe up` of its own, ended where its time is over.

Runs are processes, so that no process that has begun with CUDA is ever forked, and one that dies takes nothing along.
A run out of time is asked to end after the step under way: its steps so far are on record, and count.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinpipe.sim.reports.summary import read_records, total_by_kind

ROOT = Path(__file__).resolve().parent.parent
CODECS = ("mapl", "bf16")
LINKS = ("300mbit,25ms", "80mbit,25ms")
STOP_S = 20.0  # what a run may take to end after the step under way; kept back from the limit
ALWAYS = ("optim.msign_dtype=bfloat16", "checkpoint.every=0", "data.heldout_sequences=8")
# Should the depth not be found on this device, there is one without.
SCHEDULES = ("1f1b:rtt_ratio=auto", "1f1b")
Part = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is run. least_s: with less time left, no run is begun."""

    least_s: float
    parity: tuple[str, ...]
    parity_steps: int  # more than the 16 after which mapl moves its projectors
    cases: tuple[tuple[str, str, int], ...]  # codec, compute.dtype, stages; the first has the second reference
    preset: str
    stages: int  # of throughput and loss
    codec_repeats: int
    throughput: tuple[str, ...]
    throughput_steps: dict[tuple[str, str], int]
    loss: tuple[str, ...]
    loss_steps: tuple[int, int]  # at least, at most


FULL = Scale(
    least_s=25.0,
    parity=("data.sequence_length=128", "pipeline.batch_size=16", "pipeline.microbatches=4"),
    parity_steps=20,
    cases=tuple((c, d, n) for d, c, n in itertools.product(("bfloat16", "float32"), CODECS, (4, 2))),
    preset="150m",
    stages=4,
    codec_repeats=7,
    throughput=("data.sequence_length=512", "pipeline.batch_size=64", "pipeline.microbatches=16"),
    throughput_steps=dict(zip(itertools.product(LINKS, CODECS), (24, 8, 24, 4), strict=True)),
    loss=("data.sequence_length=512", "pipeline.batch_size=16", "pipeline.microbatches=8"),
    loss_steps=(12, 80),
)
_SMALL = ("model.width=64", "data.sequence_length=32", "pipeline.batch_size=8", "pipeline.microbatches=4")
QUICK = Scale(
    least_s=1.0,
    parity=(*_SMALL, "pipeline.batch_size=4", "pipeline.microbatches=2"),
    parity_steps=18,
    cases=(("mapl", "bfloat16", 2), ("bf16", "float32", 4)),
    preset="tiny",
    stages=2,
    codec_repeats=2,
    throughput=_SMALL,
    throughput_steps={(LINKS[1], codec): 3 for codec in CODECS},
    loss=_SMALL,
    loss_steps=(6, 6),
)


@dataclass(slots=True)
class Bench:
    """Where and how runs are made; each is a `thinpipe up` of its own, so that no process that has CUDA is forked."""

    out: Path
    device: str
    scale: Scale
    quick: bool
    failed: bool = False
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.out / f"{name}.log").open("wb") as log:
            env = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def wait(self, name: str, process: subprocess.Popen[bytes], deadline: float) -> str:
        """Empty for one that ended well, else why not. A run is asked to end after the step under way, so that its
        steps so far still count."""
        why = ""
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            why = "stopped: out of time"
            process.terminate()
            try:
                process.wait(0.75 * STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.returncode and time.monotonic() > deadline:  # it was asked to, perhaps before
            why = "stopped: out of time"
        elif process.returncode:
            lines = (self.out / f"{name}.log").read_text(errors="replace").strip().splitlines()
            why = f"exit code {process.returncode}: {lines[-1] if lines else 'no output'}"
            self.failed = True
        return why

    def up(self, name: str, settings: Sequence[str], *options: str, **environment: str) -> subprocess.Popen[bytes]:
        shutil.rmtree(self.out / name, ignore_errors=True)  # of one that fails at once, no older records are read
        command = [sys.executable, "-m", "thinpipe.cli", "up", "--json", "--overwrite", "--out", str(self.out / name)]
        command += ["--parent", str(os.getpid()), *options]
        for setting in (*ALWAYS, f"compute.device={self.device}", *settings):
            command += ["--set", setting]
        return self.start(name, command, environment)

    def left_out(self, deadline: float) -> bool:
        return deadline - time.monotonic() < self.scale.least_s

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """How a swarm ended ("done", or why not), its schedule, and the records of each stage's steps."""

    state: str
    schedule: str
    steps: list[list[dict[str, Any]]]


def train(
    bench: Bench,
    name: str,
    deadline: float,
    settings: Sequence[str],
    *,
    link: str,
    codec: str,
    steps: int,
    **environment: str,
) -> Trained:
    stages = bench.scale.stages
    options = ["--stages", str(stages), "--model", bench.scale.preset]
    options += ["--link", link, "--codec", codec, "--steps", str(steps)]
    found = Trained(state="left out: no time", schedule="", steps=[[]] * stages)
    for schedule in SCHEDULES:
        if bench.left_out(deadline):
            break
        mine = (*settings, "compute.dtype=bfloat16")
        process = bench.up(name, mine, *options, "--schedule", schedule, **environment)
        why = bench.wait(name, process, deadline)
        run = bench.out / name
        records = [read_records(run / f"stage-{stage}.jsonl") for stage in range(stages)]
        begun = [[record for record in of_stage if record["event"] == "step"] for of_stage in records]
        if (run / "run.toml").exists():
            chosen = re.search(r'^schedule = "(.*)"', (run / "run.toml").read_text(), re.MULTILINE)
            schedule = chosen[1] if chosen else schedule
        found = Trained(state=why or "done", schedule=schedule, steps=begun)
        if not why.startswith("exit") or min(map(len, begun)):
            break
    return found


def steady(steps: list[list[dict[str, Any]]]) -> Part:
    """After the first quarter of the steps, in which kernels are chosen and tables are sent whole."""
    skip = max(1, len(steps[0]) // 4)
    kept = [of_stage[skip:] for of_stage in steps]
    sent = sum(
        total_by_kind(of_stage[-1:]).total() - total_by_kind(of_stage[skip - 1 : skip]).total() for of_stage in steps
    )
    seconds, tokens = (sum(record[name] for record in kept[0]) for name in ("seconds", "tokens"))
    compute, codec = ([sum(r[f"{name}_s"] for r in of_stage) for of_stage in kept] for name in ("compute", "codec"))
    return {
        "steps": len(kept[0]),
        "tokens_per_s": tokens / seconds,
        "bytes_per_token": sent / tokens,
        "compute_shares": [each / seconds for each in compute],
        "codec_over_compute": [ours / all_s for ours, all_s in zip(codec, compute, strict=True)],
    }
