"""Which peers may talk to this node: mutual TLS with the run's own authority, or unencrypted connections.

One object carries this policy to everything that listens or dials. Both ends show a certificate of the run's authority:

- A node that dials stage 3 of lane 0 has TLS look for the name of that place in the server's certificate, so a server
  of another stage, lane, run or authority fails in the handshake, before a byte of the run.
- A node that listens has TLS ask for a certificate of the authority, and then compares the greeting: its run, stage and
  lane must be among the certificate's names, or the peer is refused by name (`wrong-certificate`).

Unencrypted connections are for loopback. Connections to other machines need keys, unless somebody says `--insecure`: a
default that is secure only if one remembers it would not be secure. That holds for addresses that are typed (`choose`)
and for those that are learnt from the DHT (`may_dial`). Why not leave it to a VPN: a VPN keeps strangers out, but lets
any machine in it take any stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from ...protocol.errors import Fault, RemoteProtocolError
from ...protocol.grid_place import GridPlace
from ...protocol.messages import Greeting, Limits, decode_frame
from ..addresses import is_loopback
from .certificates import CertificateError, CertificateIdentity, parse, read, run_name, spell_moment
from .handshake_diagnosis import diagnose
from .key_directory import Keys, KeysError, clock, issue_command, load

LIMITS = Limits(message_bytes=1)  # of a greeting
ENDS_SOON = timedelta(days=3)


class CallContext(Protocol):
    """What is needed of a `grpc.aio.ServicerContext`."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]: ...


@dataclass(frozen=True, slots=True)
class Security:
    """keys: None for plain text. insecure: whether plain text may leave the machine."""

    keys: Keys | None = None
    insecure: bool = False
    clock: Callable[[], datetime] = clock

    @property
    def warning(self) -> str | None:
        """What should be known before a run of days begins."""
        if self.keys is None or self.keys.said.ends - self.clock() > ENDS_SOON:
            return None
        ends = spell_moment(self.keys.said.ends)
        return f"the certificate in {self.keys.directory} ends on {ends}; open connections stay, new ones will fail"

    # -- who dials ---------------------------------------------------------------------------------------------------

    def may_dial(self, address: str) -> bool:
        """Whether it may be talked to as this node talks. Raises ListenError for what is no host:port."""
        return self.keys is not None or self.insecure or is_loopback(address)

    def channel(
        self, address: str, place: GridPlace | None, options: Sequence[tuple[str, int | str]]
    ) -> grpc.aio.Channel:
        """To the node at that place; None: to any of the run. Whether that may be, who learnt the address has asked."""
        if self.keys is None:
            return grpc.aio.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials(
            self.keys.authority_pem, self.keys.key_pem, self.keys.certificate_pem
        )
        options = [*options, ("grpc.ssl_target_name_override", self.keys.name(place))]
        return grpc.aio.secure_channel(address, credentials, options=options)

    async def fault(self, address: str, place: GridPlace | None) -> str | None:
        """One line on why there is no connection, if TLS is why; see `handshake.diagnose`."""
        return await diagnose(address, self.keys, place, self.clock)

    # -- who listens -------------------------------------------------------------------------------------------------

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """As `add_insecure_port`: the port, or 0 or RuntimeError."""
        if self.keys is None:
            return server.add_insecure_port(address)
        pairs = [(self.keys.key_pem, self.keys.certificate_pem)]
        credentials = grpc.ssl_server_credentials(pairs, self.keys.authority_pem, require_client_auth=True)
        return server.add_secure_port(address, credentials)

    def admit(self, context: CallContext, frame: bytes, place_of: Callable[[int], GridPlace] | None = None) -> None:
        """Hold a neighbour's first frame to its certificate. place_of: where the stage is that it says to be; None: it
        says its lane too. Raises RemoteProtocolError."""
        if self.keys is None:
            return
        said = self._peer(context)
        greeting = decode_frame(frame, LIMITS)
        if not isinstance(greeting, Greeting):
            return  # and refused for that, by whoever reads it
        place = place_of(greeting.stage) if place_of else GridPlace(greeting.stage, greeting.lane)
        if not said.serves(greeting.run_id, place):
            raise RemoteProtocolError(
                Fault.CERTIFICATE,
                f"the greeting says {said.asked(place)} of run '{greeting.run_id}', the certificate is for {said}; "
                f"start that node with keys of its place: {issue_command(place)}",
            )

    def admit_any(self, context: CallContext) -> None:
        """Hold a peer that claims no stage to the run. Raises RemoteProtocolError."""
        if self.keys is not None:
            self._peer(context)

    def _peer(self, context: CallContext) -> CertificateIdentity:
        assert self.keys
        run = self.keys.said.run
        try:
            said = read(parse(b"".join(context.auth_context().get("x509_pem_cert", ()))))
        except CertificateError as error:
            raise RemoteProtocolError(Fault.CERTIFICATE, f"the peer's certificate: {error}") from None
        if run_name(run) not in said.names:
            raise RemoteProtocolError(
                Fault.CERTIFICATE,
                f"the certificate is for {said}, this is run '{run}'; start that node with keys of this run",
            )
        return said


PLAIN = Security()


def choose(
    keys: Path | None,
    *,
    insecure: bool,
    listen: str | None = None,
    dial: str | None = None,
    dial_option: str = "--next",
    run: str | None = None,
    places: Sequence[GridPlace] = (),
    now: datetime | None = None,
) -> Security:
    """What --keys and --insecure come to. Raises KeysError: for keys that are no good for these places of this run, and
    for an address that others reach where neither was said; ListenError for what is no address."""
    if keys is not None:
        if insecure:
            raise KeysError("--keys and --insecure contradict each other; omit one")
        return Security(load(keys, now=now or clock(), run=run, places=places))
    for option, address in (("--listen", listen), (dial_option, dial)):
        if address and not insecure and not is_loopback(address):
            raise KeysError(
                f"{option} {address} connects to other machines, so it needs --keys DIR (thinpipe keys issue makes "
                "one); or say --insecure, which lets anyone who can reach it read and change the run"
            )
    return Security(insecure=insecure)
