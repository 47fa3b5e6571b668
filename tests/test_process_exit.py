"""A process that ends without being taken apart does all that an interpreter does for others before that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading
from thinpipe.sim.launch.process_exit import end_with

def main():
    atexit.register(print, "registered", end="")
    first = threading.Event()

    def work():
        first.wait()
        print("thread", end=" ")

    threading.Thread(target=work).start()
    print("main", end=" ")
    first.set()
    {last}

end_with(main)
print("never")
"""


@pytest.mark.parametrize(
    ("last", "code", "error"),
    [
        ("return", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('one line')", 1, "one line\n"),
        ("raise ValueError('why')", 1, "ValueError: why\n"),
    ],
)
def test_threads_exit_functions_and_buffers_come_first(last: str, code: int, error: str) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    script = SCRIPT.replace("{last}", last)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=buffered)
    assert ended.returncode == code
    assert sorted(ended.stdout.split()) == ["main", "registered", "thread"]
    assert ended.stdout.endswith("registered")  # after the threads
    assert ended.stderr.endswith(error)


HANGS = """
import atexit, sys, threading
from thinpipe.sim.launch import process_exit

def main():
    atexit.register(print, "registered")
    threading.Thread(target=threading.Event().wait).start()
    sys.exit(1)

code = process_exit.exit_code(main, threads_s=0.2)
process_exit.os._exit(code)
"""


def test_a_thread_that_hangs_keeps_no_process() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "registered\n", "")
