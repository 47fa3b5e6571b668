"""Try docker-compose.yml for real: `python -m tests.compose`, or `make test-compose`.

With an engine of its own (tests/compose/engine.py), as root; skipped with a reason where that cannot be. What it needs
is kept in --directory, so a second call takes minutes less; remove that to get the room back. The last line counts;
exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from thinpipe.sim.links import netns

from .engine import NoEngine, check, docker, engine, mounts, processes
from .images import context, fetch_wheels, import_base
from .project import Late, Project

DIRECTORY = Path("/var/tmp/thinpipe-compose")
STEPS, EVERY = "30", "5"
SUMMARY = f"{STEPS} steps of 2048 tokens (swarm)"
STAGES = [f"stage-{index}" for index in range(4)]
USER = "10001"


class Checks:
    """Counts, and prints a line for each."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, 0

    def say(self, good: bool, what: str) -> None:
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'} {what}", flush=True)


def digests(project: Project, run: str) -> list[str]:
    return [stage["state_sha256"] for stage in project.summary(run)["stages"]]


def capped(checks: Checks, measured: list[tuple[str, float, float]], kernel: bool) -> None:
    worst = max((abs(off) for _, _, off in measured), default=100.0)
    by = {"kernel=rate" in link or "kernel=all" in link for link, _, _ in measured}
    checks.say(
        len(measured) >= 6 and worst <= 10 and by == {kernel},
        f"the log has configured and measured of {len(measured)} links, {'kernel' if kernel else 'user space'}: "
        f"{min((rate for _, rate, _ in measured), default=0):.1f} to "
        f"{max((rate for _, rate, _ in measured), default=0):.1f} Mb/s, at most {worst:.1f} % off",
    )


def undisturbed(project: Project, checks: Checks) -> None:
    up = project.up("undisturbed", RUN="undisturbed", STEPS=STEPS, CHECKPOINT_EVERY=EVERY)
    up.until_step(3)
    found = project.containers()
    users = {
        service: docker(project.host, "top", each["Id"], "-eo", "uid,pid,args").stdout.splitlines()[1:]
        for service, each in found.items()
    }
    nodes = [line for lines in users.values() for line in lines if "thinpipe" in line]
    checks.say(
        len(nodes) == 9 and all(line.split()[0] == USER for line in nodes),
        f"{len(nodes)} processes in 5 containers, nodes and supervisors, none of them root",
    )
    up.until_step(12)
    health = {service: each["State"]["Health"]["Status"] for service, each in project.containers().items()}
    checks.say(set(health.values()) == {"healthy"}, f"health while it trains: {health}")
    code = up.end()
    text = up.text
    checks.say(code == 0 and SUMMARY in text, f"`up` ends by itself with the summary; exit code {code}")
    codes = {service: each["State"]["ExitCode"] for service, each in project.containers().items()}
    checks.say(set(codes.values()) == {0}, f"exit codes of the containers: {codes}")
    capped(checks, up.checks(), kernel=True)
    before = text.find(" step 1/") > max(found.start() for found in re.finditer("measured [0-9.]+ Mb/s", text))
    order = project.in_volume(
        "cd /runs/undisturbed && for s in 0 1 2 3; do grep -nm1 ready stage-$s.jsonl | cut -d: -f1; "
        "grep -nm1 '\"step\"' stage-$s.jsonl | cut -d: -f1; done"
    ).split()
    ready, steps = order[::2], order[1::2]
    checks.say(
        len(order) == 8 and all(int(a) < int(b) for a, b in zip(ready, steps, strict=True)),
        f"each link was measured before its stage's first step{' (in the log too)' if before else ''}",
    )


def killed(project: Project, checks: Checks) -> None:
    up = project.up("killed", RUN="killed", STEPS=STEPS, CHECKPOINT_EVERY=EVERY)
    up.until_step(6)
    docker(project.host, "kill", project.id("stage-2"))
    up.until(lambda text: "stage 2 was lost; this one takes its place" in text, "the standby in stage 2's place")
    up.until(lambda text: text.count("generation 1: goes on") == 4, "the next generation")
    docker(project.host, "start", project.id("stage-2"))
    time.sleep(5)
    up.until_step(15)
    stood_by = (
        "stage 2 is served elsewhere; this one stands by" in docker(project.host, "logs", project.id("stage-2")).stdout
    )
    docker(project.host, "kill", project.id("standby"))
    up.until(lambda text: text.count("generation 2: goes on") == 4, "the generation after that")
    # The node alone, as memory that runs out would end it.
    script = "import psutil; [p.kill() for p in psutil.Process(1).children()]"
    docker(project.host, "exec", "-u", USER, project.id("stage-1"), "python", "-c", script)
    up.until(lambda text: text.count("generation 3: goes on") == 4, "the generation after the third loss")
    code = up.end()
    checks.say(
        "stage 1: its node was killed by SIGKILL; it is started again" in up.text, "a lost node is started again"
    )
    checks.say(stood_by, "a stage that was killed, and started again by hand, stands by for its successor")
    checks.say(code == 0 and SUMMARY in up.text, f"two stages killed by `docker kill`, one node: `up` ends with {code}")
    ours, theirs = digests(project, "killed"), digests(project, "undisturbed")
    rollbacks = len(project.summary("killed")["rollbacks"])
    checks.say(
        ours == theirs and rollbacks == 3, f"same bits as undisturbed after {rollbacks} rollbacks: {ours[0][:12]} ..."
    )


