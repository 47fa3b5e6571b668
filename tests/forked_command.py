"""A command for `test_fork_server.py`: does what its arguments say."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "exit":
        sys.exit(int(rest[0]))
    elif what == "words":
        sys.exit("last words")
    elif what == "raise":
        raise ValueError("a bug")
    elif what == "thread":  # an interpreter waits for it
        threading.Thread(target=lambda: (time.sleep(0.2), print("the thread is through"))).start()
    elif what == "wait":
        print("waits", flush=True)
        signal.pause()
    elif what == "tell":
        descriptors = map(int, os.listdir("/proc/self/fd"))
        told = {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "session": os.getsid(0),
            "directory": os.getcwd(),
            "variable": os.environ.get("A_VARIABLE"),
            "inherited": os.environ.get("OF_THE_SERVER"),
            "arguments": rest,
            "input": sys.stdin.read(),
            "descriptors": [each for each in descriptors if Path(f"/proc/self/fd/{each}").exists()],
            "threads": len(os.listdir("/proc/self/task")),
            "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
            "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        }
        print(json.dumps(told))
        print("an error", file=sys.stderr)
