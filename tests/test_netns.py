"""Namespaces behind kernel-capped links: the cap holds for a real TCP transfer, and nothing stays behind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from thinpipe.sim.launch import isolation
from thinpipe.sim.launch.isolation import isolated
from thinpipe.sim.links import netns, tc
from thinpipe.sim.links.netns import Network, existing, network
from thinpipe.sim.links.shaper import LinkProfile
from thinpipe.sim.links.tc import KernelLinkError

pytestmark = pytest.mark.alone

CAPPED = LinkProfile.parse("80mbit")
UNCAPPED = LinkProfile.parse("none")
SECONDS = 1.0

# Sends for SECONDS; the receiver prints the bits per second between the first quarter's end and the last byte.
RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 7001)); print("ready", flush=True)
peer, _ = server.accept(); peer.settimeout(20)
seconds, start, total, base = float(sys.argv[2]), None, 0, None
while data := peer.recv(1 << 18):
    now = time.monotonic(); start = start or now; total += len(data)
    if base is None and now - start > seconds / 4: base = (now, total)
    last = now
print((total - base[1]) * 8 / (last - base[0]))
"""
SEND = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 7001), timeout=20)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end: peer.sendall(bytes(1 << 16))
"""


def own() -> set[str]:
    """The namespaces of this process; others may make and take away theirs meanwhile."""
    return {name for name in existing() if name.startswith(f"thinpipe-{os.getpid()}-")}


on_kernel_links = pytest.mark.usefixtures("kernel_links")


@pytest.fixture
def two(kernel_links: None) -> Iterator[Network]:
    del kernel_links
    with network(2, CAPPED) as made:
        yield made


def transfer(made: Network, sender: int, receiver: int) -> float:
    """Bits per second of one TCP stream, as the receiver sees it."""
    python = [sys.executable, "-S", "-c"]
    where = [made.addresses[receiver], str(SECONDS)]
    with subprocess.Popen([*made.prefix(receiver), *python, RECEIVE, *where], stdout=subprocess.PIPE, text=True) as end:
        assert end.stdout
        assert end.stdout.readline() == "ready\n"
        subprocess.run([*made.prefix(sender), *python, SEND, *where], check=True, timeout=30)
        return float(end.stdout.readline())


def assert_capped(made: Network, sender: int, receiver: int) -> None:
    """At 80 Mb/s, within 10 %. Never above; below, up to twice: the machine may have stalled, not the link."""
    payload = 80e6 * 1448 / 1514  # of a full frame; the rest is headers, which tbf counts
    for _ in range(3):
        rate = transfer(made, sender, receiver)
        assert rate < 1.1 * payload
        if rate > 0.9 * payload:
            return
    pytest.fail(f"{rate / 1e6:.1f} Mb/s through a cap of 80")


@on_kernel_links
def test_the_cap_holds_both_ways_and_comes_off(two: Network) -> None:
    assert_capped(two, 0, 1)
    assert_capped(two, 1, 0)
    two.cap(UNCAPPED)
    assert transfer(two, 0, 1) > 5 * 80e6


@pytest.mark.slow
@on_kernel_links
def test_a_node_is_capped_as_receiver_too(two: Network) -> None:
    tc.uncap("eth0", namespace=two.nodes[0])  # node 0 sends freely; the port of node 1 does not pass it on
    assert_capped(two, 0, 1)


@on_kernel_links
def test_counters_are_those_of_the_transfer(two: Network) -> None:
    before = two.counters(1)
    rate = transfer(two, 0, 1)
    after = two.counters(1)
    assert after.received_bytes - before.received_bytes > rate / 8 * SECONDS * 0.8
    assert after.sent_bytes - before.sent_bytes < (after.received_bytes - before.received_bytes) / 10


@on_kernel_links
def test_nothing_stays_after_an_error_and_what_ran_is_ended() -> None:
    before = own()
    left: list[subprocess.Popen[str]] = []

    def fail_inside() -> None:
        with network(2, CAPPED) as made:
            assert own() - before == {*made.nodes, made.switch}
            program = [*made.prefix(0), sys.executable, "-S", "-c", "import time; print(1, flush=True); time.sleep(60)"]
            left.append(subprocess.Popen(program, stdout=subprocess.PIPE, text=True))
            assert left[0].stdout
            assert left[0].stdout.readline()  # it runs on that node
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    with left[0] as process:
        assert process.wait(5) == -signal.SIGKILL
    assert own() == before


@on_kernel_links
def test_two_networks_of_one_process_do_not_meet() -> None:
    with network(1, UNCAPPED) as one, network(1, UNCAPPED) as other:
        assert not {*one.nodes, one.switch} & {*other.nodes, other.switch}


@on_kernel_links
def test_a_failure_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = own()

    def fail(*_: object, **__: object) -> None:
        raise KernelLinkError("no tbf here")

    monkeypatch.setattr(tc, "cap", fail)
    with pytest.raises(KernelLinkError, match="no tbf"), network(2, CAPPED):
        pass
    assert own() == before


@pytest.mark.slow
@on_kernel_links
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_what_ends_a_process_leaves_nothing_and_sigkill_is_swept(how: signal.Signals) -> None:
    program = (
        "import signal, time\nfrom thinpipe.sim.launch.isolation import isolated\n"
        "from thinpipe.sim.links.shaper import LinkProfile\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # who runs the tests may have it ignored
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "with isolated(2, LinkProfile.parse('80mbit')) as made:\n    print(made.network.switch, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        switch = process.stdout.readline().strip()
        assert switch in existing()
        process.send_signal(how)
        assert process.wait(10)
    if how is signal.SIGKILL:
        assert switch in existing()
        netns._sweep()
    assert not {name for name in existing() if name.startswith(f"thinpipe-{process.pid}-")}


@on_kernel_links
def test_cap_and_uncap_replace_what_was_there(two: Network) -> None:
    node = two.nodes[0]
    tc.cap("eth0", LinkProfile.parse("300mbit,burst=64kb"), namespace=node)
    assert "rate 300Mbit burst 655" in tc.shown("eth0", namespace=node)
    tc.uncap("eth0", namespace=node)
    tc.uncap("eth0", namespace=node)
    assert "tbf" not in tc.shown("eth0", namespace=node)
    with pytest.raises(KernelLinkError, match="eth7"):
        tc.cap("eth7", CAPPED, namespace=node)


@on_kernel_links
def test_latency_needs_netem_which_is_tried(two: Network) -> None:
    before = own()
    slow = LinkProfile.parse("80mbit,25ms")
    if tc.has_netem():
        two.cap(slow)
        assert "delay 25ms" in tc.shown("eth0", namespace=two.nodes[0])
    else:
        with pytest.raises(KernelLinkError, match="no netem") as refusal:
            two.cap(slow)
        assert "--link 80mbit,25ms" in str(refusal.value)
    assert own() == before


# -- what needs no root: signals, and whose a namespace is -------------------------------------------------------------


class Kernel:
    """`ip`, as far as namespaces go: `names` are there; of `failing` it cannot say what runs in them."""

    def __init__(self, names: set[str], failing: set[str]) -> None:
        self.names, self._failing = names, failing

    def run(self, command: list[str]) -> str:
        match command:
            case ["ip", "netns", "list"]:
                return "".join(f"{name} (id: 0)\n" for name in sorted(self.names))
            case ["ip", "netns", "pids", name]:
                if name in self._failing:
                    raise KernelLinkError(f"no {name}")
                return ""
            case ["ip", "netns", "del", name] if name in self.names:
                self.names.remove(name)
                return ""
            case _:
                raise KernelLinkError(" ".join(command))


def test_one_that_cannot_be_looked_into_keeps_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel({"thinpipe-1-at2-a", "thinpipe-1-at2-b", "thinpipe-1-at2-c"}, {"thinpipe-1-at2-a"})
    monkeypatch.setattr(netns, "run", kernel.run)
    netns._remove(["thinpipe-1-at2-a", "thinpipe-1-at2-b"])
    assert kernel.names == {"thinpipe-1-at2-c"}


def test_whose_owner_is_gone_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone: no such process, one that was not waited for yet, or one that has its number by now, a thread for one."""
    asleep = threading.Event()
    thread = threading.Thread(target=asleep.wait, daemon=True)
    thread.start()
    with subprocess.Popen(["true"]) as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        mine, since = tc.namespace_name("0-node0"), tc.started(os.getpid())
        assert since
        others = {
            f"thinpipe-{2**22 + 1}-at1-0-node0",
            f"thinpipe-{dead.pid}-0-node0",
            f"thinpipe-{os.getpid()}-at{since + 1}-0-node0",
            f"thinpipe-{thread.native_id}-at{since - 1}-0-node0",
        }
        kernel = Kernel({mine, "unrelated", *others}, set())
        monkeypatch.setattr(netns, "run", kernel.run)
        netns._sweep()
    asleep.set()
    thread.join()
    assert kernel.names == {mine, "unrelated"}


