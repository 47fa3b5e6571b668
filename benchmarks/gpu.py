"""Everything that wants a GPU, in one command: tests, parity, throughput and time to a loss, within 8 minutes.

    .venv/bin/python benchmarks/gpu.py [--out runs/gpu] [--limit 480] [--device cuda]
    .venv/bin/python benchmarks/gpu.py --device cpu --quick    # the same path with a tiny model, where there is no GPU

Needs no network. Four parts, one after the other; what one leaves of its share of the time, the next ones have:

- tests: those of `tests/` that are skipped without CUDA.
- parity: a swarm of 2 and of 4 stage processes on the device against one process there, by `state_sha256`. The
  reference is also run twice: where it differs from itself, the device's kernels are not deterministic, and a
  difference says nothing of the swarm. A case that differs is repeated with `model.attention=eager`.
- throughput: four stages of `150m` that share the device, over capped links, dense bf16 and `mapl`, steady steps alone;
  and `benchmarks/codec.py`, which waits for the device: the codec's time as a share of the stage's (target 5 %).
- loss: dense bf16 against `mapl` on as many tokens at 80 Mb/s. The target is the worse of the two last losses, means of
  a tenth of the steps; of each the seconds of training to it.

A node does not wait for its GPU: `compute` in its records is the time in which work is handed over, and `codec` also
that in which earlier work is waited for. So one more run has CUDA_LAUNCH_BLOCKING=1, whose split is true, and whose
pace is not. Writes gpu.json and gpu.md, also before it has ended, and the logs. Exit code 1: something failed or
differed; 2: there is no GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from described import described
from gpu_page import COUNTS, page
from gpu_runs import CODECS, FULL, LINKS, QUICK, ROOT, STOP_S, Bench, Part, steady, train
from thinpipe.node.config_file import merge, parse_config, parse_override
from thinpipe.node.model.architecture import PRESETS
from thinpipe.node.preparation import prepare_corpus
from thinpipe.sim.links.shaper import LinkProfile

SHARES = {"tests": 0.08, "parity": 0.23, "throughput": 0.35, "loss": 0.34}
TARGET_SHARE = 0.05  # of a stage's compute, for its codec


# -- tests ------------------------------------------------------------------------------------------------------------


def tests(bench: Bench, deadline: float) -> Part:
    if not bench.device.startswith("cuda"):
        return {"state": "skipped: no CUDA device"}
    files = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if "cuda.is_available()" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "cuda", *files]
    why = bench.wait("tests", bench.start("tests", command, {}), deadline)
    text = (bench.out / "tests.log").read_text(errors="replace")
    ends = re.findall(r"^(tests/\S+::.*) (PASSED|FAILED|SKIPPED|ERROR)", text, re.MULTILINE)
    counts = {name: sum(end.lower() == name for _, end in ends) for name in COUNTS}
    bench.failed |= bool(counts["failed"] + counts["error"])
    names = [test for test, end in ends if end in ("FAILED", "ERROR")]
    return {"state": why or "done", **counts, "names_failed": names}


# -- parity -----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    codec: str
    dtype: str
    stages: int
    attention: str = "sdpa"

    def name(self, way: str) -> str:
        return "-".join(map(str, ("parity", *self, way)))


def parity(bench: Bench, deadline: float) -> Part:
    cases = [Case(*case) for case in bench.scale.cases]
    rows = compared(bench, cases, deadline, twice=cases[:1])
    unequal = [case for case, row in zip(cases, rows, strict=True) if row.get("equal") is False]
    known = [row["equal"] for row in rows if "equal" in row]
    rows += compared(bench, [case._replace(attention="eager") for case in unequal], deadline, twice=[])
    bench.failed |= bool(unequal)
    state = "done" if len(known) == len(cases) else f"{len(known)} of {len(cases)} cases compared"
    return {"state": state, "equal": all(known) if known else None, "cases": rows}


def compared(bench: Bench, cases: Sequence[Case], deadline: float, *, twice: Sequence[Case]) -> list[Part]:
    """Of each whether the swarm equals one process. Time does not matter here, so several runs share the cores."""
    jobs = max(2, min(6, (os.cpu_count() or 1) // 3))
    ways = {case: ("swarm", "one", "again") if case in twice else ("swarm", "one") for case in cases}
    waiting = [(case, way) for case in cases for way in ways[case]]
    running: dict[tuple[Case, str], subprocess.Popen[bytes]] = {}
    ended: dict[tuple[Case, str], str] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case, way = key = waiting.pop(0)
            if bench.left_out(deadline):
                ended[key] = "left out: no time"
                continue
            settings = [*bench.scale.parity, f"compute.dtype={case.dtype}", f"model.attention={case.attention}"]
            options = ["--codec", case.codec, "--stages", str(case.stages), "--steps", str(bench.scale.parity_steps)]
            options += [] if way == "swarm" else ["--one-process"]
            running[key] = bench.up(case.name(way), settings, *options)
        late = time.monotonic() > deadline
        for process in running.values() if late else ():
            process.terminate()  # all, before each is waited for
        for key, process in list(running.items()):
            if late or process.poll() is not None:
                ended[key] = bench.wait(key[0].name(key[1]), running.pop(key), deadline)
        time.sleep(0.05)
    return [row(bench.out, case, {way: ended[case, way] for way in ways[case]}) for case in cases]


def row(out: Path, case: Case, ended: Mapping[str, str]) -> Part:
    """What the runs of `case` show; `ended` says how each did, "" for well."""
    found: Part = {**case._asdict(), "why": {way: why for way, why in ended.items() if why}}
    ran = {way for way, why in ended.items() if not why}
    if {"swarm", "one"} <= ran:
        found |= difference(out / case.name("swarm"), out / case.name("one"))
    if {"one", "again"} <= ran:
        found["reference_equals_itself"] = difference(out / case.name("one"), out / case.name("again"))["equal"]
    return found


def difference(one: Path, other: Path) -> Part:
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    hashes = [(x["state_sha256"], y["state_sha256"]) for x, y in zip(a["stages"], b["stages"], strict=True)]
    found: Part = {"equal": all(x == y for x, y in hashes), "state_sha256": [x for x, _ in hashes]}
    if not found["equal"]:
        losses = zip(a["loss_curve"], b["loss_curve"], strict=True)
        found["stages_that_differ"] = [stage for stage, (x, y) in enumerate(hashes) if x != y]
        found["first_step_that_differs"] = next((x[0] for x, y in losses if x != y), None)  # from 1; None: in weights
    return found


# -- throughput -------------------------------------------------------------------------------------------------------


def throughput(bench: Bench, deadline: float) -> Part:
    cost = codec_cost(bench, deadline)
    runs: list[Part] = []
    for (link, codec), steps in bench.scale.throughput_steps.items():
        runs.append(measured(bench, deadline, link, codec, steps))
    if bench.device.startswith("cuda"):
        runs.append(measured(bench, deadline, LINKS[0], "mapl", 8, CUDA_LAUNCH_BLOCKING="1"))
    whole = sum(each["state"] == "done" for each in (cost, *runs))
    state = "done" if whole == 1 + len(runs) else f"{whole} of {1 + len(runs)} measurements whole"
    return {"state": state, "codec_cost": cost, "runs": runs}


def codec_cost(bench: Bench, deadline: float) -> Part:
    if bench.left_out(deadline):
        return {"state": "left out: no time"}
    file = bench.out / "codec.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "benchmarks/codec.py", "--preset", bench.scale.preset, "--device", bench.device]
    command += ["--autocast", "--json", str(file), "--tokens", "256" if bench.quick else "2048"]
    command += ["--repeats", str(bench.scale.codec_repeats)]
    for codec in ("mapl", "mapl:context=0 int4 int3", "identity bf16 bf16"):
        command += ["--codec", codec]
    why = bench.wait("codec", bench.start("codec", command, {}), deadline)
    if why:
        return {"state": why}
    figures = json.loads(file.read_text())
    return {"state": "done", "target": TARGET_SHARE, "share": figures["codecs"][0]["share"], **figures}


def measured(bench: Bench, deadline: float, link: str, codec: str, steps: int, **environment: str) -> Part:
    name = "-".join(["throughput", link.partition(",")[0], codec, *environment])
    run = train(bench, name, deadline, bench.scale.throughput, link=link, codec=codec, steps=steps, **environment)
    found: Part = {"link": link, "codec": codec, "blocking": bool(environment), "state": run.state}
    found["schedule"] = run.schedule
    return found | (steady(run.steps) if min(map(len, run.steps)) > 1 else {})


# -- time to a loss ---------------------------------------------------------------------------------------------------


def loss(bench: Bench, deadline: float) -> Part:
    link, scale = LINKS[1], bench.scale
    config = parse_config(merge({}, {"model.preset": scale.preset, **dict(map(parse_override, scale.loss))}))
    # A dense step takes what its messages take on the wire, and about half as much again for fill and latency.
    dense_bytes = 2 * PRESETS[scale.preset].width * config.tokens_per_step
    dense_s = 1.5 * dense_bytes * 8 / (LinkProfile.parse(link).rate_bits_per_s or 1) + 0.3
    left_s = deadline - time.monotonic() - 2.6 * scale.least_s  # two starts, and the other run
    steps = max(scale.loss_steps[0], min(scale.loss_steps[1], int(left_s / dense_s)))
    curves: dict[str, list[tuple[float, float]]] = {}
    found: Part = {"link": link, "steps": steps, "tokens_per_step": config.tokens_per_step, "curves": curves}
    states: list[str] = []
    for codec in CODECS:
        run = train(bench, f"loss-{codec}", deadline, scale.loss, link=link, codec=codec, steps=steps)
        seconds = itertools.accumulate(record["seconds"] for record in run.steps[0])
        curves[codec] = list(zip(seconds, (record["loss"] for record in run.steps[0]), strict=True))
        found[f"{codec}_schedule"] = run.schedule
        states += [] if run.state == "done" else [f"{codec}: {run.state}"]
    equal = min(map(len, curves.values()))  # of a run that was stopped, the other is looked at no longer
    found["state"] = "; ".join(states) or "done"
    return found | (compare({codec: curve[:equal] for codec, curve in curves.items()}) if equal else {})


def compare(curves: Mapping[str, list[tuple[float, float]]]) -> Part:
    """Curves of (seconds, loss) of as many steps each: seconds to the worse of the last losses, smoothed."""
    window = max(1, len(curves["bf16"]) // 10)
    smooth = {
        codec: [
            (s, statistics.mean(x for _, x in curve[max(0, at - window + 1) : at + 1]))
            for at, (s, _) in enumerate(curve)
        ]
        for codec, curve in curves.items()
    }
    last = {codec: curve[-1][1] for codec, curve in smooth.items()}
    target = max(last.values())
    to = {codec: next(s for s, value in curve[window - 1 :] if value <= target) for codec, curve in smooth.items()}
    return {
        "compared_steps": len(curves["bf16"]),
        "last_losses": last,
        "target": target,
        "seconds_to_target": to,
        "dense_over_mapl": to["bf16"] / to["mapl"],
    }


# -- all of it --------------------------------------------------------------------------------------------------------


def gpu_name(device: str) -> str:
    """Without a context of its own on the GPU."""
    if not device.startswith("cuda"):
        return f"no GPU, {os.cpu_count()} cores"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "a CUDA device"


def main(arguments: Sequence[str]) -> None:
    parser = described(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--limit", type=float, default=480.0, metavar="SECONDS", help="for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: shows that all of it runs")
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        built = "the CPU alone" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        say = f"no CUDA device is seen by torch {torch.__version__}, built for {built}"
        print(f"gpu.py: error: {say}; install torch for this GPU, or try --device cpu --quick", file=sys.stderr)
        sys.exit(2)
    began = time.monotonic()
    end = began + given.limit - STOP_S
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(out, given.device, QUICK if given.quick else FULL, given.quick)
    results: dict[str, Part] = {}
    found: Part = {"command": shlex.join(["benchmarks/gpu.py", *arguments]), "quick": given.quick}
    found |= {"device": given.device, "gpu": gpu_name(given.device), "torch": torch.__version__, "parts": results}
    print("preparing the text", flush=True)  # once, and not in each of the runs that begin together
    prepare_corpus(parse_config(merge({}, {"data.source": "stdlib"})))
    parts: dict[str, Callable[[Bench, float], Part]]
    parts = {"tests": tests, "parity": parity, "throughput": throughput, "loss": loss}
    try:
        for name, part in parts.items():
            later = sum(SHARES[each] for each in SHARES if each not in results)
            now = time.monotonic()
            deadline = now + (end - now) * SHARES[name] / later
            print(f"\n{name}: {max(0.0, deadline - now):.0f} s at most", flush=True)
            if deadline - now < bench.scale.least_s:
                results[name] = {"state": "left out: no time"}
            else:
                try:
                    results[name] = part(bench, deadline)
                except Exception as error:  # one part's fault does not cost the others, nor what is known so far
                    bench.failed = True
                    bench.stop()
                    results[name] = {"state": f"failed: {type(error).__name__}: {error}"}
            results[name]["seconds"] = round(time.monotonic() - now, 1)
            found["seconds"] = round(time.monotonic() - began, 1)
            (out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
            (out / "gpu.md").write_text(page(found))
            print(page({**found, "parts": {name: results[name]}}).partition("\n\n")[2], flush=True)
    finally:
        bench.stop()
    print(f"{out}/gpu.json, {out}/gpu.md")
    sys.exit(int(bench.failed))


if __name__ == "__main__":
    main(sys.argv[1:])
