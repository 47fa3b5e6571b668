"""Drive the targets by coverage: `python -m tests.fuzz [--runs N] [TARGET...]`; one input: `TARGET --input FILE`.

Each target runs in a process of its own, because libFuzzer ends the process at a finding. The code under test is
instrumented as it is imported; half of the new inputs come from libFuzzer's own mutations and half from the target's.
What covered something new is kept in runs/fuzz/corpus, where the next run begins, and findings in runs/fuzz/found. A
process may map `MAPPED_BYTES_MAX` more than it had at the start, so that a size that somebody only
claims ends in a MemoryError, and one input in `EXACT_EVERY` has all its allocations counted.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "runs" / "fuzz"
# Of `targets.TARGETS`, which lead to torch; tests/test_fuzz.py holds the two together.
NAMES = ["frames", "control", "greetings", "tensors", "deltas", "manifests", "checkpoints", "copies", "discovery"]
NAMES += ["probes", "rounds"]
EXACT_EVERY = 32
HANG_S = 10
RESIDENT_MB_MAX = 2048
MAPPED_BYTES_MAX = 2 * 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", choices=[[], *NAMES], metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=1, help="of all draws")
    parser.add_argument("--input", type=Path, help="run this one input, and say what came of it")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this very process
    given = parser.parse_args(arguments)
    targets = given.targets or NAMES
    if given.input:
        return _one_input(targets[0], given.input)
    if given.here:
        return _fuzz_here(targets[0], runs=given.runs, seed=given.seed)
    return max(_fuzz(name, runs=given.runs, seed=given.seed) for name in targets)


def _one_input(name: str, path: Path) -> int:
    from .judge import judge
    from .targets import TARGETS

    ends = judge(TARGETS[name], path.read_bytes(), exact=True)
    print(f"{name}: {path}: taken {ends.taken} times, refused {ends.refused} times")
    return 0


def _fuzz(name: str, *, runs: int, seed: int) -> int:
    """One target in a process of its own; one line about it. Returns what the process should end with."""
    log, found = OUT / f"{name}.log", OUT / "found"
    for directory in (found, OUT / "corpus" / name):
        directory.mkdir(parents=True, exist_ok=True)
    before = set(found.glob(f"{name}-*"))
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz", "--here", "--runs", str(runs), "--seed", str(seed), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode
    text = log.read_text(errors="replace")
    done = re.findall(r"stat::number_of_executed_units: (\d+)", text)
    corpora = re.findall(r"corp: (\d+)/", text)
    new = sorted(set(found.glob(f"{name}-*")) - before)
    count, corpus = (int(numbers[-1]) if numbers else 0 for numbers in (done, corpora))
    failed = bool(code or new or count < runs)
    print(
        f"{name}: {count} inputs, {time.monotonic() - began:.1f} s, corpus {corpus}, crashes {len(new)}"
        f"{f'; ended with {code}, see {log.relative_to(ROOT)}' if failed else ''}",
        flush=True,
    )
    for path in new:
        print(f"    {sys.executable} -m tests.fuzz {name} --input {path.relative_to(ROOT)}", flush=True)
    return int(failed)


def _fuzz_here(name: str, *, runs: int, seed: int) -> int:
    import atheris
    from atheris.import_hook import HookManager

    # Unlike `instrument_imports`, which takes twice the time, this does not trace what is compared with what: the
    # mutators know the form of the input.
    with HookManager({"thinpipe"}, set(), True, trace_dataflow=False):
        import thinpipe.node.stage  # what a target would otherwise import in the middle of an input

        from .judge import judge
        from .targets import TARGETS
    del thinpipe
    target, nth = TARGETS[name], 0
    for data in target.seeds:
        judge(target, data, exact=False)  # what is imported and cached once is no input's fault
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MAPPED_BYTES_MAX, resource.RLIM_INFINITY))

    def run(data: bytes) -> None:
        nonlocal nth
        nth += 1
        try:
            judge(target, data, exact=nth % EXACT_EVERY == 0)
        except BaseException:  # libFuzzer keeps it too, under this name, unless its own alarm is faster
            (OUT / "found" / f"{name}-crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            raise

    def mutated(data: bytes, size_max: int, draws: int) -> bytes:
        draw = Random(draws)
        if draw.random() < 0.5:
            return atheris.Mutate(data, size_max)
        return target.mutate(draw.choice(target.seeds) if draw.random() < 0.3 else data, draw)[:size_max]

    seeds = OUT / "seeds" / name
    seeds.mkdir(parents=True, exist_ok=True)
    for at, data in enumerate(target.seeds):
        (seeds / f"{at:03}").write_bytes(data)
    options = {
        "runs": runs,
        "seed": seed,
        "max_len": target.input_bytes_max,
        "len_control": 0,
        "timeout": HANG_S,
        "rss_limit_mb": RESIDENT_MB_MAX,
        "artifact_prefix": f"{OUT / 'found' / name}-",  # a hang, or no memory
        "print_final_stats": 1,
    }
    arguments = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items())]
    atheris.Setup([*arguments, str(OUT / "corpus" / name), str(seeds)], run, custom_mutator=mutated)
    atheris.Fuzz()  # ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main())
