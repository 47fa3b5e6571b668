"""What a node has promised never to ask other lanes for, FILE beside its contributions, for the processes after it.

Peers drop what nobody will ask for, so the promise must outlive the process that made it. It cannot be found again from
the checkpoints that lie here: an old one may have been kept for another lane that takes it up, or be from before this
lane took up another one's state. A process that asked for the rounds after such a one would wait for what is gone.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...protocol.control_messages import STEP_MAX
from .contribution_store import ContributionError

FILE = "forgot"


def write_promise(directory: Path, before: int) -> None:
    """No round before that one will be asked for. Raises ContributionError."""
    path = directory / FILE
    temporary = path.with_name(f".{FILE}.tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            file.write(f"{before}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ContributionError(f"{path} cannot be written: {error.strerror}; make room there") from None


def read_promise(directory: Path) -> int:
    """What an earlier process wrote; 0 if none has. Raises ContributionError for a file that says something else."""
    path = directory / FILE
    try:
        before = int(path.read_text())
        if not 0 <= before < STEP_MAX:
            raise ValueError(f"round {before}")
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise ContributionError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ContributionError(f"{path} says no round from which on this node asks ({error}); delete it") from None
    return before