@pytest.fixture
def kept_handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("kept_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_process_ends_isolation_first(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    over: list[bool] = []

    @contextmanager
    def built(nodes: int, profile: LinkProfile) -> Iterator[Network]:
        try:
            yield Network([str(profile)] * nodes, "switch")
        finally:
            over.append(True)

    monkeypatch.setattr(isolation, "network", built)
    monkeypatch.setattr(tc, "require", lambda *_: None)
    signal.signal(number, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), isolated(2, CAPPED):
        signal.raise_signal(number)
    assert over == [True]
    assert signal.getsignal(number) is signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    with isolated(2, CAPPED):
        signal.raise_signal(number)
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.usefixtures("kept_handlers")
def test_a_second_signal_waits_until_all_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def remove(names: list[str]) -> None:
        for name in names:
            signal.raise_signal(signal.SIGINT)
            taken.append(name)

    for name, does in {"require": None, "_sweep": None, "_build": None, "_remove": remove}.items():
        monkeypatch.setattr(netns, name, does or (lambda *_: None))
    monkeypatch.setattr(tc, "cap", lambda *_, **__: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), network(2, CAPPED) as made:
        pass
    assert taken == [*made.nodes, made.switch]


def test_more_nodes_than_fit_are_refused() -> None:
    with pytest.raises(KernelLinkError, match=r"^a network of 251 nodes; between 1 and 250 fit$"), network(251, CAPPED):
        pass


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(KernelLinkError, match=r"^user 1000 may not .* as root; the cap in user space.*$"):
        tc.cap("eth0", CAPPED)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(KernelLinkError, match=r"^tc is not installed .*iproute2.*; the cap in user space.*$"):
        tc.cap("eth0", CAPPED)
    with pytest.raises(KernelLinkError, match=r"^ip is not installed"), network(2, CAPPED):
        pass
