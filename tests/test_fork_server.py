"""Commands that are forked are what `python -m` would have made of them, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from thinpipe.sim.launch.fork_server import CannotFork, ForkedProcess, ForkServer
from thinpipe.sim.launch.local_swarm import Swarm
from thinpipe.sim.launch.node_launch import node_environment

from .real_node import until

ROOT = Path(__file__).resolve().parent.parent
SOON_S = 30.0


def environment(**more: str) -> dict[str, str]:
    return {**node_environment(), "PYTHONPATH": str(ROOT), **more}


class Desk:
    """A server and where what it starts writes."""

    def __init__(self, directory: Path, *modules: str) -> None:
        told = environment(OF_THE_SERVER="yes")
        self.server = ForkServer.apart(modules, told, command="tests.forked_command")
        self.out, self.err = directory / "out", directory / "err"

    def start(self, *arguments: str, **options: Any) -> ForkedProcess:
        """Writes anew what it says."""
        options = {"environment": environment(A_VARIABLE="of this child"), **options}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            return self.server.start(arguments, stdout=out.fileno(), stderr=err.fileno(), **options)

    def waiting(self, **options: Any) -> ForkedProcess:
        """One that is in its main, and stays there."""
        process = self.start("wait", **options)
        until(lambda: "waits" in self.out.read_text(), "the command to begin")
        return process


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = Desk(tmp_path_factory.mktemp("desk"))
    yield made
    made.server.close()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_exit_codes_are_those_of_an_interpreter(desk: Desk) -> None:
    for arguments in (["exit", "0"], ["exit", "3"], ["words"], ["raise"], ["thread"]):
        forked = desk.start(*arguments).wait(SOON_S)
        command = [sys.executable, "-c", "from tests.forked_command import main; main()", *arguments]
        plain = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert forked == plain.returncode, arguments
        assert desk.out.read_text() == plain.stdout
        assert desk.err.read_text().splitlines()[-1:] == plain.stderr.splitlines()[-1:]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_signals_end_it_as_by_default(desk: Desk, sign: signal.Signals) -> None:
    process = desk.waiting()
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(sign)
    assert process.wait(SOON_S) == process.poll() == process.returncode == -sign
    assert ("KeyboardInterrupt" in desk.err.read_text()) == (sign == signal.SIGINT)
    process.kill()  # nothing is there, and nothing is hit


def test_it_has_what_it_was_given_and_nothing_of_the_server(desk: Desk, tmp_path: Path) -> None:
    process = desk.start("tell", "one", "two words", directory=str(tmp_path))
    assert process.wait(SOON_S) == 0
    told = json.loads(desk.out.read_text())
    assert told["pid"] == told["session"] == process.pid
    assert told["parent"] == desk.server.pid
    assert told["arguments"] == ["one", "two words"]
    assert (told["directory"], told["variable"], told["inherited"]) == (str(tmp_path), "of this child", None)
    assert (told["input"], told["descriptors"], told["threads"], told["blocked"]) == ("", [0, 1, 2], 1, [])
    assert "default_int_handler" in told["signals"][0]
    assert told["signals"][1:] == [str(signal.SIG_DFL)] * 2
    assert desk.err.read_text() == "an error\n"


def test_two_at_a_time_each_end_for_themselves(desk: Desk) -> None:
    first, second = desk.waiting(), desk.waiting()
    second.kill()
    assert second.wait(SOON_S) == -signal.SIGKILL
    assert first.poll() is None
    first.terminate()
    assert first.wait(SOON_S) == -signal.SIGTERM


def test_a_server_that_is_killed_is_said_and_takes_along_who_is_bound_to_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    bound, free = desk.waiting(dies_with=True), desk.waiting()
    os.kill(desk.server.pid, signal.SIGKILL)
    assert bound.wait(SOON_S) == 1  # nobody is left to say how it ended
    assert free.poll() is None
    with pytest.raises(CannotFork, match="is gone"):
        desk.start("exit", "0")
    free.kill()
    assert free.wait(SOON_S) == 1
    desk.server.close()


def test_a_client_that_is_killed_leaves_nobody(tmp_path: Path) -> None:
    program = """if True:
        import os, sys, time
        from thinpipe.sim.launch.fork_server import ForkServer

        server = ForkServer.apart([], os.environ, command="tests.forked_command")
        child = server.start(["wait"], stdout=2, stderr=2, environment=os.environ, dies_with=True)
        print(server.pid, child.pid, flush=True)
        time.sleep(300)
        """
    command, log = [sys.executable, "-c", program], (tmp_path / "log").open("w")
    with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT) as client:
        assert client.stdout
        pids = list(map(int, client.stdout.readline().split()))
        assert len(pids) == 2
        assert all(map(alive, pids))
        client.kill()
    until(lambda: not any(map(alive, pids)), "the end of server and child")


def test_who_finds_the_server_gone_does_not_begin() -> None:
    """It was forked, and the server ended before it ran a single line: nobody is left to take it along."""
    program = """if True:
        import os
        from thinpipe.sim.launch.forked import Request, become

        told = {"environment": dict(os.environ), "directory": os.getcwd(), "session": False, "dies_with": True}
        request = Request(module="tests.forked_command", arguments=["exit", "7"], **told)
        become(request, os.dup(1), os.dup(2), server=os.getppid() + 1)
        """
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 1


def test_closing_ends_the_server_and_not_what_it_started(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    free = desk.waiting()
    desk.server.close()
    assert not alive(desk.server.pid)
    assert free.poll() is None
    free.kill()
    assert free.wait(SOON_S) == 1


def test_it_refuses_what_cannot_be_forked(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(CannotFork, match="OMP_NUM_THREADS takes effect when an interpreter starts"):
        desk.start("exit", "0", environment=environment(OMP_NUM_THREADS="2"))
    with pytest.raises(CannotFork, match="bytes"):
        desk.start("exit", "0", environment=environment(LONG="x" * 200_000))
    threaded = Desk(tmp_path, "tests.thread_at_import")
    with pytest.raises(CannotFork, match="it has 2 Python threads"):
        threaded.start("exit", "0")
    threaded.server.close()


def test_a_swarm_starts_an_interpreter_where_it_cannot_fork(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[pipeline]\nstages = 1\nno_such = 1\n")
    server = ForkServer.apart([], node_environment())
    server.close()
    swarm = Swarm(tmp_path, stages=1, forks=server)
    swarm.start(0, resume=False)
    assert swarm.process(0).wait(SOON_S) == 2
    log = (tmp_path / "stage-0.log").read_text()
    assert log.startswith("started as an interpreter of its own: process")
    assert "no_such" in log


def test_a_swarm_forks_where_it_can(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[pipeline]\nstages = 1\nno_such = 1\n")
    server = ForkServer.apart([], node_environment())
    swarm = Swarm(tmp_path, stages=1, forks=server)
    swarm.start(0, resume=False)
    assert swarm.process(0).wait(SOON_S) == 2
    assert isinstance(swarm.process(0), ForkedProcess)
    assert (tmp_path / "stage-0.log").read_text().startswith("thinpipe: error: ")
    server.close()
