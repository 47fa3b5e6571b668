"""Certificates of a run: their content, how they are made, and how one is checked. All of X.509 that a run needs.

    authority     O = the run's name, CN = "authority"
    node          O = the run's name, CN = "stages 0-3"      (to be read by people)
                  DNS: my-run.thinpipe                        any node of the run: what a probe holds a listener to
                  DNS: *.stage-0.my-run.thinpipe, *.stage-1.  the stages that its holder may serve, in every lane
                  DNS: lane-1.stage-0.my-run.thinpipe, ...    or: in these lanes alone

The places are names, because names are what TLS itself compares: whoever dials stage 3 of lane 0 asks for
`lane-0.stage-3.my-run.thinpipe`, and a server without that name, or the wildcard for all lanes, does not get through
the handshake (RFC 9525). So a run of one lane has no other names than one of many. Why not an extension of our own:
only our own code would look at it, after the connection stands. Why an authority for each run, and not one for all:
then its certificate alone says who is in the run, and it can be thrown away with it.

Keys are P-256: what every TLS library takes, and a handshake of a millisecond. The moment is an argument, everywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...protocol.grid_place import GridPlace

DOMAIN = "thinpipe"
PLACES_MAX = (
    256  # in a certificate: each is a name of up to 91 bytes, and TLS libraries read some 100 kB of certificate
)
BACKDATED = timedelta(hours=1)  # clocks of machines differ
_LABEL = re.compile(
    r"(?!sha256-)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)  # RFC 1123, in the one case that compares as itself
_PLACE = re.compile(r"(?:\*|lane-(?P<lane>0|[1-9]\d?))\.stage-(?P<stage>0|[1-9]\d{0,3})\.(?P<run>[a-z0-9-]+\.thinpipe)")
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def run_label(run: str) -> str:
    """The run's name as a DNS label: itself where it is one, else a digest of it."""
    return run if _LABEL.fullmatch(run) else f"sha256-{hashlib.sha256(run.encode()).hexdigest()[:40]}"


def run_name(run: str) -> str:
    """The name that every certificate of the run has."""
    return f"{run_label(run)}.{DOMAIN}"


def place_name(run: str, place: GridPlace) -> str:
    """What TLS looks for in the certificate of who serves that place of that run."""
    return f"lane-{place.lane}.{_of_stage(run, place.stage)}"


def all_lanes_name(run: str, stage: int) -> str:
    """The name that stands for that stage in every lane."""
    return f"*.{_of_stage(run, stage)}"


def _of_stage(run: str, stage: int) -> str:
    return f"stage-{stage}.{run_name(run)}"


def spell_numbers(numbers: Iterable[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def spell_moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


# -- made -----------------------------------------------------------------------------------------------------------


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def make_authority(run: str, key: ec.EllipticCurvePrivateKey, *, now: datetime, days: int) -> x509.Certificate:
    """The certificate of a run's authority, signed by itself."""
    name = _subject(run, "authority")
    unsigned = _unsigned(name, name, key.public_key(), now, now + timedelta(days=days))
    usage = _usage(key_cert_sign=True, crl_sign=True)
    return (
        unsigned.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, SHA256())
    )


def make_certificate(
    stages: Iterable[int],
    key: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    *,
    lanes: Iterable[int] = (),
    now: datetime,
    days: int,
) -> x509.Certificate:
    """A node's certificate for these stages of the authority's run, in these lanes (none: in all)."""
    run, stages, lanes = read(authority).run, sorted(set(stages)), sorted(set(lanes))
    subject = _subject(run, _short(stages, lanes))
    unsigned = _unsigned(subject, authority.subject, key, now, now + timedelta(days=days))
    names = [run_name(run)]
    for stage in stages:
        names += [place_name(run, GridPlace(stage, lane)) for lane in lanes] or [all_lanes_name(run, stage)]
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    both_ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        unsigned.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(both_ends, critical=False)
        .add_extension(x509.SubjectAlternativeName(list(map(x509.DNSName, names))), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority_key, SHA256())
    )


def _short(stages: Sequence[int], lanes: Sequence[int]) -> str:
    """For people, in the 64 characters that a common name may have."""
    text = _counted("stage", stages) + (f" of {_counted('lane', lanes)}" if lanes else "")
    if len(text) <= 64:
        return text
    some = f"{len(stages)} stages, {stages[0]} to {stages[-1]}"
    return f"{some}, of {len(lanes)} lanes, {lanes[0]} to {lanes[-1]}" if lanes else some


