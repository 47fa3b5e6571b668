"""Why a TLS handshake failed: found out with Python's ssl, because gRPC tells neither side.

A gRPC channel to a peer whose certificate has expired, to one that speaks no TLS and to one that accepts no connection
all look the same: not ready. So when an attempt has failed, this connects once more, by itself, without judging what
the peer shows until it has been read, and judges it then by the run's own rules (`certificates.judge`). What it finds
is reported and nothing else: no frame ever passes over this connection.

A gRPC server that refuses a client's certificate closes the connection and sends no alert. In TLS 1.3 the
client's handshake is over by then, so the sign is an end where the server's first HTTP/2 frame should be. A server
that is going down looks the same; hence that verdict, like any that is no more than a closed connection, has to be
reached twice.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from ...protocol.grid_place import GridPlace
from ..addresses import split_address
from .certificates import CertificateError, Flaw, judge, parse, spell_moment
from .key_directory import NODE, NODE_KEY, Keys

DEADLINE_S = 5.0
AGAIN_S = 0.3
# What every HTTP/2 client begins with: the preface and an empty SETTINGS frame (RFC 9113, 3.4).
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL"}  # OpenSSL's words for it

_REMEDIES = {
    Flaw.UNREADABLE: "start it with keys of this run",
    Flaw.AUTHORITY: "start both with keys from one authority (thinpipe keys issue)",
    Flaw.RUN: "start it with keys of this run, or dial the right address",
    Flaw.EXPIRED: "issue it a new one (thinpipe keys issue) and start it again with that",
    Flaw.EARLY: "are the clocks of both machines right?",
    Flaw.PLACE: "start it with keys of its place, or dial the right address",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why there is no connection. sure: by what the peer showed, and not only by its silence."""

    line: str
    sure: bool = True


async def diagnose(
    address: str,
    keys: Keys | None,
    place: GridPlace | None,
    clock: Callable[[], datetime],
    *,
    deadline_s: float = DEADLINE_S,
) -> str | None:
    """One line on why the peer at `address` (host:port) and this node cannot agree on TLS; None if nothing definite is
    to be seen there (nobody listens, it is silent, or it would take the connection now).

    keys: None for a node that speaks no TLS, which only asks whether the peer does. place: whose certificate the peer
    should have; None: that of any in the run. deadline_s: for each of two looks, at most.
    """
    if keys and (flaw := judge(keys.certificate, keys.authority, run=keys.said.run, place=None, now=clock())):
        return f"{keys.directory / NODE}: this node's own certificate {flaw[1]}; issue a new one and start it with that"
    first = await _look(address, keys, place, clock, deadline_s)
    if first is None or first.sure:
        return first and first.line
    await asyncio.sleep(AGAIN_S)
    again = await _look(address, keys, place, clock, deadline_s)
    return first.line if again == first else None


async def _look(
    address: str, keys: Keys | None, place: GridPlace | None, clock: Callable[[], datetime], deadline_s: float
) -> Verdict | None:
    host, port = split_address(address)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(deadline_s):
            context = _context(keys)
            wanted = host if keys is None else keys.name(place)
            reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=wanted)
            shown: ssl.SSLObject = writer.get_extra_info("ssl_object")
            if keys is None:
                return Verdict(_SPEAKS_TLS.format(address))
            if verdict := _judged(address, shown, keys, place, clock()):
                return verdict
            writer.write(PREFACE)
            return None if await reader.read(1) else Verdict(_refused(address, keys, "it closed the connection"), False)
    except TimeoutError:
        return None
    except ssl.SSLError as error:
        return _failed(address, keys, error)
    except ConnectionResetError:  # of whom nobody listens at, connecting itself fails: that is another error
        if keys is None:
            return None
        return Verdict(_refused(address, keys, "it closed the connection in the handshake"), False)
    except (OSError, UnicodeError):  # UnicodeError: a name that is none, such as a..b
        return None
    finally:
        if writer:
            writer.transport.abort()


_SPEAKS_TLS = (
    "the node at {} speaks TLS and this one does not; start this one with --keys DIR, or neither (--insecure, in a "
    "private network)"
)


def _context(keys: Keys | None) -> ssl.SSLContext:
    """Takes any certificate, so that it can be read. Raises OSError if this node's own files are gone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if keys:
        context.load_cert_chain(keys.directory / NODE, keys.directory / NODE_KEY)
    return context


def _judged(address: str, shown: ssl.SSLObject, keys: Keys, place: GridPlace | None, now: datetime) -> Verdict | None:
    try:
        certificate = parse(shown.getpeercert(binary_form=True) or b"")
    except CertificateError:
        return Verdict(f"the node at {address} shows no certificate that can be read; {_REMEDIES[Flaw.UNREADABLE]}")
    if flaw := judge(certificate, keys.authority, run=keys.said.run, place=place, now=now):
        return Verdict(f"the node at {address}: its certificate {flaw[1]}; {_REMEDIES[flaw[0]]}")
    if shown.selected_alpn_protocol() != "h2":
        return Verdict(f"what answers at {address} speaks TLS but not HTTP/2, so it is no node; check the address")
    return None


def _refused(address: str, keys: Keys, how: str) -> str:
    said = keys.said
    return (
        f"the node at {address} does not take this node's certificate, for {said}, valid from "
        f"{spell_moment(said.begins)} to {spell_moment(said.ends)} ({how}); is the clock there right, and are its keys "
        "from the same authority?"
    )


def _failed(address: str, keys: Keys | None, error: ssl.SSLError) -> Verdict | None:
    reason = error.reason or ""
    if "ALERT" in reason:  # such as TLSV1_ALERT_UNKNOWN_CA
        alert = reason.partition("ALERT_")[2].lower().replace("_", " ")
        return Verdict(_SPEAKS_TLS.format(address) if keys is None else _refused(address, keys, f"alert: {alert}"))
    if keys is None:
        return None
    if reason in NO_TLS:
        return Verdict(
            f"the node at {address} speaks no TLS and this one does; start it with --keys DIR, or both with --insecure"
        )
    return Verdict(f"the TLS handshake with {address} failed ({reason or error}); is it a node of this run?", False)
