"""Bytes reported = bytes that the shaper passed = bytes on the interface, within 2 % plus TCP/IP headers.

Where root allows, the run gets a network namespace of its own, so that its loopback carries nothing else; elsewhere the
machine's loopback is read, and other traffic on it would show.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from thinpipe.node.config_file import dump_config
from thinpipe.sim.reports.summary import OUTSIDE_RATIO

from .conftest import TinyConfig

pytestmark = pytest.mark.alone

# A loopback packet: 14 bytes of (empty) Ethernet header, 20 of IPv4, 20 of TCP and 12 of its timestamp option.
HEADER_BYTES_PER_PACKET = 66

IN_NAMESPACE = """
import array, fcntl, json, socket, struct, subprocess, sys

def bring_up(name):  # ifreq with IFF_UP, as `ip link set lo up` does
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh22x", name.encode(), 0x1 | 0x40))

def counters(name):
    for line in open("/proc/net/dev"):
        if line.strip().startswith(name + ":"):
            fields = [int(f) for f in line.partition(":")[2].split()]
            return {"bytes": fields[8], "packets": fields[9]}

if sys.argv[1] == "own":
    bring_up("lo")
before = counters("lo")
done = subprocess.run(sys.argv[2:], capture_output=True, text=True)
after = counters("lo")
print(json.dumps({"code": done.returncode, "error": done.stderr, "summary": done.stdout,
                  "bytes": after["bytes"] - before["bytes"], "packets": after["packets"] - before["packets"]}))
"""


def own_namespace() -> list[str]:
    """The command prefix that gives a process its own network, or nothing where that is not allowed."""
    try:
        allowed = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    return ["unshare", "--net"] if allowed else []


@pytest.mark.slow
def test_reported_bytes_are_on_the_interface(tiny: TinyConfig, tmp_path: Path) -> None:
    prefix = own_namespace()
    run = tmp_path / "run"
    settings = tmp_path / "run.toml"
    settings.write_text(dump_config(tiny()))
    command = [*prefix, sys.executable, "-c", IN_NAMESPACE, "own" if prefix else "shared"]
    command += [sys.executable, "-m", "thinpipe.cli", "up", "--config", str(settings), "--out", str(run), "--json"]
    command += ["--stages", "2", "--set", "model.width=256", "--steps", "20", "--link", "300mbit,2ms"]
    command += ["--forward", "int4", "--backward", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["code"] == 0, seen["error"]
    summary = json.loads(seen["summary"])

    ways = [entry[direction] for entry in summary["boundaries"] for direction in ("forward", "backward")]
    sent = sum(sum(way["sent_bytes"].values()) for way in ways)
    payload_on_wire = seen["bytes"] - HEADER_BYTES_PER_PACKET * seen["packets"]
    assert sent == pytest.approx(payload_on_wire, rel=0.02)
    by_kind = {kind: count for kind, count in summary["bytes"].items() if kind != "total"}
    assert sum(by_kind.values()) == sent
    assert summary["bytes"]["total"] == sent - sum(by_kind.get(kind, 0) for kind in OUTSIDE_RATIO)