def _counted(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'s' * (len(numbers) > 1)} {spell_numbers(numbers)}"


def _subject(run: str, what: str) -> x509.Name:
    names = ((NameOID.ORGANIZATION_NAME, run), (NameOID.COMMON_NAME, what))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in names])


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(**given: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: given.get(name, False) for name in names})


# -- read and judged ------------------------------------------------------------------------------------------------


class CertificateError(ValueError):
    """Bytes that are no certificate, or one that says nothing of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateIdentity:
    """What a certificate says. names: all its DNS names, which is what counts; run, stages, lanes (none: all): the
    same, readable."""

    run: str
    names: frozenset[str]
    stages: tuple[int, ...]
    lanes: tuple[int, ...]
    authority: bool
    begins: datetime
    ends: datetime

    def __str__(self) -> str:
        return f"{'no stage' if not self.stages else _short(self.stages, self.lanes)} of run '{self.run}'"

    def asked(self, place: GridPlace) -> str:
        """What it does not say, of a place that its holder may not serve: which stage, or in which lane."""
        return f"stage {place.stage}{f' of lane {place.lane}' if self.lanes or place.lane else ''}"

    def serves(self, run: str, place: GridPlace) -> bool:
        """Whether its holder may serve that place of that run."""
        return not self.names.isdisjoint((place_name(run, place), all_lanes_name(run, place.stage)))


def parse(data: bytes) -> x509.Certificate:
    """From PEM or DER. Raises CertificateError."""
    try:
        pem = data.lstrip().startswith(b"-----")
        return x509.load_pem_x509_certificate(data) if pem else x509.load_der_x509_certificate(data)
    except _UNREADABLE:
        raise CertificateError("it is no certificate") from None


def read(certificate: x509.Certificate) -> CertificateIdentity:
    """Raises CertificateError."""
    try:
        runs = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        extensions = certificate.extensions
        names, authority = frozenset[str](), False
        for extension in extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                names = frozenset(extension.value.get_values_for_type(x509.DNSName))
            elif isinstance(extension.value, x509.BasicConstraints):
                authority = extension.value.ca
        run = str(runs[0].value) if runs else ""
        found = [each for each in map(_PLACE.fullmatch, names) if each and each["run"] == run_name(run)]
        stages = sorted({int(each["stage"]) for each in found})
        lanes = [] if any(each["lane"] is None for each in found) else sorted({int(each["lane"]) for each in found})
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except _UNREADABLE:
        raise CertificateError("it is no certificate that can be read") from None
    if not (0 < len(run) <= 64 and run.isprintable()) or not (authority or run_name(run) in names):
        raise CertificateError("it does not name a run of thinpipe")
    return CertificateIdentity(
        run=run,
        names=names,
        stages=tuple(stages),
        lanes=tuple(lanes),
        authority=authority,
        begins=begins,
        ends=ends,
    )


class Flaw(StrEnum):
    """What can be wrong with a certificate for a purpose."""

    UNREADABLE = "unreadable"
    AUTHORITY = "authority"
    RUN = "run"
    EXPIRED = "expired"
    EARLY = "not yet valid"
    PLACE = "place"


def judge(
    certificate: x509.Certificate, authority: x509.Certificate, *, run: str, place: GridPlace | None, now: datetime
) -> tuple[Flaw, str] | None:
    """What is wrong with a node's certificate, as the rest of a sentence that begins with "its certificate"; None if
    its holder may serve `place` of `run` now (None: any)."""
    try:
        said = read(certificate)
    except CertificateError as error:
        said = error
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, *_UNREADABLE):
        other = f", for run '{said.run}'" if isinstance(said, CertificateIdentity) and said.run != run else ""
        return Flaw.AUTHORITY, f"is from another authority than this run's{other}"
    if isinstance(said, CertificateError):
        return Flaw.UNREADABLE, f"cannot be used: {said}"
    if run_name(run) not in said.names:
        return Flaw.RUN, f"is for run '{said.run}', not for '{run}'"
    for each, whose in ((said, ""), (read(authority), ", as the authority's own")):
        if now >= each.ends:
            return Flaw.EXPIRED, f"expired on {spell_moment(each.ends)}{whose}"
        if now < each.begins:
            return Flaw.EARLY, f"is not valid before {spell_moment(each.begins)}{whose}"
    if place is not None and not said.serves(run, place):
        return Flaw.PLACE, f"is for {said}, not for {said.asked(place)}"
    return None


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
