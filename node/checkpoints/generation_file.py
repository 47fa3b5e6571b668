"""The newest generation that a stage was in, FILE beside its checkpoints, for the processes after it.

Checkpoints say in which generation they were written, and that is not enough: two losses may follow one another before
the next checkpoint, and then all machines may lose power. Those that start again would count on from the checkpoints
and give a generation's number to other members. A process of the first generation of that number, which was only
paused, would then be in a later one than they, and be taken for a member.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...protocol.control_messages import STEP_MAX
from .durable_files import make, sync_directory
from .manifest import CheckpointError

FILE = "generation"


def write_generation(directory: Path, generation: int) -> None:
    """directory: of the stage's checkpoints. Raises CheckpointError."""
    path = directory / FILE
    temporary = path.with_name(f".{FILE}.tmp")
    try:
        make(directory)
        with temporary.open("w") as file:
            file.write(f"{generation}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(directory)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; make room there") from None


def read_generation(directory: Path) -> int:
    """What an earlier process wrote; 0 if none has. Raises CheckpointError for a file that says something else."""
    path = directory / FILE
    try:
        generation = int(path.read_text())
        if not 0 <= generation < STEP_MAX:
            raise ValueError(f"generation {generation}")
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} names no generation ({error}); delete it") from None
    return generation
