"""The server's half of `fork_server`: a process with one thread that forks a command for each request.

It holds nothing but imported modules: no thread, no socket beside the one to its client, no file. A fork copies the
memory and one thread of a process; whatever other threads held or did is lost, half done. So a request is refused, with
the reason, where there is a second thread (gRPC's, OpenBLAS's, a tokenizer's), and the caller starts an interpreter
instead.

What a child does before it becomes the command is what `execve` and a new interpreter would have done for it: a session
of its own, its output, no other descriptors, its environment and directory, signals as they are by default, its own
arguments. It ends like an interpreter too: the same exit codes, threads waited for, what was registered for the exit
called. It never returns into the code that forked it.

Children are this process's, so it waits for them and tells their ends to the client. It ends when its client does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from typing import NoReturn

from .end_signals import ANOTHER_ENDED, DRAINING
from .parent_death import die_with_parent
from .process_exit import exit_code

REQUEST_BYTES = 1 << 17  # more than any environment; a packet of the socket holds it


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Run `module`.main() with these arguments. dies_with: SIGKILL when the server is gone, for commands that do not
    watch their parent themselves."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    session: bool
    dies_with: bool

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(data: bytes) -> Request:
        return Request(**json.loads(data))


def why_not() -> str | None:
    """What makes a fork of this process unsafe, or None."""
    if not hasattr(os, "pidfd_open"):
        return "this system has no pidfd_open"
    if threading.active_count() != 1:
        return f"it has {threading.active_count()} Python threads"
    try:
        tasks = len(os.listdir("/proc/self/task"))
    except OSError:
        return "there is no /proc to see its threads in"
    if tasks != 1:
        return f"it has {tasks} threads"
    for name in ("hivemind", "torch.cuda"):
        module = sys.modules.get(name)
        if module and (name == "hivemind" or module.is_initialized()):
            return f"{name} has begun in it, and does not survive a fork"
    return None


def serve(control: socket.socket) -> NoReturn:
    """Fork a child for each request until the client is gone. Does not return, in the server or in any child."""
    os.setsid()  # a Ctrl-C in the terminal is the client's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (*DRAINING, ANOTHER_ENDED):  # whoever ends all processes of a job: the client says when this one ends
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # and not SIG_IGN, which its children would keep
    close_all_but(0, 1, 2, control.fileno())
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of every object that is shared
    server = os.getpid()
    children: dict[int, int] = {}  # pidfd -> pid
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == control.fileno():
                data, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 2)
                if not data:
                    os._exit(0)
                if reason := why_not():
                    control.send(json.dumps({"refused": reason}).encode())
                elif pid := os.fork():
                    children[pidfd := os.pidfd_open(pid)] = pid
                    poll.register(pidfd, select.POLLIN)
                    socket.send_fds(control, [json.dumps({"pid": pid}).encode()], [pidfd])
                else:
                    become(Request.decode(data), *descriptors, server=server)
                for descriptor in descriptors:
                    os.close(descriptor)
            else:
                _, status = os.waitpid(children[ready], 0)
                poll.unregister(ready)
                os.close(ready)
                ended = {"ended": children.pop(ready), "code": os.waitstatus_to_exitcode(status)}
                try:
                    control.send(json.dumps(ended).encode())
                except OSError:
                    os._exit(0)


def become(request: Request, stdout: int, stderr: int, *, server: int) -> NoReturn:
    """What `python -m module arguments` is, in a process that was forked a moment ago. server: who forked it, which may
    be gone by now."""
    code = 1
    try:
        if request.session:
            os.setsid()
        _take_over(stdout, stderr)
        if request.dies_with:
            die_with_parent(server)
        os.chdir(request.directory)
        os.environ.clear()
        os.environ.update(request.environment)
        _default_signals()
        _open_streams(unbuffered=bool(request.environment.get("PYTHONUNBUFFERED")))
        main = importlib.import_module(request.module)
        sys.argv = [main.__file__ or request.module, *request.arguments]
        _name_process(request.arguments)
        code = exit_code(main.main)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _take_over(stdout: int, stderr: int) -> None:
    """Descriptors 0, 1 and 2, and no other; none is closed that has just been put there."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, number in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(descriptor, number)
    close_all_but(0, 1, 2)


def close_all_but(*kept: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the one of the listing
                os.close(int(name))


def _default_signals() -> None:
    """As an interpreter finds them that somebody starts; what is ignored stays so, as it does there, but for SIGINT."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _open_streams(*, unbuffered: bool) -> None:
    """Fresh ones: a buffer of the server's would be written once by each child."""

    def text(number: int, mode: str, *, errors: str, line: bool) -> io.TextIOWrapper:
        raw = open(number, mode, buffering=0 if unbuffered and "w" in mode else -1, closefd=False)  # noqa: SIM115
        return io.TextIOWrapper(raw, errors=errors, line_buffering=line, write_through=unbuffered)  # pyright: ignore[reportArgumentType]

    encoded = "surrogateescape" if sys.flags.utf8_mode else "strict"
    sys.stdin = sys.__stdin__ = text(0, "rb", errors=encoded, line=False)
    sys.stdout = sys.__stdout__ = text(1, "wb", errors=encoded, line=os.isatty(1))
    sys.stderr = sys.__stderr__ = text(2, "wb", errors="backslashreplace", line=True)
    if faulthandler.is_enabled():
        faulthandler.enable()


def _name_process(arguments: list[str]) -> None:
    """What `ps` and `top` call it, for it has the command line of the process that it was forked from."""
    words = [*arguments[:1], *(arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word == "--stage")]
    with contextlib.suppress(OSError):
        name = "-".join(["thinpipe", *words])[:15]
        with open("/proc/self/comm", "w") as comm:
            comm.write(name)


def main() -> NoReturn:
    """`python -m thinpipe.sim.launch.forked FD MODULE...`: import the modules, then serve the socket."""
    descriptor, *modules = sys.argv[1:]
    for name in modules:
        importlib.import_module(name)
    serve(socket.socket(fileno=int(descriptor)))


if __name__ == "__main__":
    main()
