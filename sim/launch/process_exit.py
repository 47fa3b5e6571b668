"""End a process as an interpreter does, without taking half a million imported objects apart first.

Once `main` has returned, an interpreter waits for its threads, calls what was registered for the exit and writes its
buffers; then it clears every module, which takes a second where torch and transformers are imported, and does nothing
for anybody: the system takes the memory back at once. `exit_code` does the former, and `end_with` leaves there.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

THREADS_S = 60.0  # one that hangs, in a device or a disk, would keep a process that has failed from being replaced


def end_with(main: Callable[[], object]) -> NoReturn:
    """Run it as all that this process does. Never returns."""
    code = 1
    try:
        code = exit_code(main)
    finally:
        os._exit(code)


def exit_code(main: Callable[[], object], *, threads_s: float = THREADS_S) -> int:
    """Run it; wait for its threads, for `threads_s` seconds at most, call what was registered for the exit, and write
    what is still in buffers. The exit code that an interpreter would have had."""
    code, interrupted = 0, False
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            code = (end.code or 0) & 0xFF
        else:
            print(end.code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exc()
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    if _threads_end(threads_s):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if interrupted:  # as an interpreter does that nobody caught it in
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code


def _threads_end(most_s: float) -> bool:
    """Whether all do within so many seconds that an interpreter would wait for."""
    until_s = time.monotonic() + most_s
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, until_s - time.monotonic()))
            if thread.is_alive():
                return False
    return True