def head_killed(project: Project, checks: Checks) -> None:
    """Stage 0 too, which has the data, and prints the summary."""
    up = project.up("head", RUN="head", STEPS=STEPS, CHECKPOINT_EVERY=EVERY)
    up.until_step(9)
    docker(project.host, "kill", project.id("stage-0"))
    code = up.end()
    from_standby = re.search(rf"standby.*{re.escape(SUMMARY)}", up.text) is not None
    same = digests(project, "head") == digests(project, "undisturbed")
    checks.say(code == 0 and from_standby and same, "stage 0 killed: the standby ends the run, same bits, and sums up")


def again(project: Project, checks: Checks) -> None:
    up = project.up("complete", RUN="undisturbed", STEPS=STEPS, CHECKPOINT_EVERY=EVERY)
    code = up.end()
    checks.say(code == 0 and "is complete" in up.text and SUMMARY in up.text, "a complete run is only summed up again")
    up = project.up("other", RUN="undisturbed", STEPS="31", CHECKPOINT_EVERY=EVERY)
    up.end()
    codes = {each["State"]["ExitCode"] for each in project.containers().values()}
    said = f"run.steps is 31 here and {STEPS} there" in up.text
    checks.say(said and codes == {2}, "other settings for the same run: refused by name, exit code 2")
    up = project.up("bad", RUN="bad", LINK_RATE="300mbits")
    up.end()
    codes = {service: each["State"]["ExitCode"] for service, each in project.containers().items()}
    checks.say("unknown unit 'mbits'" in up.text and set(codes.values()) == {2}, f"a bad rate: {codes}")
    up = project.up("bad-model", RUN="bad-model", MODEL="huge")
    up.end()
    codes = {service: each["State"]["ExitCode"] for service, each in project.containers().items()}
    good = "huge" in up.text and set(codes.values()) == {2}
    checks.say(good, f"a bad model: every stage says so, and `up` ends: {codes}")
    up = project.up("good-model", RUN="bad-model", STEPS="3")
    code = up.end()
    checks.say(code == 0, f"with the model corrected the same run is free: `up` ends with {code}")


def stopped(project: Project, checks: Checks) -> None:
    """`stop` ends the run after the step under way; `up` goes on."""
    up = project.up("stopped", RUN="stopped", STEPS=STEPS, CHECKPOINT_EVERY=EVERY)
    up.until_step(6)
    project.call("stop")
    up.end()
    codes = {service: each["State"]["ExitCode"] for service, each in project.containers().items()}
    checks.say(set(codes.values()) == {0}, f"`stop` after step 6: {codes}")
    up = project.up("resumed", "--exit-code-from", "stage-0", RUN="stopped", STEPS=STEPS, CHECKPOINT_EVERY=EVERY)
    code = up.end()
    same = digests(project, "stopped") == digests(project, "undisturbed")
    checks.say(
        code == 0 and SUMMARY in up.text and same,
        f"`up --exit-code-from stage-0` goes on, sums up and ends with {code}; same bits",
    )


def without_capability(project: Project, checks: Checks) -> None:
    weak = project.file.with_name("docker-compose.without.yml")
    weak.write_text(project.file.read_text().replace("[NET_ADMIN, ", "["))
    plain = Project(project.host, weak, project.logs, project.settings)
    project.down()
    up = plain.up("without", RUN="without", STEPS="3")
    code = up.end()
    line = "stage 0: the kernel does not cap the links here"
    remedy = "give it the capability NET_ADMIN (cap_add: [NET_ADMIN]"
    said = any(line in each and remedy in each for each in up.text.splitlines())
    checks.say(said and code == 0, f"without NET_ADMIN: a line that says so, and the remedy; the run ends with {code}")
    capped(checks, up.checks(), kernel=False)
    up = plain.up("without-must", RUN="must", STEPS="3", LINK_CAP="kernel")
    up.end()
    codes = {each["State"]["ExitCode"] for each in plain.containers().values()}
    checks.say(codes == {2} and remedy in up.text, "LINK_CAP=kernel without NET_ADMIN: refused, exit code 2")
    plain.down()


