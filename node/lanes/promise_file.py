"""What a node has promised never to ask other lanes for: a file beside its contributions, for the processes after it.

Peers drop what nobody will ask for, so the promise must outlive the process that made it. It cannot be found again from
the checkpoints that lie here: an old one may have been kept for another lane that takes it up, or be from before this
lane took up another one's state. A process that asked for the rounds after such a one would wait for what is gone.
"""

from __future__ import annotations

from ..checkpoints.number_file import NumberFile
from .contribution_store import ContributionError

PROMISE = NumberFile(name="forgot", says="says no round from which on this node asks", error=ContributionError)
