"""Directories of keys: an authority's, from which a run's certificates are issued, and a node's, with which it serves.

    keys/    authority.key  authority.crt                  made once a run; stays where it is, no node needs it
    node-a/  node.key  node.crt  authority.crt             goes to the machine, by whatever way files go there

A private key is created with mode 0600 (its directory with 0700) and never passes through a wider one; one that others
can read is refused when a node starts, as ssh does. Its group may read it if the owner is root or this user, and nobody
else can change it: secrets are mounted like that into containers, where the group is the node's own. Nothing is
overwritten, or the key of a running run could be lost. `load` finds every fault of a node's directory, before minutes
go into building a stage.

Why the key is made here and copied, instead of a request that the node makes and the authority signs: it is one more
file to protect on the way, but three commands fewer on each machine. For the other way use openssl; the files are plain
PEM.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from ...protocol.grid_place import LANES_MAX, GridPlace
from . import certificates
from .certificates import PLACES_MAX, CertificateError, CertificateIdentity, Flaw, judge, spell_moment, spell_numbers

AUTHORITY_KEY, AUTHORITY, NODE_KEY, NODE = "authority.key", "authority.crt", "node.key", "node.crt"
FILE_BYTES_MAX = 256 * 1024
DAYS_MAX = 36_500
STAGE_MAX, LANE_MAX = 1023, LANES_MAX - 1  # as in pipeline.stages and lanes.count


class KeysError(ValueError):
    """Keys that cannot be made or used; one line with the file, what is wrong with it, and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """A node's, as read. certificate_pem, authority_pem, key_pem: what TLS libraries take."""

    directory: Path
    said: CertificateIdentity
    certificate: x509.Certificate
    authority: x509.Certificate
    certificate_pem: bytes
    authority_pem: bytes
    key_pem: bytes

    def name(self, place: GridPlace | None) -> str:
        """What a node at that place of this run has to be called; None: any node of it."""
        run = self.said.run
        return certificates.run_name(run) if place is None else certificates.place_name(run, place)


def parse_stages(text: str) -> list[int]:
    """`0-3,5` -> 0, 1, 2, 3, 5. Raises KeysError."""
    stages = _numbers("stages", text, STAGE_MAX)
    if len(stages) > PLACES_MAX:
        raise KeysError(f"--stages: {len(stages)} stages; a certificate names {PLACES_MAX} at most, so issue several")
    return stages


def parse_lanes(text: str | None) -> list[int]:
    """The same of lanes; None: none, which stands for all. Raises KeysError."""
    return [] if text is None else _numbers("lanes", text, LANE_MAX)


def _numbers(what: str, text: str, most: int) -> list[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last if dash else first)
        if not all(number.isascii() and number.isdecimal() and int(number) <= most for number in numbers):
            raise KeysError(f"--{what}: '{text}' is not {what} from 0 to {most}, such as 3 or 0-3 or 0,2,4-6")
        if int(numbers[1]) < int(numbers[0]):
            raise KeysError(f"--{what}: '{part.strip()}' runs backwards; say {numbers[1]}-{numbers[0]}")
        found |= set(range(int(numbers[0]), int(numbers[1]) + 1))
    return sorted(found)


# -- made -----------------------------------------------------------------------------------------------------------


def init(run: str, out: Path, *, days: int, now: datetime) -> CertificateIdentity:
    """Make the authority of `run` in `out`. Raises KeysError."""
    _check_days(days)
    key = certificates.new_key()
    certificate = certificates.make_authority(run, key, now=now, days=days)
    _write(out, {AUTHORITY_KEY: _private(key), AUTHORITY: certificates.pem(certificate)})
    return certificates.read(certificate)


def issue(
    stages: list[int], authority: Path, out: Path, *, lanes: Sequence[int] = (), days: int, now: datetime
) -> CertificateIdentity:
    """Make a key and a certificate for these stages, in these lanes (none: in all), in `out`. Raises KeysError."""
    _check_days(days)
    if (places := len(stages) * len(lanes)) > PLACES_MAX:
        raise KeysError(
            f"{len(stages)} stages of {len(lanes)} lanes are {places} places; a certificate names {PLACES_MAX} at "
            "most: issue several, or omit --lanes for one that is good in all lanes"
        )
    issuer, _ = _certificate(authority, AUTHORITY, "make one with thinpipe keys init, or name its directory")
    said = _said(authority / AUTHORITY, issuer)
    issuer_key, _ = _key(authority / AUTHORITY_KEY, issuer, "certificates are issued where the authority was made")
    if not said.authority:
        raise KeysError(f"{authority / AUTHORITY} is not an authority's certificate; name the directory of keys init")
    left = (said.ends - now + timedelta(seconds=1)).days  # certificates have whole seconds
    if left < 1:
        raise KeysError(f"the authority in {authority} ends on {spell_moment(said.ends)}; make another: keys init")
    if days > left:
        raise KeysError(
            f"--days {days}: the authority in {authority} itself ends on {spell_moment(said.ends)}; "
            f"say --days {left} or fewer, or make another authority with keys init"
        )
    key = certificates.new_key()
    made = certificates.make_certificate(stages, key.public_key(), issuer, issuer_key, lanes=lanes, now=now, days=days)
    _write(out, {NODE_KEY: _private(key), NODE: certificates.pem(made), AUTHORITY: certificates.pem(issuer)})
    return certificates.read(made)


def _check_days(days: int) -> None:
    if not 1 <= days <= DAYS_MAX:
        raise KeysError(f"--days {days} is not between 1 and {DAYS_MAX}")


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(out: Path, files: dict[str, bytes]) -> None:
    """All of them or none, and none that is there already."""
    written: list[Path] = []
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in files.items():
            path = out / name
            mode = 0o600 if name.endswith(".key") else 0o644
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError) and out.is_dir():
            there = next((out / name for name in files if (out / name).exists()), out)
            raise KeysError(f"{there} is there already and is not overwritten; choose another --out") from None
        raise KeysError(f"cannot write keys in {out}: {error.strerror}; choose another --out") from None


