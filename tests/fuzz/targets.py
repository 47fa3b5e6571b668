"""All targets by name."""

from __future__ import annotations

from .copying import COPYING
from .discovery import DISCOVERY
from .disk import DISK
from .judge import Target
from .payloads import PAYLOADS
from .probing import PROBING
from .wire import WIRE

TARGETS: dict[str, Target] = {
    target.name: target for target in [*WIRE, *PAYLOADS, *DISK, *COPYING, *DISCOVERY, *PROBING]
}
