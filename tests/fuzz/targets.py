"""All targets by name."""

from __future__ import annotations

from .checkpoint_copies import COPYING
from .discovery import DISCOVERY
from .disk import DISK
from .judge import Target
from .path_probe import PROBING
from .payloads import PAYLOADS
from .rounds import ROUNDS
from .wire import WIRE

TARGETS: dict[str, Target] = {
    target.name: target for target in [*WIRE, *PAYLOADS, *DISK, *COPYING, *DISCOVERY, *PROBING, *ROUNDS]
}
