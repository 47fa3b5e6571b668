"""A Docker engine of our own, in a network namespace of its own, that leaves nothing behind.

It has its own data, sockets, control group and network, so an engine that runs on the machine is not touched, and what
it does to addresses, bridges and iptables ends with its namespace. Nothing is pulled: the namespace has no way out. All
that must not outlive it is named after its directory, so what a SIGKILL left is found and taken away by the next one:
processes by their command line, mounts by their path, and the namespace by its name, which has our process id.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from thinpipe.sim.links import netns, tc

PACKAGES = ("docker.io", "docker-compose", "debootstrap")
START_S, STOP_S = 60.0, 30.0


class NoEngine(RuntimeError):
    """There is none here, and none can be had; one line says why."""


def check(*, install: bool) -> None:
    """Raises NoEngine unless an engine could be started here. install: with apt-get, what of it is missing."""
    try:
        tc.require("ip", "tc")
        netns.check()
    except tc.KernelLinkError as error:
        raise NoEngine(str(error).partition(";")[0]) from None
    missing = [name for name in ("dockerd", "debootstrap") if not shutil.which(name)] + (
        [] if compose() else ["compose"]
    )
    if not missing:
        return
    if not install or not shutil.which("apt-get"):
        raise NoEngine(f"{', '.join(missing)} not installed (Debian: apt-get install {' '.join(PACKAGES)})")
    print(f"installing {', '.join(PACKAGES)}: {', '.join(missing)} missing", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        if subprocess.run(["apt-get", "-qq", *command], env=quiet, stdout=subprocess.DEVNULL, check=False).returncode:
            raise NoEngine(f"apt-get {command[0]} failed")


def compose() -> list[str] | None:
    """`docker compose` where that is there, else `docker-compose`."""
    with suppress(OSError):
        if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
            return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


@contextmanager
def engine(directory: Path) -> Iterator[str]:
    """A running engine that keeps its images in `directory`; yields its DOCKER_HOST. Raises NoEngine."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NoEngine(f"another engine runs in {directory}") from None
        sweep(directory)
        name, host = f"thinpipe-{os.getpid()}-engine", f"unix://{directory}/docker.sock"
        tc.run(["ip", "netns", "add", name])
        try:
            tc.run(["ip", "-n", name, "link", "set", "lo", "up"])
            # `ip netns exec` would mount another /sys, without the control groups.
            command = ["nsenter", f"--net=/run/netns/{name}", "dockerd", "--storage-driver=overlay2"]
            command += ["--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{directory.name}"]
            command += ["--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec"]
            command += ["-p", f"{directory}/docker.pid", "-H", host]
            with (directory / "dockerd.log").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            _wait_ready(process, host, directory / "dockerd.log")
            _remove_containers(host)  # of an engine that was killed
            yield host
        finally:
            _remove_containers(host)
            _stop(directory)
            sweep(directory)


def _wait_ready(process: subprocess.Popen[bytes], host: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while docker(host, "version", check=False).returncode:
        if process.poll() is not None or time.monotonic() > deadline_s:
            words = log.read_text(errors="replace").splitlines()[-1:]
            raise NoEngine(f"dockerd does not run here: {' '.join(words)} (all of it: {log})")
        time.sleep(0.2)


def docker(host: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the client against that engine, within two minutes."""
    environment = {**os.environ, "DOCKER_HOST": host, "DOCKER_BUILDKIT": "0"}
    return subprocess.run(
        ["docker", *arguments], env=environment, capture_output=True, text=True, check=check, timeout=120
    )


def _remove_containers(host: str) -> None:
    if ids := docker(host, "ps", "-aq", check=False).stdout.split():
        docker(host, "rm", "-f", "-v", *ids, check=False)
    docker(host, "network", "prune", "-f", check=False)
    docker(host, "volume", "prune", "-f", "--filter", "all=1", check=False)
    docker(host, "volume", "prune", "-f", check=False)


def processes(directory: Path) -> list[psutil.Process]:
    """The engine's, containerd's and its shims', with all that runs in containers."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            ours = words and Path(words[0]).name.startswith(("dockerd", "containerd", "nsenter", "docker-proxy"))
            if ours and any(str(directory) in word for word in words):
                found |= {process, *process.children(recursive=True)}
    return sorted(found, key=lambda process: process.pid)


def mounts(directory: Path) -> list[str]:
    """Mount points below `directory`, the innermost first."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in reversed(points) if point.startswith(f"{directory}/")]


def _stop(directory: Path) -> None:
    """Ask the engine to end, as its operator would."""
    running = processes(directory)
    for process in running:
        with suppress(psutil.Error):
            if Path(process.cmdline()[0]).name == "dockerd":
                process.send_signal(signal.SIGTERM)
    psutil.wait_procs(running, timeout=STOP_S)


def sweep(directory: Path) -> None:
    """Take away whatever an engine of this directory left: processes, mounts, control groups, its namespace."""
    left = processes(directory)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_S)
    for point in mounts(directory):
        subprocess.run(["umount", "-l", point], capture_output=True, check=False)
    for group in Path("/sys/fs/cgroup").glob(f"**/{directory.name}"):
        for each in sorted(group.glob("**/"), key=lambda path: -len(path.parts)):
            with suppress(OSError):
                each.rmdir()
    shutil.rmtree(directory / "exec", ignore_errors=True)
    (directory / "docker.pid").unlink(missing_ok=True)
    for name in netns.existing():
        pid = name.split("-")[1]
        if name.endswith("-engine") and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists()):
            with suppress(tc.KernelLinkError):
                tc.run(["ip", "netns", "del", name])
