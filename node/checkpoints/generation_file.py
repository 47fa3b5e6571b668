"""The newest generation that a stage was in, in a file beside its checkpoints, for the processes after it.

Checkpoints say in which generation they were written, and that is not enough: two losses may follow one another before
the next checkpoint, and then all machines may lose power. Those that start again would count on from the checkpoints
and give a generation's number to other members. A process of the first generation of that number, which was only
paused, would then be in a later one than they, and be taken for a member.
"""

from __future__ import annotations

from .manifest import CheckpointError
from .number_file import NumberFile

GENERATION = NumberFile(name="generation", says="names no generation", error=CheckpointError)
