"""End with the process that started this one, even if that is killed and can tell nobody.

Linux sends a signal when the parent is gone (PR_SET_PDEATHSIG), here SIGKILL, whatever this process does meanwhile. Why
not look at the parent's id now and then, as a node does: a process that computes on its only thread has nobody to look,
and one that still imports has not begun to. Strictly, the kernel speaks of the *thread* that started this one: it has
to outlive what it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Where the kernel can: be killed when the process that started this one is gone. parent: which one that was; if it
    is gone by now, this process ends here, with exit code 1."""
    with contextlib.suppress(AttributeError, OSError):  # no Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