# -- read and checked -----------------------------------------------------------------------------------------------


def issue_command(place: GridPlace | None) -> str:
    """Which makes keys for that place, in whatever other lanes too."""
    return f"thinpipe keys issue --stages {place.stage}" if place else "thinpipe keys issue"


_ISSUE = "issue one with thinpipe keys issue"
_REMEDIES = {
    Flaw.UNREADABLE: _ISSUE,
    Flaw.AUTHORITY: "node.crt and authority.crt have to come from one keys issue",
    Flaw.RUN: "issue one with the authority of this run",
    Flaw.EXPIRED: "issue a new one, into a new directory: thinpipe keys issue",
    Flaw.EARLY: "is this machine's clock right?",
}


def load(directory: Path, *, now: datetime, run: str | None = None, places: Sequence[GridPlace] = ()) -> Keys:
    """A node's keys, if they are good for all of `places` of `run` now (none: for any). Raises KeysError."""
    path = directory / NODE
    if (directory / AUTHORITY_KEY).exists() and not path.exists():
        raise KeysError(
            f"{directory} holds the authority's key, which no node needs; issue a node's directory from it: "
            f"thinpipe keys issue --authority {directory} --stages 0-3 --out node-a"
        )
    certificate, certificate_pem = _certificate(directory, NODE, _ISSUE)
    authority, authority_pem = _certificate(directory, AUTHORITY, _REMEDIES[Flaw.AUTHORITY])
    if not (issuer := _said(directory / AUTHORITY, authority)).authority:
        raise KeysError(f"{directory / AUTHORITY} is not an authority's certificate; {_REMEDIES[Flaw.AUTHORITY]}")
    _, key_pem = _key(directory / NODE_KEY, certificate, _ISSUE)
    for place in places or [None]:
        flaw = judge(certificate, authority, run=issuer.run if run is None else run, place=place, now=now)
        if flaw:
            remedy = _REMEDIES.get(flaw[0]) or f"issue one that names it: {issue_command(place)} …"
            raise KeysError(f"{path}: the certificate {flaw[1]}; {remedy}")
    return Keys(
        directory=directory,
        said=_said(path, certificate),
        certificate=certificate,
        authority=authority,
        certificate_pem=certificate_pem,
        authority_pem=authority_pem,
        key_pem=key_pem,
    )


def describe(directory: Path, *, now: datetime) -> dict[str, Any]:
    """What is in a directory of keys, a node's or an authority's; `problem` is why no node would take it, or None.
    Raises KeysError where nothing can be said."""
    name = NODE if (directory / NODE).exists() or not (directory / AUTHORITY).exists() else AUTHORITY
    certificate, _ = _certificate(directory, name, "thinpipe keys init and keys issue make some")
    said, problem = _said(directory / name, certificate), None
    try:
        if name == NODE:
            load(directory, now=now)
        else:
            if now >= said.ends:
                raise KeysError(f"the authority ended on {spell_moment(said.ends)}; make another: thinpipe keys init")
            _key(directory / AUTHORITY_KEY, certificate, "without it nothing can be issued here")
    except KeysError as error:
        problem = str(error)
    return {
        "directory": str(directory),
        "kind": "node" if name == NODE else "authority",
        "run": said.run,
        "stages": spell_numbers(said.stages) if name == NODE else None,
        "lanes": (spell_numbers(said.lanes) or "all") if name == NODE else None,
        "begins": said.begins.isoformat(),
        "ends": said.ends.isoformat(),
        "days_left": round((said.ends - now).total_seconds() / 86400, 1),
        "sha256": certificate.fingerprint(SHA256()).hex(),
        "names": sorted(said.names),
        "problem": problem,
    }


def _certificate(directory: Path, name: str, remedy: str) -> tuple[x509.Certificate, bytes]:
    content = _content(directory / name, remedy)
    try:
        return certificates.parse(content), content
    except CertificateError as error:
        raise KeysError(f"{directory / name}: {error}; {remedy}") from None


def _said(path: Path, certificate: x509.Certificate) -> CertificateIdentity:
    try:
        return certificates.read(certificate)
    except CertificateError as error:
        raise KeysError(f"{path}: {error}; {_ISSUE}") from None


def _key(path: Path, certificate: x509.Certificate, remedy: str) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """The private key of that certificate, and as it is written. Raises KeysError, also where others may read it."""
    content = _content(path, remedy)
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o037:
        raise KeysError(f"{path} can be read or written by others (mode {mode:04o}); say: chmod 600 {path}")
    if mode & 0o040 and status.st_uid not in (0, os.geteuid()):
        raise KeysError(
            f"{path} can be read by its group (mode {mode:04o}) and belongs to another user (uid {status.st_uid}); "
            "make root or this user its owner, or say: chmod 600"
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeysError(f"{path} is no private key in PEM without a password; {remedy}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeysError(f"{path} is not a key on an elliptic curve; {_ISSUE}")
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise KeysError(f"{path} is not the key of the certificate beside it; take both from one keys issue")
    return key, content


def _content(path: Path, remedy: str) -> bytes:
    if not path.parent.is_dir():
        raise KeysError(f"{path.parent} is no directory of keys: there is none; {remedy}")
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise KeysError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise KeysError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise KeysError(f"{path} has more than {FILE_BYTES_MAX} bytes, so it is not what belongs there; {remedy}")
    return content


def clock() -> datetime:
    return datetime.now(UTC)
