"""The size of a message on the wire, with the headers of gRPC and HTTP/2, computed by rule.

Reports state *framed* bytes, because a codec that sends many small messages pays for headers that a count of payloads
hides. A gRPC message travels as a length-prefixed byte string (one flag byte, a 4-byte length: gRPC over HTTP/2,
"Length-Prefixed-Message"), which HTTP/2 cuts into DATA frames, each behind a 9-byte header (RFC 9113, section 4.1). A
frame holds at most SETTINGS_MAX_FRAME_SIZE bytes, initially 16384 (section 6.5.2).

Why a rule and not a reading of the socket: gRPC hides its sockets, and the rule gives every process the same number
for the same message, so that both ends of a link agree to the byte. Left out, since they belong to no single message:
the connection preface, HEADERS, SETTINGS, WINDOW_UPDATE and PING frames, TLS records, TCP and IP. A peer may also
advertise larger frames than 16384, which makes the real figure smaller by at most 9 bytes in 16384 (0.06 %).
"""

from __future__ import annotations

GRPC_PREFIX_BYTES = 5  # compressed flag (1) + message length (4): gRPC over HTTP/2
HTTP2_FRAME_HEADER_BYTES = 9  # RFC 9113, section 4.1
HTTP2_FRAME_PAYLOAD_BYTES = 16384  # RFC 9113, section 6.5.2: the initial SETTINGS_MAX_FRAME_SIZE


def framed_bytes(message_bytes: int) -> int:
    """Bytes above TCP of one gRPC message that serialises to `message_bytes` bytes (0 is a legal, empty message).

    Raises ValueError for a negative size.
    """
    if message_bytes < 0:
        raise ValueError(f"a message of {message_bytes} bytes cannot be framed; the size must be 0 or more")
    prefixed = message_bytes + GRPC_PREFIX_BYTES
    frames = -(-prefixed // HTTP2_FRAME_PAYLOAD_BYTES)
    return prefixed + frames * HTTP2_FRAME_HEADER_BYTES
