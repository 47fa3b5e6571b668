"""What a refusal must leave alone in a link session: all that outlives a connection, byte for byte.

Named by what is left out, so that whatever a session comes to hold beside this is compared too.
"""

from __future__ import annotations

from typing import Any

from thinpipe.protocol.session import LinkSession


def transfer_state(of: LinkSession) -> dict[str, Any]:
    names = set(vars(of)) - {"state", "_assembly", "_kept"}
    inner = vars(of._assembly)
    return {
        **{name: getattr(of, name) for name in names},
        "kept": list(of._retransmission_buffer),
        "assembly": {name: bytes(value) if name == "_buffer" else value for name, value in inner.items()},
    }
