"""Start `thinpipe` commands by forking a process that has imported everything, instead of a new interpreter for each.

A node's imports (torch, transformers and what they bring) take more time than the rest of a short run, and four nodes
on two cores take it twice over. A fork of a process that holds these modules takes milliseconds, and what it computes
is the same to the bit: nothing has been computed before it.

There are two ways to such a process. `ForkServer.here` makes it a copy of this process, for a command that has
imported all of it for its own sake, and has not begun anything else. `ForkServer.apart` starts one and tells it what to
import, for a process that must not be copied. Either is a process of its own with one thread (`forked`), so the caller
may have threads afterwards, and nodes that are started again hours later come from the same clean copy.

A `ForkedProcess` has the methods of `subprocess.Popen` that are used here. Its signals go to a pidfd, which names this
process for good; a number might name another one, since it is the server that waits for it.

Why not multiprocessing's forkserver: it pickles what it runs, keeps a resource tracker, and makes workers of one
program; a node has to be what `thinpipe node` is anywhere, with a session, a log, an environment and an exit code of
its own. What cannot be forked safely is started as an interpreter as before: `CannotFork` says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .forked import REQUEST_BYTES, Request, serve, why_not

MODULE = "thinpipe.cli"
ANSWER_S = 120.0  # how long a server may take, its imports on a slow and busy machine included
LAST_WORD_S = 5.0  # between the end of a child and the server's word of it, which takes milliseconds
# What is read when an interpreter or a library starts: a child cannot have it otherwise than its server.
FIXED = ("OMP_", "MKL_", "OPENBLAS_", "TORCH_", "LD_", "MALLOC_", "GLIBC_", "PYTHONPATH", "PYTHONHASHSEED", "CUDA_")


def _readable(descriptor: int, deadline_s: float | None) -> bool:
    """Whether there is something to read within that time; None: however long it takes."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if deadline_s is None else max(0.0, deadline_s) * 1000))


class CannotFork(RuntimeError):
    """Start it as a process of its own; the message says why."""


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | Any: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class ForkServer:
    """A process that forks. pid: the parent of all that is started. Use `here` or `apart`, and `close` it."""

    def __init__(
        self, control: socket.socket, pid: int, environment: Mapping[str, str], *, command: str = MODULE
    ) -> None:
        self._control, self.pid, self._environment, self._command = control, pid, dict(environment), command
        self._ended: dict[int, int] = {}  # pid -> exit code, of those who have not asked
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self.gone = False

    @classmethod
    def here(cls) -> ForkServer:
        """Of what this process has imported. Raises CannotFork where a fork of it is not safe."""
        if reason := why_not():
            raise CannotFork(f"this process cannot be forked: {reason}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = os.fork()
        if not pid:
            try:
                serve(theirs)
            finally:
                os._exit(70)  # never into the caller's code
        theirs.close()
        return cls(ours, pid, os.environ)

    @classmethod
    def apart(cls, modules: Sequence[str], environment: Mapping[str, str], *, command: str = MODULE) -> ForkServer:
        """A new interpreter, with that environment, which imports `modules`; returns before it has. command: the module
        whose `main` is what is started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", "thinpipe.sim.launch.forked", str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
            )
        server = cls(ours, child.pid, environment, command=command)
        server._child = child
        return server

    def start(
        self,
        arguments: Sequence[str],
        *,
        stdout: int,
        stderr: int,
        environment: Mapping[str, str],
        directory: str | None = None,
        session: bool = True,
        dies_with: bool = False,
    ) -> ForkedProcess:
        """`thinpipe` with these arguments, writing to these two descriptors. session: in one of its own. dies_with: it
        is killed with the server. Raises CannotFork; TimeoutError when the server does not answer."""
        for name in {*environment, *self._environment}:
            if name.startswith(FIXED) and environment.get(name) != self._environment.get(name):
                raise CannotFork(f"{name} takes effect when an interpreter starts")
        request = Request(
            module=self._command,
            arguments=list(arguments),
            environment=dict(environment),
            directory=directory or os.getcwd(),
            session=session,
            dies_with=dies_with,
        ).encode()
        if len(request) > REQUEST_BYTES:
            raise CannotFork(f"arguments and environment are over {REQUEST_BYTES} bytes")
        with self._lock:
            try:
                socket.send_fds(self._control, [request], [stdout, stderr])
            except OSError as error:
                self.gone = True
                raise CannotFork(f"process {self.pid}, which forks, is gone ({error.strerror})") from None
            return self._answer()

    def _answer(self) -> ForkedProcess:
        deadline = time.monotonic() + ANSWER_S
        while True:
            if not _readable(self._control.fileno(), deadline - time.monotonic()):
                raise TimeoutError(f"process {self.pid}, which forks, has not answered for {ANSWER_S:g} s")
            said, descriptors = self._receive()
            if self.gone:
                raise CannotFork(f"process {self.pid}, which forks, is gone")
            if "refused" in said:
                raise CannotFork(f"process {self.pid} cannot be forked: {said['refused']}")
            if "pid" in said:
                return ForkedProcess(self, said["pid"], *descriptors)

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next thing that the server says; nothing, when it is gone."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, REQUEST_BYTES, 1)
        except OSError:
            data, descriptors = b"", []
        if not data:
            self.gone = True
            return {}, []
        said = json.loads(data)
        if "ended" in said:
            self._ended[said["ended"]] = said["code"]
        return said, descriptors

    def code_of(self, pid: int) -> int | None:
        """With which code that child has ended, once it has: the server says so at once. Told once; None if it cannot
        say any more."""
        deadline = time.monotonic() + LAST_WORD_S
        with self._lock:
            while pid not in self._ended and not self.gone:
                if not _readable(self._control.fileno(), deadline - time.monotonic()):
                    break
                self._receive()
            return self._ended.pop(pid, None)

    def close(self) -> None:
        """The server ends; what it started and is not bound to it goes on."""
        self.gone = True
        self._control.close()
        if self._child:
            self._child.kill()
            self._child.wait()
        else:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)


class ForkedProcess:
    """A command that runs. returncode: as `subprocess.Popen` has it, negative for a signal; None while it runs."""

    def __init__(self, server: ForkServer, pid: int, pidfd: int) -> None:
        self._server, self.pid, self._pidfd = server, pid, pidfd
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, if it has ended; 1 where the server was lost before it could say."""
        return self._look(0.0)

    def _look(self, deadline_s: float | None) -> int | None:
        """Wait for the end for so long (None: without an end), and then for the server's word of it."""
        if self.returncode is None and _readable(self._pidfd, deadline_s):
            code = self._server.code_of(self.pid)
            self.returncode = 1 if code is None else code
            os.close(self._pidfd)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
