"""The errors of the protocol: their type says who is at fault, the peer (RemoteProtocolError) or this node's own code
(LocalProtocolError).

A remote fault closes that one connection, with a code that both ends print; it never ends the process. The codes are
a closed vocabulary so that tests, metrics and people can tell faults apart without reading prose.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Why a connection was refused or closed."""

    MALFORMED = "malformed-frame"
    OVERSIZED = "oversized"
    OUT_OF_ORDER = "out-of-order"
    UNEXPECTED = "unexpected-frame"
    CORRUPT = "corrupt-chunk"
    OVERDRAWN = "over-credit"
    PROTOCOL_VERSION = "protocol-version"
    RUN_ID = "run-id"
    CONFIGURATION = "configuration"
    STAGE = "wrong-stage"
    LANE = "wrong-lane"
    CERTIFICATE = "wrong-certificate"
    GENERATION = "wrong-generation"
    FENCED = "replaced"
    STOPPED = "between-generations"
    INCARNATION = "restarted"
    RESUME = "cannot-resume"
    TIMEOUT = "timeout"
    PAYLOAD = "bad-payload"


class ProtocolError(Exception):
    """A rule of the conversation was broken. `fault` names it, `str(error)` says what, by whom and what to do."""

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(f"{fault}: {reason}")
        self.fault = fault
        self.reason = reason


class RemoteProtocolError(ProtocolError):
    """The peer broke a rule: close the connection, tell it why, go on living."""


class LocalProtocolError(ProtocolError):
    """This node's own code broke a rule: a bug here."""


class RefusedError(ProtocolError):
    """The peer closed the connection and said why."""

    def __init__(self, code: str, reason: str) -> None:
        known = next((fault for fault in Fault if fault == code), Fault.MALFORMED)
        super().__init__(known, reason if known == code else f"unknown code '{code}': {reason}")
        self.code = code
