"""One number on a disk, for the processes after this one: whole or not there, whatever the moment of a crash.

Why not in a checkpoint: these are numbers that change without one, and that a step back to an older one must not take
back (`generation_file`, `node.lanes.promise_file`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...protocol.control_messages import STEP_MAX
from .durable_files import make, sync_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFile:
    """name: of the file, in whatever directory. says: what is wrong with one that holds no such number, after its path.
    error: what is raised, with one line for people."""

    name: str
    says: str
    error: type[Exception]

    def write(self, directory: Path, number: int) -> None:
        """Raises `error`."""
        path = directory / self.name
        temporary = path.with_name(f".{self.name}.tmp")
        try:
            make(directory)
            with temporary.open("w") as file:
                file.write(f"{number}\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(directory)
        except OSError as error:
            raise self.error(f"{path} cannot be written: {error.strerror}; make room there") from None

    def read(self, directory: Path) -> int:
        """What an earlier process wrote; 0 if none has. Raises `error` for a file that says something else."""
        path = directory / self.name
        try:
            number = int(path.read_text())
            if not 0 <= number < STEP_MAX:
                raise ValueError(f"it says {number}")
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self.error(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise self.error(f"{path} {self.says} ({error}); delete it") from None
        return number
