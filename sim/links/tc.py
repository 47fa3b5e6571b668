"""A link's cap in the kernel: configuring tbf, a token bucket, on a network interface, and removing it.

The user-space shaper (`sim.links.shaper`) caps what thinpipe sends, and nothing else. Where another program is to be
measured over the same thin link, the cap has to sit below both: in the queueing discipline of an interface, where tbf
passes `rate` bits a second of whole frames, Ethernet, IP and TCP headers included; of a TCP stream 95.6
% are payload then (1,448 of 1,514 bytes). Latency is netem's part (tc-netem(8)), which many kernels of small virtual
machines do not have; whether this one does is tried, not guessed, and a profile that asks for it is refused where it is
missing.

Everything is done by iproute2's own programs. Why not netlink messages of our own: `tc qdisc show` then says what a
reader of the manual expects, and a failure is in tc's words. This needs root; where root or a program is missing the
error is one line that says so, and that the cap of `--link` needs neither.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .shaper import LinkProfile

BURST_S = 0.002  # of the rate: short against a step, long against a timer that fires late on a busy machine
LEAST_BURST_BYTES = 16384  # tbf cuts what is larger than its bucket into packets, which costs CPU time
QUEUE_S = 0.05  # of the rate: what may wait in tbf before it drops; the buffer of a home router
COMMAND_TIMEOUT_S = 10.0
NETEM, TBF = "7e01:", "7e02:"  # handles by which ours are known from an administrator's, who counts from 1:
USER_SPACE = "the cap in user space, --link 300mbit,25ms, needs neither root nor tc"


class KernelLinkError(RuntimeError):
    """The kernel's cap cannot be had here; the message is one line that names what is missing."""


def require(*programs: str) -> None:
    """Raises KernelLinkError unless this process is root and finds these programs of iproute2."""
    for program in programs:
        if shutil.which(program) is None:
            raise KernelLinkError(
                f"{program} is not installed (on Debian and Ubuntu: apt-get install iproute2); {USER_SPACE}"
            )
    if os.geteuid() != 0:
        raise KernelLinkError(f"user {os.geteuid()} may not change the kernel's network: run it as root; {USER_SPACE}")


def run(command: Sequence[str]) -> str:
    """Run one of iproute2's programs and return what it printed. Raises KernelLinkError with the program's own words.

    In a session of its own: a Ctrl-C in the terminal must not reach a command that is taking things away.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, start_new_session=True, check=False
        )
    except subprocess.TimeoutExpired:
        raise KernelLinkError(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S:g} s") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise KernelLinkError(f"`{' '.join(command)}` failed: {words}; {USER_SPACE}")
    return done.stdout


def tbf(profile: LinkProfile) -> list[str]:
    """The arguments of tbf for this rate. A profile's own burst counts where it was given one."""
    assert profile.rate_bits_per_s is not None
    bytes_per_s = profile.rate_bits_per_s / 8
    own = profile.burst_bytes if profile.burst_bytes != LinkProfile(rate_bits_per_s=1).burst_bytes else 0
    burst = own or max(LEAST_BURST_BYTES, round(bytes_per_s * BURST_S))
    rate = ["rate", f"{round(profile.rate_bits_per_s)}bit", "burst", f"{burst}b"]
    return ["tbf", *rate, "limit", f"{burst + round(bytes_per_s * QUEUE_S)}b"]


def netem(profile: LinkProfile) -> list[str]:
    """The arguments of netem for this latency and jitter. Its queue holds packets: those of a second at the rate."""
    packets = round((profile.rate_bits_per_s or 1e10) / 8 / 1500) + 1000
    jitter = [f"{profile.jitter_s * 1e6:.0f}us"] if profile.jitter_s else []
    return ["netem", "delay", f"{profile.latency_s * 1e6:.0f}us", *jitter, "limit", str(packets)]


def _tc(namespace: str | None, *arguments: str) -> str:
    return run(["tc", *(["-n", namespace] if namespace else []), *arguments])


def started(process: int) -> int | None:
    """When it was, in the kernel's ticks since the machine's start; None if it is gone, or dead and not yet waited for.
    Another process may have the same number later, but not the same start."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZXx" else int(fields[18])


def namespace_name(what: str) -> str:
    """For a namespace of this process: from its name others see whether its owner is there (`netns`)."""
    return f"thinpipe-{os.getpid()}-at{started(os.getpid())}-{what}"


def has_netem() -> bool:
    """Whether this kernel delays packets: tried on the loopback of a namespace that exists only for it."""
    require("ip", "tc")
    name = namespace_name("netem")
    run(["ip", "netns", "add", name])
    try:
        _tc(name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except KernelLinkError:
        return False
    finally:
        run(["ip", "netns", "del", name])
    return True


def cap(interface: str, profile: LinkProfile, *, namespace: str | None = None) -> None:
    """From now on `interface` sends as `profile` says; what it was told before no longer holds. Only sending: a link is
    capped both ways by a cap at each end. Raises KernelLinkError, also for a latency in a kernel without netem."""
    if not cap_most(interface, profile, namespace=namespace):
        uncap(interface, namespace=namespace)
        raise KernelLinkError(
            f"link {profile} has a latency, and this kernel has no netem to delay with; leave the latency out, or "
            f"use the cap in user space, --link {profile}"
        )


def cap_most(interface: str, profile: LinkProfile, *, namespace: str | None = None) -> bool:
    """`cap` with what this kernel has; False if the latency is left for user space, because there is no netem.

    Whether there is is tried on the interface itself: a container that may cap its interface may not make the namespace
    that `has_netem` tries it in. Raises KernelLinkError, also where the rate cannot be capped; nothing of ours is left
    there then.
    """
    require("tc")
    uncap(interface, namespace=namespace)
    where = ["qdisc", "add", "dev", interface]
    parent, whole = ["root"], True
    if profile.latency_s:
        try:
            _tc(namespace, *where, "root", "handle", NETEM, *netem(profile))
            parent = ["parent", f"{NETEM}1"]
        except KernelLinkError:  # tbf says it too, if the reason is another one
            whole = False
    if profile.rate_bits_per_s is not None:
        try:
            _tc(namespace, *where, *parent, "handle", TBF, *tbf(profile))
        except KernelLinkError:
            with suppress(KernelLinkError):  # the delay alone would come on top of what user space does instead
                uncap(interface, namespace=namespace)
            raise
    return whole


def interfaces() -> list[str]:
    """Names of this machine's network interfaces that are up, without the loopback. Raises KernelLinkError."""
    require("ip")
    links = json.loads(run(["ip", "-json", "link", "show", "up"]))
    # What is not up is an empty object there.
    return [link["ifname"] for link in links if "LOOPBACK" not in link.get("flags", ["LOOPBACK"])]


def uncap(interface: str, *, namespace: str | None = None) -> bool:
    """Take off what `cap` put on, and say whether there was anything; what others put there stays. Raises
    KernelLinkError for no such interface."""
    require("tc")
    ours = rf"^qdisc (netem {NETEM}|tbf {TBF}) root"
    if not re.search(ours, shown(interface, namespace=namespace), re.MULTILINE):
        return False
    _tc(namespace, "qdisc", "del", "dev", interface, "root")
    return True


def shown(interface: str, *, namespace: str | None = None) -> str:
    """What `tc qdisc show` says of it."""
    return _tc(namespace, "qdisc", "show", "dev", interface)