def figures(project: Project, checks: Checks) -> None:
    """Throughput over the link's rate, configured against measured."""
    print("\n| codec | link | measured, of 6 links | tokens/s | bytes/token | busiest link in use |")
    print("|---|---|---|---|---|---|")
    good = True
    for codec in ("bf16", "mapl"):
        for rate in (10, 80, 300):
            run = f"{codec}-{rate}"
            up = project.up(
                run, RUN=run, STEPS="20", CHECKPOINT_EVERY="0", LINK_RATE=f"{rate}mbit", CODEC=codec, SET="run.seed=1"
            )
            good = up.end() == 0 and good
            found, measured = project.summary(run), [rate for _, rate, _ in up.checks()]
            used = max(way["utilisation"] for way in found["boundaries"])
            print(
                f"| {codec} | {rate} Mb/s, 25 ms | {min(measured):.1f} to {max(measured):.1f} Mb/s | "
                f"{found['tokens_per_s']:.0f} | {found['bytes_per_token']:.0f} | {used:.1%} |",
                flush=True,
            )
            good = good and all(abs(off) <= 10 for _, _, off in up.checks())
    print()
    checks.say(good, "figures: every run ended, every cap within 10 %")


TRIES: dict[str, Callable[[Project, Checks], None]] = {
    "undisturbed": undisturbed,
    "killed": killed,
    "head": head_killed,
    "again": again,
    "stopped": stopped,
    "without": without_capability,
    "figures": figures,
}


def leftovers(directory: Path, pid: int) -> list[str]:
    """What of an engine is still there."""
    found = [f"process {process.pid}" for process in processes(directory)] + mounts(directory)
    return found + [name for name in netns.existing() if name == f"thinpipe-{pid}-engine"]


def swept(directory: Path, checks: Checks) -> None:
    """Kill a process that holds an engine with a running container; the next one takes it all away."""
    program = (
        f"import time\nfrom pathlib import Path\nfrom tests.compose.engine import docker, engine\n"
        f"with engine(Path({str(directory)!r})) as host:\n"
        "    docker(host, 'run', '-d', '--network', 'bridge', '--entrypoint', 'sleep', 'thinpipe', '600')\n"
        "    print('held', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        held = holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
    before = leftovers(directory, holder.pid)
    with engine(directory) as host:
        running = docker(host, "ps", "-aq").stdout.split()
    after = leftovers(directory, holder.pid) + leftovers(directory, os.getpid())
    good = held and len(before) > 3 and not (running or after)
    checks.say(good, f"after SIGKILL {len(before)} things are left, after the next start {after or 'none'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="what is kept: images, wheels, logs")
    parser.add_argument("--only", choices=[*TRIES, "swept"], nargs="*", help="these alone; most need `undisturbed`")
    parser.add_argument("--no-install", action="store_true", help="do not apt-get install what is missing")
    arguments = parser.parse_args()
    directory, only = arguments.directory.resolve(), arguments.only or [*TRIES, "swept"]
    checks = Checks()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check(install=not arguments.no_install)
        with engine(directory / "engine") as host:
            run(host, directory, only, checks)
        left = leftovers(directory / "engine", os.getpid())
        checks.say(not left, f"left behind: {left or 'nothing'}")
        if "swept" in only:
            swept(directory / "engine", checks)
    except NoEngine as error:
        print(f"skipped: {error}")
        return 0
    except KeyboardInterrupt:
        return 130
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 1 if checks.failed else 0


def run(host: str, directory: Path, only: list[str], checks: Checks) -> None:
    import_base(host, directory)
    logs = directory / "logs"
    logs.mkdir(exist_ok=True)
    file = context(directory, fetch_wheels(directory)) / "docker-compose.yml"
    project = Project(host, file, logs, {"PIP_NO_INDEX": "1"})
    project.down()
    began_s = time.monotonic()
    built = project.call("build", "stage-0")
    (logs / "build.log").write_text(built.stdout + built.stderr)
    size = docker(host, "image", "inspect", "-f", "{{.Size}}", "thinpipe", check=False).stdout.strip()
    checks.say(
        built.returncode == 0,
        f"the image is built in {time.monotonic() - began_s:.0f} s, {int(size or 0) / 1e6:.0f} MB; {logs}/build.log",
    )
    for name in [name for name in TRIES if name in only] if built.returncode == 0 else []:
        began_s = time.monotonic()
        try:
            TRIES[name](project, checks)
        except (Late, subprocess.SubprocessError, KeyError, ValueError) as error:
            checks.say(False, f"{name}: {type(error).__name__}: {error}")
            with suppress(Exception):
                project.call("kill")
        print(f"     {name}: {time.monotonic() - began_s:.0f} s", flush=True)
    project.down()


if __name__ == "__main__":
    sys.exit(main())
